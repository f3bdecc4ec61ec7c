"""Which backends can run here, and which of them runs a call; the same for every op.

Each op asks `choose_backend` and gets a name, or the reason why the one it was told cannot run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch

BACKENDS = ("auto", "reference", "cpu", "triton")
# The backend that is made for a type of device.
MADE_FOR = {"cpu": "cpu", "cuda": "triton"}
# What the Triton kernels take beside integers.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendStatus(NamedTuple):
    """Whether a backend can run here, with one line that says how, or why not."""

    works: bool
    detail: str


def available_backends(dtype: torch.dtype | None = None) -> dict[str, BackendStatus]:
    """What works in this process: {"reference" | "cpu" | "triton": BackendStatus}.

    Args:
        dtype: of the tensors; without it, what works for some works, and the detail says for which
            it does not.
    """
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
        statuses["triton"] = _gpu_status(DTYPES if dtype is None else (dtype,))
    else:
        statuses["triton"] = BackendStatus(False, "no GPU that torch can use")
    return statuses


def _gpu_status(dtypes: Sequence[torch.dtype]) -> BackendStatus:
    """Of the current GPU and the Triton kernels."""
    device, name = _current_gpu(), torch.cuda.get_device_name()
    found = {dtype: triton_fault(device, dtype) for dtype in dtypes}
    faults = {dtype: fault for dtype, fault in found.items() if fault}
    if not faults:
        return BackendStatus(True, f"kernels for {name}")
    [fault, *others] = dict.fromkeys(faults.values())
    if len(faults) == len(dtypes) and not others:
        return BackendStatus(False, fault)
    said = "; ".join(f"not for {str(d).removeprefix('torch.')}: {f}" for d, f in faults.items())
    return BackendStatus(len(faults) < len(dtypes), f"kernels for {name}, but {said}")


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


def choose_backend(
    op: str,
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    room: str | None = None,
) -> str:
    """The backend to run for tensors of a device and dtype, of an op in the room of its name.

    "auto" is the reference where the kernels cannot run, and says so once; a forced backend that
    cannot run raises with the reason.
    """
    if isinstance(device, str):
        device = torch.device(device)
        device = _current_gpu() if device == torch.device("cuda") else device
    kind = device.type
    if kind == "meta":
        raise ValueError(f"{op}: tensors must have data, got them on the meta device")
    if backend == "auto":
        made_for = MADE_FOR.get(kind)
        if made_for == "cpu":
            fault = _cpu_fault()
        elif made_for == "triton":
            fault = triton_fault(device, dtype)
        else:
            fault = f"there is no kernel for {kind} tensors"
        if fault is None:
            return made_for or "reference"
        _notice(op, fault)
        return "reference"
    if backend == "cpu":
        if kind != "cpu":
            raise ValueError(f"{op}: backend='cpu' must have tensors on cpu, got {kind}")
        _raise_if_missing(op, backend, cpu_module)
    elif backend == "triton":
        if _raise_if_missing(op, backend, triton_module, room or op).IS_INTERPRETED:
            return backend
        if MADE_FOR.get(kind) != "triton":
            raise ValueError(
                f"{op}: backend='triton' must have tensors on cuda, got "
                f"{kind}; on cpu only the interpreter runs it (TRITON_INTERPRET=1)"
            )
        fault = triton_fault(device, dtype)
        if fault is not None:
            raise RuntimeError(f"{op}: backend={backend!r} cannot run here: {fault}")
    return backend


def triton_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run for tensors of a device and dtype; None if they can.

    One tiny launch decides, once per process: it needs all that any launch does (a C compiler or
    what one has left in Triton's cache, a folder for that, a GPU and instructions that Triton
    compiles for), and must give the right numbers.
    """
    try:
        if triton_module("swiglu_stats").IS_INTERPRETED:
            return None
    except ImportError as error:
        return str(error)
    key = (device, dtype if dtype in DTYPES else torch.float32)
    if key not in _FAULTS:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # no graph can hold what waits for the device
        _FAULTS[key] = _probe(*key)
    return _FAULTS[key]


_FAULTS: dict[tuple[torch.device, torch.dtype], str | None] = {}


def _probe(device: torch.device, dtype: torch.dtype) -> str | None:
    probe = importlib.import_module("relneuron.ops.probe")
    printed = io.StringIO()
    try:
        # Triton prints all the code that an assembler has refused.
        with contextlib.redirect_stdout(printed):
            probe.try_out(device, dtype)
    except torch.OutOfMemoryError:
        raise  # says nothing of the next launch
    except Exception as error:
        return f"a launch failed: {type(error).__name__}: {_in_a_line(str(error))}"
    sys.stdout.write(printed.getvalue())  # of other threads
    return None


def _in_a_line(said: str) -> str:
    """What went wrong: of an assembler's output the first error; no names of temporary files."""
    refused = re.search(r"^ptxas\b.*?\b(?:error|fatal)\s*:\s*(.*)$", said, re.MULTILINE)
    line = f"ptxas: {refused[1]}" if refused else said.strip().partition("\n")[0]
    passing = rf"{re.escape(tempfile.gettempdir())}/[^\s',]+"
    return re.sub(passing, "(a temporary file)", line)[:300]


def _current_gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _cpu_fault() -> str | None:
    try:
        cpu_module()
    except ImportError as error:
        return str(error)
    return None


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


def _raise_if_missing(
    op: str, backend: str, load: Callable[..., ModuleType], *of: str
) -> ModuleType:
    try:
        return load(*of)
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
