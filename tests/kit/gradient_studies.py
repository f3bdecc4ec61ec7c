"""Folders with the gradients of a few facts, as `attribute` leaves them, from numbers at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact.files import atomic_write, sha256
from relneuron.artifact.gradients import BESIDE, FILES, IG, GradientFile
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.prompts import Prompt, prompts_bytes

Array = np.ndarray[Any, Any]


def ask(relation: str, subject: str, variant: int) -> Prompt:
    """A prompt of a fact, in one of its wordings."""
    text = f"{subject} in words {variant} is"
    key = f"{relation}.{subject}.{variant}"
    return Prompt(key, relation, "eva", "en", f"{{}} in words {variant} is", subject, "x", text)


def gradient_study(
    folder: Path,
    facts: Sequence[tuple[str, str, Sequence[Array]]],
    method: str = IG,
    **model: Any,
) -> Path:
    """A folder whose prompts ask `facts`: (relation, subject, the scores (L, F) of its prompts)."""
    prompts = [
        ask(relation, subject, variant)
        for relation, subject, scores in facts
        for variant in range(len(scores))
    ]
    scores = np.stack([one for *_, found in facts for one in found]).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "prompts.jsonl", prompts_bytes(prompts))
    shape = {"layers": scores.shape[1], "width": scores.shape[2]}
    described = {"id": "tiny", **shape, "hidden": 4, "digest": "m", **model}
    about = {
        "ids": [prompt.id for prompt in prompts],
        "relations": [prompt.relation for prompt in prompts],
        "targets": [[1]] * len(prompts),
        "prompts": sha256(folder / "prompts.jsonl"),
        "model": "m",
    }
    path = folder / FILES[method]
    file = GradientFile(path, method, shape, about)
    size = (len(prompts), shape["layers"])
    beside = {name: np.full(size[:n], 0.5, np.float32) for name, n in BESIDE[method].items()}
    file.store(range(len(prompts)), {method: scores, **beside})
    file.flush()
    manifest = Manifest(folder)
    manifest.describe(model=described, dtype="float32")
    files = [path, folder / "prompts.jsonl"]
    manifest.finish(f"attribute_{method}", {}, files, reads=[folder / "prompts.jsonl"])
    return folder
