"""A corpus study as the report needs it: counts, neurons, entropies and NLL, held to each other.

methods/counts/page.py calls `read_group_study` for a folder of `count`, `identify` and `nll`. No
model is needed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.analyses.uncertainty import NAN
from relneuron.artifact.counts import NAME, Counts
from relneuron.artifact.files import Json, RelneuronError, sha256
from relneuron.artifact.modules import module_layers
from relneuron.artifact.neurons import Neuron, NeuronFile, check_neurons
from relneuron.artifact.reading import open_tensors
from relneuron.methods.counts.rises import CLEAN, NO_CELLS, NllCells, read_nll
from relneuron.report.page import PageKind, opened
from relneuron.report.tables import Array, Spread, spread

_COUNT = "count MODEL GROUP=TEXT... -o DIR"
_NLL = "nll MODEL DIR/neurons.json GROUP=TEXT... -o DIR"
PAGE = PageKind(
    "study",
    reads={
        "manifest.json": _COUNT,
        NAME: _COUNT,
        "neurons.json": "identify DIR -o DIR/neurons.json",
        "scores.safetensors": "identify DIR -o DIR/neurons.json",
        "nll.csv": _NLL,
        "nll_windows.csv": _NLL,
    },
    needs=(),
    marks=(NAME, "nll.csv"),
    hints=("neurons.json",),
    again="run the stages from identify on again",
    build="relneuron.methods.counts.page:build",
)


class Activity(NamedTuple):
    """How often neurons of one site are active: the share of a group's tokens, (G, L, F)."""

    site: str
    groups: list[str]
    probability: Array


@dataclass(frozen=True)
class GroupStudy:
    """`groups`: those counted, then those that only neurons.json or nll.csv know."""

    manifest: Json
    model: Json  # layers, width and hidden at least, as far as a file says
    counts: Counts | None
    neurons: NeuronFile | None
    entropy: Array | None  # (L, F), before the filter
    entropy_groups: int
    activity: Activity | None
    cells: NllCells
    dropped: dict[str, int]  # tokens of windows that were not full, where that was noted

    @cached_property
    def sets(self) -> dict[str, list[Neuron]]:
        """Each set's neurons once, best first."""
        if self.neurons is None:
            return {}
        shape = self.neurons.model
        return {name: check_neurons(rows, shape) for name, rows in self.neurons.sets.items()}

    @cached_property
    def groups(self) -> list[str]:
        counted = self.counts.groups if self.counts else []
        return list(dict.fromkeys([*counted, *self.sets, *self.cells.groups]))

    @cached_property
    def times(self) -> Counter[Neuron]:
        """In how many sets each chosen neuron is."""
        return Counter(neuron for chosen in self.sets.values() for neuron in chosen)

    @property
    def method(self) -> str:
        return self.neurons.method if self.neurons else ""

    @property
    def n_layers(self) -> int:
        return int(self.model["layers"])

    @property
    def layer_names(self) -> list[str]:
        """The number of each layer; in a model of several modules with the module's name."""
        if "modules" not in self.model:
            return [str(layer) for layer in range(self.n_layers)]
        own = module_layers(self.model).items()
        return [f"{name} {i}" for name, layers in own for i in range(len(layers))]

    @property
    def n_neurons(self) -> int:
        """The neurons that could be chosen: those of the site that was counted."""
        if self.entropy is not None:
            return int(np.isfinite(self.entropy).sum())
        is_down = {site for _, site, _ in self.times} == {"down"}
        return self.n_layers * int(self.model["hidden" if is_down else "width"])

    def selected(self, key: str) -> float:
        """A number that identify noted about the whole selection; NaN if it did not."""
        value = self.neurons.selection.get(key) if self.neurons else None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number and value is not None else NAN

    @property
    def highest_entropy(self) -> float:
        """ln of the number of groups: evenly active in all."""
        return float(np.log(self.entropy_groups))

    @cached_property
    def chosen_entropies(self) -> Array:
        """Of each chosen neuron once, if they were chosen by entropy."""
        if self.entropy is None or self.method != "lape":
            return np.empty(0)
        return np.array([self.entropy[layer, index] for layer, _, index in self.times], np.float64)

    @cached_property
    def candidates(self) -> NDArray[np.bool_] | None:
        """Neurons whose probability is above the threshold in some group (L, F)."""
        threshold = self.selected("threshold")
        if self.activity is None or self.entropy is None or np.isnan(threshold):
            return None
        highest: Array = np.fmax.reduce(self.activity.probability, axis=0)
        return np.asarray(highest > threshold, dtype=np.bool_)

    # Rises: a set without neurons changes nothing and is left out of every mean.

    def is_random(self, mask: str) -> bool:
        return mask.startswith("random.") and mask not in self.sets

    def is_set(self, mask: str) -> bool:
        if mask == CLEAN or self.is_random(mask):
            return False
        return self.neurons is None or bool(self.sets.get(mask))

    @cached_property
    def off(self) -> NllCells:
        """The cells of every mask that is a set with neurons, mask by mask."""
        cells = np.flatnonzero(self.cells.of([*map(self.is_set, self.cells.masks)]))
        return self.cells.at(cells[np.argsort(self.cells.mask[cells], kind="stable")])

    @cached_property
    def own(self) -> NllCells:
        return self.off.at(self.off.is_own)

    @cached_property
    def others(self) -> NllCells:
        return self.off.at(~self.off.is_own)

    @cached_property
    def random(self) -> NllCells:
        return self.cells.at(self.cells.of([*map(self.is_random, self.cells.masks)]))


def rise(cells: NllCells) -> Spread:
    return spread(cells.rise)


def read_group_study(folder: Path) -> GroupStudy:
    """Read a folder of a corpus study; a file whose digest is not the manifest's raises."""
    with opened(folder, PAGE) as manifest:
        there = {name for name in PAGE.reads if (folder / name).exists()}
        there -= _stale(folder, manifest)
        if not there & {NAME, "neurons.json"}:
            raise RelneuronError(
                f"{folder} holds no {NAME} and no neurons.json",
                f"make them with: relneuron count MODEL GROUP=TEXT... -o {folder}",
                2,
            )
        neurons = NeuronFile.read(folder / "neurons.json") if "neurons.json" in there else None
        counts = Counts.read(folder / NAME) if NAME in there else None
        windows = folder / "nll_windows.csv" if "nll_windows.csv" in there else None
        has_scores = neurons and "scores.safetensors" in there
        scores = read_scores(folder / ("scores.safetensors" if has_scores else "none"), neurons)
        study = GroupStudy(
            manifest,
            _shape(manifest, neurons, counts),
            counts,
            neurons,
            *scores[:2],
            _activity(manifest, counts) or scores[2],
            read_nll(folder / "nll.csv", windows) if "nll.csv" in there else NO_CELLS,
            note(manifest, "dropped_tokens"),
        )
        _check(study)
        return study


def _stale(folder: Path, manifest: Json) -> set[str]:
    """Files that a stage made from others than those that are there: not of this study."""
    stages, neurons = manifest["stages"], folder / "neurons.json"
    stale: set[str] = set()
    if not (stages and manifest["files"] and neurons.exists()):
        return stale
    chosen = stages.get("identify", {}).get("files", ())
    if neurons.name not in chosen:
        stale.add("scores.safetensors")
        # An imported set is of no stage.
        if "count" in stages and NeuronFile.read(neurons).method != "imported":
            return stale | {neurons.name, "nll.csv", "nll_windows.csv"}
    if stages.get("nll", {}).get("inputs", {}).get("neurons") != sha256(neurons):
        stale |= {"nll.csv", "nll_windows.csv"}
    return stale


def read_scores(
    path: Path, neurons: NeuronFile | None
) -> tuple[Array | None, int, Activity | None]:
    """Entropies (L, F), the number of groups they are over, and probabilities if they are there."""
    if neurons is None or not path.exists():
        return None, 0, None
    with open_tensors(path, "identify DIR -o DIR/neurons.json --method lape") as file:
        groups = file.names_of("groups") or list(neurons.sets)
        entropy = [key for key in file.names if key.startswith("lape.")]
        active = [key for key in file.names if key.startswith("probability.")]
        found = activity = None
        if entropy:
            found = file.get(entropy[0], (None, None), "F64", "F32").astype(np.float64)
        if active:
            shape = (len(groups), None, None)
            probability = file.get(active[0], shape, "F64", "F32").astype(np.float64)
            activity = Activity(active[0].partition(".")[2], groups, probability)
    return found, len(groups), activity


def _activity(manifest: Json, counts: Counts | None) -> Activity | None:
    """Probabilities from the counts, of the site that the neurons were identified at."""
    if counts is None or not counts.sites:
        return None
    asked = manifest["stages"].get("identify", {}).get("inputs", {})
    site = asked.get("site") if asked.get("site") in counts.sites else counts.sites[0]
    # As identify divides: its threshold is one of these numbers.
    kind: Any = np.float32 if asked.get("precision") == "float32" else np.float64
    ran = counts.tokens_at()
    tokens = np.where(ran == 0, np.nan, ran).astype(kind)
    probability = counts.arrays[f"count.{site}"].astype(kind) / tokens[:, :, None]
    return Activity(str(site), counts.groups, probability.astype(np.float64))


def note(manifest: Json, key: str) -> dict[str, int]:
    """What a stage noted per group under `key`, wherever in the manifest; {} if none did."""
    for name, value in manifest.items():
        if name == key and isinstance(value, dict):
            return {group: n for group, n in value.items() if isinstance(n, int)}
        if isinstance(value, dict) and (found := note(value, key)):
            return found
    return {}


def _shape(manifest: Json, neurons: NeuronFile | None, counts: Counts | None) -> Json:
    model: Json = dict(manifest.get("model") or {}) | dict(neurons.model if neurons else {})
    if counts:
        for name, array in counts.arrays.items():
            width = "hidden" if name.endswith(".down") else "width"
            model = {"layers": array.shape[1], width: array.shape[2]} | model
    return {"width": 0, "hidden": 0} | model


def _check(study: GroupStudy) -> None:
    """Raise unless the files are of one model."""
    if study.counts and not study.counts.groups:
        raise ValueError("the counts are of no group")
    sizes = {study.n_layers * int(study.model[key]) for key in ("width", "hidden")}
    arrays = dict(study.counts.arrays if study.counts else {})
    arrays |= {"probability": study.activity.probability} if study.activity else {}
    arrays |= {"lape": study.entropy[None]} if study.entropy is not None else {}
    for name, array in arrays.items():
        n_layers, width = array.shape[1:]
        if n_layers != study.n_layers or n_layers * width not in sizes:
            raise ValueError(f"{name} has the shape {array.shape}, the model another")
    if study.activity and len(study.activity.groups) != len(study.activity.probability):
        raise ValueError("probabilities and groups are not as many")
    width = study.activity.probability.shape[2] if study.activity else 0
    if study.activity and any(index >= width for _, _, index in study.times):
        raise ValueError("a neuron is not at the site that was counted")
