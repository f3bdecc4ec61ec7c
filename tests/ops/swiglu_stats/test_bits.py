"""The statistics have the same bits in all backends: all patterns, drawn calls, threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from relneuron.ops import ACTIVATIONS, SITES
from relneuron.testing import assert_same_bits
from relneuron.testing.oracle import integers, normal
from tests.kit.interpreter import quiet
from tests.ops.swiglu_stats.cases import DTYPES, THRESHOLDS, all_patterns, calls, oracle
from tests.ops.swiglu_stats.runs import BACKENDS, FUSED, ISAS, STATUS, assert_same, run

pytestmark = quiet


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_gates_are_classified_as_in_float64(dtype: torch.dtype, threshold: float) -> None:
    gate = all_patterns(dtype)
    expected = gate.double() > threshold
    stats = {"groups": 1, "sites": ("gate",), "threshold": threshold}
    for backend in BACKENDS:
        result = run(backend, gate, gate, stats=stats)
        assert result.stats is not None
        assert_same_bits(result.stats.count["gate"], expected.long(), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_patterns_give_the_same_statistics(activation: str, dtype: torch.dtype) -> None:
    gate, up = all_patterns(dtype, seed=1), all_patterns(dtype, seed=2)
    for threshold in (0.0, -0.17, 0.3):
        stats = {"groups": 1, "sites": SITES, "threshold": threshold, "moments": True}
        expected = run("reference", gate, up, activation=activation, stats=stats)
        for backend in FUSED:
            assert_same(run(backend, gate, up, activation=activation, stats=stats), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_active_means_torchs_activation_is_positive(dtype: torch.dtype) -> None:
    gate = all_patterns(dtype)
    result = run("reference", gate, gate, stats={"groups": 1, "sites": ("act",)})
    assert result.stats is not None
    assert_same_bits(result.stats.count["act"], (nnf.silu(gate) > 0).long())


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(calls())
def test_random_calls_agree(call: tuple[Tensor, Tensor | None, dict[str, Any]]) -> None:
    gate, up, kwargs = call
    expected = run("reference", gate, up, **kwargs)
    ids = kwargs["group_ids"]
    oracle(expected, gate, up, ids, kwargs["activation"])
    for backend in FUSED:
        assert_same(run(backend, gate, up, **kwargs), expected)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(calls())
def test_statistics_without_h_are_the_same(
    call: tuple[Tensor, Tensor | None, dict[str, Any]],
) -> None:
    """On a CPU `test_random_calls_agree_on_a_cpu` does it 150 times."""
    gate, up, kwargs = call
    for backend in FUSED:
        result = run(backend, gate, up, **kwargs)
        assert_same(run(backend, gate, up, only_stats=True, **kwargs), result, exact_sums=True)


@settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(calls())
def test_random_calls_agree_on_a_cpu(call: tuple[Tensor, Tensor | None, dict[str, Any]]) -> None:
    gate, up, kwargs = call
    expected = run("reference", gate, up, **kwargs)
    results = [run(f"cpu-{isa}", gate, up, **kwargs) for isa in ISAS]
    for result in results:
        assert_same(result, expected)
        assert_same(result, results[0], exact_sums=True)
        assert_same_bits(result.h, results[0].h, "h of two instruction sets")
    only = run("reference", gate, up, only_stats=True, **kwargs)
    assert_same(only, expected, exact_sums=True)
    for isa in ISAS:
        only = run(f"cpu-{isa}", gate, up, only_stats=True, **kwargs)
        assert_same(only, results[0], exact_sums=True)


# --------------------------------------------------------------------------------------------------
# Instruction sets and threads


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
def test_small_gates_are_active_as_their_act_is(isa: str, activation: str) -> None:
    near_zero = torch.arange(-70, 70, dtype=torch.int32)  # patterns of 0, subnormals, NaN
    near_normal = torch.arange(0x007FFFF0, 0x00800010, dtype=torch.int32)
    bits = torch.cat([near_zero, near_zero ^ -(2**31), near_normal, near_normal ^ -(2**31)])
    special = torch.tensor([math.inf, -math.inf, math.nan, 1.0, -1.0])
    gate = torch.cat([bits.view(torch.float32), special]).unsqueeze(0).repeat(3, 1)
    stats = {"groups": 1, "sites": ("act",)}
    call: dict[str, Any] = {"activation": activation, "stats": stats, "only_stats": True}
    up = torch.ones_like(gate)
    assert_same(run(f"cpu-{isa}", gate, up, **call), run("reference", gate, up, **call))


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_a_bit(isa: str) -> None:
    gate, up = (
        normal(130, 1500, dtype=torch.float32),
        normal(130, 1500, dtype=torch.float32, seed=1),
    )
    kwargs: dict[str, Any] = {
        "stats": {"groups": 3, "sites": SITES, "moments": True},
        "group_ids": integers(-1, 3, 130),
        "response_sites": SITES,
        "n_prompts": 5,
        "prompt_ids": integers(-1, 5, 130),
    }
    one = run(f"cpu-{isa}", gate, up, n_threads=1, **kwargs)
    for n_threads in (2, 3, 7):
        other = run(f"cpu-{isa}", gate, up, n_threads=n_threads, **kwargs)
        assert_same(other, one, exact_sums=True)
        assert_same_bits(other.h, one.h)


@pytest.mark.parametrize("isa", ISAS)
def test_many_groups_in_few_slots(isa: str) -> None:
    """More groups than the kernel keeps in cache at a time: a group lies in many segments."""
    gate, up = normal(900, 70, dtype=torch.float16), normal(900, 70, dtype=torch.float16, seed=1)
    kwargs: dict[str, Any] = {
        "stats": {"groups": 300, "sites": SITES, "moments": True, "threshold": 0.2},
        "group_ids": integers(-1, 300, 900, seed=2),
    }
    one = run(f"cpu-{isa}", gate, up, **kwargs)
    assert_same(one, run("reference", gate, up, **kwargs))
    assert_same(run(f"cpu-{isa}", gate, up, n_threads=2, **kwargs), one, exact_sums=True)
    assert_same(one, run(f"cpu-{ISAS[0]}", gate, up, **kwargs), exact_sums=True)


@pytest.mark.skipif(not ISAS, reason=STATUS["cpu"].detail)
def test_unknown_isa_is_refused() -> None:
    with pytest.raises(ValueError, match=r"isa must be one of isa_levels\(\), got mmx"):
        run("cpu-mmx", torch.zeros(2, 3), torch.zeros(2, 3))
