"""One forward pass over a few sentences, with everything that is written into the residual stream.

`methods/gains/values.py`, `methods/gains/scores.py` and the comparison of methods score what
stands in a `Trace`; `read.py` checks with it that a model adds up as they assume.
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
from relneuron.model.stream.mixture import (
    Block,
    Columns,
    ExpertMember,
    MlpMember,
    Sent,
    blocks_of,
    given_to,
    side_by_side,
)
from relneuron.model.stream.parts import Heads, ResidualLayer, ResidualModel, Write, unsupported

_PARTS = (
    *("h", "r", "attention", "ffn", "neurons", "ffn_scale", "attention_scale"),
    *("weights", "values"),
)


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
    # (E, T, F): inputs of `down`; (E, T, 0) of a layer with a mixture, whose members have `sent`
    neurons: list[Tensor] = field(default_factory=list)
    sent: list[list[Sent]] = field(default_factory=list)
    # (E, T) float64: what neurons are multiplied with behind their maps; None: 1 everywhere
    ffn_scale: list[Tensor | None] = field(default_factory=list)
    attention_scale: list[Tensor | None] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)  # (E, H, T): of the last position
    values: list[Tensor] = field(default_factory=list)  # (E, T, H, d_h), value heads repeated

    def coefficients(self, layer: int) -> Tensor:
        """(E, T, H * d_h): what position p and coordinate k of head j give to the last position.

        alpha_{T,p} * val_{p,k}, the factor of the value vector of coordinate j d_h + k, times the
        scale of the attention's write at T, if it has one; in float32 for models of 16 bits.
        """
        weights = self.weights[layer].transpose(1, 2).unsqueeze(-1)
        wide = torch.promote_types(weights.dtype, torch.float32)
        heads = (weights.to(wide) * self.values[layer].to(wide)).flatten(2)
        scale = self.attention_scale[layer]
        return heads if scale is None else heads * scale[:, -1:, None].to(wide)

    def ffn_coefficients(self, layer: int) -> Tensor:
        """(E, F): the factor of each FFN neuron's value vector at the last position.

        The neuron, times the scale of the FFN's write there, if it has one; then in float32 for
        models of 16 bits. Of a layer without a mixture.
        """
        neurons, scale = self.neurons[layer][:, -1], self.ffn_scale[layer]
        if scale is None:
            return neurons
        wide = torch.promote_types(neurons.dtype, torch.float32)
        return neurons.to(wide) * scale[:, -1:].to(wide)

    def ffn_coefficient(self, layer: ResidualLayer, e: int, index: int) -> float:
        """The same of one neuron and sentence, which is 0 of an expert that it was not sent to."""
        i = layer.layer
        if not layer.mixture:
            return scaled(self.neurons[i][e, -1, index], self.ffn_scale[i], e)
        sentence, last = torch.tensor([[e], [-1]], device=self.mask.device)
        for block in self.blocks(layer, sentence, last):
            if block.start <= index < block.span.stop:
                return float(block.coefficients()[0, index - block.start])
        return 0.0

    def blocks(self, layer: ResidualLayer, sentence: Tensor, column: Tensor) -> Iterator[Block]:
        """The FFN neurons of a layer at n places, `sentence` and `column` (n,) int64.

        One block of a dense layer. Of a mixture a block for each expert that any of the places was
        sent to, those with the higher numbers first; the others wrote nothing.
        """
        i = layer.layer
        scale = self.ffn_scale[i]
        at = None if scale is None else scale[sentence, column]
        if not layer.mixture:

            def read(some: slice) -> Tensor:
                return self.neurons[i][..., some][sentence, column]

            yield Block(None, 0, layer.ffn_values(), None, at, read)
            return
        place = (sentence, column)
        yield from blocks_of(layer.mixture, self.sent[i], place, at, layer.ffn.behind)

    def columns(self, layer: ResidualLayer) -> Columns:
        """The FFN neurons of a layer at the last position."""
        if not layer.mixture:
            return Columns(None, layer.ffn_values(), self.ffn_coefficients(layer.layer), None)
        sentences = torch.arange(len(self.mask), device=self.mask.device)
        blocks = self.blocks(layer, sentences, torch.full_like(sentences, -1))
        return side_by_side(blocks, len(sentences), sentences.device)


def scaled(value: Tensor, scale: Tensor | None, e: int) -> float:
    """One coefficient of sentence `e`, times the scale of its write at the last position."""
    return float(value) if scale is None else float(value) * float(scale[e, -1])


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


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A module's first tensor, however its caller passed it."""
    found = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    if found is None:
        raise TypeError("a module reads no tensor")
    return found


def _tensor(output: Any) -> Tensor:
    """What a module gives, the first part of it where there are several."""
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found.detach()


class _Reading:
    """The hooks that fill a trace; a context manager, so that none of them stays.

    What is added to the stream is copied, as some models add in place.
    """

    def __init__(self, residual: ResidualModel, found: Trace) -> None:
        self.residual, self.found, self._stack = residual, found, ExitStack()
        # What was read of the members of mixtures, by layer and member: of experts what was sent;
        # of an MLP its neurons, and the outputs of the map that weighs it.
        self._members: dict[tuple[int, int], list[Any]] = {}
        self._weights: dict[tuple[int, int], Tensor] = {}

    def __enter__(self) -> _Reading:
        with ExitStack() as stack:
            for layer in self.residual.layers:
                self._read_layer(stack, layer)
            last = self.residual.layers[-1].module
            self._read_output(stack, last, lambda y: self.found.h.append(_tensor(y).clone()))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _shaped(self, tensor: Tensor) -> Tensor:
        """(E, T, n), also of what a model has flattened to (E * T, n)."""
        return tensor.detach().reshape(*self.found.mask.shape, -1)

    def _read_input(self, stack: ExitStack, module: nn.Module, to: list[Tensor]) -> None:
        def read(_: Any, args: Any, kwargs: Any) -> None:
            to.append(self._shaped(_first(args, kwargs)).clone())

        stack.callback(module.register_forward_pre_hook(read, with_kwargs=True).remove)

    def _read_output(
        self, stack: ExitStack, module: nn.Module, read: Callable[[Any], None]
    ) -> None:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            read(output)

        stack.callback(module.register_forward_hook(hook).remove)

    def _read_layer(self, stack: ExitStack, layer: ResidualLayer) -> None:
        found = self.found
        self._read_input(stack, layer.module, found.h)
        if layer.mixture:
            self._read_mixture(stack, layer)
        else:
            self._read_input(stack, layer.down, found.neurons)
        self._read_write(stack, layer.ffn, found.ffn, found.ffn_scale)
        self._read_write(stack, layer.attention, found.attention, found.attention_scale)
        if layer.heads is not None:
            self._read_heads(stack, layer.heads)

    def _read_write(
        self, stack: ExitStack, write: Write, to: list[Tensor], scales: list[Tensor | None]
    ) -> None:
        sources = [write.source] if write.also is None else [write.source, write.also]
        given: list[Tensor] = []

        def read(output: Any) -> None:
            given.append(self._shaped(_tensor(output)).clone())
            if len(given) == len(sources):
                y = given[0] if len(given) == 1 else given[0] + given[1]
                to.append(write.added(y))
                given.clear()

        def read_scale(output: Any) -> None:
            y = self._shaped(_tensor(output))
            scales.append(write.scale(y) if write.is_scaled else None)

        # In this order, should both be one module.
        if write.linear is None and write.norm is not None:

            def read_input(_: Any, args: Any, kwargs: Any) -> None:
                read_scale(_first(args, kwargs))

            hook = write.norm.module.register_forward_pre_hook(read_input, with_kwargs=True)
            stack.callback(hook.remove)
        else:
            self._read_output(stack, write.linear or write.source, read_scale)
        for source in sources:
            self._read_output(stack, source, read)

    def _read_mixture(self, stack: ExitStack, layer: ResidualLayer) -> None:
        for number, member in enumerate(layer.mixture):
            place = (layer.layer, number)
            seen = self._members.setdefault(place, [])
            if isinstance(member, ExpertMember):
                module, hook = member.experts.module, partial(self._read_experts, member, seen)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
                continue
            self._read_input(stack, member.down, seen)
            if member.weight is not None:
                self._read_output(stack, member.weight, partial(self._read_weight, place))

    def _read_weight(self, place: tuple[int, int], output: Any) -> None:
        self._weights[place] = self._shaped(_tensor(output)).clone()

    def _read_experts(
        self, member: ExpertMember, seen: list[Any], module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        seen.append(member.sent(self.found.mask.shape, given_to(module, args, kwargs)))

    def end(self) -> None:
        """Put together what was read of mixtures, once the forward is done."""
        found = self.found
        for layer in self.residual.layers:
            found.sent.append([])
            for number, member in enumerate(layer.mixture):
                seen = self._members[layer.layer, number]
                if len(seen) != 1:
                    why = f"a forward calls the experts of layer {layer.layer} {len(seen)} times"
                    raise unsupported(self.residual.model, why)
                if isinstance(member, MlpMember):
                    weight = self._weights.get((layer.layer, number))
                    seen = [member.sent(seen[0], weight)]
                found.sent[-1] += seen
            if layer.mixture:
                found.neurons.insert(layer.layer, found.h[layer.layer][..., :0])

    def _read_heads(self, stack: ExitStack, heads: Heads) -> None:
        def read_values(output: Any) -> None:
            values = heads.value.rows.of(self._shaped(_tensor(output)))
            self.found.values.append(values.reshape(*values.shape[:2], heads.n, -1))

        def read_weights(output: Any) -> None:
            parts = output[1:] if isinstance(output, tuple) else ()
            weights = [v for v in parts if isinstance(v, Tensor) and v.dim() == 4]
            if not weights:
                raise RelneuronError(
                    f"{type(heads.module).__name__} gives no attention weights, not even when "
                    "eager",
                    "give a model with the attention functions of transformers 5 or newer",
                )
            self.found.weights.append(weights[0][:, :, -1].detach().clone())

        self._read_output(stack, heads.value.rows.module, read_values)
        self._read_output(stack, heads.module, read_weights)


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
    if len(lengths) == 1 or (residual.pads and residual.unembed.dtype != torch.float64):
        return _run(residual, ids)
    # Some models see padding, as a recurrence does. And eager attention casts a float64 model's
    # mask to float32, where its least number is -inf; rows of padding alone would be NaN, and so
    # would be everything that sees them.
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
            if tensor is None:
                ours += [None] * (layer == len(ours))
                continue
            if len(ours) == layer:
                shape = list(tensor.shape)
                shape[0], shape[dim] = len(whole.mask), n_tokens
                ours.append(tensor.new_zeros(shape))
            length = tensor.shape[dim]
            ours[layer].narrow(dim, n_tokens - length, length)[rows] = tensor
    for layer, members in enumerate(part.sent):
        if len(whole.sent) == layer:
            whole.sent.append([sent.like(len(whole.mask), n_tokens) for sent in members])
        pairs = zip(whole.sent[layer], members, strict=True)
        whole.sent[layer] = [ours.put(sent, rows) for ours, sent in pairs]


def _run(residual: ResidualModel, ids: Sequence[Sequence[int]]) -> Trace:
    """One forward of left-padded sentences."""
    model, unembed = residual.model, residual.unembed
    tokens, mask = pad(ids, unembed.device)
    found = _empty(residual, tokens.shape[1] - mask.sum(1), tokens.shape[1])
    with eager_attention(model), _Reading(residual, found) as reading:
        logits = last_logits(model, tokens, mask)
    reading.end()
    found.logits = logits.float()
    found.scale = residual.final_norm.scale(found.h[-1][:, -1])
    pairs = zip(found.h, found.attention, strict=False)  # h has one more
    found.r = [h + attention for h, attention in pairs]
    return found


def last_logits(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """(E, V): the logits of the last of left-padded tokens (E, T), with explicit positions.

    A model that takes no positions counts them itself.
    """
    known = inspect.signature(model.forward).parameters
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(
        input_ids=tokens,
        attention_mask=mask,
        use_cache=False,
        **({"position_ids": positions} if "position_ids" in known else {}),
        **({"logits_to_keep": 1} if "logits_to_keep" in known else {}),
    )
    logits: Tensor = output.logits[:, -1]
    return logits
