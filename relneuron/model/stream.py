"""A model as a residual stream: what its layers write, how logits are read, confirmed by numbers.

The attribution stage calls `read_residual_model` once and hands the result to `model/trace.py`, to
the scores made of a trace and to the interventions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from relneuron.model.layers import TRAINING, Unfound, check_unwrapped, is_training, unreadable
from relneuron.model.stream_layers import (
    QUERY_KEYS,
    Norm,
    ResidualLayer,
    ResidualModel,
    find_layers,
    matrix,
    read_norm,
    residual_layers,
    unsupported,
)
from relneuron.model.trace import Trace, trace

__all__ = ["QUERY_KEYS", "Norm", "ResidualLayer", "ResidualModel", "read_residual_model"]

_N_CHECKED = 6  # tokens of the sentence of the self-check
_ROUNDINGS = 8  # units of the dtype's eps that a sum of the self-check may be off by, and at least
_FLOAT32_SUMS = 2.0**-16  # what float32 sums over thousands of terms may; all norms are float32


def read_residual_model(model: Any) -> ResidualModel:
    """Find the residual stream of a causal language model and check that it adds up.

    Found by structure: gated MLPs (`gate_proj`, `up_proj` or `gate_up_proj`, and `down_proj`) or
    `c_fc` and `c_proj`; attention with `v_proj` or `qkv_proj` and `o_proj`, or `c_attn` and
    `c_proj`; one RMSNorm or LayerNorm in front of each. On a short random sentence must hold, in
    every layer, h + attention write = r, r + FFN write = next h, neurons @ value vectors + bias =
    FFN write, sum over heads and positions of alpha * val @ W_O + bias = attention write; and
    scale * h^L @ unembed.T + offset = the model's logits. Raises RelneuronError with the layer and
    what does not hold; for weights that are sharded, offloaded, quantised or on several devices;
    and for a model in train mode.
    """
    check_unwrapped(model)
    _check_weights(model)
    residual = _assemble(model)
    _check_sums(residual)
    return residual


def _check_weights(model: Any) -> None:
    """Refuse weights that cannot be read as they lie."""
    devices = set()
    for name, parameter in model.named_parameters():
        if why := unreadable(parameter):
            raise unsupported(model, f"{name} is {why}")
        devices.add(str(parameter.device))
    if len(devices) > 1:
        raise unsupported(
            model, f"its weights are on several devices ({', '.join(sorted(devices))})"
        )
    if is_training(model):
        raise unsupported(model, f"it is in {TRAINING}")


def _assemble(model: Any) -> ResidualModel:
    layers = find_layers(model)
    first = layers[0]
    hidden, width = matrix(first.down).shape
    heads_width = matrix(first.out).shape[1]
    head_dim = heads_width // first.n_heads
    shapes = {(matrix(x.down).shape, matrix(x.out).shape, x.value.n) for x in layers}
    if len(shapes) > 1:
        raise unsupported(model, "its layers differ in shape")
    norm = _final_norm(model, hidden)
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != hidden:
        raise unsupported(model, f"it has no lm_head with a matrix (V, {hidden})")
    unembed, offset = _fold_head(weight.detach(), getattr(head, "bias", None), norm)
    return ResidualModel(
        model=model,
        layers=layers,
        final_norm=norm,
        n_heads=first.n_heads,
        n_kv_heads=first.value.n // head_dim,
        head_dim=head_dim,
        width=width,
        hidden=hidden,
        vocabulary=len(unembed),
        is_gated=first.gate != first.up,
        centred=norm.centred,
        eps=norm.eps,
        unembed=unembed,
        offset=offset,
    )


def _final_norm(model: Any, hidden: int) -> Norm:
    """The last norm beside the list of decoder layers."""
    path, _ = residual_layers(model)
    parent = model.get_submodule(path.rpartition(".")[0])
    norms = [
        module
        for module in parent.children()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() == 1
    ]
    if not norms:
        raise unsupported(model, "it has no norm after its decoder layers")
    try:
        return read_norm(norms[-1], hidden)
    except Unfound as error:
        raise unsupported(model, f"its final norm: {error}") from None


def _fold_head(
    weight: Tensor, head_bias: nn.Parameter | None, norm: Norm
) -> tuple[Tensor, Tensor | None]:
    """unembed (V, D) = W_U (.) gain, rows centred under a LayerNorm; offset = W_U beta + bias."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    unembed = weight.to(dtype) * norm.gain.to(dtype)
    if norm.centred:
        unembed = unembed - unembed.mean(1, keepdim=True)
    offset = None
    if norm.bias is not None:
        offset = weight.to(dtype) @ norm.bias.to(dtype)
    if head_bias is not None:
        offset = head_bias.detach().to(dtype) + (0 if offset is None else offset)
    return unembed, offset


# --- the self-check --------------------------------------------------------------------------


def _check_sums(residual: ResidualModel) -> None:
    """Compare every sum that the scores are built on with what the model computed."""
    generator = torch.Generator().manual_seed(0)
    highest = residual.model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, highest, (_N_CHECKED,), generator=generator, device="cpu").tolist()
    found = trace(residual, [ids])
    n = len(residual.layers)
    parts = (found.r, found.attention, found.ffn, found.neurons, found.weights, found.values)
    if len(found.h) != n + 1 or any(len(part) != n for part in parts):
        raise unsupported(residual.model, "a forward does not call every part of a layer once")
    for layer in residual.layers:
        for what, ours, theirs, agree in _sums(residual, layer, found):
            if not agree(ours, theirs):
                raise unsupported(residual.model, f"in layer {layer.layer} {what} does not hold")
    y = found.h[-1][:, -1].to(residual.unembed.dtype)
    logits = found.scale[:, None] * (y @ residual.unembed.T)
    if residual.offset is not None:
        logits = logits + residual.offset
    if not _agree(logits, found.logits, found.h[-1].dtype):
        raise unsupported(
            residual.model, "its logits are not lm_head(final norm(last layer's output))"
        )


def _sums(
    residual: ResidualModel, layer: ResidualLayer, found: Trace
) -> list[tuple[str, Tensor, Tensor, Callable[[Tensor, Tensor], bool]]]:
    """(equation, its left side in float64, its right side, how they agree) for one layer.

    A write is small beside the stream, so a sum of the two is looked at number by number.
    """
    i = layer.layer
    heads = found.coefficients(i).double().sum(1)
    repeats = residual.n_heads // residual.n_kv_heads
    normed = layer.attention_norm.apply(found.h[i]) @ layer.value.matrix().double().T
    return [
        (
            "value map @ norm(input) + bias = the heads' values",
            normed + layer.value.of(_bias(layer.value.module)),
            found.values[i][:, :, ::repeats].flatten(2),
            _agree,
        ),
        (
            "input + attention write = what the norm in front of the MLP reads",
            found.h[i].double() + found.attention[i].double(),
            found.r[i],
            _is_rounded,
        ),
        (
            "that + FFN write = the next layer's input",
            found.r[i].double() + found.ffn[i].double(),
            found.h[i + 1],
            _is_rounded,
        ),
        (
            "neurons @ value vectors + bias = FFN write",
            found.neurons[i].double() @ layer.ffn_values().double() + _bias(layer.down),
            found.ffn[i],
            _agree,
        ),
        (
            "the sum of attention weight * value @ value vectors + bias = attention write",
            heads @ layer.attention_values().double() + _bias(layer.out),
            found.attention[i][:, -1],
            _agree,
        ),
    ]


def _bias(module: nn.Module) -> Tensor:
    """(out,) float64, zeros where the map has none."""
    bias = getattr(module, "bias", None)
    if bias is None:
        weight = matrix(module)
        return weight.new_zeros(len(weight), dtype=torch.float64)
    return cast(Tensor, bias).detach().double()


def _is_rounded(ours: Tensor, theirs: Tensor) -> bool:
    """Whether every number of theirs is that of ours, rounded to their dtype and a little more."""
    if ours.shape != theirs.shape:
        return False
    limit = torch.finfo(theirs.dtype).eps * theirs.double().abs()
    tiny = torch.finfo(theirs.dtype).tiny
    return bool(((ours.double() - theirs.double()).abs() <= limit + tiny).all())


def _agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Equal up to the rounding of `dtype`, by default theirs, relative to the largest number."""
    if ours.shape != theirs.shape:
        return False
    limit = max(_ROUNDINGS * torch.finfo(dtype or theirs.dtype).eps, _FLOAT32_SUMS)
    largest = theirs.double().abs().max()
    return bool((ours.double() - theirs.double()).abs().max() <= limit * largest)
