"""Every form of instruction that the kernels emit: small programs with results computed by hand.

FORMS is the table of those that compute with a thread's own registers; WHOLE the names of tests
below for the others. test_kernels.py holds what the kernels emit to it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.ptx.code import Options
from tests.ptx.machine import Machine
from tests.ptx.memory import GlobalMemory
from tests.ptx.parse import parse
from tests.ptx.rounding import TYPES

Array = np.ndarray[Any, Any]
NAN, INF = math.nan, math.inf
T, F = True, False
# A form, or a form and its text where operands do not simply follow: -> types, rows of sources and
# results.
Rows = list[tuple[Any, ...]]
_LESS: Rows = [(1, 2, T), (2, 2, F), (-1, 2, T), (3, -2, F)]
_MORE: Rows = [(1, 2, F), (2, 2, F), (-1, 2, F), (3, -2, T)]
_EQUAL: Rows = [(1, 2, F), (2, 2, T), (-1, -1, T), (0, 2, F)]
_NOT_EQUAL: Rows = [(*row[:2], not row[2]) for row in _EQUAL]
_AT_LEAST: Rows = [(1, 2, F), (2, 2, T), (-1, 2, F), (3, -2, T)]
_AT_MOST: Rows = [(1, 2, T), (2, 2, T), (-1, 2, T), (3, -2, F)]
_EPS, _TINY = 2.0**-23, 2.0**-149

FORMS: dict[str | tuple[str, str], tuple[str, Rows]] = {
    "abs.f32": ("f32 > f32", [(-1.5, 1.5), (-0.0, 0.0), (-INF, INF)]),
    "add.rn.f16": ("f16 f16 > f16", [(1.0, 2.0**-11, 1.0), (1.0, 3 * 2.0**-11, 1 + 2.0**-9)]),
    "add.rn.f16x2": ("b32 b32 > b32", [(0x3C004000, 0x3C003C00, 0x40004200)]),
    "add.rn.f32": (
        "f32 f32 > f32",
        [
            (1.0, 2.0**-24, 1.0),
            (1.0, 3 * 2.0**-24, 1 + 2 * _EPS),
            (3e38, 3e38, INF),
            (INF, -INF, NAN),
        ],
    ),
    "add.rn.f64": ("f64 f64 > f64", [(1.0, 2.0**-53, 1.0), (1.0, 2.0**-52, 1 + 2.0**-52)]),
    "add.s16": ("s16 s16 > s16", [(1, 2, 3), (2**15 - 1, 1, -(2**15))]),
    "add.s16x2": ("b32 b32 > b32", [(0x00010002, 0x00030004, 0x00040006), (0xFFFF, 1, 0)]),
    "add.s32": ("s32 s32 > s32", [(1, 2, 3), (2**31 - 1, 1, -(2**31))]),
    "add.s64": ("s64 s64 > s64", [(2**40, -1, 2**40 - 1), (2**63 - 1, 1, -(2**63))]),
    "and.b16": ("b16 b16 > b16", [(0xF0F0, 0xFF00, 0xF000)]),
    "and.b32": ("b32 b32 > b32", [(0xF0F0F0F0, 0xFF00FF00, 0xF000F000)]),
    "and.b64": ("b64 b64 > b64", [(0xF0 << 56, 0xFF << 56, 0xF0 << 56)]),
    "and.pred": ("pred pred > pred", [(T, T, T), (T, F, F), (F, F, F)]),
    ("bfe.s32", "{d}, {0}, 6, 1"): ("b32 > s32", [(0x40, -1), (0x3F, 0)]),
    ("bfe.u32", "{d}, {0}, 4, 8"): ("b32 > u32", [(0xABCD, 0xBC), (0xFFFFF00F, 0)]),
    "cvt.f32.f16": ("f16 > f32", [(1.5, 1.5), (2.0**-24, 2.0**-24), (-INF, -INF)]),
    "cvt.f64.f32": ("f32 > f64", [(1 + _EPS, 1 + _EPS), (_TINY, _TINY)]),
    "cvt.rmi.ftz.f32.f32": ("f32 > f32", [(1.5, 1.0), (-1.5, -2.0), (-1e-40, -0.0)]),
    "cvt.rn.bf16.f32": (
        "f32 > b16",
        [(1 + 2.0**-8, 0x3F80), (1 + 3 * 2.0**-8, 0x3F82), (3.4e38, 0x7F80), (NAN, 0x7FFF)],
    ),
    "cvt.rn.bf16x2.f32": ("f32 f32 > b32", [(1.0, 2.0, 0x3F804000), (-1.0, NAN, 0xBF807FFF)]),
    "cvt.rn.f16.f32": (
        "f32 > b16",
        [(1 + 2.0**-11, 0x3C00), (1 + 3 * 2.0**-11, 0x3C02), (65520.0, 0x7C00), (1e-8, 0)],
    ),
    "cvt.rn.f16x2.f32": ("f32 f32 > b32", [(1.0, 2.0, 0x3C004000)]),
    "cvt.rn.f32.s32": ("s32 > f32", [(2**24 + 1, 2.0**24), (-3, -3.0)]),
    "cvt.rna.tf32.f32": (
        "b32 > b32",
        [(0x3F801000, 0x3F802000), (0x3F800FFF, 0x3F800000), (0xBF801000, 0xBF802000)],
    ),
    "cvt.rzi.s32.f32": (
        "f32 > s32",
        [(1.9, 1), (-1.9, -1), (3e9, 2**31 - 1), (-3e9, -(2**31)), (NAN, 0)],
    ),
    "cvt.rzi.s64.f32": ("f32 > s64", [(-(2.0**40), -(2**40)), (1e30, 2**63 - 1), (NAN, 0)]),
    "cvt.s64.s32": ("s32 > s64", [(-5, -5), (2**31 - 1, 2**31 - 1)]),
    "cvt.u16.u32": ("u32 > u16", [(0x12345, 0x2345)]),
    "cvt.u32.u16": ("u16 > u32", [(0xFFFF, 0xFFFF)]),
    "cvt.u32.u64": ("u64 > u32", [(0x1234567890, 0x34567890)]),
    "cvt.u64.u32": ("u32 > u64", [(2**32 - 1, 2**32 - 1)]),
    "div.rn.f32": (
        "f32 f32 > f32",
        [(1.0, 3.0, 11184811 * 2.0**-25), (1.0, 0.0, INF), (0.0, 0.0, NAN)],
    ),
    "div.s32": ("s32 s32 > s32", [(7, 2, 3), (-7, 2, -3), (7, -2, -3), (-8, -2, 4)]),
    "ex2.approx.ftz.f32": (
        "f32 > f32",
        [(3.0, 8.0), (-0.0, 1.0), (-INF, 0.0), (-127.0, 0.0), (128.0, INF), (NAN, NAN)],
    ),
    "fma.rn.bf16x2": (
        "b32 b32 b32 > b32",
        [
            # Products: 1 * 3 and 1 * 2, then 1.0078125 ^ 2 in the lower half, -0 * 1.
            (0x3F803F80, 0x40004040, 0x80008000, 0x40004040),
            (0x80003F81, 0x3F803F81, 0x80008000, 0x80003F82),
            # The smallest number squared, a half of it less one, is 0; a sum half-way is even.
            (0x00013F80, 0x3F003F81, 0x80003B80, 0x00003F82),
            (0x3F803F80, 0x3F803F80, 0x3B803B81, 0x3F803F81),
        ],
    ),
    "fma.rn.f32": (
        "f32 f32 f32 > f32",
        [
            (1 + _EPS, 1 - _EPS, -1.0, -(2.0**-46)),
            # Just below half-way: rounded to float64 first it would be half-way, and go up.
            (2.0**-24 * (1 + _EPS), 1 - _EPS, 1 + _EPS, 1 + _EPS),
            (2.0**-75, 2.0**-75, 0.0, 0.0),
            (2.0**-75, 1.5 * 2.0**-75, 0.0, _TINY),
        ],
    ),
    ("ld.param.s32", "{d}, [below]"): ("> s64", [(-7,)]),
    ("ld.param.b32", "{d}, [below]"): ("> s32", [(-7,)]),
    "mad.lo.s64": ("s64 s64 s64 > s64", [(3, -4, 5, -7), (2**62, 4, 1, 1)]),
    "mad.wide.s32": ("s32 s32 s64 > s64", [(-2, 3, 10, 4), (2**30, 8, 1, 2**33 + 1)]),
    "mad.wide.u32": ("u32 u32 u64 > u64", [(2**32 - 1, 2, 1, 2**33 - 1)]),
    "max.f16": ("f16 f16 > f16", [(1.0, NAN, 1.0), (-0.0, 0.0, 0.0), (-2.0, 3.0, 3.0)]),
    "max.f16x2": ("b32 b32 > b32", [(0x3C004000, 0x40003C00, 0x40004000)]),
    "max.f32": ("f32 f32 > f32", [(1.0, NAN, 1.0), (NAN, NAN, NAN), (-0.0, 0.0, 0.0)]),
    "max.s32": ("s32 s32 > s32", [(-1, 2, 2), (-1, -2, -1)]),
    "max.s64": ("s64 s64 > s64", [(-(2**40), 2, 2)]),
    "max.u32": ("u32 u32 > u32", [(2**32 - 1, 2, 2**32 - 1)]),
    "min.f32": ("f32 f32 > f32", [(NAN, 1.0, 1.0), (0.0, -0.0, -0.0), (-INF, 1.0, -INF)]),
    "min.s32": ("s32 s32 > s32", [(-1, 2, -1)]),
    "min.u32": ("u32 u32 > u32", [(2**32 - 1, 2, 2)]),
    "min.s64": ("s64 s64 > s64", [(-(2**40), 2, -(2**40))]),
    "mov.b16": ("b16 > b16", [(0xABCD, 0xABCD)]),
    "mov.b32": ("b32 > b32", [(0xABCD1234, 0xABCD1234)]),
    ("mov.b32", "{d}, {{{0}, {1}}}"): ("b16 b16 > b32", [(0x1234, 0xABCD, 0xABCD1234)]),
    ("mov.b32", "{{{d}, {e}}}, {0}"): ("b32 > b16 b16", [(0xABCD1234, 0x1234, 0xABCD)]),
    "mov.b64": ("b64 > b64", [(2**60 + 1, 2**60 + 1)]),
    ("mov.b64", "{d}, {{{0}, {1}}}"): ("b32 b32 > b64", [(1, 2, 2**33 + 1)]),
    ("mov.b64", "{{_, {d}}}, {0}"): ("b64 > b32", [(2**33 + 1, 2)]),
    ("mov.pred", "{d}, -1"): ("> pred", [(T,)]),
    ("mov.u16", "{d}, 0x0"): ("> u16", [(0,)]),
    ("mov.u32", "{d}, %tid.x"): ("> u32", [(0,), (1,), (2,)]),
    "mov.u64": ("u64 > u64", [(2**63, 2**63)]),
    "mul.lo.s32": ("s32 s32 > s32", [(-3, 4, -12), (2**16, 2**16, 0)]),
    "mul.lo.s64": ("s64 s64 > s64", [(-3, 2**40, -3 * 2**40)]),
    "mul.rn.f16x2": ("b32 b32 > b32", [(0x3C014000, 0x3C014000, 0x3C024400)]),
    "mul.rn.f32": ("f32 f32 > f32", [(1 + _EPS, 1 + _EPS, 1 + 2 * _EPS), (1e30, 1e30, INF)]),
    "mul.rn.f64": ("f64 f64 > f64", [(3.0, 0.5, 1.5)]),
    "mul.wide.s32": ("s32 s32 > s64", [(-2, 2**31 - 1, -(2**32) + 2)]),
    "mul.wide.u32": ("u32 u32 > u64", [(2**32 - 1, 2, 2**33 - 2)]),
    "neg.f32": ("f32 > f32", [(0.0, -0.0), (-2.0, 2.0)]),
    "neg.s32": ("s32 > s32", [(5, -5), (-(2**31), -(2**31))]),
    "neg.s64": ("s64 > s64", [(2**40, -(2**40))]),
    "not.b32": ("b32 > b32", [(0xF0F0F0F0, 0x0F0F0F0F)]),
    "or.b16": ("b16 b16 > b16", [(0xF000, 0x000F, 0xF00F)]),
    "or.b32": ("b32 b32 > b32", [(0xF0000000, 0x0000000F, 0xF000000F)]),
    "or.b64": ("b64 b64 > b64", [(2**60, 1, 2**60 + 1)]),
    "or.pred": ("pred pred > pred", [(T, F, T), (F, F, F)]),
    "popc.b32": ("b32 > u32", [(0xFF, 8), (0xF0F00001, 9)]),
    "prmt.b32": (
        "b32 b32 b32 > b32",
        [
            (0x03020100, 0x07060504, 0x7531, 0x07050301),
            # Selectors 8 and 12: the signs of two bytes, twice each.
            (0x80, 0x7F, 0xCC88, 0x0000FFFF),
        ],
    ),
    "rcp.approx.ftz.f32": ("f32 > f32", [(4.0, 0.25), (INF, 0.0), (-0.0, -INF), (2.0**127, 0.0)]),
    "selp.b16": ("b16 b16 pred > b16", [(1, 2, T, 1), (1, 2, F, 2)]),
    "selp.b32": ("b32 b32 pred > b32", [(1, 2, T, 1), (1, 2, F, 2)]),
    "selp.b64": ("b64 b64 pred > b64", [(2**40, 2, T, 2**40), (1, 2, F, 2)]),
    "selp.f32": ("f32 f32 pred > f32", [(1.0, 2.0, T, 1.0), (1.0, NAN, F, NAN)]),
    "selp.f64": ("f64 f64 pred > f64", [(1.0, 2.0, T, 1.0), (1.0, 2.0, F, 2.0)]),
    "set.gt.f32.f32": ("f32 f32 > f32", [(2.0, 1.0, 1.0), (1.0, 1.0, 0.0), (NAN, 1.0, 0.0)]),
    "setp.eq.b16": ("b16 b16 > pred", [(1, 2, F), (2, 2, T)]),
    "setp.eq.b32": ("s32 s32 > pred", _EQUAL),
    "setp.eq.b64": ("s64 s64 > pred", _EQUAL),
    "setp.eq.f32": ("f32 f32 > pred", [*_EQUAL, (NAN, 1.0, F), (NAN, NAN, F), (0.0, -0.0, T)]),
    "setp.equ.f32": ("f32 f32 > pred", [*_EQUAL, (NAN, 1.0, T), (0.0, -0.0, T)]),
    "setp.equ.f64": ("f64 f64 > pred", [*_EQUAL, (1.0, NAN, T)]),
    "setp.ge.f32": ("f32 f32 > pred", [*_AT_LEAST, (NAN, 1.0, F)]),
    "setp.ge.s32": ("s32 s32 > pred", _AT_LEAST),
    "setp.ge.s64": ("s64 s64 > pred", _AT_LEAST),
    "setp.gt.f16": ("f16 f16 > pred", [*_MORE, (NAN, 1.0, F)]),
    ("setp.gt.f16x2", "{d}|{e}, {0}, {1}"): (
        "b32 b32 > pred pred",
        # The lower halves first: 2 > 1, and 1 > 2.
        [(0x3C004000, 0x40003C00, T, F)],
    ),
    "setp.gt.f32": ("f32 f32 > pred", [*_MORE, (NAN, 1.0, F), (INF, 1.0, T)]),
    "setp.gt.s32": ("s32 s32 > pred", _MORE),
    "setp.gt.s64": ("s64 s64 > pred", _MORE),
    "setp.gt.u16": ("u16 u16 > pred", [(2**16 - 1, 1, T), (1, 1, F), (1, 2**16 - 1, F)]),
    "setp.gt.u32": ("u32 u32 > pred", [(2**32 - 1, 1, T), (1, 1, F)]),
    "setp.gtu.f32": ("f32 f32 > pred", [*_MORE, (NAN, 1.0, T)]),
    "setp.le.f32": ("f32 f32 > pred", [*_AT_MOST, (NAN, 1.0, F)]),
    "setp.le.s32": ("s32 s32 > pred", _AT_MOST),
    "setp.le.s64": ("s64 s64 > pred", _AT_MOST),
    "setp.le.u32": ("u32 u32 > pred", [(1, 2**32 - 1, T), (1, 1, T), (2**32 - 1, 1, F)]),
    "setp.lt.f16": ("f16 f16 > pred", [*_LESS, (1.0, NAN, F)]),
    ("setp.lt.f16x2", "{d}|{e}, {0}, {1}"): (
        "b32 b32 > pred pred",
        [(0x3C004000, 0x40003C00, F, T)],
    ),
    "setp.lt.f32": ("f32 f32 > pred", [*_LESS, (1.0, NAN, F)]),
    "setp.lt.s16": ("s16 s16 > pred", _LESS),
    "setp.lt.s32": ("s32 s32 > pred", _LESS),
    "setp.lt.s64": ("s64 s64 > pred", _LESS),
    "setp.lt.u16": ("u16 u16 > pred", [(1, 2**16 - 1, T), (1, 1, F), (2**16 - 1, 1, F)]),
    "setp.lt.u32": ("u32 u32 > pred", [(1, 2**32 - 1, T), (1, 1, F), (2**32 - 1, 1, F)]),
    "setp.lt.u64": ("u64 u64 > pred", [(1, 2**64 - 1, T), (1, 1, F), (2**64 - 1, 1, F)]),
    "setp.ne.b16": ("b16 b16 > pred", [(1, 2, T), (2, 2, F)]),
    "setp.ne.b32": ("s32 s32 > pred", _NOT_EQUAL),
    "setp.ne.b64": ("s64 s64 > pred", _NOT_EQUAL),
    "setp.ne.f32": ("f32 f32 > pred", [*_NOT_EQUAL, (NAN, 1.0, F)]),
    "setp.num.f32": ("f32 f32 > pred", [(1.0, 2.0, T), (NAN, 1.0, F), (1.0, NAN, F)]),
    "shl.b16": ("b16 u32 > b16", [(0x8001, 1, 2), (1, 16, 0)]),
    "shl.b32": ("b32 u32 > b32", [(0x80000001, 4, 16), (1, 32, 0)]),
    "shl.b64": ("b64 u32 > b64", [(1, 40, 2**40), (1, 64, 0)]),
    "shr.s32": ("s32 u32 > s32", [(-8, 1, -4), (-8, 40, -1), (8, 40, 0)]),
    "shr.s64": ("s64 u32 > s64", [(-(2**40), 39, -2), (-1, 70, -1)]),
    "shr.u16": ("u16 u32 > u16", [(0x8000, 15, 1), (1, 16, 0)]),
    "shr.u32": ("u32 u32 > u32", [(2**31, 31, 1), (2**31, 32, 0)]),
    "shr.u64": ("u64 u32 > u64", [(2**63, 63, 1), (2**63, 64, 0)]),
    "sub.rn.f32": ("f32 f32 > f32", [(1.0, 2.0**-25, 1.0), (1.0, 1.0, 0.0)]),
    "sub.s32": ("s32 s32 > s32", [(-(2**31), 1, 2**31 - 1), (5, 7, -2)]),
    "sub.s64": ("s64 s64 > s64", [(2**40, 1, 2**40 - 1)]),
    "xor.b16": ("b16 b16 > b16", [(0xFF00, 0x0FF0, 0xF0F0)]),
    "xor.b32": ("b32 b32 > b32", [(0xFF00, 0x0FF0, 0xF0F0)]),
    "xor.b64": ("b64 b64 > b64", [(2**40 + 1, 2**40, 1)]),
    "xor.pred": ("pred pred > pred", [(T, T, F), (T, F, T)]),
    # No kernel of today emits these, but others like them.
    "cvt.f32.bf16": ("b16 > f32", [(0x3F81, 1 + 2.0**-7), (0xFF80, -INF)]),
    "cvt.rn.f32.f64": ("f64 > f32", [(1 + 2.0**-24, 1.0), (1 + 3 * 2.0**-24, 1 + 2 * _EPS)]),
    "fma.rn.f16x2": ("b32 b32 b32 > b32", [(0x3C004000, 0x3C014000, 0x00003C00, 0x3C014500)]),
    ("lop3.b32", "{d}, {0}, {1}, {2}, 0x96"): ("b32 b32 b32 > b32", [(0xF0, 0xCC, 0xAA, 0x96)]),
    "lg2.approx.f32": ("f32 > f32", [(8.0, 3.0), (0.0, -INF)]),
    "min.f16x2": ("b32 b32 > b32", [(0x3C004000, 0x40003C00, 0x3C003C00)]),
    "mul.hi.u32": ("u32 u32 > u32", [(2**31, 6, 3)]),
    "mul.hi.s32": ("s32 s32 > s32", [(-(2**31), 4, -2)]),
    "not.pred": ("pred > pred", [(T, F), (F, T)]),
    "rcp.rn.f32": ("f32 > f32", [(3.0, 11184811 * 2.0**-25)]),
    "rem.s32": ("s32 s32 > s32", [(7, 2, 1), (-7, 2, -1), (7, -2, 1)]),
    "rsqrt.approx.f32": ("f32 > f32", [(0.25, 2.0)]),
    "setp.ltu.f32": ("f32 f32 > pred", [*_LESS, (NAN, 1.0, T)]),
    "setp.nan.f32": ("f32 f32 > pred", [(1.0, 2.0, F), (NAN, 1.0, T)]),
    "shf.l.wrap.b32": ("b32 b32 u32 > b32", [(0xF0000000, 0x1, 4, 0x1F), (1, 2, 32, 2)]),
    "shf.r.clamp.b32": ("b32 b32 u32 > b32", [(0x0, 0x1, 4, 0x10000000), (1, 2, 40, 2)]),
    "sqrt.rn.f32": ("f32 > f32", [(2.25, 1.5), (-1.0, NAN)]),
    "tanh.approx.f32": ("f32 > f32", [(0.0, 0.0), (INF, 1.0)]),
}


# --- running ----------------------------------------------------------------------------------


def launch(
    body: str,
    inputs: Array,
    *,
    n_out: int,
    n_threads: int = 32,
    grid: int = 1,
    shared: int = 0,
    options: Options | None = None,
) -> tuple[Array, list[str]]:
    """(what the program leaves in `n_out` bytes behind %rd1, what is reported).

    %rd0 points to the inputs, %r0 is the thread's number; `below` is a parameter that is -7.
    """
    text = f""".visible .entry program(
    .param .u64 .ptr .global .align 1 given,
    .param .u64 .ptr .global .align 1 wanted,
    .param .u32 below
)
.reqntid {n_threads}
{{
    .reg .pred %p<40>; .reg .b16 %rs<40>; .reg .b32 %r<200>; .reg .b64 %rd<60>;
    ld.param.b64 %rd0, [given]; ld.param.b64 %rd1, [wanted]; mov.u32 %r0, %tid.x;
    {body}
    ret;
}}"""
    given, wanted = np.ascontiguousarray(inputs), np.zeros(n_out, np.uint8)
    memory = GlobalMemory()
    for name, array in (("given", given), ("wanted", wanted)):
        memory.add(array.ctypes.data, array.nbytes, name, 1)
    memory.finish(True)
    addresses = [given.ctypes.data, wanted.ctypes.data, -7]
    machine = Machine(parse(text))
    machine.run((grid,), addresses, memory, shared, options or Options())
    return wanted, list(machine.reports)


_REGISTERS = {1: "%p", 2: "%rs", 4: "%r", 8: "%rd"}


def _register(kind: str, number: int) -> str:
    return "%p" + str(number) if kind == "pred" else f"{_REGISTERS[TYPES[kind]().nbytes]}{number}"


def compute(form: str, operands: str, types: str, rows: Rows) -> list[list[Any]]:
    """The results of a form: every row is a thread, numbers go through 8 bytes of memory each."""
    before, after = (side.split() for side in types.split(">"))
    cells = np.zeros((32, len(before) + 1), np.uint64)
    for number, row in enumerate(rows):
        for column, (kind, value) in enumerate(zip(before, row, strict=False)):
            cells[number, column] = _bits(kind, value)
    body = f"mad.wide.u32 %rd2, %r0, {cells.shape[1] * 8}, %rd0;"
    sources = []
    for column, kind in enumerate(before):
        register, at = _register(kind, 10 + column), f"[%rd2 + {8 * column}]"
        sources.append(register)
        if kind == "pred":
            body += (
                f" ld.global.b32 %r{10 + column}, {at}; setp.ne.b32 {register}, %r{10 + column}, 0;"
            )
        else:
            body += f" ld.global.b{8 * TYPES[kind]().nbytes} {register}, {at};"
    results = [_register(kind, 30 + column) for column, kind in enumerate(after)]
    names = dict(zip("de", results, strict=False))
    words = operands.format(*sources, **names) if operands else ", ".join([*results, *sources])
    body += f" {form} {words}; mad.wide.u32 %rd3, %r0, 16, %rd1;"
    for column, (kind, register) in enumerate(zip(after, results, strict=True)):
        if kind == "pred":
            body += f" selp.b32 %r{30 + column}, 1, 0, {register};"
            register = f"%r{30 + column}"
        size = 32 if kind == "pred" else 8 * TYPES[kind]().nbytes
        body += f" st.global.b{size} [%rd3 + {8 * column}], {register};"
    out, reports = launch(body, cells, n_out=512)
    assert not reports
    found = out.view(np.uint64).reshape(32, 2)[: len(rows), : len(after)]
    return [[_value(kind, cell) for kind, cell in zip(after, row, strict=True)] for row in found]


def _bits(kind: str, value: Any) -> int:
    if kind == "pred":
        return int(value)
    dtype = TYPES[kind]
    if isinstance(value, float):
        return int(np.array(value, dtype).view(f"u{dtype().nbytes}"))
    if dtype().dtype.kind == "f":
        return _bits(kind, float(value))
    return int(value) & (1 << 8 * dtype().nbytes) - 1


def _value(kind: str, cell: np.uint64) -> Any:
    dtype = np.dtype(np.uint32 if kind == "pred" else TYPES[kind])
    value = np.array([cell]).view(dtype)[0]
    return bool(value) if kind == "pred" else value.item()


def same(a: Any, b: Any) -> bool:
    if isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (
            a == b and math.copysign(1, a) == math.copysign(1, b)
        )
    return bool(a == b)


@pytest.mark.parametrize("key", FORMS, ids=str)
def test_form(key: str | tuple[str, str]) -> None:
    form, operands = (key, "") if isinstance(key, str) else key
    types, rows = FORMS[key]
    n_results = len(types.split(">")[1].split())
    found = compute(form, operands, types, rows)
    for row, result in zip(rows, found, strict=True):
        assert all(map(same, result, row[-n_results:])), (row, result)


def test_approximations_are_off_by_as_much_as_asked() -> None:
    body = """cvt.rn.f32.u32 %r4, %r0; mul.rn.f32 %r5, %r4, 0f3D000000; ex2.approx.ftz.f32 %r9, %r5;
    mad.wide.u32 %rd9, %r0, 4, %rd1; st.global.b32 [%rd9 + 0], %r9;"""
    exact = np.exp2(np.arange(32) / 32).astype(np.float32).view(np.int32)
    seen = set()
    for seed in range(20):
        for ulps in (0, 2):
            options = Options(ulps=ulps, seed=seed)
            out, _ = launch(body, np.zeros(1), n_out=128, options=options)
            apart = out.view(np.int32) - exact
            assert np.abs(apart).max() <= ulps
            seen |= set(apart.tolist())
    assert seen == {-2, -1, 0, 1, 2}
