"""Triton kernels that own their sums: moments per group, and responses per prompt.

`triton_launch.py` launches them. One program adds all terms of a result in an
order that depends on shapes and ids only, so the result has the same bits in every run.
"""

# What triton.jit compiles is not typed Python.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from relneuron.ops.swiglu_stats.triton_math import (
    SITE_ACT,
    SITE_GATE,
    SITE_PRODUCT,
    SITE_UP,
    _act,
    _after,
    _exact_activation,
    _multiply,
    _narrow,
    _widen,
)


@triton.jit
def _span_kernel(
    span_ptr,  # (2, N) int64, filled with -1
    ids_ptr,  # (T,) int32
    T,
    N,
    BLOCK: tl.constexpr,
):
    """For each id the largest t of its rows, and the largest T - 1 - t."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + offs_t, mask=offs_t < T, other=-1)
    tl.atomic_max(span_ptr + ids, offs_t, mask=ids >= 0, sem="relaxed")
    tl.atomic_max(span_ptr + N + ids, T - 1 - offs_t, mask=ids >= 0, sem="relaxed")


@triton.jit
def _span(span_ptr, n, T, N):
    """The rows [first, end) among which all rows of id n are; first > end if it has none."""
    return T - 1 - tl.load(span_ptr + N + n), tl.load(span_ptr + n) + 1


@triton.jit(do_not_specialize=["G"])
def _moments_kernel(
    sum_ptr,  # (G, F) float64, the rows of one site; likewise the next three
    sum_sq_ptr,  # (G, F) float64
    max_ptr,  # (G, F) float32
    n_nonfinite_ptr,  # (G, F) int64
    partial_ptr,  # (tiles, G, 4, F) float32 of one site, None = the rows are read
    n_rows_ptr,  # (tiles, G) int32
    span_ptr,  # (2, G) int64 from `_span_kernel`, None = the group may be anywhere
    gate_ptr,  # (T, F)
    up_ptr,  # (T, F), None = the sites are gate and act
    group_ids_ptr,  # (T,) int32, None = all tokens in group 0
    stride_pn,
    stride_gt,
    stride_ut,
    T,
    F,
    G,
    n_tiles,
    SITE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Moments of one site for one group and BLOCK_F columns.

    The partial sums of the tiles, in float64, if they are finite. If not, a value was NaN, infinite
    or has a square beyond float32, and the rows are read again, which also tells which.
    """
    group = tl.program_id(0).to(tl.int64)
    offs_f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask_f = offs_f < F
    offs_t = tl.arange(0, BLOCK_T)
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_F], tl.float64)
    total_sq = tl.zeros([BLOCK_F], tl.float64)
    largest = tl.full([BLOCK_F], float("-inf"), tl.float32)
    n_nonfinite = tl.zeros([BLOCK_F], tl.int64)
    is_finite = False

    if partial_ptr is not None:
        smallest = tl.full([BLOCK_F], float("inf"), tl.float32)
        for tile in range(0, n_tiles, BLOCK_T):
            offs_n = (tile + offs_t).to(tl.int64)
            n_rows = tl.load(n_rows_ptr + offs_n * G + group, mask=offs_n < n_tiles, other=0)
            # Of sorted groups, most tiles have no rows.
            if tl.max(n_rows, axis=0) > 0:
                mask = (n_rows > 0)[:, None] & mask_f[None, :]
                cells = partial_ptr + offs_n[:, None] * stride_pn
                cells += (group * 4 * F + offs_f)[None, :]
                # All loads before the first sum, so that they wait for memory once.
                part_sum = tl.load(cells, mask=mask, other=0.0)  # [BLOCK_T, BLOCK_F]
                cells += F
                part_sum_sq = tl.load(cells, mask=mask, other=0.0)
                cells += F
                part_max = tl.load(cells, mask=mask, other=float("-inf"))
                if SITE == SITE_ACT and not EXACT:
                    cells += F
                    part_min = tl.load(cells, mask=mask, other=float("inf"))
                    smallest = tl.minimum(smallest, tl.min(part_min, axis=0))
                total += tl.sum(part_sum.to(tl.float64), axis=0)
                total_sq += tl.sum(part_sum_sq.to(tl.float64), axis=0)
                largest = tl.maximum(largest, tl.max(part_max, axis=0))
        if SITE == SITE_ACT and not EXACT:
            # They are of gate. act falls and then rises with gate, so its largest value is at one
            # of the two ends; the launcher has checked that for all gates.
            right = _widen(_narrow(_exact_activation(largest, ACTIVATION), dtype, PTX), PTX)
            left = _widen(_narrow(_exact_activation(smallest, ACTIVATION), dtype, PTX), PTX)
            largest = tl.where(largest >= smallest, tl.maximum(right, left), float("-inf"))
        is_finite = tl.max((mask_f & ~(total_sq < float("inf"))).to(tl.int32), axis=0) == 0

    if not is_finite:
        acc_sum = tl.zeros([BLOCK_T, BLOCK_F], tl.float64)
        acc_sum_sq = tl.zeros([BLOCK_T, BLOCK_F], tl.float64)
        acc_max = tl.full([BLOCK_T, BLOCK_F], float("-inf"), tl.float32)
        acc_nonfinite = tl.zeros([BLOCK_T, BLOCK_F], tl.int32)
        first = tl.full([], 0, tl.int64)
        end = first + T
        if span_ptr is not None:
            first, end = _span(span_ptr, group, T, G)
        for row in range(first, end, BLOCK_T):
            at = row + offs_t  # [BLOCK_T]
            is_mine = at < end
            if group_ids_ptr is not None:
                is_mine = tl.load(group_ids_ptr + at, mask=is_mine, other=-1) == group
            if tl.max(is_mine.to(tl.int32), axis=0) > 0:
                live = is_mine[:, None] & mask_f[None, :]
                gate_cells = gate_ptr + at[:, None] * stride_gt + offs_f[None, :]
                gate = tl.load(gate_cells, mask=live, other=0.0)
                up = None
                if up_ptr is not None:
                    up_cells = up_ptr + at[:, None] * stride_ut + offs_f[None, :]
                    up = tl.load(up_cells, mask=live, other=0.0)
                if SITE == SITE_GATE:
                    value = _widen(gate, PTX)
                elif SITE == SITE_UP:
                    value = _widen(up, PTX)
                else:
                    act = _act(gate, up, None, ACTIVATION, True, PTX)
                    if SITE == SITE_PRODUCT:
                        act = _multiply(act, up, None, PTX)
                    value = _widen(act, PTX)
                finite = (value.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
                exact = tl.where(finite, value, 0.0).to(tl.float64)
                acc_sum += exact
                acc_sum_sq += exact * exact
                acc_max = tl.maximum(acc_max, tl.where(finite & live, value, float("-inf")))
                acc_nonfinite += (~finite).to(tl.int32)
        total = tl.sum(acc_sum, axis=0)
        total_sq = tl.sum(acc_sum_sq, axis=0)
        largest = tl.max(acc_max, axis=0)
        n_nonfinite = tl.sum(acc_nonfinite, axis=0).to(tl.int64)

    cells = group * F + offs_f
    total += tl.load(sum_ptr + cells, mask=mask_f, other=0.0)
    tl.store(sum_ptr + cells, total, mask=mask_f)
    total_sq += tl.load(sum_sq_ptr + cells, mask=mask_f, other=0.0)
    tl.store(sum_sq_ptr + cells, total_sq, mask=mask_f)
    # Adding +0 turns -0 into +0.
    largest = tl.maximum(largest + 0.0, tl.load(max_ptr + cells, mask=mask_f, other=0.0))
    tl.store(max_ptr + cells, largest, mask=mask_f)
    n_nonfinite += tl.load(n_nonfinite_ptr + cells, mask=mask_f, other=0)
    tl.store(n_nonfinite_ptr + cells, n_nonfinite, mask=mask_f)


@triton.jit(do_not_specialize=["N"])
def _responses_kernel(
    gate_response_ptr,  # (N, F) float32, None = not asked; likewise the next three
    up_response_ptr,
    act_response_ptr,
    product_response_ptr,
    span_ptr,  # (2, N) int64 from `_span_kernel`
    gate_ptr,  # (T, F)
    up_ptr,  # (T, F), None = the sites are gate and act
    prompt_ids_ptr,  # (T,) int32
    stride_gr,
    stride_ur,
    stride_ar,
    stride_pr,
    stride_gt,
    stride_ut,
    T,
    F,
    N,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Sums over the tokens of one prompt and BLOCK_F columns, added to the row of the prompt."""
    prompt = tl.program_id(0).to(tl.int64)
    offs_f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask_f = offs_f < F
    offs_t = tl.arange(0, BLOCK_T)
    first, end = _span(span_ptr, prompt, T, N)
    nothing = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    gate_sum, up_sum, act_sum, product_sum = nothing, nothing, nothing, nothing
    zero = (N < 0).to(tl.int32)  # see `_after`
    for row in range(first, end, BLOCK_T):
        at = row + offs_t  # [BLOCK_T]
        is_mine = tl.load(prompt_ids_ptr + at, mask=at < end, other=-1) == prompt
        # Rows of other prompts are not read: all their sites are 0.
        mask = is_mine[:, None] & mask_f[None, :]
        gate_cells = gate_ptr + at[:, None] * stride_gt + offs_f[None, :]
        gate = tl.load(gate_cells, mask=mask, other=0.0)
        up = None
        if up_ptr is not None:
            up_cells = up_ptr + at[:, None] * stride_ut + offs_f[None, :]
            up = tl.load(up_cells, mask=mask, other=0.0)
        gate = _after(gate, up, zero, PTX)
        if gate_response_ptr is not None:
            gate_sum += _widen(gate, PTX)
        if up_response_ptr is not None:
            up_sum += _widen(up, PTX)
        if act_response_ptr is not None or product_response_ptr is not None:
            act = _act(gate, up, None, ACTIVATION, EXACT, PTX)
            act_sum += _widen(act, PTX)
            if up_ptr is not None:
                product_sum += _widen(_multiply(act, up, None, PTX), PTX)
    if first < end:
        if gate_response_ptr is not None:
            _add_row(gate_response_ptr + prompt * stride_gr + offs_f, gate_sum, mask_f)
        if up_response_ptr is not None:
            _add_row(up_response_ptr + prompt * stride_ur + offs_f, up_sum, mask_f)
        if act_response_ptr is not None:
            _add_row(act_response_ptr + prompt * stride_ar + offs_f, act_sum, mask_f)
        if product_response_ptr is not None:
            _add_row(product_response_ptr + prompt * stride_pr + offs_f, product_sum, mask_f)


@triton.jit
def _add_row(cells, block, mask_f):
    """Add the rows of a block to one row in memory, which this program owns."""
    old = tl.load(cells, mask=mask_f, other=0.0)
    tl.store(cells, old + tl.sum(block, axis=0), mask=mask_f)
