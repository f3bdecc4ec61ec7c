"""Batches: which rows share a forward, and smaller ones where memory runs out.

Every stage that runs a model plans its batches with `cut`, under a budget of tokens with their
padding, and runs them by a `Budget`, which is smaller from there on each time that the memory was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.model.questions import Questions

Row = TypeVar("Row")
Said = TypeVar("Said")

PROMPTS = "{n} prompts of together {tokens} tokens"
SENTENCES = "{n} sentences of together {tokens} tokens"


def pad(ids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) int64 token ids, padded on the left, and their attention mask.

    The pad token's value does not matter: the mask decides what is a token.
    """
    longest = max(map(len, ids))
    tokens = np.zeros((len(ids), longest), np.int64)
    mask = np.zeros((len(ids), longest), np.int64)
    for row, line in enumerate(ids):
        tokens[row, longest - len(line) :] = line
        mask[row, longest - len(line) :] = 1
    both = torch.from_numpy(tokens), torch.from_numpy(mask)
    return both[0].to(device, non_blocking=True), both[1].to(device, non_blocking=True)


def positions_of(mask: Tensor) -> Tensor:
    """Where each token stands in its text: (B, T) int64 of a padding mask (B, T).

    On a CPU (1, T) where all rows have the same, as transformers itself has it without a mask: what
    a model makes of positions, its rotary embedding for one, is then made once for all rows.
    """
    # A GPU would have to be waited for.
    if mask.device.type == "cpu" and len(mask) > 1 and bool((mask == mask[:1]).all()):
        mask = mask[:1]
    return (mask.cumsum(1) - 1).clamp(min=0)


def takes_keep(model: Any) -> bool:
    """Whether a forward may be asked for the logits of its last columns alone."""
    return "logits_to_keep" in signature(model.forward).parameters


def largest(logits: Tensor) -> Tensor:
    """The place of the largest of the last dimension, the first of equal ones, as `argmax`."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.argmax(-1)
    # numpy compares many values at a time, torch one by one.
    return torch.from_numpy(logits.numpy().argmax(-1))


# --- plans -----------------------------------------------------------------------------------


def cut(rows: Iterable[Row], length: Callable[[Row], int], budget: int) -> list[list[Row]]:
    """Rows in the same order in batches of at most `budget` tokens with padding, or of one row.

    `length` is a row's tokens; a batch has as many for each of its rows as the longest has.
    """
    return list(cut_off(rows, length, budget))


def cut_off(rows: Iterable[Row], length: Callable[[Row], int], budget: int) -> Iterator[list[Row]]:
    """The batches of `cut`, one after the other."""
    batch: list[Row] = []
    longest = 0
    for row in rows:
        n_tokens = length(row)
        longest = max(longest, n_tokens)
        if batch and (len(batch) + 1) * longest > budget:
            yield batch
            batch, longest = [], n_tokens
        batch.append(row)
    if batch:
        yield batch


def plan_batches(
    questions: Questions, batch_tokens: int, only: Sequence[int] | None = None
) -> list[list[int]]:
    """Indices of the prompts in batches of one split and language, at most `batch_tokens` padded.

    Sorted by length within a split, so that a prompt's batch does not depend on other splits and
    every stage that asks a split asks it in the same batches. `only` these prompts; default: all.
    """
    kinds: dict[tuple[str, str], list[int]] = {}
    for row in range(len(questions.prompts)) if only is None else only:
        prompt = questions.prompts[row]
        kinds.setdefault((prompt.split, prompt.language), []).append(row)
    in_order = (sorted(rows, key=questions.length) for rows in kinds.values())
    return [batch for rows in in_order for batch in cut(rows, questions.length, batch_tokens)]


def batch_sizes(batches: Iterable[Sequence[Row]], length: Callable[[Row], int]) -> dict[str, int]:
    """How many batches there are, the tokens of their rows, and those with padding.

    For the manifest's batch_plan; what a stage's planner says is of the same rows.
    """
    lengths = [[length(row) for row in batch] for batch in batches]
    return {
        "batches": len(lengths),
        "tokens": sum(map(sum, lengths)),
        "padded_tokens": sum(len(batch) * max(batch) for batch in lengths),
    }


def shared(
    journal: Journal | None,
    name: str,
    batches: Sequence[list[Row]],
    ask: Callable[[list[Row]], Any],
    advance: Callable[[int], object] = lambda _: None,
) -> Iterator[Any]:
    """What `ask` says of each batch, as JSON, read from the journal, whose processes share them.

    A block of the journal is called by `name` and the batch's number. Without one nothing is kept.
    All batches are done when this returns.
    """
    said = []
    for number, batch in enumerate(batches):
        if journal is None:
            said.append(ask(batch))
        elif journal.takes(f"{name} {number}"):
            journal.add(f"{name} {number}", ask(batch))
        advance(len(batch))
    if journal is None:
        return iter(said)
    journal.together()
    return (journal.done[f"{name} {number}"] for number in range(len(batches)))


# --- when memory runs out --------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on a GPU or a CPU, or Python itself had no memory left."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(word in str(error).lower() for word in words)


@dataclass
class Budget:
    """The tokens, with padding, that a forward may have: half of one that did not fit, and fewer.

    oom        "split": smaller batches from there on; "error": the stage ends, as it does where
               several processes share its batches
    journal    keeps the budget for a run that goes on
    what       what a batch is called, of its rows `n`, its tokens and those of the longest row
    otherwise  what helps beside smaller batches where the stage ends
    alone      what helps where one row does not fit
    """

    tokens: int
    oom: str = "split"
    journal: Journal | None = None
    what: str = PROMPTS
    otherwise: str = ", or --oom split"
    alone: str = "use shorter prompts, a smaller --dtype, or a device with more memory"

    def __post_init__(self) -> None:
        self.planned = self.tokens
        if self.journal is not None:
            if self.journal.is_shared:
                self.oom, self.otherwise = "error", ", or one process alone"
            self.tokens = int(self.journal.done.get("budget", self.tokens))

    @property
    def notices(self) -> list[str]:
        """What a reader of the results must know of how they came about."""
        if self.tokens == self.planned:
            return []
        return [f"out of memory: batches of {self.planned} tokens cut to {self.tokens}"]

    def run(
        self,
        rows: Iterable[Row],
        length: Callable[[Row], int],
        ask: Callable[[list[Row]], list[Said]],
    ) -> list[Said]:
        """What `ask` says of each row of a batch, in smaller parts if memory runs out.

        Raises RelneuronError where a single row does not fit, or any batch with `oom` "error".
        """
        said: list[Said] = []
        parts = cut(rows, length, self.tokens)
        while parts:
            found = self.attempt(parts[0], length, ask)
            if found is None:
                parts = cut(chain(*parts), length, self.tokens)
            else:
                said += found
                parts.pop(0)
        return said

    def attempt(
        self, part: list[Row], length: Callable[[Row], int], ask: Callable[[list[Row]], Said]
    ) -> Said | None:
        """`ask(part)`, or None where memory ran out: the budget is then half of the part."""
        longest = max(map(length, part))
        tokens = len(part) * longest
        what = self.what.format(n=len(part), tokens=tokens, longest=longest)
        try:
            return ask(part)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.oom != "split" or len(part) == 1:
                fix = f"use --batch-tokens {max(1, tokens // 2)}{self.otherwise}"
                raise RelneuronError(
                    f"out of memory with {what}", self.alone if len(part) == 1 else fix
                ) from error
        # Outside of the handler, whose error holds the tensors that did not fit.
        self.tokens = max(1, tokens // 2)
        if self.journal is not None:
            self.journal.add("budget", self.tokens)
        warnings.warn(
            f"out of memory with {what}: going on with batches of {self.tokens} tokens",
            stacklevel=2,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
