"""Numbers as a GPU has them, in numpy: types and constants, and results as it rounds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.parse import Fault

Array = np.ndarray[Any, Any]

TYPES: dict[str, type[np.generic]] = {
    "pred": np.bool_,
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "tf32": np.uint32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def conversion(
    value: type[np.generic], register: type[np.generic], wanted: type[np.generic]
) -> Callable[[Array], Array] | None:
    """From what an instruction gives, through the register's width, to how it is read."""
    if value is wanted:
        return None
    sizes = [np.dtype(each).itemsize for each in (value, register, wanted)]
    if np.bool_ in (value, wanted):
        raise Fault("a predicate used as a number")
    if sizes[0] == sizes[2]:
        return lambda x: x.view(wanted)
    bits, narrow = UNSIGNED[sizes[0]], UNSIGNED[sizes[2]]
    if sizes[2] < sizes[0]:
        return lambda x: x.view(bits).astype(narrow).view(wanted)
    # A narrow value fills a wide register: by its sign or with zeros.
    is_signed = issubclass(value, np.signedinteger)
    wide = np.dtype(f"i{sizes[2]}") if is_signed else np.dtype(narrow)
    source = value if is_signed else bits
    return lambda x: x.view(source).astype(wide).view(wanted)


def symbol(name: str) -> int:
    """Shared memory begins at 0."""
    base, _, offset = name.partition("+")
    if base != "global_smem":
        raise Fault(f"unknown name {name}")
    return int(offset or "0", 0)


def constant(text: str, dtype: type[np.generic]) -> Array:
    size = np.dtype(dtype).itemsize
    if text[:2] in ("0f", "0F", "0d", "0D"):
        wide = np.float32 if text[1] in "fF" else np.float64
        if np.dtype(wide).itemsize != size:
            raise Fault(f"a constant {text} in place of {np.dtype(dtype).name}")
        bits = int(text[2:], 16)
    elif text[0].isalpha() or text[0] == "_":
        bits = symbol(text)
    else:
        bits = int(text.removesuffix("U"), 0)
    if dtype is np.bool_:
        return np.full((1, 1), bits != 0)
    unsigned = UNSIGNED[size]
    return np.full((1, 1), bits & (1 << 8 * size) - 1, unsigned).view(dtype)


# A float64 whose lower 29 bits are these is half-way between two float32.
_HALF_WAY = np.int64(1 << 28)
_BELOW = np.int64((1 << 29) - 1)
_SMALLEST_NORMAL = 2.0**-126


def round_to_odd(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float64, an inexact one with its last bit set, so that it can be rounded again.

    a * b must be exact in float64.
    """
    product = a * b
    total = product + c
    other = total - product
    error = (product - (total - other)) + (c - other)
    return _set_last_bit(total, error)


def _set_last_bit(value: Array, error: Array) -> Array:
    """`value` + `error` truncated, with the last bit set where it is inexact."""
    bits = value.view(np.int64 if value.dtype == np.float64 else np.int32).copy()
    fix = np.isfinite(value) & (error != 0) & ((bits & 1) == 0)
    # Away from zero where the error has the sign of the value.
    bits += np.where(fix, np.where((error > 0) == (value > 0), 1, -1), 0).astype(bits.dtype)
    return bits.view(value.dtype)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded once."""
    product = a.astype(np.float64) * b.astype(np.float64)
    c = c.astype(np.float64)
    total = product + c
    result = total.astype(np.float32)
    # Rounding twice can only differ half-way between two numbers, or below the normal ones.
    doubtful = (total.view(np.int64) & _BELOW) == _HALF_WAY
    is_small = np.abs(result) < _SMALLEST_NORMAL
    if np.count_nonzero(is_small):
        doubtful |= is_small & (total != 0)
    if np.count_nonzero(doubtful):
        other = total - product
        error = (product - (total - other)) + (c - other)
        if np.count_nonzero(doubtful & (error != 0)):
            return _set_last_bit(total, error).astype(np.float32)
    return result


def fma_f16x2(a: Array, b: Array, c: Array) -> Array:
    """The same for pairs of float16 in words of 32 bits."""
    halves = (halves_of(each).view(np.float16).astype(np.float64) for each in (a, b, c))
    return words_of(f16_of(round_to_odd(*halves)))


def fma_bf16x2(a: Array, b: Array, c: Array) -> Array:
    """And for pairs of bfloat16."""
    if c.size != 1 or int(c.flat[0]) != 0x80008000:
        return _fma_bf16x2(a, b, c)
    # Plus -0: a product, which float32 holds exactly unless it is small.
    low = (a << _16).view(np.float32) * (b << _16).view(np.float32)
    high = (a & _HIGH).view(np.float32) * (b & _HIGH).view(np.float32)
    result = (bf16_of(high).astype(np.uint32) << _16) | bf16_of(low)
    is_small = _is_small(low) | _is_small(high)
    if np.count_nonzero(is_small):
        words = (np.broadcast_to(each, result.shape)[is_small] for each in (a, b, c))
        result[is_small] = _fma_bf16x2(*words)
    return result


def _fma_bf16x2(a: Array, b: Array, c: Array) -> Array:
    halves = (f32_of_bf16(halves_of(each)).astype(np.float64) for each in (a, b, c))
    return words_of(bf16_of_odd(round_to_odd(*halves)))


_16 = np.uint32(16)
_HIGH = np.uint32(0xFFFF0000)


def _is_small(x: Array) -> Array:
    """Whether a product of two bfloat16 may have lost bits in float32."""
    return (np.abs(x) < 2.0**-110) & (x != 0)


def halves_of(words: Array) -> Array:
    """(..., n) uint32 -> (..., n, 2) uint16, the lower one first."""
    words = np.ascontiguousarray(words)
    return words.view(np.uint16).reshape(*words.shape, 2)


def words_of(halves: Array) -> Array:
    return np.ascontiguousarray(halves).view(np.uint32)[..., 0]


def bf16_of(x: Array) -> Array:
    """The bits of the nearest bfloat16 of a float32, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(
        16
    )
    rounded = rounded.astype(np.uint16)
    is_nan = np.isnan(x)
    return np.where(is_nan, np.uint16(0x7FFF), rounded) if np.count_nonzero(is_nan) else rounded


def bf16_of_odd(x: Array) -> Array:
    """Likewise of a float64 that was rounded to odd."""
    narrow = x.astype(np.float32)
    return bf16_of(_set_last_bit(narrow, x - narrow.astype(np.float64)))


def f32_of_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f16_of(x: Array) -> Array:
    """The bits of the nearest float16; NaN as a GPU has it."""
    bits: Array = np.ascontiguousarray(x.astype(np.float16)).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), bits)


def to_tf32(x: Array) -> Array:
    """What cvt.rna.tf32 makes of float32 bits: the nearest one, ties away from zero."""
    special = (x & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    rounded = (x + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(special, x & np.uint32(0xFFFFE000), rounded)


def read_as_tf32(bits: Array) -> Array:
    """What tensor cores read of a float32: its upper 19 bits."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def truncated(x: Array) -> Array:
    """float64 -> float32 towards zero, as tensor cores round their sums."""
    nearest = x.astype(np.float32)
    is_above = np.abs(nearest) > np.abs(x)
    # One step towards zero, for numbers of either sign.
    return (nearest.view(np.int32) - is_above).view(np.float32)


def flushed(x: Array) -> Array:
    """Subnormal float32 become zeros of their sign."""
    is_small = np.abs(x) < np.float32(_SMALLEST_NORMAL)
    return np.where(is_small, np.copysign(np.float32(0), x), x) if np.count_nonzero(is_small) else x


def largest(a: Array, b: Array) -> Array:
    """max of a GPU: of a number and a NaN the number, +0 above -0."""
    result = np.fmax(a, b)
    zeros = result == 0
    return (
        np.where(zeros & (a == b), np.where(np.signbit(a), b, a), result)
        if np.count_nonzero(zeros)
        else result
    )


def smallest(a: Array, b: Array) -> Array:
    result = np.fmin(a, b)
    zeros = result == 0
    return (
        np.where(zeros & (a == b), np.where(np.signbit(a), a, b), result)
        if np.count_nonzero(zeros)
        else result
    )


# exact functions of float64 behind the instructions that approximate them in float32
APPROXIMATE: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1.0 / x,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
}


def moved(x: Array, ulps: int, generator: np.random.Generator) -> Array:
    """Every float32 by at most so many units in its last place, at random; never past zero."""
    if not ulps:
        return x
    steps = generator.integers(-ulps, ulps + 1, x.shape, dtype=np.int32)
    other = (x.view(np.int32) + steps).view(np.float32)
    usable = np.isfinite(x) & (x != 0) & np.isfinite(other) & (np.signbit(other) == np.signbit(x))
    return np.where(usable, other, x)
