"""Which backends can run here, and which of them runs a call; the same for every op.

Each op asks `choose_backend` and gets a name, or the reason why the one it was told cannot run.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

BACKENDS = ("auto", "reference", "cpu", "triton")


class BackendStatus(NamedTuple):
    """Whether a backend can run here, with one line that says how, or why not."""

    works: bool
    detail: str


def available_backends() -> dict[str, BackendStatus]:
    """What works in this process: {"reference" | "cpu" | "triton": BackendStatus}."""
    statuses = {"reference": BackendStatus(True, "plain torch, any device")}
    try:
        levels = cpu_module().isa_levels()
        statuses["cpu"] = BackendStatus(True, f"C++ kernels, using {levels[-1]} of {levels}")
    except ImportError as error:
        statuses["cpu"] = BackendStatus(False, str(error))
    try:
        module = triton_module("swiglu_stats")
    except ImportError as error:
        statuses["triton"] = BackendStatus(False, str(error))
        return statuses
    if module.IS_INTERPRETED:
        statuses["triton"] = BackendStatus(True, "interpreted (TRITON_INTERPRET=1): for tests only")
    elif torch.cuda.is_available():
        statuses["triton"] = BackendStatus(True, f"kernels for {torch.cuda.get_device_name()}")
    else:
        statuses["triton"] = BackendStatus(False, "no GPU that torch can use")
    return statuses


def cpu_module() -> ModuleType:
    """The C++ extension; ImportError with the reason and what to do."""
    module = _import_or_error("relneuron._cpu")
    if isinstance(module, ImportError):
        raise ImportError(
            f"the C++ extension relneuron._cpu is not usable ({module}); "
            "to have it, install relneuron with a C++ compiler"
        )
    return module


def triton_module(op: str) -> ModuleType:
    """relneuron.ops.<op>.triton_launch; ImportError with the reason."""
    module = _import_or_error(f"relneuron.ops.{op}.triton_launch")
    if isinstance(module, ImportError):
        raise ImportError(f"triton is not usable: {module}")
    return module


def choose_backend(op: str, backend: str, device_type: str) -> str:
    """The backend to run; a forced one that cannot run raises with the reason."""
    if device_type == "meta":
        raise ValueError(f"{op}: tensors must have data, got them on the meta device")
    triton = functools.partial(triton_module, op)
    if backend == "auto":
        loads: dict[str, Callable[[], ModuleType]] = {"cpu": cpu_module, "cuda": triton}
        load = loads.get(device_type)
        if load is None:
            _notice(op, f"there is no kernel for {device_type} tensors")
            return "reference"
        try:
            load()
        except ImportError as error:
            _notice(op, str(error))
            return "reference"
        return "cpu" if device_type == "cpu" else "triton"
    if backend == "cpu":
        if device_type != "cpu":
            raise ValueError(f"{op}: backend='cpu' must have tensors on cpu, got {device_type}")
        _raise_if_missing(op, backend, cpu_module)
    elif backend == "triton":
        module = _raise_if_missing(op, backend, triton)
        if device_type != "cuda" and not module.IS_INTERPRETED:
            raise ValueError(
                f"{op}: backend='triton' must have tensors on cuda, got "
                f"{device_type}; on cpu only the interpreter runs it (TRITON_INTERPRET=1)"
            )
    return backend


def check_backend_name(op: str, backend: str) -> None:
    """Refuse a name that no backend has."""
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {BACKENDS}, got {backend!r}")


@functools.cache
def _import_or_error(name: str) -> ModuleType | ImportError:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").startswith("relneuron.ops"):
            raise  # a module of ours is always there
        return error


def _raise_if_missing(op: str, backend: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except ImportError as error:
        raise RuntimeError(f"{op}: backend={backend!r} cannot run here: {error}") from error


@functools.cache
def _notice(op: str, reason: str) -> None:
    """Say once per process that the slow backend is in use."""
    warnings.warn(
        f"relneuron: {op} uses plain torch (backend='reference'), because {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
