"""Tests of what only the Triton kernels of swiglu_stats have: tiles, runs, orders, partial sums.

test_cases.py and test_bits.py hold them to the spec like every backend. Here tiles are small (in
the interpreter), so that groups, prompts and conditions change within them and across them.
"""

from __future__ import annotations

import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from relneuron.ops import ACTIVATIONS, SITES, GroupStats, backends, swiglu_stats
from relneuron.ops.swiglu_stats import reference
from relneuron.ops.swiglu_stats.groups import threshold_bits
from relneuron.testing import assert_same_bits
from relneuron.testing.oracle import integers, normal
from tests.kit.interpreter import IS_INTERPRETED, needs_triton
from tests.ops.swiglu_stats import runs
from tests.ops.swiglu_stats.cases import THRESHOLDS, all_patterns
from tests.ops.swiglu_stats.runs import Result, assert_same, assert_same_stats, device_of

pytestmark = needs_triton
HALF = (torch.bfloat16, torch.float16)


def run(gate: Tensor, up: Tensor, **kwargs: Any) -> Result:
    """Triton in tiles of 16 tokens, steps of 4 tokens and 32 columns (a GPU: its own tiles)."""
    return runs.run("triton", gate, up, launch=runs.tiles(gate.dtype, 16, 4, 32), **kwargs)


def check(gate: Tensor, up: Tensor, **kwargs: Any) -> Result:
    result = run(gate, up, **kwargs)
    expected = runs.run("reference", gate, up, **kwargs)
    assert_same(result, expected)
    # Rows that the kernel repeats or visits out of order must each have their h.
    step = 2 * torch.finfo(gate.dtype).eps
    close = {"rtol": step, "atol": 1e-6 if gate.dtype == torch.float32 else 2.0**-24}
    torch.testing.assert_close(result.h, expected.h, equal_nan=True, **close)
    return result


# (T,) ids that change in different ways; rows % 16 also differ.
ORDERS = {
    "sorted": lambda t, g: integers(-1, g, t).sort().values,
    "descending": lambda t, g: integers(-1, g, t).sort(descending=True).values,
    "mixed": lambda t, g: integers(-1, g, t, seed=3),
    "runs": lambda t, g: integers(-1, g, (t + 2) // 3, seed=1).repeat_interleave(3)[:t],
    "alternating": lambda t, g: (torch.arange(t) % 2 * (g - 1)).int(),
    "one": lambda t, g: torch.full((t,), g - 1, dtype=torch.int32),
    "none": lambda t, g: torch.full((t,), -1, dtype=torch.int32),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", [5, 40])  # fewer and more groups than tokens
def test_groups_in_any_order(order: str, groups: int) -> None:
    for dtype, sites in ((torch.bfloat16, ("act",)), (torch.float32, ("product", "gate"))):
        n_tokens, width = 37, 29
        gate = normal(n_tokens, width, dtype=dtype, seed=1)
        up = normal(n_tokens, width, dtype=dtype, seed=2)
        check(
            gate,
            up,
            stats={"groups": groups, "sites": sites, "moments": True},
            group_ids=ORDERS[order](n_tokens, groups),
            keep=integers(-(2**31), 2**31 - 1, 3, 1, seed=3),
            condition_ids=ORDERS["runs"](n_tokens, 2).clamp(min=0),
        )


@pytest.mark.parametrize("sites", [SITES, ("gate", "up", "act"), ("act",), ("up", "product")])
def test_one_row_a_step(sites: tuple[str, ...]) -> None:
    """As long calls with moments are tiled on NVIDIA GPUs; sites share what counts their hits."""
    n_tokens, width = 21, 24
    kwargs: dict[str, Any] = {
        "stats": {"groups": 3, "sites": sites, "moments": True, "threshold": 0.25},
        "group_ids": ORDERS["mixed"](n_tokens, 3),
        "keep": integers(-(2**31), 2**31 - 1, 3, 1, seed=3),
        "condition_ids": ORDERS["runs"](n_tokens, 2).clamp(min=0),
    }
    gate = normal(n_tokens, width, dtype=torch.bfloat16, seed=1)
    up = normal(n_tokens, width, dtype=torch.bfloat16, seed=2)
    expected = runs.run("reference", gate, up, **kwargs)
    assert_same(
        runs.run("triton", gate, up, launch=runs.tiles(gate.dtype, 16, 1, 32), **kwargs), expected
    )


def test_long_calls_have_tiles_of_their_own() -> None:
    """Where there are MIN_PROGRAMS of them, and partial sums."""
    launcher = backends.triton_module("swiglu_stats")
    config = launcher.LAUNCH_TABLE[9, 0]
    assert config.long is not None
    row_bytes = 11008 * 2
    assert config.with_partials(8192, row_bytes) is config.long
    assert config.with_partials(2048, row_bytes) is config
    assert launcher.LAUNCH_TABLE[9, 4].with_partials(8192, row_bytes).long is None


@pytest.mark.parametrize("condition_order", ["sorted", "mixed", "one"])
def test_conditions_change_between_and_within_runs(condition_order: str) -> None:
    gate, up = normal(64, 64, dtype=torch.float16), normal(64, 64, dtype=torch.float16, seed=1)
    check(
        gate,
        up,
        stats={"groups": 3, "sites": ("act", "up"), "moments": True},
        group_ids=integers(0, 3, 64).sort().values,
        keep=integers(-(2**31), 2**31 - 1, 4, 2, seed=3),
        condition_ids=ORDERS[condition_order](64, 4).clamp(min=0),
    )


@pytest.mark.parametrize("shape", [(0, 40), (17, 0), (1, 1), (33, 13), (16, 64), (15, 96)], ids=str)
def test_shapes(shape: tuple[int, int]) -> None:
    n_tokens, width = shape
    gate, up = normal(*shape, dtype=torch.bfloat16), normal(*shape, dtype=torch.bfloat16, seed=1)
    check(
        gate,
        up,
        stats={"groups": 2, "sites": ("act",), "moments": True},
        group_ids=integers(-1, 2, n_tokens),
        keep=integers(-(2**31), 2**31 - 1, 2, (width + 31) // 32, seed=3),
        condition_ids=integers(0, 2, n_tokens),
        response_sites=("up",),
        n_prompts=2,
        prompt_ids=integers(-1, 2, n_tokens),
    )


def test_rows_with_strides_that_overlap() -> None:
    base = normal(60, 90, dtype=torch.bfloat16)
    gate, up = base.as_strided((40, 64), (7, 1), 3), base.as_strided((40, 64), (90, 1), 1)
    stats = {"groups": 3, "sites": ("gate", "act"), "moments": True}
    check(gate, up, stats=stats, group_ids=integers(-1, 3, 40))


# --------------------------------------------------------------------------------------------------
# The site act, recorded from gate


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_without_the_exact_activation(activation: str, dtype: torch.dtype) -> None:
    gate, up = all_patterns(dtype), all_patterns(dtype, seed=1)
    # As 8 rows, so that maxima and hits are of several gates. Half of the columns are finite.
    gate, up = gate.view(8, -1), up.view(8, -1)
    gate = torch.where((torch.arange(8192) % 2 == 0) & ~gate.isfinite(), 1.0, gate)
    for threshold in (0.0, -1e-45, -0.1, -0.17, 0.3, -math.inf):
        stats = {"groups": 1, "sites": ("act",), "moments": True, "threshold": threshold}
        out = runs.run("triton", gate, up, activation=activation, stats=stats)
        assert_same(out, runs.run("reference", gate, up, activation=activation, stats=stats))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "quick_gelu", "tanh"])
def test_hits_are_two_intervals_of_gate(activation: str, dtype: torch.dtype) -> None:
    gate = all_patterns(dtype).flatten().float()
    act = reference._activation(gate, activation).to(dtype).double()
    for threshold in THRESHOLDS[::2] + (-0.1, -math.inf):
        bits = threshold_bits(threshold)
        limits = backends.triton_module("swiglu_stats")._limits_of(activation, dtype, bits)
        assert limits is not None
        high, low = (
            math.inf if x is None else torch.tensor(x, dtype=torch.int32).view(torch.float32)
            for x in limits
        )
        hits = gate > high
        if limits[1] is not None:
            hits |= (gate < low) & (gate > -math.inf)
        assert_same_bits(hits, act > threshold)


@pytest.mark.parametrize("shape", ["two valleys", "all hits"])
def test_an_activation_that_is_no_valley_takes_the_exact_form(shape: str) -> None:
    def activation(x: Tensor, name: str) -> Tensor:
        return torch.sin(x) if shape == "two valleys" else torch.ones_like(x)

    with mock.patch.object(reference, "_activation", activation):
        assert (
            backends.triton_module("swiglu_stats")._limits_of.__wrapped__("silu", torch.float16, 0)
            is None
        )


# --------------------------------------------------------------------------------------------------
# Moments


@pytest.mark.parametrize("groups", [2, 17])  # 17: without partial sums
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_values_that_are_not_finite_or_have_no_finite_square(
    dtype: torch.dtype, groups: int
) -> None:
    gate, up = normal(40, 36, dtype=dtype), normal(40, 36, dtype=dtype, seed=1)
    gate[3, 5], gate[20, 5], gate[39, 35], gate[7, 0] = torch.nan, torch.inf, -torch.inf, torch.inf
    gate[:, 9] = -torch.inf
    up[11, 11], up[12, 33] = torch.nan, -torch.inf
    if dtype != torch.float16:
        gate[30, 30], up[31, 31] = 1e30, -3e25
    for sites, activation in ((SITES, "silu"), (("act", "up"), "silu"), (("act",), "relu")):
        check(
            gate,
            up,
            activation=activation,
            stats={"groups": groups, "sites": sites, "moments": True},
            group_ids=integers(-1, 2, 40).sort().values,
        )


@pytest.mark.parametrize("start", [2**31 - 3, 2**40])
def test_counters_go_on_from_large_values(start: int) -> None:
    device = device_of("triton")
    stats = GroupStats(groups=2, width=40, moments=True, device=device)
    for tensor in (stats._count, stats.tokens, stats._n_nonfinite):
        assert tensor is not None
        tensor.fill_(start)
    gate = torch.ones(140, 40, device=device)
    gate[5, 7] = torch.nan
    ids = (torch.arange(140, device=device) % 2).int()
    swiglu_stats(gate, gate, stats=stats, group_ids=ids, backend="triton")
    assert stats.tokens.tolist() == [start + 70] * 2
    expected = torch.full((2, 40), start + 70)
    expected[1, 7] -= 1
    assert_same_bits(stats.count["act"].cpu(), expected)
    assert int(stats.n_nonfinite["act"].sum()) == 80 * start + 1


def test_mixed_tiles_have_the_same_bits_in_every_run() -> None:
    gate, up = normal(45, 30, dtype=torch.bfloat16), normal(45, 30, dtype=torch.bfloat16, seed=1)
    kwargs: dict[str, Any] = {
        "stats": {"groups": 7, "sites": ("act", "up"), "moments": True},
        "group_ids": integers(-1, 7, 45),
        "response_sites": SITES,
        "n_prompts": 9,
        "prompt_ids": integers(-1, 9, 45),
    }
    one, two = run(gate, up, **kwargs), run(gate, up, **kwargs)
    assert one.stats is not None and two.stats is not None
    assert_same_stats(one.stats, two.stats)
    for site in SITES:
        assert_same_bits(one.responses[site], two.responses[site])


# --------------------------------------------------------------------------------------------------
# Responses


@pytest.mark.parametrize("order", [*ORDERS, "long"])
def test_responses_in_any_order(order: str) -> None:
    ids = torch.full((75,), 3).int() if order == "long" else ORDERS[order](75, 6)
    ids[0] = -1
    gate, up = normal(75, 40, dtype=torch.float16), normal(75, 40, dtype=torch.float16, seed=1)
    for sites in (SITES, ("act", "gate")):
        check(gate, up, response_sites=sites, n_prompts=6, prompt_ids=ids)


def test_responses_add_to_what_is_there_and_leave_other_rows_alone() -> None:
    device = device_of("triton")
    gate = torch.ones(3, 5, device=device)
    gate[2, 1] = torch.nan
    response = torch.tensor([[-0.0], [1.0], [2.0]], device=device).repeat(1, 5)
    ids = torch.tensor([1, -1, 1], dtype=torch.int32, device=device)
    swiglu_stats(gate, gate, responses={"gate": response}, prompt_ids=ids, backend="triton")
    expected = torch.tensor([[-0.0], [3.0], [2.0]]).repeat(1, 5)
    expected[1, 1] = torch.nan
    assert_same_bits(response.cpu(), expected)


# --------------------------------------------------------------------------------------------------
# The plan


def test_the_plan_needs_shapes_only() -> None:
    """Tensors on "meta" have no values: whoever reads one, or waits for it, fails here."""
    from relneuron.ops.swiglu_stats.reference import Call

    launcher = backends.triton_module("swiglu_stats")
    for dtype, moments, groups in itertools.product(HALF, (False, True), (3, 40)):
        stats = GroupStats(groups=groups, width=64, moments=moments, device="meta")
        matrix = torch.empty(50, 64, dtype=dtype, device="meta")
        ids = torch.empty(50, dtype=torch.int32, device="meta")
        call = Call(
            gate=matrix,
            up=matrix,
            out=matrix,
            activation="silu",
            sites=stats.sites,
            threshold_bits=0,
            count=stats._count,
            tokens=stats.tokens,
            sum=stats._sum,
            sum_sq=stats._sum_sq,
            max=stats._max,
            n_nonfinite=stats._n_nonfinite,
            group_ids=ids,
            responses={"up": torch.empty(4, 64, device="meta")},
            prompt_ids=ids,
            keep=torch.empty(2, 2, dtype=torch.int32, device="meta"),
            condition_ids=ids,
        )
        launches = launcher.plan(call, launcher.DEFAULT_LAUNCH, is_nvidia=True)
        n_moments = (1 + (groups > launcher.MAX_PARTIAL_GROUPS)) * moments
        assert len(launches) == 1 + n_moments + 2
        assert launches[0].grid == (1, 1)


def test_tiles_are_short_enough_for_float32_sums() -> None:
    launcher = backends.triton_module("swiglu_stats")
    table = [*launcher.LAUNCH_TABLE.values(), launcher.INTERPRETER_LAUNCH]
    for config in [*table, *(config.long for config in table if config.long)]:
        assert config.tile_t <= 256 and config.tile_t % config.block_t == 0
    assert IS_INTERPRETED or torch.cuda.is_available()
