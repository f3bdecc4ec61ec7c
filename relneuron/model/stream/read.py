"""A model as a residual stream: what its layers write, how logits are read, confirmed by numbers.

The attribution stage calls `read_residual_model` once and hands the result to `model/trace.py`, to
the scores made of a trace and to the interventions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.batches import pad
from relneuron.model.layers import (
    TRAINING,
    Unfound,
    check_unwrapped,
    decoder_layers,
    first_line,
    is_training,
    unreadable,
)
from relneuron.model.mlps.candidates import linear_maps
from relneuron.model.mlps.experts import Experts
from relneuron.model.stream.find import (
    Found,
    agree,
    find_layer,
    heads_of,
    held_numbers,
    is_rounded,
)
from relneuron.model.stream.find_mixture import experts_in, find_mixture
from relneuron.model.stream.head import fold_head, with_tail
from relneuron.model.stream.norms import Norm, read_norm
from relneuron.model.stream.parts import (
    Heads,
    ResidualLayer,
    ResidualModel,
    added_up,
    unsupported,
)
from relneuron.model.stream.probe import N_SENTENCES, N_TOKENS, Call, Calls, recorded, same
from relneuron.model.stream.trace import Trace, eager_attention, last_logits, trace

N_CHECKED = 6  # tokens of the sentence of the self-check


def read_residual_model(model: Any) -> ResidualModel:
    """Find the residual stream of a causal language model and check that it adds up.

    Found in one recorded forward, by which module gives the numbers that another one reads, and not
    by names: an MLP down(activation(gate(x)) * up(x)) or down(activation(up(x))), what else each
    layer adds to the stream (attention, or anything in its place), norms in front of them, behind
    them or both, one block after the other or side by side, constants that they are multiplied
    with. In the place of an MLP may stand experts, with or without MLPs beside them, each of which
    may be multiplied with a constant or with the sigmoid of a map to one number. On another random
    sentence must hold, in every layer, h + attention write + FFN write = next h, number by number
    in the model's arithmetic; neurons @ value vectors + bias = FFN write; and scale * h^L @
    unembed.T + offset = the model's logits. Where the sum over heads and positions of alpha * val @
    value vectors + bias = attention write does not hold, or an attention gives no weights,
    `no_heads` says so. With the model's own attention its logits must be those that it has with
    eager attention, which gives the weights.

    Raises RelneuronError with the layer and what does not hold; for weights that are sharded,
    offloaded, quantised or on several devices; and for a model in train mode.
    """
    check_unwrapped(model)
    _check_weights(model)
    return _checked(_assemble(model))


def _check_weights(model: Any) -> None:
    """Refuse weights that cannot be read as they lie."""
    devices = set()
    for name, parameter in model.named_parameters():
        if why := unreadable(parameter):
            raise unsupported(model, f"{name} is {why}")
        devices.add(str(parameter.device))
    for name, module in linear_maps(model).items():
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise unsupported(model, f"{name} is quantised (it has no weight)")
    if len(devices) > 1:
        raise unsupported(
            model, f"its weights are on several devices ({', '.join(sorted(devices))})"
        )
    if is_training(model):
        raise unsupported(model, f"it is in {TRAINING}")


def _find(model: Any) -> tuple[list[ResidualLayer], str | None, Norm]:
    """Layers, why heads are not told apart, and the final norm, from one recorded forward."""
    path, layers = _decoder_layers(model)
    config = model.config.get_text_config()
    found: list[Found] = []
    last: list[Tensor] = []

    def look(number: int, whole: Call, calls: Calls) -> None:
        if number != len(found):
            raise unsupported(model, "a forward does not call its layers one after the other")
        if last and not same(last[0], whole.x):
            raise unsupported(model, f"layer {number} does not read what the layer before it gives")
        last[:] = [whole.y]
        numbers = held_numbers(whole.module, config)
        try:
            if whole.x.shape != whole.y.shape or whole.x.dtype != whole.y.dtype:
                raise Unfound("it does not give a state like the one that it reads")
            where = f"{path}.{number}"
            if own := experts[number]:
                found.append(find_mixture(number, where, whole, calls, numbers, own))
            else:
                found.append(find_layer(number, where, whole, calls, numbers))
        except Unfound as error:
            raise unsupported(model, f"layer {number}: {error}") from None

    ids = _random_ids(model, N_SENTENCES, N_TOKENS)
    experts = _experts(model, path, layers)
    of_all = [one for own in experts for one in own]
    recording = recorded(model, layers, look, of_all)
    with torch.no_grad(), eager_attention(model), recording as outer:
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except (RelneuronError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            why = f"a forward of {ids.numel()} tokens fails: {first_line(error)}"
            raise unsupported(model, why) from None
    if len(found) != len(layers):
        raise unsupported(model, "a forward does not call its layers one after the other")
    normed = outer.norm_reading(last[0])
    if normed is None:
        raise unsupported(model, _why_no_norm(outer, last[0]))
    reasons = [f"layer {i}: {one.no_heads}" for i, one in enumerate(found) if one.no_heads]
    if not reasons and len({heads_of(one.layer) for one in found}) > 1:
        reasons = ["its layers differ in their heads"]
    if not of_all and len({one.layer.n_neurons for one in found}) > 1:
        raise unsupported(model, "its layers differ in shape")
    return [one.layer for one in found], next(iter(reasons), None), normed[0]


def _experts(model: Any, path: str, layers: nn.ModuleList) -> list[list[Experts]]:
    """The experts of each layer, where it has any."""
    found = []
    for number, layer in enumerate(layers):
        try:
            found.append(experts_in(number, f"{path}.{number}", layer))
        except Unfound as error:
            raise unsupported(model, f"layer {number}: {error}") from None
    if len({one.expert_width for own in found for one in own[:1]}) > 1:
        raise unsupported(model, "its layers differ in the width of their experts")
    return found


def _why_no_norm(calls: Calls, x: Tensor) -> str:
    """Why nothing that reads the last layer's output is a norm."""
    for call in calls:
        if call.is_leaf and same(call.x, x):
            try:
                read_norm(call.module, x.shape[1], x)
            except Unfound as error:
                return f"its final norm: {error}"
    return "no norm reads what its last layer gives"


def _decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """`layers.decoder_layers`, with the error of this room."""
    try:
        return decoder_layers(model)
    except Unfound as error:
        raise unsupported(model, f"it has {error}") from None


def _random_ids(model: Any, n_sentences: int, n_tokens: int) -> Tensor:
    """(n_sentences, n_tokens) on the model's device, the same at every call."""
    embeddings = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    shape = (n_sentences, n_tokens)
    ids = torch.randint(0, embeddings.num_embeddings, shape, generator=generator, device="cpu")
    return ids.to(next(model.parameters()).device)


def _assemble(model: Any) -> ResidualModel:
    layers, no_heads, norm = _find(model)
    widths, hidden = [layer.n_neurons for layer in layers], len(norm.gain)
    n_heads, head_dim = (0, 0) if no_heads else heads_of(layers[0])
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != hidden:
        raise unsupported(model, f"it has no lm_head with a matrix (V, {hidden})")
    unembed, offset = fold_head(weight.detach(), getattr(head, "bias", None), norm)
    return ResidualModel(
        model=model,
        layers=[replace(layer, heads=None) for layer in layers] if no_heads else layers,
        final_norm=norm,
        n_heads=n_heads,
        head_dim=head_dim,
        no_heads=no_heads,
        width=max(widths),
        hidden=hidden,
        vocabulary=len(unembed),
        is_gated=all(layer.is_gated for layer in layers),
        centred=norm.centred,
        eps=norm.eps,
        unembed=unembed,
        offset=offset,
        uneven=tuple(widths) if min(widths) < max(widths) else (),
    )


# --- the self-check --------------------------------------------------------------------------


def _checked(residual: ResidualModel) -> ResidualModel:
    """Compare every sum that the scores are built on with what the model computed.

    A model whose heads do not add up keeps its FFN neurons; logits that are those of the lm_head
    times a number that the config holds have it folded in.
    """
    ids = _random_ids(residual.model, 1, N_CHECKED).tolist()
    found = trace(residual, ids)
    n = len(residual.layers)
    parts = [found.r, found.attention, found.ffn, found.neurons]
    parts += [] if residual.no_heads else [found.weights, found.values]
    if len(found.h) != n + 1 or any(len(part) != n for part in parts):
        raise unsupported(residual.model, "a forward does not call every part of a layer once")
    for layer in residual.layers:
        for what, holds in _sums(layer, found):
            if not holds:
                raise unsupported(residual.model, f"in layer {layer.layer} {what} does not hold")
    if not residual.no_heads:
        failed = [
            f"in layer {layer.layer} {what} does not hold"
            for layer in residual.layers
            for what, holds in _head_sums(layer, found)
            if not holds
        ]
        if failed:
            residual = without_heads(residual, failed[0])
    _check_eager(residual, ids, found)
    residual = with_tail(residual, ids, found)
    return replace(residual, pads=_pads(residual, ids[0]))


@torch.no_grad()
def _check_eager(residual: ResidualModel, ids: list[list[int]], found: Trace) -> None:
    """Refuse a model that is another one with eager attention, as PaliGemma is (its mask differs).

    Rounding of all layers meets in the logits, so only what is far beyond it counts.
    """
    tokens, mask = pad(ids, residual.unembed.device)
    own = last_logits(residual.model, tokens, mask).double()
    limit = max(16 * torch.finfo(found.h[0].dtype).eps, 1e-3)
    if not bool((own - found.logits.double()).norm() <= limit * own.norm()):
        why = "with eager attention, which gives the weights, its logits are others"
        raise unsupported(residual.model, why)


def without_heads(residual: ResidualModel, why: str) -> ResidualModel:
    """The model with what its attention writes not told apart."""
    layers = [replace(layer, heads=None) for layer in residual.layers]
    return replace(residual, layers=layers, n_heads=0, head_dim=0, no_heads=why)


def _sums(layer: ResidualLayer, found: Trace) -> Iterator[tuple[str, bool]]:
    """Each equation of a layer in words, and whether it holds.

    A write is small beside the stream, so a sum of the two is looked at number by number.
    """
    i = layer.layer
    h, after = found.h[i], found.h[i + 1]
    whole = added_up((h, found.attention[i], found.ffn[i]), layer.order)
    yield "input + attention write + FFN write = the next layer's input", is_rounded(whole, after)
    scale = _scale(found.ffn_scale[i], found.ffn[i])
    if layer.mixture:
        ours = _mixed(layer, found, scale)
    else:
        neurons = found.neurons[i].double() * scale.unsqueeze(-1)
        ours = neurons @ layer.ffn_values().double() + layer.ffn.constant(scale)
    yield "neurons @ value vectors + bias = FFN write", agree(ours, found.ffn[i])


def _mixed(layer: ResidualLayer, found: Trace, scale: Tensor) -> Tensor:
    """(E, T, D) float64: what all neurons of a mixture write, and the biases of its experts."""
    sentence, column = found.mask.nonzero(as_tuple=True)
    bias = torch.zeros_like(found.ffn[layer.layer][0, 0], dtype=torch.float64)
    for member in layer.mixture:
        own = member.constant()
        bias = bias if own is None else bias + own.double() * member.factor
    ours = layer.ffn.constant(scale, bias)
    for block in found.blocks(layer, sentence, column):
        neurons, weight = block.read(slice(None)).double(), cast(Tensor, block.scale)
        written = neurons @ block.values.double()
        written = written if block.bias is None else written + block.bias.double()
        rows = cast(Tensor, block.rows)
        place = (sentence[rows], column[rows])
        ours.index_put_(place, written * weight[:, None], accumulate=True)
    return ours


def _head_sums(layer: ResidualLayer, found: Trace) -> Iterator[tuple[str, bool]]:
    """The same of what the heads read and write."""
    i = layer.layer
    values = cast(Heads, layer.heads).value.apply(found.h[i])
    theirs = found.values[i].flatten(2)
    yield "value map @ norm(input) + bias = the heads' values", agree(values, theirs)
    scale = _scale(found.attention_scale[i], found.attention[i])[:, -1]
    heads = found.coefficients(i).double().sum(1)
    ours = heads @ layer.attention_values().double() + layer.attention.constant(scale)
    what = "the sum of attention weight * value @ value vectors + bias = attention write"
    yield what, agree(ours, found.attention[i][:, -1])


def _scale(scale: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like[..., 0], dtype=torch.float64) if scale is None else scale


def _pads(residual: ResidualModel, line: list[int]) -> bool:
    """Whether a sentence behind padding has the numbers that it has alone."""
    short = line[: N_CHECKED // 2]
    try:
        both = trace(residual, [line, short])
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    alone = trace(residual, [short])
    n = len(short)
    pairs = zip(both.h[1:], alone.h[1:], strict=True)
    return all(agree(ours[1:, -n:], theirs) for ours, theirs in pairs)
