"""Batches of a corpus, one forward each: windows of text, or a record with pictures.

`count` runs them; model/passes.py plans which windows share one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.texts.windows import Window

Array = np.ndarray[Any, Any]

POOL_BATCHES = 16  # so many batches of windows are planned at a time


@dataclass(frozen=True)
class Batch:
    """One forward: B windows of at most T tokens, in order of their groups.

    ids        (B, T) int32, padded on the right with 0
    group_ids  (B, T) int32, -1 = padding, or a token that is not counted
    lengths    (B,) tokens of each row
    positions  (B, T) int32, restarted at every document; None = 0, 1, 2, ...
    groups     (B,) int32, the group of each window
    numbers    (B,) int64, how many windows of its group stand before it in the corpus
    """

    ids: Array
    group_ids: Array
    lengths: Array
    positions: Array | None = None
    groups: Array = field(default_factory=lambda: np.zeros(0, np.int32))
    numbers: Array = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def is_padded(self) -> bool:
        return bool(self.lengths.min() < self.ids.shape[1])

    @property
    def n_tokens(self) -> int:
        return int(self.lengths.sum())


@dataclass(frozen=True)
class Pictured:
    """One forward of one record with pictures: what its processor made of it, nothing padded.

    All tokens of it, patches of pictures and queries, too, are of one group.
    """

    inputs: Mapping[str, Tensor]
    group: int

    @property
    def group_ids(self) -> Array:
        """() int32: the group of all."""
        return np.full((), self.group, np.int32)

    @property
    def n_tokens(self) -> int:
        """That the language model reads."""
        return int(self.inputs["input_ids"].numel())


def pool_windows(window: int, batch_tokens: int) -> int:
    """How many windows are planned together."""
    return POOL_BATCHES * max(1, batch_tokens // window)


def make_batch(
    windows: Sequence[Window], *, not_counted: int | None = None, by_document: bool = False
) -> Batch:
    """The arrays of a batch; tokens `not_counted` are run but not counted.

    With `by_document` the positions begin again at every document's first token.
    """
    lengths = np.array([len(window.ids) for window in windows])
    longest = int(lengths.max())
    ids = np.zeros((len(windows), longest), np.int32)
    inside = np.arange(longest) < lengths[:, None]
    ids[inside] = np.concatenate([window.ids for window in windows])
    counted = inside if not_counted is None else inside & (ids != not_counted)
    groups = np.array([window.group for window in windows], np.int32)
    positions = None
    if by_document:
        first = np.zeros(ids.shape, bool)
        first[inside] = np.concatenate([window.first for window in windows])
        place = np.arange(longest, dtype=np.int32)
        positions = place - np.maximum.accumulate(np.where(first, place, 0), axis=1)
    numbers = np.array([window.number for window in windows], np.int64)
    group_ids = np.where(counted, groups[:, None], np.int32(-1))
    return Batch(ids, group_ids, lengths, positions, groups, numbers)


def check_vocabulary(batch: Batch, vocabulary: int) -> None:
    """Refuse a token that the model does not have."""
    check_tokens(int(batch.ids.max()), vocabulary)


def check_tokens(largest: int, vocabulary: int) -> None:
    """Likewise of the largest token of a batch."""
    if largest >= vocabulary:
        raise RelneuronError(
            f"the corpus holds the token {largest}, the model has {vocabulary} tokens",
            "give a model and a tokenizer (or token ids) that belong together",
        )
