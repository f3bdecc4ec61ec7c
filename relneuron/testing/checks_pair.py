"""The checks of `check_backend` about pair_stats: two tensors of the same tokens, and a - b.

Each function is one promise of the contract, named in its docstring; `contract.py` runs them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from relneuron.ops import GroupStats
from relneuron.testing.accuracy import assert_same_bits
from relneuron.testing.checks_h import SHAPES, gaps, pair
from relneuron.testing.contract import Subject, check
from relneuron.testing.oracle import assert_recorded, integers, normal

OP = "pair_stats"


def record_pair(
    subject: Subject, a: Tensor, b: Tensor, ids: Tensor | None = None, **changes: Any
) -> GroupStats:
    """One call whose statistics are compared with the definition; `before`: what was there."""
    options: dict[str, Any] = {"groups": 3, "sites": subject.claims.sites, **changes}
    before = options.pop("before", None) or GroupStats(width=a.shape[1], **options)
    assert a.numel() <= subject.elements, "a check says how large its calls are"
    ids = integers(-1, 3, len(a)) if ids is None else ids
    after: GroupStats = subject.call(a=a, b=b, stats=before, group_ids=ids)
    wide, other = a.float(), b.float()
    values = {"a": wide, "b": other, "difference": wide - other}
    assert_recorded(after, before, values, ids)
    return after


@check(op=OP)
def pairs_are_counted_per_group(subject: Subject) -> None:
    """a, b and a - b of a token are counted in its group, of group -1 nowhere, in any order."""
    for dtype in subject.claims.dtypes:
        mixed = integers(-1, 3, 60)
        for ids in (mixed, mixed.sort().values, mixed.sort(descending=True).values):
            record_pair(subject, *pair(60, 40, dtype), ids, threshold=0.1)


@check("half", op=OP)
def a_difference_is_not_rounded_to_the_dtype(subject: Subject) -> None:
    """A difference is rounded once, to float32."""
    for dtype in subject.claims.half_dtypes:
        large = 2.0 / torch.finfo(dtype).eps
        a = torch.full((4, 3), large, dtype=dtype)
        record_pair(subject, a, torch.full_like(a, 0.25), threshold=large - 0.1)


@check(op=OP)
def a_pair_is_active_above_the_threshold(subject: Subject) -> None:
    """Equal values have the difference 0, which is active above no threshold that is not below."""
    for dtype in subject.claims.dtypes:
        a = normal(20, 30, dtype=dtype)
        for threshold in (0.0, -0.0, 0.5, -1e-45, math.inf, -math.inf):
            record_pair(subject, a, a.clone(), threshold=threshold)
            record_pair(subject, a, a - 0.5, threshold=threshold)


@check("moments", op=OP)
def small_differences_of_large_values_keep_their_squares(subject: Subject) -> None:
    """Squares are those of the differences, to the accuracy of these, not of a and b."""
    for dtype in subject.claims.dtypes:
        step = max(1e-3, 16 * torch.finfo(dtype).eps)
        b = normal(150, 30, dtype=torch.float32, scale=1.0).add(10.0).to(dtype)
        a = (b.float() + normal(150, 30, dtype=torch.float32, seed=1, scale=step)).to(dtype)
        record_pair(subject, a, b, moments=True)


@check("moments", elements=6000, op=OP)
def moments_of_pairs_are_accurate(subject: Subject) -> None:
    """Sums and squares are accurate to float32, maxima exact, over a few hundred tokens."""
    for dtype in subject.claims.dtypes:
        ids = integers(-1, 6, 400).clamp(max=1)
        record_pair(subject, *pair(400, 15, dtype), ids, moments=True)


@check("moments", op=OP)
def nonfinite_pairs_are_counted_and_in_no_moment(subject: Subject) -> None:
    """NaN and infinities are in n_nonfinite; of equal infinities the difference is NaN."""
    for dtype in subject.claims.dtypes:
        a, b = pair(24, 40, dtype)
        for index, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            a[index::5, index::7], b[index::4, 3 + index :: 9] = value, value
            a[20 + index, ::3], b[20 + index, ::3] = value, value
        record_pair(subject, a, b, moments=True)


@check(op=OP)
def pairs_add_to_what_is_there(subject: Subject) -> None:
    """A second call adds to the counts and tokens of the first."""
    before = None
    for seed in range(3):
        a, b = pair(11, 40, subject.claims.dtypes[0], seed)
        before = record_pair(subject, a, b, before=before)


@check(op=OP)
def pairs_of_any_shape_are_counted(subject: Subject) -> None:
    """No row and column is left out, also where no tile fits, and nothing is nothing."""
    dtypes = subject.claims.dtypes
    for index, shape in enumerate((*SHAPES, (0, 5), (5, 0))):
        a, b = pair(*shape, dtypes[index % len(dtypes)], seed=index)
        record_pair(subject, a, b, threshold=-1e6)


@check("strides", op=OP)
def pairs_may_be_strided(subject: Subject) -> None:
    """a and b may be parts of one tensor."""
    for dtype in subject.claims.dtypes:
        packed = normal(21, 170, dtype=dtype)
        record_pair(subject, packed[:, 3:80], packed[:, 80:157])


@check("flush_to_zero", op=OP)
def subnormal_differences_count(subject: Subject) -> None:
    """Differences below the smallest normal number count, also where the processor flushes them."""
    if torch.float32 not in subject.claims.dtypes:
        return
    b = torch.full((5, 20), 1.5 * torch.finfo(torch.float32).smallest_normal)
    a = b + torch.finfo(torch.float32).smallest_normal / 2
    if not torch.set_flush_denormal(True):
        return
    try:
        after: GroupStats = subject.call(
            a=a,
            b=b,
            stats=GroupStats(groups=1, width=20, sites=subject.claims.sites),
            group_ids=torch.zeros(5, dtype=torch.int32),
        )
    finally:
        torch.set_flush_denormal(False)
    for site in after.sites:
        assert_same_bits(after.count[site], torch.full((1, 20), 5), f"count[{site}]")


@check(op=OP)
def pairs_stay_as_they_are(subject: Subject) -> None:
    """a, b and the ids are as they were, and so are the gaps between rows."""
    a, b = pair(20, 44, subject.claims.dtypes[0])
    if "strides" in subject.claims.features:
        a, b = a[:, :33], b[:, 11:]
    ids = integers(-1, 3, 20)
    record_pair(subject, a, b, ids)
    for name, tensor in (("a", a), ("b", b), ("group_ids", ids)):
        assert_same_bits(subject.last_inputs[name], tensor, f"{name} after the call")
    if not a.is_contiguous():
        assert_same_bits(gaps(subject.last_inputs["a"], 33), gaps(a, 33), "the gaps of a")


@check("errors", op=OP)
def groups_of_pairs_out_of_range_are_refused(subject: Subject) -> None:
    """An id outside its range raises a ValueError, and nothing has been counted by then."""
    a, b = pair(6, 40, subject.claims.dtypes[0])
    for bad in (-2, 3):
        ids = integers(-1, 3, 6)
        ids[4] = bad
        try:
            record_pair(subject, a, b, ids)
        except ValueError:
            pass
        else:
            raise AssertionError(f"group id {bad} at token 4 was taken")
        stats, _ = subject.last_results
        assert stats is not None
        for tensor in (stats.tokens, *stats.count.values()):
            assert not bool(tensor.any()), f"something was counted before id {bad} was refused"
