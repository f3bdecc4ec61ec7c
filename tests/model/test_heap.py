"""Memory as malloc lays it out, by hand; tests/cli/test_plan.py holds plans to real processes."""

from __future__ import annotations

from relneuron.model.heap import LARGE, Heap, most_resident

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
    heap.take("e", 2 * MB)  # begins at a multiple, for which the hole of both is too small
    assert heap.resident > before and heap.placed["e"][0] % LARGE == 0
    heap.take("f", 2 * MB - 64)
    assert heap.placed["f"][0] == 0


def test_batches_of_several_sizes_leave_holes() -> None:
    """A tensor that is a little larger than a hole does not fit into it."""
    some = [3 * MB, 5 * MB, 9 * MB, 3 * MB, 5 * MB]
    tensors = [*((k, n) for k, n in enumerate(some)), *((k, 0) for k in range(5))]
    assert sum(some) <= most_resident(tensors) <= most_resident(tensors, (1.0, 0.98, 1.0))
    assert most_resident(tensors, (1.0, 0.5)) < 2 * sum(some)
