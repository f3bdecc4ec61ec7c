"""Runs a kernel: many programs at once, threads that diverge in groups.

Each group is at a block of its own, with a mask; the one at the lowest block runs next, so that
they meet again.
"""

from __future__ import annotations

import functools
import gc
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx.code import NEVER, Code, Mask, Options, Step, builder
from tests.ptx.memory import GlobalMemory
from tests.ptx.parse import Block, Fault, Instruction, Kernel
from tests.ptx.rounding import TYPES

Array = np.ndarray[Any, Any]
# Threads at a time: their registers stay in the caches, and numpy's own cost per call is small.
_THREADS = 16384


@dataclass
class _Steps:
    steps: list[Step]
    instructions: list[Instruction]
    end: Instruction | None
    predicate: int | None
    target: int
    # Registers of other blocks that decide here what is stored, where, and which way to go.
    decisive: list[tuple[str, str]]


class Machine(Code):
    """A kernel made ready to run; `run` is one launch of it."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._granule = _shared_granule(kernel)
        # Of the last launch, each counted once for all threads that are together.
        self.n_instructions = 0
        # Thousands of functions are made, none of which is garbage.
        was_enabled = gc.isenabled()
        gc.disable()
        # The first time finds how each register is read, the second uses it where it is written.
        for _ in range(2):
            self._blocks = [self._compile(number) for number in range(len(kernel.blocks))]
        if was_enabled:
            gc.enable()

    def _compile(self, number: int) -> _Steps:
        block = self.kernel.blocks[number]
        steps = [builder(each)(self, each) for each in block.instructions]
        end, predicate, target = block.end, None, number + 1
        if end is not None:
            builder(end)
            if end.predicate is not None:
                if end.op not in ("bra", "bra.uni"):
                    raise Fault(f"{end.where}: with a predicate")
                predicate = self.use(end.predicate, "pred")
            if end.op in ("bra", "bra.uni"):
                target = self.kernel.labels[str(end.operands[0])]
            if end.op == "bar.sync" and end.operands != ["0"]:
                raise Fault(f"{end.where}: another barrier than 0: {end.text}")
        return _Steps(steps, block.instructions, end, predicate, target, _decisive(block))

    def run(
        self,
        grid: tuple[int, ...],
        arguments: list[int | float],
        memory: GlobalMemory,
        shared_bytes: int,
        options: Options,
    ) -> None:
        """One launch; `reports` has what was found without ending it, by how often."""
        self.n_instructions = 0
        self.grid = (*grid, 1, 1)[:3]
        self.memory, self.options = memory, options
        self.reports = Counter()
        self.random = np.random.default_rng(options.seed)
        self._noise = self.random.integers(0, 256, 4096, dtype=np.uint8)
        names = [name for name, _ in self.kernel.parameters]
        self.arguments = dict(zip(names, arguments, strict=False))
        n_programs = int(np.prod(self.grid))
        batch = max(1, _THREADS // self.n_threads)
        try:
            with np.errstate(all="ignore"):
                for first in range(0, n_programs, batch):
                    programs = np.arange(first, min(first + batch, n_programs))
                    self.start(programs, shared_bytes, self._granule)
                    self._schedule()
        finally:
            self.stop()

    def _schedule(self) -> None:
        pending: dict[int, Mask] = {0: None}
        waiting: dict[int, Array] = {}
        ended = np.zeros((1, 1), np.bool_)
        while pending:
            at = min(pending)
            mask = pending.pop(at)
            if at >= len(self._blocks):
                raise Fault(f"{self.kernel.name}: runs past its end")
            code = self._blocks[at]
            self._steps(code, mask)
            self.n_instructions += len(code.steps)
            op = None if code.end is None else code.end.op
            if op in ("ret", "exit"):
                ended = ended | (np.True_ if mask is None else mask)
            elif op == "bar.sync":
                if mask is None:
                    self.pass_barrier(np.ones((1, 1), np.bool_))
                    _join(pending, at + 1, None)
                    continue
                before = waiting.get(at)
                waiting[at] = mask if before is None else mask | before
            elif code.predicate is None:
                _join(pending, code.target, mask)
                continue
            else:
                self._branch(pending, code, at, mask)
                continue
            if waiting:
                self._release(pending, waiting, ended)
        assert not waiting, "threads that wait go on or are a fault"

    def _steps(self, code: _Steps, mask: Mask) -> None:
        if self.partial:
            self._check(code, mask)
        step: Step | None = None
        try:
            for step in code.steps:
                step(mask)
        except (TypeError, AttributeError) as error:
            assert step is not None
            instruction = code.instructions[code.steps.index(step)]
            never = self.never_written(instruction.sources())
            if not never:
                raise
            raise Fault(
                f"{instruction.where} reads {never[0]}, which nothing has written"
            ) from error

    def _check(self, code: _Steps, mask: Mask) -> None:
        """What decides something must be written by all threads that are here."""
        for where, name in code.decisive:
            if name in self.partial:
                missing = ~self.partial[name] if mask is None else mask & ~self.partial[name]
                if missing.any():
                    self.report(f"{where} reads {name}, which not all threads have written")

    def _branch(self, pending: dict[int, Mask], code: _Steps, at: int, mask: Mask) -> None:
        assert code.end is not None and code.predicate is not None
        taken: Any = self.R[code.predicate]
        if taken is NEVER:
            raise Fault(f"{code.end.where} reads {code.end.predicate}, which nothing has written")
        if code.end.is_negated:
            taken = ~taken
        if mask is None:
            n = np.count_nonzero(taken)
            if n in (0, taken.size):
                _join(pending, code.target if n else at + 1, None)
                return
            goes, stays = taken, ~taken
        else:
            goes, stays = mask & taken, mask & ~taken
            if not np.count_nonzero(stays):
                _join(pending, code.target, mask)
                return
            if not np.count_nonzero(goes):
                _join(pending, at + 1, mask)
                return
        _join(pending, code.target, goes)
        _join(pending, at + 1, stays)

    def _release(self, pending: dict[int, Mask], waiting: dict[int, Array], ended: Array) -> None:
        """Programs all of whose threads wait go on."""
        arrived = functools.reduce(np.logical_or, waiting.values())
        n_waiting = np.broadcast_to(arrived, self.shape).sum(1)
        n_ended = np.broadcast_to(ended, self.shape).sum(1)
        done = (n_waiting > 0) & (n_waiting + n_ended == self.n_threads)
        if not np.count_nonzero(done):
            return
        for at, mask in list(waiting.items()):
            end = self._blocks[at].end
            assert end is not None
            n_here = np.broadcast_to(mask, self.shape).sum(1)
            if ((n_here > 0) & (n_here != self.n_threads))[done].any():
                raise Fault(f"{end.where}: a barrier that not all threads of a program reach")
            goes, stays = mask & done[:, None], mask & ~done[:, None]
            if np.count_nonzero(goes):
                _join(pending, at + 1, goes)
            if np.count_nonzero(stays):
                waiting[at] = stays
            else:
                del waiting[at]
        self.pass_barrier(done[:, None])


def _decisive(block: Block) -> list[tuple[str, str]]:
    found, written = [], set()
    for each in block.instructions + ([] if block.end is None else [block.end]):
        names = each.sources() if each.predicate is None else [each.predicate]
        is_decisive = each.op.startswith(("st.", "ld.", "red.", "cp.async.c", "bra"))
        if is_decisive or each.predicate is not None:
            found += [(each.where, name) for name in names if name not in written]
        written |= set(each.destinations())
    return found


def _join(pending: dict[int, Mask], at: int, mask: Mask) -> None:
    if at in pending:
        other = pending[at]
        mask = None if mask is None or other is None else mask | other
    if mask is not None and mask.all():
        mask = None
    pending[at] = mask


def _shared_granule(kernel: Kernel) -> int:
    """The size of the smallest access to shared memory."""
    found = [16]
    for instruction in kernel.instructions():
        parts = instruction.op.split(".")
        if parts[0] in ("ld", "st") and parts[1].startswith("shared"):
            found.append(np.dtype(TYPES[parts[-1]]).itemsize)
        elif parts[0] == "wgmma":
            found.append(4)
    return min(found)
