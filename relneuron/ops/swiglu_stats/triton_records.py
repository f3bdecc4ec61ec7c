"""What a program of `_swiglu_stats_kernel` records of one site, until it flushes a run of rows.

A record is a tuple of five [BLOCK_T, BLOCK_F]: hits (float32, exact below 2^24), sum, sum of
squares, largest and smallest. They stay in registers for a whole run; only `_flush` adds up over
the rows of the block. Registers are what limits the programs that fit, so nothing is kept twice:
gate and up, act and product share hits, and the site act in the fast form, whose extremes are those
of gate, leaves the highest to gate.
"""

# What triton.jit compiles is not typed Python.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

# A hit of the second site of two that share a number of hits, exact below 2^24: a tile has up to
# 256 tokens.
SECOND = tl.constexpr(4096)


@triton.jit
def _nothing(BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    zero = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    return zero, zero, zero, zero - float("inf"), zero + float("inf")


@triton.jit
def _count(record, is_hit, weight, UNIT: tl.constexpr):
    """Add a block of hits. A weight [BLOCK_T, 1] is 0.0 for a row that only repeats another."""
    hits, total, total_sq, highest, lowest = record
    unit = UNIT if weight is None else weight * UNIT
    hits = tl.fma(is_hit, unit, hits)
    return hits, total, total_sq, highest, lowest


@triton.jit
def _record(
    record,
    value,
    extreme,
    weight,
    MOMENTS: tl.constexpr,
    HIGHEST: tl.constexpr = True,
    LOWEST: tl.constexpr = False,
):
    """Add a block of values. HIGHEST and LOWEST say which of the two are kept."""
    hits, total, total_sq, highest, lowest = record
    if MOMENTS:
        weighted = value
        if weight is not None:
            weighted = value * weight
        total += weighted
        total_sq = tl.fma(weighted, value, total_sq)
        # Of a number and a NaN these give the number.
        if HIGHEST:
            highest = tl.maximum(highest, extreme)
        if LOWEST:
            lowest = tl.minimum(lowest, extreme)
    return hits, total, total_sq, highest, lowest


@triton.jit
def _hits_of_two(first, second, FIRST_ROW: tl.constexpr, SECOND_ROW: tl.constexpr):
    """(hits of one site, of the other) [BLOCK_F] int32, over the rows of the block."""
    n_first = tl.sum(first[0], axis=0).to(tl.int32)
    if FIRST_ROW >= 0 and SECOND_ROW >= 0:
        n_second = n_first // SECOND
        n_first = n_first % SECOND
    else:
        n_second = tl.sum(second[0], axis=0).to(tl.int32)
    return n_first, n_second


@triton.jit
def _flush(
    record,
    n_hits,
    count_cells,
    partial_cells,
    mask_f,
    F,
    MOMENTS: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """Add the hits of a run to its group, and store its moments (4, F) for `_moments_kernel`."""
    _, total, total_sq, highest, lowest = record
    n_hits = n_hits.to(tl.int64)
    # Integer addition commutes, so the atomics give the same counts in any order.
    tl.atomic_add(count_cells, n_hits, mask=mask_f & (n_hits > 0), sem="relaxed")
    if MOMENTS:
        tl.store(partial_cells, tl.sum(total, axis=0), mask=mask_f)
        partial_cells += F
        tl.store(partial_cells, tl.sum(total_sq, axis=0), mask=mask_f)
        partial_cells += F
        tl.store(partial_cells, tl.max(highest, axis=0), mask=mask_f)
        if LOWEST:
            partial_cells += F
            tl.store(partial_cells, tl.min(lowest, axis=0), mask=mask_f)
