"""Launches of Triton kernels, and the same ones again without Triton's look at every argument.

The launchers in the rooms of the ops make them. What the numbers of a call decide is a `Form`,
which a launcher keeps for the next call of the same numbers; a `Launch` is a form with tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

# Forms that a launcher keeps of each kind; a study has batches of a few hundred lengths.
N_KEPT = 2048


@dataclass(frozen=True, eq=False)
class Form:
    """A launch but for its tensors, which are the first arguments of the kernel, by `names`.

    Behind them stand numbers, `sizes`, and then `constants`, which the kernel is compiled for. All
    tensors that a form is used with have the same dtypes.
    """

    kernel: Any
    grid: tuple[int, ...]
    names: tuple[str, ...]
    sizes: Mapping[str, int]
    constants: Mapping[str, Any]
    num_warps: int
    options: Mapping[str, Any] = field(default_factory=dict)
    # What launches the kernel as it was compiled for tensors of some `_likeness`.
    compiled: dict[tuple[object, ...], Any] = field(default_factory=dict, init=False)

    @cached_property
    def _numbers(self) -> tuple[Any, ...]:
        return (*self.sizes.values(), *self.constants.values())

    def compiler_options(self) -> dict[str, Any]:
        # No fused multiply-adds but those that are written: an exact operation rounds once.
        return {"num_warps": self.num_warps, "enable_fp_fusion": False, **self.options}


class Launch(NamedTuple):
    """One kernel launch: `bench/offline` compiles it, the ops run it."""

    form: Form
    tensors: tuple[Tensor | None, ...]

    def run(self) -> None:
        """Launch the kernel on the current device, which the tensors are on.

        Triton chooses what it has compiled by numbers, constants and dtypes, which the form has,
        and of each tensor by whether it is there, and whether its address is a multiple of 16. On
        an AMD GPU it also looks at the size of its memory, so it is asked each time there. (Its
        switches for debugging are read when a kernel is launched for the first time.)
        """
        form, tensors = self.form, self.tensors
        if form.compiled:
            again = form.compiled.get(_likeness(tensors))
            if again is not None:
                again(*tensors, *form._numbers)
                return
        compiled = form.kernel[form.grid](**self.args, **self.constants, **self.compiler_options())
        # Not so in the interpreter, and where another thread of Triton's is compiling it.
        if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
            names = [*self.args, *self.constants]
            assert names == form.kernel.arg_names, "they stand in the kernel's order"
            form.compiled[_likeness(tensors)] = compiled[(*form.grid, 1, 1)[:3]]

    # What the form and the tensors are together, by name.

    @property
    def kernel(self) -> Any:
        return self.form.kernel

    @property
    def grid(self) -> tuple[int, ...]:
        return self.form.grid

    @property
    def args(self) -> dict[str, Tensor | int | None]:
        return {**dict(zip(self.form.names, self.tensors, strict=True)), **self.form.sizes}

    @property
    def constants(self) -> Mapping[str, Any]:
        return self.form.constants

    @property
    def num_warps(self) -> int:
        return self.form.num_warps

    def compiler_options(self) -> dict[str, Any]:
        return self.form.compiler_options()


def _likeness(tensors: tuple[Tensor | None, ...]) -> tuple[object, ...]:
    """What Triton looks at beside a form: the device, and each tensor's alignment."""
    active = driver.active
    aligned = [None if t is None else t.data_ptr() % 16 == 0 for t in tensors]
    return (active, active.get_current_device(), *aligned)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """`torch.cuda.device`, which is not needed on the device that is current."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
