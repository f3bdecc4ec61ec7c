"""A stand-in for Triton's driver: kernels compiled for a GPU that is not here run in `machine`.

Everything before the launch is Triton's own: specialisation, compilation to PTX, arguments. Tensors
are on the CPU. `installed` is a context manager for a process that was started with
TRITON_INTERPRET=0; as a plugin (`-p tests.ptx.driver`) pytest runs all in it.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.conftest import ROOT
from tests.ptx.code import Options
from tests.ptx.machine import Machine
from tests.ptx.memory import UNWRITTEN, GlobalMemory
from tests.ptx.parse import parse

# What a program may have, by compute capability.
SHARED_BYTES = {80: 166_912, 90: 232_448}
CACHE = ROOT / ".pytest_cache" / "ptx"
_SIZES = {
    "fp64": 8,
    "fp32": 4,
    "fp16": 2,
    "bf16": 2,
    "i64": 8,
    "i32": 4,
    "i16": 2,
    "u8": 1,
    "i8": 1,
}


@dataclass
class Log:
    """What ran, and what was found."""

    launches: Counter[str] = field(default_factory=Counter)
    instructions: int = 0
    seconds: float = 0.0
    reports: Counter[str] = field(default_factory=Counter)
    forms: set[str] = field(default_factory=set)


@dataclass
class Stand:
    """A stand-in GPU: its compute capability, how it runs, and what it found."""

    capability: int
    options: Options = field(default_factory=Options)
    log: Log = field(default_factory=Log)
    # What changes the PTX of a kernel before it runs, for faults that are seeded.
    change: Callable[[str, str], str] = lambda name, text: text
    # Storages made by torch.empty, by address: how many bytes were filled.
    fresh: dict[int, int] = field(default_factory=dict)
    _machines: dict[str, Machine] = field(default_factory=dict)
    # Triton keeps what it compiled by the device's number.
    number: int = field(default_factory=itertools.count().__next__)

    def machine(self, compiled: Any) -> Machine:
        if compiled.hash not in self._machines:
            text = self.change(compiled.name, compiled.asm["ptx"])
            self._machines[compiled.hash] = Machine(parse(text))
            self.log.forms |= self._machines[compiled.hash].kernel.forms()
        return self._machines[compiled.hash]

    def launch(self, compiled: Any, grid: tuple[int, int, int], arguments: list[Any]) -> None:
        if grid[0] >= 2**31 or max(grid[1:]) >= 2**16:
            raise RuntimeError(f"a grid of {grid} programs")
        if 0 in grid:
            return
        machine = self.machine(compiled)
        memory, values = GlobalMemory(), []
        names = list(compiled.src.signature)
        for (name, kind), value in zip(compiled.src.signature.items(), arguments, strict=True):
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
                memory.add(place, size, f"{name} {kind}", _SIZES[kind[1:]], place in self.fresh)
                values.append(value.data_ptr())
            else:
                values.append(value)
        assert names, "a kernel has arguments"
        memory.finish(self.options.races)
        # Two that Triton adds: scratch in global memory, which no kernel of ours has.
        values += [0] * (len(machine.kernel.parameters) - len(values))
        start = time.perf_counter()
        try:
            machine.run(grid, values, memory, compiled.metadata.shared, self.options)
        finally:
            self.log.seconds += time.perf_counter() - start
            self.log.launches[compiled.name] += 1
            self.log.instructions += machine.n_instructions
            for text, n in machine.reports.items():
                self.log.reports[f"{compiled.name}: {text}"] += n

    @contextlib.contextmanager
    def installed(self) -> Iterator[Stand]:
        """Within it, launches run here; what was patched is as it was afterwards."""
        from triton import knobs
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.compiler import CompiledKernel
        from triton.runtime import driver

        major, minor = divmod(self.capability, 10)
        with contextlib.ExitStack() as stack:
            patch = mock.patch.object
            # What is compiled here has no machine code, and must not be found by anybody else.
            stack.enter_context(knobs.cache.scope())
            knobs.cache.dir = str(CACHE)
            stack.enter_context(patch(driver, "_active", _Driver(self)))
            for owner, name, value in (
                (CompiledKernel, "_init_handles", self._init_handles()),
                # PTX is what is read here: no machine code, and no time for it.
                (CUDABackend, "make_cubin", lambda *_: b""),
                (torch.cuda, "device", lambda *_: contextlib.nullcontext()),
                (torch.cuda, "get_device_capability", lambda *_: (major, minor)),
                (torch, "empty", self._fresh(torch.empty)),
                (torch, "empty_like", self._fresh(torch.empty_like)),
                (torch.Tensor, "new_empty", self._fresh(torch.Tensor.new_empty)),
                *_launchers(self.capability),
            ):
                stack.enter_context(patch(owner, name, value))
            yield self

    def _init_handles(self) -> Callable[[Any], None]:
        stand = self

        def init(compiled: Any) -> None:
            if compiled.module is not None:
                return
            needed, limit = compiled.metadata.shared, SHARED_BYTES[stand.capability]
            if needed > limit:
                from triton.runtime.errors import OutOfResources

                raise OutOfResources(needed, limit, "shared memory")
            compiled.module, compiled.function = object(), 1

            def run(x: int, y: int, z: int, *rest: Any) -> None:
                # stream, function, metadata twice, two hooks, then the kernel's arguments
                stand.launch(compiled, (x, y, z), list(rest[6:]))

            compiled._run = run

        return init

    def _fresh(self, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Memory that nothing has written says so: see `memory.UNWRITTEN`."""

        def fresh(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.device.type == "cpu" and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                n = storage.nbytes() // 4
                if n:
                    words = torch.empty(0, dtype=torch.int32)
                    words.set_(storage, 0, (n,)).fill_(int(np.int32(UNWRITTEN.view(np.int32))))
                    self.fresh[storage.data_ptr()] = storage.nbytes()
            return tensor

        return fresh


def _launchers(capability: int) -> list[tuple[Any, str, Any]]:
    """What makes relneuron's launchers take the tiles of a GPU."""
    from relneuron.ops.average_precision import triton_launch as ranking
    from relneuron.ops.logprob_gain import triton_launch as gains
    from relneuron.ops.peaks import triton_launch as peaks
    from relneuron.ops.swiglu_stats import triton_launch as swiglu

    modules = (ranking, gains, peaks, swiglu)
    if any(module.IS_INTERPRETED for module in modules):
        raise RuntimeError("the kernels are interpreted: start the process with TRITON_INTERPRET=0")
    key = divmod(capability, 10)
    table = swiglu.LAUNCH_TABLE[key]
    plan = swiglu.plan

    def real_plan(call: Any, config: Any, *, is_nvidia: bool) -> Any:
        return plan(call, table, is_nvidia=True)

    return [
        *((module, "IS_INTERPRETED", True) for module in modules),
        (swiglu, "plan", real_plan),
        (ranking, "INTERPRETER_LAUNCH", ranking.NVIDIA_LAUNCH),
        (gains, "INTERPRETER_LAUNCH", gains.LAUNCH_TABLE[key]),
        (peaks, "INTERPRETER_LAUNCH", peaks.NVIDIA_LAUNCH),
    ]


class _Driver:
    """What Triton asks of a driver."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand
        self.utils = self

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.stand.capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        limit = SHARED_BYTES[self.stand.capability]
        return {"max_shared_mem": limit, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_device(self) -> int:
        return self.stand.number

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def unload_module(self, module: object) -> None:
        pass
