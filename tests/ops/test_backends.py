"""The choice of a backend, for every op: automatic, forced, and what is missing.

The ops' own tests hold the backends to each other; here is only who runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from relneuron.ops import available_backends, average_precision, backends, swiglu_stats

STATUS = available_backends()


def rank(backend: str = "auto") -> torch.Tensor:
    labels = torch.tensor([[1, 0, -1]], dtype=torch.int8)
    return average_precision(torch.arange(6.0).view(3, 2), labels, backend=backend)


def count(backend: str = "auto") -> torch.Tensor:
    return swiglu_stats(torch.ones(3, 5), torch.ones(3, 5), backend=backend)


OPS = {"swiglu_stats": count, "average_precision": rank}
every_op = pytest.mark.parametrize(("op", "call"), OPS.items())


def missing(name: str) -> Any:
    """Make one backend's import fail inside the block."""
    load = backends._import_or_error

    def fake(module: str) -> Any:
        return ImportError("it is not installed") if name in module else load(module)

    return mock.patch.object(backends, "_import_or_error", fake)


@every_op
def test_auto_without_the_extension_is_the_reference_with_one_notice(
    op: str, call: Callable[..., torch.Tensor]
) -> None:
    right = call("reference")
    backends._notice.cache_clear()
    with missing("_cpu"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(call(), right)
        assert not available_backends()["cpu"].works
    assert [w.category for w in caught] == [RuntimeWarning]
    said = str(caught[0].message)
    assert op in said and "_cpu is not usable (it is not installed)" in said
    backends._notice.cache_clear()


@every_op
@pytest.mark.parametrize(("backend", "module"), [("cpu", "_cpu"), ("triton", "triton_launch")])
def test_forced_backend_that_cannot_run_raises(
    op: str, call: Callable[..., torch.Tensor], backend: str, module: str
) -> None:
    with missing(module):
        cause = f"{op}: backend='{backend}' cannot run here: .*installed"
        with pytest.raises(RuntimeError, match=cause):
            call(backend)
        status = available_backends()[backend]
        assert not status.works and "it is not installed" in status.detail


@every_op
@pytest.mark.skipif(not STATUS["triton"].works, reason=STATUS["triton"].detail)
def test_triton_on_cpu_tensors_needs_the_interpreter(
    op: str, call: Callable[..., torch.Tensor]
) -> None:
    with (
        mock.patch.object(backends.triton_module(op), "IS_INTERPRETED", False),
        pytest.raises(ValueError, match="backend='triton' must have tensors on cuda, got cpu"),
    ):
        call("triton")


@every_op
def test_an_unknown_backend_is_refused(op: str, call: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=f"{op}: backend must be one of .*, got 'gpu'"):
        call("gpu")


def test_triton_runs_where_it_is_installed() -> None:
    """Else every test of a GPU kernel is skipped, and says nothing."""
    pytest.importorskip("triton")
    for op in ("swiglu_stats", "average_precision", "logprob_gain"):
        assert backends.triton_module(op).__name__ == f"relneuron.ops.{op}.triton_launch"
    assert available_backends()["triton"].works


CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.is_file() or not STATUS["cpu"].works, reason="needs Linux, kernels")
def test_the_instruction_sets_are_those_that_the_processor_has() -> None:
    lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    has = {*next((line for line in lines if line.startswith("flags")), "").split()}
    of_both = "bmi1 bmi2 popcnt "
    asked = {
        "avx2": of_both + "avx2 f16c fma",
        "avx512": of_both + "avx512f avx512bw avx512dq avx512vl",
    }
    found = [level for level, needed in asked.items() if {*needed.split()} <= has]
    assert backends.cpu_module().isa_levels() == ["portable", *found]
