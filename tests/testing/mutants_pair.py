"""A compact implementation of pair_stats with a fault to choose.

`PAIR` names each fault and the check that must find it; without one it is right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relneuron.ops import GroupStats
from relneuron.ops.swiglu_stats.reference import ieee_arithmetic

# fault -> the check of relneuron.testing that finds it
PAIR = {
    "b - a": "pairs_are_counted_per_group",
    "-1 is the last group": "pairs_are_counted_per_group",
    "neighbours are in one group": "pairs_are_counted_per_group",
    "a stands for b": "pairs_are_counted_per_group",
    "the difference is in the dtype": "a_difference_is_not_rounded_to_the_dtype",
    "active is greater or equal": "a_pair_is_active_above_the_threshold",
    "the threshold is of a alone": "a_pair_is_active_above_the_threshold",
    "squares are made of moments": "small_differences_of_large_values_keep_their_squares",
    "sums are bfloat16": "moments_of_pairs_are_accurate",
    "the maximum is of magnitudes": "moments_of_pairs_are_accurate",
    "the sum is of magnitudes": "moments_of_pairs_are_accurate",
    "equal infinities do not differ": "nonfinite_pairs_are_counted_and_in_no_moment",
    "infinities are in the sums": "nonfinite_pairs_are_counted_and_in_no_moment",
    "where one is NaN neither counts": "nonfinite_pairs_are_counted_and_in_no_moment",
    "statistics begin anew": "pairs_add_to_what_is_there",
    "the last columns are missed": "pairs_of_any_shape_are_counted",
    "no tokens are an error": "pairs_of_any_shape_are_counted",
    "strides are ignored": "pairs_may_be_strided",
    "subnormal differences are flushed": "subnormal_differences_count",
    "the difference is in place": "pairs_stay_as_they_are",
    "ids are not looked at": "groups_of_pairs_out_of_range_are_refused",
    "ids are looked at too late": "groups_of_pairs_out_of_range_are_refused",
}


def pair_stats_with(
    fault: str | None, a: Tensor, b: Tensor, *, stats: GroupStats, group_ids: Tensor
) -> None:
    """The op group after group, right but for `fault`."""
    assert fault is None or fault in PAIR, fault
    is_wrong = bool(((group_ids < -1) | (group_ids >= stats.groups)).any())
    if is_wrong and fault not in ("ids are not looked at", "ids are looked at too late"):
        raise ValueError("an id is out of range")
    if fault == "no tokens are an error" and len(a) == 0:
        raise RuntimeError("nothing to launch")
    if fault == "strides are ignored":
        a = a.as_strided(a.shape, (a.shape[1], 1))
    if fault == "neighbours are in one group":
        group_ids = group_ids[torch.arange(len(group_ids)) // 2 * 2]
    if fault == "-1 is the last group":
        group_ids = torch.where(group_ids < 0, stats.groups - 1, group_ids)
    if fault == "statistics begin anew":
        stats.tokens.zero_(), stats._count.zero_()
    with ieee_arithmetic():
        values = site_values(fault, a, b)
        for group in range(stats.groups):
            rows = group_ids == group
            stats.tokens[group] += int(rows.sum())
            for site in stats.sites:
                add(fault, site, {name: x[rows] for name, x in values.items()}, stats, group)
    if fault == "ids are looked at too late" and is_wrong:
        raise ValueError("an id is out of range")


def site_values(fault: str | None, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    wide, other = a.float(), b.float()
    difference = other - wide if fault == "b - a" else wide - other
    if fault == "the difference is in the dtype":
        difference = (a - b).float()
    if fault == "the difference is in place":
        wide = wide.clone()
        a.sub_(b)
    if fault == "equal infinities do not differ":
        difference = torch.where(wide == other, 0.0, difference)
    if fault == "where one is NaN neither counts":
        wide, other = (torch.where(difference.isnan(), torch.nan, x) for x in (wide, other))
    if fault == "subnormal differences are flushed":
        smallest = torch.finfo(torch.float32).smallest_normal
        is_small = (wide.double() - other.double()).abs() < smallest
        difference = torch.where(is_small, 0.0, difference)
    return {"a": wide, "b": wide if fault == "a stands for b" else other, "difference": difference}


def add(
    fault: str | None, site: str, values: dict[str, Tensor], stats: GroupStats, group: int
) -> None:
    x, threshold = values[site].double(), stats.threshold
    if fault == "the threshold is of a alone" and site != "a":
        threshold = 0.0
    is_active = x >= threshold if fault == "active is greater or equal" else x > threshold
    if fault == "the last columns are missed":
        is_active[:, x.shape[1] // 8 * 8 :] = False
    stats.count[site][group] += is_active.sum(0)
    if not stats.moments:
        return
    finite = x.isfinite()
    stats.n_nonfinite[site][group] += (~finite).sum(0)
    kept = x if fault == "infinities are in the sums" else torch.where(finite, x, 0.0)
    square = kept.square().sum(0)
    if fault == "squares are made of moments" and site == "difference":
        one, two = values["a"], values["b"]
        square = (one.square().sum(0) + two.square().sum(0) - 2 * (one * two).sum(0)).double()
    if fault == "sums are bfloat16":
        kept = kept.bfloat16().double()
    total = kept.abs().sum(0) if fault == "the sum is of magnitudes" else kept.sum(0)
    stats.sum[site][group] += total
    stats.sum_sq[site][group] += square
    size = x.abs() if fault == "the maximum is of magnitudes" else x
    low = torch.full((1, x.shape[1]), -torch.inf, dtype=torch.float64)
    highest = torch.cat([low, torch.where(finite, size + 0.0, -torch.inf)]).amax(0)
    own = stats.max[site][group]
    torch.maximum(own, highest.float(), out=own)
