"""Folders with the gradients of a few facts, as `attribute` leaves them, from numbers at hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact.effects import CHOICE, WRITTEN, Condition, conditions_bytes
from relneuron.artifact.files import atomic_write, csv_bytes, sha256
from relneuron.artifact.gradients import (
    BESIDE,
    COMPLETENESS,
    COMPLETENESS_COLUMNS,
    FILES,
    IG,
    GradientFile,
)
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.prompts import Prompt, fact_name, prompts_bytes, read_prompts
from relneuron.methods.gradients.choices import ConsistencyOptions
from relneuron.methods.gradients.rank import identify_gradients

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
    (folder / "manifest.json").unlink(missing_ok=True)
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


def write_fact_study(
    folder: Path,
    *,
    relations: tuple[str, str] = ("lives_in", "likes"),
    subject: str = "Ann",
    model: str = "a/model",
    prediction: str = "Rome",
    manifest: dict[str, Any] | None = None,
) -> Path:
    """A folder of facts as the stages leave it, but that the manifest knows no file's digest.

    Three facts of two prompts each, and the answers with the neurons of each changed.
    """
    one, other = relations
    rng = np.random.default_rng(0)
    facts = [(one, subject), (one, f"B {subject}"), (other, f"C {subject}")]
    scores = [(r, s, list(rng.normal(size=(2, 3, 8)) ** 3)) for r, s in facts]
    gradient_study(folder, scores, id=model)
    options = ConsistencyOptions(sets="fact", cut=0.1)
    neurons = folder / "neurons.json"
    method = "query_localization"
    identify_gradients(folder, neurons, options, method=method, force=True, quiet=True)
    prompts = read_prompts(folder / "prompts.jsonl")
    gaps = [
        (p.id, p.relation, layer, 0.5, 0.1, 0.4, 0.35 + 0.01 * layer, -0.05)
        for p in prompts
        for layer in range(3)
    ]
    (folder / COMPLETENESS).write_bytes(csv_bytes(COMPLETENESS_COLUMNS, gaps))
    names = [fact_name(p) for p in prompts[::2]]
    conditions = [Condition("clean", "clean")]
    conditions += [Condition(name, "set", name, n_neurons=3) for name in names]
    conditions += [Condition(f"{name}~0", "matched", name, 0, n_neurons=3) for name in names]
    (folder / "conditions.csv").write_bytes(conditions_bytes(conditions))
    rows = [
        (c.name, p.relation, "eva", p.id, prediction, prediction, i % 2, "x", logprob, "AB"[i % 2])
        for k, c in enumerate(conditions)
        for i, p in enumerate(prompts)
        for logprob in [-1.0 - 0.1 * i - (0.8 if fact_name(p) == c.relation else 0.01 * k)]
    ]
    (folder / "effects.csv").write_bytes(csv_bytes((*WRITTEN, CHOICE), rows))
    known = json.loads((folder / "manifest.json").read_text())
    off = {"neurons": sha256(neurons), "mode": "scale", "factor": 2.0, "positions": "last"}
    stages = known["stages"] | {"ablate": {"inputs": off, "files": []}}
    more = dict(manifest or {})
    stages |= more.pop("stages", {})
    head = {"schema": known["schema"], "model": known["model"], "stages": stages, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(head | more))
    return folder
