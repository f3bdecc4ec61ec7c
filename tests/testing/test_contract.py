"""Tests of relneuron.testing: our backends hold the contract, and every seeded fault is found.

Each fault of `mutants.py` must be found by the check that is about it, and each check must find at
least one: a check that finds none would promise nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from relneuron import ops
from relneuron.ops import available_backends, backends, swiglu_stats
from relneuron.testing import FEATURES, OPS, Check, ContractError, backend_checks, check_backend
from tests.kit.interpreter import IS_INTERPRETED, quiet
from tests.testing.mutants import FAULTS, swiglu_stats_with
from tests.testing.mutants_others import (
    GAIN,
    RANKING,
    average_precision_with,
    logprob_gain_with,
)
from tests.testing.mutants_pair import PAIR, pair_stats_with
from tests.testing.mutants_peaks import (
    HISTOGRAM,
    MERGE,
    PEAKS,
    histogram_with,
    merge_peaks_with,
    peaks_with,
)

pytestmark = quiet

op = sys.modules["relneuron.ops.swiglu_stats.op"]
STATUS = available_backends()
ISAS = backends.cpu_module().isa_levels() if STATUS["cpu"].works else []
CHECKS = {check.name: check for check in backend_checks()}


# --- our backends ----------------------------------------------------------------------------


@pytest.mark.parametrize("check", backend_checks(), ids=str)
def test_the_reference_holds_the_contract(check: Check) -> None:
    check(functools.partial(swiglu_stats, backend="reference"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("check", backend_checks(), ids=str)
def test_the_kernels_for_cpus_hold_the_contract(check: Check, isa: str) -> None:
    forced = functools.partial(op.swiglu_stats_cpu, isa=isa, n_threads=2)
    with (
        mock.patch.object(op, "swiglu_stats_cpu", forced),
        mock.patch.object(op, "ran_quickly", return_value=False),
    ):
        check(functools.partial(swiglu_stats, backend="cpu"))


@pytest.mark.skipif(not STATUS["triton"].works, reason=STATUS["triton"].detail)
@pytest.mark.parametrize("check", backend_checks(), ids=str)
def test_the_kernels_for_gpus_hold_the_contract(check: Check) -> None:
    options: dict[str, Any] = {"max_elements": 6000} if IS_INTERPRETED else {"device": "cuda"}
    checks = {c.name: c for c in backend_checks(**options)}
    if check.name not in checks:
        pytest.skip("too large for the interpreter")
    checks[check.name](functools.partial(swiglu_stats, backend="triton"))


# --- the other ops ---------------------------------------------------------------------------

OTHERS = [check for op in list(OPS)[1:] for check in backend_checks(op)]
MUTANTS = {
    "average_precision": (average_precision_with, RANKING),
    "logprob_gain": (logprob_gain_with, GAIN),
    "pair_stats": (pair_stats_with, PAIR),
    "peaks": (peaks_with, PEAKS),
    "merge_peaks": (merge_peaks_with, MERGE),
    "histogram": (histogram_with, HISTOGRAM),
}
OTHER_FAULTS = [(op, fault) for op, (_, faults) in MUTANTS.items() for fault in faults]


@pytest.mark.parametrize("backend", ["reference", *(["cpu"] if STATUS["cpu"].works else [])])
@pytest.mark.parametrize("check", OTHERS, ids=str)
def test_other_ops_hold_their_contracts(check: Check, backend: str) -> None:
    check(functools.partial(getattr(ops, check.claims.op), backend=backend))


@pytest.mark.skipif(not STATUS["triton"].works, reason=STATUS["triton"].detail)
@pytest.mark.parametrize("check", OTHERS, ids=str)
def test_other_ops_hold_them_on_gpus(check: Check) -> None:
    options: dict[str, Any] = {"max_elements": 5000} if IS_INTERPRETED else {"device": "cuda"}
    checks = {c.name: c for c in backend_checks(check.claims.op, **options)}
    if check.name not in checks:
        pytest.skip("too large for the interpreter")
    checks[check.name](functools.partial(getattr(ops, check.claims.op), backend="triton"))


@pytest.mark.parametrize("op", MUTANTS)
def test_without_a_fault_the_others_are_right(op: str) -> None:
    fn, _ = MUTANTS[op]
    report = check_backend(functools.partial(fn, None), op)
    assert report == check_backend(functools.partial(fn, None), getattr(ops, op))
    assert report.passed == tuple(c.name for c in backend_checks(op)) and not report.skipped


@pytest.mark.parametrize(("op", "fault"), OTHER_FAULTS)
def test_every_fault_of_the_others_is_found(op: str, fault: str) -> None:
    fn, faults = MUTANTS[op]
    checks = {c.name: c for c in backend_checks(op)}
    reason = checks[faults[fault]].failure(functools.partial(fn, fault))
    assert reason is not None and checks[faults[fault]].promise in reason
    assert f"call: fn({OPS[op].inputs[0]}: (" in reason


@pytest.mark.parametrize("op", MUTANTS)
def test_every_check_of_the_others_finds_a_fault(op: str) -> None:
    assert set(MUTANTS[op][1].values()) == {c.name for c in backend_checks(op)}
    needs = {name for c in backend_checks(op) for name in c.needs}
    assert needs >= set(OPS[op].features)


def test_less_can_be_claimed_of_the_others() -> None:
    def plain(values: Tensor, labels: Tensor) -> Tensor:
        assert values.dtype == torch.float32 and values.is_contiguous()
        return ops.average_precision(values, labels)

    report = check_backend(plain, "average_precision", dtypes=[torch.float32], features=[])
    assert report.skipped["a_weight_is_as_many_rows"] == "not claimed: weights"
    assert report.skipped["float64_is_compared_as_float64"] == "float64 is not claimed"
    names = {c.name for c in backend_checks("logprob_gain", dtypes=[torch.float32], features=[])}
    assert "gains_are_the_definition" in names and "half_types_are_read_exactly" not in names


# --- seeded faults ---------------------------------------------------------------------------


def test_the_implementation_without_a_fault_is_right() -> None:
    report = check_backend(functools.partial(swiglu_stats_with, None))
    assert report.passed == tuple(CHECKS) and report.skipped == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found_by_its_check(fault: str) -> None:
    with pytest.raises(ContractError) as caught:
        CHECKS[FAULTS[fault]](functools.partial(swiglu_stats_with, fault))
    (reason,) = caught.value.failures.values()
    assert CHECKS[FAULTS[fault]].promise in reason
    assert "call: fn(gate: (" in reason


def test_every_check_finds_a_fault() -> None:
    assert set(FAULTS.values()) == set(CHECKS)


def test_all_failures_are_listed_at_once() -> None:
    fault = "active is greater or equal"
    with pytest.raises(ContractError) as caught:
        check_backend(functools.partial(swiglu_stats_with, fault), max_elements=20_000)
    assert {"active_is_greater_not_equal", "subnormal_values_count_and_zeros_do_not"} <= set(
        caught.value.failures
    )
    assert not {"h_is_accurate", "responses_are_sums_per_prompt"} & set(caught.value.failures)
    message = str(caught.value)
    assert f"{len(caught.value.failures)} of " in message
    assert "active_is_greater_not_equal: A value equal to the threshold is not active." in message
    assert "count[gate]" in message and "first at (" in message


def test_a_backend_that_raises_fails_with_its_error() -> None:
    def broken(gate: Tensor, up: Tensor, **arguments: Any) -> Tensor:
        raise RuntimeError("no kernel image")

    reason = CHECKS["h_is_accurate"].failure(broken)
    assert reason is not None and "it raised RuntimeError: no kernel image" in reason


def test_a_result_of_another_kind_fails() -> None:
    wrong: dict[str, Callable[..., Any]] = {
        "the result is a NoneType": lambda gate, up, **arguments: None,
        "h is (19, 130) float64": lambda gate, up, **arguments: gate.double(),
        "h is (18, 130) float32": lambda gate, up, **arguments: gate[1:],
    }
    for message, fn in wrong.items():
        reason = CHECKS["h_is_accurate"].failure(fn)
        assert reason is not None and message in reason


# --- partial implementations -----------------------------------------------------------------


def counts_only(
    gate: Tensor, up: Tensor, *, activation: str, stats: Any = None, group_ids: Any = None
) -> Tensor:
    """Someone's op: float32 and bfloat16, silu, counts of gate and act; nothing else."""
    assert activation == "silu" and gate.is_contiguous() and up.is_contiguous()
    assert gate.dtype in (torch.float32, torch.bfloat16)
    assert stats is None or (not stats.moments and set(stats.sites) <= {"gate", "act"})
    return swiglu_stats(gate, up, stats=stats, group_ids=group_ids, backend="reference")


def test_a_partial_implementation_is_held_to_what_it_claims() -> None:
    report = check_backend(
        counts_only,
        dtypes=[torch.float32, torch.bfloat16],
        activations=["silu"],
        sites=["gate", "act"],
        features=["counts"],
        max_elements=20_000,
    )
    assert "groups_may_come_in_any_order" in report.passed
    assert report.skipped["moments_are_accurate"] == "not claimed: moments"
    assert report.skipped["rows_of_out_may_be_strided"] == "not claimed: out, strides"
    assert "max_elements is 20000" in report.skipped["counts_of_all_half_patterns"]
    assert set(report.passed) | set(report.skipped) == set(CHECKS)


def test_less_can_be_claimed() -> None:
    names = {check.name for check in backend_checks(dtypes=[torch.float32], features=[])}
    assert "h_is_accurate" in names and "counts_of_float32_patterns" not in names
    assert not any("half" in name for name in names)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtypes": [torch.float64]}, "dtypes must be some of"),
        ({"dtypes": []}, "dtypes must not be empty"),
        ({"activations": "silu"}, "activations must be some of"),
        ({"features": ["speed"]}, "features must be some of .*speed"),
        ({"features": ["moments"]}, "moments comes with counts"),
        ({"op": "softmax"}, "op must be one of .*average_precision.*got 'softmax'"),
        ({"op": ops.residual_stats}, "op must be one of .*got 'residual_stats'"),
        ({"op": "logprob_gain", "sites": ["gate"]}, "logprob_gain has no sites"),
        ({"op": "average_precision", "features": ["masks"]}, "features must be some of .*weights"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        backend_checks(**options)


def test_features_are_known() -> None:
    needs = {name for check in CHECKS.values() for name in check.needs}
    assert needs == {*FEATURES, "half"}
