"""Compact implementations of peaks, merge_peaks and histogram with a fault to choose.

`PEAKS`, `MERGE` and `HISTOGRAM` name each fault and the check that must find it; without one they
are right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from relneuron.ops import BestPeaks
from relneuron.ops.swiglu_stats import reference
from relneuron.ops.swiglu_stats.reference import ieee_arithmetic

# fault -> the check of relneuron.testing that finds it
PEAKS = {
    "the smallest value": "a_peak_is_the_largest_value_of_its_segment",
    "the largest magnitude": "a_peak_is_the_largest_value_of_its_segment",
    "up is not read": "a_peak_is_the_largest_value_of_its_segment",
    "every activation is silu": "a_peak_is_the_largest_value_of_its_segment",
    "a run of one id is a segment": "rows_of_a_segment_may_lie_anywhere",
    "-1 is the last segment": "rows_of_a_segment_may_lie_anywhere",
    "of equal values the last": "of_equal_values_the_first_row_counts",
    "-0 is below +0": "of_equal_values_the_first_row_counts",
    "-0 stays": "of_equal_values_the_first_row_counts",
    "act is not rounded": "values_are_compared_as_they_are_rounded",
    "NaN is the largest": "nan_is_no_value_and_infinities_are",
    "-inf is no value": "nan_is_no_value_and_infinities_are",
    "+inf is no value": "nan_is_no_value_and_infinities_are",
    "peaks begin anew": "peaks_join_what_is_there",
    "first_row is forgotten": "peaks_join_what_is_there",
    "what is there wins ties": "peaks_join_what_is_there",
    "the last columns are missed": "peaks_of_any_shape_are_found",
    "no rows are an error": "peaks_of_any_shape_are_found",
    "up must be there": "peaks_need_no_up",
    "strides are ignored": "rows_of_peaks_may_be_strided",
    "subnormal peaks are flushed": "subnormal_peaks_are_found",
    "ids are not looked at": "segments_out_of_range_are_refused",
    "ids are looked at too late": "segments_out_of_range_are_refused",
}
MERGE = {
    "the smallest are kept": "the_best_stand_in_their_order",
    "numbers do not count": "the_best_stand_in_their_order",
    "positions do not count": "the_best_stand_in_their_order",
    "numbers have 32 bits": "the_best_stand_in_their_order",
    "best begins anew": "the_best_stand_in_their_order",
    "groups are mixed": "the_best_stand_in_their_order",
    "ties go by the order": "segments_may_come_in_any_order",
    "one peak a group and call": "segments_may_come_in_any_order",
    "NaN is kept": "what_is_no_peak_is_not_kept",
    "what has no position is kept": "what_is_no_peak_is_not_kept",
    "-0 stays": "what_is_no_peak_is_not_kept",
    "no segments are an error": "no_segments_change_nothing",
    "values are sorted in place": "no_segments_change_nothing",
    "subnormal peaks are flushed": "subnormal_peaks_keep_their_order",
    "ids are not looked at": "groups_of_peaks_out_of_range_are_refused",
}
HISTOGRAM = {
    "all have the bins of the first": "values_are_counted_between_their_edges",
    "-1 is the last group": "values_are_counted_between_their_edges",
    "up is not read": "values_are_counted_between_their_edges",
    "every activation is silu": "values_are_counted_between_their_edges",
    "an edge ends a bin": "an_edge_belongs_to_the_bin_that_it_begins",
    "bins are truncated": "an_edge_belongs_to_the_bin_that_it_begins",
    "a product is flushed": "an_edge_belongs_to_the_bin_that_it_begins",
    "what is outside is dropped": "what_is_outside_is_in_the_end_bins",
    "NaN is in bin 0": "what_is_outside_is_in_the_end_bins",
    "infinities are dropped": "what_is_outside_is_in_the_end_bins",
    "counts begin anew": "counts_are_added_to_what_is_there",
    "counts have 32 bits": "counts_are_added_to_what_is_there",
    "the last columns are missed": "histograms_of_any_shape_are_whole",
    "no rows are an error": "histograms_of_any_shape_are_whole",
    "up must be there": "histograms_need_no_up",
    "strides are ignored": "rows_of_histograms_may_be_strided",
    "bins are not looked at": "bins_out_of_range_are_refused",
    "ids are not looked at": "bins_out_of_range_are_refused",
}


def site_values(
    fault: str | None, gate: Tensor, up: Tensor | None, activation: str, site: str
) -> Tensor:
    """The values of a site as float32."""
    if fault == "up must be there" and up is None:
        raise TypeError("no up")
    if fault == "no rows are an error" and len(gate) == 0:
        raise RuntimeError("nothing to launch")
    if fault == "strides are ignored":
        gate = gate.as_strided(gate.shape, (gate.shape[1], 1))
    if fault == "up is not read" and site in ("up", "product"):
        site = "gate" if site == "up" else "act"
    if fault == "every activation is silu":
        activation = "silu"
    if fault == "act is not rounded" and site == "act":
        return reference._activation(gate.float(), activation)
    return reference.site_values(gate, up, activation, (site,))[site]


def refuse(fault: str | None, ids: Tensor, n: int) -> bool:
    """Whether an id is wrong, where it is not refused."""
    is_wrong = bool(((ids < -1) | (ids >= n)).any())
    if is_wrong and fault not in ("ids are not looked at", "ids are looked at too late"):
        raise ValueError("an id is out of range")
    return is_wrong


def peaks_with(
    fault: str | None,
    gate: Tensor,
    up: Tensor | None,
    *,
    activation: str,
    site: str,
    values: Tensor,
    positions: Tensor,
    segment_ids: Tensor,
    first_row: int = 0,
) -> None:
    """The op row after row, right but for `fault`."""
    assert fault is None or fault in PEAKS, fault
    is_wrong = refuse(fault, segment_ids, len(values))
    if fault == "peaks begin anew":
        values.fill_(-math.inf), positions.fill_(-1)
    if fault == "first_row is forgotten":
        first_row = 0
    with ieee_arithmetic():
        value = site_values(fault, gate, up, activation, site)
        if fault == "subnormal peaks are flushed":
            value = torch.where(value.abs() < 2.0**-126, 0.0, value)
        if fault == "NaN is the largest":
            value = torch.where(value.isnan(), math.inf, value)
        if fault == "the smallest value":
            value = -value
        previous = None
        for t, segment in enumerate(segment_ids.tolist()):
            if fault == "a run of one id is a segment" and segment != previous and segment >= 0:
                values[segment], positions[segment] = -math.inf, -1
            previous = segment
            if segment < 0 and fault != "-1 is the last segment":
                continue
            join(fault, values[segment], positions[segment], value[t], first_row + t)
    if fault == "ids are looked at too late" and is_wrong:
        raise ValueError("an id is out of range")


def join(fault: str | None, values: Tensor, positions: Tensor, row: Tensor, t: int) -> None:
    old, new = values, row
    if fault == "the largest magnitude":
        old, new = values.abs().where(positions >= 0, -math.inf), row.abs()
    is_tie = (new == old) & ((positions < 0) | (t < positions))
    if fault == "of equal values the last":
        is_tie = new == old
    if fault == "what is there wins ties":
        is_tie = (new == old) & (positions < 0)
    if fault == "-inf is no value":
        is_tie &= row > -math.inf
    if fault == "-0 is below +0":
        is_tie |= (new == 0) & (old == 0) & old.signbit() & ~new.signbit()
    is_better = (new > old) | is_tie
    if fault == "+inf is no value":
        is_better &= row < math.inf
    if fault == "the last columns are missed":
        is_better[len(is_better) // 8 * 8 :] = False
    kept = row if fault in ("-0 stays", "-0 is below +0") else row + 0.0
    torch.where(is_better, kept, values, out=values)
    positions[is_better] = t


def merge_peaks_with(
    fault: str | None,
    values: Tensor,
    positions: Tensor,
    *,
    best: BestPeaks,
    numbers: Tensor,
    group_ids: Tensor,
) -> None:
    """The op list after list, right but for `fault`."""
    assert fault is None or fault in MERGE, fault
    groups, width, k = best.value.shape
    refuse(fault, group_ids, groups)
    if bool((numbers < 0).any()) and fault != "ids are not looked at":
        raise ValueError("a number is below 0")
    if fault == "no segments are an error" and len(values) == 0:
        raise RuntimeError("nothing to launch")
    if fault == "values are sorted in place" and len(values):
        values.copy_(values.sort(0).values)
    if fault == "numbers have 32 bits":
        numbers = numbers.int().long()
    if fault == "best begins anew":
        best.value.fill_(-math.inf), best.number.fill_(-1), best.position.fill_(-1)
    for group in range(groups):
        rows = (group_ids >= 0) if fault == "groups are mixed" else group_ids == group
        for f in range(width):
            lists = (best.value, best.number, best.position)
            with ieee_arithmetic():
                old = zip(*(part[group, f].tolist() for part in lists), strict=True)
                new = zip(
                    values[rows, f].tolist(),
                    numbers[rows].tolist(),
                    positions[rows, f].tolist(),
                    strict=True,
                )
                own = best_of(fault, [peak for peak in old if peak[2] >= 0], list(new), k)
                for i, parts in enumerate(own):
                    for part, x in zip(lists, parts, strict=True):
                        part[group, f, i] = x


Peak = tuple[float, int, int]


def best_of(fault: str | None, old: list[Peak], new: list[Peak], k: int) -> list[Peak]:
    is_kept = {"what has no position is kept": lambda p: True}.get(fault or "", lambda p: p[2] >= 0)
    new = [p for p in new if is_kept(p)]
    if fault == "NaN is kept":
        new = [(math.inf if math.isnan(v) else v, n, p) for v, n, p in new]
    new = [p for p in new if not math.isnan(p[0])]
    if fault == "subnormal peaks are flushed":
        new = [(0.0 if abs(v) < 2.0**-126 else v, n, p) for v, n, p in new]
    if fault != "-0 stays":
        new = [(v + 0.0, n, p) for v, n, p in new]
    if fault == "one peak a group and call":
        new = sorted(new, key=lambda p: (-p[0], p[1], p[2]))[:1]
    sign = 1 if fault == "the smallest are kept" else -1
    keys = {
        "numbers do not count": lambda p: (sign * p[0], p[2]),
        "positions do not count": lambda p: (sign * p[0], p[1], -p[2]),
        "ties go by the order": lambda p: sign * p[0],
    }
    return sorted(old + new, key=keys.get(fault or "", lambda p: (sign * p[0], p[1], p[2])))[:k]


def histogram_with(
    fault: str | None,
    gate: Tensor,
    up: Tensor | None,
    *,
    activation: str,
    site: str,
    counts: Tensor,
    exponent: Tensor,
    first: Tensor,
    group_ids: Tensor,
) -> None:
    """The op column after column, right but for `fault`."""
    assert fault is None or fault in HISTOGRAM, fault
    groups, width, bins = counts.shape
    refuse(fault, group_ids, groups)
    is_far = (exponent.abs() > 126).any() | (first.abs() >= 2**24).any()
    if bool(is_far) and fault != "bins are not looked at":
        raise ValueError("a bin is out of range")
    if fault == "-1 is the last group":
        group_ids = torch.where(group_ids < 0, groups - 1, group_ids)
    if fault == "counts begin anew":
        counts.zero_()
    with ieee_arithmetic():
        value = site_values(fault, gate, up, activation, site).double()
    for f in range(width):
        own = 0 if fault == "all have the bins of the first" else f
        place = torch.ldexp(value[:, f], -exponent[own])
        if fault == "a product is flushed":
            place = place.float().double()
        whole = place.trunc() if fault == "bins are truncated" else place.floor()
        if fault == "an edge ends a bin":
            whole = place.ceil() - 1
        whole = whole - int(first[own])
        is_in = ~value[:, f].isnan() & (group_ids >= 0)
        if fault == "NaN is in bin 0":
            is_in = group_ids >= 0
        if fault == "what is outside is dropped":
            is_in &= (whole >= 0) & (whole < bins)
        if fault == "infinities are dropped":
            is_in &= value[:, f].isfinite()
        if fault == "the last columns are missed" and f >= width // 8 * 8:
            continue
        cell = group_ids.long() * bins + whole.nan_to_num(0.0).clamp(0, bins - 1).long()
        added = torch.bincount(cell[is_in], minlength=groups * bins).view(groups, -1)[:, :bins]
        counts[:, f] += added
    if fault == "counts have 32 bits":
        counts.copy_(counts.int())
