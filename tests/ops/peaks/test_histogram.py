"""Tests of ops.histogram, its edges and ranges: every backend against numpy's searchsorted."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from relneuron.ops import ACTIVATIONS, SITES, histogram, histogram_edges, site_range
from relneuron.ops.swiglu_stats.reference import site_values
from relneuron.testing import assert_same_bits
from relneuron.testing.oracle import all_patterns, integers, normal
from relneuron.testing.oracle_peaks import brute_histogram, wild
from tests.kit.interpreter import quiet
from tests.ops.peaks.runs import BACKENDS, run_histogram
from tests.ops.swiglu_stats.cases import DTYPES, strided

pytestmark = quiet


def zeros(groups: int, width: int, bins: int) -> torch.Tensor:
    return torch.zeros(groups, width, bins, dtype=torch.int64)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 70), (1, 1), (129, 33), (0, 8), (3, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_are_those_of_searchsorted(
    backend: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """At every site, groups of neighbours and in any order, with bins of the same values."""
    gate, up = wild(*shape, dtype, 1), wild(*shape, dtype, 5)
    mixed = integers(-1, 3, shape[0])
    for ids, site in zip((mixed, mixed.sort().values) * 2, SITES, strict=True):
        value = site_values(gate, up, "silu", (site,))[site]
        edges = histogram_edges(*site_range(gate, up, site=site), 16)
        before = integers(0, 9, 3, shape[1], 16).long()
        counts = run_histogram(backend, gate, up, ids, before, *edges, site=site)
        assert_same_bits(counts - before, brute_histogram(value, ids, 3, 16, *edges))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_patterns_and_every_step(backend: str, dtype: torch.dtype) -> None:
    """Subnormal steps and huge ones, bins far from 0; a tiny negative value is below 0."""
    gate = all_patterns(dtype).view(1024, 64)
    exponent = torch.tensor([-126, -125, -30, -3, 0, 1, 100, 126], dtype=torch.int32).repeat(8)
    first = torch.tensor([-4, 0, -1, 1 - 2**24, 2**24 - 1, 3, -300, 100]).int()
    first = first.repeat_interleave(8)
    ids = torch.zeros(1024, dtype=torch.int32)
    expected = brute_histogram(gate, ids, 1, 7, exponent, first)
    counts = run_histogram(backend, gate, None, None, zeros(1, 64, 7), exponent, first, site="gate")
    assert_same_bits(counts, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_values_at_the_edges(backend: str) -> None:
    """Each edge is in the bin that it begins, and its neighbour below in the one before."""
    e, first = -7, 2**23 - 3
    edges = torch.ldexp(torch.arange(9.0, dtype=torch.float64) + first, torch.tensor(e)).float()
    below = edges.nextafter(torch.tensor(-torch.inf))
    gate = torch.stack([edges, below]).reshape(-1, 1)
    args = (zeros(1, 1, 8), int32(e), int32(first))
    counts = run_histogram(backend, gate, None, None, *args, site="gate")
    expected = brute_histogram(gate, torch.zeros(18), 1, 8, *args[1:])
    assert_same_bits(counts, expected)
    assert counts.flatten().tolist() == [3, *[2] * 6, 3]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_activation(backend: str, activation: str) -> None:
    for dtype in DTYPES:
        gate = wild(20, 40, dtype, 2)
        value = site_values(gate, None, activation, ("act",))["act"]
        edges = histogram_edges(*site_range(gate, activation=activation), 8)
        expected = brute_histogram(value, torch.zeros(20), 1, 8, *edges)
        counts = run_histogram(
            backend, gate, None, None, zeros(1, 40, 8), *edges, activation=activation
        )
        assert_same_bits(counts, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_groups_and_bins(backend: str) -> None:
    """More groups and bins than stay at hand."""
    gate, ids = normal(300, 20, dtype=torch.float32), integers(-1, 70, 300)
    edges = histogram_edges(*site_range(gate, site="gate"), 4096)
    counts = run_histogram(backend, gate, None, ids, zeros(70, 20, 4096), *edges, site="gate")
    assert_same_bits(counts, brute_histogram(gate, ids, 70, 4096, *edges))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_larger_tensors(backend: str) -> None:
    for dtype in DTYPES:
        gate, up = strided(21, 77, dtype, 1, 3), strided(21, 77, dtype, 2, 40)
        value = site_values(gate, up, "silu", ("product",))["product"]
        edges = histogram_edges(*site_range(gate, up, site="product"), 8)
        expected = brute_histogram(value, torch.zeros(21), 1, 8, *edges)
        counts = run_histogram(backend, gate, up, None, zeros(1, 77, 8), *edges, site="product")
        assert_same_bits(counts, expected)


@pytest.mark.parametrize("bins", [1, 64, 1000])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpu")])
def test_any_number_of_threads_and_columns(backend: str, bins: int) -> None:
    gate, ids = wild(70, 1100, torch.bfloat16, 4), integers(-1, 2, 70)
    exponent = torch.full((1100,), -4, dtype=torch.int32)
    args = (gate, None, ids, zeros(2, 1100, bins), exponent, exponent)
    expected = run_histogram("reference", *args)
    for n_threads in (1, 3):
        assert_same_bits(run_histogram(backend, *args, n_threads=n_threads), expected)


# --- edges -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [8, 10, 64, 4096])
def test_edges_cover_the_range_with_half_of_the_bins_or_more(bins: int) -> None:
    """By fractions, of ranges of every size; the step is the smallest that does."""
    generator = torch.Generator().manual_seed(bins)
    size = torch.randint(-149, 127, (2, 3000), generator=generator)
    ends = torch.ldexp(torch.randn(2, 3000, generator=generator).clamp(-1.9, 1.9), size)
    ends = torch.cat(
        [ends, torch.tensor([[-3.4028235e38, 0.0, 1.0], [3.4028235e38, 3e38, 1.5]])], 1
    )
    a, b = ends.sort(0).values
    exponent, first = histogram_edges(a, b, bins)
    assert exponent.dtype == first.dtype == torch.int32
    for low, high, e, start in zip(
        a.tolist(), b.tolist(), exponent.tolist(), first.tolist(), strict=True
    ):
        step = Fraction(2) ** e
        lowest, highest = Fraction(low) // step, Fraction(high) // step
        used = highest - lowest + 1
        assert start <= lowest and highest < start + bins and abs(start) < 2**24
        assert lowest - start == (bins - used) // 2
        magnitude = max(abs(low), abs(high))
        is_finest = e == -126 or step * 2**23 > Fraction(magnitude) / 2 >= step * 2**21
        smaller = step / 2
        fits = Fraction(high) // smaller - Fraction(low) // smaller + 1 <= bins
        assert (2 * used >= bins and not fits) or is_finest, (low, high, e)


def test_edges_of_what_does_not_vary() -> None:
    """Twice the value, [-1, 1], or all of float32: never bins without a width."""
    infinity = torch.inf
    smallest = torch.tensor([3.0, -3.0, 0.0, infinity, torch.nan, -infinity, 3e38])
    largest = torch.tensor([3.0, -3.0, 0.0, -infinity, 1.0, infinity, 3e38])
    exponent, first = histogram_edges(smallest, largest, 16)
    begin = torch.ldexp(first.double(), exponent)
    end = torch.ldexp(first.double() + 16, exponent)
    low = torch.tensor([0, -6, -1, -1, -1, -3.4028234e38, 0])
    high = torch.tensor([6, 0, 1, 1, 1, 3.4028234e38, 3.4028234e38])
    assert (begin <= low).all() and (end > high).all()
    assert ((end - begin) <= 4 * (high.double() - low.double())).all()


def test_ranges_are_of_finite_values() -> None:
    gate = torch.tensor([[1.0, torch.nan, -0.0, torch.inf], [-2.0, -torch.inf, -0.0, 4.0]])
    smallest, largest = site_range(gate, site="gate")
    assert smallest.tolist() == [-2.0, torch.inf, 0.0, 4.0]
    assert largest.tolist() == [1.0, -torch.inf, 0.0, 4.0]
    value = site_values(gate, gate, "gelu", ("product",))["product"]
    smallest, largest = site_range(gate, gate, activation="gelu", site="product")
    assert smallest[0] == value[:, 0].min() and largest[0] == value[:, 0].max()
    assert site_range(gate[:0])[0].tolist() == [torch.inf] * 4


def test_mistakes_have_their_message_and_nothing_is_written() -> None:
    gate, counts = torch.zeros(3, 4), zeros(2, 4, 8)
    exponent, first, ids = int32(0, 0, 0, 0), int32(0, 0, 0, 0), int32(0, 1, 1)
    for message, changes in (
        ("site must be one of", {"site": "h"}),
        (r"counts must be \(G, F, B\) int64 with F=4 .from gate., G >= 1", {"counts": counts[0]}),
        ("counts must be .G, F, B. int64 with G=2, F=4, B=8", {"counts": counts.int()}),
        ("counts must be contiguous", {"counts": zeros(2, 4, 16)[..., ::2]}),
        ("exponent must be .F,. int32 with F=4", {"exponent": exponent[:3]}),
        (
            r"exponent must be in \[-126, 127\) .2\^-exponent is a float32., got 127 at 1",
            {"exponent": int32(0, 127, 0, 0)},
        ),
        (r"first must be in .* got 16777216 at 3", {"first": int32(0, 0, 0, 2**24)}),
        ("group_ids must be .* when counts has G=2, got None", {"group_ids": None}),
        (r"group_ids must be in \[-1, 2\) .G=2 from counts., got 2 at 0", {"group_ids": ids + 2}),
        (
            "counts must not share memory with exponent",
            {"exponent": counts.view(torch.int32).flatten()[:4]},
        ),
    ):
        given = {"counts": counts, "exponent": exponent, "first": first, "group_ids": ids} | changes
        with pytest.raises(ValueError, match=f"^histogram: {message}"):
            histogram(gate, **given)  # type: ignore[arg-type]
    assert not counts.any()
    for bins in (7, 9, 4098, 16.0, True):
        with pytest.raises(ValueError, match="^histogram_edges: bins must be an even number in"):
            histogram_edges(gate[0], gate[0], bins)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^histogram_edges: largest must be .F,. float32"):
        histogram_edges(gate[0], gate[0].double(), 8)
    with pytest.raises(ValueError, match="^site_range: site must be one of"):
        site_range(gate, site="up")
