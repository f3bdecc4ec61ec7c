"""The checks of `check_backend` about calls without up, as an MLP that is not gated makes them.

Each function is one promise of the contract, named in its docstring; `contract.py` runs them. All
of it is about sites that a call without up has: of those that are claimed, gate and act.
"""

from __future__ import annotations

from typing import Any

import torch

from relneuron.ops import GroupStats
from relneuron.ops.swiglu_stats.reference import site_values
from relneuron.testing.checks_h import SHAPES, gaps, words
from relneuron.testing.contract import Subject, check
from relneuron.testing.oracle import (
    all_patterns,
    assert_h,
    assert_responses,
    assert_stats,
    eager_activation,
    exact_activation,
    integers,
    keep_mask,
    normal,
    ulps_apart,
)


@check("ungated")
def without_up_h_is_the_activation(subject: Subject) -> None:
    """Without up h is activation(gate), as near to its float64 value as torch's own result."""
    dtypes = subject.claims.dtypes
    for dtype in dtypes:
        for activation in subject.claims.activations:
            gate = normal(19, 130, dtype=dtype)
            assert_h(subject.run(gate, None, activation=activation).h, gate, None, activation)
    for index, shape in enumerate(SHAPES):
        gate = normal(*shape, dtype=dtypes[index % len(dtypes)], seed=index)
        activation = subject.claims.activations[0]
        assert_h(subject.run(gate, None).h, gate, None, activation)


@check("ungated", "half", elements=65536)
def without_up_h_is_rounded_once(subject: Subject) -> None:
    """Without up h of all 65,536 numbers of a 16-bit type is the activation, rounded to nearest."""
    for dtype in subject.claims.half_dtypes:
        for activation in subject.claims.activations:
            gate = all_patterns(dtype)
            h = subject.run(gate, None, activation=activation).h
            truths = (
                site_values(gate, None, activation, ["act"])["act"].to(dtype),
                eager_activation(gate, activation),
                exact_activation(gate, activation).to(dtype),
            )
            apart = torch.stack([ulps_apart(h, truth) for truth in truths]).amin(0)
            share = float((apart == 0).float().mean())
            assert int(apart.max()) <= 1 and share >= 0.99, (
                f"{int((apart > 1).sum())} of 65536 elements ({dtype}, {activation}) are off, "
                f"{share:.1%} are the nearest number"
            )


@check("ungated")
def without_up_all_else_is_as_with_it(subject: Subject) -> None:
    """Statistics and responses are those of a call with up, of the sites gate and act."""
    features = subject.claims.features
    sites = tuple(site for site in subject.claims.sites if site in ("gate", "act"))
    if not sites:
        return
    ids, prompts = integers(-1, 3, 50, seed=1), integers(-1, 4, 50, seed=2)
    first = subject.claims.activations[0]
    for dtype in subject.claims.dtypes:
        gate = normal(50, 70, dtype=dtype)
        gate[3, 5], gate[7, 11] = torch.nan, torch.inf
        for activation in subject.claims.activations:
            if "counts" in features:
                moments = activation == first and "moments" in features
                before = GroupStats(groups=3, width=70, sites=sites, moments=moments)
                given: dict[str, Any] = {"stats": before, "group_ids": ids}
                result = subject.run(gate, None, activation=activation, **given)
                assert_stats(result.stats, before, gate, None, ids, activation)
        if "responses" in features:
            sums = {site: torch.zeros(4, 70) for site in sites}
            after = subject.run(gate, None, responses=sums, prompt_ids=prompts).responses
            assert_responses(after, sums, gate, None, prompts, first)


@check("ungated", "masks")
def without_up_dropped_neurons_are_plus_zero(subject: Subject) -> None:
    """Without up, too, a dropped neuron is exactly +0, also NaN, and a kept one is as it was."""
    for dtype in subject.claims.dtypes:
        gate = normal(41, 100, dtype=dtype)
        gate[::3, ::7] = torch.nan
        keep, ids = words(5, 4), integers(0, 5, 41)
        h = subject.run(gate, None, keep=keep, condition_ids=ids).h
        mask = keep_mask(keep, ids, 41, 100)
        assert_h(h, gate, None, subject.claims.activations[0], mask)


@check("ungated", "strides", "out")
def without_up_rows_may_be_strided(subject: Subject) -> None:
    """Without up, too, rows of gate and out may have gaps, and nothing is written into them."""
    for dtype in subject.claims.dtypes:
        gate = normal(12, 200, dtype=dtype)[2:11, 3:73]
        out = torch.full((10, 81), -77.0, dtype=dtype)[:9, :70]
        result = subject.run(gate, None, out=out)
        assert_h(result.h, gate, None, subject.claims.activations[0])
        assert bool((gaps(result.h, 70) == -77.0).all()), "the gaps between the rows were written"
