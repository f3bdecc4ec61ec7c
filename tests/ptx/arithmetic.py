"""Instructions that compute with each thread's own registers: arithmetic and bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx import rounding
from tests.ptx.code import Code, Mask, Step, form
from tests.ptx.parse import Fault, Instruction, Operand
from tests.ptx.rounding import TYPES, UNSIGNED

Array = np.ndarray[Any, Any]
Function = Callable[..., Array]


def apply(
    code: Code,
    instruction: Instruction,
    function: Function,
    types: list[str],
    result: str,
    operands: list[Operand] | None = None,
) -> Step:
    """destination = function(sources), each source read as its type."""
    destination, *sources = instruction.operands if operands is None else operands
    if len(sources) != len(types):
        raise Fault(f"{instruction.where}: {len(sources)} sources: {instruction.text}")
    R = code.R
    slots = [code.use(source, kind) for source, kind in zip(sources, types, strict=True)]
    put = code.put(destination, result, instruction)
    only = code.temporary(destination, result, instruction)
    if only is not None:
        return _direct(R, only, function, slots)
    if len(slots) == 1:
        (a,) = slots
        return lambda mask: put(function(R[a]), mask)
    if len(slots) == 2:
        a, b = slots
        return lambda mask: put(function(R[a], R[b]), mask)
    a, b, c = slots
    return lambda mask: put(function(R[a], R[b], R[c]), mask)


def _direct(R: list[Any], only: int, function: Function, slots: list[int]) -> Step:
    """The same where the result stands in one place, whatever the mask."""
    a, b, c = (*slots, 0, 0)[:3]

    def one(mask: Mask) -> None:
        R[only] = function(R[a])

    def two(mask: Mask) -> None:
        R[only] = function(R[a], R[b])

    def three(mask: Mask) -> None:
        R[only] = function(R[a], R[b], R[c])

    return (one, two, three)[len(slots) - 1]


def parts_of(instruction: Instruction) -> list[str]:
    return instruction.op.split(".")


def on_pairs(function: Function, kind: type = np.float16) -> Function:
    """For words of two numbers of 16 bits each."""

    def of_words(*words: Array) -> Array:
        halves = [rounding.halves_of(each).view(kind) for each in words]
        return rounding.words_of(np.ascontiguousarray(function(*halves)).view(np.uint16))

    return of_words


_BINARY: dict[str, Function] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_EXTREMES: dict[str, Function] = {"max": np.maximum, "min": np.minimum}
_FLOAT_EXTREMES: dict[str, Function] = {"max": rounding.largest, "min": rounding.smallest}
_BITWISE: dict[str, Function] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


# --- arithmetic ----------------------------------------------------------------------------------


@form(r"(add|sub|mul)(\.rn)?\.(f16|f32|f64)|(add|sub)\.[su](16|32|64)|mul\.lo\.[su](16|32|64)")
def _binary(code: Code, instruction: Instruction) -> Step:
    name, *_, kind = parts_of(instruction)
    return apply(code, instruction, _BINARY[name], [kind, kind], kind)


@form(r"(add|sub|mul)(\.rn)?\.f16x2|add\.[su]16x2")
def _binary_of_pairs(code: Code, instruction: Instruction) -> Step:
    name, *_, kind = parts_of(instruction)
    function = on_pairs(_BINARY[name], np.float16 if kind[0] == "f" else np.uint16)
    return apply(code, instruction, function, ["b32", "b32"], "b32")


@form(r"(max|min)\.([su](16|32|64)|f16|f32|f64)")
def _extreme(code: Code, instruction: Instruction) -> Step:
    name, kind = parts_of(instruction)
    function = (_FLOAT_EXTREMES if kind[0] == "f" else _EXTREMES)[name]
    return apply(code, instruction, function, [kind, kind], kind)


@form(r"(max|min)\.f16x2")
def _extreme_of_pairs(code: Code, instruction: Instruction) -> Step:
    function = on_pairs(_FLOAT_EXTREMES[parts_of(instruction)[0]])
    return apply(code, instruction, function, ["b32", "b32"], "b32")


def _wide(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


@form(r"mul\.wide\.[su](16|32)")
def _wide_product(code: Code, instruction: Instruction) -> Step:
    kind = parts_of(instruction)[-1]
    wide = TYPES[_wide(kind)]
    return apply(
        code,
        instruction,
        lambda a, b: a.astype(wide) * b.astype(wide),
        [kind, kind],
        _wide(kind),
    )


@form(r"mul\.hi\.[su]32")
def _high_product(code: Code, instruction: Instruction) -> Step:
    kind = parts_of(instruction)[-1]
    wide, narrow = TYPES[_wide(kind)], TYPES[kind]

    def high(a: Array, b: Array) -> Array:
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(narrow)  # type: ignore[operator, call-arg]

    return apply(code, instruction, high, [kind, kind], kind)


@form(r"mad\.lo\.[su](16|32|64)")
def _product_and_sum(code: Code, instruction: Instruction) -> Step:
    kind = parts_of(instruction)[-1]
    return apply(code, instruction, lambda a, b, c: a * b + c, [kind] * 3, kind)


@form(r"mad\.wide\.[su](16|32)")
def _wide_product_and_sum(code: Code, instruction: Instruction) -> Step:
    kind = parts_of(instruction)[-1]
    wide = TYPES[_wide(kind)]
    types = [kind, kind, _wide(kind)]
    return apply(
        code,
        instruction,
        lambda a, b, c: a.astype(wide) * b.astype(wide) + c,
        types,
        _wide(kind),
    )


@form(r"fma\.rn\.(f32|bf16x2|f16x2)")
def _fused(code: Code, instruction: Instruction) -> Step:
    kind = parts_of(instruction)[-1]
    function = {
        "f32": rounding.fma32,
        "f16x2": rounding.fma_f16x2,
        "bf16x2": rounding.fma_bf16x2,
    }[kind]
    return apply(code, instruction, function, [kind] * 3, kind)


def _quotient(a: Array, b: Array) -> Array:
    """Towards zero; of a division by zero all bits are set."""
    nonzero = np.where(b == 0, 1, b).astype(b.dtype)
    result = a // nonzero
    if a.dtype.kind == "i":
        result = result + ((result * nonzero != a) & ((a < 0) != (nonzero < 0)))
    return np.where(b == 0, ~np.zeros((), a.dtype), result).astype(a.dtype)


@form(r"div\.rn\.(f32|f64)|(div|rem)\.[su](16|32|64)")
def _division(code: Code, instruction: Instruction) -> Step:
    name, *_, kind = parts_of(instruction)
    function: Function = np.divide if kind[0] == "f" else _quotient
    if name == "rem":
        function = lambda a, b: np.where(b == 0, a, a - _quotient(a, b) * b)  # noqa: E731
    return apply(code, instruction, function, [kind, kind], kind)


@form(r"neg\.(f16|f32|f64|s16|s32|s64)")
def _negative(code: Code, instruction: Instruction) -> Step:
    kind = parts_of(instruction)[-1]
    return apply(code, instruction, np.negative, [kind], kind)


@form(r"abs\.(f32|f64|s16|s32|s64)")
def _magnitude(code: Code, instruction: Instruction) -> Step:
    kind = parts_of(instruction)[-1]
    return apply(code, instruction, np.abs, [kind], kind)


@form(r"sqrt\.rn\.(f32|f64)|rcp\.rn\.(f32|f64)")
def _exact_function(code: Code, instruction: Instruction) -> Step:
    name, _, kind = parts_of(instruction)
    function: Function = np.sqrt if name == "sqrt" else lambda x: (1 / x).astype(x.dtype)
    return apply(code, instruction, function, [kind], kind)


@form(r"(ex2|lg2|rcp|rsqrt|sqrt)\.approx(\.ftz)?\.f32|tanh\.approx\.f32")
def _approximation(code: Code, instruction: Instruction) -> Step:
    name, *modifiers, _ = parts_of(instruction)
    exact = rounding.APPROXIMATE[name]
    is_flushed = "ftz" in modifiers

    def approximate(x: Array) -> Array:
        if is_flushed:
            x = rounding.flushed(x)
        result = exact(x.astype(np.float64)).astype(np.float32)
        result = rounding.moved(result, code.options.ulps, code.random)
        return rounding.flushed(result) if is_flushed else result

    return apply(code, instruction, approximate, ["f32"], "f32")


# --- bits ----------------------------------------------------------------------------------------


@form(r"(and|or|xor)\.(pred|b16|b32|b64)")
def _bitwise(code: Code, instruction: Instruction) -> Step:
    name, kind = parts_of(instruction)
    return apply(code, instruction, _BITWISE[name], [kind, kind], kind)


@form(r"not\.(pred|b16|b32|b64)")
def _inverse(code: Code, instruction: Instruction) -> Step:
    kind = parts_of(instruction)[-1]
    return apply(code, instruction, np.invert, [kind], kind)


@form(r"popc\.b(32|64)")
def _count_bits(code: Code, instruction: Instruction) -> Step:
    kind = parts_of(instruction)[-1]
    return apply(code, instruction, lambda x: np.bitwise_count(x).astype(np.uint32), [kind], "u32")


@form(r"(shl\.b|shr\.[bus])(16|32|64)")
def _shift(code: Code, instruction: Instruction) -> Step:
    name, kind = parts_of(instruction)
    bits = int(kind[1:])
    is_signed = kind[0] == "s"

    def shift(x: Array, n: Array) -> Array:
        if n.size == 1 and int(n.flat[0]) < bits:
            one = x.dtype.type(n.flat[0])
            return x << one if name == "shl" else x >> one
        # More than all bits is as much as all.
        limited = np.minimum(n, bits - 1).astype(x.dtype)
        result = x << limited if name == "shl" else x >> limited
        if is_signed or n.max() < bits:
            return result
        return np.where(n >= bits, x.dtype.type(0), result)

    return apply(code, instruction, shift, [kind, "u32"], kind)


@form(r"shf\.[lr]\.(wrap|clamp)\.b32")
def _funnel_shift(code: Code, instruction: Instruction) -> Step:
    _, direction, mode, _ = parts_of(instruction)

    def shift(low: Array, high: Array, n: Array) -> Array:
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        n = (n & np.uint32(31) if mode == "wrap" else np.minimum(n, 32)).astype(np.uint64)
        moved = (both << n) >> np.uint64(32) if direction == "l" else both >> n
        return moved.astype(np.uint32)

    return apply(code, instruction, shift, ["b32", "b32", "u32"], "b32")


@form(r"bfe\.[su](32|64)")
def _extract_bits(code: Code, instruction: Instruction) -> Step:
    kind = parts_of(instruction)[-1]
    bits = int(kind[1:])

    def extract(x: Array, start: Array, length: Array) -> Array:
        if length.size > 1 or start.size > 1 or int(length.flat[0]) == 0:
            raise Fault(f"{instruction.where}: only of a constant number of bits")
        # To the top and back, which repeats the sign.
        back = bits - min(int(length.flat[0]), bits)
        up = max(0, back - int(start.flat[0]))
        left = x.view(UNSIGNED[bits // 8]) << UNSIGNED[bits // 8](up)
        return left.view(x.dtype) >> x.dtype.type(back)

    return apply(code, instruction, extract, [kind, "u32", "u32"], kind)


@form(r"prmt\.b32")
def _permute_bytes(code: Code, instruction: Instruction) -> Step:
    def permute(a: Array, b: Array, selector: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.zeros(1, np.uint32)
        for place in range(4):
            chosen = (selector >> np.uint32(4 * place)) & np.uint32(15)
            byte = (
                both >> ((chosen & np.uint32(7)) << np.uint32(3)).astype(np.uint64)
            ) & np.uint64(255)
            # Bit 3 asks for the sign of the byte in all of its bits.
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(chosen & np.uint32(8), sign, byte).astype(np.uint32)
            result = result | (byte << np.uint32(8 * place))
        return result

    return apply(code, instruction, permute, ["b32", "b32", "b32"], "b32")


@form(r"lop3\.b32")
def _logic_of_three(code: Code, instruction: Instruction) -> Step:
    table = int(str(instruction.operands[-1]), 0)

    def logic(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros((1, 1), np.uint32)
        for case in range(8):
            if table >> case & 1:
                x, y = (a if case & 4 else ~a), (b if case & 2 else ~b)
                result = result | (x & y & (c if case & 1 else ~c))
        return result

    return apply(code, instruction, logic, ["b32"] * 3, "b32", operands=instruction.operands[:-1])
