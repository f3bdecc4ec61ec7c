"""Text under masks and steering: a model whose texts are long, sets, a folder with all to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from relneuron.ablation.generate import generate
from relneuron.ablation.options import GenerateOptions
from relneuron.artifact.counts import NAME, Counts
from relneuron.artifact.neurons import NeuronFile
from relneuron.model.load import load_model, load_tokenizer
from relneuron.model.mlps.find import find_mlps

Sets = dict[str, list[tuple[int, str, int, float]]]

LAYERS, WIDTH, HIDDEN = 2, 48, 32
SHAPE = {"layers": LAYERS, "width": WIDTH, "hidden": HIDDEN}
PROMPTS = [
    "Person1 lives in",
    "Everybody knows that Person7 likes",
    "x",
    "Person3 works as a",
    "Person11 eats an apple and a plum and a pear, so",
]
NEW = 10
OFF = ("clean", "en", "zh", "fr")


def load_talkative(model_folder: Path) -> tuple[Any, Any]:
    """A model and its tokenizer, of texts that are long and differ from mask to mask."""
    model = load_model(str(model_folder))
    generator = torch.Generator().manual_seed(2)
    for mlp in find_mlps(model):
        weight = mlp.module.down_proj.weight.data
        weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return model, load_tokenizer(str(model_folder))


def make_sets() -> Sets:
    """Of three groups, and one that is empty: each run that switches it off says so."""
    rng = np.random.default_rng(0)
    found: Sets = {}
    for name in ("en", "zh", "fr"):
        chosen = sorted(rng.choice(LAYERS * WIDTH, 25, replace=False).tolist())
        found[name] = [(c // WIDTH, "gate", c % WIDTH, 0.5) for c in chosen]
    found["fr"] = found["fr"][:4] + [(0, "down", 3, 0.1), (1, "up", 7, 0.1)]
    found["empty"] = []
    return found


def write_study(folder: Path, sets: Sets) -> Path:
    """A folder with neurons, counts with moments, and prompts."""
    NeuronFile({"id": "m", **SHAPE}, "lape", sets, {}).write(folder / "neurons.json")
    rng = np.random.default_rng(1)
    shape = (2, LAYERS, WIDTH)
    tokens = np.array([1000, 500], np.int64)
    arrays = {
        "count.act": rng.integers(0, 500, shape),
        "sum.act": rng.normal(size=shape) * 1500,
        "sum_sq.act": np.ones(shape),
        "max.act": np.ones(shape, np.float32),
        "n_nonfinite.act": np.zeros(shape, np.int64),
    }
    Counts(["en", "zh"], tokens, arrays).write(folder / NAME)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def ours(loaded: tuple[Any, Any], study: Path, name: str = "o.jsonl", **asked: Any) -> list[Any]:
    """What `generate` makes of the folder; `asked` are its options."""
    prompts = asked.pop("prompts", study / "prompts.txt")
    how = {name: asked.pop(name) for name in ("force", "backend") if name in asked}
    options = GenerateOptions(**{"max_new_tokens": NEW, "stop": (), **asked})
    places = (study / "neurons.json", prompts, study / name)
    return generate("m", *loaded, *places, options, quiet=True, **how)
