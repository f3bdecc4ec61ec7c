"""Memory of a launch: tensors, shared memory, who used it last, and what is still to come."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.parse import Fault

Array = np.ndarray[Any, Any]

# Of an element of so many bytes. complex128 is 16 bytes that numpy moves at once, as they are.
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
# All addresses of a process as one array; what is read and written has been checked before.
_FIRST = 1 << 16
_SPACE = np.frombuffer((ctypes.c_uint8 * ((1 << 48) - (1 << 17))).from_address(_FIRST), np.uint8)
_WORDS = {size: _SPACE.view(kind) for size, kind in BITS.items()}
# What fresh memory is filled with, in words of 32 bits: no float, id or count of the tests.
UNWRITTEN = np.uint32(0xA5C3E1F7)

# A user of memory is a number: program + 1, barriers passed, warp. The last warp stands for more
# than one of a program, and ANYBODY for more than one program.
_EPOCH_BIT, _PROGRAM_BIT = 10, 32
MANY = (1 << _EPOCH_BIT) - 1
ANYBODY = 1 << 62
ATOMIC = 1 << 61


def users(program: Array, epoch: Array, warp: Array | int) -> Array:
    return ((program.astype(np.int64) + 1) << _PROGRAM_BIT) | (epoch << _EPOCH_BIT) | warp


def _may_race(before: Array, now: Array) -> Array:
    """Whether nothing orders the two users: other programs, or other warps without a barrier."""
    differs = before ^ now
    # From 1 on below what an epoch counts for: only the warp is another one.
    raced: Array = (differs - 1).view(np.uint64) < MANY
    if int(differs.max(initial=0)) >> _PROGRAM_BIT:
        raced |= (differs >> _PROGRAM_BIT != 0) & (before != 0)
    return raced


class Marks:
    """Who wrote and who read each granule of some memory last, in this launch.

    Accesses are (k,) offsets and a size, users (k, 1), granules of accesses (k, n).
    """

    def __init__(self, n_bytes: int, granule: int, has_copies: bool = False) -> None:
        self.granule = granule
        # Where a tensor is smaller than a program, several warps load the same of it, and only the
        # first one's copy is ever stored: the others' reads may come when they like.
        self.has_copies = has_copies
        # Whole units of 16 bytes.
        self._n = (n_bytes + 31) // 16 * (16 // granule)
        self._writer: Array | None = None
        self._reader: Array | None = None
        # Reads of what nobody has written so far: mostly nobody ever does.
        self._log: list[tuple[Array, int, Array]] = []

    def _rows(self, place: Array, size: int) -> tuple[int, Array]:
        """(granules of a row, the rows), or (1, single granules) where an access is not one row."""
        n = max(1, size // self.granule)
        if n > 1 and int(np.bitwise_or.reduce(place, initial=0)) & (size - 1):
            return 1, place[:, None] // self.granule + np.arange(n)
        return n, place // (n * self.granule)

    def read(self, place: Array, size: int, user: Array) -> bool:
        """Note a read; whether it races with a write."""
        if self._writer is None:
            self._log.append((place, size, user))
            return False
        n, rows = self._rows(place, size)
        raced = np.count_nonzero(_may_race(_take(self._writer, n, rows), user)) > 0
        self._join(n, rows, user)
        return raced

    def write(self, place: Array, size: int, user: Array) -> tuple[Array, Array]:
        """Note a write; which accesses (k,) race with an earlier use, and which with each other."""
        writer = self._open()
        n, rows = self._rows(place, size)
        earlier = _may_race(_take(writer, n, rows), user)
        if self._reader is not None:
            earlier |= _may_race(_take(self._reader, n, rows), user)
        _set(writer, n, rows, user)
        return earlier.any(1), _may_race(_take(writer, n, rows), user).any(1)

    def update(self, place: Array, size: int, user: Array) -> bool:
        """Note an atomic update; whether it races with anything but other updates."""
        writer = self._open()
        n, rows = self._rows(place, size)
        before = _take(writer, n, rows)
        raced = _may_race(np.where(before == ATOMIC, 0, before), user)
        if self._reader is not None:
            raced |= _may_race(_take(self._reader, n, rows), user)
        _set(writer, n, rows, np.full((1, 1), ATOMIC))
        return bool(raced.any())

    def is_read_by_others(self, place: Array, size: int, user: Array) -> bool:
        if self._reader is None:
            return False
        return bool(_may_race(_take(self._reader, *self._rows(place, size)), user).any())

    def is_written(self, place: Array, size: int) -> bool:
        if self._writer is None:
            return False
        return bool(np.all(_take(self._writer, *self._rows(place, size))))

    def _open(self) -> Array:
        if self._writer is None:
            self._writer = np.zeros(self._n, np.int64)
            for place, size, user in self._log:
                self._join(*self._rows(place, size), user)
            self._log.clear()
        return self._writer

    def _join(self, n: int, rows: Array, user: Array) -> None:
        if self._reader is None:
            self._reader = np.zeros(self._n, np.int64)
        joined = _joined(_take(self._reader, n, rows), user)
        _set(self._reader, n, rows, joined)
        # Of several in this instruction the last one stands there.
        other = _take(self._reader, n, rows)
        clash = other != joined
        if np.count_nonzero(clash):
            single = rows if rows.ndim == 2 else rows[:, None] * n + np.arange(n)
            at, other, joined = single[clash], other[clash], joined[clash]
            if self.has_copies and bool(((other ^ joined) >> _EPOCH_BIT == 0).all()):
                np.minimum.at(self._reader, at, joined)
            else:
                self._reader[at] = _joined(other, joined)


def _take(marks: Array, n: int, rows: Array) -> Array:
    return marks[rows] if rows.ndim == 2 else marks.reshape(-1, n).take(rows, axis=0)


def _set(marks: Array, n: int, rows: Array, user: Array) -> None:
    if rows.ndim == 2:
        marks[rows] = user
    else:
        marks.reshape(-1, n)[rows] = user


def _joined(before: Array, now: Array) -> Array:
    """One user that stands for both, where nothing orders them; else the later one."""
    raced = _may_race(before, now)
    if not np.count_nonzero(raced):
        return np.broadcast_to(now, before.shape)
    both = np.where((before ^ now) >> _PROGRAM_BIT != 0, ANYBODY, now | MANY)
    return np.where(raced, both, now)


class GlobalMemory:
    """The tensors of a launch. Everything else is out of bounds."""

    def __init__(self) -> None:
        self._found: list[tuple[int, int, str, int, bool]] = []

    def add(self, address: int, size: int, name: str, granule: int, is_fresh: bool = False) -> None:
        """A storage; `granule` divides every access to it, a fresh one holds UNWRITTEN."""
        if size and all(address != known[0] for known in self._found):
            self._found.append((address, address + size, name, granule, is_fresh))

    def finish(self, with_marks: bool) -> None:
        self._found.sort()
        self.bases = np.array([span[0] for span in self._found] or [0], np.int64)
        self.ends = np.array([span[1] for span in self._found] or [0], np.int64)
        self.names = [span[2] for span in self._found]
        self.is_fresh = [span[4] for span in self._found]
        self.with_marks = with_marks
        self.marks = [
            Marks(end - base if with_marks else 0, granule, has_copies=True)
            for base, end, _, granule, _ in self._found
        ]

    def find(self, address: Array, size: int, hint: int, where: str) -> int | Array:
        """Which tensor all of these accesses are in, or which one each; a Fault if in none."""
        low, high = int(address.min()), int(address.max()) + size
        if size > 1 and int(np.bitwise_or.reduce(address, axis=None)) & (size - 1):
            odd = int(address[address % size != 0].flat[0])
            raise Fault(f"{where}: misaligned access of {size} bytes at {odd:#x}")
        if hint < len(self.bases) and self.bases[hint] <= low and high <= self.ends[hint]:
            return hint
        which = np.searchsorted(self.bases, address, side="right") - 1
        outside = (which < 0) | (address + size > self.ends[np.maximum(which, 0)])
        if np.count_nonzero(outside):
            at = int(address[outside].flat[0])
            raise Fault(
                f"{where}: {int(outside.sum())} accesses of {size} bytes out of bounds, the first "
                f"{self._nearest(at)}"
            )
        first = int(which.flat[0])
        return first if bool((which == first).all()) else which

    def _nearest(self, address: int) -> str:
        if not self.names:
            return f"at {address:#x}, where there are no tensors"
        distance = np.minimum(np.abs(self.bases - address), np.abs(self.ends - address))
        at = int(distance.argmin())
        if address < self.bases[at]:
            return f"{self.bases[at] - address} bytes before {self.names[at]}"
        size = self.ends[at] - self.bases[at]
        return f"{address - self.bases[at]} bytes into the {size} of {self.names[at]}"

    def load(self, address: Array, size: int) -> Array:
        return _WORDS[size].take((address - _FIRST) // size)

    def store(self, address: Array, value: Array, size: int) -> None:
        _WORDS[size][(address - _FIRST) // size] = value

    def is_unwritten(self, which: int, data: Array) -> bool:
        """Whether some of what was read is as it was allocated."""
        return self.is_fresh[which] and bool(np.count_nonzero(data.view(np.uint32) == UNWRITTEN))


class SharedMemory:
    """Of all programs that run at once, one after the other; rubbish at first."""

    def __init__(self, n_programs: int, n_bytes: int, granule: int, rubbish: Array) -> None:
        # Whole units of 16 bytes for each, so that one array can be seen as words of any size.
        self.stride = -(-max(n_bytes, 16) // 16) * 16
        self.n_bytes = n_bytes
        self.granule = granule
        self.bytes = np.resize(rubbish, n_programs * self.stride)
        self.words = {size: self.bytes.view(kind) for size, kind in BITS.items()}
        self.marks = Marks(n_programs * self.stride, granule)
        # What an asynchronous copy is still to write, in units of 16 bytes.
        self.is_pending = np.zeros(n_programs * self.stride // 16, np.bool_)

    def check(self, address: Array, size: int, alignment: int, where: str) -> None:
        """`address` within each program."""
        if int(address.min()) < 0 or int(address.max()) + size > self.n_bytes:
            at = int(address.max() if int(address.min()) >= 0 else address.min())
            raise Fault(
                f"{where}: shared memory of {self.n_bytes} bytes, an access of {size} bytes at {at}"
            )
        if alignment > 1 and int(np.bitwise_or.reduce(address, axis=None)) & (alignment - 1):
            raise Fault(f"{where}: misaligned access of {size} bytes of shared memory")


# --- asynchronous work ---------------------------------------------------------------------------

Write = Callable[[Array, Array | None], None]


class Groups:
    """What was started and is not waited for: groups of asynchronous work of each program."""

    def __init__(self, n_programs: int) -> None:
        # The number of the group that takes what is started now, and what is held back.
        self.opened = np.zeros(n_programs, np.int64)
        self.held: list[Any] = []

    def commit(self, mask: Array | None) -> None:
        self.opened += 1 if mask is None else mask.any(1)

    def done(self, mask: Array | None, n: int) -> Array:
        """For each program, the groups below this number are done once all but n of them are."""
        return np.where(True if mask is None else mask.any(1), self.opened - n, -1)


class Products(Groups):
    """Sums that nobody may read yet: their registers -> (what writes them, sums, groups)."""

    def __init__(self, n_programs: int) -> None:
        super().__init__(n_programs)
        self.sums: dict[tuple[str, ...], tuple[Write, Array, Array]] = {}

    def now(self, names: tuple[str, ...], read: Callable[[], Array]) -> Array:
        """The sums as a product sees them: those held back, or what `read` finds in registers."""
        if names not in self.sums:
            return read()
        _, held, group = self.sums[names]
        is_held = (group >= 0)[:, None, None, None]
        return held if is_held.all() else np.where(is_held, held, read())

    def hold(self, names: tuple[str, ...], put: Write, value: Array, mask: Array | None) -> None:
        """Keep sums [programs, ...] of the programs of a mask."""
        group = self.opened.copy()
        if mask is not None:
            here = np.broadcast_to(mask.any(1), group.shape)
            _, held, before = self.sums.get(names, (put, value, np.full_like(group, -1)))
            value = np.where(here[:, None, None, None], value, held)
            group = np.where(here, group, before)
        self.sums[names] = put, value, group

    def release(self, mask: Array | None, n: int) -> None:
        """Write the sums of all groups but the last n."""
        done = self.done(mask, n)
        for names, (put, value, group) in list(self.sums.items()):
            now = (group >= 0) & (group < done)
            if np.count_nonzero(now):
                put(value, None if now.all() else now[:, None])
                self.sums[names] = put, value, np.where(now, -1, group)
                if (self.sums[names][2] < 0).all():
                    del self.sums[names]


# --- accesses ------------------------------------------------------------------------------------


def spread(mask: Array | None, *values: Array) -> tuple[tuple[int, ...], Array | None, list[Array]]:
    """The common shape; which of it is asked for (None = all), and the values there, flat."""
    if mask is not None and mask.all():
        mask = None
    shapes = [value.shape for value in values] + ([] if mask is None else [mask.shape])
    shape = shapes[0] if len(set(shapes)) == 1 else np.broadcast_shapes(*shapes)
    wide = [each if each.shape == shape else np.broadcast_to(each, shape) for each in values]
    if mask is None:
        return shape, None, [each.reshape(-1) for each in wide]
    chosen = np.broadcast_to(mask, shape)
    return shape, chosen, [each[chosen] for each in wide]


def differ(a: Array, b: Array) -> Array:
    if a.dtype == np.complex128:
        pairs = np.ascontiguousarray(a).view(np.uint64) != np.ascontiguousarray(b).view(np.uint64)
        result: Array = pairs.reshape(-1, 2).any(1)
        return result
    return a != b
