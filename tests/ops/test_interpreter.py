"""Triton's interpreter as tests have it (kit/interpreter.py) gives what it gives without that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kit import interpreter as kit

pytestmark = [
    *kit.needs_triton,
    pytest.mark.skipif(not kit.IS_INTERPRETED, reason="the kernels are compiled"),
]


def scalars() -> list[Any]:
    import triton.language as tl

    return [
        kind for kind in vars(tl).values() if isinstance(kind, tl.dtype) and kind.name != "void"
    ]


def original(kept: Any) -> Any:
    """What a function of the kit stands for."""
    inner = dict(zip(kept.__code__.co_freevars, kept.__closure__, strict=True))
    [true] = (cell.cell_contents for cell in inner.values() if callable(cell.cell_contents))
    return true


def test_types_of_numpy_are_the_same() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    true, seen = original(interpreter._get_np_dtype), 0
    for kind in [*scalars(), *map(tl.pointer_type, scalars())]:
        for given in (kind, tl.block_type(kind, [4])) * 2:  # made, and kept
            try:
                expected = true(given)
            except KeyError:  # it knows no such number
                continue
            seen += 1
            assert interpreter._get_np_dtype(given) == expected
    assert seen > 100


def test_tensors_are_the_same() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    for kind in (tl.int32, tl.block_type(tl.int32, [2, 4]), tl.block_type(tl.float32, [8])) * 2:
        sizes = kind.shape.values if kind.is_block() else ()
        handle = TensorHandle(np.zeros(sizes, np.int32), kind.scalar)
        ours, true = tl.tensor(handle, kind), object.__new__(tl.tensor)
        original(tl.tensor.__init__)(true, handle, kind)
        assert vars(ours).keys() == vars(true).keys()
        assert ours.handle is handle and ours.type is kind and ours.dtype == true.dtype
        assert ours.shape.values == true.shape.values and ours.numel == true.numel
        assert ours.shape.type.types == true.shape.type.types


@pytest.mark.parametrize("kind", ["int32", "int64", "int16"])
@pytest.mark.parametrize("keeps", [True, False])
def test_sums_of_bits_are_those_of_each_pair(kind: str, keeps: bool) -> None:
    import triton.language as tl
    from triton.language import standard
    from triton.runtime.interpreter import ReduceOps, TensorHandle

    true = original(ReduceOps.generic_reduce)
    data = np.random.default_rng(0).integers(-9999, 9999, (2, 4, 2)).astype(kind)
    dtype = getattr(tl, kind)
    given = tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)))
    for axis in range(3):
        reduce = ReduceOps(axis, standard._xor_combine, keeps)
        [ours], [expected] = reduce.generic_reduce((given,)), true(reduce, (given,))
        assert ours.handle.data.dtype == expected.handle.data.dtype
        assert np.array_equal(ours.handle.data, expected.handle.data) and ours.type == expected.type
