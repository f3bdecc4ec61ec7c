"""The checks of `check_backend` about histogram: values in bins whose edges are exact.

Each function is one promise of the contract, named in its docstring; `contract.py` runs them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from relneuron.ops import histogram_edges, site_range
from relneuron.ops.swiglu_stats.reference import site_values
from relneuron.testing.accuracy import assert_same_bits
from relneuron.testing.checks_h import SHAPES, pair
from relneuron.testing.checks_peaks import assert_refused
from relneuron.testing.contract import Subject, check
from relneuron.testing.oracle import integers, normal
from relneuron.testing.oracle_peaks import brute_histogram, wild

HISTOGRAM = "histogram"


def count(
    subject: Subject,
    gate: Tensor,
    up: Tensor | None,
    ids: Tensor,
    edges: tuple[Tensor, Tensor] | None = None,
    before: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """One call whose counts are compared with the definition."""
    assert gate.numel() <= subject.elements, "a check says how large its calls are"
    given: dict[str, Any] = {"activation": subject.claims.activations[0], "site": "gate"}
    given |= options
    given["site"] = given["site"] if given["site"] in subject.claims.sites else "act"
    exponent, first = edges or histogram_edges(*site_range(gate, up, **given), 8)
    if before is None:
        before = torch.zeros(3, gate.shape[1], 8, dtype=torch.int64)
    (found,) = subject.call(
        gate=gate, up=up, **given, counts=before, exponent=exponent, first=first, group_ids=ids
    )
    value = site_values(gate, up, given["activation"], (given["site"],))[given["site"]]
    bins = before.shape[2]
    wanted = before + brute_histogram(value, ids, len(before), bins, exponent, first)
    assert_same_bits(found, wanted, "counts (group, neuron, bin)")
    assert isinstance(found, Tensor)
    return found


@check(op=HISTOGRAM)
def values_are_counted_between_their_edges(subject: Subject) -> None:
    """At every site, with bins of every neuron's own, per group, of group -1 nowhere."""
    for dtype in subject.claims.dtypes:
        gate, up = pair(40, 50, dtype)
        for activation in subject.claims.activations:
            for site in subject.claims.sites:
                count(subject, gate, up, integers(-1, 3, 40), activation=activation, site=site)


@check(op=HISTOGRAM)
def an_edge_belongs_to_the_bin_that_it_begins(subject: Subject) -> None:
    """An edge and the number below it are in neighbouring bins, -tiny is below 0."""
    for dtype in subject.claims.dtypes:
        edges = torch.arange(-4.0, 5.0)
        tiny = torch.finfo(dtype).smallest_normal
        values = torch.cat(
            [edges, edges * (1 + torch.finfo(dtype).eps), torch.tensor([tiny, -tiny])]
        )
        gate = values.to(dtype)[:, None].repeat(1, 3)
        exponent = torch.tensor([0, 1, 100], dtype=torch.int32)
        first = torch.tensor([-4, -2, -1], dtype=torch.int32)
        count(subject, gate, gate, torch.zeros(len(gate), dtype=torch.int32), (exponent, first))


@check(op=HISTOGRAM)
def what_is_outside_is_in_the_end_bins(subject: Subject) -> None:
    """So are infinities; NaN is in no bin; and subnormal values and steps are exact."""
    for dtype in subject.claims.dtypes:
        gate, up = wild(40, 48, dtype, 1), wild(40, 48, dtype, 5)
        exponent = torch.tensor([-126, -20, -2, 0, 1, 126], dtype=torch.int32).repeat(8)
        first = torch.tensor([-1, 2**24 - 1, 1 - 2**24, 3, -8, 0, -3, -500]).int()
        for site in subject.claims.sites:
            edges = (exponent, first.repeat(6))
            count(subject, gate, up, integers(-1, 3, 40), edges, site=site)


@check(op=HISTOGRAM)
def counts_are_added_to_what_is_there(subject: Subject) -> None:
    """Also beyond 32 bits, and of any number of bins."""
    gate, up = pair(40, 20, subject.claims.dtypes[0])
    for bins in (1, 7, 300):
        before = integers(0, 9, 3, 20, bins).long() + 2**40
        edges = (torch.full((20,), -3, dtype=torch.int32), torch.full((20,), -4, dtype=torch.int32))
        count(subject, gate, up, integers(-1, 3, 40), edges, before)


@check(op=HISTOGRAM)
def histograms_of_any_shape_are_whole(subject: Subject) -> None:
    """No row and column is left out, also where no tile fits, and nothing is nothing."""
    dtypes = subject.claims.dtypes
    for index, shape in enumerate((*SHAPES, (0, 5), (5, 0))):
        gate, up = pair(*shape, dtypes[index % len(dtypes)], seed=index)
        count(subject, gate, up, integers(-1, 3, shape[0]))


@check("ungated", op=HISTOGRAM)
def histograms_need_no_up(subject: Subject) -> None:
    """Without up the sites are gate and act."""
    gate, _ = pair(20, 30, subject.claims.dtypes[0])
    for site in {"gate", "act"} & set(subject.claims.sites):
        count(subject, gate, None, integers(-1, 3, 20), site=site)


@check("strides", op=HISTOGRAM)
def rows_of_histograms_may_be_strided(subject: Subject) -> None:
    """gate and up may be parts of one tensor."""
    for dtype in subject.claims.dtypes:
        packed = normal(21, 170, dtype=dtype)
        up = packed[:, 80:157]
        count(subject, packed[:, 3:80], up, integers(-1, 3, 21), site=subject.claims.sites[-1])


@check("errors", op=HISTOGRAM)
def bins_out_of_range_are_refused(subject: Subject) -> None:
    """So are groups: a ValueError, and nothing has been counted by then."""
    gate, up = pair(6, 40, subject.claims.dtypes[0])
    zero = torch.zeros(40, dtype=torch.int32)
    for exponent, first, group in ((127, 0, 0), (-127, 0, 0), (0, 2**24, 0), (0, 0, 3), (0, 0, -2)):
        ids = torch.zeros(6, dtype=torch.int32)
        ids[2] = group
        edges = (zero + exponent, zero + first)
        assert_refused(subject, partial(count, subject, gate, up, ids, edges), "counts", 0)
