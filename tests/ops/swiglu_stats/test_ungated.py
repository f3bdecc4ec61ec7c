"""Calls without up: h is the activation, the sites are gate and act, all else is as with up.

Their truth is a call whose up is 1 everywhere, which changes no value; test_cases.py and
test_bits.py hold that one to the spec. The drawn calls of test_bits.py have no up now and then.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from relneuron.ops import (
    ACTIVATIONS,
    GroupStats,
    backends,
    residual_stats,
    swiglu_stats,
    swiglu_stats_only,
)
from relneuron.testing import assert_same_bits
from relneuron.testing.oracle import assert_h, integers, keep_mask, normal
from tests.kit.interpreter import IS_INTERPRETED, needs_triton, quiet
from tests.ops.swiglu_stats.cases import CASES, DTYPES, all_patterns, case
from tests.ops.swiglu_stats.runs import BACKENDS, FUSED, STATUS, assert_same, device_of, op, run

pytestmark = quiet
SITES = ("gate", "act")


def without_up(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, of the sites that there are."""
    stats = {**kwargs["stats"], "sites": SITES}
    return {**kwargs, "stats": stats, "response_sites": SITES}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cases(backend: str, name: str, dtype: torch.dtype) -> None:
    gate, _, kwargs = case(name, dtype)
    if name == "ragged" and backend == "triton" and IS_INTERPRETED:
        gate = gate[:67]
        for key in ("group_ids", "prompt_ids", "condition_ids"):
            kwargs[key] = kwargs[key][:67]
    kwargs = without_up(kwargs)
    launch = None
    if backend == "triton" and name == "strided":  # as on a GPU
        launch = backends.triton_module("swiglu_stats").DEFAULT_LAUNCH
    result = run(backend, gate, None, launch=launch, **kwargs)
    same = run(backend, gate, torch.ones_like(gate), launch=launch, **kwargs)
    assert_same_bits(result.h, same.h, "h")
    assert_same(result, same, exact_sums=backend != "triton")
    assert_same(result, run("reference", gate, None, **kwargs))
    mask = None
    if gate.numel():
        mask = keep_mask(kwargs["keep"], kwargs.get("condition_ids"), *gate.shape)
    assert_h(result.h, gate, None, "silu", mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_patterns(activation: str, dtype: torch.dtype) -> None:
    gate = all_patterns(dtype)
    kwargs: dict[str, Any] = {
        "activation": activation,
        "stats": {"groups": 1, "sites": SITES, "moments": True, "threshold": 0.1},
        "keep": integers(-(2**31), 2**31 - 1, 1, 2048),
    }
    expected = run("reference", gate, None, **kwargs)
    for backend in FUSED:
        result = run(backend, gate, None, **kwargs)
        assert_same(result, expected)
        assert_same_bits(result.h, run(backend, gate, torch.ones_like(gate), **kwargs).h, backend)
        only = {**kwargs}
        del only["keep"]
        assert_same(run(backend, gate, None, only_stats=True, **only), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_h_of_the_reference_is_torchs(backend: str) -> None:
    for activation, torchs in {
        "gelu": torch.nn.GELU(),
        "gelu_tanh": torch.nn.GELU(approximate="tanh"),
        "relu": torch.nn.ReLU(),
        "tanh": torch.nn.Tanh(),
        "silu": torch.nn.SiLU(),
    }.items():
        for dtype in DTYPES:
            gate = normal(9, 70, dtype=dtype)
            h = run(backend, gate, None, activation=activation).h
            if backend == "reference":
                assert_same_bits(h, torchs(gate), activation)
            assert_h(h, gate, None, activation)


# --------------------------------------------------------------------------------------------------
# What it refuses, and who runs it


@pytest.mark.parametrize("function", [swiglu_stats, swiglu_stats_only])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_there_is_no_up_and_no_product(function: Any, backend: str) -> None:
    gate = normal(3, 40, dtype=torch.float32)
    ids = torch.zeros(3, dtype=torch.int32)
    words = r"among \('gate', 'act'\) \(there is no up\), got \('(up|product)',\)"
    for site in ("up", "product"):
        stats = GroupStats(groups=1, width=40, sites=(site,))
        with pytest.raises(ValueError, match=f"stats must have sites {words}"):
            function(gate, None, stats=stats, backend=backend)
        assert int(stats.tokens.sum()) == 0
        sums = {site: torch.zeros(1, 40)}
        with pytest.raises(ValueError, match=f"responses must have keys {words}"):
            function(gate, None, responses=sums, prompt_ids=ids, backend=backend)
    with pytest.raises(TypeError, match="gate must be a tensor, got list"):
        function([1.0], None, backend=backend)
    with pytest.raises(ValueError, match="gate must be .T, F. float32"):
        function(gate[0], None, backend=backend)
    with pytest.raises(TypeError, match="x and residual must be tensors, got Tensor and NoneType"):
        residual_stats(gate, None, backend=backend)  # type: ignore[arg-type]
    if function is swiglu_stats:
        with pytest.raises(ValueError, match="out must not share memory with gate"):
            function(gate, None, out=gate, backend=backend)


@pytest.mark.skipif(not STATUS["cpu"].works, reason=STATUS["cpu"].detail)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plain_call_is_quick(dtype: torch.dtype) -> None:
    gate = normal(5, 100, dtype=dtype)
    ids = integers(-1, 3, 5)

    def call() -> tuple[Tensor, GroupStats, Tensor]:
        stats = GroupStats(groups=3, width=100, sites=SITES, moments=True)
        sums = torch.zeros(3, 100)
        given: dict[str, Any] = {"stats": stats, "group_ids": ids, "activation": "relu2"}
        given |= {"responses": {"act": sums}, "prompt_ids": ids}
        return swiglu_stats(gate, None, **given), stats, sums

    with mock.patch.object(op, "_swiglu_stats_op", side_effect=AssertionError("the slow way")):
        h, stats, sums = call()
    with mock.patch.object(op, "ran_quickly", return_value=False):
        slow_h, slow, slow_sums = call()
    assert_same_bits(h, slow_h, "h")
    assert_same_bits(sums, slow_sums, "responses")
    for name, tensor in stats.tensors("").items():
        assert_same_bits(tensor, slow.tensors("")[name], name)


def test_compiled_code_gives_the_same() -> None:
    gate = normal(24, 70, dtype=torch.bfloat16)

    def mlp(x: Tensor, stats: GroupStats) -> Tensor:
        return swiglu_stats(x * 2, None, activation="gelu_tanh", stats=stats) + 1

    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    found, expected = (GroupStats(groups=1, width=70) for _ in range(2))
    assert_same_bits(compiled(gate, found), mlp(gate, expected), "h")
    assert_same_bits(found.count["act"], expected.count["act"], "count")


@needs_triton[0]
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_calls_with_and_without_up_are_two_calls(activation: str) -> None:
    """What is kept of a call with up is of no use for one without, of the same shape."""
    device = device_of("triton")
    x = normal(3, 8, dtype=torch.float32).to(device)
    up = torch.full_like(x, 2.0)
    for _ in range(2):
        gated = swiglu_stats(x, up, activation=activation, backend="triton")
        h = swiglu_stats(x, None, activation=activation, backend="triton")
        assert_same_bits(gated.cpu(), 2 * h.cpu(), "h")
