"""What every op asks of its tensors before their shapes: plain memory, and no gradient to lose.

The kernels read addresses, so what stands there must be the values; and but for h of `swiglu_stats`
no op has a gradient. Each op calls `check_tensors` first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

# The bits of torch's dispatcher say in one number all that a tensor can be beside its values in
# memory; those in this set are known to be nothing.
PLAIN: set[int] = set()
dispatch_keys = torch._C._dispatch_keys

# Dispatch key (or how its name begins) -> what is wrong, and what to do.
_REASONS = {
    "Negative": "has the negative bit; call .resolve_neg()",
    "Conjugate": "has the conjugate bit; call .resolve_conj()",
    "ZeroTensor": "is a zero tensor without memory; call .clone()",
    "Quantized": "is quantised; call .dequantize()",
    "FuncTorch": "is inside torch.func or vmap; call the op outside",
    "Functionalize": "is inside torch.func.functionalize; call the op outside",
    "Python": "is a subclass of torch.Tensor with values elsewhere ({kind}); give a plain tensor",
    "": "has no dense memory (layout {layout}, {device}); call .to_dense()",
}


def check_tensors(
    op: str,
    tensors: Mapping[str, object],
    optional: Mapping[str, object] | None = None,
    differentiable: Collection[str] = (),
) -> None:
    """Refuse what is no tensor, what a kernel cannot read as it lies, and gradients.

    `tensors`, and `optional` ones that may be None: the op's arguments by name; of those that are
    `differentiable` the op has a gradient. While torch compiles, only gradients are looked at: the
    compiler resolves the rest.
    """
    is_compiling = torch.compiler.is_compiling()
    has_gradients = torch.is_grad_enabled()
    has_tangents = not is_compiling and forward_ad._current_level >= 0
    for some in (tensors, optional or {}):
        for name, tensor in some.items():
            if tensor is None and some is optional:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
            if not is_compiling and dispatch_keys(tensor).raw_repr() not in PLAIN:
                _check_plain(op, name, tensor)
            if has_gradients and tensor.requires_grad and name not in differentiable:
                raise ValueError(
                    f"{op}: {name} must not require grad, the op gives it none; "
                    f"pass {name}.detach(), or call it under torch.no_grad()"
                )
            if has_tangents and _has_tangent(tensor):
                raise ValueError(
                    f"{op}: {name} must not have a tangent, the op takes it no further; "
                    f"pass torch.autograd.forward_ad.unpack_dual({name}).primal"
                )


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel can read a tensor as it lies, and nothing is lost of a tangent."""
    if torch.compiler.is_compiling():
        return True
    if forward_ad._current_level >= 0 and _has_tangent(tensor):
        return False
    return dispatch_keys(tensor).raw_repr() in PLAIN or _strange_key(tensor) is None


def _has_tangent(tensor: Tensor) -> bool:
    primal_and_tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return primal_and_tangent.tangent is not None


def _strange_key(tensor: Tensor) -> str | None:
    """The first dispatch key that says more than where the values are; remembers if there is none.

    A fake tensor has no values, and nothing is read from it.
    """
    if type(tensor).__name__ == "FakeTensor":
        return None
    dense = torch._C._dispatch_key_for_device(tensor.device.type)
    keys = dispatch_keys(tensor)
    for key in repr(keys).removeprefix("DispatchKeySet(").removesuffix(")").split(", "):
        if key not in (dense, "ADInplaceOrView") and not key.startswith(("Autograd", "Autocast")):
            return key
    PLAIN.add(keys.raw_repr())
    return None


def _check_plain(op: str, name: str, tensor: Tensor) -> None:
    key = _strange_key(tensor)
    if key is None:
        return
    reason = next(text for prefix, text in _REASONS.items() if key.startswith(prefix))
    said = reason.format(kind=type(tensor).__name__, layout=tensor.layout, device=tensor.device)
    raise ValueError(f"{op}: {name} must be a plain tensor, but it {said}")
