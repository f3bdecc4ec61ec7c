"""What `record` would take: `record --dry-run`, and a row of `plan run`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relneuron.artifact.files import csv_bytes, refuse_overwrite, require, zeros_bytes
from relneuron.artifact.journal import is_unfinished
from relneuron.artifact.options import LoadOptions
from relneuron.artifact.planned import Planned
from relneuron.artifact.reading import RESPONSE_ROWS
from relneuron.methods.responses.asked import Asked, read_asked
from relneuron.methods.responses.options import RecordOptions
from relneuron.model.dry import DIGEST, Dry, Work, dry_model
from relneuron.model.questions import N_ANSWER_TOKENS
from relneuron.texts.tokens import CHARACTER_BYTES


def record(
    model: str,
    prompts: Path,
    output: Path,
    options: RecordOptions,
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[Planned]:
    """The plan of the command `record`, with its parameters."""
    require(prompts, "prompts FACTS_DIR -o prompts.jsonl")
    dry = dry_model(model, load_options, attention=options.attention)
    path = output / "validated.csv"
    refuse_overwrite(path, force or is_unfinished(path, "record"))
    asked = read_asked(prompts, dry.model, dry.tokenizer, options)
    yield plan_record(dry, asked, prompts.stat().st_size)


def plan_record(dry: Dry, asked: Asked, prompts_bytes: int) -> Planned:
    """The plan of a record; `prompts_bytes` are those of prompts.jsonl."""
    work = Work(dry)
    for rows in asked.batches:
        lengths = [asked.questions.length(row) for row in rows]
        work.batch(lengths)
        for step in range(N_ANSWER_TOKENS - 1 if asked.options.validate else 0):
            work.step(len(rows), max(lengths) + step + 1)
    n = len(asked.prompts)
    blocks = {f"{s}.{la}": (len(asked.det), w) for la, s, w in dry.order.blocks()}
    about = {RESPONSE_ROWS: json.dumps(asked.about(DIGEST, DIGEST), ensure_ascii=False)}
    n_responses = 4 * len(asked.det) * sum(w for _, _, w in dry.order.blocks())
    largest = max(map(len, asked.batches))
    return dry.planned(
        "record",
        {"prompts": n, "recorded": len(asked.det)},
        **work.told,
        more=n * (CHARACTER_BYTES - 1) if asked.options.validate else 0,
        tensors={
            "activations": work.peak(cache=asked.options.validate),
            "sums of a batch": n_responses // len(asked.det) * largest,
        },
        host={"responses, of the disk": n_responses},
        files={
            "validated.csv": len(_answers(dry.tokenizer, asked)),
            "responses.safetensors": zeros_bytes(blocks, about),
            "prompts.jsonl": prompts_bytes,
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
