"""What attribution says that neurons write, held to plain hooks in float64.

`check.py` asks of each type that attribution takes. A neuron's factor times its value vector must
be what the last token's state loses when hooks set the neuron to zero (of an expert its gate), and
its gain what log p of a token loses by that vector; a neuron of an expert that the token was not
sent to changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.zoo import oracle
from relneuron.methods.gains.values import value_scores
from relneuron.model.stream.parts import ResidualLayer, ResidualModel
from relneuron.model.stream.read import read_residual_model
from relneuron.model.stream.trace import Trace, last_logits, trace

N_NEURONS = 4  # of a layer, of all and again of those that the last token was sent to
# What norms and routers that compute in float32 leave of float64.
NEAR = 1e-6


@torch.no_grad()
def fault(
    double: Any,
    parts: Sequence[oracle.MLP | oracle.Experts],
    offsets: Sequence[int],
    ids: list[int],
    generator: torch.Generator,
) -> str:
    """What is wrong with the gains of a float64 model; nothing if all are right.

    `parts` are the plain reading of its layers, at their `offsets` among the neurons of a layer.
    """
    residual = read_residual_model(double)
    target = torch.tensor([ids[0]])
    traced = trace(residual, [ids])
    found = value_scores(residual, traced, target, writes=False, ffn="exact", attention=None, top=1)
    assert found.ffn_neuron is not None
    for layer in residual.layers:
        mine = [n for n, part in enumerate(parts) if part.layer == layer.layer]
        n_neurons = sum(parts[n].width for n in mine)
        if n_neurons != layer.n_neurons:
            return f"layer {layer.layer} has {n_neurons} neurons, not {layer.n_neurons}"
        clean = _states(residual, layer, ids)
        for index in _some(layer, traced, generator):
            number = next(n for n in reversed(mine) if offsets[n] <= index)
            with _off(double, parts, number, index - offsets[number]):
                lost = clean - _states(residual, layer, ids)
            scale, norm = traced.ffn_scale[layer.layer], layer.ffn.norm
            if norm is not None:
                assert scale is not None
                lost = norm.linear(lost) * scale[0, -1]
            written = traced.ffn_coefficient(layer, 0, index) * layer.ffn_value(index)
            where = f"layer {layer.layer}, neuron {index}"
            near = NEAR * float(traced.ffn[layer.layer][0, -1].abs().max())
            if float((lost - written).abs().max()) > near:
                return f"{where}: it does not write what the state loses without it"
            ours = float(found.ffn_neuron[0, layer.layer, index])
            theirs = _gain(residual, traced, layer, lost, int(target))
            if abs(ours - theirs) > 1e2 * NEAR:
                return f"{where}: its gain is {theirs:.6g}, not {ours:.6g}"
    return ""


def _some(layer: ResidualLayer, traced: Trace, generator: torch.Generator) -> list[int]:
    """Some neurons of a layer, half of them of what the last token was sent to."""
    one = torch.tensor([0])
    spans = [block.span for block in traced.blocks(layer, one, one - 1)]
    sent = torch.cat([torch.arange(span.start, span.stop) for span in spans])
    some = torch.randperm(layer.n_neurons, generator=generator)[:N_NEURONS].tolist()
    order = torch.randperm(len(sent), generator=generator)[:N_NEURONS]
    return sorted({*some, *sent[order].tolist()})


@contextmanager
def _off(
    model: Any, parts: Sequence[oracle.MLP | oracle.Experts], number: int, index: int
) -> Iterator[None]:
    """One neuron at zero: an input of `down`, behind any norm, or the gate of an expert."""
    part = parts[number]
    if isinstance(part, oracle.Experts):
        with oracle.switched_off(model, parts, [(number, "gate", index)]):
            yield
        return

    def off(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h = args[0].clone()
        h[..., index] = 0
        return (h, *args[1:])

    handle = model.get_submodule(part.down.path).register_forward_pre_hook(off)
    try:
        yield
    finally:
        handle.remove()


def _states(residual: ResidualModel, layer: ResidualLayer, ids: list[int]) -> Tensor:
    """(D,) what a layer gives for the last token, or what the norm behind its MLP reads."""
    seen: list[Tensor] = []
    if layer.ffn.norm is not None:
        norm = layer.ffn.norm.module
        handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        handle = layer.module.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        last_logits(residual.model, torch.tensor([ids]), torch.ones(1, len(ids)).long())
    finally:
        handle.remove()
    state = seen[-1][0] if isinstance(seen[-1], tuple | list) else seen[-1]
    return state.reshape(len(ids), -1)[-1].clone()


def _gain(
    residual: ResidualModel, traced: Trace, layer: ResidualLayer, written: Tensor, target: int
) -> float:
    """log p of the target with what a neuron wrote in the stream, minus that without it."""
    x = traced.r[layer.layer][0, -1]
    logits = traced.scale[0] * (torch.stack([x, x + written]) @ residual.unembed.T)
    if residual.cap is not None:
        logits = residual.cap * (logits / residual.cap).tanh()
    before, after = logits.log_softmax(-1)[:, target].tolist()
    return after - before
