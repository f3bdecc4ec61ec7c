"""The `identify` stage: responses and answers in, scores.safetensors and neurons.json out.

It needs no model: it ranks every neuron by average precision and takes each relation's best.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save

from relneuron import ops
from relneuron.artifact import (
    SITES,
    Json,
    NeuronFile,
    RelneuronError,
    atomic_write,
    csv_bytes,
    read_csv,
    read_prompts,
    refuse_overwrite,
    relation_names,
    require,
    sha256,
)
from relneuron.manifest import Manifest, json_digest, progress_bar
from relneuron.scores.ap import sample_labels
from relneuron.scores.ranking import n_neurons, top_k

PAPER_TOP = 3000  # arXiv 2502.17355, section 3.2
DEFAULT_SHARE = 0.1  # without --top, never more than this share of a small model's neurons


def identify_inputs(
    folder: Path, *, method: str, top: int | None, negatives: int, seed: int
) -> Json:
    """What the stage depends on, for the manifest."""
    names = ("prompts.jsonl", "validated.csv")
    return {
        "digests": {name: sha256(require(folder / name, "record")) for name in names},
        "record": json_digest(Manifest(folder).data["stages"].get("record", {}).get("inputs")),
        "method": method,
        "top": top,
        "negatives": negatives,
        "seed": seed,
    }


def check_options(method: str, top: int | None) -> None:
    """Refuse what `identify` cannot do."""
    if method != "ap":
        raise RelneuronError(f"unknown method {method!r}", "use --method ap", 2)
    if top is not None and top < 1:
        raise RelneuronError(f"--top must be at least 1, got {top}", "choose a positive number", 2)


def default_top(shape: dict[str, int]) -> int:
    """3,000 neurons as in the paper, but at most a tenth of a small model's."""
    return min(PAPER_TOP, int(DEFAULT_SHARE * n_neurons(shape)))


def identify(
    folder: Path,
    output: Path,
    *,
    method: str = "ap",
    top: int | None = None,
    negatives: int = 4,
    seed: int = 0,
    force: bool = False,
    quiet: bool = False,
) -> NeuronFile:
    """Score every neuron for every relation and write each relation's best to `output`.

    A relation's positives are its validated det prompts, its negatives `negatives` times as many
    of the other relations' (labels.csv says which). Beside neurons.json stand labels.csv and
    scores.safetensors with `ap.gate`, `ap.up` (R, L, F) and `ap.down` (R, L, D) float32. One
    layer and site is read and scored at a time. `top` defaults to `default_top`.
    """
    check_options(method, top)
    refuse_overwrite(output, force)
    prompts = read_prompts(folder / "prompts.jsonl")
    det = [prompt for prompt in prompts if prompt.split == "det"]
    rows = read_csv(require(folder / "validated.csv", "record MODEL"), ("id", "correct"))
    correct = {row["id"]: row["correct"] == "1" for row in rows}
    unknown = [prompt.id for prompt in det if prompt.id not in correct]
    if unknown:
        raise RelneuronError(
            f"{folder / 'validated.csv'} lacks the prompt {unknown[0]} of prompts.jsonl",
            "record these prompts again: relneuron record MODEL prompts.jsonl -o DIR --force",
        )
    model = Manifest(folder).data.get("model")
    if model is None:
        raise RelneuronError(f"{folder} has no record in its manifest", "run relneuron record")
    shape = {key: int(model[key]) for key in ("layers", "width", "hidden")}
    inputs = identify_inputs(folder, method=method, top=top, negatives=negatives, seed=seed)

    relations = relation_names(prompts)
    valid = [correct[prompt.id] for prompt in det]
    relation_of = [prompt.relation for prompt in det]
    labels = sample_labels(relations, relation_of, valid, negatives=negatives, seed=seed)
    usable = [row for row in range(len(relations)) if {0, 1} <= set(labels[row].tolist())]
    if not usable:
        raise RelneuronError(
            "no relation has both a correct det prompt and others to compare with",
            "give facts that the model knows, of at least two relations",
        )
    scores = {
        site: np.full((len(relations), shape["layers"], shape[size]), np.nan, np.float32)
        for site, size in zip(SITES, ("width", "width", "hidden"), strict=True)
    }
    picked = torch.from_numpy(labels[usable])
    total = shape["layers"] * len(SITES)
    bar = progress_bar(total, "identify", "block", quiet)
    path = require(folder / "responses.safetensors", "record MODEL prompts.jsonl -o DIR --force")
    with bar, safe_open(path, "pt") as file:
        for layer in range(shape["layers"]):
            for site in SITES:
                values = file.get_tensor(f"{site}.{layer}")
                if values.shape[0] != len(det):
                    raise RelneuronError(
                        f"{path} has {values.shape[0]} rows for {len(det)} det prompts",
                        "record these prompts again",
                    )
                if not bool(values.isfinite().all()):
                    raise RelneuronError(
                        f"responses of layer {layer}, {site} are not all finite",
                        "record with --dtype float32 or bfloat16",
                    )
                scores[site][usable, layer] = ops.average_precision(values, picked).numpy()
                bar.update()

    k = top if top is not None else default_top(shape)
    sets: dict[str, list[tuple[int, str, int, float]]] = {}
    selection: dict[str, Json] = {}
    for row, name in enumerate(relations):
        if row not in usable:
            sets[name] = []
            selection[name] = {"reason": "no correct det prompt"}
            continue
        chosen = top_k({site: scores[site][row] for site in SITES}, k)
        sets[name] = chosen.neurons
        selection[name] = {
            "positives": int((labels[row] == 1).sum()),
            "negatives": int((labels[row] == 0).sum()),
            "score_at_cut": chosen.score_at_cut,
            "ties_at_cut": chosen.ties_at_cut,
            "ties_chosen": chosen.ties_chosen,
            "perfect": chosen.n_perfect,
        }
    tensors = {f"ap.{site}": scores[site] for site in SITES}
    # One key only: safetensors writes several in an order that changes from run to run.
    metadata = {"relations": json.dumps(relations)}
    scores_path, labels_path = (
        output.parent / "scores.safetensors",
        output.parent / "labels.csv",
    )
    atomic_write(scores_path, save(tensors, metadata))
    table = (
        (name, prompt.id, int(label))
        for name, row in zip(relations, labels, strict=True)
        for prompt, label in zip(det, row, strict=True)
        if label >= 0
    )
    atomic_write(labels_path, csv_bytes(("relation", "id", "label"), table))
    result = NeuronFile(model, method, sets, selection)
    result.write(output)
    manifest = Manifest(output.parent)
    recorded = Manifest(folder).data
    memory = {
        "scoring": "streamed by layer and site: one block of responses in memory",
        "scoring_block_bytes": 4 * len(det) * max(shape["width"], shape["hidden"]),
    }
    manifest.describe(
        model=model,
        seeds=manifest.data.get("seeds", {}) | {"negatives": seed},
        memory=recorded.get("memory", {}) | memory,
    )
    manifest.finish(
        "identify",
        inputs,
        [scores_path, labels_path, output],
        top=k,
        share_of_neurons=k / n_neurons(shape),
    )
    return result
