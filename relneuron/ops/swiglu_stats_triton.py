"""The GPU backend of `swiglu_stats`: Triton kernels, their launcher and the launch table.

`swiglu_stats.py` imports this file when a GPU tensor (or backend="triton") asks for it.
One kernel computes h and the counts; float sums have kernels of their own, in which one program
owns a block of columns and walks the tokens in order, so that no sum depends on timing.
"""

# What triton.jit compiles is not typed Python.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from relneuron.ops import swiglu_stats_reference as reference
from relneuron.ops.swiglu_stats_groups import SITES
from relneuron.ops.swiglu_stats_reference import ACTIVATIONS, Call


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes of the kernels; every program handles whole tiles, the last ones by masks."""

    # h and counts: tokens and columns of a tile, and its warps.
    block_t: int
    block_f: int
    num_warps: int
    # float sums: columns that one program owns.
    walk_block_f: int
    walk_num_warps: int


# By compute capability (major, minor); other GPUs take the default. Not yet measured on any GPU:
# the values are the plain choice of 16 elements per thread, and 128-bit loads of 16-bit elements.
LAUNCH_TABLE: dict[tuple[int, int], LaunchConfig] = {
    (8, 0): LaunchConfig(8, 256, 4, 128, 1),
    (9, 0): LaunchConfig(8, 256, 4, 128, 1),
}
DEFAULT_LAUNCH = LaunchConfig(8, 256, 4, 128, 1)
# The interpreter's cost is per operation, not per element.
INTERPRETER_LAUNCH = LaunchConfig(64, 1024, 4, 1024, 1)

# Codes of sites and activations: positions in SITES and ACTIVATIONS.
SITE_GATE = tl.constexpr(SITES.index("gate"))
SITE_UP = tl.constexpr(SITES.index("up"))
SITE_ACT = tl.constexpr(SITES.index("act"))
SITE_PRODUCT = tl.constexpr(SITES.index("product"))
SILU = tl.constexpr(ACTIVATIONS.index("silu"))
GELU = tl.constexpr(ACTIVATIONS.index("gelu"))
GELU_TANH = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))

LOG2_E = tl.constexpr(reference.LOG2_E)
LN2_HIGH = tl.constexpr(reference.LN2_HIGH)
LN2_LOW = tl.constexpr(reference.LN2_LOW)
EXP_LOW = tl.constexpr(reference.EXP_LOW)
EXP_HIGH = tl.constexpr(reference.EXP_HIGH)
SQRT_HALF = tl.constexpr(reference.SQRT_HALF)
SQRT_2_OVER_PI = tl.constexpr(reference.SQRT_2_OVER_PI)
GELU_CUBIC = tl.constexpr(reference.GELU_CUBIC)
Q0, Q1, Q2, Q3, Q4 = (tl.constexpr(c) for c in reference.EXP_Q)
R0, R1, R2, R3, R4, R5 = (tl.constexpr(c) for c in reference.PHI_R)
P0, P1, P2, P3, P4, P5, P6, P7, P8 = (tl.constexpr(c) for c in reference.ERFC_P)


# The activation: the fixed sequence of operations of swiglu_stats_reference.py. The launcher turns
# fused multiply-adds off, and div_rn is the IEEE division.


@triton.jit
def _exp(x):
    # tl.floor flushes subnormal numbers on a GPU; x * LOG2_E + 0.5 is never one, it is a multiple
    # of 2^-25 where it is near 0.
    x = tl.where(x < EXP_LOW, EXP_LOW, x)
    x = tl.where(x > EXP_HIGH, EXP_HIGH, x)
    n = tl.floor(x * LOG2_E + 0.5)
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    q = r * Q4 + Q3
    q = q * r + Q2
    q = q * r + Q1
    q = q * r + Q0
    y = (q * (r * r) + r) + 1.0
    n = tl.where(n == n, n, 0.0).to(tl.int32)
    half = n >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((n - half + 127) << 23).to(tl.float32, bitcast=True)
    return (y * low) * high


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == SILU:
        result = tl.div_rn(x, _exp(-x) + 1.0)
    elif ACTIVATION == GELU_TANH:
        y = (x + (x * x * x) * GELU_CUBIC) * SQRT_2_OVER_PI
        result = tl.div_rn(x, _exp(y * -2.0) + 1.0)
    elif ACTIVATION == GELU:
        square = x * x
        magnitude = tl.where(x < 0.0, -x, x)
        t = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), (magnitude * SQRT_HALF) * 0.5 + 1.0)
        p = t * P8 + P7
        p = p * t + P6
        p = p * t + P5
        p = p * t + P4
        p = p * t + P3
        p = p * t + P2
        p = p * t + P1
        p = p * t + P0
        tail = (_exp(p - square * 0.5) * t) * 0.5
        q = square * R5 + R4
        q = q * square + R3
        q = q * square + R2
        q = q * square + R1
        q = q * square + R0
        middle = x * q + 0.5
        right = tl.where(x > 1.0, 1.0 - tail, middle)
        result = x * tl.where(x < -1.0, tail, right)
    else:
        result = tl.where(x < 0.0, 0.0, x)
    return result


# bfloat16 is converted by its bits: the interpreter truncates where a GPU rounds to nearest even,
# and mistakes subnormal numbers.


@triton.jit
def _load_float32(ptr, mask):
    x = tl.load(ptr, mask=mask, other=0.0)
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        result = bits.to(tl.float32, bitcast=True)
    else:
        result = x.to(tl.float32)
    return result


@triton.jit
def _round(x, dtype: tl.constexpr):
    """float32 -> the nearest value of dtype (ties to even), as float32."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits, 0x7FC00000)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        result = bits.to(tl.float32, bitcast=True)
    else:
        result = x.to(dtype).to(tl.float32)
    return result


@triton.jit
def _store_rounded(ptr, x, mask):
    """Store float32 values that the element type of ptr holds exactly."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if dtype == tl.bfloat16:
        bits = (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
        tl.store(ptr, bits.to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(ptr, x.to(dtype), mask=mask)


@triton.jit
def _site_value(gate, up, ACTIVATION: tl.constexpr, SITE: tl.constexpr, dtype: tl.constexpr):
    if SITE == SITE_GATE:
        value = gate
    elif SITE == SITE_UP:
        value = up
    else:
        value = _round(_activate(gate, ACTIVATION), dtype)
        if SITE == SITE_PRODUCT:
            value = _round(value * up, dtype)
    return value


@triton.jit
def _add_hits(count_ptr, hits, gid, is_one_group, group, offs_f, mask_f, F):
    """Add hits [BLOCK_T, BLOCK_F] to the rows of count_ptr (G, F) int64 that gid [BLOCK_T] names.

    Integer addition commutes, so the atomics give the same counts in any order.
    """
    if is_one_group:
        n_hits = tl.sum(hits.to(tl.int32), axis=0)  # [BLOCK_F]
        row = count_ptr + group.to(tl.int64) * F
        tl.atomic_add(row + offs_f, n_hits.to(tl.int64), mask=mask_f, sem="relaxed")
    else:
        # Rows that count nowhere have no hits, so their offset is never used.
        cells = count_ptr + gid.to(tl.int64)[:, None] * F + offs_f[None, :]
        tl.atomic_add(cells, hits.to(tl.int64), mask=hits, sem="relaxed")


# A size or bit pattern of 1 would otherwise become a compile-time constant without `.to`.
@triton.jit(do_not_specialize=["G", "threshold_bits"])
def _swiglu_stats_kernel(
    h_ptr,  # (T, F)
    count_ptr,  # (S, G, F) int64, None without statistics
    tokens_ptr,  # (G,) int64
    gate_ptr,  # (T, F)
    up_ptr,  # (T, F)
    group_ids_ptr,  # (T,) int32, None = all tokens in group 0
    keep_ptr,  # (C, W) int32, None without masks
    condition_ids_ptr,  # (T,) int32, None = row 0
    stride_ht,
    stride_gt,
    stride_ut,
    stride_kc,
    T,
    F,
    G,
    threshold_bits,
    ACTIVATION: tl.constexpr,
    GATE_ROW: tl.constexpr,  # position of the site in count_ptr, -1 = not recorded
    UP_ROW: tl.constexpr,
    ACT_ROW: tl.constexpr,
    PRODUCT_ROW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """h and counts of one tile of BLOCK_T tokens and BLOCK_F columns."""
    # int64, so that the products with strides cannot overflow.
    pid_t = tl.program_id(0).to(tl.int64)
    pid_f = tl.program_id(1).to(tl.int64)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    offs_f = pid_f * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask_t = offs_t < T
    mask_f = offs_f < F
    mask = mask_t[:, None] & mask_f[None, :]
    dtype: tl.constexpr = gate_ptr.dtype.element_ty

    gate = _load_float32(gate_ptr + offs_t[:, None] * stride_gt + offs_f[None, :], mask)
    up = _load_float32(up_ptr + offs_t[:, None] * stride_ut + offs_f[None, :], mask)
    act = _round(_activate(gate, ACTIVATION), dtype)  # [BLOCK_T, BLOCK_F]
    product = _round(act * up, dtype)

    if count_ptr is not None:
        if group_ids_ptr is not None:
            gid = tl.load(group_ids_ptr + offs_t, mask=mask_t, other=-1)  # [BLOCK_T]
        else:
            gid = tl.where(mask_t, 0, -1)
        is_counted = gid >= 0
        if pid_f == 0:
            ones = tl.full([BLOCK_T], 1, tl.int64)
            tl.atomic_add(tokens_ptr + gid, ones, mask=is_counted, sem="relaxed")
        group = tl.max(gid, axis=0)
        is_one_group = tl.min(tl.where(is_counted, gid, group), axis=0) == group
        if group >= 0:
            threshold = threshold_bits.to(tl.float32, bitcast=True)
            live = is_counted[:, None] & mask
            site_size = G.to(tl.int64) * F
            if GATE_ROW >= 0:
                cells = count_ptr + GATE_ROW * site_size
                hits = (gate > threshold) & live
                _add_hits(cells, hits, gid, is_one_group, group, offs_f, mask_f, F)
            if UP_ROW >= 0:
                cells = count_ptr + UP_ROW * site_size
                hits = (up > threshold) & live
                _add_hits(cells, hits, gid, is_one_group, group, offs_f, mask_f, F)
            if ACT_ROW >= 0:
                cells = count_ptr + ACT_ROW * site_size
                hits = (act > threshold) & live
                _add_hits(cells, hits, gid, is_one_group, group, offs_f, mask_f, F)
            if PRODUCT_ROW >= 0:
                cells = count_ptr + PRODUCT_ROW * site_size
                hits = (product > threshold) & live
                _add_hits(cells, hits, gid, is_one_group, group, offs_f, mask_f, F)

    if keep_ptr is not None:
        words = keep_ptr + (offs_f // 32)[None, :]
        if condition_ids_ptr is not None:
            condition = tl.load(condition_ids_ptr + offs_t, mask=mask_t, other=0)
            words += condition.to(tl.int64)[:, None] * stride_kc
            word = tl.load(words, mask=mask, other=0)
        else:
            word = tl.load(words, mask=mask_f[None, :], other=0)
        bit = (word >> (offs_f % 32).to(tl.int32)[None, :]) & 1
        product = tl.where(bit != 0, product, 0.0)
    _store_rounded(h_ptr + offs_t[:, None] * stride_ht + offs_f[None, :], product, mask)


@triton.jit
def _moments_kernel(
    sum_ptr,  # (G, F) float64, the rows of one site; likewise the next three
    sum_sq_ptr,  # (G, F) float64
    max_ptr,  # (G, F) float32
    n_nonfinite_ptr,  # (G, F) int64
    gate_ptr,
    up_ptr,
    group_ids_ptr,  # (T,) int32, None = all tokens in group 0
    stride_gt,
    stride_ut,
    T,
    F,
    ACTIVATION: tl.constexpr,
    SITE: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Moments of one site; the program owns BLOCK_F columns and walks the tokens in order.

    While the group stays the same the sums stay in registers. A launch has only F / BLOCK_F
    programs, and the walk waits for each load: correct, and slow for few columns.
    """
    pid_f = tl.program_id(0).to(tl.int64)
    offs_f = pid_f * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask_f = offs_f < F
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    gate_row = gate_ptr + offs_f
    up_row = up_ptr + offs_f
    cells = offs_f  # offsets of the current group's row
    group = tl.full([], -1, tl.int32)
    acc_sum = tl.zeros([BLOCK_F], tl.float64)
    acc_sum_sq = tl.zeros([BLOCK_F], tl.float64)
    acc_max = tl.zeros([BLOCK_F], tl.float32)
    acc_nonfinite = tl.zeros([BLOCK_F], tl.int64)
    for t in range(0, T):
        if group_ids_ptr is not None:
            next_group = tl.load(group_ids_ptr + t)
        else:
            next_group = tl.full([], 0, tl.int32)
        if next_group >= 0:
            if next_group != group:
                if group >= 0:
                    tl.store(sum_ptr + cells, acc_sum, mask=mask_f)
                    tl.store(sum_sq_ptr + cells, acc_sum_sq, mask=mask_f)
                    tl.store(max_ptr + cells, acc_max, mask=mask_f)
                    tl.store(n_nonfinite_ptr + cells, acc_nonfinite, mask=mask_f)
                    # The group may come back, to be loaded by another thread of this program.
                    tl.debug_barrier()
                group = next_group
                cells = group.to(tl.int64) * F + offs_f
                acc_sum = tl.load(sum_ptr + cells, mask=mask_f, other=0.0)
                acc_sum_sq = tl.load(sum_sq_ptr + cells, mask=mask_f, other=0.0)
                acc_max = tl.load(max_ptr + cells, mask=mask_f, other=0.0)
                acc_nonfinite = tl.load(n_nonfinite_ptr + cells, mask=mask_f, other=0)
            gate = _load_float32(gate_row, mask_f)
            up = _load_float32(up_row, mask_f)
            value = _site_value(gate, up, ACTIVATION, SITE, dtype)
            is_finite = (value.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
            finite = tl.where(is_finite, value, 0.0).to(tl.float64)
            acc_sum += finite
            acc_sum_sq += finite * finite
            # Adding +0 turns -0 into +0. The accumulator is never NaN.
            candidate = tl.where(is_finite, value + 0.0, acc_max)
            acc_max = tl.where(candidate > acc_max, candidate, acc_max)
            acc_nonfinite += tl.where(is_finite, 0, 1).to(tl.int64)
        gate_row += stride_gt
        up_row += stride_ut
    if group >= 0:
        tl.store(sum_ptr + cells, acc_sum, mask=mask_f)
        tl.store(sum_sq_ptr + cells, acc_sum_sq, mask=mask_f)
        tl.store(max_ptr + cells, acc_max, mask=mask_f)
        tl.store(n_nonfinite_ptr + cells, acc_nonfinite, mask=mask_f)


@triton.jit
def _responses_kernel(
    response_ptr,  # (N, F) float32
    gate_ptr,
    up_ptr,
    prompt_ids_ptr,  # (T,) int32
    stride_rn,
    stride_gt,
    stride_ut,
    T,
    F,
    ACTIVATION: tl.constexpr,
    SITE: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Responses of one site, walked like the moments (with the same cost)."""
    pid_f = tl.program_id(0).to(tl.int64)
    offs_f = pid_f * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask_f = offs_f < F
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    gate_row = gate_ptr + offs_f
    up_row = up_ptr + offs_f
    cells = offs_f
    prompt = tl.full([], -1, tl.int32)
    acc_sum = tl.zeros([BLOCK_F], tl.float32)
    for t in range(0, T):
        next_prompt = tl.load(prompt_ids_ptr + t)
        if next_prompt >= 0:
            if next_prompt != prompt:
                if prompt >= 0:
                    tl.store(response_ptr + cells, acc_sum, mask=mask_f)
                    tl.debug_barrier()
                prompt = next_prompt
                cells = prompt.to(tl.int64) * stride_rn + offs_f
                acc_sum = tl.load(response_ptr + cells, mask=mask_f, other=0.0)
            gate = _load_float32(gate_row, mask_f)
            up = _load_float32(up_row, mask_f)
            acc_sum += _site_value(gate, up, ACTIVATION, SITE, dtype)
        gate_row += stride_gt
        up_row += stride_ut
    if prompt >= 0:
        tl.store(response_ptr + cells, acc_sum, mask=mask_f)


IS_INTERPRETED = not isinstance(_swiglu_stats_kernel, triton.JITFunction)


@functools.cache
def _launch_config(device: torch.device) -> LaunchConfig:
    return LAUNCH_TABLE.get(torch.cuda.get_device_capability(device), DEFAULT_LAUNCH)


def swiglu_stats_triton(call: Call) -> None:
    """Launch the kernels for one checked call; nothing here waits for the device."""
    if call.gate.shape[0] == 0:
        return
    if IS_INTERPRETED:
        with reference.ieee_arithmetic():
            _launch(call, INTERPRETER_LAUNCH)
    else:
        with torch.cuda.device(call.gate.device):
            _launch(call, _launch_config(call.gate.device))


def _launch(call: Call, config: LaunchConfig) -> None:
    n_tokens, width = call.gate.shape
    activation = ACTIVATIONS.index(call.activation)
    # No fused multiply-adds: each operation rounds once, as in the other backends.
    exact = {"enable_fp_fusion": False}

    def row(site: str) -> int:
        return call.sites.index(site) if site in call.sites else -1

    # One column of tiles also without columns: it counts the tokens.
    grid = (triton.cdiv(n_tokens, config.block_t), max(1, triton.cdiv(width, config.block_f)))
    _swiglu_stats_kernel[grid](
        call.out,
        call.count,
        call.tokens,
        call.gate,
        call.up,
        call.group_ids,
        call.keep,
        call.condition_ids,
        call.out.stride(0),
        call.gate.stride(0),
        call.up.stride(0),
        0 if call.keep is None else call.keep.stride(0),
        n_tokens,
        width,
        0 if call.tokens is None else call.tokens.shape[0],
        call.threshold_bits,
        ACTIVATION=activation,
        GATE_ROW=row("gate"),
        UP_ROW=row("up"),
        ACT_ROW=row("act"),
        PRODUCT_ROW=row("product"),
        BLOCK_T=config.block_t,
        BLOCK_F=config.block_f,
        num_warps=config.num_warps,
        **exact,
    )
    walk_grid = (triton.cdiv(width, config.walk_block_f),)
    if width == 0:
        return
    if call.sum is not None:
        assert call.sum_sq is not None and call.max is not None and call.n_nonfinite is not None
        for index, site in enumerate(call.sites):
            _moments_kernel[walk_grid](
                call.sum[index],
                call.sum_sq[index],
                call.max[index],
                call.n_nonfinite[index],
                call.gate,
                call.up,
                call.group_ids,
                call.gate.stride(0),
                call.up.stride(0),
                n_tokens,
                width,
                ACTIVATION=activation,
                SITE=SITES.index(site),
                BLOCK_F=config.walk_block_f,
                num_warps=config.walk_num_warps,
                **exact,
            )
    for site, response in call.responses.items():
        _responses_kernel[walk_grid](
            response,
            call.gate,
            call.up,
            call.prompt_ids,
            response.stride(0),
            call.gate.stride(0),
            call.up.stride(0),
            n_tokens,
            width,
            ACTIVATION=activation,
            SITE=SITES.index(site),
            BLOCK_F=config.walk_block_f,
            num_warps=config.walk_num_warps,
            **exact,
        )
