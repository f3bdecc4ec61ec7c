"""The checks of `check_backend` about peaks and merge_peaks: where neurons are largest.

Each function is one promise of the contract, named in its docstring; `contract.py` runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from relneuron.ops import BestPeaks
from relneuron.ops.swiglu_stats.reference import site_values
from relneuron.testing.accuracy import assert_same_bits
from relneuron.testing.checks_h import SHAPES, gaps, pair
from relneuron.testing.contract import Subject, check
from relneuron.testing.oracle import integers, normal
from relneuron.testing.oracle_peaks import (
    Peaks,
    Segments,
    brute_best,
    brute_peaks,
    no_peaks,
    some_peaks,
    wild,
)

PEAKS, MERGE = "peaks", "merge_peaks"

# --- peaks -----------------------------------------------------------------------------------


def find(
    subject: Subject,
    gate: Tensor,
    up: Tensor | None,
    ids: Tensor,
    before: Peaks | None = None,
    first_row: int = 0,
    **options: Any,
) -> Peaks:
    """One call whose peaks are compared with the definition, bit by bit."""
    assert gate.numel() <= subject.elements, "a check says how large its calls are"
    given: dict[str, Any] = {"activation": subject.claims.activations[0], "site": "gate"}
    given |= options
    given["site"] = given["site"] if given["site"] in subject.claims.sites else "act"
    before = before or no_peaks(4, gate.shape[1])
    start = {"values": before[0], "positions": before[1]}
    found: Peaks = subject.call(
        gate=gate, up=up, **given, **start, segment_ids=ids, first_row=first_row
    )
    value = site_values(gate, up, given["activation"], (given["site"],))[given["site"]]
    wanted = brute_peaks(value, ids, before, first_row)
    assert_same_bits(found[0], wanted[0], "values (segment, neuron)")
    assert_same_bits(found[1], wanted[1], "positions (segment, neuron)")
    return found


@check(op=PEAKS)
def a_peak_is_the_largest_value_of_its_segment(subject: Subject) -> None:
    """Every segment has the largest value of its own rows, at every site, and where it is."""
    for dtype in subject.claims.dtypes:
        gate, up = pair(40, 50, dtype)
        ids = integers(-1, 4, 40).sort().values
        for activation in subject.claims.activations:
            for site in subject.claims.sites:
                find(subject, gate, up, ids, activation=activation, site=site)


@check(op=PEAKS)
def rows_of_a_segment_may_lie_anywhere(subject: Subject) -> None:
    """In any order, and rows of segment -1 are in none; a segment without rows has no peak."""
    gate, up = pair(40, 30, subject.claims.dtypes[0])
    mixed = integers(-1, 3, 40)
    for ids in (mixed, mixed.sort(descending=True).values, torch.full_like(mixed, -1)):
        find(subject, gate, up, ids)


@check(op=PEAKS)
def of_equal_values_the_first_row_counts(subject: Subject) -> None:
    """Of equal values the lowest row is the peak's, +0 and -0 are equal, and recorded as +0."""
    for dtype in subject.claims.dtypes:
        gate = integers(-1, 1, 40, 50).to(dtype)
        gate[1::2][gate[1::2] == 0] = -0.0
        gate[:, ::3] += 1.0
        find(subject, gate, gate, integers(-1, 4, 40))


@check("half", op=PEAKS)
def values_are_compared_as_they_are_rounded(subject: Subject) -> None:
    """Two gates whose act is one number of the dtype are a tie."""
    for dtype in subject.claims.half_dtypes:
        for activation in subject.claims.activations:
            step = torch.finfo(dtype).eps
            gate = (-0.6 + torch.arange(64.0)[:, None] * step + torch.arange(20.0) / 9).to(dtype)
            for rows in (gate, gate.flip(0)):
                ids = (torch.arange(64) % 4).int()
                find(subject, rows.clone(), gate, ids, activation=activation, site="act")


@check(op=PEAKS)
def nan_is_no_value_and_infinities_are(subject: Subject) -> None:
    """NaN is never a peak; a column of -inf has its first row, one of NaN none."""
    for dtype in subject.claims.dtypes:
        for site in subject.claims.sites:
            gate, up = wild(30, 40, dtype, 1), wild(30, 40, dtype, 5)
            find(subject, gate, up, integers(-1, 4, 30), site=site)


@check(op=PEAKS)
def peaks_join_what_is_there(subject: Subject) -> None:
    """Rows in several calls, in any order, with the numbers of their rows, give those of one."""
    gate, up = wild(60, 20, subject.claims.dtypes[0], 9), wild(60, 20, subject.claims.dtypes[0], 3)
    ids, before = integers(-1, 4, 60), None
    for start in (20, 40, 0):
        rows = slice(start, start + 20)
        before = find(subject, gate[rows], up[rows], ids[rows], before, 100 + start)


@check(op=PEAKS)
def peaks_of_any_shape_are_found(subject: Subject) -> None:
    """No row and column is left out, also where no tile fits, and nothing is nothing."""
    dtypes = subject.claims.dtypes
    for index, shape in enumerate((*SHAPES, (0, 5), (5, 0))):
        gate, up = pair(*shape, dtypes[index % len(dtypes)], seed=index)
        gate[-1:, -1:] = 100.0
        find(subject, gate, up, torch.zeros(shape[0], dtype=torch.int32))


@check("ungated", op=PEAKS)
def peaks_need_no_up(subject: Subject) -> None:
    """Without up the sites are gate and act."""
    gate, _ = pair(20, 30, subject.claims.dtypes[0])
    for site in {"gate", "act"} & set(subject.claims.sites):
        find(subject, gate, None, integers(-1, 4, 20), site=site)


@check("strides", op=PEAKS)
def rows_of_peaks_may_be_strided(subject: Subject) -> None:
    """gate and up may have gaps between their rows; all of it stays as it is."""
    for dtype in subject.claims.dtypes:
        gate = normal(21, 88, dtype=dtype)[:, :77]
        up = normal(21, 88, dtype=dtype, seed=1)[:, 11:]
        find(subject, gate, up, integers(-1, 4, 21), site=subject.claims.sites[-1])
        assert_same_bits(subject.last_inputs["gate"], gate, "gate after the call")
        assert_same_bits(gaps(subject.last_inputs["gate"], 77), gaps(gate, 77), "the gaps")


@check("flush_to_zero", op=PEAKS)
def subnormal_peaks_are_found(subject: Subject) -> None:
    """Values below the smallest normal number differ, also where the processor flushes them."""
    if torch.float32 not in subject.claims.dtypes or not torch.set_flush_denormal(True):
        return
    try:
        gate = torch.tensor([1, 3, 2], dtype=torch.int32).view(torch.float32)[:, None].clone()
        ids, site = torch.zeros(3, dtype=torch.int32), subject.claims.sites[0]
        start = no_peaks(1, 1)
        found = subject.call(
            gate=gate,
            up=torch.ones(3, 1),
            activation=subject.claims.activations[0],
            site=site,
            values=start[0],
            positions=start[1],
            segment_ids=ids,
        )
    finally:
        torch.set_flush_denormal(False)
    if site == "gate":
        assert found[0].view(torch.int32).tolist() == [[3]], "the value is flushed"
        assert found[1].tolist() == [[1]], f"the position is {found[1].tolist()}"


@check("errors", op=PEAKS)
def segments_out_of_range_are_refused(subject: Subject) -> None:
    """An id outside its range raises a ValueError, and nothing has been written by then."""
    gate, up = pair(6, 40, subject.claims.dtypes[0])
    for bad in (-2, 4):
        ids = integers(-1, 4, 6)
        ids[4] = bad
        assert_refused(subject, partial(find, subject, gate, up, ids), "values", -math.inf)


# --- merge_peaks -----------------------------------------------------------------------------


def merge(subject: Subject, best: BestPeaks, segments: Segments) -> BestPeaks:
    """The best after a call."""
    assert segments[0].numel() <= subject.elements, "a check says how large its calls are"
    names = ("values", "positions", "numbers", "group_ids")
    found: BestPeaks = subject.call(**dict(zip(names, segments, strict=True)), best=best)
    return found


def assert_best(found: BestPeaks, wanted: BestPeaks) -> None:
    """Bit by bit."""
    for name, tensor in vars(wanted).items():
        assert_same_bits(getattr(found, name), tensor, f"{name} (group, neuron, place)")


@check(op=MERGE)
def the_best_stand_in_their_order(subject: Subject) -> None:
    """Larger values first, then lower numbers, then lower positions; of no peak last."""
    for k in (1, 4, 16):
        calls = [some_peaks(n, 30, seed) for seed, n in enumerate((1, 40, 7))]
        best = BestPeaks.none(3, 30, k)
        for i, call in enumerate(calls):
            best = merge(subject, best, call)
            assert_best(best, brute_best(calls[: i + 1], 3, 30, k))


@check(op=MERGE)
def segments_may_come_in_any_order(subject: Subject) -> None:
    """In one call or several, with the same bits."""
    segments, order = some_peaks(30, 20, 1), torch.randperm(30)
    wanted = brute_best([segments], 3, 20, 5)
    best = BestPeaks.none(3, 20, 5)
    for rows in (order[:7], order[7:]):
        best = merge(subject, best, tuple(part[rows] for part in segments))  # type: ignore[arg-type]
    assert_best(best, wanted)


@check(op=MERGE)
def what_is_no_peak_is_not_kept(subject: Subject) -> None:
    """NaN is not, nor what has no position; -0 is +0."""
    values = torch.tensor([[torch.nan, 7.0, -0.0, -torch.inf], [1.0, -torch.inf, 0.0, torch.nan]])
    positions = torch.tensor([[3, -1, 5, 0], [2, 0, 4, -1]], dtype=torch.int32)
    ids = torch.zeros(2, dtype=torch.int32)
    segments = (values, positions, torch.tensor([8, 9]), ids)
    best = merge(subject, BestPeaks.none(1, 4, 3), segments)
    assert_best(best, brute_best([segments], 1, 4, 3))


@check(op=MERGE)
def no_segments_change_nothing(subject: Subject) -> None:
    """Nor does a width of 0; what is given stays as it is."""
    before = merge(subject, BestPeaks.none(3, 20, 4), some_peaks(9, 20, 1))
    assert_best(merge(subject, before, some_peaks(0, 20, 1)), before)
    merge(subject, BestPeaks.none(3, 0, 4), some_peaks(5, 0, 1))
    segments = some_peaks(9, 20, 2)
    merge(subject, before, segments)
    for name, part in zip(("values", "positions", "numbers"), segments, strict=False):
        assert_same_bits(subject.last_inputs[name], part, f"{name} after the call")


@check("flush_to_zero", op=MERGE)
def subnormal_peaks_keep_their_order(subject: Subject) -> None:
    """Values below the smallest normal number differ, also where the processor flushes them."""
    values = torch.tensor([[1], [3], [0]], dtype=torch.int32).view(torch.float32)
    segments = (
        values,
        torch.zeros(3, 1, dtype=torch.int32),
        torch.arange(3),
        torch.zeros(3, dtype=torch.int32),
    )
    if not torch.set_flush_denormal(True):
        return
    try:
        best = merge(subject, BestPeaks.none(1, 1, 3), segments)
    finally:
        torch.set_flush_denormal(False)
    assert best.number.tolist() == [[[1, 0, 2]]], f"the order is {best.number.tolist()}"
    assert best.value.view(torch.int32).tolist() == [[[3, 1, 0]]], "values are flushed"


@check("errors", op=MERGE)
def groups_of_peaks_out_of_range_are_refused(subject: Subject) -> None:
    """So is a number below 0, which stands for no segment."""
    best = BestPeaks.none(3, 20, 4)
    for place, bad in ((3, -2), (3, 3), (2, -1)):
        segments = tuple(part.clone() for part in some_peaks(6, 20, 1))
        segments[place][4] = bad
        try:
            merge(subject, best, segments)  # type: ignore[arg-type]
        except ValueError:
            continue
        raise AssertionError(f"{bad} was taken")


def assert_refused(subject: Subject, call: Callable[[], object], name: str, start: float) -> None:
    """A ValueError, and what would have been written is as it was."""
    try:
        call()
    except ValueError:
        written = subject.last_written[name]
        assert bool((written == start).all()), f"{name} was written before the call was refused"
        return
    raise AssertionError("it was taken")
