"""Triton's interpreter, which runs the kernels in the tests where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from relneuron.ops import available_backends, backends

STATUS = available_backends()["triton"]
IS_INTERPRETED = STATUS.works and backends.triton_module("swiglu_stats").IS_INTERPRETED
# It computes with numpy, which warns about overflow and NaN.
quiet = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
needs_triton = [pytest.mark.skipif(not STATUS.works, reason=STATUS.detail), quiet]


def _patch_once() -> None:
    """The interpreter gives what it gave, in less than half of its time; in a third where it sorts.

    Half went into patching triton.language again at every call within a kernel. A launch patches it
    for our functions; the library's own ones see triton.language.core, which is patched here, for
    good. Three quarters of a sort went into the sums of its pairs, which are numpy's now, and a
    seventh of the rest into types and shapes, which never change.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang(tl.sum.fn)
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = kept_by_name(interpreter._get_np_dtype)
    interpreter.ReduceOps.generic_reduce = with_xor(interpreter.ReduceOps.generic_reduce)
    tl.tensor.__init__ = with_kept_shapes(tl.tensor.__init__)


def kept_by_name(np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """numpy's type of a type of Triton, of which no two have a name."""
    found: dict[str, Any] = {}

    def kept(kind: Any) -> Any:
        if kind.name not in found:
            found[kind.name] = np_dtype(kind)
        return found[kind.name]

    return kept


def with_xor(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """Any function of two is called for each element, but `^` along an axis is numpy's."""
    from triton.language import standard

    def reduced(self: Any, input: Any) -> Any:
        if self.combine_fn is not standard._xor_combine or self.axis is None:
            return reduce(self, input)
        (one,) = input
        axis, keeps = int(self.axis), bool(self.keep_dims)
        found = np.bitwise_xor.reduce(one.handle.data, axis=axis, keepdims=keeps)
        return [self.to_tensor(found, one.dtype)]

    return reduced


def with_kept_shapes(init: Callable[..., None]) -> Callable[..., None]:
    """`shape` and `numel` of a tensor, by its sizes: constants of Triton, which nothing changes."""
    found: dict[Any, tuple[Any, Any]] = {}

    def kept(self: Any, handle: Any, type: Any) -> None:
        key = type.name if type.is_block() else ""
        if key not in found:
            init(self, handle, type)
            found[key] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = found[key]

    return kept


# tests/ptx compiles them, and runs what was compiled, where tests think that they are interpreted.
if IS_INTERPRETED and os.environ.get("TRITON_INTERPRET") == "1":
    _patch_once()
