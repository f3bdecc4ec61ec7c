"""A folder of a contrast as the report needs it: scores, sets, effects and texts, held together.

page.py calls `read_contrast_study`, without a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.ablation.effect import Effect
from relneuron.ablation.options import CLEAN, DONOR
from relneuron.ablation.outputs import Generated, read_outputs
from relneuron.artifact.contrast import MADE_BY, NAME, Contrast
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.neurons import NeuronFile, Shape, check_neurons
from relneuron.artifact.reading import Cells, read_csv
from relneuron.methods.contrast.rank import change, read_contrast
from relneuron.report.page import PageKind, opened

EFFECT, OUTPUTS = "effect.csv", "outputs.jsonl"
_IDENTIFY = "identify DIR -o DIR/neurons.json --method contrast"
PAGE = PageKind(
    "contrast",
    reads={
        "manifest.json": MADE_BY,
        NAME: MADE_BY,
        "neurons.json": _IDENTIFY,
        EFFECT: f"effect DIR/{OUTPUTS} -o DIR/{EFFECT} --cost COST",
        OUTPUTS: "generate MODEL_A PROMPTS --from MODEL_B --neurons DIR/neurons.json --off SET "
        f"-o DIR/{OUTPUTS}",
    },
    needs=("manifest.json", NAME),
    marks=(NAME,),
    hints=(),
    again="run the stages from contrast on again",
    build="relneuron.methods.contrast.page:build",
    first=True,  # answers that were patched stand in effects.csv, as those of any study
)
# A mask of random neurons: its seed and, where there are several sets, the one that it is beside.
_RANDOM = re.compile(r"random\.\d+(?:\.(.+))?", re.DOTALL)
_COLUMNS = Effect._fields[:9]

Array = np.ndarray[Any, Any]
Places = Array  # (K,) flat places l F + i


@dataclass(frozen=True)
class ContrastStudy:
    """What the files say.

    score    S (L, F) float64 over all tokens, NaN where a layer has no such neuron
    sets     by name the places of its neurons, best first, each once
    effects  the rows of effect.csv, by mask
    outputs  the lines of outputs.jsonl, by mask and then by prompt and seed
    """

    manifest: Json
    model: Json
    contrast: Contrast
    score: Array
    sets: Mapping[str, Places]
    effects: Mapping[str, Cells]
    outputs: Mapping[str, Mapping[tuple[str, int | None], Generated]]

    @cached_property
    def there(self) -> Places:
        """The places of all neurons that there are."""
        return np.flatnonzero(np.isfinite(self.score))

    @cached_property
    def squares(self) -> Array:
        """S^2 of every place, 0 where there is no neuron."""
        return np.nan_to_num(self.score.reshape(-1)) ** 2

    @cached_property
    def largest(self) -> str | None:
        """The set with the most neurons."""
        return max(self.sets, key=lambda name: len(self.sets[name]), default=None)

    @property
    def names(self) -> tuple[str, str]:
        """Of A and B."""
        of_b = self.manifest.get("model_b") or {}
        return str(self.model.get("id") or "model A"), str(of_b.get("id") or "model B")

    def controls(self, name: str, masks: Sequence[str]) -> list[str]:
        """The masks of random neurons beside a set: its own, or those of the one set that is."""
        found = {mask: drawn[1] for mask in masks if (drawn := _RANDOM.fullmatch(mask))}
        patched = [mask for mask in masks if mask in self.sets]
        return [
            mask for mask, of in found.items() if of == name or (of is None and patched == [name])
        ]

    def label(self, place: int) -> str:
        """A neuron as tables call it."""
        layer, index = divmod(place, self.score.shape[1])
        return Shape.of(self.model).name(layer, "gate", index).replace(".gate.", ".")


def read_contrast_study(folder: Path) -> ContrastStudy:
    """Read a folder; a file whose digest is not the manifest's raises."""
    with opened(folder, PAGE) as manifest:
        contrast, model = read_contrast(folder, manifest)
        order = Shape.of(model)
        score = change(contrast, str(folder / NAME))
        for layer in range(order.layers):
            score[layer, order.width(layer, "gate") :] = np.nan
        effects = folder / EFFECT
        study = ContrastStudy(
            manifest,
            model,
            contrast,
            score,
            _sets(folder / "neurons.json", model, score.shape[1]),
            {row["mask"]: row for row in read_csv(effects, _COLUMNS)} if effects.exists() else {},
            _outputs(folder / OUTPUTS),
        )
        for name, masks in ((EFFECT, study.effects), (OUTPUTS, study.outputs)):
            _check_masks(folder / name, masks, study)
        return study


def _sets(path: Path, model: Json, width: int) -> dict[str, Places]:
    """The places of each set; a neuron of gate, or of up, is the product of both."""
    if not path.exists():
        return {}
    neurons, sets = NeuronFile.read(path), {}
    neurons.check_model(model)
    for name, rows in neurons.sets.items():
        found = [(la, site, i) for la, site, i in check_neurons(rows, model) if site != "down"]
        sets[name] = np.array(list(dict.fromkeys(la * width + i for la, _, i in found)), np.int64)
    return sets


def _outputs(path: Path) -> dict[str, dict[tuple[str, int | None], Generated]]:
    found: dict[str, dict[tuple[str, int | None], Generated]] = {}
    for line in read_outputs(path) if path.exists() else ():
        found.setdefault(line.mask, {})[line.id, line.seed] = line
    return found


def _check_masks(path: Path, masks: Mapping[str, object], study: ContrastStudy) -> None:
    """Raise for masks that are neither of the neurons beside them nor random."""
    for mask in masks:
        if mask not in (CLEAN, DONOR, *study.sets) and not mask.startswith("random."):
            raise RelneuronError(
                f"{path} has the mask {mask}, of which neurons.json has no set",
                "generate with the neurons of this folder, or delete the file",
            )
