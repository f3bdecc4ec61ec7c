"""Instructions that move, choose, compare and convert what is in each thread's registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx import rounding
from tests.ptx.arithmetic import apply, parts_of
from tests.ptx.code import Code, Step, form
from tests.ptx.parse import Instruction, Operand
from tests.ptx.rounding import TYPES, UNSIGNED

Array = np.ndarray[Any, Any]
Function = Callable[..., Array]


# --- moves and choices ---------------------------------------------------------------------------


@form(r"mov\.(pred|[bus](16|32|64)|f32|f64)|cvta(\.to)?\.(global|shared)\.u64")
def _move(code: Code, instruction: Instruction) -> Step:
    kind = parts_of(instruction)[-1]
    destination, source = instruction.operands
    R = code.R
    if isinstance(destination, list):
        return _unpack(code, instruction, destination, source, kind)
    if isinstance(source, list):
        return _pack(code, instruction, source, kind)
    slot = code.use(source, kind)
    put = code.put(destination, kind, instruction)

    def move(mask: Any) -> None:
        value = R[slot]
        value.dtype  # noqa: B018  fails if nothing has written it
        put(value, mask)

    return move


def _unpack(
    code: Code, instruction: Instruction, names: list[str], source: Operand, kind: str
) -> Step:
    n = len(names)
    part = UNSIGNED[int(kind[1:]) // 8 // n]
    R, slot = code.R, code.use(source, kind)
    puts = [
        (at, code.put(name, f"b{8 * np.dtype(part).itemsize}", instruction))
        for at, name in enumerate(names)
        if name != "_"
    ]

    def unpack(mask: Any) -> None:
        parts = np.ascontiguousarray(R[slot]).view(part)
        for at, put in puts:
            put(np.ascontiguousarray(parts[:, at::n]), mask)

    return unpack


def _pack(code: Code, instruction: Instruction, names: list[str], kind: str) -> Step:
    n, size = len(names), int(kind[1:]) // 8
    whole, part = UNSIGNED[size], UNSIGNED[size // n]
    R = code.R
    slots = [code.use(name, f"b{8 * size // n}") for name in names]
    put = code.put(instruction.operands[0], kind, instruction)

    def pack(mask: Any) -> None:
        values = [R[slot] for slot in slots]
        shape = np.broadcast_shapes(*(value.shape for value in values))
        result = np.empty(shape, whole)
        parts = result.view(part)
        for at, value in enumerate(values):
            parts[:, at::n] = value
        put(result, mask)

    return pack


@form(r"selp\.([bsu](16|32|64)|f32|f64)")
def _select(code: Code, instruction: Instruction) -> Step:
    kind = parts_of(instruction)[-1]
    return apply(code, instruction, lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"], kind)


# --- comparisons ---------------------------------------------------------------------------------

_COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _comparison(name: str, kind: str) -> Function:
    is_float = "f" in kind
    if name == "ne":
        if is_float:
            # False where one of them is NaN.
            return lambda a, b: (a < b) | (a > b)
        return np.not_equal
    if name in _COMPARISONS:
        return _COMPARISONS[name]
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    # equ, neu, ltu ...: True where one of them is NaN.
    opposite = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}[name]
    inverse = _comparison(opposite, kind)
    return lambda a, b: ~inverse(a, b)


@form(
    r"setp\.((eq|ne)\.b|(eq|ne|lt|le|gt|ge)\.[us]|(lo|ls|hi|hs)\.u)(16|32|64)"
    r"|setp\.((eq|ne|lt|le|gt|ge)u?|num|nan)\.(f16|f32|f64)"
)
def _set_predicate(code: Code, instruction: Instruction) -> Step:
    _, name, kind = parts_of(instruction)
    return apply(code, instruction, _comparison(name, kind), [kind, kind], "pred")


@form(r"setp\.((eq|ne|lt|le|gt|ge)u?|num|nan)\.f16x2")
def _set_predicates_of_pairs(code: Code, instruction: Instruction) -> Step:
    compare = _comparison(parts_of(instruction)[1], "f16")
    names, *sources = instruction.operands
    R = code.R
    a, b = (code.use(source, "b32") for source in sources)
    puts = [code.put(name, "pred", instruction) for name in str(names).split("|")]

    def step(mask: Any) -> None:
        halves = [rounding.halves_of(R[slot]).view(np.float16) for slot in (a, b)]
        result = compare(*halves)
        for at, put in enumerate(puts):
            put(result[..., at], mask)

    return step


@form(r"set\.(eq|ne|lt|le|gt|ge)\.f32\.f32")
def _set_number(code: Code, instruction: Instruction) -> Step:
    compare = _comparison(parts_of(instruction)[1], "f32")
    return apply(
        code, instruction, lambda a, b: compare(a, b).astype(np.float32), ["f32", "f32"], "f32"
    )


# --- conversions ---------------------------------------------------------------------------------


@form(r"cvt\.[su](8|16|32|64)\.[su](8|16|32|64)")
def _between_integers(code: Code, instruction: Instruction) -> Step:
    _, to, of = parts_of(instruction)
    dtype = TYPES[to]
    return apply(code, instruction, lambda x: x.astype(dtype), [of], to)


@form(r"cvt\.(f32\.f16|f64\.f32|f64\.f16)|cvt\.rn\.(f32\.f64|f(32|64)\.[su](8|16|32|64))")
def _to_float(code: Code, instruction: Instruction) -> Step:
    *_, to, of = parts_of(instruction)
    dtype = TYPES[to]
    return apply(code, instruction, lambda x: x.astype(dtype), [of], to)


@form(r"cvt\.f32\.bf16")
def _of_bf16(code: Code, instruction: Instruction) -> Step:
    return apply(code, instruction, rounding.f32_of_bf16, ["bf16"], "f32")


_NARROWED: dict[str, Function] = {"bf16": rounding.bf16_of, "f16": rounding.f16_of}


@form(r"cvt\.rn\.b?f16\.f32")
def _to_16_bits(code: Code, instruction: Instruction) -> Step:
    return apply(code, instruction, _NARROWED[parts_of(instruction)[-2]], ["f32"], "b16")


@form(r"cvt\.rn\.b?f16x2\.f32")
def _to_pairs(code: Code, instruction: Instruction) -> Step:
    narrow = _NARROWED[parts_of(instruction)[-2].removesuffix("x2")]

    def pair(high: Array, low: Array) -> Array:
        upper = narrow(high).astype(np.uint32) << np.uint32(16)
        return upper | narrow(low)

    return apply(code, instruction, pair, ["f32", "f32"], "b32")


@form(r"cvt\.rna\.tf32\.f32")
def _to_tf32(code: Code, instruction: Instruction) -> Step:
    return apply(code, instruction, rounding.to_tf32, ["b32"], "b32")


_WHOLE: dict[str, Function] = {
    "rzi": np.trunc,
    "rni": np.rint,
    "rmi": np.floor,
    "rpi": np.ceil,
}


@form(r"cvt\.(rzi|rni|rmi|rpi)(\.ftz)?\.f32\.f32|cvt\.(rzi|rni|rmi|rpi)\.f64\.f64")
def _to_whole_float(code: Code, instruction: Instruction) -> Step:
    _, mode, *_, kind = parts_of(instruction)
    function = _WHOLE[mode]
    if "ftz" in parts_of(instruction):
        whole = function
        function = lambda x: whole(rounding.flushed(x))  # noqa: E731
    return apply(code, instruction, function, [kind], kind)


@form(r"cvt\.(rzi|rni|rmi|rpi)(\.ftz)?\.[su](16|32|64)\.(f16|f32|f64)")
def _to_integer(code: Code, instruction: Instruction) -> Step:
    """What is too large becomes the largest or smallest one, NaN becomes 0."""
    _, mode, *_, to, of = parts_of(instruction)
    whole, dtype = _WHOLE[mode], TYPES[to]
    limits = np.iinfo(dtype)  # type: ignore[type-var]

    def convert(x: Array) -> Array:
        wide = whole(x.astype(np.float64))
        above, below = wide >= float(limits.max), wide <= float(limits.min)
        inside = ~(above | below | np.isnan(wide))
        result = np.where(inside, wide, 0.0).astype(dtype)
        if inside.all():
            return result
        result = np.where(above, dtype(limits.max), result)  # type: ignore[call-arg]
        return np.where(below, dtype(limits.min), result).astype(dtype)  # type: ignore[call-arg]

    return apply(code, instruction, convert, [of], to)
