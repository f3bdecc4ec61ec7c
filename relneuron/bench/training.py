"""Forward and backward of swiglu_stats in `relneuron bench`: contestants of the variant "training".

bench/suite.py asks for them. Each makes h of gate and up and takes the gradient of both, as a
training step does; h and the two gradients are held to the accuracy rule before anybody is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as nnf

from relneuron import ops
from relneuron.testing import assert_accurate

# (gate, up) -> h, with a gradient.
Forward = Callable[[Tensor, Tensor], Tensor]


def eager(gate: Tensor, up: Tensor) -> Tensor:
    """What a model does: autograd keeps silu(gate) for the backward."""
    return nnf.silu(gate) * up


class _Recomputed(torch.autograd.Function):
    """Liger's way (its ops/swiglu.py) in eager torch: nothing is kept but gate and up, silu is
    computed again in the backward, and all is written in place.

    Liger writes the gradients into gate and up themselves; here they are called again, so two
    tensors are made. d_gate is torch's silu_backward: with Liger's order of operations some
    elements are less accurate than torch's, and who is wrong has no time.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nnf.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (dh,), (gate, up) = grads, ctx.saved_tensors
        d_gate = dh * up
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return d_gate, nnf.silu(gate).mul_(dh)


def liger_way(gate: Tensor, up: Tensor) -> Tensor:
    """h by `_Recomputed`."""
    return cast(Tensor, _Recomputed.apply(gate, up))  # type: ignore[no-untyped-call]


def ours(gate: Tensor, up: Tensor) -> Tensor:
    """The op, without statistics: they are another task."""
    return ops.swiglu_stats(gate, up)


class Training:
    """The inputs of a case as leaves, and the truth of their gradients."""

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        self.leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
        random = torch.Generator(gate.device).manual_seed(1)
        self.dh = torch.randn(gate.shape, generator=random, dtype=gate.dtype, device=gate.device)
        self.found: tuple[Tensor, ...] = ()

    def call(self, forward: Forward) -> Callable[..., Tensor]:
        """One step of a contestant; gate, up and out of the case are those of `leaves`."""

        def step(*_: Tensor) -> Tensor:
            with torch.enable_grad():
                h = forward(*self.leaves)
                self.found = torch.autograd.grad(h, self.leaves, self.dh)
            return h.detach()

        return step

    def check(self) -> None:
        """The gradients of the last step, against float64, by blocks of rows."""
        for start in range(0, len(self.dh), 512):
            rows = slice(start, start + 512)
            truths, baselines = self._gradients(rows, True), self._gradients(rows, False)
            for found, truth, baseline in zip(self.found, truths, baselines, strict=True):
                assert_accurate(found[rows], truth, baseline)

    def _gradients(self, rows: slice, is_exact: bool) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            inputs = [x.detach()[rows].to(torch.float64 if is_exact else x) for x in self.leaves]
            inputs = [x.requires_grad_() for x in inputs]
            h = nnf.silu(inputs[0]) * inputs[1]
            return torch.autograd.grad(h, inputs, self.dh[rows].to(h))
