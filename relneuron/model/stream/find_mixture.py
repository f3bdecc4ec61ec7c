"""What every part of a layer with experts does, told from one recorded forward and not from names.

`read.py` calls it for the layers that have experts, and proves what is found on other sentences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, product, takewhile
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from relneuron.model.layers import Unfound
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.find_experts import NO_EXPERTS, find_experts
from relneuron.model.stream.find import (
    MLP,
    Found,
    agree,
    called_with_one,
    fit,
    heads_in,
    held_numbers,
    mlps,
    near,
    reads_of,
    sum_of,
    write_of,
)
from relneuron.model.stream.mixture import ExpertMember, Member, MlpMember
from relneuron.model.stream.norms import Norm
from relneuron.model.stream.parts import ResidualLayer, Write
from relneuron.model.stream.probe import Call, Calls, as_norm, same


def experts_in(number: int, path: str, layer: nn.Module) -> list[Experts]:
    """The experts of a decoder layer, routed ones first; Unfound for some that cannot be taken."""
    found = []
    for is_shared in (False, True):
        experts, why = find_experts(number, path, layer, shared=is_shared)
        if experts is None:
            if why != NO_EXPERTS:
                raise Unfound(why)
            continue
        if experts.n_numbers() > experts.n_experts:
            raise Unfound("its router may pass a token by the experts")
        if getattr(experts.module, "has_post_expert_norm", False):
            raise Unfound("what each of its experts gives goes through a norm of its own")
        found.append(experts)
    return found


class _Total(NamedTuple):
    """What the parts of a mixture add up to, and the call whose output has it, behind a norm.

    Or two calls, which the layer itself adds up.
    """

    call: Call
    norm: Norm | None
    tensor: Tensor
    factors: list[float]  # of the experts, then of the MLPs
    weights: list[Call | None]  # the map that weighs each MLP
    also: nn.Module | None = None


def find_mixture(
    number: int,
    path: str,
    whole: Call,
    calls: Calls,
    numbers: Sequence[float],
    experts: Sequence[Experts],
) -> Found:
    """The parts of a decoder layer with experts; Unfound says what is not there or is another.

    Arguments as of `find.find_layer`, and what `experts_in` gave of the layer.
    """
    h, after = whole.x, whole.y
    sources = [_call_of(calls, one) for one in experts]
    beside = _beside(calls, whole.module, experts, h.shape[1])
    inside = [*(source.y for source in sources), *(mlp.down.y for mlp in beside)]
    if any(y.shape != h.shape or y.dtype != h.dtype for y in inside):
        raise Unfound("its experts do not write states as wide as the stream")
    within = {id(one.module) for one in experts}
    holders = [m for m in whole.module.modules() if within & {id(x) for x in m.modules()}]
    held = list(dict.fromkeys((*numbers, *held_numbers(*holders), 1 / len(inside))))
    reason = ""
    totals = _totals(calls, inside, len(sources), held, (h, after))
    for total in chain(totals, _both(sources, [mlp.down for mlp in beside])):
        try:
            added = sum_of(calls, [total.call], [*inside, total.tensor], h, after, numbers)
        except Unfound as error:
            reason = reason or (str(error) if total.also is None else "")
            continue
        attention = write_of(calls, added.attention, added.factors[0])
        streams = {"r": h + attention.added(added.attention.y), "h": h}
        bases, members = zip(
            *_members(calls, whole.module, experts, sources, beside, total, streams), strict=True
        )
        if len(set(bases)) > 1:
            raise Unfound("its experts and what is beside them read different streams")
        heads, no_heads = heads_in(calls, added.attention, attention, h)
        layer = ResidualLayer(
            layer=number,
            path=path,
            module=whole.module,
            attention=attention,
            heads=heads,
            ffn=Write(total.call.module, None, total.norm, added.factors[1], total.also),
            gate=None,
            up=None,
            mlp=None,
            is_parallel=bases[0] == "h",
            order=added.order,
            mixture=members,
        )
        return Found(layer, no_heads)
    why = "what its experts and its MLPs give is not added up by one module, nor multiples of it "
    raise Unfound(reason or why + "by numbers that it holds")


def _call_of(calls: Calls, experts: Experts) -> Call:
    found = [call for call in calls if call.module is experts.module]
    if len(found) != 1:
        raise Unfound(f"a forward calls its experts {len(found)} times")
    return found[0]


def _beside(calls: Calls, layer: nn.Module, experts: Sequence[Experts], hidden: int) -> list[MLP]:
    """The MLPs of a layer outside of its experts, as `mlps.find` puts them in order."""
    inside = {id(module) for one in experts for module in one.module.modules()}
    names = {id(module): name.split(".") for name, module in layer.named_modules()}
    found = {}
    for mlp in mlps(calls, hidden):
        modules = (mlp.gate[0].module, mlp.up[0].module, mlp.down.module)
        if not inside & set(map(id, modules)):
            steps = zip(*(names[id(module)] for module in modules), strict=False)
            shared = takewhile(lambda step: len(set(step)) == 1, steps)
            found[".".join(step[0] for step in shared)] = mlp
    return [found[path] for path in sorted(found)]


def _totals(
    calls: Calls,
    inside: Sequence[Tensor],
    n_experts: int,
    numbers: Sequence[float],
    streams: tuple[Tensor, Tensor],
) -> Iterator[_Total]:
    """The outputs of modules, and inputs of norms, that the parts of a mixture add up to."""
    width = streams[0].shape[1]
    ones = [call for call in calls.linears() if call.y.shape[1] == 1]
    ways = list(product(*[[None, *ones]] * (len(inside) - n_experts)))
    tried: list[Tensor] = []
    for call, tensor in [(c, x) for c in calls for x in (c.y, c.x)]:
        is_input = tensor is call.x
        if tensor.shape != inside[0].shape or tensor.shape[1] != width:
            continue
        if tensor.dtype != inside[0].dtype or any(same(tensor, x) for x in streams):
            continue
        if is_input and any(same(tensor, x) for x in tried):
            continue  # what a module gave, whose norm is found behind it
        for weights in ways:
            parts = list(inside)
            for place, weight in enumerate(weights, n_experts):
                if weight is not None:
                    parts[place] = parts[place] * weight.y.sigmoid()
            factors = _factors(tensor, parts, numbers)
            if factors is None:
                continue
            if not is_input:
                tried.append(tensor)
                yield _Total(call, None, tensor, factors, list(weights))
                behind = calls.norm_reading(tensor)
                if behind is not None:
                    yield _Total(behind[1], behind[0], tensor, factors, list(weights))
            elif (norm := as_norm(call)) is not None:
                yield _Total(call, norm, tensor, factors, list(weights))


def _both(sources: Sequence[Call], downs: Sequence[Call]) -> Iterator[_Total]:
    """The sum of experts and an MLP that no module gives: the layer adds them up (Granite 4)."""
    if len(sources) == len(downs) == 1:
        one, other = sources[0], downs[0]
        y = one.y + other.y
        yield _Total(replace(one, y=y), None, y, [1.0, 1.0], [None], other.module)


def _factors(
    total: Tensor, parts: Sequence[Tensor], numbers: Sequence[float]
) -> list[float] | None:
    """The numbers with which parts add up to `total`."""
    fitted = fit(total, parts, [*parts, total])
    if fitted is None:
        return None
    for factors in product(*(near(one, numbers) for one in fitted)):
        ours = sum(f * part.double() for f, part in zip(factors, parts, strict=True))
        if agree(cast(Tensor, ours), total):
            return list(factors)
    return None


def _members(
    calls: Calls,
    layer: nn.Module,
    experts: Sequence[Experts],
    sources: Sequence[Call],
    beside: Sequence[MLP],
    total: _Total,
    streams: dict[str, Tensor],
) -> Iterator[tuple[str, Member]]:
    """Each part of a mixture, and which of the streams it reads."""
    start = 0
    factors = iter(total.factors)
    for one, source in zip(experts, sources, strict=True):
        base, norm = _read_by(calls, one, source.given, streams)
        yield base, ExpertMember(replace(one, offset=start), start, next(factors), norm)
        start += one.width
    for mlp, weight in zip(beside, total.weights, strict=True):
        base, gate, up = reads_of(calls, mlp, streams)
        member = MlpMember(
            down=mlp.down.module,
            gate=gate,
            up=up,
            module=called_with_one(calls, mlp),
            weight=None if weight is None else weight.module,
            start=start,
            factor=next(factors),
        )
        yield base, member
        start += member.n_neurons


def _read_by(
    calls: Calls, experts: Experts, given: tuple[Any, ...], streams: dict[str, Tensor]
) -> tuple[str, Norm | None]:
    """Which of the streams experts read, and behind which norm; each row may be multiplied."""
    x, rows = experts.begin(*given)
    for base, stream in streams.items():
        norms = [(as_norm(c), c.y) for c in calls if same(c.x, stream) and c.y.shape == c.x.shape]
        for norm, y in [*norms, (None, stream)]:
            if norm is None and y is not stream:
                continue
            read, own = y[rows.token].double(), x.double()
            scale = (own * read).sum(1, keepdim=True) / read.square().sum(1, keepdim=True)
            if bool((scale > 0).all()) and agree(scale * read, own, x.dtype):
                return base, norm
    raise Unfound("its experts read neither the stream nor a norm of it")
