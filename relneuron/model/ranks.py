"""Several processes that share the batches of a stage: what `torchrun` started, or this one alone.

Every stage that asks a model runs under `joined`. Passes add up what was counted (`passes.py`);
stages with a journal take a batch each, the next one that is free (`sharing`). The first process
alone holds the folder, writes and speaks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from relneuron.artifact.counts import RAN, Counts
from relneuron.artifact.examples import best
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import n_started
from relneuron.artifact.manifest import locked
from relneuron.model.meeting import WAIT, distributed, meet
from relneuron.model.peaks import BEST, BINS
from relneuron.model.shards import n_parts, part_number

Array = np.ndarray[Any, Any]
AnyCounts = TypeVar("AnyCounts", bound=Counts)


class Ranks:
    """This process's place among `size`; alone, nothing here waits or sends.

    It runs share `share` of `shares` of the batches: all of them where each process holds a part of
    the model. What it counts is then only of its own neurons.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, *, in_parts: bool = False, store: Any = None
    ) -> None:
        self.rank, self.size, self.in_parts = rank, size, in_parts
        self.share, self.shares = (0, 1) if in_parts else (rank, size)
        self._store, self._stage = store, 0

    def largest(self, value: int) -> int:
        """The largest of the processes' values; all must call it at the same batch."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value])
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return int(tensor)

    def total(self, value: int) -> int:
        """The sum of the shares' values; all must call it."""
        if self.shares == 1:
            return value
        tensor = torch.tensor([value])
        distributed.all_reduce(tensor)
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
                distributed.all_reduce(tensor, getattr(distributed.ReduceOp, op))
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
                distributed.broadcast(part, rank)
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
        distributed.broadcast(tensor, 0)
        found: Array = tensor.numpy()
        return found

    def told(self, value: Any) -> Any:
        """The first process's value, as pickle has it; all must call it."""
        if self.size == 1:
            return value
        box = [value if self.rank == 0 else None]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()

    def take(self) -> int:
        """The next number, from 0 on, that no process has taken in this stage."""
        return int(self._store.add(f"taken {self._stage}", 1)) - 1

    @contextmanager
    def stage(self) -> Iterator[None]:
        """All processes begin a stage together, and leave it when what it writes is there."""
        self._stage += 1
        self.wait()
        yield
        self.wait()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes through the block, then the others do, then all go on."""
        if self.rank:
            self.wait()
        yield
        if not self.rank:
            self.wait()
        self.wait()

    def call(
        self,
        stage: Callable[..., Any],
        name: str,
        model: Any,
        tokenizer: Any,
        *args: Any,
        **asked: Any,
    ) -> Any:
        """`stage(name, model, tokenizer, ...)`, and have the others that `serve` call it, too."""
        self.told((stage, name, args, asked))
        return stage(name, model, tokenizer, *args, **asked)

    def serve(self, model: Any, tokenizer: Any) -> None:
        """Call the stages that the first process does, until it is done with all."""
        while True:
            told = self.told(None)
            if told is None:
                return
            stage, name, args, asked = told
            stage(name, model, tokenizer, *args, **asked)

    def dismiss(self) -> None:
        """Have the others that `serve` end."""
        self.told(None)


# --- processes that join ------------------------------------------------------------------------


def local_device(device: str | None) -> str | None:
    """The device of this process: torchrun's processes of one machine take a GPU each."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{local}"


_JOINED: list[Ranks] = []  # in the contexts that are open


@contextmanager
def joined(model: Any = None) -> Iterator[Ranks]:
    """The processes that torchrun started, joined while the context lasts; it may be nested.

    `model` is the one that they ask, None where the first process alone does the work.
    Those that hold the model in parts are joined already. In a program that has joined its
    processes for something of its own each works alone: one of them may well study the model. What
    they tell each other goes from host to host (gloo); it is small, and waits for the device only
    when a checkpoint is written.
    """
    if model is not None and n_parts(model) > 1:
        yield Ranks(part_number(model), n_parts(model), in_parts=True)
        return
    if n_started() == 1:
        yield Ranks()
        return
    if _JOINED:
        with _JOINED[0].stage():
            yield _JOINED[0]
        return
    if distributed.is_initialized():
        yield Ranks()
        return
    rank, size = int(os.environ["RANK"]), n_started()
    number = meet().add(f"joined by {rank}", 1)  # a process may join again
    store = distributed.PrefixStore(f"joined {number}", meet())
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=WAIT)
    _JOINED.append(Ranks(rank, size, store=store))
    try:
        with _JOINED[0].stage():
            yield _JOINED[0]
    finally:
        _JOINED.clear()
        distributed.destroy_process_group()


def held(folder: Path, ranks: Ranks, *beneath: Path) -> Any:
    """The folder's lock, for the one process that writes; `beneath` as `locked` has it."""
    return locked(folder, *beneath) if ranks.rank == 0 else nullcontext()


@contextmanager
def sharing(model: Any, folder: Path, *beneath: Path, rows: bool = False) -> Iterator[Ranks]:
    """The processes that share the blocks of a stage's journal in `folder`, held by the first one.

    `rows`: each of them also writes rows of one file there, which takes one machine.
    """
    with joined(model) as ranks, held(folder, ranks, *beneath):
        if ranks.in_parts:
            raise RelneuronError(
                f"the model is held in {ranks.size} parts, and this takes a whole one",
                "load it without --tensor-parallel-size, or with --device-map auto",
            )
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
        if rows and here < ranks.size:
            raise RelneuronError(
                f"{here} of {ranks.size} processes are on this machine, and all write one file",
                "start them on one machine",
                2,
            )
        yield ranks
