"""The Triton kernels of `logprob_gain`: sums of p expm1(y) over the vocabulary, and moments.

`ops/logprob_gain/triton_launch.py` launches them. b (neurons, tokens) is what the value vectors
write to the logits and p (sentences, tokens) the probabilities; both have rows of WIDTH tokens,
those past the end with p = 0. A pair of neuron and sentence belongs to one program, which adds up
the tokens in an order that no other pair changes: in float32 over SPAN tokens, in float64 over the
spans.
"""

# What triton.jit compiles is not typed Python.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from relneuron.ops.swiglu_stats.triton_math import LOG2_E, _exp2

# 2^y - 1 = y (LN2 + y (C1 + y (C2 + y (C3 + y C4)))) to 4.5e-7 of itself for |y| <= SMALL, where
# 2^y less 1 would lose more; relative minimax, the first coefficient held.
SMALL = tl.constexpr(0.5)
LN2 = tl.constexpr(0.6931471805599453)
C1 = tl.constexpr(0.24022363126277924)
C2 = tl.constexpr(0.055504657328128815)
C3 = tl.constexpr(0.00966565776616335)
C4 = tl.constexpr(0.0013341140002012253)


@triton.jit
def _exp2_less_1(y, IS_SMALL: tl.constexpr, PTX: tl.constexpr):
    """2^y - 1. IS_SMALL says that all |y| <= SMALL; the result is the same without it."""
    q = tl.fma(y, C4, C3)
    q = tl.fma(q, y, C2)
    q = tl.fma(q, y, C1)
    q = tl.fma(q, y, LN2)
    result = q * y
    if not IS_SMALL:
        result = tl.where(tl.abs(y) <= SMALL, result, _exp2(y, PTX) - 1.0)
    return result


@triton.jit
def _add_tokens(
    b_ptr,  # [NEURONS, 1, 1], or one: where the rows of b begin
    p_ptr,  # [1, SENTENCES, 1]: where the rows of p begin
    z_ptr,  # likewise of z; None without tilt
    t,  # [NEURONS, SENTENCES, 1]: the factors of b times log2(e)
    tilt,  # likewise those of z, or None
    WIDTH,
    IS_SMALL: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    """sum_v p (2^(t b + tilt z) - 1), [NEURONS, SENTENCES] float64."""
    total = tl.zeros([t.shape[0], t.shape[1]], tl.float64)
    for start in range(0, WIDTH, SPAN):
        span = tl.zeros([t.shape[0], t.shape[1], BLOCK], tl.float32)
        for first in range(start, tl.minimum(start + SPAN, WIDTH), BLOCK):
            token = first + tl.arange(0, BLOCK)[None, None, :]
            # All loads before the first use, so that they wait once.
            p = tl.load(p_ptr + token)
            if z_ptr is not None:
                z = tl.load(z_ptr + token)
            y = t * tl.load(b_ptr + token)
            if z_ptr is not None:
                y = tl.fma(tilt, z, y)
            span = tl.fma(p, _exp2_less_1(y, IS_SMALL, PTX), span)
        total += tl.sum(span, axis=2).to(tl.float64)
    return total


@triton.jit
def _sum_pairs(
    b_ptr,
    p_ptr,
    z_ptr,
    t,
    tilt,
    reach,  # [NEURONS, SENTENCES, 1]: no |t b + tilt z| is larger
    WIDTH,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    """`_add_tokens`, without a power of two where none is needed."""
    # Rounding may take a y past its bound by two parts in 2^24.
    if tl.max(reach) <= SMALL * 0.999999:
        total = _add_tokens(b_ptr, p_ptr, z_ptr, t, tilt, WIDTH, True, SPAN, BLOCK, PTX)
    else:
        total = _add_tokens(b_ptr, p_ptr, z_ptr, t, tilt, WIDTH, False, SPAN, BLOCK, PTX)
    return total


@triton.jit(do_not_specialize=["N", "E"])
def _gain_kernel(
    sums_ptr,  # (E, N) float64
    b_ptr,  # (N, WIDTH) float32
    largest_ptr,  # (N,): of |b|
    p_ptr,  # (E, WIDTH) float32
    z_ptr,  # likewise, or None
    z_largest_ptr,  # (E,): of |z|, or None
    t_ptr,  # (E, N) float32
    tilt_ptr,  # likewise, or None
    stride_se,
    stride_te,  # of t and tilt
    N,
    E,
    WIDTH,
    NEURONS: tl.constexpr,
    SENTENCES: tl.constexpr,
    SPAN: tl.constexpr,  # a multiple of BLOCK
    BLOCK: tl.constexpr,  # divides WIDTH
    PTX: tl.constexpr,
):
    """The sums of NEURONS x SENTENCES pairs; what is past the end repeats the last one."""
    n_programs = tl.cdiv(E, SENTENCES)  # of the same neurons: they run at about the same time
    neuron = tl.program_id(0) // n_programs * NEURONS + tl.arange(0, NEURONS)[:, None, None]
    sentence = tl.program_id(0) % n_programs * SENTENCES + tl.arange(0, SENTENCES)[None, :, None]
    is_pair = (neuron < N) & (sentence < E)
    # int64, so that the products with strides cannot overflow.
    neuron = tl.minimum(neuron, N - 1).to(tl.int64)
    sentence = tl.minimum(sentence, E - 1).to(tl.int64)
    t = tl.load(t_ptr + sentence * stride_te + neuron) * LOG2_E
    reach = tl.abs(t) * tl.load(largest_ptr + neuron)
    tilt = None
    if tilt_ptr is not None:
        tilt = tl.load(tilt_ptr + sentence * stride_te + neuron) * LOG2_E
        reach += tl.abs(tilt) * tl.load(z_largest_ptr + sentence)
        z_ptr += sentence * WIDTH
    b_ptr += neuron * WIDTH
    p_ptr += sentence * WIDTH
    total = _sum_pairs(b_ptr, p_ptr, z_ptr, t, tilt, reach, WIDTH, SPAN, BLOCK, PTX)
    cell = sums_ptr + sentence * stride_se + neuron
    tl.store(cell, total[:, :, None], mask=is_pair)


@triton.jit
def _gain_list_kernel(
    sums_ptr,  # (n,) float64, like sentence, t and tilt
    b_ptr,  # (rows of the tile, WIDTH) float32
    largest_ptr,  # (rows of the tile,)
    p_ptr,
    z_ptr,
    z_largest_ptr,
    row_ptr,  # (programs,) int64: the row of the tile
    place_ptr,  # (programs,) int64: the first of the program's pairs
    end_ptr,  # (rows of the tile,) int64: the end of the row's pairs
    sentence_ptr,
    t_ptr,
    tilt_ptr,
    WIDTH,
    SENTENCES: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    """The sums of up to SENTENCES pairs of one neuron."""
    row = tl.load(row_ptr + tl.program_id(0))
    end = tl.load(end_ptr + row)
    pair = tl.load(place_ptr + tl.program_id(0)) + tl.arange(0, SENTENCES)[None, :, None]
    is_pair = pair < end
    pair = tl.minimum(pair, end - 1)
    sentence = tl.load(sentence_ptr + pair).to(tl.int64)
    t = tl.load(t_ptr + pair) * LOG2_E
    reach = tl.abs(t) * tl.load(largest_ptr + row)
    tilt = None
    if tilt_ptr is not None:
        tilt = tl.load(tilt_ptr + pair) * LOG2_E
        reach += tl.abs(tilt) * tl.load(z_largest_ptr + sentence)
        z_ptr += sentence * WIDTH
    b_ptr += row * WIDTH
    p_ptr += sentence * WIDTH
    total = _sum_pairs(b_ptr, p_ptr, z_ptr, t, tilt, reach, WIDTH, SPAN, BLOCK, PTX)
    tl.store(sums_ptr + pair, total[:, :, None], mask=is_pair)


@triton.jit(do_not_specialize=["N", "E", "unit"])
def _gain_moments_kernel(
    second_ptr,  # (spans, N, E) float32: sum of p b^2 over the span's tokens
    third_ptr,  # likewise p b^3
    b_ptr,  # (N, WIDTH) float32
    p_ptr,  # (E, WIDTH) float32
    N,
    E,
    WIDTH,
    unit,  # 1
    NEURONS: tl.constexpr,
    SENTENCES: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The moments of NEURONS x SENTENCES pairs over one span, as products of matrices."""
    n_neurons = tl.cdiv(N, NEURONS)
    n_sentences = tl.cdiv(E, SENTENCES)
    neuron = tl.program_id(0) % n_neurons * NEURONS + tl.arange(0, NEURONS)
    sentence = tl.program_id(0) // n_neurons % n_sentences * SENTENCES + tl.arange(0, SENTENCES)
    span = tl.program_id(0) // n_neurons // n_sentences
    is_pair = (neuron < N)[:, None] & (sentence < E)[None, :]
    neuron = tl.minimum(neuron, N - 1).to(tl.int64)
    sentence = tl.minimum(sentence, E - 1).to(tl.int64)
    b_ptr += neuron[:, None] * WIDTH
    p_ptr += sentence[:, None] * WIDTH
    second = tl.zeros([NEURONS, SENTENCES], tl.float32)
    third = tl.zeros([NEURONS, SENTENCES], tl.float32)
    for first in range(span * SPAN, tl.minimum(span * SPAN + SPAN, WIDTH), BLOCK):
        token = first + tl.arange(0, BLOCK)[None, :]
        b = tl.load(b_ptr + token)
        p = tl.load(p_ptr + token).T
        square = b * b
        # Tensor cores round their sums towards zero, so they only add up a block. The factor, which
        # the compiler takes for any number, keeps it from adding `second` there, too.
        second = tl.fma(tl.dot(square, p, input_precision=PRECISION), unit, second)
        third = tl.fma(tl.dot(square * b, p, input_precision=PRECISION), unit, third)
    cell = (span.to(tl.int64) * N + neuron[:, None]) * E + sentence[None, :]
    tl.store(second_ptr + cell, second, mask=is_pair)
    tl.store(third_ptr + cell, third, mask=is_pair)
