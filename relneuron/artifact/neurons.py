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
        """Refuse neurons of another model: layers, width and hidden must be the same."""
        ours = {key: self.model.get(key) for key in ("layers", "width", "hidden")}
        theirs = {key: shape.get(key) for key in ours}
        if ours != theirs:
            raise RelneuronError(
                f"the neurons are of a model of shape {ours}, this model has {theirs}",
                "identify the neurons on this model, or give the model they come from",
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

    widths  how many neurons each site of a layer has, in the order that breaks ties
    """

    layers: int
    widths: dict[str, int]

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Shape:
        """Of what a file says of a model: gate, up and down, and those of q to o that it names."""
        widths = {"gate": model["width"], "up": model["width"], "down": model["hidden"]}
        widths |= {site: model[site] for site in ATTENTION if site in model}
        return cls(int(model["layers"]), {site: int(width) for site, width in widths.items()})

    @property
    def per_layer(self) -> int:
        return sum(self.widths.values())

    @property
    def total(self) -> int:
        """L * (2F + D), or more with attention: the outputs of all projections of all layers."""
        return self.layers * self.per_layer

    @cached_property
    def starts(self) -> dict[str, int]:
        """At which place of a layer each site begins."""
        return dict(zip(self.widths, accumulate(self.widths.values(), initial=0), strict=False))

    def blocks(self) -> Iterator[tuple[int, str, int]]:
        """(layer, site, width) in the order of the neurons."""
        for layer in range(self.layers):
            for site, width in self.widths.items():
                yield layer, site, width

    def span(self, layer: int, site: str) -> slice:
        """The places of a site in a layer."""
        start = layer * self.per_layer + self.starts[site]
        return slice(start, start + self.widths[site])

    def site_places(self, site: str) -> NDArray[np.int64]:
        """The places of all neurons of a site, ascending."""
        layers = np.arange(self.layers) * self.per_layer + self.starts[site]
        return (layers[:, None] + np.arange(self.widths[site])).reshape(-1)

    def places(self, neurons: Iterable[Sequence[Any]]) -> NDArray[np.int64]:
        """The places of (layer, site, index, ...) rows, in their order."""
        found = [la * self.per_layer + self.starts[site] + i for la, site, i, *_ in neurons]
        return np.array(found, np.int64)

    def neurons(self, places: NDArray[np.int64]) -> list[Neuron]:
        """The neurons that stand at some places, in their order."""
        names, starts = list(self.widths), np.array([*self.starts.values()])
        layer, rest = np.divmod(places, self.per_layer)
        site = np.searchsorted(starts, rest, side="right") - 1
        rows = zip(layer.tolist(), site.tolist(), (rest - starts[site]).tolist(), strict=True)
        return [(la, names[s], i) for la, s, i in rows]


def check_neurons(neurons: Iterable[Sequence[Any]], shape: Mapping[str, int]) -> list[Neuron]:
    """Neurons as (layer, site, index), each once, in order; out of the model's range raises."""
    widths = Shape.of(shape).widths
    result: dict[Neuron, None] = {}
    for neuron in neurons:
        layer, site, index = int(neuron[0]), str(neuron[1]), int(neuron[2])
        if site not in widths or not 0 <= layer < shape["layers"] or not 0 <= index < widths[site]:
            raise RelneuronError(
                f"neuron (layer {layer}, site {site!r}, index {index}) is not in a model with "
                f"{shape['layers']} layers, width {shape['width']}, hidden {shape['hidden']}",
                f"layers and indices count from zero; sites are {', '.join(widths)}",
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


def all_scores(scores: Mapping[str, Array]) -> Array:
    """The scores of all neurons (M,) float32, in the order (layer, site, index).

    The sites are gate < up < down < q < k < v < o, those that `scores` has.
    """
    blocks = [np.asarray(scores[s], np.float32) for s in (*SITES, *ATTENTION) if s in scores]
    return np.concatenate(blocks, axis=1).reshape(-1)


def top_k(
    scores: Mapping[str, Array], k: int, *, lowest: bool = False, without: Array | None = None
) -> Selection:
    """The k neurons with the highest scores of `{gate: (L, F), up: (L, F), down: (L, D)}`.

    Scores are compared as float32; equal ones are ordered by layer, then gate < up < down, then
    index (methods A8). With `lowest` those with the lowest scores, the lowest first; `without`
    these places.
    """
    flat = all_scores(scores)
    keys = flat.copy() if lowest else -flat
    if without is not None:
        keys[without] = np.inf
    k = min(k, flat.size - (0 if without is None else len(without)))
    order = np.argsort(keys, kind="stable")[:k]
    widths = {s: scores[s].shape[1] for s in (*SITES, *ATTENTION) if s in scores}
    names = Shape(len(next(iter(scores.values()))), widths).neurons(order)
    chosen = [(*name, float(flat[i])) for name, i in zip(names, order, strict=True)]
    cut = float(flat[order[-1]]) if k else float("nan")
    return Selection(
        chosen,
        order,
        cut,
        int((flat == cut).sum()),
        int((flat[order] == cut).sum()),
        int((flat == 1).sum()),
    )


def random_neurons(shape: Mapping[str, int], k: int, seed: int) -> list[Neuron]:
    """k neurons drawn without replacement from all outputs of the sites that `shape` has."""
    order = Shape.of(shape)
    everything = range(order.total)
    drawn = random.Random(f"relneuron.random.{seed}").sample(everything, min(k, len(everything)))
    return order.neurons(np.array(sorted(drawn), np.int64))


PAPER_TOP = 3000  # arXiv 2502.17355, section 3.2
DEFAULT_SHARE = 0.1  # without --top, never more than this share of a small model's neurons


def default_top(shape: Mapping[str, int]) -> int:
    """3,000 neurons as in the paper, but at most a tenth of a small model's."""
    return min(PAPER_TOP, int(DEFAULT_SHARE * Shape.of(shape).total))
