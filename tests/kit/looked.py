"""A study of planted neurons that was looked at, and what plain hooks see in its model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from bench.planted import make_model, make_tokenizer, write_facts
from relneuron.artifact.manifest import Manifest
from tests.kit.corpus_commands import call

LOOK = ("--examples", 4, "--quiet")


def make_looked(root: Path) -> None:
    """`model`, `study`, recorded and ranked, and its page `look.html`."""
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    write_facts(root / "facts")
    study = root / "study"
    for words in (
        ("prompts", root / "facts", "-o", study / "prompts.jsonl", "--eva", 12, "--suffix", ""),
        ("record", root / "model", study / "prompts.jsonl", "-o", study, "--quiet"),
        ("identify", study, "-o", study / "neurons.json", "--top", 17, "--quiet"),
        ("look", study, "-o", root / "look.html", *LOOK),
    ):
        assert call(*words) == 0, words


def before_look(root: Path, place: Path) -> Path:
    """A copy of the study as it was before it was looked at."""
    folder = place / "study"
    shutil.copytree(root / "study", folder)
    for name in ("cards.jsonl", "sets.csv"):
        (folder / name).unlink()
    manifest = Manifest(folder)
    del manifest.data["stages"]["look"]
    for name in ("cards.jsonl", "sets.csv"):
        del manifest.data["files"][name]
    manifest.save()
    return folder


def forward(model: Any, text: list[int], off: tuple[int, str, int] | None = None) -> Any:
    """Outputs of gate, up, down and what down reads at each token by layer, and the logits.

    By hooks of torch; with a neuron at zero.
    """
    seen: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for layer, block in enumerate(model.model.layers):
        for site in ("gate", "up", "down"):

            def hook(_m: Any, given: Any, y: Any, layer: int = layer, site: str = site) -> Any:
                if off is not None and off[:2] == (layer, site):
                    y = y.clone()
                    y[..., off[2]] = 0
                seen[layer, site] = y[0]
                if site == "down":
                    seen[layer, "product"] = given[0][0]
                return y

            handles.append(getattr(block.mlp, f"{site}_proj").register_forward_hook(hook))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text])).logits[0]
    for handle in handles:
        handle.remove()
    return seen, logits


def ids_of(tokenizer: Any, example: dict[str, Any]) -> list[int]:
    assert example["first"] == 0
    return list(tokenizer.convert_tokens_to_ids([t.strip() for t in example["tokens"]]))
