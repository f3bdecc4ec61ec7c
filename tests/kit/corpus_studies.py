"""Small corpus studies written file by file with numpy.

No model is needed; the tests of the report on a corpus use them. LAPE is computed from its formula.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from relneuron.artifact.counts import Counts
from tests.kit.pages import write_csv

GROUPS = ("en", "zh", "fr")


def entropies(p: np.ndarray) -> np.ndarray:
    """-sum over groups of q ln q, q = p / sum of p, with 0 for 0 ln 0 and 0 / 0; (G, L, F)."""
    result = np.zeros(p.shape[1:])
    for place in np.ndindex(*p.shape[1:]):
        values = p[(slice(None), *place)]
        for value in values[values > 0] / values.sum():
            result[place] -= value * math.log(value)
    return result


def write_corpus_study(
    folder: Path,
    groups: Sequence[str] = GROUPS,
    *,
    layers: int = 4,
    width: int = 50,
    top: int = 30,
    sets: dict[str, list[list[Any]]] | None = None,
    method: str = "lape",
    n_windows: int = 12,
    model: str = "a/model",
    manifest: dict[str, Any] | None = None,
    slow_entropy: bool = True,
) -> Path:
    """Counts, LAPE neurons, scores, the NLL matrix and a manifest of random numbers.

    Some neurons of a layer are mostly active in one group, some in two; the NLL of a group's text
    rises by about 1 with its own set off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    n = len(groups)
    tokens = rng.integers(900_000, 3_000_000, n)
    p = np.repeat(rng.beta(0.4, 3, (1, layers, width)), n, axis=0)
    p *= np.exp(rng.normal(0, 0.3, p.shape))
    for g in range(n):
        for first, step in ((g, n + 2), (2 * g, 3 * n), (2 * g + 2, 3 * n)):
            p[g, :, first::step] *= 1 + 12 * rng.random(p[g, :, first::step].shape) ** 2
    p[:, :, 3::17] *= 1e-3
    p[:, :, 5::41] = 0
    count = np.minimum(np.rint(p * tokens[:, None, None]), tokens[:, None, None]).astype(np.int64)
    Counts(list(groups), tokens, {"count.act": count}).write(folder / "counts.safetensors")
    p = count / tokens[:, None, None]
    if slow_entropy:
        entropy = entropies(p)
    else:
        share = p / np.maximum(p.sum(axis=0), 1e-300)
        entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=0)
    threshold = float(np.sort(p.ravel())[round(0.8 * p.size) - 1])
    order = np.argsort(
        np.where((p > threshold).any(axis=0), entropy, np.inf).ravel(), kind="stable"
    )
    if sets is None:
        sets = {name: [] for name in groups}
        for flat in order[:top].tolist():
            layer, index = divmod(flat, width)
            for g, name in enumerate(groups):
                if p[g, layer, index] > threshold:
                    sets[name].append([layer, "gate", index, float(entropy[layer, index])])
    shape = {"layers": layers, "width": width, "hidden": 16}
    neurons = {
        "format": "relneuron.neurons/1",
        "model": {"id": model, **shape},
        "method": method,
        "selection": {"threshold": threshold, "bar": threshold},
        "sets": sets,
    }
    (folder / "neurons.json").write_text(json.dumps(neurons), encoding="utf-8")
    save_file(
        {"lape.act": entropy, "probability.act": p.astype(np.float32)},
        folder / "scores.safetensors",
        {"groups": json.dumps(list(groups))},
    )
    cells, windows = [], []
    clean = {name: 2.2 + 0.3 * rng.standard_normal(n_windows) for name in groups}
    for mask in ("clean", *sets):
        for g, name in enumerate(groups):
            rise = 0.02 * rng.standard_normal(n_windows) + 0.01 * ((g % 3) - 1)
            rise = 0 * rise if mask == "clean" else rise + (mask == name) * (1 + 0.2 * g)
            values = clean[name] + rise
            for w, value in enumerate(values.tolist()):
                windows.append([mask, name, w, 31, value])
            error = values.std(ddof=1) / math.sqrt(n_windows) if n_windows > 1 else ""
            mean = float(values.mean())
            cells.append([mask, name, n_windows, 31 * n_windows, mean, error, math.exp(mean)])
    write_csv(folder / "nll.csv", NLL, cells)
    write_csv(folder / "nll_windows.csv", ["mask", "group", "window", "n_tokens", "nll"], windows)
    head = {
        "schema": "relneuron.study/1",
        "model": {"id": model, **shape},
        "stages": {},
        "files": {},
    }
    (folder / "manifest.json").write_text(json.dumps(head | (manifest or {})), encoding="utf-8")
    return folder


NLL = ["mask", "group", "n_windows", "n_tokens", "nll", "nll_se", "perplexity"]


def sets_of(study: Path) -> dict[str, list[tuple[int, str, int]]]:
    sets = json.loads((study / "neurons.json").read_text(encoding="utf-8"))["sets"]
    return {name: [tuple(row[:3]) for row in rows] for name, rows in sets.items()}


def kept(folder: Path, *names: str, **options: Any) -> Path:
    """A study with no other files than these."""
    for path in write_corpus_study(folder, **options).iterdir():
        if path.name not in names:
            path.unlink()
    return folder
