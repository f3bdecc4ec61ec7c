"""Triton's interpreter, which runs the kernels in the tests where there is no GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest

from relneuron.ops import available_backends, backends

STATUS = available_backends()["triton"]
IS_INTERPRETED = STATUS.works and backends.triton_module("swiglu_stats").IS_INTERPRETED
# It computes with numpy, which warns about overflow and NaN.
quiet = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
needs_triton = [pytest.mark.skipif(not STATUS.works, reason=STATUS.detail), quiet]


def _patch_once() -> None:
    """Half of its time went into patching triton.language again at every call within a kernel.

    A launch patches it for our functions; the library's own ones see triton.language.core, which is
    patched here, for good.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang(tl.sum.fn)
    interpreter.InterpretedFunction.__call__ = call


# tests/ptx compiles them, and runs what was compiled, where tests think that they are interpreted.
if IS_INTERPRETED and os.environ.get("TRITON_INTERPRET") == "1":
    _patch_once()
