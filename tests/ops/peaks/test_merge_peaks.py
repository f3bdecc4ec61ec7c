"""Tests of ops.merge_peaks and BestPeaks: every backend against a sort, and its arguments."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from relneuron.ops import BestPeaks, merge_peaks
from relneuron.testing import assert_same_bits
from relneuron.testing.oracle_peaks import brute_best, some_peaks
from tests.kit.interpreter import quiet
from tests.ops.peaks.runs import BACKENDS, run_merge

pytestmark = quiet


def assert_same(out: BestPeaks, expected: BestPeaks) -> None:
    for name, tensor in vars(expected).items():
        assert_same_bits(getattr(out, name), tensor, f"{name} (group, neuron, place)")


@pytest.mark.parametrize("k", [1, 5, 16, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_best_are_those_of_a_sort(backend: str, k: int) -> None:
    """Of few segments and of many, after one another."""
    calls = [some_peaks(n, 37, seed) for seed, n in enumerate((1, 40, 0, 7))]
    best = BestPeaks.none(3, 37, k)
    for i, call in enumerate(calls):
        best = run_merge(backend, best, *call)
        assert_same(best, brute_best(calls[: i + 1], 3, 37, k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_order_and_split_of_the_segments(backend: str) -> None:
    call = some_peaks(50, 20, 1)
    empty = BestPeaks.none(3, 20, 6)
    whole = run_merge(backend, empty, *call)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert_same(run_merge(backend, empty, *(part[order] for part in call)), whole)
    parts = [tuple(part[rows] for part in call) for rows in (order[:20], order[20:])]
    first, second = (run_merge(backend, empty, *part) for part in parts)
    assert_same(first + second, whole)
    assert_same(second + first, whole)
    assert_same(run_merge(backend, first, *parts[1]), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_group_needs_no_ids(backend: str) -> None:
    values, positions, numbers, _ = some_peaks(9, 17, 2)
    zeros = torch.zeros(9, dtype=torch.int32)
    empty = BestPeaks.none(1, 17, 4)
    expected = run_merge(backend, empty, values, positions, numbers, zeros)
    assert_same(run_merge(backend, empty, values, positions, numbers, None), expected)
    assert expected.number.max() >= 2**40


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_peak_is_not_kept(backend: str) -> None:
    """NaN, and what has no position; zeros are equal, and the lower number comes first."""
    values = torch.tensor([[torch.nan, 7.0, -0.0], [1.0, -torch.inf, 0.0]])
    positions = torch.tensor([[3, -1, 5], [2, 0, 4]], dtype=torch.int32)
    best = run_merge(
        backend, BestPeaks.none(1, 3, 2), values, positions, torch.tensor([8, 9]), None
    )
    assert best.value.tolist() == [[[1.0, -torch.inf], [-torch.inf, -torch.inf], [0.0, 0.0]]]
    assert best.number.tolist() == [[[9, -1], [9, -1], [8, 9]]]
    assert best.position.tolist() == [[[2, -1], [0, -1], [5, 4]]]
    assert not best.value.signbit()[0, 2].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 0), (0, 5)])
def test_nothing_is_nothing(backend: str, shape: tuple[int, int]) -> None:
    empty = BestPeaks.none(3, shape[1], 2)
    assert_same(run_merge(backend, empty, *some_peaks(*shape, 1)), empty)


@pytest.mark.parametrize("backend", BACKENDS)
def test_subnormal_peaks_keep_their_order(backend: str) -> None:
    values = torch.tensor([[1e-45], [3e-45], [0.0], [-1e-45]])
    positions = torch.zeros(4, 1, dtype=torch.int32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        best = run_merge(backend, BestPeaks.none(1, 1, 4), values, positions, torch.arange(4), None)
        both = best + BestPeaks.none(1, 1, 4)
    finally:
        torch.set_flush_denormal(False)
    assert best.number.tolist() == both.number.tolist() == [[[1, 0, 2, 3]]]
    assert_same_bits(best.value.flatten(), torch.tensor([3e-45, 1e-45, 0.0, -1e-45]))


def test_mistakes_have_their_message_and_nothing_is_written() -> None:
    values, positions = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int32)
    numbers, ids = torch.arange(2), torch.tensor([0, 1], dtype=torch.int32)
    best = BestPeaks.none(2, 3, 4)
    shared = dataclasses.replace(best, value=torch.zeros(24).view(2, 3, 4))
    for message, changes in (
        (r"values must be \(S, F\) float32", {"values": values[0]}),
        ("positions must be .* int32 with S=2, F=3 .from values", {"positions": ids}),
        ("numbers must be .S,. int64 with S=2", {"numbers": ids}),
        (r"numbers must be in \[0, .* got -1 at 1", {"numbers": torch.tensor([0, -1])}),
        ("group_ids must be .S,. int32 with S=2", {"group_ids": ids[:1]}),
        ("group_ids must be .* when best has G=2, got None", {"group_ids": None}),
        (r"group_ids must be in \[-1, 2\) .G=2 from best., got 2 at 0", {"group_ids": ids + 2}),
        (
            "best.number must be .G, F, K. int64 with G=2, F=3, K=4",
            {"best": dataclasses.replace(best, number=best.number[:1])},
        ),
        ("best.value must be .*F=3", {"best": BestPeaks.none(2, 5, 4)}),
        (
            r"best.value must be \(G, F, K\) float32 with G >= 1 and K in \[1, 128\]",
            {"best": dataclasses.replace(best, value=torch.zeros(2, 3, 200))},
        ),
        (
            "best.position must be contiguous",
            {"best": dataclasses.replace(best, position=best.position[..., :1].expand(2, 3, 4))},
        ),
        (
            "best.value must not share memory with values",
            {"best": shared, "values": shared.value.view(8, 3)[:2]},
        ),
        ("backend must be one of", {"backend": "gpu"}),
    ):
        given = {"best": best, "numbers": numbers, "group_ids": ids} | changes
        with pytest.raises(ValueError, match=f"^merge_peaks: {message}"):
            merge_peaks(given.pop("values", values), given.pop("positions", positions), **given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^merge_peaks: best must be a BestPeaks, got Tensor"):
        merge_peaks(values, positions, best=values, numbers=numbers)  # type: ignore[arg-type]
    assert (best.number == -1).all()
    for wrong in ((0, 3, 4), (1, -1, 4), (1, 3, 0), (1, 3, 129)):
        with pytest.raises(ValueError, match="^BestPeaks: groups must be at least 1"):
            BestPeaks.none(*wrong)
    with pytest.raises(ValueError, match="^BestPeaks: groups, width, k and device must be equal"):
        best + BestPeaks.none(2, 3, 5)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpu")])
def test_any_number_of_threads(backend: str) -> None:
    segments, empty = some_peaks(60, 2100, 3), BestPeaks.none(3, 2100, 16)
    expected = run_merge("reference", empty, *segments)
    assert_same(run_merge(backend, empty, *segments, n_threads=3), expected)
