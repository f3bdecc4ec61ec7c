"""The checks of `check_backend` about counts: what is active, and where it is counted.

Each function is one promise of the contract, named in its docstring; `contract.py` runs them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from relneuron.ops import GroupStats
from relneuron.ops.swiglu_stats.reference import site_values
from relneuron.testing.accuracy import assert_same_bits
from relneuron.testing.checks_h import SHAPES, pair, words
from relneuron.testing.contract import Result, Subject, check
from relneuron.testing.oracle import all_patterns, assert_stats, integers, normal, subnormals


def empty_stats(subject: Subject, width: int, **changes: Any) -> GroupStats:
    """New statistics of one group at all the sites that are claimed."""
    options: dict[str, Any] = {"groups": 1, "sites": subject.claims.sites, **changes}
    return GroupStats(width=width, **options)


def record(
    subject: Subject,
    gate: Tensor,
    up: Tensor,
    before: GroupStats,
    ids: Tensor | None = None,
    **arguments: Any,
) -> Result:
    """One call whose statistics are compared with the definition."""
    arguments = {"activation": subject.claims.activations[0], **arguments}
    result = subject.run(gate, up, stats=before, group_ids=ids, **arguments)
    assert_stats(result.stats, before, gate, up, ids, arguments["activation"])
    return result


# --- what is active --------------------------------------------------------------------------


@check("counts", "half", elements=65536)
def counts_of_all_half_patterns(subject: Subject) -> None:
    """All 65,536 numbers of a 16-bit type are classified as in float64, at any threshold."""
    for dtype in subject.claims.half_dtypes:
        gate, up = all_patterns(dtype, seed=1), all_patterns(dtype, seed=2)
        for threshold in (0.0, -0.0, 0.1, -0.17, 1e-7, 65504.0, 1e300, math.inf, -math.inf):
            record(subject, gate, up, empty_stats(subject, 65536, threshold=threshold))
        for activation in subject.claims.activations:
            record(subject, gate, up, empty_stats(subject, 65536), activation=activation)


@check("counts")
def counts_of_float32_patterns(subject: Subject) -> None:
    """Random bit patterns of float32 are classified as in float64, at any threshold."""
    if torch.float32 not in subject.claims.dtypes:
        return
    gate, up = (words(1, 4096, seed=seed).view(torch.float32) for seed in (1, 2))
    gate[0, ::2] = normal(2048, dtype=torch.float32, scale=6.0)
    for threshold in (0.0, 0.1, -0.17, 1e-45, -1e-45, 1e300):
        record(subject, gate, up, empty_stats(subject, 4096, threshold=threshold))
    for activation in subject.claims.activations:
        record(subject, gate, up, empty_stats(subject, 4096), activation=activation)


@check("counts")
def active_is_greater_not_equal(subject: Subject) -> None:
    """A value equal to the threshold is not active."""
    for dtype in subject.claims.dtypes:
        gate, up = pair(5, 40, dtype)
        values = site_values(gate, up, subject.claims.activations[0], subject.claims.sites)
        for site, value in values.items():
            if site not in subject.claims.sites:
                continue
            for threshold in (float(value[0, 0]), float(value.median()), float(value.max())):
                before = empty_stats(subject, 40, sites=[site], threshold=threshold)
                record(subject, gate, up, before)


@check("counts")
def the_threshold_is_not_rounded_to_the_dtype(subject: Subject) -> None:
    """A threshold such as 0.1, which no dtype holds, is compared exactly: not as bfloat16(0.1)."""
    for dtype in subject.claims.dtypes:
        thresholds = [0.1, 0.2, 0.3, -0.1, -0.3, 1 / 3]
        gate = torch.tensor([thresholds], dtype=dtype)
        for threshold in thresholds:
            record(subject, gate, gate.flip(1), empty_stats(subject, 6, threshold=threshold))


@check("counts")
def nan_is_never_active_and_infinity_is(subject: Subject) -> None:
    """NaN is not counted at any threshold, +infinity at every one below it, -infinity never."""
    special = [torch.nan, -torch.nan, torch.inf, -torch.inf, 1.0, -1.0]
    for dtype in subject.claims.dtypes:
        gate = torch.tensor([special, special[::-1]], dtype=dtype)
        for threshold in (0.0, -5.0, -math.inf, math.inf, 1e300):
            record(subject, gate, gate.flip(1), empty_stats(subject, 6, threshold=threshold))


@check("counts")
def subnormal_values_count_and_zeros_do_not(subject: Subject) -> None:
    """A subnormal value is greater than zero, and neither +0 nor -0 is."""
    for dtype in subject.claims.dtypes:
        tiny = [*subnormals(dtype), 0.0, -0.0]
        gate = torch.tensor([[*tiny, *(-value for value in tiny)]], dtype=dtype)
        for threshold in (0.0, -0.0, subnormals(dtype)[0], -subnormals(dtype)[1]):
            record(subject, gate, gate.flip(1), empty_stats(subject, 8, threshold=threshold))


@check("counts", "flush_to_zero", elements=4096)
def flush_to_zero_changes_no_count(subject: Subject) -> None:
    """Subnormal values count also while torch flushes them to zero, and that mode stays on."""
    values = [value for dtype in subject.claims.dtypes for value in subnormals(dtype)]
    gate = torch.tensor([values, values[::-1]], dtype=torch.float32)
    for dtype in subject.claims.dtypes:
        before = empty_stats(subject, gate.shape[1], threshold=0.0)
        # On some processors torch has no such mode.
        if not torch.set_flush_denormal(True):
            return
        try:
            result = subject.run(gate.to(dtype), gate.to(dtype), stats=before)
            kept = float(torch.tensor(1e-38) * 0.1) == 0.0
        finally:
            torch.set_flush_denormal(False)
        assert kept, "torch.set_flush_denormal(True) was switched off by the call"
        narrow = gate.to(dtype)
        assert_stats(result.stats, before, narrow, narrow, None, subject.claims.activations[0])


# --- which token goes where ------------------------------------------------------------------


@check("counts")
def without_ids_all_tokens_are_in_group_zero(subject: Subject) -> None:
    """With one group `group_ids` may be left out, and every token counts."""
    for dtype in subject.claims.dtypes:
        record(subject, *pair(23, 70, dtype), empty_stats(subject, 70))


@check("counts")
def minus_one_is_in_no_group(subject: Subject) -> None:
    """A token of group -1 is counted nowhere: not in the last group, not in `tokens`."""
    gate, up = pair(30, 20, subject.claims.dtypes[0])
    for ids in (integers(-1, 3, 30), torch.full((30,), -1, dtype=torch.int32)):
        record(subject, gate, up, empty_stats(subject, 20, groups=3), ids)


@check("counts")
def groups_may_come_in_any_order(subject: Subject) -> None:
    """Group ids may be sorted, reversed, alternating, in short runs or all different."""
    n_tokens = 150
    gate, up = pair(n_tokens, 10, subject.claims.dtypes[0])
    mixed = integers(-1, 13, n_tokens)
    runs = mixed.repeat_interleave(integers(1, 7, n_tokens, seed=1).long())[:n_tokens]
    ascending = mixed.sort().values
    alternating = torch.arange(n_tokens, dtype=torch.int32) % 2 * 11
    for ids in (mixed, runs, ascending, ascending.flip(0), alternating):
        record(subject, gate, up, empty_stats(subject, 10, groups=13), ids)
    different = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(0)).int()
    record(subject, gate, up, empty_stats(subject, 10, groups=n_tokens + 50), different)


@check("counts")
def every_column_is_counted_in_any_shape(subject: Subject) -> None:
    """No row and column is left out, also where no tile fits."""
    dtypes = subject.claims.dtypes
    for index, shape in enumerate(SHAPES):
        gate, up = pair(*shape, dtypes[index % len(dtypes)], seed=index)
        # Below all values, so that each element counts.
        before = empty_stats(subject, shape[1], groups=2, threshold=-1e6)
        record(subject, gate, up, before, torch.arange(shape[0], dtype=torch.int32) % 2)


@check("counts", "strides")
def strided_rows_are_counted(subject: Subject) -> None:
    """The statistics read the same rows as h does when gate and up are halves of a tensor."""
    for dtype in subject.claims.dtypes:
        packed = normal(21, 170, dtype=dtype)
        ids = integers(-1, 4, 21)
        before = empty_stats(subject, 77, groups=4)
        record(subject, packed[:, 3:80], packed[:, 80:157], before, ids)


@check("counts")
def statistics_add_to_what_is_there(subject: Subject) -> None:
    """A second call adds to the counts and tokens of the first."""
    gate, up = pair(11, 40, subject.claims.dtypes[0])
    before = empty_stats(subject, 40, groups=2)
    for _ in range(3):
        before = record(subject, gate, up, before, integers(-1, 2, 11)).stats


@check("counts")
def any_split_of_the_tokens_counts_the_same(subject: Subject) -> None:
    """Counts and tokens do not depend on how the tokens are cut into calls."""
    gate, up = pair(70, 33, subject.claims.dtypes[0])
    ids = integers(-1, 5, 70)
    whole = record(subject, gate, up, empty_stats(subject, 33, groups=5), ids).stats
    for cuts in ((1, 69), (17, 20, 33), (64, 6)):
        part, start = empty_stats(subject, 33, groups=5), 0
        for length in cuts:
            rows = slice(start, start + length)
            part = subject.run(gate[rows], up[rows], stats=part, group_ids=ids[rows]).stats
            start += length
        assert_same_bits(part.tokens, whole.tokens, f"tokens in calls of {cuts}")
        for site in whole.sites:
            assert_same_bits(part.count[site], whole.count[site], f"count[{site}], {cuts}")


# --- large counters --------------------------------------------------------------------------


@check("counts")
def counters_are_exact_past_2_to_the_31_and_53(subject: Subject) -> None:
    """Counters are 64-bit integers: no wrap at 2^31, no rounding at 2^24 or 2^53."""
    gate = torch.ones(7, 5, dtype=subject.claims.dtypes[0])
    for start in (2**24, 2**31 - 3, 2**32 - 3, 2**53, 2**53 + 1):
        before = empty_stats(subject, 5, moments="moments" in subject.claims.features)
        before.tokens.fill_(start)
        for site in before.sites:
            before.count[site].fill_(start)
            if before.moments:
                before.n_nonfinite[site].fill_(start)
        record(subject, gate, gate, before)


@check("counts", elements=15_000)
def long_groups_are_counted_whole(subject: Subject) -> None:
    """Runs of more than 256 and more than 2,048 tokens of one group lose nothing."""
    lengths = [2100, 1, 300, 5, 260, 1, 40]
    ids = torch.tensor([1, 0, 2, -1, 0, 1, 2], dtype=torch.int32)
    ids = ids.repeat_interleave(torch.tensor(lengths))
    for dtype in subject.claims.dtypes:
        gate, up = pair(len(ids), 5, dtype)
        # Columns that are active in every row and in none.
        gate[:, 0], up[:, 0], gate[:, 1] = 1.0, 1.0, -1.0
        record(subject, gate, up, empty_stats(subject, 5, groups=3), ids)


@check("counts", elements=200_000)
def more_than_65536_tokens_of_one_group(subject: Subject) -> None:
    """A neuron active in 65,613 tokens of one call is counted 65,613 times."""
    for dtype in subject.claims.dtypes:
        gate = torch.ones(65_613, 3, dtype=dtype)
        gate[::2, 1] = -1.0
        record(subject, gate, torch.ones_like(gate), empty_stats(subject, 3))
