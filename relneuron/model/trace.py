"""One forward pass over a few sentences, with everything that is written into the residual stream.

`methods/gains/values.py`, `methods/gains/scores.py` and the comparison of methods score what
stands in a `Trace`; `model/stream.py` checks with it that a model adds up as they assume.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.batches import pad
from relneuron.model.stream_layers import ResidualLayer, ResidualModel

_PARTS = ("h", "r", "attention", "ffn", "neurons", "weights", "values")


@dataclass
class Trace:
    """What E sentences, padded on the left to T tokens, wrote into the residual stream.

    One tensor a layer, in the model's dtype. At padding the tensors mean nothing; the attention
    weights there are 0. The last position is column T - 1 of every sentence.
    """

    n_pad: Tensor  # (E,) int64
    mask: Tensor  # (E, T) bool: tokens of the sentence
    scale: Tensor  # (E,) float64: the final norm's at the last position, frozen for every score
    logits: Tensor  # (E, V) float32, the model's own at the last position
    h: list[Tensor] = field(default_factory=list)  # (E, T, D), L + 1 of them: layer inputs, output
    r: list[Tensor] = field(default_factory=list)  # (E, T, D): between attention and FFN
    attention: list[Tensor] = field(default_factory=list)  # (E, T, D): the attention write
    ffn: list[Tensor] = field(default_factory=list)  # (E, T, D): the FFN write
    neurons: list[Tensor] = field(default_factory=list)  # (E, T, F): inputs of `down`
    weights: list[Tensor] = field(default_factory=list)  # (E, H, T): of the last position
    values: list[Tensor] = field(default_factory=list)  # (E, T, H, d_h), value heads repeated

    def coefficients(self, layer: int) -> Tensor:
        """(E, T, H * d_h): what position p and coordinate k of head j give to the last position.

        alpha_{T,p} * val_{p,k}, the factor of the value vector W_O[:, j d_h + k]; in float32 for
        models of 16 bits.
        """
        weights = self.weights[layer].transpose(1, 2).unsqueeze(-1)
        wide = torch.promote_types(weights.dtype, torch.float32)
        return (weights.to(wide) * self.values[layer].to(wide)).flatten(2)


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """The implementation that gives attention weights; what was set before comes back on exit."""
    name = "_attn_implementation_internal"  # the public setter would change sub-configs, too
    configs = {
        id(config): config
        for module in model.modules()
        if hasattr(config := getattr(module, "config", None), name)
    }
    before = [(config, getattr(config, name)) for config in configs.values()]
    try:
        for config, _ in before:
            setattr(config, name, "eager")
        yield
    finally:
        for config, implementation in before:
            setattr(config, name, implementation)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A module's first input, however its caller passed it."""
    found = args[0] if args else next(iter(kwargs.values()))
    if not isinstance(found, Tensor):
        raise TypeError(f"the first input is a {type(found).__name__}, not a tensor")
    return found


def _append_input(to: list[Tensor], _: Any, args: Any, kwargs: Any) -> None:
    to.append(_input(args, kwargs).detach())


def _append_output(to: list[Tensor], _module: Any, _args: Any, output: Tensor) -> None:
    to.append(output.detach())


def _append_weights(to: list[Tensor], module: Any, _args: Any, output: Any) -> None:
    weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if not isinstance(weights, Tensor) or weights.dim() != 4:
        raise RelneuronError(
            f"{type(module).__name__} gives no attention weights, not even when eager",
            "give a model with the attention functions of transformers 5 or newer",
        )
    to.append(weights[:, :, -1].detach().clone())


class _Reading:
    """The hooks that fill a trace; a context manager, so that none of them stays."""

    def __init__(self, residual: ResidualModel, found: Trace) -> None:
        self.residual, self.found, self._stack = residual, found, ExitStack()

    def __enter__(self) -> _Reading:
        with ExitStack() as stack:
            for layer in self.residual.layers:
                self._read_layer(stack, layer)
            self._read_input(stack, self.residual.final_norm.module, self.found.h)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _read_input(self, stack: ExitStack, module: nn.Module, to: list[Tensor]) -> None:
        hook = module.register_forward_pre_hook(partial(_append_input, to), with_kwargs=True)
        stack.callback(hook.remove)

    def _read_output(
        self, stack: ExitStack, module: nn.Module, read: Callable[..., None], to: list[Tensor]
    ) -> None:
        stack.callback(module.register_forward_hook(partial(read, to)).remove)

    def _read_layer(self, stack: ExitStack, layer: ResidualLayer) -> None:
        found, heads = self.found, self.residual.n_heads
        repeats = heads // self.residual.n_kv_heads

        def append_values(to: list[Tensor], _module: Any, _args: Any, output: Tensor) -> None:
            values = layer.value.of(output.detach())
            values = values.reshape(*values.shape[:2], heads // repeats, -1)
            to.append(values.repeat_interleave(repeats, dim=2))

        self._read_input(stack, layer.attention_norm.module, found.h)
        self._read_output(stack, layer.value.module, append_values, found.values)
        self._read_output(stack, layer.attention, _append_weights, found.weights)
        self._read_output(stack, layer.out, _append_output, found.attention)
        self._read_input(stack, layer.ffn_norm.module, found.r)
        self._read_input(stack, layer.down, found.neurons)
        self._read_output(stack, layer.down, _append_output, found.ffn)


@torch.no_grad()
def trace(residual: ResidualModel, ids: Sequence[Sequence[int]]) -> Trace:
    """Run the sentences `ids` (E of them, token ids) in one left-padded batch and keep all parts.

    The model runs eager attention for this forward only; hooks read and are removed, also after an
    error. `scale` and the scores made of a trace do not depend on the batch, but for rounding.
    Raises RelneuronError for no sentence, one without a token, and a model without weights.
    """
    if not ids or not all(ids):
        raise RelneuronError("there is a sentence without a token", "remove empty sentences")
    lengths = sorted({len(line) for line in ids})
    if residual.unembed.dtype != torch.float64 or len(lengths) == 1:
        return _run(residual, ids)
    # Eager attention casts a float64 model's mask to float32, where its least number is -inf; rows
    # of padding alone would be NaN, and so would be everything that sees them.
    found = _empty(
        residual, torch.tensor([lengths[-1] - len(line) for line in ids], device="cpu"), lengths[-1]
    )
    for length in lengths:
        rows = [row for row, line in enumerate(ids) if len(line) == length]
        _put(found, _run(residual, [ids[row] for row in rows]), rows)
    return found


def _empty(residual: ResidualModel, n_pad: Tensor, n_tokens: int) -> Trace:
    """A trace without parts; the mask follows from the padding."""
    unembed = residual.unembed
    n_pad = n_pad.to(unembed.device)
    mask = torch.arange(n_tokens, device=unembed.device) >= n_pad[:, None]
    logits = unembed.new_zeros(len(n_pad), len(unembed), dtype=torch.float32)
    scale = unembed.new_zeros(len(n_pad), dtype=torch.float64)
    return Trace(n_pad=n_pad, mask=mask, scale=scale, logits=logits)


def _put(whole: Trace, part: Trace, rows: list[int]) -> None:
    """Copy a trace of sentences of one length into their rows of a longer one, zeros in front."""
    n_tokens = whole.mask.shape[1]
    whole.scale[rows], whole.logits[rows] = part.scale, part.logits
    for name in _PARTS:
        ours, theirs = getattr(whole, name), getattr(part, name)
        dim = 2 if name == "weights" else 1
        for layer, tensor in enumerate(theirs):
            if len(ours) == layer:
                shape = list(tensor.shape)
                shape[0], shape[dim] = len(whole.mask), n_tokens
                ours.append(tensor.new_zeros(shape))
            length = tensor.shape[dim]
            ours[layer].narrow(dim, n_tokens - length, length)[rows] = tensor


def _run(residual: ResidualModel, ids: Sequence[Sequence[int]]) -> Trace:
    """One forward of left-padded sentences."""
    model, unembed = residual.model, residual.unembed
    tokens, mask = pad(ids, unembed.device)
    found = _empty(residual, tokens.shape[1] - mask.sum(1), tokens.shape[1])
    keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    with eager_attention(model), _Reading(residual, found):
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            **({"logits_to_keep": 1} if keep else {}),
        )
    found.logits = output.logits[:, -1].float()
    found.scale = residual.final_norm.scale(found.h[-1][:, -1])
    return found
