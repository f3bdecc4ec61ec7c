"""The checks of `check_backend` about average_precision, and its definition in Python's integers.

Each function is one promise of the contract, named in its docstring; `contract.py` runs them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from relneuron.testing.accuracy import assert_same_bits
from relneuron.testing.checks_h import gaps
from relneuron.testing.contract import Subject, check
from relneuron.testing.oracle import integers, normal

OP = "average_precision"


# --- the definition --------------------------------------------------------------------------


def exact_average_precision(values: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """(R, M) float32 by the sum of integers of the op's spec, one column and relation at a time."""
    counted = torch.ones_like(labels).int() if weights is None else weights.int()
    # float64 holds every other type, and Python compares it as it is: +0 is -0.
    columns = values.double().T.tolist()
    return torch.tensor(
        [
            [_of_column(column, row.tolist(), weight.tolist()) for column in columns]
            for row, weight in zip(labels, counted, strict=True)
        ],
        dtype=torch.float32,
    ).reshape(len(labels), len(columns))


def _of_column(column: list[float], labels: list[int], weights: list[int]) -> float:
    members: dict[float, list[int]] = {}
    for value, label, weight in zip(column, labels, weights, strict=True):
        if label >= 0:
            group = members.setdefault(value, [0, 0])
            group[1 - label] += weight
    above = n_positive = total = 0
    for value in sorted(members, reverse=True):
        positive, negative = members[value]
        n_positive, above = n_positive + positive, above + positive + negative
        if positive:
            total += positive * n_positive * ((2**62 + above // 2) // above)
    return float(np.float32(float(total) / float(n_positive << 62)))


# --- data ------------------------------------------------------------------------------------


def draw(n_rows: int, n_relations: int, seed: int = 0) -> Tensor:
    """(R, N) int8 labels, a third each positive, negative and not in the set."""
    labels = integers(-1, 2, n_relations, n_rows, seed=seed).to(torch.int8)
    labels[:, 0], labels[:, 1] = 1, 0
    return labels


def assert_ranked(
    subject: Subject, values: Tensor, labels: Tensor, weights: Tensor | None = None
) -> None:
    """One call whose result is compared with the definition, bit by bit."""
    assert values.numel() <= subject.elements, "a check says how large its calls are"
    found = subject.call(values=values, labels=labels, weights=weights)
    wanted = exact_average_precision(values, labels, weights)
    assert_same_bits(found, wanted, "AP (relation, column)")


# --- the checks ------------------------------------------------------------------------------


@check(op=OP)
def ap_is_the_step_function(subject: Subject) -> None:
    """AP is the mean over the positives of the precision at their values, in every dtype."""
    for seed, dtype in enumerate(subject.claims.dtypes):
        assert_ranked(subject, normal(40, 9, dtype=dtype, seed=seed), draw(40, 3, seed))


@check(op=OP)
def ties_are_one_step(subject: Subject) -> None:
    """Equal values stand at the same place: all of them count as ranked before any of them."""
    for dtype in subject.claims.dtypes:
        values = integers(-2, 3, 50, 7).to(dtype)
        assert_ranked(subject, values, draw(50, 2))
        assert_ranked(subject, torch.zeros(50, 3).to(dtype), draw(50, 2))


@check(op=OP)
def plus_zero_is_minus_zero(subject: Subject) -> None:
    """+0 and -0 are equal, and both lie between the numbers next to them."""
    for dtype in subject.claims.dtypes:
        tiny = torch.finfo(dtype).smallest_normal
        values = torch.tensor([0.0, -0.0, tiny, -tiny], dtype=torch.float64).to(dtype)
        assert_ranked(subject, values.repeat(6)[:, None].clone(), draw(24, 4))


@check(op=OP)
def extreme_values_keep_their_order(subject: Subject) -> None:
    """Subnormal numbers and the largest ones are as far apart as any others."""
    for dtype in subject.claims.dtypes:
        info = torch.finfo(dtype)
        smallest = info.smallest_normal * info.eps
        sizes = [info.max, info.max * (1 - info.eps), 1.0, smallest, 2 * smallest]
        values = torch.tensor([*sizes, *(-x for x in sizes)], dtype=torch.float64).to(dtype)
        assert_ranked(subject, values.repeat(3)[:, None].clone(), draw(30, 5))


@check("double", op=OP)
def float64_is_compared_as_float64(subject: Subject) -> None:
    """Values that are equal in float32 are ranked by what float64 tells apart."""
    values = 1.0 + integers(0, 50, 60, 4).double() * 2.0**-40
    assert_ranked(subject, values, draw(60, 2))


@check(op=OP)
def rows_outside_of_a_set_are_not_there(subject: Subject) -> None:
    """A row of label -1 counts neither as a positive nor as a negative."""
    values, labels = normal(30, 5, dtype=subject.claims.dtypes[0]), draw(30, 2)
    labels[0, 2:20], labels[1, 10:] = -1, -1
    assert_ranked(subject, values, labels)


@check(op=OP)
def relations_have_sets_of_their_own(subject: Subject) -> None:
    """Every row of labels is a relation of its own, also one with a single positive."""
    values, labels = normal(25, 6, dtype=subject.claims.dtypes[0]), draw(25, 5)
    labels[3], labels[4] = 0, 1
    labels[3, 7], labels[4, 0] = 1, 0
    assert_ranked(subject, values, labels)


@check(op=OP)
def with_positives_alone_it_is_one(subject: Subject) -> None:
    """Where all rows are positive AP is 1, of one row, too."""
    for n_rows in (1, 7):
        values = normal(n_rows, 3, dtype=subject.claims.dtypes[0])
        assert_ranked(subject, values, torch.ones(1, n_rows, dtype=torch.int8))


@check(elements=6000, op=OP)
def long_columns_are_exact(subject: Subject) -> None:
    """Over thousands of rows every bit is that of the sum of integers, in any order of the rows."""
    values, labels = normal(3000, 2, dtype=subject.claims.dtypes[0]), draw(3000, 2)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    assert_ranked(subject, values, labels)
    assert_ranked(subject, values[order], labels[:, order])


@check("weights", op=OP)
def a_weight_is_as_many_rows(subject: Subject) -> None:
    """A row of weight w counts as w rows, of weight 0 not at all, per relation."""
    for dtype in subject.claims.dtypes:
        values, labels = normal(40, 5, dtype=dtype), draw(40, 3)
        weights = integers(0, 4, 3, 40, seed=7).to(torch.uint8)
        weights[:, :2] = 1
        assert_ranked(subject, values, labels, weights)
        weights[:, 2:9] = 255
        assert_ranked(subject, values, labels, weights)


@check("strides", op=OP)
def values_may_lie_as_they_like(subject: Subject) -> None:
    """Values may be a transposed view or have gaps, and what lies in the gaps is not ranked."""
    for dtype in subject.claims.dtypes:
        labels = draw(31, 2)
        assert_ranked(subject, normal(5, 31, dtype=dtype).T, labels)
        assert_ranked(subject, normal(40, 20, dtype=dtype)[3:34, 4:15], labels)
        values = normal(31, 20, dtype=dtype)[:, ::3]
        assert_ranked(subject, values, labels)


@check(op=OP)
def nothing_to_rank_is_allowed(subject: Subject) -> None:
    """No columns or no relations give an empty result."""
    dtype = subject.claims.dtypes[0]
    assert_ranked(subject, torch.zeros(4, 0, dtype=dtype), draw(4, 2))
    assert_ranked(subject, normal(4, 3, dtype=dtype), draw(4, 2)[:0])


@check(op=OP)
def arguments_stay_as_they_are(subject: Subject) -> None:
    """Values and labels are as they were, and so are the gaps between them."""
    values, labels = normal(30, 22, dtype=subject.claims.dtypes[0])[:, :11], draw(30, 3)
    if "strides" not in subject.claims.features:
        values = values.contiguous()
    assert_ranked(subject, values, labels)
    assert_same_bits(subject.last_inputs["values"], values, "values after the call")
    if not values.is_contiguous():
        assert_same_bits(gaps(subject.last_inputs["values"], 11), gaps(values, 11), "the gaps")
    assert_same_bits(subject.last_inputs["labels"], labels, "labels after the call")


@check("errors", op=OP)
def what_cannot_be_ranked_is_refused(subject: Subject) -> None:
    """NaN, infinities, other labels and a relation without positives raise a ValueError."""
    values, labels = normal(12, 4, dtype=subject.claims.dtypes[0]), draw(12, 2)
    for bad in (math.nan, math.inf, -math.inf):
        wrong = values.clone()
        wrong[5, 2] = bad
        _assert_refused(subject, wrong, labels, f"the value {bad}")
    for label, rows in ((2, [3]), (-2, [3]), (0, range(12)), (1, range(1, 12))):
        changed = labels.clone()
        changed[1, list(rows)] = label
        if label == 1:
            changed[1, 0] = -1  # positives and a row left out, but no negative
        _assert_refused(subject, values, changed, f"a relation with the labels {changed[1]}")


def _assert_refused(subject: Subject, values: Tensor, labels: Tensor, what: str) -> None:
    try:
        subject.call(values=values, labels=labels)
    except ValueError:
        return
    raise AssertionError(f"{what} was taken")
