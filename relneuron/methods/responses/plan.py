"""What `record` would take: `record --dry-run`, and a row of `plan run`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relneuron.artifact.dense import dense_bytes, zeros_bytes
from relneuron.artifact.files import csv_bytes, refuse_overwrite, require
from relneuron.artifact.journal import is_unfinished
from relneuron.artifact.memory import resident_bytes
from relneuron.artifact.neurons import default_top
from relneuron.artifact.options import LoadOptions
from relneuron.artifact.planned import Planned
from relneuron.artifact.prompts import prompts_bytes, relation_names
from relneuron.artifact.reading import RESPONSE_ROWS
from relneuron.methods.responses.asked import Asked, asked_of
from relneuron.methods.responses.commands import check_whole
from relneuron.methods.responses.labels import sample_labels
from relneuron.methods.responses.options import (
    DEVICE,
    DISK,
    MEMORY,
    AtOnceOptions,
    RankOptions,
    RecordOptions,
)
from relneuron.methods.responses.places import n_response_bytes
from relneuron.methods.responses.rank import check_installed
from relneuron.methods.responses.room import SHARE, free_memory, free_on
from relneuron.model.dry import DIGEST, Dry, Work, dry_model
from relneuron.model.questions import N_ANSWER_TOKENS
from relneuron.texts.prompts import concepts_of
from relneuron.texts.tokens import CHARACTER_BYTES

_SCORE = 0.9406773447990417  # as long as most are


def record(
    model: str,
    prompts: Path,
    output: Path,
    options: RecordOptions,
    at_once: AtOnceOptions,
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[Planned]:
    """The plan of the command `record`, with its parameters."""
    check_whole(options, at_once)
    if at_once.identify:
        check_installed(at_once.noise)
    require(prompts, "prompts FACTS_DIR -o prompts.jsonl")
    dry = dry_model(model, load_options, attention=options.attention)
    path = output / "validated.csv"
    refuse_overwrite(path, force or is_unfinished(path, "record"))
    everything = concepts_of(prompts)
    asked = asked_of(everything, prompts, dry.model, dry.tokenizer, options)
    where = place_of(at_once.responses if at_once.identify else DISK, dry, asked)
    yield plan_record(dry, asked, len(prompts_bytes(everything)), where)
    if at_once.identify:
        yield plan_identify(dry, asked, at_once, where)


def place_of(wanted: str, dry: Dry, asked: Asked) -> str:
    """Where responses will be, as `room.choose` has it on this machine."""
    if wanted != "auto":
        return wanted
    n_bytes, free = n_response_bytes(dry.order, len(asked.det)), free_memory()
    if dry.device != "cpu":
        on_device = free_on(torch.device(dry.device))
        if on_device is not None and SHARE * n_bytes + dry.weights <= on_device:
            return DEVICE
    return MEMORY if free is not None and SHARE * n_bytes <= free else DISK


def plan_record(dry: Dry, asked: Asked, n_copy: int, where: str = DISK) -> Planned:
    """The plan of a record, whose responses are at one of the places; `n_copy`: prompts.jsonl."""
    work = Work(dry)
    for rows in asked.batches:
        lengths = [asked.questions.length(row) for row in rows]
        work.batch(lengths, then="answers" if asked.options.validate else "")
        for step in range(N_ANSWER_TOKENS - 1 if asked.options.validate else 0):
            work.step(len(rows), max(lengths) + step + 1)
    n = len(asked.prompts)
    blocks = {f"{s}.{la}": (len(asked.det), w) for la, s, w in dry.order.blocks()}
    about = {RESPONSE_ROWS: json.dumps(asked.about(DIGEST, DIGEST), ensure_ascii=False)}
    n_responses = n_response_bytes(dry.order, len(asked.det))
    largest = max(map(len, asked.batches))
    return dry.planned(
        "record",
        {"prompts": n, "recorded": len(asked.det)},
        **work.told,
        more=n * (CHARACTER_BYTES - 1) if asked.options.validate else 0,
        tensors={
            "activations": work.peak(cache=asked.options.validate, n_held=dry.n_inner),
            "sums of a batch": n_responses // len(asked.det) * largest,
            **({"responses": n_responses} if where == DEVICE else {}),
        },
        host={
            DISK: {"responses, of the disk": n_responses},
            MEMORY: {"responses": n_responses},
            DEVICE: {},
        }[where],
        files={
            "validated.csv": len(_answers(dry.tokenizer, asked)),
            **({"responses.safetensors": zeros_bytes(blocks, about)} if where == DISK else {}),
            "prompts.jsonl": n_copy,
        },
        notes=["record: an answer that is cut within a character takes more tokens"],
    )


def _answers(tokenizer: Any, asked: Asked) -> bytes:
    """A validated.csv in which every answer is right, as long as answers are."""
    said = [p.object for p in asked.prompts]
    if asked.options.validate:
        ids = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in said]
        said = [tokenizer.decode(line[:N_ANSWER_TOKENS]).strip() for line in ids]
    rows = ((p.id, text, 1) for p, text in zip(asked.prompts, said, strict=True))
    return csv_bytes(("id", "prediction", "correct"), rows)


def plan_identify(dry: Dry, asked: Asked, options: RankOptions, where: str = DISK) -> Planned:
    """The plan of `identify --method ap` of what is recorded, as if every answer was right."""
    order, relations = dry.order, relation_names(asked.prompts)
    det = [asked.prompts[row] for row in asked.det]
    labels = sample_labels(
        relations,
        [p.relation if p.split == "det" else "" for p in det],
        [True] * len(det),
        negatives=options.negatives,
        own_negatives=[p.negative_of for p in det],
        seed=options.seed,
    )
    top = min(options.top or default_top(dry.shape), order.total)
    n = len(relations) * top
    rows = [
        (relation, p.id, 1)
        for relation, line in zip(relations, labels, strict=True)
        for p, label in zip(det, line, strict=True)
        if label >= 0
    ]
    scores: dict[str, tuple[tuple[int, ...], Any]] = {
        f"ap.{site}": ((len(relations), order.layers, width), np.float32)
        for site, width in order.widths.items()
    }
    n_scores = 4 * len(relations) * order.layers * sum(order.widths.values())
    block = max(width for _, _, width in order.blocks())
    neuron = order.neurons(np.array([order.total // 2]))[0]
    name = relations[len(relations) // 2]
    chosen = (name, *neuron, _SCORE, *[f"{_SCORE:.7f}"] * 2, *[f"{_SCORE:.6f}"] * 2)
    responses = {"responses": n_response_bytes(order, len(det))} if where == MEMORY else {}
    return Planned(
        "identify",
        {"relations": len(relations), "neurons": n},
        host={
            "process": resident_bytes(),
            "model": dry.weights if where != DISK and dry.device == "cpu" else 0,
            "scores": 2 * n_scores,
            "a block of responses, ranked": 4 * len(det) * block * 3,
            **responses,
        },
        files={
            "scores.safetensors": dense_bytes(scores, {"relations": json.dumps(relations)}),
            "labels.csv": len(csv_bytes(("relation", "id", "label"), rows)),
            "neurons.json": n * len(json.dumps([*neuron, _SCORE]) + "   ,\n"),
            "significance.csv": n * len(csv_bytes(tuple(map(str, chosen)), [])),
        },
        device=dry.device,
        notes=["identify: as if all were answered right, with --top neurons of each relation"],
    )
