"""Several processes that share the batches of a pass: what `torchrun` started, or this one alone.

The corpus pass and the contrast of two models run under it; what they count is added up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from relneuron.artifact.counts import RAN, Counts
from relneuron.artifact.examples import best
from relneuron.model.peaks import BEST, BINS
from relneuron.model.shards import n_parts, part_number

Array = np.ndarray[Any, Any]
AnyCounts = TypeVar("AnyCounts", bound=Counts)


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

    def add(self, counts: AnyCounts) -> AnyCounts:
        """The sum of the processes' counters, exact for integers; all must have the same groups.

        What a process has not counted is 0 (of a largest value -inf), and so parts add up, too. The
        best peaks of all only the first process has.
        """
        if self.size == 1:
            return counts
        summed: dict[str, Array] = {}
        own = {"tokens": counts.tokens, **counts.beside, **counts.arrays}
        for name, array in own.items():
            kind, _, site = name.partition(".")
            if kind == BEST[0]:
                names = [f"{part}.{site}" for part in BEST]
                summed |= zip(names, self._best(*(own[name] for name in names)), strict=True)
            elif kind not in BEST:
                tensor = torch.from_numpy(np.ascontiguousarray(array).copy())
                op = "MAX" if kind in ("max", *BINS[1:]) else "SUM"
                torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, op))
                summed[name] = tensor.numpy()
        if RAN in summed:  # of several modules another one may have run the most
            summed["tokens"] = summed[RAN].max(axis=1)
        return type(counts).of_tensors(counts.groups, summed)

    def _best(self, *own: Array) -> tuple[Array, ...]:
        """The K best peaks of all processes, at the first one; `own` are those of this one."""
        total = own
        for rank in range(1, self.size):
            parts = [torch.from_numpy(np.ascontiguousarray(array).copy()) for array in own]
            for part in parts:
                torch.distributed.broadcast(part, rank)
            if self.rank == 0:
                both = zip(total, parts, strict=True)
                value, number, place = (np.concatenate([a, b.numpy()], -1) for a, b in both)
                total = best(value, number, place, own[0].shape[-1])
        return total

    def first(self, array: Array) -> Array:
        """The first process's array, where each holds the whole model; all must call it."""
        if self.shares == 1:
            return array
        tensor = torch.from_numpy(np.ascontiguousarray(array).copy())
        torch.distributed.broadcast(tensor, 0)
        found: Array = tensor.numpy()
        return found


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
