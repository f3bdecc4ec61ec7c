"""The gradient of swiglu_stats: of h to gate and up, by the accuracy rule, masks and compiled too.

The truth is torch's autograd in float64 through formulas that are not the op's, the baseline its
autograd in the dtype.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from relneuron.ops import ACTIVATIONS, GroupStats, swiglu_stats, swiglu_stats_only
from relneuron.ops.swiglu_stats import gradient
from relneuron.testing import assert_accurate, assert_same_bits
from relneuron.testing.oracle import (
    eager_activation,
    exact_activation,
    integers,
    keep_mask,
    normal,
)
from tests.ops.swiglu_stats.cases import DTYPES, all_patterns
from tests.ops.swiglu_stats.runs import ISAS, STATUS, op

BACKENDS = ["reference", *(["cpu"] if STATUS["cpu"].works else [])]
SHAPES = {
    "one": (1, 1),
    "ragged": (37, 131),
    "wide": (3, 1000),
    "no tokens": (0, 9),
    "none": (4, 0),
}


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return normal(*shape, dtype=dtype, seed=seed).requires_grad_()


def masks(n_tokens: int, width: int) -> dict[str, Tensor]:
    words = integers(-(2**31), 2**31 - 1, 3, (width + 31) // 32, seed=4)
    return {"keep": words, "condition_ids": integers(0, 3, n_tokens, seed=5)}


def by_autograd(
    gate: Tensor, up: Tensor | None, dh: Tensor, activation: str, is_exact: bool
) -> list[Tensor]:
    """d_gate and d_up by torch's autograd, in float64 through the oracle's formulas if exact."""
    inputs = [x.detach() for x in (gate, up) if x is not None]
    inputs = [(x.double() if is_exact else x).requires_grad_() for x in inputs]
    function = exact_activation if is_exact else eager_activation
    h = function(inputs[0], activation)
    for factor in inputs[1:]:
        h = h * factor
    return list(torch.autograd.grad(h, inputs, dh.to(h.dtype)))


def assert_right(
    gate: Tensor, up: Tensor | None, activation: str, backend: str, **given: Any
) -> None:
    """The gradient of a call by the accuracy rule, and exactly +0 where a neuron is dropped."""
    inputs = [x for x in (gate, up) if x is not None]
    dh = normal(*gate.shape, dtype=gate.dtype, seed=9)
    h = swiglu_stats(gate, up, activation=activation, backend=backend, **given)
    found = torch.autograd.grad(h, inputs, dh)
    mask = torch.ones_like(gate, dtype=torch.bool)
    if "keep" in given:
        mask = keep_mask(given["keep"], given["condition_ids"], *gate.shape)
    truths = by_autograd(gate, up, dh, activation, True)
    baselines = by_autograd(gate, up, dh, activation, False)
    for d, truth, baseline in zip(found, truths, baselines, strict=True):
        assert_same_bits(d, torch.where(mask, d, 0.0), "a dropped neuron's gradient")
        assert_accurate(d, truth.where(mask, 0.0), baseline.where(mask, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_accurate(activation: str, dtype: torch.dtype, backend: str) -> None:
    for shape in SHAPES.values():
        gate, up = leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype, seed=1)
        assert_right(gate, up, activation, backend)
        assert_right(gate, up, activation, backend, **masks(*shape))
        assert_right(gate, None, activation, backend)
    assert_right(gate, None, activation, backend, **masks(*shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropped_neuron_has_none_whatever_its_values(backend: str) -> None:
    gate, up = leaf(6, 40), leaf(6, 40, seed=1)
    with torch.no_grad():
        gate[:, ::3], up[:, ::5], up[:, 1::5] = torch.inf, torch.nan, -torch.inf
    dh = normal(6, 40, dtype=torch.float32)
    dh[:, ::7] = torch.nan
    off = torch.zeros(1, 2, dtype=torch.int32)
    h = swiglu_stats(gate, up, keep=off, backend=backend)
    for d in torch.autograd.grad(h, (gate, up), dh):
        assert_same_bits(d, torch.zeros(6, 40))


def kernel_calls(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Arguments of the kernel, with masks: every number of a 16-bit type, and large matrices."""
    every = all_patterns(dtype, 1).view(64, 1024), all_patterns(dtype, 2).view(64, 1024)
    gate = torch.cat(
        [every[0], normal(60, 1024, dtype=dtype), normal(60, 1024, dtype=dtype, scale=9)]
    )
    up = torch.cat([every[1], normal(120, 1024, dtype=dtype, seed=1)])
    dh = normal(*gate.shape, dtype=dtype, seed=2)
    return [
        (dh, gate, up, *masks(*gate.shape).values()),
        (dh[:, :1001], gate[:, 3:1004], up[:, 1:1002], None, None),
        (dh[:, :1001], gate[:, 3:1004], None, None, None),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
def test_the_kernel_of_every_processor(isa: str, activation: str, dtype: torch.dtype) -> None:
    for dh, gate, up, keep, conditions in kernel_calls(dtype):
        given = (dh, gate, up, activation, keep, conditions)
        both = (True, up is not None)
        found = gradient.gradient_cpu(*given, *both, isa=isa, n_threads=2)
        alone = gradient.gradient_cpu(*given, *both, isa=isa, n_threads=1)
        wanted = gradient.gradient_reference(*given, *both)
        truths = by_autograd(gate, up, dh, activation, True)
        mask = torch.ones_like(gate, dtype=torch.bool)
        if keep is not None:
            mask = keep_mask(keep, conditions, *gate.shape)
        for d, again, baseline, truth in zip(found, alone, wanted, truths, strict=True):
            assert_same_bits(d, again, "on one thread")
            assert_same_bits(d, torch.where(mask, d, 0.0), "a dropped neuron's gradient")
            # Of infinite and very large values torch loses what the formula has, in float64 too.
            known = truth.isfinite() & baseline.isfinite() & (gate.abs() < 1e4) & mask
            assert_accurate(*(torch.where(known, x, 0.0) for x in (d, truth, baseline)))
            assert not (d.isnan() & truth.isfinite() & mask).any()
            assert d.isnan()[gate.isnan() & mask & (dh != 0)].all() or activation == "relu"


# What gradcheck loads at first uses a part of torch that it calls old.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_formula_in_float64(activation: str) -> None:
    """Of the op that compiled code sees; the public one takes no float64."""
    gate = normal(4, 33, dtype=torch.float64).requires_grad_()
    up = normal(4, 33, dtype=torch.float64, seed=1).requires_grad_()
    keep, conditions = masks(4, 33).values()

    def h(gate: Tensor, up: Tensor | None = None) -> Tensor:
        given = (gate, up, activation, keep, conditions, False, "reference")
        return gradient._hidden_op(*given)  # type: ignore[no-any-return]

    for inputs in ((gate, up), (gate,), (gate, up.detach()), (gate.detach(), up)):
        assert torch.autograd.gradcheck(h, inputs)
    assert torch.autograd.gradgradcheck(h, (gate, up))


def test_the_gradient_has_a_gradient() -> None:
    dh = normal(5, 40, dtype=torch.float32, seed=9).requires_grad_()
    seconds = []
    for function in (swiglu_stats, lambda gate, up: torch.nn.functional.silu(gate) * up):
        gate, up = leaf(5, 40), leaf(5, 40, seed=1)
        firsts = torch.autograd.grad(function(gate, up), (gate, up), dh, create_graph=True)
        total = sum(d.square().sum() for d in firsts)
        seconds.append(torch.autograd.grad(total, (gate, up, dh)))
    for ours, wanted in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, wanted)


# --- statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_statistics_are_taken_once_and_have_none(backend: str) -> None:
    gate, up, ids = leaf(9, 40), leaf(9, 40, seed=1), integers(-1, 2, 9)
    found = []
    for is_on in (True, False):
        stats = GroupStats(groups=2, width=40, sites=("act", "product"), moments=True)
        sums = {"act": torch.zeros(2, 40)}
        with torch.set_grad_enabled(is_on):
            h = swiglu_stats(
                gate,
                up,
                stats=stats,
                group_ids=ids,
                responses=sums,
                prompt_ids=ids,
                backend=backend,
            )
        assert h.requires_grad == is_on
        if is_on:
            h.sum().backward()
        tensors = (h.detach(), stats.tokens, stats._count, stats._sum, stats._max, sums["act"])
        assert not any(tensor.requires_grad for tensor in tensors)
        found.append(tensors)
    for with_gradient, without in zip(*found, strict=True):
        assert_same_bits(with_gradient, without)


def test_what_needs_no_gradient_does_not_come_near_it() -> None:
    gate, up = leaf(2, 3), normal(2, 3, dtype=torch.float32)
    with mock.patch.object(op, "with_gradient", side_effect=AssertionError("asked")):
        with torch.no_grad():
            assert not swiglu_stats(gate, up).requires_grad
        with torch.inference_mode():
            stats = GroupStats(groups=1, width=3)
            swiglu_stats(gate, up, stats=stats)
        assert not swiglu_stats(gate.detach(), up).requires_grad
        with pytest.raises(AssertionError, match="asked"):
            swiglu_stats(gate, up)
    if STATUS["cpu"].works:  # no other call leaves the quick way for it
        with mock.patch.object(op, "check_given", side_effect=AssertionError("checked")):
            swiglu_stats(gate.detach(), up)


# --- what autograd hands over, and what is refused -------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_dh_and_rows_may_lie_as_they_like(backend: str) -> None:
    packed = leaf(6, 90)
    gate, up = packed[:, :40], packed[:, 41:81]
    dhs = [
        torch.ones(()).expand(6, 40),
        normal(40, 6, dtype=torch.float32).T,
        normal(6, 99, dtype=torch.float32)[:, 3:43],
        normal(1, 40, dtype=torch.float32).expand(6, 40),
    ]
    for dh in dhs:
        (found,) = torch.autograd.grad(swiglu_stats(gate, up, backend=backend), packed, dh)
        h = torch.nn.functional.silu(gate) * up
        (wanted,) = torch.autograd.grad(h, packed, dh)
        torch.testing.assert_close(found, wanted)
        assert not found[:, 81:].any() and not found[:, 40].any()


def test_only_what_is_asked_for_is_computed() -> None:
    for wants in ((True, False), (False, True)):
        inputs = [
            leaf(3, 40).requires_grad_(wants[0]),
            leaf(3, 40, seed=1).requires_grad_(wants[1]),
        ]
        h = swiglu_stats(inputs[0], inputs[1])
        with mock.patch.object(gradient, "_gradient_impl", wraps=gradient._gradient_impl) as asked:
            h.sum().backward()
        assert asked.call_args.args[6:8] == wants
        assert [x.grad is not None for x in inputs] == list(wants)


def test_what_has_none_is_refused_with_the_fix() -> None:
    gate, up = leaf(2, 3), leaf(2, 3, seed=1)
    with pytest.raises(ValueError, match=r"out must be left out where gate requires.*no_grad\(\)"):
        swiglu_stats(gate, up, out=torch.empty(2, 3))
    with pytest.raises(ValueError, match="out must be left out where up requires grad"):
        swiglu_stats(gate.detach(), up, out=torch.empty(2, 3))
    # Nothing that it gives could have one.
    with pytest.raises(ValueError, match=r"swiglu_stats_only: gate .*gate\.detach\(\)"):
        swiglu_stats_only(gate, up, stats=GroupStats(groups=1, width=3))
    sums = {"act": torch.zeros(1, 3, requires_grad=True)}
    ids = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"responses\['act'\] must not require grad"):
        swiglu_stats(gate, up, responses=sums, prompt_ids=ids)


def test_values_changed_before_the_backward_are_noticed() -> None:
    gate = leaf(2, 3)
    own = gate * 1
    h = swiglu_stats(own, own)
    h.mul_(2)  # h is the caller's: nothing of it is kept
    h.sum().backward()
    h = swiglu_stats(own, own)
    with torch.no_grad():
        own.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


# --- torch.compile and the registration ------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "ungated"])
def test_compiled_code_gives_the_same(is_gated: bool, dynamic: bool) -> None:
    torch.compiler.reset()
    given = masks(9, 70)

    def loss(gate: Tensor, up: Tensor, stats: GroupStats, ids: Tensor, keep: Tensor) -> Tensor:
        other = up if is_gated else None
        conditions = given["condition_ids"][: len(gate)]
        h = swiglu_stats(
            gate * 2, other, stats=stats, group_ids=ids, keep=keep, condition_ids=conditions
        )
        return (h * up).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n_tokens in (9, 5):
        found = []
        for function in (loss, compiled):
            gate, up = leaf(n_tokens, 70), leaf(n_tokens, 70, seed=1)
            stats = GroupStats(groups=2, width=70)
            function(gate, up, stats, integers(-1, 2, n_tokens), given["keep"]).backward()
            found.append((gate.grad, up.grad, stats.tokens, stats.count["act"]))
        for eager, other in zip(*found, strict=True):
            assert_same_bits(other, eager)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_are_contiguous_as_compiled_code_is_told(backend: str) -> None:
    gate, up, dh = (normal(*shape, dtype=torch.float32) for shape in ((6, 40), (6, 40), (40, 6)))
    for activation in ACTIVATIONS:
        given = (dh.T, gate, up, activation, None, None, True, True, backend)
        assert all(d.is_contiguous() for d in gradient._gradient_op(*given))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck(backend: str) -> None:
    gate, up = leaf(6, 40), leaf(6, 40, seed=1)
    keep, conditions = masks(6, 40).values()
    torch.library.opcheck(gradient._hidden_op, (gate, up, "gelu", keep, conditions, False, backend))
    dh = normal(40, 6, dtype=torch.float32).T
    for wants in ((True, True), (True, False), (False, True)):
        given = (dh, gate.detach(), up.detach(), "silu", keep, conditions, *wants, backend)
        torch.library.opcheck(gradient._gradient_op, given)
