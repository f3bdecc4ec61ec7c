"""Contrasts without models: statistics of two arrays of tokens and neurons, summed in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.ablation.effect import Effect, causal_effects
from relneuron.ablation.outputs import Generated, lines_bytes
from relneuron.artifact.contrast import DIFFERENCE, NAME, A, B, Contrast
from relneuron.artifact.files import csv_bytes
from relneuron.artifact.manifest import Manifest
from relneuron.methods.contrast.choices import ChangeOptions
from relneuron.methods.contrast.rank import identify_contrast

Array = np.ndarray[Any, Any]

# E3 of the specification of arXiv 2406.14144: 4 tokens, 2 layers, 3 neurons.
M1 = np.array(
    [
        [[0.5, -1, 0], [2, 0.1, -0.2]],
        [[0.4, -1.2, 0.1], [1.8, 0.1, -0.1]],
        [[0.6, -0.8, 0.3], [2.2, 0.3, -0.3]],
        [[0.5, -1, 0], [2, 0.1, 0.2]],
    ],
    np.float32,
)
M2 = np.array(
    [
        [[0.5, -0.5, 0], [1, 0.1, -0.2]],
        [[0.1, -0.6, 0.1], [0.9, 0.1, -0.1]],
        [[0.6, -0.4, -0.1], [1.1, 0.3, -0.3]],
        [[0.2, -0.5, 0], [1, 0.1, 0.6]],
    ],
    np.float32,
)


def contrast_of(groups: Mapping[str, tuple[Array, Array]]) -> Contrast:
    """The contrast of each group's values of both models, (T, L, F) float32 each."""
    arrays: dict[str, list[Array]] = {}
    for first, second in groups.values():
        for site, values in ((A, first), (B, second), (DIFFERENCE, first - second)):
            finite = np.where(np.isfinite(values), values, 0).astype(np.float64)
            largest = np.where(np.isfinite(values), values, -np.inf).max(0, initial=-np.inf)
            found = {
                "count": (values > 0).sum(0),
                "sum": finite.sum(0),
                "sum_sq": np.square(finite).sum(0),
                "max": largest.astype(np.float32),
                "n_nonfinite": (~np.isfinite(values)).sum(0),
            }
            for name, array in found.items():
                arrays.setdefault(f"{name}.{site}", []).append(array)
    tokens = np.array([len(first) for first, _ in groups.values()], np.int64)
    return Contrast(list(groups), tokens, {name: np.stack(own) for name, own in arrays.items()})


def write_contrast(
    folder: Path, groups: Mapping[str, tuple[Array, Array]] | None = None, **facts: Any
) -> Path:
    """A folder as the stage `contrast` leaves it, of arrays; by default E3 in one group."""
    folder.mkdir(parents=True, exist_ok=True)
    contrast = contrast_of(groups or {"all": (M1, M2)})
    contrast.write(folder / NAME)
    n_layers, width = contrast.rms().shape
    model = {"id": "first", "layers": n_layers, "width": width, "hidden": 2}
    manifest = Manifest(folder)
    manifest.describe(**({"model": model, "groups": contrast.groups} | facts))
    manifest.finish("contrast", {"prompts": "x"}, [folder / NAME], reads=[])
    return folder


def write_contrast_study(
    folder: Path,
    groups: Sequence[str] = ("x", "y"),
    *,
    layers: int = 4,
    width: int = 60,
    sizes: Sequence[int] = (5, 20, 60),
    text: str = "yes",
    model: str = "a/model",
    manifest: Mapping[str, Any] | None = None,
    measured: bool = True,
    by_group: bool = False,
) -> Path:
    """A contrast of random numbers, its sets, and by `measured` texts and their effects.

    A tenth of the neurons of the last half of the layers change ten times as much as the others.
    With the K neurons of a set A writes B's text behind the first K / 6 of 12 prompts, with random
    ones behind none or one.
    """
    (folder / "manifest.json").unlink(missing_ok=True)
    rng = np.random.default_rng(3)
    scale = np.full((layers, width), 0.05)
    scale[layers // 2 :, ::10] = 0.5
    pairs = {}
    for n, name in enumerate(groups):
        a = rng.normal(size=(40 + 10 * n, layers, width)).astype(np.float32)
        pairs[name] = a, (a + scale * rng.normal(size=a.shape)).astype(np.float32)
    shape = {"id": model, "layers": layers, "width": width, "hidden": 16}
    write_contrast(folder, pairs, model=shape, model_b=shape | {"id": f"{model} b"})
    options = ChangeOptions(sizes=tuple(sizes), by_group=by_group)
    sets = identify_contrast(folder, folder / "neurons.json", options, force=True).sets
    if manifest is not None:
        path = folder / "manifest.json"
        known = json.loads(path.read_text(encoding="utf-8"))
        del known["digest"]
        path.write_text(json.dumps(known | {"files": {}} | dict(manifest)), encoding="utf-8")
    if not measured:
        return folder
    said = {"clean": 0, "donor": 12}
    for name, neurons in sets.items():
        said |= {name: min(12, len(neurons) // 6)}
        said |= {f"random.{seed}.{name}": seed for seed in (0, 1)}
    lines = [
        Generated(mask, "", f"p{i}", f"{text} {i}?", f"{text} {i < n}", 2, "eos")
        for mask, n in said.items()
        for i in range(12)
    ]
    costs = {m: np.array([[-float(i < n)] for i in range(12)]) for m, n in said.items()}
    (folder / "outputs.jsonl").write_bytes(lines_bytes(lines))
    rows = [["" if cell is None else cell for cell in row] for row in causal_effects(costs)]
    (folder / "effect.csv").write_bytes(csv_bytes(Effect._fields, rows))
    return folder
