"""Calls of swiglu_stats for its tests: named, drawn and exhaustive ones, and an oracle for them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from relneuron.ops import ACTIVATIONS, SITES, GroupStats
from relneuron.ops.swiglu_stats import reference
from relneuron.testing import assert_same_bits
from relneuron.testing import oracle as data
from relneuron.testing.oracle import integers, normal
from tests.ops.swiglu_stats.runs import Result

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


THRESHOLDS = (
    0.0,
    -0.0,
    0.1,
    -1.0,
    1e-45,
    -1e-45,
    1e-7,
    65504.0,
    1e300,
    -1e300,
    math.inf,
    -math.inf,
)


def all_patterns(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(1, 65536): every 16-bit pattern once; for float32 as many random bit patterns."""
    if dtype == torch.float32:
        special = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, torch.inf, -torch.inf, torch.nan]
        bits = integers(-(2**31), 2**31 - 1, 65536, seed=seed).view(torch.float32)
        bits[: len(special)] = torch.tensor(special)
        # A quarter where the activations are neither 0 nor the identity.
        bits[32768:49152] = normal(16384, dtype=dtype, seed=seed, scale=6.0)
        return bits.view(1, 65536)
    return data.all_patterns(dtype, seed)


# --------------------------------------------------------------------------------------------------
# An oracle written from the spec, in float64 and one group at a time


def oracle(result: Result, gate: Tensor, up: Tensor | None, ids: Tensor, activation: str) -> None:
    """Check counts, tokens and moments of one fresh call against the definition."""
    stats = result.stats
    assert stats is not None
    call_values = {
        "gate": gate,
        "act": reference._activation(gate.float(), activation).to(gate.dtype),
    }
    if up is not None:
        call_values["up"] = up
        call_values["product"] = (call_values["act"].float() * up.float()).to(gate.dtype)
    check_values(stats, call_values, ids)


def check_values(stats: GroupStats, call_values: dict[str, Tensor], ids: Tensor) -> None:
    """Of the values (T, F) at each site; sums in the order of the tokens."""
    for group in range(stats.groups):
        rows = [t for t, at in enumerate(ids.tolist()) if at == group]
        assert int(stats.tokens[group]) == len(rows)
        for site in stats.sites:
            value = call_values[site][rows].double()
            finite = value.isfinite()
            hits = (value > stats.threshold).sum(0)
            assert_same_bits(stats.count[site][group], hits, f"count[{site}]")
            if not stats.moments:
                continue
            assert_same_bits(stats.n_nonfinite[site][group], (~finite).sum(0), "n_nonfinite")
            kept = torch.where(finite, value, -torch.inf)
            largest = kept.amax(0) if rows else torch.full((stats.width,), -torch.inf)
            torch.testing.assert_close(
                stats.max[site][group].double(), largest.double(), rtol=0, atol=0
            )
            total, total_sq = torch.zeros(2, stats.width, dtype=torch.float64)
            for row, ok in zip(value, finite, strict=True):
                total = total + torch.where(ok, row, 0.0)
                total_sq = total_sq + torch.where(ok, row * row, 0.0)
            assert_same_bits(stats.sum[site][group], total, f"sum[{site}]")
            assert_same_bits(stats.sum_sq[site][group], total_sq, f"sum_sq[{site}]")


# --------------------------------------------------------------------------------------------------
# Named cases


def strided(rows: int, columns: int, dtype: torch.dtype, seed: int, offset: int) -> Tensor:
    """A slice of a larger tensor: long rows, an odd start."""
    return normal(rows + 2, columns * 2 + 9, dtype=dtype, seed=seed)[
        1 : rows + 1, offset : offset + columns
    ]


CASES = (
    "one",
    "ragged",
    "tile_minus_1",
    "tile_plus_1",
    "empty",
    "no_columns",
    "single_group",
    "all_masked",
    "strided",
    "wide",
)


def case(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """gate, up and the keyword arguments of `run`."""
    n_tokens, width, groups = {
        "one": (1, 1, 1),
        "ragged": (257, 1003, 5),
        "tile_minus_1": (7, 255, 2),
        "tile_plus_1": (9, 257, 2),
        "empty": (0, 40, 3),
        "no_columns": (5, 0, 3),
        "single_group": (33, 64, 1),
        "all_masked": (33, 96, 3),
        "strided": (21, 77, 4),
        "wide": (3, 14336, 2),
    }[name]
    if name == "strided":
        gate = strided(n_tokens, width, dtype, 1, 3)
        up = strided(n_tokens, width, dtype, 2, 40)
    else:
        gate = normal(n_tokens, width, dtype=dtype, seed=1)
        up = normal(n_tokens, width, dtype=dtype, seed=2)
    keep = integers(-(2**31), 2**31 - 1, 3, (width + 31) // 32, seed=3)
    kwargs: dict[str, Any] = {
        "stats": {"groups": groups, "sites": SITES, "moments": True, "threshold": 0.1},
        "group_ids": integers(-1, groups, n_tokens, seed=4),
        "response_sites": ("gate", "product"),
        "n_prompts": 4,
        "prompt_ids": integers(-1, 4, n_tokens, seed=5),
        "keep": keep,
        "condition_ids": integers(0, 3, n_tokens, seed=6),
    }
    if name == "single_group":
        del kwargs["group_ids"], kwargs["condition_ids"]
    if name == "all_masked":
        kwargs["group_ids"] = torch.full((n_tokens,), -1, dtype=torch.int32)
        kwargs["keep"] = torch.zeros_like(keep)
    return gate, up, kwargs


def busy(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A case with three groups and all statistics."""
    gate, up = normal(24, 70, dtype=dtype, seed=7), normal(24, 70, dtype=dtype, seed=8)
    kwargs: dict[str, Any] = {
        "stats": {"groups": 3, "sites": SITES, "moments": True},
        "group_ids": integers(-1, 3, 24, seed=9),
    }
    return gate, up, kwargs


def keep_mask(kwargs: dict[str, Any], n_tokens: int, width: int) -> Tensor:
    """Bit f % 32 of word f // 32, by numpy: in little-endian bytes that is bit f of the row."""
    words = kwargs["keep"].numpy().astype("<i4").view(np.uint8)
    bits = np.unpackbits(words, axis=1, bitorder="little")[:, :width].astype(bool)
    rows = kwargs.get("condition_ids", torch.zeros(n_tokens, dtype=torch.int32)).numpy()
    return torch.from_numpy(bits[rows])


# --------------------------------------------------------------------------------------------------
# Drawn ones


FLOATS = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 0.5, 1e30, -1e30]) | st.sampled_from(
    [torch.nan, torch.inf, -torch.inf]
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    n_tokens, width = draw(st.integers(0, 12)), draw(st.sampled_from([1, 2, 31, 33, 64, 70]))
    dtype = draw(st.sampled_from(DTYPES))
    groups, conditions, n_prompts = (draw(st.integers(1, 4)) for _ in range(3))
    seed = draw(st.integers(0, 2**20))
    is_gated = draw(st.sampled_from([True, True, False]))
    known = SITES if is_gated else ("gate", "act")

    def matrix(seed: int) -> Tensor:
        layout = draw(st.sampled_from(["plain", "slice", "expanded", "overlapping"]))
        base = normal(n_tokens + 2, width + 40, dtype=dtype, seed=seed)
        for _ in range(draw(st.integers(0, 3))):
            base[draw(st.integers(0, n_tokens + 1)), draw(st.integers(0, width + 39))] = draw(
                FLOATS
            )
        if layout == "plain":
            return base[:n_tokens, :width].contiguous()
        if layout == "expanded":
            return base[:1, 5 : 5 + width].expand(n_tokens, width)
        if layout == "overlapping":
            return (
                base.as_strided((n_tokens, width), (3, 1), 1)
                if n_tokens < 10
                else base[:-2, :width]
            )
        return base[2:, 7 : 7 + width]

    kwargs: dict[str, Any] = {
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "stats": {
            "groups": groups,
            "sites": tuple(draw(st.permutations(known))[: draw(st.integers(1, 4))]),
            "moments": draw(st.booleans()),
            "threshold": draw(st.sampled_from([0.0, 0.1, -1e-45, -math.inf, 1e39])),
        },
        "group_ids": integers(-1, groups, n_tokens, seed=seed),
    }
    if draw(st.booleans()):
        kwargs["group_ids"] = kwargs["group_ids"].sort().values
    if draw(st.booleans()):
        kwargs["keep"] = integers(-(2**31), 2**31 - 1, conditions, (width + 31) // 32, seed=seed)
        if draw(st.booleans()):
            kwargs["condition_ids"] = integers(0, conditions, n_tokens, seed=seed + 1)
    if draw(st.booleans()):
        kwargs["response_sites"] = tuple(draw(st.permutations(known))[: draw(st.integers(1, 3))])
        kwargs["n_prompts"] = n_prompts
        kwargs["prompt_ids"] = integers(-1, n_prompts, n_tokens, seed=seed + 2)
    return matrix(seed + 3), matrix(seed + 4) if is_gated else None, kwargs
