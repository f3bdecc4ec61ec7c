"""The gradient of `swiglu_stats`: that of h to gate and up. What the op records has none.

`op.py` comes here with a call whose gate or up requires grad; all others never do. Eager code gets
an autograd.Function around the one launch, compiled code an op of h alone that torch can
differentiate, beside the one that records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor

from relneuron.ops.backends import choose_backend, cpu_module
from relneuron.ops.swiglu_stats.checks import DTYPES
from relneuron.ops.swiglu_stats.cpu_launch import address, is_eager
from relneuron.ops.swiglu_stats.reference import ACTIVATIONS, TORCH_ACTIVATIONS, keep_bits
from relneuron.ops.tensors import is_plain

_aten = torch.ops.aten


def _silu_backward(d: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return cast(Tensor, _aten.silu_backward(d, x))
    # That function has no derivative itself; torch takes this formula for the second one, too.
    s = torch.sigmoid(x)
    return d * s * (1 + x * (1 - s))


def _quick_gelu_backward(d: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return d * s + cast(Tensor, _aten.sigmoid_backward(d * x, s)) * 1.702


# activation -> the gradient d of its result and x to that of x: what torch's autograd computes for
# TORCH_ACTIVATIONS, bit for bit, and can be differentiated once more.
TORCH_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _silu_backward,
    "gelu": lambda d, x: _aten.gelu_backward(d, x),
    "gelu_tanh": lambda d, x: _aten.gelu_backward(d, x, approximate="tanh"),
    "relu": lambda d, x: _aten.threshold_backward(d, x, 0),
    "relu2": lambda d, x: _aten.threshold_backward(d * (2 * nnf.relu(x)), x, 0),
    "quick_gelu": _quick_gelu_backward,
    "tanh": lambda d, x: _aten.tanh_backward(d, torch.tanh(x)),
}


def gradient_reference(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    keep: Tensor | None,
    condition_ids: Tensor | None,
    wants_gate: bool,
    wants_up: bool,
) -> list[Tensor]:
    """d_gate and d_up (T, F), those that are wanted, of dh (T, F):

        d_gate = dh * up * activation'(gate),  d_up = dh * activation(gate)

    and exactly +0 where `keep` drops a neuron, whatever the values are. In plain torch, rounded
    where torch's own backward of activation(gate) * up rounds.
    """
    found = []
    if wants_gate:
        found.append(TORCH_BACKWARDS[activation](dh if up is None else dh * up, gate))
    if wants_up:
        found.append(dh * TORCH_ACTIVATIONS[activation](gate))
    if keep is None:
        return found
    off = ~keep_bits(keep, condition_ids, gate.shape[1])
    return [d.masked_fill(off, 0.0) for d in found]


def gradient_cpu(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    keep: Tensor | None,
    condition_ids: Tensor | None,
    wants_gate: bool,
    wants_up: bool,
    isa: str = "",
    n_threads: int = 0,
) -> list[Tensor]:
    """The C++ kernel: in float32, d_gate and d_up rounded once; `isa` and `n_threads` for tests."""
    n_tokens, width = gate.shape
    if dh.stride(1) != 1:  # autograd made it, and often of one number
        dh = dh.contiguous()
    found = [
        torch.empty_like(gate, memory_format=torch.contiguous_format) if is_wanted else None
        for is_wanted in (wants_gate, wants_up)
    ]
    d_gate, d_up = found
    cpu_module().swiglu_gradient(
        d_gate=address(d_gate),
        d_up=address(d_up),
        dh=dh.data_ptr(),
        gate=gate.data_ptr(),
        up=address(up),
        stride_dt=dh.stride(0),
        stride_gt=gate.stride(0),
        stride_ut=0 if up is None else up.stride(0),
        T=n_tokens,
        F=width,
        dtype=DTYPES.index(gate.dtype),
        activation=ACTIVATIONS.index(activation),
        keep=address(keep),
        condition_ids=address(condition_ids),
        isa=isa,
        n_threads=n_threads or torch.get_num_threads(),
    )
    return [d for d in found if d is not None]


# --------------------------------------------------------------------------------------------------
# The two ops that torch sees: h alone, for compiled code, and its gradient


def _hidden_impl(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    keep: Tensor | None,
    condition_ids: Tensor | None,
    ids_checked: bool,
    backend: str,
) -> Tensor:
    h = torch.empty_like(gate, memory_format=torch.contiguous_format)
    nothing: tuple[Any, ...] = ("", 0, *[None] * 7, "", [], None)
    torch.ops.relneuron.swiglu_stats.default(
        gate, up, h, activation, *nothing, keep, condition_ids, ids_checked, backend
    )
    return h


def _gradient_impl(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    keep: Tensor | None,
    condition_ids: Tensor | None,
    wants_gate: bool,
    wants_up: bool,
    backend: str,
) -> list[Tensor]:
    given = (dh, gate, up, activation, keep, condition_ids, wants_gate, wants_up)
    chosen = choose_backend("swiglu_stats", backend, gate.device, gate.dtype)
    if chosen == "cpu" and is_plain(dh):
        return gradient_cpu(*given)
    # On a GPU, too: torch's own kernels. Their results may lie as dh does.
    return [d.contiguous() for d in gradient_reference(*given)]


def _fake_gradient(dh: Tensor, gate: Tensor, *others: Any) -> list[Tensor]:
    *_, wants_gate, wants_up, _ = others
    wanted = range(wants_gate + wants_up)
    return [torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in wanted]


for _name, _impl in (("swiglu_hidden", _hidden_impl), ("swiglu_gradient", _gradient_impl)):
    torch.library.define(
        f"relneuron::{_name}",
        torch.library.infer_schema(_impl, mutates_args=()),
        tags=torch.Tag.pt2_compliant_tag,
    )
    torch.library.impl(f"relneuron::{_name}", "CompositeExplicitAutograd", _impl)
torch.library.register_fake(
    "relneuron::swiglu_hidden",
    lambda gate, *args: torch.empty_like(gate, memory_format=torch.contiguous_format),
)
torch.library.register_fake("relneuron::swiglu_gradient", _fake_gradient)
_hidden_op = torch.ops.relneuron.swiglu_hidden.default
_gradient_op = torch.ops.relneuron.swiglu_gradient.default


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation, keep, condition_ids, _, ctx.backend = inputs
    ctx.save_for_backward(gate, up, keep, condition_ids)


def _backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    gate, up, keep, condition_ids = ctx.saved_tensors
    wants_gate, wants_up = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and up is not None
    given = (dh, gate, up, ctx.activation, keep, condition_ids, wants_gate, wants_up)
    # With create_graph=True the gradient shall have a gradient; that of plain torch has.
    if torch.is_grad_enabled():
        found = gradient_reference(*given)
    else:
        # torch's dispatcher takes longer than a small call.
        run = _gradient_impl if is_eager() else _gradient_op
        found = run(*given, ctx.backend)
    d_gate, d_up = found[0] if wants_gate else None, found[-1] if wants_up else None
    return d_gate, d_up, *[None] * 5


torch.library.register_autograd("relneuron::swiglu_hidden", _backward, setup_context=_remember)


class _Launched(torch.autograd.Function):
    """The same gradient around a launch that records, too: one pass over gate and up."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *inputs_of_h, launch = inputs
        h = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
        launch(h)
        _remember(ctx, tuple(inputs_of_h), h)
        return h

    @staticmethod
    def backward(ctx: Any, *dh: Any) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, *dh), None)


def needs_gradient(gate: Tensor, up: Tensor | None) -> bool:
    """Whether autograd asks for the gradient of h."""
    wanted = gate.requires_grad or (up is not None and up.requires_grad)
    return wanted and torch.is_grad_enabled()


def with_gradient(
    launch: Callable[[Tensor | None], None],
    is_recording: bool,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    keep: Tensor | None,
    condition_ids: Tensor | None,
    ids_checked: bool,
    backend: str,
) -> Tensor:
    """h with its gradient. `launch` is the call without one: it records, and writes h if given."""
    inputs = (gate, up, activation, keep, condition_ids, ids_checked, backend)
    if not torch.compiler.is_compiling():
        return cast(Tensor, _Launched.apply(*inputs, launch))  # type: ignore[no-untyped-call]
    # The compiler differentiates no op that writes into its arguments.
    if is_recording:
        with torch.no_grad():
            launch(None)
    return cast(Tensor, _hidden_op(*inputs))
