"""Contrasts without models: statistics of two arrays of tokens and neurons, summed in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact.contrast import DIFFERENCE, NAME, A, B, Contrast
from relneuron.artifact.manifest import Manifest

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
