"""Memory as malloc lays it out: by hand, and beside what this machine's malloc then holds."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from relneuron.model.heap import LARGE, Heap, most_resident
from tests.conftest import ROOT

MB = 1 << 20


def test_the_smallest_hole_is_filled_first() -> None:
    heap = Heap()
    for name, n in (("a", 3), ("b", 1), ("c", 1), ("d", 1)):
        heap.take(name, n * MB)
    before = heap.resident
    assert 6 * MB <= before < 8 * MB + (1 << 16)
    heap.give_back("a")
    heap.give_back("c")
    assert heap.resident == before  # nothing is given back to the system
    begin = heap.placed["b"][1]
    heap.take("e", MB - 64)
    assert heap.placed["e"][0] == begin and heap.resident == before


def test_holes_beside_each_other_are_one() -> None:
    heap = Heap()
    for name in "abcd":
        heap.take(name, MB)
    heap.give_back("b")
    heap.give_back("a")
    before = heap.resident
    heap.take("e", 2 * MB - 64)  # begins at a multiple, for which the hole of both is too small
    assert heap.resident > before and heap.placed["e"][0] % LARGE == 0
    heap.take("f", 2 * MB - 4096 - LARGE % MB - 1)
    assert heap.placed["f"][0] == 0


def test_batches_of_several_sizes_leave_holes() -> None:
    """A tensor that is a little larger than a hole does not fit into it."""
    some = [3 * MB, 5 * MB, 9 * MB, 3 * MB, 5 * MB]
    tensors = [*((k, n) for k, n in enumerate(some)), *((k, 0) for k in range(5))]
    assert sum(some) <= most_resident(tensors) <= most_resident(tensors, (1.0, 0.98, 1.0))
    assert most_resident(tensors, (1.0, 0.5)) < 2 * sum(some)


SCRIPT = """
import os
os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
from relneuron.artifact.memory import keep_freed, peak_bytes, resident_bytes
keep_freed()
import torch
from relneuron.model.heap import most_resident
events, number, kept = [], 0, []
for layer in range(8):  # of each layer one tensor stays, as keys and values do
    own = range(number, number + 5)
    events += [(k, (7, 3, 12, 5, 12)[k - number] << 20) for k in own]
    events += [(k, 0) for k in own[1:]]
    number += 5
events += [(k, 0) for k in range(0, number, 5)]
shares, held = (1.0, 0.97, 0.8, 1.0), {}
torch.ones(1 << 20).add(1)
before = resident_bytes()
for share in shares:
    for number, n in events:
        if n:
            held[number] = torch.zeros(int(n * share), dtype=torch.uint8).fill_(1)
        else:
            del held[number]
    kept.append(bytes(1 << 10))
print(most_resident(events, shares), peak_bytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's malloc")
def test_it_is_what_malloc_does() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, cwd=ROOT
    )
    told, real = map(int, done.stdout.split())
    assert abs(told - real) <= 0.1 * real, (told, real)
