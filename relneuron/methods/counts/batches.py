"""Batches of a corpus: which windows share a forward, and which processes share the batches.

`count` runs them. The plan depends on the windows and the token budget alone, so that every number
of processes, and a run that goes on after a kill, computes the same batches: every process plans
all and runs its own share; `count` adds up their counters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron.artifact.counts import RAN, Counts
from relneuron.artifact.files import RelneuronError
from relneuron.model.batches import cut
from relneuron.model.shards import n_parts, part_number
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
    """

    ids: Array
    group_ids: Array
    lengths: Array
    positions: Array | None = None

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


def plan_pool(lengths: Sequence[int], groups: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Places of windows in batches of at most `batch_tokens` with padding, or of one window.

    Longest first, so that windows of about the same length share a batch and one that does not fit
    the memory shows at once; windows of the same length stay in their order. Within a batch they
    stand by group: the kernels add up rows of the same group in registers.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches = cut(order, lambda place: lengths[place], batch_tokens)
    return [sorted(batch, key=lambda place: (groups[place], place)) for batch in batches]


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
    return Batch(ids, np.where(counted, groups[:, None], np.int32(-1)), lengths, positions)


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


# Several processes that count together: what `torchrun` started, or this one alone


class Ranks:
    """This process's place among `size`; alone, nothing here waits or sends.

    It runs share `share` of `shares` of the batches: all of them where each process holds a part of
    the model. What it counts is then only of its own neurons.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, in_parts: bool = False) -> None:
        self.rank, self.size = rank, size
        self.share, self.shares = (0, 1) if in_parts else (rank, size)

    def largest(self, value: int) -> int:
        """The largest of the processes' values; all must call it at the same batch."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value])
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return int(tensor)

    def total(self, value: int) -> int:
        """The sum of the shares' values; all must call it."""
        if self.shares == 1:
            return value
        tensor = torch.tensor([value])
        torch.distributed.all_reduce(tensor)
        return int(tensor)

    def add(self, counts: Counts) -> Counts:
        """The sum of the processes' counters, exact for integers; all must have the same groups.

        What a process has not counted is 0 (of a largest value -inf), and so parts add up, too.
        """
        if self.size == 1:
            return counts
        summed = {}
        for name, array in counts.tensors().items():
            tensor = torch.from_numpy(np.ascontiguousarray(array).copy())
            op = "MAX" if name.startswith("max.") else "SUM"
            torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, op))
            summed[name] = tensor.numpy()
        if RAN in summed:  # of several modules another one may have run the most
            summed["tokens"] = summed[RAN].max(axis=1)
        return Counts.of_tensors(counts.groups, summed)


def local_device(device: str | None) -> str | None:
    """The device of this process: torchrun's processes of one machine take a GPU each."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{local}"


@contextmanager
def joined(model: Any) -> Iterator[Ranks]:
    """The processes that torchrun started, joined while the context lasts.

    Those that hold the model in parts are joined already. Counters are added on the host (gloo);
    they are small, and wait for the device only when a checkpoint is written.
    """
    if n_parts(model) > 1:
        yield Ranks(part_number(model), n_parts(model), in_parts=True)
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()
