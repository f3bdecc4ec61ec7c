"""What `record` asks of a model, and of which prompts it keeps responses: known before it starts.

`record.py` asks it, `plan.py` counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.manifest import checked
from relneuron.artifact.prompts import RECORDED, Prompt, read_prompts
from relneuron.methods.responses.options import RecordOptions
from relneuron.model.batches import plan_batches
from relneuron.model.questions import Questions, encode
from relneuron.texts.tokens import check_bos


@dataclass(frozen=True)
class Asked:
    """The prompts of a record.

    options    as they were given, `validate` only if some prompt has an object
    batches    places of prompts, those of a batch of one split
    det        places of the prompts whose responses are kept
    n_pooled   how many tokens are pooled of each of these
    """

    prompts: Sequence[Prompt]
    options: RecordOptions
    questions: Questions
    batches: list[list[int]]
    det: list[int]
    n_pooled: list[int]

    def about(self, prompts: str, model: str) -> Json:
        """What responses.safetensors says of its rows; the digests of the prompts and the model."""
        return {
            "prompts": prompts,
            "ids": [self.prompts[row].id for row in self.det],
            "pooling": self.options.pooling,
            "exclude_bos": self.options.exclude_bos,
            "model": model,
        }


def read_asked(path: Path, model: Any, tokenizer: Any, options: RecordOptions) -> Asked:
    """The prompts of a file as a model is asked them; of the model its config is asked alone.

    Raises RelneuronError for a file without a prompt whose responses are kept, and for one that
    has no token to pool.
    """
    return asked_of(read_prompts(checked(path)), path, model, tokenizer, options)


def asked_of(
    prompts: Sequence[Prompt], path: Path, model: Any, tokenizer: Any, options: RecordOptions
) -> Asked:
    """Likewise of prompts that were read; `path` is what errors call their file."""
    options = replace(options, validate=options.validate and any(p.object for p in prompts))
    questions = encode(tokenizer, model, prompts, answers=options.validate)
    batches = plan_batches(questions, options.batch_tokens)
    det = [row for row, prompt in enumerate(prompts) if prompt.split in RECORDED]
    if not det:
        raise RelneuronError(f"{path} has no det prompt", "make prompts with det facts")
    if options.exclude_bos:
        check_bos(tokenizer, (questions.ids[row] for row in det))
    is_mean = options.pooling == "mean"
    n_pooled = [len(questions.ids[row]) - options.exclude_bos if is_mean else 1 for row in det]
    if min(n_pooled) < 1:
        raise RelneuronError("a det prompt has no token but the first", "drop --exclude-bos")
    return Asked(prompts, options, questions, batches, det, n_pooled)
