"""What the functions share that instructions become: registers, masks, and the launch that runs.

Every instruction of a kernel becomes a function once; `form` says which ones a builder makes. A
value is an array [programs or 1, threads or 1]: what is the same for all threads of a program, or
for all programs, is computed once.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx.memory import MANY, GlobalMemory, Groups, Products, SharedMemory, users
from tests.ptx.parse import Address, Fault, Instruction, Kernel, Operand
from tests.ptx.rounding import TYPES, constant, conversion, symbol

Array = np.ndarray[Any, Any]
# Which threads run: None = all of them.
Mask = Array | None
Step = Callable[[Mask], None]
Put = Callable[[Array, Mask], None]
Builder = Callable[["Code", Instruction], Step]

# Programs of those that run at once whose shared memory is checked for races.
_CHECKED = 8
# What an instruction may be, as a whole, and what makes it a function.
FORMS: list[tuple[re.Pattern[str], Builder]] = []


def form(pattern: str) -> Callable[[Builder], Builder]:
    """Says that a function builds the instructions of these forms."""

    def register(build: Builder) -> Builder:
        FORMS.append((re.compile(pattern), build))
        return build

    return register


@functools.cache
def _builder(op: str) -> Builder | None:
    from tests.ptx import access, arithmetic, convert, warps  # noqa: F401  they fill FORMS

    found = [build for pattern, build in FORMS if pattern.fullmatch(op)]
    assert len(found) <= 1, f"{op} has {len(found)} meanings"
    return found[0] if found else None


def builder(instruction: Instruction) -> Builder:
    build = _builder(instruction.op)
    if build is None:
        raise Fault(f"{instruction.where} is no form that is known here: {instruction.text}")
    return build


class _Never:
    """The value of a register that nothing has written: whoever computes with it fails."""

    __array_ufunc__ = None

    def __array__(self, *_: object, **__: object) -> Array:
        raise TypeError("a register that nothing has written")


NEVER: Any = _Never()


@dataclass(frozen=True)
class Options:
    """How a launch is run."""

    races: bool = True
    # By how many units in the last place an approximate instruction may be off, at random.
    ulps: int = 0
    seed: int = 0


class Code:
    """A kernel's registers, and of the launch that runs what instructions see."""

    kernel: Kernel
    # Of the launch.
    grid: tuple[int, ...]
    arguments: dict[str, int | float]
    options: Options
    memory: GlobalMemory
    reports: Counter[str]
    random: np.random.Generator
    # Of the programs that run at once: their numbers, [programs, threads], barriers passed.
    programs: Array
    shape: tuple[int, int]
    epoch: Array
    shared: SharedMemory
    # Where the shared memory of each program begins, [programs, 1].
    shared_base: Array
    # Asynchronous copies and products; whether something was stored that products may not see yet.
    copies: Groups
    products: Products
    is_unfenced: bool

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.n_threads = kernel.n_threads
        # What registers and constants hold: one number for each register and type it is read as.
        self.R: list[Any] = []
        self._slots: dict[tuple[str, type[np.generic]], int] = {}
        self._constants: dict[int, Array] = {}
        self._views: dict[str, list[tuple[int, type[np.generic]]]] = {}
        self._written: set[str] = set()
        self._temporaries = kernel.temporaries()
        # Of registers that only some threads have written, which ones.
        self.partial: dict[str, Array] = {}
        self._user: Array | None = None
        self._noise = np.zeros(0, np.uint8)

    # --- while instructions become functions -------------------------------------------------

    def use(self, operand: Operand, kind: str) -> int:
        """Where the value of an operand stands while running, as numbers of this type."""
        if not isinstance(operand, str):
            raise Fault(f"an operand {operand} in place of a number")
        dtype = TYPES[kind]
        slot = self._slots.get((operand, dtype))
        if slot is None:
            slot = len(self.R)
            self.R.append(NEVER)
            self._slots[operand, dtype] = slot
            if operand in self.kernel.registers:
                self._views.setdefault(operand, []).append((slot, dtype))
            elif not operand.startswith("%"):
                self._constants[slot] = constant(operand, dtype)
            elif operand not in _SPECIAL:
                raise Fault(f"unknown register {operand}")
        return slot

    def address(self, operand: Operand) -> Callable[[], Array]:
        """What gives the address, as int64."""
        if not isinstance(operand, Address):
            raise Fault(f"an operand {operand} in place of an address")
        R, offset = self.R, np.int64(operand.offset)
        if operand.base in self.kernel.registers:
            if self.kernel.registers[operand.base] == "b32":
                slot = self.use(operand.base, "u32")
                return lambda: R[slot].astype(np.int64) + offset
            slot = self.use(operand.base, "s64")
            if not offset:
                return lambda: R[slot]
            return lambda: R[slot] + offset
        place = np.full((1, 1), symbol(operand.base) + operand.offset, np.int64)
        return lambda: place

    def put(self, operand: Operand, kind: str, instruction: Instruction) -> Put:
        """What writes a register, from values of this type."""
        if operand == "_":
            return lambda value, mask: None
        if not isinstance(operand, str) or operand not in self.kernel.registers:
            raise Fault(f"{instruction.where}: writes {operand}")
        self._written.add(operand)
        R, merge, note, partial = self.R, self.merge, self._note, self.partial
        width = TYPES[self.kernel.registers[operand]]
        views = [
            (slot, conversion(TYPES[kind], width, dtype))
            for slot, dtype in self._views.get(operand, ())
        ]
        # Of a temporary nobody ever sees what it holds for other threads.
        is_kept = operand not in self._temporaries
        if instruction.predicate is not None:
            return self._put_if(views, instruction, is_kept)
        if len(views) == 1 and views[0][1] is None:
            only = views[0][0]

            def put_temporary(value: Array, mask: Mask) -> None:
                R[only] = value

            def put_one(value: Array, mask: Mask) -> None:
                if mask is not None or partial:
                    note(operand, mask, R[only] is NEVER)
                R[only] = value if mask is None else merge(mask, value, R[only])

            return put_one if is_kept else put_temporary

        def put_views(value: Array, mask: Mask) -> None:
            if views and is_kept and (mask is not None or partial):
                note(operand, mask, R[views[0][0]] is NEVER)
            for slot, convert in views:
                each = value if convert is None else convert(value)
                R[slot] = merge(mask, each, R[slot]) if mask is not None and is_kept else each

        return put_views

    def _put_if(
        self,
        views: list[tuple[int, Callable[[Array], Array] | None]],
        instruction: Instruction,
        is_kept: bool,
    ) -> Put:
        R, merge, chosen = self.R, self.merge, self.chosen(instruction)

        def put(value: Array, mask: Mask) -> None:
            mask = chosen(mask if is_kept else None)
            for slot, convert in views:
                each = value if convert is None else convert(value)
                R[slot] = merge(mask, each, R[slot])

        return put

    def temporary(self, operand: Operand, kind: str, instruction: Instruction) -> int | None:
        """Where `put` of a temporary would store values just as they are."""
        if not isinstance(operand, str) or operand not in self._temporaries:
            return None
        views = self._views.get(operand, [])
        is_plain = instruction.predicate is None and [each[1] for each in views] == [TYPES[kind]]
        return views[0][0] if is_plain else None

    def chosen(self, instruction: Instruction) -> Callable[[Mask], Mask]:
        """What narrows a mask to the threads whose predicate holds."""
        if instruction.predicate is None:
            return lambda mask: mask
        R, slot = self.R, self.use(instruction.predicate, "pred")
        is_negated = instruction.is_negated

        def narrow(mask: Mask) -> Mask:
            holds: Array = ~R[slot] if is_negated else R[slot]
            return holds if mask is None else holds & mask

        return narrow

    # --- while running -----------------------------------------------------------------------

    def merge(self, mask: Mask, value: Array, old: Any) -> Array:
        if mask is None:
            return value
        if old is NEVER:
            shape = np.broadcast_shapes(mask.shape, value.shape)
            old = self.rubbish(shape, value.dtype)
        return np.where(mask, value, old)

    def _note(self, name: str, mask: Mask, is_first: bool) -> None:
        """Who has written a register, as long as not all have."""
        if mask is not None and (is_first or name in self.partial):
            self.partial[name] = mask | self.partial.get(name, np.zeros((1, 1), np.bool_))
        if self.partial and (mask is None or np.all(self.partial.get(name, False))):
            self.partial.pop(name, None)

    def rubbish(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """What a register or shared memory holds that nobody wrote."""
        n = int(np.prod(shape)) * dtype.itemsize
        start = int(self.random.integers(0, 4096 - 256)) & ~15
        bytes_ = np.resize(self._noise[start:], n)
        return (
            (bytes_ & 1).view(np.bool_).reshape(shape)
            if dtype == np.bool_
            else bytes_.view(dtype).reshape(shape)
        )

    def full(self, value: Array) -> Array:
        """A value of every thread, [programs, threads]."""
        if value.shape == self.shape:
            return np.ascontiguousarray(value)
        return np.ascontiguousarray(np.broadcast_to(value, self.shape))

    def together(self, mask: Mask, where: str) -> None:
        """All lanes of every warp that is here must be here."""
        if mask is None or mask.shape[1] == 1:
            return
        lanes = mask.reshape(mask.shape[0], -1, 32)
        if (lanes.any(2) != lanes.all(2)).any():
            raise Fault(f"{where} of a warp that is not together")

    def user(self) -> Array:
        """Every thread as a user of memory, see there; a number per warp and barrier."""
        if self._user is None:
            warp = np.arange(self.n_threads)[None, :] // 32
            self._user = users(self.programs[:, None], self.epoch, warp)
        return self._user

    def n_checked(self, place: Array) -> int:
        """Of accesses to shared memory in order, those of the first programs."""
        if self.shape[0] <= _CHECKED:
            return len(place)
        return int(np.count_nonzero(place < _CHECKED * self.shared.stride))

    def user_of_many(self) -> Array:
        return users(self.programs[:, None], self.epoch, MANY)

    def report(self, text: str) -> None:
        """A fault that does not end the launch, such as a race."""
        self.reports[text] += 1

    def pass_barrier(self, done: Array) -> None:
        """Programs whose threads have all reached one."""
        self.epoch = self.epoch + done
        self._user = None

    def start(self, programs: Array, shared_bytes: int, granule: int) -> None:
        """Programs begin: registers and shared memory hold nothing."""
        self.programs = programs
        self.shape = (len(programs), self.n_threads)
        self.epoch = np.zeros((len(programs), 1), np.int64)
        self._user = None
        self.shared = SharedMemory(len(programs), shared_bytes, granule, self._noise[: 16 * 251])
        self.shared_base = (np.arange(len(programs)) * self.shared.stride)[:, None]
        self.copies, self.products = Groups(len(programs)), Products(len(programs))
        self.is_unfenced = False
        self.R[:] = [NEVER] * len(self.R)
        self.partial.clear()
        for slot, value in self._constants.items():
            self.R[slot] = value
        # What no instruction writes the compiler has left open: any value must do.
        for name in self._views.keys() - self._written:
            for slot, dtype in self._views[name]:
                self.R[slot] = self.rubbish(self.shape, np.dtype(dtype))
        for (name, dtype), slot in self._slots.items():
            if name in _SPECIAL:
                self.R[slot] = _SPECIAL[name](self).astype(np.uint32).view(dtype)

    def stop(self) -> None:
        """Nothing is kept of a launch: registers of many threads are large."""
        self.R[:] = [NEVER] * len(self.R)
        del self.memory, self.shared, self.copies, self.products

    def forget(self, name: str) -> None:
        """A register holds nothing again."""
        for slot, _ in self._views.get(name, ()):
            self.R[slot] = NEVER

    def never_written(self, names: list[str]) -> list[str]:
        return [n for n in names if n in self._views and self.R[self._views[n][0][0]] is NEVER]


def _ids(divisor: Callable[[tuple[int, ...]], tuple[int, int]]) -> Callable[[Code], Array]:
    def ids(code: Code) -> Array:
        step, size = divisor(code.grid)
        return (code.programs // step % size)[:, None]

    return ids


_SPECIAL: dict[str, Callable[[Code], Array]] = {
    "%tid.x": lambda code: np.arange(code.n_threads)[None, :],
    "%laneid": lambda code: np.arange(code.n_threads)[None, :] % 32,
    "%ntid.x": lambda code: np.full((1, 1), code.n_threads),
    "%ctaid.x": _ids(lambda grid: (1, grid[0])),
    "%ctaid.y": _ids(lambda grid: (grid[0], grid[1])),
    "%ctaid.z": _ids(lambda grid: (grid[0] * grid[1], grid[2])),
    **{
        f"%nctaid.{name}": (lambda code, axis=axis: np.full((1, 1), code.grid[axis]))  # type: ignore[misc]
        for axis, name in enumerate("xyz")
    },
}
