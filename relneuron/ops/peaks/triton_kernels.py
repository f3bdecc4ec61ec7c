"""The Triton kernels of `peaks`, `merge_peaks` and `histogram`, which `triton_launch.py` launches.

Only integers are added atomically, and a peak has one program, so all bits are the reference's.
"""

# What triton.jit compiles is not typed Python.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from relneuron.ops.swiglu_stats.triton_math import (
    SITE_GATE,
    SITE_PRODUCT,
    _act,
    _after,
    _multiply,
    _widen,
)
from relneuron.ops.swiglu_stats.triton_sums import _span

# Numbers and positions are compared without their signs, so that -1, of no peak, is the largest:
# with the other sign, they are in that order.
SIGN_32, SIGN_64 = tl.constexpr(-(2**31)), tl.constexpr(-(2**63))


@triton.jit
def _site_values(
    gate_cells,
    up_cells,  # None = the site needs no up
    mask,
    zero,  # see `_after`
    SITE: tl.constexpr,  # gate, act or product
    ACTIVATION: tl.constexpr,
    PTX: tl.constexpr,
):
    """The values of a block at the site, exactly, as float32; without -0."""
    value = tl.load(gate_cells, mask=mask, other=0.0)
    if SITE != SITE_GATE:
        up = None
        if SITE == SITE_PRODUCT:
            up = tl.load(up_cells, mask=mask, other=0.0)
            value = _after(value, up, zero, PTX)
        value = _act(value, up, None, ACTIVATION, True, PTX)
        if SITE == SITE_PRODUCT:
            value = _multiply(value, up, None, PTX)
    return _widen(value, PTX) + 0.0


@triton.jit
def _keys(values, positions):
    """int64 in the order of peaks, see keys_of in ops/peaks/reference.py."""
    bits = values.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    low = (~positions).to(tl.uint32, bitcast=True).to(tl.int64)
    return (ordered.to(tl.int64) << 32) | low


# A size of 1 would otherwise become a compile-time constant without `.to`.
@triton.jit(do_not_specialize=["S", "first_row"])
def _peaks_kernel(
    values_ptr,  # (S, F) float32
    positions_ptr,  # (S, F) int32
    span_ptr,  # (2, S) int64 from `_span_kernel`, None = one segment has all rows
    gate_ptr,  # (T, F)
    up_ptr,  # (T, F), None = the site needs no up
    segment_ids_ptr,  # (T,) int32
    stride_gt,
    stride_ut,
    T,
    F,
    S,
    first_row,
    SITE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The peaks of one segment and BLOCK_F columns, which join those that are there."""
    segment = tl.program_id(0).to(tl.int64)
    offs_f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask_f = offs_f < F
    offs_t = tl.arange(0, BLOCK_T)
    zero = (S < 0).to(tl.int32)
    best = tl.full([BLOCK_T, BLOCK_F], float("-inf"), tl.float32)
    row = tl.full([BLOCK_T, BLOCK_F], -1, tl.int32)
    first = tl.full([], 0, tl.int64)
    end = first + T
    if span_ptr is not None:
        first, end = _span(span_ptr, segment, T, S)
    for start in range(first, end, BLOCK_T):
        at = start + offs_t  # [BLOCK_T]
        is_mine = at < end
        if span_ptr is not None:
            is_mine = tl.load(segment_ids_ptr + at, mask=is_mine, other=-1) == segment
        mask = is_mine[:, None] & mask_f[None, :]
        gate_cells = gate_ptr + at[:, None] * stride_gt + offs_f[None, :]
        up_cells = None
        if up_ptr is not None:
            up_cells = up_ptr + at[:, None] * stride_ut + offs_f[None, :]
        value = _site_values(gate_cells, up_cells, mask, zero, SITE, ACTIVATION, PTX)
        # Not so of NaN; the first -inf where there is nothing else.
        is_better = mask & ((value > best) | ((value == best) & (row < 0)))
        best = tl.where(is_better, value, best)
        row = tl.where(is_better, at.to(tl.int32)[:, None], row)

    key = tl.max(_keys(best, tl.where(row < 0, -1, row + first_row)), axis=0)  # [BLOCK_F]
    cells = segment * F + offs_f
    old_value = tl.load(values_ptr + cells, mask=mask_f, other=0.0)
    old_position = tl.load(positions_ptr + cells, mask=mask_f, other=0)
    key = tl.maximum(key, _keys(old_value, old_position))
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    tl.store(values_ptr + cells, bits.to(tl.float32, bitcast=True), mask=mask_f)
    tl.store(positions_ptr + cells, ~key.to(tl.int32), mask=mask_f)


@triton.jit(do_not_specialize=["S"])
def _merge_kernel(
    best_value_ptr,  # (G, F, K) float32
    best_number_ptr,  # (G, F, K) int64
    best_position_ptr,  # (G, F, K) int32
    values_ptr,  # (S, F) float32
    positions_ptr,  # (S, F) int32
    numbers_ptr,  # (S,) int64
    group_ids_ptr,  # (S,) int32, None = all in group 0
    S,
    F,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a power of 2
    BLOCK_F: tl.constexpr,
):
    """Puts the peaks of one group into the lists of BLOCK_F neurons, segment after segment."""
    group = tl.program_id(0).to(tl.int64)
    offs_f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask_f = offs_f < F
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    lists = (group * F + offs_f) * K
    cells = lists[:, None] + offs_k  # [BLOCK_F, BLOCK_K]
    is_place = mask_f[:, None] & (offs_k < K)
    at = offs_f - F
    for s in range(S):
        at += F
        is_mine = True
        if group_ids_ptr is not None:
            is_mine = tl.load(group_ids_ptr + s) == group
        if is_mine:
            value = tl.load(values_ptr + at, mask=mask_f, other=0.0) + 0.0
            position = tl.load(positions_ptr + at, mask=mask_f, other=-1)
            last = tl.load(best_value_ptr + lists + (K - 1), mask=mask_f, other=0.0)
            # Most peaks are below the last of the best. Not so of NaN.
            is_open = (position >= 0) & (value >= last)
            if tl.max(is_open.to(tl.int32), axis=0) > 0:
                number = tl.load(numbers_ptr + s)
                v = tl.load(best_value_ptr + cells, mask=is_place, other=0.0)
                n = tl.load(best_number_ptr + cells, mask=is_place, other=-1)
                p = tl.load(best_position_ptr + cells, mask=is_place, other=-1)
                # Of the place before.
                has_previous = is_place & (offs_k > 0)
                v_previous = tl.load(best_value_ptr + cells - 1, mask=has_previous, other=0.0)
                n_previous = tl.load(best_number_ptr + cells - 1, mask=has_previous, other=-1)
                p_previous = tl.load(best_position_ptr + cells - 1, mask=has_previous, other=-1)
                is_lower = (p ^ SIGN_32) <= (position ^ SIGN_32)[:, None]
                is_lower = (n == number) & is_lower
                is_lower = is_lower | ((n ^ SIGN_64) < (number ^ SIGN_64))
                stays = (v > value[:, None]) | ((v == value[:, None]) & is_lower)
                place = tl.sum((stays & is_place).to(tl.int32), axis=1)[:, None]
                is_new = offs_k == place
                # All threads have read before one writes, and the other way round.
                tl.debug_barrier()
                moves = is_place & is_open[:, None] & (offs_k >= place)
                tl.store(
                    best_value_ptr + cells, tl.where(is_new, value[:, None], v_previous), moves
                )
                tl.store(best_number_ptr + cells, tl.where(is_new, number, n_previous), moves)
                tl.store(
                    best_position_ptr + cells,
                    tl.where(is_new, position[:, None], p_previous),
                    moves,
                )
                tl.debug_barrier()


@triton.jit(do_not_specialize=["G", "B"])
def _histogram_kernel(
    counts_ptr,  # (G, F, B) int64
    exponent_ptr,  # (F,) int32
    first_ptr,  # (F,) int32
    gate_ptr,  # (T, F)
    up_ptr,  # (T, F), None = the site needs no up
    group_ids_ptr,  # (T,) int32, None = all tokens in group 0
    stride_gt,
    stride_ut,
    T,
    F,
    G,
    B,
    SITE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PTX: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Counts the values of a tile of TILE_T tokens and BLOCK_F columns."""
    start = tl.program_id(0).to(tl.int64) * TILE_T
    offs_f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask_f = offs_f < F
    zero = (G < 0).to(tl.int32)
    exponent = tl.load(exponent_ptr + offs_f, mask=mask_f, other=0)
    scale = ((127 - exponent) << 23).to(tl.float32, bitcast=True)[None, :]  # 2^-exponent
    first = tl.load(first_ptr + offs_f, mask=mask_f, other=0).to(tl.float32)[None, :]
    last = (B - 1).to(tl.float32)
    for step in range(0, TILE_T, BLOCK_T):
        at = start + step + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        group = tl.zeros([BLOCK_T], tl.int64)
        is_counted = at < T
        if group_ids_ptr is not None:
            group = tl.load(group_ids_ptr + at, mask=is_counted, other=-1).to(tl.int64)
            is_counted = group >= 0
        mask = is_counted[:, None] & mask_f[None, :]
        gate_cells = gate_ptr + at[:, None] * stride_gt + offs_f[None, :]
        up_cells = None
        if up_ptr is not None:
            up_cells = up_ptr + at[:, None] * stride_ut + offs_f[None, :]
        value = _site_values(gate_cells, up_cells, mask, zero, SITE, ACTIVATION, PTX)
        # Bounded first, which changes no bin, so that all are small integers afterwards.
        place = tl.minimum(tl.maximum(value * scale, first - 1.0), first + (last + 1.0))
        place = tl.floor(place)
        # The product of a small negative number may have become -0.
        place = tl.where(value < 0.0, tl.minimum(place, -1.0), place)
        place = tl.minimum(tl.maximum(place - first, 0.0), last)
        cells = counts_ptr + (group[:, None] * F + offs_f[None, :]) * B + place.to(tl.int32)
        one = tl.full([BLOCK_T, BLOCK_F], 1, tl.int64)
        tl.atomic_add(cells, one, mask=mask & (value == value), sem="relaxed")
