"""Memory as malloc lays it out: by hand, and beside what this machine's malloc then holds."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from relneuron.model.heap import LARGE, Heap, most_resident
from tests.conftest import ROOT

MB = 1 << 20


def test_what_is_large_has_pages_of_its_own() -> None:
    heap = Heap()
    heap.take("a", 40 * MB)
    assert heap.resident == 40 * MB and heap.own
    heap.give_back("a")
    assert heap.resident == 0 and heap.threshold < LARGE  # larger than any threshold


def test_what_is_given_back_becomes_the_threshold() -> None:
    """From then on smaller pieces lie one after the other, and their holes are filled again."""
    heap = Heap()
    heap.take("a", 20 * MB)
    heap.give_back("a")
    for name in "bcd":
        heap.take(name, MB)
    assert not heap.own and 3 * MB <= heap.resident < 3 * MB + (1 << 16)
    heap.give_back("c")
    before = heap.resident
    heap.take("e", MB - 64)
    assert heap.resident == before  # in the hole of c
    heap.give_back("b")
    heap.give_back("e")
    heap.take("f", 2 * MB)  # begins at a multiple, for which the hole of both is too small
    assert heap.resident > before


def test_the_end_is_given_back_beyond_twice_the_threshold() -> None:
    heap = Heap()
    heap.take("a", 4 * MB)
    heap.give_back("a")
    for number in range(12):
        heap.take(number, MB)
    heap.take("last", 1 << 10)
    for number in range(12):
        heap.give_back(number)
    assert heap.resident >= 12 * MB  # nothing below the last one is
    heap.give_back("last")
    assert heap.resident < MB


def test_batches_of_several_sizes_leave_holes() -> None:
    """A tensor that is a little larger than a hole does not fit into it."""
    some = [3 * MB, 5 * MB, 9 * MB, 3 * MB, 5 * MB]
    tensors = [*((k, n) for k, n in enumerate(some)), *((k, 0) for k in range(5))]
    assert sum(some) <= most_resident(tensors) <= most_resident(tensors, (1.0, 0.98, 1.0))
    assert most_resident(tensors, (1.0, 0.5)) < 2 * sum(some)


SCRIPT = """
import os
os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
import torch
from relneuron.artifact.memory import peak_bytes, resident_bytes
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
