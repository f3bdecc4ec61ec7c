"""How logits are read off the residual stream: the final norm, the lm_head, and what is behind.

`read.py` calls it: `fold_head` for the unembedding, `with_tail` for the factor and the soft cap
that a model puts on its logits, both proved by numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from relneuron.model.batches import pad
from relneuron.model.stream.find import agree, held_numbers
from relneuron.model.stream.norms import Norm
from relneuron.model.stream.parts import ResidualModel, unsupported
from relneuron.model.stream.trace import Trace, last_logits

_LARGE = 2000.0  # below what float16 holds, above all caps


def fold_head(
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


def with_tail(residual: ResidualModel, ids: list[list[int]], found: Trace) -> ResidualModel:
    """The model with what it does to logits: a factor, folded into `unembed`, and a soft cap."""
    model, config = residual.model, residual.model.config.get_text_config()
    numbers = held_numbers(model, config)
    factors = _factors(numbers, config)
    # Large logits show a cap, however small the model's own are.
    tails = [_tail(residual, ids, 1.0)]
    kind = torch.finfo(tails[0].dtype)
    both = (tails[0].normed, tails[0].given)
    largest = [max(float(part.abs().max()), kind.tiny) for part in both]
    tails.append(_tail(residual, ids, min(kind.max / 4 / largest[0], _LARGE / largest[1])))
    before = _first_factor(factors, [(tail.normed, tail.read) for tail in tails], kind)
    after = _first_factor(factors, [(tail.given, tail.logits) for tail in tails], kind)
    cap = None
    for number in (n for n in numbers if n > 1 and after is None):
        capped = [(_capped(tail.given, number), tail.logits) for tail in tails]
        if _first_factor([1.0], capped, kind) is not None:
            after, cap = 1.0, number
    if before is None or after is None:
        raise unsupported(model, _other_logits(tails[0]))
    factor = before * after
    if factor != 1:
        offset = None if residual.offset is None else residual.offset * factor
        residual = replace(residual, unembed=residual.unembed * factor, offset=offset)
    residual = replace(residual, cap=cap)
    y = found.h[-1][:, -1].to(residual.unembed.dtype)
    logits = found.scale[:, None] * (y @ residual.unembed.T)
    if residual.offset is not None:
        logits = logits + residual.offset
    if not agree(logits if cap is None else _capped(logits, cap), found.logits, found.h[-1].dtype):
        raise unsupported(model, "its logits are not lm_head(final norm(last layer's output))")
    return residual


class _Tail(NamedTuple):
    """What stands between the last layer and the logits of one token, float64."""

    normed: Tensor  # (D,) the final norm's output
    read: Tensor  # (D,) the lm_head's input
    given: Tensor  # (V,) its output
    logits: Tensor  # (V,)
    dtype: torch.dtype


@torch.no_grad()
def _tail(residual: ResidualModel, ids: list[list[int]], size: float) -> _Tail:
    """The tail of a forward in which the final norm's output is `size` times as large."""
    seen: dict[str, Tensor] = {}
    model, norm = residual.model, residual.final_norm.module
    head = model.get_output_embeddings()

    def normed(_: Any, _args: Any, output: Tensor) -> Tensor:
        seen["normed"] = output * size
        return seen["normed"]

    def read(_: Any, args: Any, output: Tensor) -> None:
        seen["read"], seen["given"] = args[0], output.clone()

    handles = [norm.register_forward_hook(normed), head.register_forward_hook(read)]
    try:
        tokens, mask = pad(ids, residual.unembed.device)
        logits = last_logits(model, tokens, mask)
    finally:
        for handle in handles:
            handle.remove()
    if "read" not in seen:
        raise unsupported(model, "a forward does not call its lm_head")
    last = {name: x.reshape(-1, x.shape[-1])[-1].double() for name, x in seen.items()}
    # Some models cast their logits.
    dtype = max((seen["given"].dtype, logits.dtype), key=lambda kind: torch.finfo(kind).eps)
    return _Tail(**last, logits=logits[0].double(), dtype=dtype)


def _first_factor(
    factors: list[float], pairs: list[tuple[Tensor, Tensor]], kind: torch.finfo
) -> float | None:
    """The factor that makes the second of each pair of the first, number by number."""
    for factor in factors:
        if all(_is_near(ours * factor, theirs, kind) for ours, theirs in pairs):
            return factor
    return None


def _is_near(ours: Tensor, theirs: Tensor, kind: torch.finfo) -> bool:
    """Equal but for a few roundings of every number."""
    if ours.shape != theirs.shape:
        return False
    # What is near the dtype's least numbers is rounded more coarsely.
    size = theirs.abs() + 16 * kind.tiny
    return bool(((ours - theirs).abs() <= 4 * kind.eps * size).all())


def _capped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


def _factors(numbers: list[float], config: Any) -> list[float]:
    """What logits may be multiplied with: a number that is held, or one divided by it."""
    own = [v for v in vars(config).values() if type(v) is int and v > 1]
    hidden = getattr(config, "hidden_size", None)
    ratios = [v / hidden for v in own] if isinstance(hidden, int) else []
    return list(dict.fromkeys((1.0, *numbers, *(1 / n for n in numbers if n), *ratios)))


def _other_logits(tail: _Tail) -> str:
    """Why logits are not those of the formula."""
    for ours, theirs in ((tail.normed, tail.read), (tail.given, tail.logits)):
        if ours.shape == theirs.shape:
            factor = float((ours @ theirs) / ours.square().sum())
            if abs(factor - 1) > 1e-3 and _is_near(ours * factor, theirs, torch.finfo(tail.dtype)):
                said = f"its logits are its lm_head's times {factor:.4g}"
                return f"{said}, a number that it does not hold"
    return "its logits are not lm_head(final norm(last layer's output))"
