"""GroupStats, what swiglu_stats refuses, and torch's view of the op: registration, compiling."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from relneuron.ops import GroupStats, swiglu_stats
from relneuron.testing import assert_same_bits
from relneuron.testing.oracle import integers, normal
from tests.ops.swiglu_stats.cases import busy
from tests.ops.swiglu_stats.runs import assert_same_stats, device_of, op


def test_group_stats_merge_and_move() -> None:
    stats = GroupStats(groups=2, width=3, sites=("gate", "up"), moments=True)
    assert stats.max["up"].tolist() == [[-math.inf] * 3] * 2
    stats.count["up"][1, 2] += 5
    assert stats._count[1, 1, 2] == 5, "count[site] is a view"
    copy = stats.to("cpu")
    copy.count["up"].zero_()
    assert stats.count["up"][1, 2] == 5, "to() copies"
    assert (stats + stats).count["up"][1, 2] == 10
    assert stats.count["up"][1, 2] == 5, "+ leaves its operands alone"
    assert GroupStats(groups=1, width=1).sum == {}
    assert "groups=2, width=3, sites=('gate', 'up')" in repr(stats)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 3},
        {"width": 4},
        {"sites": ("up",)},
        {"threshold": 0.5},
        {"moments": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_group_stats_refuse_to_merge_different_ones(change: dict[str, Any]) -> None:
    base: dict[str, Any] = {"groups": 2, "width": 3}
    with pytest.raises(ValueError, match=f"GroupStats: {next(iter(change))} must be equal"):
        GroupStats(**base) + GroupStats(**{**base, **change})
    with pytest.raises(TypeError):
        GroupStats(**base) + 1  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"groups": 0, "width": 1}, "groups must be at least 1, got 0"),
        ({"groups": 1, "width": -1}, "width must be at least 0, got -1"),
        ({"groups": 1, "width": 1, "sites": ()}, "sites must be one or more"),
        ({"groups": 1, "width": 1, "sites": ("act", "act")}, "sites must be one or more"),
        ({"groups": 1, "width": 1, "sites": ("head",)}, "sites must be one or more"),
        ({"groups": 1, "width": 1, "threshold": math.nan}, "threshold must be a number"),
    ],
)
def test_group_stats_errors(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GroupStats(**kwargs)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.floats(allow_nan=False) | st.floats(width=32, allow_nan=False))
def test_threshold_is_the_largest_float32_below(threshold: float) -> None:
    bits = GroupStats(groups=1, width=1, threshold=threshold)._threshold_bits
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    above = torch.nextafter(value, torch.tensor(torch.inf))
    assert float(value) <= threshold
    assert float(above) > threshold or threshold == math.inf


# --------------------------------------------------------------------------------------------------
# Errors


def good_call() -> dict[str, Any]:
    return {
        "gate": torch.zeros(6, 40),
        "up": torch.zeros(6, 40),
        "stats": GroupStats(groups=2, width=40),
        "group_ids": torch.zeros(6, dtype=torch.int32),
        "responses": {"gate": torch.zeros(3, 40)},
        "prompt_ids": torch.zeros(6, dtype=torch.int32),
        "keep": torch.zeros(2, 2, dtype=torch.int32),
        "condition_ids": torch.zeros(6, dtype=torch.int32),
    }


def ids(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


PACKED = torch.zeros(6, 80)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"gate": 3}, "gate and up must be tensors, got int and Tensor"),
    ({"gate": torch.zeros(6, 40, dtype=torch.float64)}, "gate must be .*got .6, 40. float64"),
    ({"gate": torch.zeros(2, 3, 40)}, "gate must be .T, F. .*got .2, 3, 40. float32"),
    (
        {"up": torch.zeros(5, 40)},
        "up must be .T, F. float32 with T=6, F=40 .from gate., got .5, 40",
    ),
    ({"up": torch.zeros(6, 40).bfloat16()}, "up must be .*float32.*got .6, 40. bfloat16"),
    ({"up": torch.zeros(6, 40, device="meta")}, "up must be on cpu .from gate., got meta"),
    ({"up": torch.zeros(40, 6).T}, r"up must be .* last stride 1.* with strides \(1, 6\)"),
    ({"up": torch.zeros(6, 80)[:, ::2]}, "up must be .* last stride 1"),
    ({"gate": torch.zeros(40, 6).T}, "gate must be .* last stride 1"),
    ({"activation": "swish"}, "activation must be one of .*got 'swish'"),
    ({"backend": "cuda"}, "backend must be one of .*got 'cuda'"),
    ({"stats": None}, "group_ids must come with stats"),
    ({"stats": GroupStats(groups=2, width=41)}, "stats must have width F=40 .*got width 41"),
    (
        {"stats": GroupStats(groups=2, width=40, sites=("down",))},
        "stats must have sites among .*got ..down.,.",
    ),
    ({"group_ids": None}, "group_ids must be .T,. int32 with T=6 .*G=2 groups, got None"),
    ({"group_ids": ids(0, 0, 0, 0, 0)}, r"group_ids must be .*T=6 .from gate., got \(5,\) int32"),
    ({"group_ids": ids(*[0] * 6, dtype=torch.int64)}, r"group_ids must be .*got \(6,\) int64"),
    ({"group_ids": ids(*[0] * 12)[::2]}, "group_ids must be .*stride 1"),
    ({"group_ids": ids(0, 0, 2, 0, 0, -5)}, r"group_ids must be in \[-1, 2\).*got 2 at token 2"),
    ({"group_ids": ids(0, -2, 0, 0, 0, 0)}, "group_ids must be .*got -2 at token 1"),
    ({"prompt_ids": ids(0, 0, 0, 0, 0, 3)}, r"in \[-1, 3\) .N=3 from responses., got 3 at token 5"),
    ({"condition_ids": ids(0, 0, -1, 0, 0, 0)}, r"in \[0, 2\) .C=2 from keep., got -1 at token 2"),
    ({"condition_ids": ids(0, 2, 0, 0, 0, 0)}, "condition_ids must be in .*got 2 at token 1"),
    ({"prompt_ids": None}, "responses and prompt_ids must come together"),
    ({"responses": None}, "responses and prompt_ids must come together"),
    ({"responses": {"down": torch.zeros(3, 40)}}, "responses must have keys among"),
    ({"responses": {"gate": torch.zeros(3, 41)}}, r"responses\['gate'\] must be .N, F. .*F=40"),
    ({"responses": {"gate": torch.zeros(3)}}, r"responses\['gate'\] must be .N, F."),
    (
        {"responses": {"gate": torch.zeros(3, 40), "up": torch.zeros(4, 40)}},
        r"responses\['up'\] must be .*N=3",
    ),
    ({"responses": {"up": torch.zeros(1, 40).expand(3, 40)}}, "rows that do not overlap"),
    ({"keep": torch.zeros(2, 1, dtype=torch.int32)}, r"keep must be .*ceil\(F/32\)=2 .*got .2, 1"),
    ({"keep": torch.zeros(0, 2, dtype=torch.int32)}, "keep must be .*C >= 1"),
    ({"keep": torch.zeros(2, 2, dtype=torch.int64)}, "keep must be .*int32.*got .2, 2. int64"),
    ({"keep": torch.zeros(2, 2, dtype=torch.int32).T}, "keep must be contiguous"),
    ({"keep": None}, "condition_ids must come with keep"),
    ({"out": torch.zeros(6, 41)}, "out must be .*T=6, F=40"),
    ({"out": torch.zeros(1, 40).expand(6, 40)}, "out must be .*rows that do not overlap"),
    (
        {"gate": PACKED[:, :40], "up": PACKED[:, 40:], "out": PACKED[:, :40]},
        "out must not share memory with gate",
    ),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("change", "match"), ERRORS, ids=[e[1][:40] for e in ERRORS])
def test_errors(change: dict[str, Any], match: str, backend: str) -> None:
    kwargs = {"backend": backend, **good_call(), **change}
    gate, up = kwargs.pop("gate"), kwargs.pop("up")
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        swiglu_stats(gate, up, **kwargs)
    assert str(caught.value).startswith("swiglu_stats: ")
    # Nothing has been written.
    if kwargs["stats"] is not None:
        assert int(kwargs["stats"].tokens.sum()) == 0


def test_the_good_call_works_and_packed_halves_need_no_copy() -> None:
    kwargs = good_call()
    kwargs["gate"], kwargs["up"] = PACKED[:, :40], PACKED[:, 40:]
    swiglu_stats(kwargs.pop("gate"), kwargs.pop("up"), **kwargs)
    assert kwargs["stats"].tokens.tolist() == [6, 0]


def test_checked_ids_are_not_looked_at() -> None:
    with mock.patch.object(op, "check_ids_range", side_effect=AssertionError("looked")):
        kwargs = good_call()
        swiglu_stats(kwargs.pop("gate"), kwargs.pop("up"), ids_checked=True, **kwargs)


# --------------------------------------------------------------------------------------------------
# torch.compile and the registration


def op_args(backend: str) -> tuple[Any, ...]:
    device = device_of(backend)
    gate, up = normal(6, 40, dtype=torch.bfloat16), normal(6, 40, dtype=torch.bfloat16, seed=1)
    stats = GroupStats(groups=2, width=40, sites=("gate", "act"), moments=True, device=device)
    return (
        gate.to(device),
        up.to(device),
        torch.empty_like(gate, device=device),
        "silu",
        "gate,act",
        0,
        stats._count,
        stats.tokens,
        stats._sum,
        stats._sum_sq,
        stats._max,
        stats._n_nonfinite,
        integers(-1, 2, 6).to(device),
        "gate,up",
        [torch.zeros(3, 40, device=device), torch.zeros(3, 40, device=device)],
        integers(-1, 3, 6).to(device),
        integers(-9, 9, 2, 2).to(device),
        integers(0, 2, 6).to(device),
        False,
        backend.partition("-")[0],
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck(backend: str) -> None:
    torch.library.opcheck(op._swiglu_stats_op, op_args(backend))
    plain = (*op_args(backend)[:6], *[None] * 7, "", [], None, None, None, False, backend)
    torch.library.opcheck(op._swiglu_stats_op, plain)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_gives_the_same(dynamic: bool) -> None:
    gate, up, kwargs = busy()
    ids = kwargs["group_ids"]
    keep = integers(-(2**31), 2**31 - 1, 1, 3)

    def mlp(
        gate: Tensor, up: Tensor, ids: Tensor, stats: GroupStats, responses: dict[str, Tensor]
    ) -> Tensor:
        h = swiglu_stats(
            gate * 2, up, stats=stats, group_ids=ids, keep=keep, responses=responses, prompt_ids=ids
        )
        return h + 1

    def fresh() -> tuple[GroupStats, dict[str, Tensor]]:
        return GroupStats(width=70, **kwargs["stats"]), {"up": torch.zeros(3, 70)}

    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    (stats, responses), (expected_stats, expected_responses) = fresh(), fresh()
    for n_tokens in (24, 13):
        part = (gate[:n_tokens], up[:n_tokens], ids[:n_tokens])
        h = compiled(*part, stats, responses)
        assert_same_bits(h, mlp(*part, expected_stats, expected_responses))
    assert_same_stats(stats, expected_stats)
    assert_same_bits(responses["up"], expected_responses["up"])
    with pytest.raises(ValueError, match="group_ids must be in"):
        compiled(gate, up, ids + 2, stats, responses)
