"""Instructions of whole warps: shuffles, reductions, and products of matrices with their loads."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.access import Place
from tests.ptx.arithmetic import parts_of
from tests.ptx.code import Code, Mask, Step, form
from tests.ptx.parse import Fault, Instruction, Operand
from tests.ptx.rounding import TYPES, read_as_tf32, truncated

Array = np.ndarray[Any, Any]
_LANE = np.arange(32)


def _names(operand: Operand, n: int, where: str) -> list[str]:
    names = operand if isinstance(operand, list) else [operand]
    if len(names) != n or not all(isinstance(name, str) for name in names):
        raise Fault(f"{where}: {operand} in place of {n} registers")
    return [str(name) for name in names]


@form(r"ret|exit|bra(\.uni)?|bar\.sync|bar\.warp\.sync|fence\.acq_rel\.(cta|gpu)|membar\.(cta|gl)")
def _nothing(code: Code, instruction: Instruction) -> Step:
    """What ends a block is done by the machine; threads of a warp run together anyway."""
    if instruction.op != "bar.warp.sync":
        return lambda mask: None
    return lambda mask: code.together(mask, instruction.where)


# --- shuffles and reductions ---------------------------------------------------------------------


def _source_lanes(mode: str, by: Array, clamp: Array) -> tuple[Array, Array]:
    """(the lane that each lane reads, whether it is one of its segment)."""
    segment = (clamp >> 8) & 31
    first = _LANE & segment
    last = first | (clamp & 31 & ~segment)
    if mode == "up":
        lane = _LANE - by
        inside = lane >= last
    else:
        lane = {"bfly": _LANE ^ by, "down": _LANE + by, "idx": first | (by & 31 & ~segment)}[mode]
        inside = lane <= last
    return np.where(inside, lane, _LANE), inside


@form(r"shfl\.sync\.(bfly|up|down|idx)\.b32")
def _shuffle(code: Code, instruction: Instruction) -> Step:
    mode = parts_of(instruction)[2]
    names, source, by, clamp, members = instruction.operands
    if members != "-1" and members != "0xffffffff":
        raise Fault(f"{instruction.where}: of some lanes only: {instruction.text}")
    name, _, inside_name = str(names).partition("|")
    R, value_slot = code.R, code.use(source, "b32")
    by_slot, clamp_slot = code.use(by, "s32"), code.use(clamp, "s32")
    put = code.put(name, "b32", instruction)
    put_inside = code.put(inside_name or "_", "pred", instruction)
    is_constant = not str(by).startswith("%") and not str(clamp).startswith("%")
    where = instruction.where
    if is_constant and mode == "bfly" and not inside_name and clamp == "31":
        flip = int(str(by), 0)

        def butterfly(mask: Mask) -> None:
            code.together(mask, where)
            value = R[value_slot]
            if value.shape[1] == 1:
                put(value, mask)
                return
            pairs = value.reshape(value.shape[0], -1, 2, flip)
            put(np.ascontiguousarray(pairs[:, :, ::-1]).reshape(value.shape), mask)

        if flip in (1, 2, 4, 8, 16):
            return butterfly

    def shuffle(mask: Mask) -> None:
        code.together(mask, where)
        value = code.full(R[value_slot])
        lanes = [np.broadcast_to(R[slot], code.shape) for slot in (by_slot, clamp_slot)]
        lane, inside = _source_lanes(mode, *(each.reshape(code.shape[0], -1, 32) for each in lanes))
        taken = np.take_along_axis(value.reshape(code.shape[0], -1, 32), lane, 2)
        put(taken.reshape(code.shape), mask)
        put_inside(inside.reshape(code.shape), mask)

    return shuffle


_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "add": np.add.reduce,
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


@form(r"redux\.sync\.((add|min|max)\.[su]32|(and|or|xor)\.b32)")
def _reduce(code: Code, instruction: Instruction) -> Step:
    _, _, name, kind = parts_of(instruction)
    destination, source, members = instruction.operands
    R, slot, all_lanes = code.R, code.use(source, kind), code.use(members, "u32")
    put = code.put(destination, kind, instruction)
    dtype, function = TYPES[kind], _REDUCTIONS[name]

    def reduce(mask: Mask) -> None:
        code.together(mask, instruction.where)
        if _any(R[all_lanes] != 0xFFFFFFFF, mask):
            raise Fault(f"{instruction.where}: of some lanes only")
        value = R[slot]
        if value.shape[1] == 1:
            value = np.broadcast_to(value, (value.shape[0], code.n_threads))
        lanes = np.ascontiguousarray(value).reshape(value.shape[0], -1, 32)
        result = function(lanes, axis=2, dtype=dtype)
        put(np.repeat(result, 32, axis=1), mask)

    return reduce


# --- matrices of shared memory -------------------------------------------------------------------


def _warps(code: Code, value: Array) -> Array:
    """[programs, warps, 32]"""
    return code.full(value).reshape(code.shape[0], -1, 32)


@form(r"ldmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16")
def _load_matrices(code: Code, instruction: Instruction) -> Step:
    parts = parts_of(instruction)
    n = int(parts[4][1:])
    destination, source = instruction.operands
    puts = [
        code.put(name, "b32", instruction) for name in _names(destination, n, instruction.where)
    ]
    address, place = code.address(source), Place(code, instruction, 16, 16)

    def load(mask: Mask) -> None:
        code.together(mask, instruction.where)
        shape, chosen, at = _rows(code, place, address(), mask, n)
        data = np.zeros((*shape, 8), np.uint16)
        loaded = place.load(at, shape, chosen).view(np.uint16).reshape(-1, 8)
        data[np.True_ if chosen is None else chosen] = loaded.reshape(
            data.shape if chosen is None else loaded.shape
        )
        # Lane 8 i + r brings row r of matrix i.
        matrices = data.reshape(shape[0], -1, 4, 8, 8)
        if "trans" in parts:
            matrices = matrices.swapaxes(3, 4)
        for number, put in enumerate(puts):
            # A lane has two neighbours of a row.
            words = np.ascontiguousarray(matrices[:, :, number]).view(np.uint32)
            put(words.reshape(code.shape), mask)

    return load


@form(r"stmatrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16")
def _store_matrices(code: Code, instruction: Instruction) -> Step:
    parts = parts_of(instruction)
    n = int(parts[4][1:])
    target, source = instruction.operands
    R = code.R
    slots = [code.use(name, "b32") for name in _names(source, n, instruction.where)]
    address, place = code.address(target), Place(code, instruction, 16, 16)

    def store(mask: Mask) -> None:
        code.together(mask, instruction.where)
        matrices = np.zeros((code.shape[0], code.n_threads // 32, 4, 8, 8), np.uint16)
        for number, slot in enumerate(slots):
            words = _warps(code, R[slot]).view(np.uint16).reshape(*matrices.shape[:2], 8, 8)
            matrices[:, :, number] = words.swapaxes(2, 3) if "trans" in parts else words
        shape, chosen, at = _rows(code, place, address(), mask, n)
        rows = matrices.view(np.complex128).reshape(code.shape)
        place.store(at, rows.ravel() if chosen is None else rows[chosen], shape, chosen)
        code.is_unfenced = True

    return store


def _rows(
    code: Code, place: Place, address: Array, mask: Mask, n: int
) -> tuple[tuple[int, ...], Array | None, Array]:
    """Only the first 8 n lanes of a warp bring addresses."""
    if n < 4:
        lanes = (np.arange(code.n_threads) % 32 < 8 * n)[None, :]
        mask = np.broadcast_to(lanes if mask is None else lanes & mask, code.shape)
    return place.find(np.broadcast_to(address, code.shape), mask)


# --- products ------------------------------------------------------------------------------------
# The layouts of the PTX ISA: lane = 4 g + q. Places of a lane's numbers in a matrix, row by row.

_G, _Q = (_LANE // 4)[:, None], (_LANE % 4)[:, None]


def _places_of_left() -> Array:
    """A [16, 8], four of each lane: [32, 4]."""
    i = np.arange(4)[None, :]
    return (_G + 8 * (i & 1)) * 8 + _Q + 4 * (i >> 1)


@functools.cache
def _places_of_sums(n: int) -> Array:
    """Sums [16, n], n / 2 of each lane."""
    i = np.arange(n // 2)[None, :]
    return (_G + 8 * (i >> 1 & 1)) * n + 8 * (i >> 2) + 2 * _Q + (i & 1)


_LEFT = _places_of_left()


def _words(code: Code, values: list[Array]) -> Array:
    """[programs, warps, 32, n]"""
    return np.stack([_warps(code, value) for value in values], axis=3)


def _left(words: Array) -> Array:
    matrix = np.zeros((*words.shape[:2], 128))
    matrix[:, :, _LEFT] = read_as_tf32(words)
    return matrix.reshape(*words.shape[:2], 16, 8)


def _gather(words: Array, n: int) -> Array:
    matrix = np.zeros((*words.shape[:2], 16 * n))
    matrix[:, :, _places_of_sums(n)] = words
    return matrix.reshape(*words.shape[:2], 16, n)


def _scatter(code: Code, matrix: Array) -> list[Array]:
    n = matrix.shape[3]
    places = _places_of_sums(n).T
    numbers = matrix.reshape(*matrix.shape[:2], 16 * n)[:, :, places]
    # Register by register, [programs, threads] each.
    return list(np.ascontiguousarray(numbers.transpose(2, 0, 1, 3)).reshape(n // 2, *code.shape))


@form(r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32")
def _multiply(code: Code, instruction: Instruction) -> Step:
    d, a, b, c = instruction.operands
    sizes = {"d": (d, 4), "a": (a, 4), "b": (b, 2), "c": (c, 4)}
    names = {key: _names(each, n, instruction.where) for key, (each, n) in sizes.items()}
    slots = {
        key: [code.use(name, "f32" if key == "c" else "b32") for name in names[key]]
        for key in "abc"
    }
    puts = [code.put(name, "f32", instruction) for name in names["d"]]
    R = code.R

    def multiply(mask: Mask) -> None:
        code.together(mask, instruction.where)
        words = _words(code, [R[slot] for slot in slots["b"]])
        right = np.zeros((*words.shape[:2], 8, 8))
        for i in range(2):
            right[:, :, _LANE % 4 + 4 * i, _LANE // 4] = read_as_tf32(words[..., i])
        left, sums = (_words(code, [R[slot] for slot in slots[key]]) for key in "ac")
        product = _left(left) @ right + _gather(sums, 8)
        for put, value in zip(puts, _scatter(code, truncated(product)), strict=True):
            put(value, mask)

    return multiply


@form(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k8\.f32\.tf32\.tf32")
def _multiply_later(code: Code, instruction: Instruction) -> Step:
    """A in registers, B by a descriptor of 128-byte swizzled shared memory.

    The sums are held back until the program waits for them: reading them before is an error.
    """
    n = int(re.search(r"m64n(\d+)k8", instruction.op)[1])  # type: ignore[index]
    d, a, descriptor, is_added, *signs = instruction.operands
    if signs != ["1", "1"] or not isinstance(a, list):
        raise Fault(f"{instruction.where}: {instruction.text}")
    names = tuple(_names(d, n // 2, instruction.where))
    R = code.R
    left = [code.use(name, "b32") for name in _names(a, 4, instruction.where)]
    sums = [code.use(name, "f32") for name in names]
    place_slot, added = code.use(descriptor, "u64"), code.use(is_added, "pred")
    puts = [code.put(name, "f32", instruction) for name in names]
    place = Place(code, instruction, 4, 4)

    def read() -> Array:
        return _gather(_words(code, [R[slot] for slot in sums]), n)

    def write(matrix: Array, mask: Mask) -> None:
        for put, value in zip(puts, _scatter(code, matrix), strict=True):
            put(value, mask)

    row, k = np.arange(n)[:, None], np.arange(8)[None, :]

    def multiply(mask: Mask) -> None:
        code.together(mask, instruction.where)
        if code.is_unfenced:
            code.report(f"{instruction.where}: shared memory was written, and no proxy fence since")
        if _any(R[place_slot] >> np.uint64(62) != 1, mask):
            raise Fault(f"{instruction.where}: another layout than 128-byte swizzles")
        word = _warps(code, R[place_slot])[:, :, :1]
        start, stride = (
            (((word >> np.uint64(at)) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)
            for at in (0, 32)
        )
        linear = start[..., None] + row // 8 * stride[..., None] + row % 8 * 128 + k * 4
        address = linear ^ (((linear >> 7) & 7) << 4)
        right = _tile(code, place, address, mask)
        total = _left(_words(code, [R[slot] for slot in left])) @ right.swapaxes(2, 3)
        if _any(R[added], mask):
            is_kept = _warps(code, R[added])[:, :, :1, None]
            total = total + np.where(is_kept, code.products.now(names, read), 0.0)
        code.products.hold(names, write, truncated(total), mask)
        for name, put in zip(names, puts, strict=True):
            if mask is None:
                code.forget(name)
            else:
                put(code.rubbish(code.shape, np.dtype(np.float32)), mask)

    return multiply


def _any(predicate: Array, mask: Mask) -> bool:
    return bool((predicate if mask is None else predicate & mask).any())


def _tile(code: Code, place: Place, address: Array, mask: Mask) -> Array:
    """tf32 of shared memory at places [programs, warps, rows, 8]."""
    here = np.ones(code.shape, np.bool_) if mask is None else np.broadcast_to(mask, code.shape)
    warps = here.reshape(code.shape[0], -1, 32)[:, :, 0]
    flat = address[warps].reshape(int(warps.sum()), -1)
    code.shared.check(flat, 4, 4, place.where)
    program, warp = np.nonzero(warps)
    at = flat + code.shared_base[program]
    if code.options.races:
        user = np.repeat(code.user()[:, ::32][program, warp], flat.shape[1])
        place.read_shared(at.reshape(-1), user[:, None])
    tile = np.zeros(address.shape, np.uint32)
    tile[warps] = code.shared.words[4][at // 4].reshape(len(at), *address.shape[2:])
    return read_as_tf32(tile)


@form(r"wgmma\.commit_group\.sync\.aligned")
def _commit_products(code: Code, instruction: Instruction) -> Step:
    return lambda mask: code.products.commit(mask)


@form(r"wgmma\.wait_group\.sync\.aligned")
def _wait_for_products(code: Code, instruction: Instruction) -> Step:
    n = int(str(instruction.operands[0]), 0)
    return lambda mask: code.products.release(mask, n)


@form(r"wgmma\.fence\.sync\.aligned")
def _fence_products(code: Code, instruction: Instruction) -> Step:
    return lambda mask: None


@form(r"fence\.proxy\.async\.shared::cta|fence\.proxy\.async")
def _fence_stores(code: Code, instruction: Instruction) -> Step:
    def fence(mask: Mask) -> None:
        code.is_unfenced = False

    return fence
