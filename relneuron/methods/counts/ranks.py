"""Several processes that count together: what `torchrun` started, or this process alone.

`count` adds up their counters with it. Every process plans all batches and runs its own share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from relneuron.artifact.counts import Counts


class Ranks:
    """This process's place among `size`; alone, nothing here waits or sends."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def largest(self, value: int) -> int:
        """The largest of the processes' values; all must call it at the same batch."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value])
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return int(tensor)

    def total(self, value: int) -> int:
        """The sum of the processes' values; all must call it."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value])
        torch.distributed.all_reduce(tensor)
        return int(tensor)

    def add(self, counts: Counts) -> Counts:
        """The sum of the processes' counters, exact for integers; all must have the same groups."""
        if self.size == 1:
            return counts
        arrays = {"tokens": counts.tokens, **counts.arrays}
        summed = {}
        for name, array in arrays.items():
            tensor = torch.from_numpy(np.ascontiguousarray(array).copy())
            op = "MAX" if name.startswith("max.") else "SUM"
            torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, op))
            summed[name] = tensor.numpy()
        return Counts(counts.groups, summed.pop("tokens"), summed)


def local_device(device: str | None) -> str | None:
    """The device of this process: torchrun's processes of one machine take a GPU each."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{local}"


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started, joined while the context lasts.

    Counters are added on the host (gloo); they are small, and wait for the device only when a
    checkpoint is written.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()
