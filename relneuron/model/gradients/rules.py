"""Backward rules that keep relevance whole: what a layer passes down adds up to what came to it.

`relevance.py` runs a model under them, by the option `conservative`. They are those that layer-wise
relevance propagation is written as for transformers (AttnLRP, arXiv 2402.05602; without a gradient
through the attention's weights, CP-LRP), in code of our own. The authors' package for it (LXT) says
that LRP is patented and allows personal and scientific use only; whether a patent covers a use of
these rules is for its user to find out. The rule `plain` is the gradient and no such rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from relneuron.artifact.files import RelneuronError
from relneuron.model.gradients.sites import Sites

_TINY = 1e-10  # beside an activation's input, as LXT's description has it


class _Scaled(torch.autograd.Function):
    """The values as they are; what comes back is multiplied with `factor`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor | float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return slopes[0] * ctx.factor, None


def _halved(values: Tensor) -> Tensor:
    """A product a * u, of which either factor gets one half of what belongs to it."""
    return cast(Tensor, _Scaled.apply(values, 0.5))  # type: ignore[no-untyped-call]


class _Ratio(torch.autograd.Function):
    """An activation's values, with f(z) / z in the place of its derivative."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(z, values)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        z, values = ctx.saved_tensors
        return slopes[0] * values / (z + _TINY), None


def _as_ratio(z: Tensor, values: Tensor) -> Tensor:
    return cast(Tensor, _Ratio.apply(z, values.detach()))  # type: ignore[no-untyped-call]


class _Rules(TorchFunctionMode):
    """Within it the scale of a norm and the weights of an attention are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.n_norms = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.rsqrt, Tensor.rsqrt):
            self.n_norms += 1
            return func(*args, **kwargs).detach()
        if func in (functional.layer_norm, functional.rms_norm):
            self.n_norms += 1
            return _norm(func, *args, **kwargs)
        if func in (torch.softmax, Tensor.softmax, functional.softmax):
            return func(*args, **kwargs).detach()
        if func is functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False))
            rest, kwargs = args[len(named) :], {**named, **kwargs}
            query, key, value = (kwargs.pop(name) for name in ("query", "key", "value"))
            return func(query.detach(), key.detach(), value, *rest, **kwargs)
        if func in (functional.silu, functional.gelu, functional.relu, torch.relu):
            z = args[0] if args else kwargs["input"]
            return _as_ratio(z, func(*args, **{k: v for k, v in kwargs.items() if k != "inplace"}))
        return func(*args, **kwargs)


def _norm(
    func: Callable[..., Tensor],
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """A LayerNorm or an RMSNorm as a linear map, its scale that of the input."""
    over = tuple(range(-len(tuple(normalized_shape)), 0))
    is_centred = func is functional.layer_norm
    eps = (1e-5 if is_centred else torch.finfo(input.dtype).eps) if eps is None else eps
    x = input - input.mean(over, keepdim=True) if is_centred else input
    y = x * (x.square().mean(over, keepdim=True) + eps).rsqrt().detach()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@contextmanager
def conservative(sites: Sites) -> Iterator[None]:
    """Within it a backward of the model passes relevance on, and loses none but to biases.

    Four rules: a norm's scale is a constant; of a gated MLP's product either factor gets one half;
    an activation's derivative is f(z) / z; an attention's weights are constants. Gradient times
    value then adds up to the logit at every height of a model without biases. The values of the
    forward are the model's own, but for rounding. Raises RelneuronError, behind the forward, for a
    model whose norms are none that these rules know.
    """
    with ExitStack() as stack:
        acts: dict[int, nn.Module] = {}
        for mlp in sites.mlps:
            if mlp is None:
                continue
            if mlp.up is not None:
                handle = mlp.product.module.register_forward_pre_hook(_halve)
                stack.callback(handle.remove)
            if mlp.act is not None:
                acts[id(mlp.act)] = mlp.act
        for module in acts.values():
            stack.callback(module.register_forward_hook(_linear_act).remove)
        rules = stack.enter_context(_Rules())
        yield
    if not rules.n_norms:
        raise RelneuronError(
            f"{type(sites.model).__name__} computes its norms in a way that the conservative rules "
            "do not know",
            "use --rules plain",
        )


def _halve(_: Any, args: tuple[Any, ...]) -> Any:
    return (_halved(args[0]), *args[1:]) if args else None


def _linear_act(_: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return _as_ratio(args[0], output)
