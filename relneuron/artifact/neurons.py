"""neurons.json: named sets of neurons, where a neuron stands in a model, and from scores to sets.

`identify` and `import` write it, `ablate`, `nll`, `generate` and the reports read it. Ties have one
rule; random sets to compare with are drawn here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.artifact.files import Json, RelneuronError, atomic_write, require
from relneuron.artifact.modules import are_modules
from relneuron.artifact.reading import read_json

NEURONS_FORMAT = "relneuron.neurons/1"


SITES = ("gate", "up", "down")  # the order that breaks ties in a ranking


ATTENTION = ("q", "k", "v", "o")  # after them, where they were recorded


Neuron = tuple[int, str, int]  # (layer, site, index), layer and index from zero
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class NeuronFile:
    """neurons.json: named sets of neurons, best first, and the model they belong to."""

    model: Json
    method: str
    sets: dict[str, list[tuple[int, str, int, float]]]
    selection: Json

    def write(self, path: str | Path) -> None:
        rows = {name: [list(neuron) for neuron in chosen] for name, chosen in self.sets.items()}
        head = {"format": NEURONS_FORMAT, "model": self.model, "method": self.method}
        text = json.dumps(head | {"selection": self.selection, "sets": {}}, indent=1)
        lines = [
            f"  {json.dumps(name)}: [\n   "
            + ",\n   ".join(json.dumps(row) for row in chosen)
            + "\n  ]"
            for name, chosen in rows.items()
        ]
        body = '"sets": {\n' + ",\n".join(lines) + "\n }"
        atomic_write(Path(path), (text.replace('"sets": {}', body) + "\n").encode())

    @classmethod
    def read(cls, path: str | Path) -> NeuronFile:
        """The neurons of a file, or an error that says where in it what is wrong."""
        path, made_by = Path(path), "identify DIR -o neurons.json"
        data = read_json(require(path, made_by), "neurons.json")

        def wrong(where: str, expected: str) -> RelneuronError:
            return RelneuronError(
                f"{path} is no neuron file of format {NEURONS_FORMAT}: {where} is not {expected}",
                f"make it again with: relneuron {made_by} --force",
            )

        if not isinstance(data, dict) or data.get("format") != NEURONS_FORMAT:
            raise wrong("format", repr(NEURONS_FORMAT))
        kinds: Json = {"model": dict, "method": str, "selection": dict, "sets": dict}
        for key, kind in kinds.items():
            if not isinstance(data.get(key, {} if key == "selection" else None), kind):
                raise wrong(key, "a text" if kind is str else "an object")
        for key in ("layers", "width", "hidden", *(a for a in ATTENTION if a in data["model"])):
            if not _is_index(data["model"].get(key)):
                raise wrong(f"model.{key}", "a number of neurons or layers")
        if not _are_widths(data["model"]):
            raise wrong("model.widths, .hiddens or .experts", "a number for each layer")
        if not are_modules(data["model"]):
            raise wrong("model.modules", "how many of the layers each module has")
        sets = {}
        for name, rows in data["sets"].items():
            if not isinstance(rows, list):
                raise wrong(f"sets.{name}", "a list")
            for number, row in enumerate(rows, 1):
                if not _is_neuron(row):
                    raise wrong(f"neuron {number} of {name!r}", "[layer, site, index, score]")
            sets[name] = [(layer, site, index, float(score)) for layer, site, index, score in rows]
        return cls(data["model"], data["method"], sets, data.get("selection", {}))

    def check_model(self, shape: Mapping[str, object]) -> None:
        """Refuse neurons of another model: the shape (`shape_of`) must be the same."""
        ours, theirs = shape_of(self.model), shape_of(shape)
        # Files of other programs do not say of a model what is not of one width.
        apart = set(UNEVEN) - (ours.keys() & theirs.keys())
        ours, theirs = ({k: v for k, v in s.items() if k not in apart} for s in (ours, theirs))
        if ours != theirs:
            raise RelneuronError(
                f"the neurons are of a model of shape {ours}, this model has {theirs}",
                "identify the neurons on this model, or give the model they come from",
            )


SHAPE = ("layers", "width", "hidden")
# Of a model whose layers differ, whose MLPs are not gated, or are experts; or of its modules.
UNEVEN = ("widths", "gated", "experts", "expert_width", "hiddens", "modules")


def shape_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of a model's MLPs: what `Shape.of` needs, without the attention's."""
    uneven = {key: model[key] for key in UNEVEN if key in model}
    return {key: model.get(key) for key in SHAPE} | uneven


def _are_widths(model: Mapping[str, Any]) -> bool:
    gated = model.get("gated", True)
    kinds = gated if isinstance(gated, list) and len(gated) == model["layers"] else [gated]
    if not all(isinstance(kind, bool) for kind in kinds):
        return False
    if not _is_index(model.get("expert_width", 0)):
        return False
    limits = {"widths": "width", "experts": "width", "hiddens": "hidden"}
    return all(
        isinstance(sizes, list)
        and len(sizes) == model["layers"]
        and all(_is_index(size) and size <= model[limit] for size in sizes)
        for sizes, limit in ((model[key], limit) for key, limit in limits.items() if key in model)
    )


def _is_index(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_neuron(row: object) -> bool:
    """Whether a row is [layer, site, index, score]."""
    if not isinstance(row, list) or len(row) != 4:
        return False
    layer, site, index, score = row
    is_number = type(score) is float or (type(score) is int and abs(score) < 1 << 63)
    return _is_index(layer) and isinstance(site, str) and _is_index(index) and is_number


@dataclass(frozen=True)
class Shape:
    """A model's neurons in their order, by layer, then site, then index: each has a place in it.

    widths  how many neurons each site of a layer has at most, in the order that breaks ties
    inner   how many gate and up have in each layer, where the layers differ; 0: no MLP, or none
            that text runs, and so no neuron of any site
    experts of a mixture, how many each layer has and how wide one is: neuron i of expert e has the
            index e * width + i, and those of a shared expert are behind them
    gated   whether each layer has up, where the layers differ; no neuron of up where it has none
    hiddens how many down has in each layer, where they differ
    modules of a model that reads pictures, by name in the order of MODULES, how many of the layers
            are its own: they are numbered through
    """

    layers: int
    widths: dict[str, int]
    inner: tuple[int, ...] | None = None
    experts: tuple[tuple[int, ...], int] = ((), 0)
    gated: tuple[bool, ...] | None = None
    hiddens: tuple[int, ...] | None = None
    modules: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Shape:
        """Of what a file says of a model: gate, up and down, and those of q to o that it names.

        `gated` false: there is no up; a list: only layers where it is true have one. `widths` and
        `hiddens`: those of the layers; `experts`, `expert_width`; `modules`.
        """
        widths = {"gate": model["width"], "up": model["width"], "down": model["hidden"]}
        gated, hiddens = model.get("gated", True), model.get("hiddens")
        if not gated:
            del widths["up"]
        widths |= {site: model[site] for site in ATTENTION if site in model}
        inner = model.get("widths")
        return cls(
            int(model["layers"]),
            {site: int(width) for site, width in widths.items()},
            None if inner is None else tuple(map(int, inner)),
            (tuple(map(int, model.get("experts", ()))), int(model.get("expert_width", 0))),
            tuple(map(bool, gated)) if isinstance(gated, list) else None,
            None if hiddens is None else tuple(map(int, hiddens)),
            tuple(model.get("modules", {}).items()),
        )

    def width(self, layer: int, site: str) -> int:
        """How many neurons a site of a layer has."""
        inner = self.widths["gate"] if self.inner is None else self.inner[layer]
        if site == "gate":
            return inner
        if site == "up":
            return inner if self.gated is None or self.gated[layer] else 0
        most = self.hiddens[layer] if site == "down" and self.hiddens else self.widths[site]
        return most if inner or self.inner is None else 0

    @property
    def total(self) -> int:
        """L * (2F + D), or more with attention: the outputs of all projections of all layers."""
        return int(self._starts[-1])

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The place at which each site of each layer begins, and the end of them all."""
        widths = [self.width(la, site) for la in range(self.layers) for site in self.widths]
        return np.array([0, *accumulate(widths)], np.int64)

    @cached_property
    def _number(self) -> dict[str, int]:
        return {site: number for number, site in enumerate(self.widths)}

    def blocks(self) -> Iterator[tuple[int, str, int]]:
        """(layer, site, width) in the order of the neurons, without those that have none."""
        for layer in range(self.layers):
            for site in self.widths:
                if width := self.width(layer, site):
                    yield layer, site, width

    def span(self, layer: int, site: str) -> slice:
        """The places of a site in a layer."""
        block = layer * len(self.widths) + self._number[site]
        return slice(int(self._starts[block]), int(self._starts[block + 1]))

    def site_places(self, site: str) -> NDArray[np.int64]:
        """The places of all neurons of a site, ascending."""
        spans = (self.span(layer, site) for layer in range(self.layers))
        return np.concatenate([np.arange(span.start, span.stop) for span in spans])

    def places(self, neurons: Iterable[Sequence[Any]]) -> NDArray[np.int64]:
        """The places of (layer, site, index, ...) rows, in their order."""
        found = [self.span(layer, site).start + i for layer, site, i, *_ in neurons]
        return np.array(found, np.int64)

    def neurons(self, places: NDArray[np.int64]) -> list[Neuron]:
        """The neurons that stand at some places, in their order."""
        names = list(self.widths)
        block = np.searchsorted(self._starts, places, side="right") - 1
        layer, site = np.divmod(block, len(names))
        index = places - self._starts[block]
        rows = zip(layer.tolist(), site.tolist(), index.tolist(), strict=True)
        return [(la, names[s], i) for la, s, i in rows]

    def name(self, layer: int, site: str, index: int) -> str:
        """How tables and pages call a neuron: L3.up.345, of an expert L3 expert 12 up 345.

        In a model of several modules: vision L3.gate.345, the number of the layer inside of it.
        """
        where, (numbers, width) = self.layer_name(layer), self.experts
        n_routed = numbers[layer] * width if numbers else 0
        if not n_routed or site not in ("gate", "up"):
            return f"{where}.{site}.{index}"
        if index >= n_routed:
            return f"{where} shared {site} {index - n_routed}"
        return f"{where} expert {index // width} {site} {index % width}"

    def layer_name(self, layer: int) -> str:
        """L3, or vision L3 in a model of several modules."""
        inside = layer
        for name, n in self.modules:
            if inside < n:
                return f"{name} L{inside}"
            inside -= n
        return f"L{layer}"

    def flat(self, values: Mapping[str, Array]) -> Array:
        """(L, width) arrays by site as one (total,): each neuron's value at its place."""
        parts = [values[site][layer, :width] for layer, site, width in self.blocks()]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)


def check_neurons(neurons: Iterable[Sequence[Any]], shape: Mapping[str, Any]) -> list[Neuron]:
    """Neurons as (layer, site, index), each once, in order; out of the model's range raises."""
    order = Shape.of(shape)
    result: dict[Neuron, None] = {}
    for neuron in neurons:
        layer, site, index = int(neuron[0]), str(neuron[1]), int(neuron[2])
        is_there = site in order.widths and 0 <= layer < order.layers
        if not (is_there and 0 <= index < order.width(layer, site)):
            only = ""
            if is_there and index < order.widths[site]:
                only = f", {order.width(layer, site)} of them in this layer"
            raise RelneuronError(
                f"neuron (layer {layer}, site {site!r}, index {index}) is not in a model with "
                f"{shape['layers']} layers, width {shape['width']}, hidden {shape['hidden']}{only}",
                f"layers and indices count from zero; sites are {', '.join(order.widths)}",
            )
        result[layer, site, index] = None
    return list(result)


# --- from scores to sets -------------------------------------------------------------------------

ScoredNeuron = tuple[int, str, int, float]  # (layer, site, index, score)


class Selection(NamedTuple):
    """The chosen neurons, best first, and what a reader should know of the cut."""

    neurons: list[ScoredNeuron]
    places: Array  # of the chosen neurons in `all_scores`
    score_at_cut: float
    ties_at_cut: int  # neurons with just that score, chosen or not
    ties_chosen: int
    n_perfect: int  # neurons with the score 1


def all_scores(scores: Mapping[str, Array], order: Shape | None = None) -> Array:
    """The scores of all neurons (M,) float32, in the order (layer, site, index).

    The sites are gate < up < down < q < k < v < o, those that `scores` has. `order` is of layers
    that differ in width: what is beyond it are no neurons.
    """
    order = order or _whole(scores)
    return order.flat({site: np.asarray(scores[site], np.float32) for site in order.widths})


def _whole(scores: Mapping[str, Array]) -> Shape:
    widths = {site: scores[site].shape[1] for site in (*SITES, *ATTENTION) if site in scores}
    return Shape(len(next(iter(scores.values()))), widths)


def top_k(
    scores: Mapping[str, Array],
    k: int,
    *,
    lowest: bool = False,
    without: Array | None = None,
    order: Shape | None = None,
) -> Selection:
    """The k neurons with the highest scores of `{gate: (L, F), up: (L, F), down: (L, D)}`.

    Scores are compared as float32; equal ones are ordered by layer, then gate < up < down, then
    index (methods A8). With `lowest` those with the lowest scores, the lowest first; `without`
    these places. `order` is that of `all_scores`.
    """
    order = order or _whole(scores)
    flat = all_scores(scores, order)
    keys = flat.copy() if lowest else -flat
    if without is not None:
        keys[without] = np.inf
    k = min(k, flat.size - (0 if without is None else len(without)))
    places = np.argsort(keys, kind="stable")[:k]
    names = order.neurons(places)
    chosen = [(*name, float(flat[i])) for name, i in zip(names, places, strict=True)]
    cut = float(flat[places[-1]]) if k else float("nan")
    return Selection(
        chosen,
        places,
        cut,
        int((flat == cut).sum()),
        int((flat[places] == cut).sum()),
        int((flat == 1).sum()),
    )


def random_neurons(shape: Mapping[str, Any], k: int, seed: int) -> list[Neuron]:
    """k neurons drawn without replacement from all outputs of the sites that `shape` has."""
    order = Shape.of(shape)
    everything = range(order.total)
    drawn = random.Random(f"relneuron.random.{seed}").sample(everything, min(k, len(everything)))
    return order.neurons(np.array(sorted(drawn), np.int64))


PAPER_TOP = 3000  # arXiv 2502.17355, section 3.2
DEFAULT_SHARE = 0.1  # without --top, never more than this share of a small model's neurons


def default_top(shape: Mapping[str, Any]) -> int:
    """3,000 neurons as in the paper, but at most a tenth of a small model's."""
    return min(PAPER_TOP, int(DEFAULT_SHARE * Shape.of(shape).total))
