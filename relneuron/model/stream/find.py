"""What every part of a decoder layer does, told from one recorded forward and not from names.

`read.py` calls it for each layer, and proves what is found here on other sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from relneuron.model.layers import Unfound
from relneuron.model.stream.linear import Read, Rows
from relneuron.model.stream.norms import Norm
from relneuron.model.stream.parts import ORDERS, Heads, ResidualLayer, Write, added_up
from relneuron.model.stream.probe import N_TOKENS, Call, Calls, as_norm, same
from relneuron.ops.swiglu_stats.reference import TORCH_ACTIVATIONS

_ROUNDINGS = 8  # units of the dtype's eps that a sum of the self-check may be off by, and at least
_FLOAT32_SUMS = 2.0**-16  # what float32 sums over thousands of terms may; all norms are float32
_NEAR = 0.02  # how far a fitted factor may be from the number that the model holds


def is_rounded(ours: Tensor, theirs: Tensor) -> bool:
    """Whether every number of theirs is that of ours, rounded to their dtype and a little more."""
    if ours.shape != theirs.shape:
        return False
    limit = torch.finfo(theirs.dtype).eps * theirs.double().abs()
    tiny = torch.finfo(theirs.dtype).tiny
    return bool(((ours.double() - theirs.double()).abs() <= limit + tiny).all())


def agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Equal up to the rounding of `dtype`, by default theirs, relative to the largest number."""
    if ours.shape != theirs.shape:
        return False
    limit = max(_ROUNDINGS * torch.finfo(dtype or theirs.dtype).eps, _FLOAT32_SUMS)
    largest = theirs.double().abs().max()
    return bool((ours.double() - theirs.double()).abs().max() <= limit * largest)


def held_numbers(*holders: Any) -> list[float]:
    """The fractions that modules and configs hold, plain or as tensors of one number, each once."""
    found: list[float] = [1.0]
    for holder in holders:
        values = list(vars(holder).values())
        if isinstance(holder, nn.Module):
            values += [*holder._buffers.values(), *holder._parameters.values()]
        for value in values:
            if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
                value = float(value)
            if isinstance(value, float) and value == value and value not in (0.0, *found):
                found.append(value)
    return found


# --- the MLP ---------------------------------------------------------------------------------


class MLP(NamedTuple):
    """The calls that make what an MLP writes: of its last map, and of rows of its first ones."""

    down: Call
    gate: tuple[Rows, Call]
    up: tuple[Rows, Call]


def mlps(calls: Calls, hidden: int) -> Iterator[MLP]:
    """Linear maps to the stream whose input is activation(gate) * up or activation(up)."""
    for down in reversed([call for call in calls.linears() if call.y.shape[1] == hidden]):
        found = _inputs(calls, down.x)
        if found is not None:
            yield MLP(down, *found)


def _inputs(calls: Calls, neurons: Tensor) -> tuple[tuple[Rows, Call], tuple[Rows, Call]] | None:
    """The rows of linear maps that the neurons (N, F) are made of; gate and up, maybe the same."""
    normed = calls.norm_giving(neurons)
    if normed is not None:
        neurons = normed[1].x
    width = neurons.shape[1]
    ups = [
        (Rows(call.module, (start,), width), call)
        for call in calls.linears()
        if call.y.shape[1] in (width, 2 * width)
        for start in range(0, call.y.shape[1], width)
    ]
    for act, gate in _activated(calls, ups, width):
        if act.dtype != neurons.dtype:
            continue
        if torch.equal(act, neurons):
            return gate, gate
        for up in ups:
            if is_rounded(act * up[0].of(up[1].y), neurons):
                return gate, up
    return None


def _activated(
    calls: Calls, maps: list[tuple[Rows, Call]], width: int
) -> Iterator[tuple[Tensor, tuple[Rows, Call]]]:
    """Tensors (N, F) that are a function of a map's outputs, number by number, and these."""
    for call in calls:
        is_function = call.is_leaf and not call.is_linear and not same(call.x, call.y)
        if is_function and call.x.shape[1] == call.y.shape[1] == width:
            gate = calls.made(call.x)
            if gate is not None and as_norm(call) is None:
                yield call.y, gate
    for gate in maps:
        for function in TORCH_ACTIVATIONS.values():
            yield function(gate[0].of(gate[1].y)), gate


# --- what is written -------------------------------------------------------------------------


def write_of(calls: Calls, source: Call, factor: float) -> Write:
    """The write whose source is a call: a linear map, a norm behind one, or neither."""
    norm: Norm | None = None
    y = source.y
    behind = calls.norm_giving(y)
    if behind is not None:
        norm, call = behind
        y = call.x
        source = call
    linear = next((call.module for call in calls.linears() if same(call.y, y)), None)
    return Write(source.module, linear, norm if linear is not None else None, factor)


class Sum(NamedTuple):
    attention: Call
    ffn: Call
    factors: tuple[float, float]
    order: int


def sum_of(
    calls: Calls,
    ffns: Sequence[Call],
    inside: Sequence[Tensor],
    h: Tensor,
    after: Tensor,
    numbers: Sequence[float],
) -> Sum:
    """The two calls whose outputs, times factors, make the layer's output of its input.

    One of `ffns` and one that gives none of the tensors `inside`.
    """
    scaled = ""
    for ffn in ffns:
        for attention in calls:
            y = attention.y
            if y.shape != h.shape or y.dtype != h.dtype:
                continue
            if any(same(y, other) for other in (h, after, *inside, ffn.y)):
                continue
            fitted = fit(after.double() - h.double(), [y, ffn.y], (h, after))
            if fitted is None:
                continue
            for factors in product(*(near(one, numbers) for one in fitted)):
                first, second = factors
                writes = (y if first == 1 else y * first, ffn.y if second == 1 else ffn.y * second)
                parts = (h, *writes)
                for order in range(len(ORDERS)):
                    if is_rounded(added_up(parts, order), after):
                        return Sum(attention, ffn, (first, second), order)
            scaled = scaled or _said(fitted)
    raise Unfound(scaled or _why_no_sum(calls, h, ffns[0].y, after))


class Factor(NamedTuple):
    """A fitted factor, and how far from it the true one may be."""

    value: float
    error: float


def fit(total: Tensor, parts: Sequence[Tensor], rounded: Sequence[Tensor]) -> list[Factor] | None:
    """The factors with which parts make `total`, if they do but for the rounding of `rounded`."""
    total = total.double().flatten().cpu()
    columns = torch.stack([part.double().flatten() for part in parts], 1).cpu()
    if not bool(columns.isfinite().all() & total.isfinite().all()):
        return None
    factors = torch.linalg.lstsq(columns, total[:, None]).solution[:, 0]
    left = float((columns @ factors - total).norm())
    eps = torch.finfo(rounded[0].dtype).eps
    rounding = eps * sum(float(x.double().norm()) for x in rounded)
    if not left <= 0.01 * float(total.norm()) + rounding:
        return None
    errors = 4 * left / len(total) ** 0.5 / columns.norm(dim=0)
    return [Factor(*one) for one in zip(factors.tolist(), errors.tolist(), strict=True)]


def near(factor: Factor, numbers: Iterable[float]) -> list[float]:
    """The numbers that a fitted factor may be, the nearest first."""
    limit = factor.error + _NEAR * abs(factor.value)
    found = [n for n in numbers if abs(n - factor.value) <= limit]
    return sorted(found, key=lambda n: abs(n - factor.value))


def _said(fitted: Sequence[Factor]) -> str:
    """The reason for factors that the model does not hold."""
    names = ("the attention's write", "the MLP's write")
    parts = [
        f"{name} is scaled by {factor.value:.3g} before it is added"
        for name, factor in zip(names, fitted, strict=True)
        if abs(factor.value - 1) > factor.error + 1e-3
    ]
    return " and ".join(parts)


def _why_no_sum(calls: Calls, h: Tensor, ffn: Tensor, after: Tensor) -> str:
    """The reason for a layer whose output is no sum of its input and two writes."""
    if calls.norm_giving(after) is not None:
        return "a norm at its end scales the whole stream, so what was written before is not kept"
    for call in calls:
        if call.y.shape == h.shape and not same(call.y, ffn) and not same(call.y, after):
            columns = torch.stack([t.double().flatten() for t in (h, call.y, ffn)], 1).cpu()
            total = after.double().flatten().cpu()
            factors = torch.linalg.lstsq(columns, total[:, None]).solution[:, 0]
            left = float((columns @ factors - total).norm())
            if abs(float(factors[0]) - 1) > _NEAR and left < 1e-3 * float(total.norm()):
                return f"it scales the stream by {float(factors[0]):.3g} before it adds to it"
    if any(call.x.shape == h.shape and is_rounded(call.x + ffn, after) for call in calls):
        return "what is added before its MLP is not what one module gives, nor a multiple of it"
    return "its output is not its input + what its attention and its MLP give"


# --- heads -----------------------------------------------------------------------------------


def _heads(calls: Calls, attention: Call, write: Write, h: Tensor) -> Heads:
    """The heads of an attention; Unfound says why they cannot be told apart.

    At a sentence's first token a head looks at nothing else, so it gives the value of this token,
    times its weight: outputs of a linear map, wherever they lie in it.
    """
    outs = [call for call in calls.linears() if call.module is write.linear]
    giving = [call for call in calls if call.weights is not None]
    if not outs:
        raise Unfound("what its attention writes is not the output of a linear map")
    if not giving:
        raise Unfound("its attention gives no weights")
    out, weights = outs[-1], _weights(giving[0])
    n_heads = weights.shape[1]
    if out.x.shape[1] % n_heads:
        raise Unfound(f"{out.x.shape[1]} numbers a token are not those of {n_heads} heads")
    size = out.x.shape[1] // n_heads
    starts, found = [], None
    for head in range(n_heads):
        part = out.x[::N_TOKENS, head * size : (head + 1) * size]
        made = calls.made(part, weights[:, head, 0, 0].to(part.dtype))
        if made is None or made[1].module is out.module or found not in (None, made[1]):
            raise Unfound(
                "what a head gives at the first token is not a piece of a linear map's outputs"
            )
        starts.append(made[0].starts[0])
        found = made[1]
    call = cast(Call, found)
    read = calls.read(Rows(call.module, tuple(starts), size), call.x, {"h": h})
    if read is None:
        raise Unfound("its heads' values are not those of a linear map behind a norm of the stream")
    return Heads(giving[0].module, n_heads, read[1])


def _weights(call: Call) -> Tensor:
    return cast(Tensor, call.weights)


# --- the layer -------------------------------------------------------------------------------


class Found(NamedTuple):
    """A layer, and why its heads are not told apart (or None)."""

    layer: ResidualLayer
    no_heads: str | None


def find_layer(number: int, path: str, whole: Call, calls: Calls, numbers: list[float]) -> Found:
    """The parts of a decoder layer without experts; Unfound says what is not there or is another.

    `whole` is the layer's own call, `calls` those of the modules inside, `numbers` the factors that
    the model may scale with.
    """
    reasons = []
    for mlp in mlps(calls, whole.x.shape[1]):
        try:
            return _assembled(number, path, calls, mlp, whole, numbers)
        except Unfound as error:
            reasons.append(str(error))
    raise Unfound(reasons[0] if reasons else "no MLP down(activation(gate(x)) * up(x)) or "
                  "down(activation(up(x)))")  # fmt: skip


def _assembled(
    number: int, path: str, calls: Calls, mlp: MLP, whole: Call, numbers: list[float]
) -> Found:
    h = whole.x
    behind = calls.norm_reading(mlp.down.y)
    ffns = [mlp.down] if behind is None else [behind[1], mlp.down]
    total = sum_of(calls, ffns, [mlp.down.y], h, whole.y, numbers)
    ffn = write_of(calls, total.ffn, total.factors[1])
    if ffn.linear is not mlp.down.module:
        raise Unfound("what its MLP writes is not the output of its last map")
    attention = write_of(calls, total.attention, total.factors[0])
    streams = {"r": h + attention.added(total.attention.y), "h": h}
    base, gate, up = reads_of(calls, mlp, streams)
    heads, no_heads = heads_in(calls, total.attention, attention, h)
    layer = ResidualLayer(
        layer=number,
        path=path,
        module=whole.module,
        attention=attention,
        heads=heads,
        ffn=ffn,
        gate=gate,
        up=up,
        mlp=called_with_one(calls, mlp),
        is_parallel=base == "h",
        order=total.order,
    )
    return Found(layer, no_heads)


def reads_of(calls: Calls, mlp: MLP, streams: dict[str, Tensor]) -> tuple[str, Read, Read]:
    """Which of the streams an MLP reads, and how its gate and its up do."""
    gate, up = (calls.read(rows, call.x, streams) for rows, call in (mlp.gate, mlp.up))
    if gate is None or up is None or gate[0] != up[0]:
        raise Unfound("its MLP reads neither the stream nor a norm of it")
    for (rows, call), (base, read) in ((mlp.gate, gate), (mlp.up, up)):
        if not agree(read.apply(streams[base]), rows.of(call.y)):
            raise Unfound("what its MLP reads is not a linear map behind a norm of the stream")
    return gate[0], gate[1], up[1]


def heads_in(
    calls: Calls, attention: Call, write: Write, h: Tensor
) -> tuple[Heads | None, str | None]:
    """The heads of an attention, or why they are not told apart."""
    try:
        return _heads(calls, attention, write, h), None
    except Unfound as error:
        return None, str(error)


def called_with_one(calls: Calls, mlp: MLP) -> nn.Module:
    """The smallest module that is called with one tensor and makes the neurons in it."""
    for call in calls:
        inside = {id(part) for part in call.module.modules()} - {id(call.module)}
        parts = (mlp.down.module, mlp.gate[0].module, mlp.up[0].module)
        if call.is_alone and all(id(part) in inside for part in parts):
            return call.module
    return mlp.gate[0].module


def heads_of(layer: ResidualLayer) -> tuple[int, int]:
    """H and d_h of a layer whose heads are told apart."""
    value: Read = cast(Heads, layer.heads).value
    return cast(Heads, layer.heads).n, value.rows.n // cast(Heads, layer.heads).n
