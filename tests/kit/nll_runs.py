"""A study of `nll` whose corpus is a list of windows, and what plain forwards say of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import relneuron.ablation.nll
from relneuron.ablation.nll import nll
from relneuron.ablation.options import NllOptions
from relneuron.artifact.neurons import NeuronFile
from relneuron.texts.sources import Source

LAYERS, WIDTH, HIDDEN, VOCABULARY = 3, 48, 32, 96
SHAPE = {"layers": LAYERS, "width": WIDTH, "hidden": HIDDEN}
SETS: dict[str, list[tuple[int, str, int, float]]] = {
    "en": [(i % LAYERS, "gate", 7 * i % WIDTH, 0.5) for i in range(20)],
    "zh": [(i % LAYERS, "gate", 5 * i % WIDTH, 0.5) for i in range(31)],
    "other": [(0, "up", 3, 0.1), (1, "down", 4, 0.1), (2, "down", 31, 0.1), (2, "gate", 1, 0.1)],
    "empty": [],
}
Array = np.ndarray[Any, Any]
# One of the sets is empty, which is said in each run.
EMPTY = "empty: its set has no neuron, so that nothing is off for it"


class Window(NamedTuple):
    group: int
    ids: Array
    first: Array


class Windows:
    """A corpus that is a list of windows: what the feed gives, and how it is entered."""

    def __init__(self, groups: Sequence[str], windows: Sequence[tuple[str, Sequence[int]]]) -> None:
        self.groups = list(groups)
        self.windows = [
            Window(self.groups.index(g), np.array(x, np.int32), np.zeros(len(x), bool))
            for g, x in windows
        ]
        self.notes: dict[str, Any] = {}

    def take(self, n: int) -> list[Window]:
        taken, self.windows = self.windows[:n], self.windows[n:]
        return taken

    def __enter__(self) -> Windows:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def drawn(n: int, length: int | None = None, seed: int = 0) -> list[list[int]]:
    """n windows of random ids, all of `length` or each of its own."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 24, n) if length is None else [length] * n
    return [rng.integers(3, 90, size).tolist() for size in lengths]


def text(windows: Sequence[Sequence[int]]) -> list[tuple[str, Sequence[int]]]:
    """Windows of three groups in turn."""
    return [(("en", "zh", "de")[i % 3], ids) for i, ids in enumerate(windows)]


def named_tokenizer() -> Any:
    """Nothing of it is needed but its name for a manifest."""
    return SimpleNamespace(bos_token_id=1, eos_token_id=2, get_vocab=lambda: {"a": 1})


def make_study(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A folder with neurons.json, where sources are not read."""
    patch.setattr("relneuron.texts.sources.describe_source", lambda source: {"group": source.group})
    patch.setattr("relneuron.texts.options.default_bos", lambda tokenizer: ("none", None))
    NeuronFile({"id": "m", **SHAPE}, "lape", SETS, {}).write(folder / "neurons.json")
    return folder


def plain(model: Any, ids: Sequence[int]) -> float:
    """Mean NLL of a window by one whole forward, log-softmax in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float().double()
    total = 0.0
    for place in range(1, len(ids)):
        row = logits[place - 1]
        total -= float(row[ids[place]] - torch.logsumexp(row, 0))
    return total / (len(ids) - 1)


def without(model: Any, neurons: Sequence[Sequence[Any]]) -> Any:
    """A copy with rows of gate, up and down weights at zero."""
    edited = copy.deepcopy(model)
    for layer, site, index, *_ in neurons:
        getattr(edited.model.layers[layer].mlp, f"{site}_proj").weight.data[index] = 0
    return edited


def run(
    model: Any,
    tokenizer: Any,
    folder: Path,
    texts: Sequence[tuple[str, Sequence[int]]],
    *,
    output: str = "o",
    groups: Sequence[str] = ("en", "zh", "de"),
    **asked: Any,
) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relneuron.ablation.nll, "Feed", lambda *_, **__: Windows(groups, texts))
        sources: Any = [Source(group=name) for name in groups]
        path = folder / "neurons.json"
        more = {name: asked.pop(name) for name in ("force", "backend") if name in asked}
        options = NllOptions(**{"window": 32, **asked})
        return nll(
            "m", model, tokenizer, path, sources, folder / output, options, quiet=True, **more
        )
