"""What the memory of a process holds of tensors that come and go: glibc's malloc, replayed.

Freed tensors leave holes that the next ones do not always fit in, so that a process on a CPU takes
more than its tensors do at once. `traced.py` records a forward's tensors; here they are put in
memory as malloc does it (glibc's malloc/malloc.c: _int_malloc, _int_memalign), but for the small
pieces between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LARGE = 2 << 20  # tensors of so many bytes begin at a multiple of it: THP_MEM_ALLOC_ENABLE of torch
_CHUNK = 32  # bytes of a piece beside what was asked for
_GRAIN = 16 << 10  # bytes of memory that are touched together
_SAID = 1 << 10  # bytes that a batch leaves


class Heap:
    """Pieces of memory by a key; `resident` bytes of them and between them have been touched.

    They lie one after the other, each in the smallest hole that it fits in. Nothing is given back
    to the system (artifact/memory.py: `keep_freed`).
    """

    def __init__(self) -> None:
        self.placed: dict[Any, tuple[int, int]] = {}  # begin and end
        self._holes: dict[int, int] = {}  # end of each, by its begin
        self._begins: dict[int, int] = {}  # begin of each, by its end
        self._top = 0  # of what is in use
        self._touched = np.zeros(1024, bool)
        self.resident = 0

    def take(self, key: Any, n: int) -> None:
        """Put n bytes somewhere."""
        align = LARGE if n >= LARGE else 1
        need = n + _CHUNK + (align + _CHUNK) * (align > 1)
        fits = [(e - b, b) for b, e in self._holes.items() if e - b >= need]
        if fits:
            begin = min(fits)[1]
            end = self._fill(begin)
        else:
            begin, end = self._top, self._top + need
            self._top = end
        first = -(-begin // align) * align
        self.placed[key] = first, first + n + _CHUNK
        self._touch(first, first + n)
        self._free(begin, first)
        self._free(first + n + _CHUNK, end)

    def give_back(self, key: Any) -> None:
        """Free what was taken under the key."""
        self._free(*self.placed.pop(key))

    def _fill(self, begin: int) -> int:
        """Where a hole ends that is none from now on."""
        end = self._holes.pop(begin)
        del self._begins[end]
        return end

    def _free(self, begin: int, end: int) -> None:
        """Make a hole, one with those beside it, or a part of the end."""
        if begin == end:
            return
        if end in self._holes:
            end = self._fill(end)
        if begin in self._begins:
            begin = self._begins[begin]
            self._fill(begin)
        if end == self._top:
            self._top = begin
        else:
            self._holes[begin], self._begins[end] = end, begin

    def _touch(self, begin: int, end: int) -> None:
        first, last = begin // _GRAIN, -(-end // _GRAIN)
        if last > len(self._touched):
            more = np.zeros(2 * last - len(self._touched), bool)
            self._touched = np.concatenate([self._touched, more])
        part = self._touched[first:last]
        self.resident += (last - first - int(part.sum())) * _GRAIN
        part[:] = True


def most_resident(tensors: Sequence[tuple[int, int]], shares: Sequence[float] = (1.0,)) -> int:
    """The most bytes that are touched while the tensors of some batches come and go.

    `tensors` are those of the largest: (number, bytes) of one that is made, and (number, 0) of one
    that is freed. `shares` are the sizes of the batches, one after the other, as parts of it. What
    a batch leaves for the next ones is little, but nothing below it is given back.
    """
    heap, most = Heap(), 0
    for time, share in enumerate(shares):
        for number, n in tensors:
            if n:
                heap.take((time, number), max(1, int(n * share)))
                most = max(most, heap.resident)
            else:
                heap.give_back((time, number))
        heap.take((len(shares), time), _SAID)
        for left in [key for key in heap.placed if key[0] == time]:
            heap.give_back(left)
    return most
