"""What `contrast` would take: `contrast --dry-run`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact.contrast import NAME, RMS, SITES, Contrast
from relneuron.artifact.counts import DTYPES
from relneuron.artifact.dense import dense_bytes
from relneuron.artifact.files import RelneuronError, check_folder, refuse_overwrite
from relneuron.artifact.manifest import checked
from relneuron.artifact.options import LoadOptions
from relneuron.artifact.planned import Planned
from relneuron.artifact.prompts import read_questions
from relneuron.methods.contrast.contrast import CHECKPOINT, lines_of
from relneuron.methods.contrast.options import ContrastOptions
from relneuron.model.adapters import is_adapter
from relneuron.model.dry import Work, dry_model
from relneuron.model.pair import Pair, check_tokenizers
from relneuron.model.passes import plan_pool


def contrast(
    model_a: str,
    model_b: str,
    prompts: Path,
    output: Path,
    options: ContrastOptions,
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[Planned]:
    """The plan of the command `contrast`, with its parameters; an adapter's weights are not told.

    Both models read every line; completions are written first, by one of them, and have as many
    tokens as they may have.
    """
    check_folder(output)
    questions = read_questions(checked(prompts), options.template)
    a = dry_model(model_a, load_options)
    b = a if is_adapter(model_b) else dry_model(model_b, load_options)
    if b is not a:
        check_tokenizers(a.tokenizer, b.tokenizer, (model_a, model_b))
    if a.shape != b.shape:
        raise RelneuronError(
            f"{model_a} and {model_b} do not fit together: their shapes are {a.shape} and "
            f"{b.shape}",
            "give two models of one kind that read the same tokens",
        )
    if a.order.experts[0]:
        raise RelneuronError(
            "the layers have experts: two models may send a token to different ones",
            "give two models without experts",
        )
    if not (output / CHECKPOINT).exists():
        refuse_overwrite(output / NAME, force)
    pair = Pair(a.model, b.model, a.tokenizer, ([], []), None, ({}, {}))
    lines = lines_of(pair, questions, options)
    n_new = options.max_new_tokens if options.tokens == "completion" else 0
    work, (shard, of) = Work(a), options.shard
    lengths = [lines.length(row) for row in range(len(questions))]
    batches = plan_pool(lengths, lines.group_of, options.batch_tokens)
    for rows in batches[shard - 1 :: of]:
        own = [lengths[row] for row in rows]
        work.batch(own, logits=0)
        work.forward(len(own), max(own), logits=0)
        if n_new:
            work.forward(len(own), max(own) - n_new)
        for step in range(max(0, n_new - 1)):
            work.step(len(own), max(own) - n_new + step + 1)
    n, size = len(lines.groups), (a.order.layers, a.order.widths["gate"])
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {
        f"{kind}.{site}": ((n, *size), dtype) for site in SITES for kind, dtype in DTYPES.items()
    }
    n_counters = sum(np.dtype(t).itemsize * math.prod(shape) for shape, t in arrays.values())
    arrays |= {"tokens": ((n,), np.int64), RMS: (size, np.float32)}
    about = {Contrast.KEY: json.dumps({"groups": lines.groups}, ensure_ascii=False)}
    yield a.planned(
        "contrast",
        {"groups": n, "prompts": len(questions)},
        **work.told,
        tensors={
            "weights of the other": 0 if b is a else b.weights,
            "activations": work.peak(a.model.base_model, cache=False, n_held=a.n_inner),
            "counters": n_counters,
        },
        host={"counts": n_counters},
        files={NAME: dense_bytes(arrays, about)},
        notes=["contrast: bounds, as if no completion ended before its tokens"] if n_new else [],
    )
