"""What `triton_launch.py` computes per element: activations, conversions, rounded products.

Two activations are here: the exact sequence that every backend shares, and a shorter one for h and
sums in bfloat16 and float16. PTX = True is a kernel for an NVIDIA GPU; the other form of each
function is plain Triton, which an AMD GPU and the interpreter run.
"""

# What triton.jit compiles is not typed Python.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from relneuron.ops.swiglu_stats import reference
from relneuron.ops.swiglu_stats.groups import SITES
from relneuron.ops.swiglu_stats.reference import CODES

# The code of a site is its position in SITES.
SITE_GATE, SITE_UP, SITE_ACT, SITE_PRODUCT = (
    tl.constexpr(SITES.index(site)) for site in ("gate", "up", "act", "product")
)
# The code of an activation is its position in CODES.
SILU = tl.constexpr(CODES.index("silu"))
GELU = tl.constexpr(CODES.index("gelu"))
GELU_TANH = tl.constexpr(CODES.index("gelu_tanh"))
RELU2 = tl.constexpr(CODES.index("relu2"))
QUICK = tl.constexpr(CODES.index("quick_gelu"))
TANH = tl.constexpr(CODES.index("tanh"))
RESIDUAL, DIFFERENCE = (tl.constexpr(CODES.index(op)) for op in ("residual", "difference"))

LOG2_E = tl.constexpr(reference.LOG2_E)
LN2_HIGH = tl.constexpr(reference.LN2_HIGH)
LN2_LOW = tl.constexpr(reference.LN2_LOW)
EXP_LOW, EXP_HIGH = (tl.constexpr(c) for c in (reference.EXP_LOW, reference.EXP_HIGH))
SQRT_HALF = tl.constexpr(reference.SQRT_HALF)
GELU_LINEAR = tl.constexpr(reference.GELU_LINEAR)
GELU_CUBIC = tl.constexpr(reference.GELU_CUBIC)
QUICK_GELU = tl.constexpr(reference.QUICK_GELU)
SIGMOID_HIGH = tl.constexpr(reference.SIGMOID_HIGH)
Q0, Q1, Q2, Q3, Q4 = (tl.constexpr(c) for c in reference.EXP_Q)
R0, R1, R2, R3, R4, R5 = (tl.constexpr(c) for c in reference.PHI_R)
P0, P1, P2, P3, P4, P5, P6, P7, P8 = (tl.constexpr(c) for c in reference.ERFC_P)
T0, T1, T2, T3, T4, T5, T6 = (tl.constexpr(c) for c in reference.TANH_P)

# The fast form has powers of 2 for exp(-s): of gelu_tanh 2^(x (EXP2_LINEAR + EXP2_CUBIC x^2)), of
# quick_gelu 2^(x EXP2_QUICK).
EXP2_LINEAR = tl.constexpr(-reference.LOG2_E * reference.GELU_LINEAR)
EXP2_CUBIC = tl.constexpr(-reference.LOG2_E * reference.GELU_CUBIC)
EXP2_QUICK = tl.constexpr(-reference.LOG2_E * reference.QUICK_GELU)


# --------------------------------------------------------------------------------------------------
# Conversions. bfloat16 is converted by its bits where the hardware does not do it: the interpreter
# truncates where a GPU rounds to nearest even, and mistakes subnormal numbers.


@triton.jit
def _widen(x, PTX: tl.constexpr):
    """The float32 of a value, exactly."""
    if x.dtype == tl.bfloat16 and PTX:
        # A pair at a time, so that the pair stays in its register for `_multiply`.
        result = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    elif x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        result = bits.to(tl.float32, bitcast=True)
    else:
        result = x.to(tl.float32)
    return result


@triton.jit
def _after(gate, up, zero, PTX: tl.constexpr):
    """gate, with which nothing can be done before `up` is here, too, if there is one.

    A compiler that sees no use of `up` before the activation is done loads it only then, which
    saves registers, and every step waits for memory twice. It cannot know that `zero` is 0 in
    gate ^ (up & zero), one instruction for 4 bytes. None = both come at once anyhow.
    """
    if up is None:
        pass
    elif PTX and zero is not None and gate.dtype == tl.float32:
        gate = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0x78;",
            "=r,r,r,r",
            [gate, up, zero],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    elif PTX and zero is not None:
        gate = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0x78;",
            "=r,r,r,r,r",
            [gate, up, zero],
            dtype=gate.dtype,
            is_pure=True,
            pack=2,
        )
    elif zero is not None:
        BITS: tl.constexpr = tl.int32 if gate.dtype == tl.float32 else tl.int16
        after = gate.to(BITS, bitcast=True) ^ (up.to(BITS, bitcast=True) & zero.to(BITS))
        gate = after.to(gate.dtype, bitcast=True)
    return gate


@triton.jit
def _narrow(x, dtype: tl.constexpr, PTX: tl.constexpr):
    """float32 -> the nearest value of dtype, ties to even."""
    if dtype == tl.bfloat16 and not PTX:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits, 0x7FC00000)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


_BF16_PRODUCT = tl.constexpr(
    "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }"
)
_FP16_PRODUCT = tl.constexpr("mul.rn.f16x2 $0, $1, $2;")


@triton.jit
def _multiply(a, b, kept, PTX: tl.constexpr):
    """a * b rounded once to their dtype, a without b; +0 where `kept` (int16: 0 or -1) is 0."""
    if PTX and a.dtype != tl.float32 and b is None:
        result = a
        if kept is not None:
            result = tl.inline_asm_elementwise(
                "and.b32 $0, $1, $2;", "=r,r,r", [a, kept], dtype=a.dtype, is_pure=True, pack=2
            )
    elif PTX and a.dtype != tl.float32:
        # A pair per instruction. a * b + -0 is a * b; sm_80 has no other product of bfloat16.
        PRODUCT: tl.constexpr = _BF16_PRODUCT if a.dtype == tl.bfloat16 else _FP16_PRODUCT
        if kept is None:
            result = tl.inline_asm_elementwise(
                PRODUCT, "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2
            )
        else:
            result = tl.inline_asm_elementwise(
                PRODUCT + " and.b32 $0, $0, $3;",
                "=&r,r,r,r",
                [a, b, kept],
                dtype=a.dtype,
                is_pure=True,
                pack=2,
            )
    else:
        if b is None:
            result = a
        elif a.dtype == tl.bfloat16:
            result = _narrow(_widen(a, PTX) * _widen(b, PTX), a.dtype, PTX)
        else:
            result = a * b
        if kept is not None:
            result = tl.where(kept != 0, result, tl.zeros([1, 1], a.dtype))
    return result


@triton.jit
def _add(a, b, kept, PTX: tl.constexpr):
    """a + b rounded once to their dtype, and a where `kept` (int16: 0 or -1) is 0."""
    result = _narrow(_widen(a, PTX) + _widen(b, PTX), a.dtype, PTX)
    if kept is not None:
        result = tl.where(kept != 0, result, a)
    return result


@triton.jit
def _is_above(x, threshold, PTX: tl.constexpr):
    """1.0 where x > threshold, else 0.0 (also for NaN)."""
    if PTX:
        # One instruction; a comparison and a selection are two.
        result = tl.inline_asm_elementwise(
            "set.gt.f32.f32 $0, $1, $2;",
            "=r,r,r",
            [x, threshold],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        result = tl.where(x > threshold, 1.0, 0.0)
    return result


@triton.jit
def _spread_bits(byte, PTX: tl.constexpr):
    """The bits of bytes [rows, n] as int16 [rows, 8 n]: -1 where a bit is set, else 0."""
    # Shifted left by this, a bit is the sign of its byte.
    shift = (7 - tl.arange(0, 8))[None, None, :]
    byte = byte.to(tl.int32)[:, :, None]
    if PTX:
        # The selectors 8 and 12 repeat the signs of two bytes, twice each.
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; shl.b32 a, $1, $3; shl.b32 b, $2, $4; prmt.b32 $0, a, b, 0xcc88; }",
            "=r,r,r,r,r",
            [byte, shift],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    else:
        bits = -(((byte << shift) >> 7) & 1).to(tl.int16)
    return tl.reshape(bits, [byte.shape[0], byte.shape[1] * 8])


# --------------------------------------------------------------------------------------------------
# The exact activation: the fixed sequence of operations of ops/swiglu_stats/reference.py. The
# launcher turns fused multiply-adds off, and div_rn is the IEEE division.


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
def _times_sigmoid(x, s):
    e = _exp(-tl.abs(s))
    part = x * tl.div_rn(e, e + 1.0)
    return tl.where(x > SIGMOID_HIGH, x, tl.where(x > 0.0, x - part, part))


@triton.jit
def _with_sign(size, x):
    """size, which is not negative, with the sign of x."""
    sign = x.to(tl.int32, bitcast=True) & -(2**31)
    return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _exact_activation(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == SILU:
        result = tl.div_rn(x, _exp(-x) + 1.0)
    elif ACTIVATION == GELU_TANH:
        result = _times_sigmoid(x, x * ((x * x) * GELU_CUBIC + GELU_LINEAR))
    elif ACTIVATION == QUICK:
        result = _times_sigmoid(x, x * QUICK_GELU)
    elif ACTIVATION == TANH:
        size = tl.abs(x)
        square = size * size
        p = square * T6 + T5
        p = p * square + T4
        p = p * square + T3
        p = p * square + T2
        p = p * square + T1
        p = p * square + T0
        near = size + size * (square * p)
        e = _exp(size * -2.0)
        far = 1.0 - tl.div_rn(e * 2.0, e + 1.0)
        result = _with_sign(tl.where(size > 1.0, far, near), x)
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
        if ACTIVATION == RELU2:
            result = result * result
    return result


# --------------------------------------------------------------------------------------------------
# The fast activation: within one unit in the last place of torch's for every bfloat16 and float16.


@triton.jit
def _exp2(x, PTX: tl.constexpr):
    if PTX:
        result = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.exp2(x)
    return result


@triton.jit
def _reciprocal(x, PTX: tl.constexpr):
    if PTX:
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = 1.0 / x
    return result


@triton.jit
def _fast_activation(x, weight, ACTIVATION: tl.constexpr, PTX: tl.constexpr):
    """weight * activation(x), but not of relu and relu2; two special functions per value.

    A weight (0.0 or 1.0 per row, None = 1.0) mostly costs nothing, it goes into a constant.
    """
    factor = 1.0 if weight is None else weight
    if ACTIVATION == GELU:
        # The formulas of the exact form, with fused multiply-adds.
        square = x * x
        t = _reciprocal(tl.fma(tl.abs(x), 0.5 * SQRT_HALF, 1.0), PTX)
        p = tl.fma(t, P8, P7)
        p = tl.fma(p, t, P6)
        p = tl.fma(p, t, P5)
        p = tl.fma(p, t, P4)
        p = tl.fma(p, t, P3)
        p = tl.fma(p, t, P2)
        p = tl.fma(p, t, P1)
        p = tl.fma(p, t, P0)
        tail = _exp2(tl.fma(square, -0.5, p) * LOG2_E, PTX) * (t * 0.5)
        q = tl.fma(square, R5, R4)
        q = tl.fma(q, square, R3)
        q = tl.fma(q, square, R2)
        q = tl.fma(q, square, R1)
        q = tl.fma(q, square, R0)
        right = tl.where(x > 1.0, 1.0 - tail, tl.fma(x, q, 0.5))
        result = (x * factor) * tl.where(x < -1.0, tail, right)
    elif ACTIVATION == TANH:
        size = tl.abs(x)
        square = size * size
        p = tl.fma(square, T6, T5)
        p = tl.fma(p, square, T4)
        p = tl.fma(p, square, T3)
        p = tl.fma(p, square, T2)
        p = tl.fma(p, square, T1)
        p = tl.fma(p, square, T0)
        near = tl.fma(size * square, p, size)
        far = tl.fma(_reciprocal(_exp2(size * (2.0 * LOG2_E), PTX) + 1.0, PTX), -2.0, 1.0)
        result = _with_sign(tl.where(size > 1.0, far, near), x)
        if weight is not None:
            result = result * weight
    else:
        # x / (1 + 2^t)
        if ACTIVATION == SILU:
            t = x * -LOG2_E
        elif ACTIVATION == QUICK:
            t = x * EXP2_QUICK
        else:
            t = x * tl.fma(x * x, EXP2_CUBIC, EXP2_LINEAR)
        # The reciprocal flushes subnormal results to zero, and 1 / (1 + 2^t) is one for t > 126.
        # So a quarter of the denominator is inverted; x / 4 is exact for 16-bit x.
        denominator = tl.fma(_exp2(t, PTX), 0.25, 0.25)
        result = (x * (factor * 0.25)) * _reciprocal(denominator, PTX)
    return result


@triton.jit
def _act(gate, up, weight, ACTIVATION: tl.constexpr, EXACT: tl.constexpr, PTX: tl.constexpr):
    """The site act in the dtype of gate, a difference in float32; the fast form times `weight`."""
    x = _widen(gate, PTX)
    if ACTIVATION == DIFFERENCE:
        result = x - _widen(up, PTX)
    elif EXACT:
        result = _narrow(_exact_activation(x, ACTIVATION), gate.dtype, PTX)
    else:
        result = _narrow(_fast_activation(x, weight, ACTIVATION, PTX), gate.dtype, PTX)
    return result
