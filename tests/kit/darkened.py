"""What each neuron adds to the stream, by switching it off inside of the model itself.

The tests of attribution in models of many kinds compare with it. Of relneuron it takes only which
linear map gives what a part writes, and which norms are frozen; the sums are the model's own.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from relneuron.model.stream.norms import Norm
from relneuron.model.stream.parts import ResidualLayer, ResidualModel


def frozen(norm: Norm, x: Tensor, at: Tensor) -> Tensor:
    """What the norm's module gives for x (.., D), with the scale that it has for `at`."""

    def square(y: Tensor) -> Tensor:
        y = y.double() - y.double().mean(-1, keepdim=True) if norm.centred else y.double()
        return (y * y).mean(-1, keepdim=True) + norm.eps

    given, bias = norm.module.forward(x).double(), getattr(norm.module, "bias", None)
    bias = torch.zeros(()) if bias is None else bias.double()
    return (given - bias) * (square(x) / square(at)).sqrt() + bias


@torch.no_grad()
def written(
    residual: ResidualModel, layer: ResidualLayer, part: str, ids: list[int], keep: Tensor
) -> Tensor:
    """(N, D) float64: the layer's output at the last token with neurons (N, K) times `keep` there.

    `part` is `ffn` or `attention`; of the latter, all of the layer's FFN neurons are at zero. A
    norm behind the part keeps the scale that it has in the unchanged model.
    """
    write = getattr(layer, part)
    seen: list[Tensor] = []
    found: list[Tensor] = []

    def scale(_: Any, args: Any) -> tuple[Tensor]:
        x = args[0].clone()
        x.view(len(keep), len(ids), -1)[:, -1] *= keep.to(x.dtype)
        return (x,)

    def refreeze(_: Any, args: Any, output: Tensor) -> Tensor:
        return frozen(write.norm, args[0], seen[0]).to(output.dtype)

    def end(_module: Any, _args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[:, -1])

    def run(n: int) -> None:
        residual.model(input_ids=torch.tensor([ids] * n), use_cache=False)

    with ExitStack() as stack:
        if write.norm is not None:
            see = lambda _, args: seen.append(args[0])  # noqa: E731
            handle = write.norm.module.register_forward_pre_hook(see)
            run(1)
            handle.remove()
            handle = write.norm.module.register_forward_hook(refreeze)
            stack.callback(handle.remove)
        stack.callback(write.linear.register_forward_pre_hook(scale).remove)
        stack.callback(layer.module.register_forward_hook(end).remove)
        if part == "attention":
            off = lambda _, args: (args[0] * 0,)  # noqa: E731
            stack.callback(layer.down.register_forward_pre_hook(off).remove)
        run(len(keep))
    return found[0].double()


@torch.no_grad()
def state_before(
    residual: ResidualModel, layer: ResidualLayer, part: str, ids: list[int], h: Tensor
) -> Tensor:
    """(D,) the stream before a part writes: h, or with what the attention adds to it.

    The latter with all of the FFN's neurons and biases at zero, in the model itself.
    """
    if part == "attention":
        return h.double()
    biases = [getattr(layer.down, "bias", None)]
    biases += [] if layer.ffn.norm is None else [getattr(layer.ffn.norm.module, "bias", None)]
    kept = [None if bias is None else bias.clone() for bias in biases]
    for bias in biases:
        if bias is not None:
            bias.zero_()
    nothing = torch.zeros(1, residual.width, dtype=torch.float64)
    found = written(residual, layer, part, ids, nothing)[0]
    for bias, own in zip(biases, kept, strict=True):
        if bias is not None:
            bias.copy_(own)
    return found


@torch.no_grad()
def log_p(residual: ResidualModel, y: Tensor, end: Tensor, own: Tensor, target: int) -> Tensor:
    """(N,) log p(target) of states y (N, D) by the model's own norm and head.

    The norm's scale is that of the state `end` (D,) with which the model itself ends; the logits
    are multiplied with what makes those of `end` the model's `own` (V,), and capped by Gemma 2.
    """
    cap = getattr(residual.model.config, "final_logit_softcapping", None)
    norm, head = residual.final_norm, residual.model.get_output_embeddings()
    dtype = next(residual.model.parameters()).dtype

    def logits(states: Tensor) -> Tensor:
        return head(frozen(norm, states.to(dtype), end).to(dtype)).double()

    def capped(z: Tensor) -> Tensor:
        return z if cap is None else cap * (z / cap).tanh()

    at_end = logits(end[None])[0]
    factor = 1.0 if cap is not None else (own.double() @ at_end) / (at_end @ at_end)
    torch.testing.assert_close(capped(at_end * factor), own.double(), rtol=0, atol=1e-5)
    return capped(logits(y) * factor).log_softmax(-1)[:, target]
