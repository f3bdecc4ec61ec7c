"""What the memory of a process holds of tensors that come and go: glibc's malloc, replayed.

Freed tensors leave holes that the next ones do not always fit in, so that a process on a CPU takes
more than its tensors do at once. `traced.py` records a forward's tensors; here they are put in
memory as malloc does it (glibc's malloc/malloc.c: _int_malloc, _int_memalign, sysmalloc, systrim).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LARGE = 2 << 20  # tensors of so many bytes begin at a multiple of it: THP_MEM_ALLOC_ENABLE of torch
_LARGEST_THRESHOLD = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX: what is larger has pages of its own
_THRESHOLD, _PAD, _CHUNK = 128 << 10, 128 << 10, 32  # at the start; added to the end; the smallest
_GRAIN = 16 << 10  # bytes of memory that are touched together
_SAID = 1 << 10  # bytes that a batch leaves


class Heap:
    """Pieces of memory by a key; `resident` bytes of them and between them have been touched.

    What is as large as `threshold` has pages of its own, which are given back when it is freed; it
    then becomes the threshold. The others lie one after the other, each in the smallest hole that
    it fits in; of the end more than twice the threshold is given back.
    """

    def __init__(self) -> None:
        self.threshold = _THRESHOLD
        self.own: dict[Any, tuple[int, int]] = {}  # pages of their own: bytes, and of the chunk
        self.placed: dict[Any, tuple[int, int]] = {}  # begin and end
        self._holes: dict[int, int] = {}  # end of each, by its begin
        self._begins: dict[int, int] = {}  # begin of each, by its end
        self._top = self._end = 0  # of what is in use, and of what is taken from the system
        self._touched = np.zeros(1024, bool)
        self._n_touched = self._n_own = 0

    @property
    def resident(self) -> int:
        """Bytes that are touched and not given back."""
        return self._n_touched * _GRAIN + self._n_own

    def take(self, key: Any, n: int) -> None:
        """Put n bytes somewhere."""
        align = LARGE if n >= LARGE else 1
        need = n + _CHUNK + (align + _CHUNK) * (align > 1)
        fits = [(e - b, b) for b, e in self._holes.items() if e - b >= need]
        if fits:
            begin = min(fits)[1]
            end = self._fill(begin)
        elif self._end - self._top < need >= self.threshold:
            # On average half of what is left out to begin at a multiple is before it.
            self.own[key] = n, n + _CHUNK + align // 2
            self._n_own += n
            return
        else:
            if self._end - self._top < need:
                self._end = self._top + need + _PAD
            begin, end = self._top, self._top + need
            self._top = end
        first = -(-begin // align) * align
        self.placed[key] = first, first + n + _CHUNK
        self._touch(first, first + n)
        self._free(begin, first)
        self._free(first + n + _CHUNK, end)

    def give_back(self, key: Any) -> None:
        """Free what was taken under the key."""
        if key in self.own:
            n, chunk = self.own.pop(key)
            self._n_own -= n
            if self.threshold < chunk <= _LARGEST_THRESHOLD:
                self.threshold = chunk
            return
        self._free(*self.placed.pop(key))
        if self._end - self._top >= 2 * self.threshold:
            self._end = self._top + _PAD
            gone = self._touched[-(-self._end // _GRAIN) :]
            self._n_touched -= int(gone.sum())
            gone[:] = False

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
        self._n_touched += last - first - int(part.sum())
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
        for left in [key for key in (*heap.own, *heap.placed) if key[0] == time]:
            heap.give_back(left)
    return most
