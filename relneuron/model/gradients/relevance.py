"""Gradient times activation: what each neuron did for an answer, over all tokens of a sentence.

The stage asks for it with `--method relevance`; `rules.py` has the backward that conserves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relneuron.model.batches import pad
from relneuron.model.gradients.rules import conservative
from relneuron.model.gradients.sites import Sites, acting, frozen, probability
from relneuron.model.stream.trace import last_logits


class Relevance(NamedTuple):
    """Of E sentences, float64, on the CPU: R (E, L, F), 0 where there is no neuron, and what was
    differentiated, (E,)."""

    relevance: Tensor
    value: Tensor


def relevance(
    sites: Sites,
    ids: Sequence[Sequence[int]],
    targets: Sequence[int],
    *,
    of: str = "logit",
    rules: str = "plain",
    pads: bool = True,
) -> Relevance:
    """R[l, i] = sum over the tokens t of a sentence of m[t, l, i] * d value / d m[t, l, i].

    `value` is the logit of the target at the last token, or its `probability`; m are the neurons at
    the site, the same at `product`, `act` and `up` with the plain gradient. One forward and one
    backward a batch, in which no weight has a gradient and nothing below the first layer's neurons
    has one. `pads`: sentences of several lengths share a batch, padded on the left.
    """
    lengths = [0 if pads else len(line) for line in ids]
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    found = Relevance(
        torch.zeros(len(ids), len(sites.parts), sites.width, **wide), torch.zeros(len(ids), **wide)
    )
    for length in dict.fromkeys(lengths):
        rows = [row for row, own in enumerate(lengths) if own == length]
        part = _batch(sites, [ids[r] for r in rows], [targets[r] for r in rows], of, rules)
        found.relevance[rows], found.value[rows] = part
    return found


def _batch(
    sites: Sites, ids: Sequence[Sequence[int]], targets: Sequence[int], of: str, rules: str
) -> Relevance:
    tokens, mask = pad(ids, sites.device)
    seen: dict[int, Tensor] = {}

    def reads(number: int) -> Callable[[Tensor], Tensor]:
        def read(values: Tensor) -> Tensor:
            # The graph begins at the first layer's neurons; all others are on the way from it.
            is_first = number == sites.numbers[0]
            own = values.detach().requires_grad_() if is_first else values.view_as(values)
            seen[number] = own
            return own

        return read

    with frozen(sites.model), torch.enable_grad(), ExitStack() as stack:
        stack.enter_context(conservative(sites) if rules == "conservative" else nullcontext())
        for number in sites.numbers:
            part: Any = sites.parts[number]
            stack.enter_context(acting(part, reads(number)))
        logits = last_logits(sites.model, tokens, mask)
    goal = torch.tensor(list(targets), device=logits.device)
    with torch.enable_grad():
        if of == "probability":
            value = probability(logits, goal)
        else:
            value = logits.gather(1, goal[:, None])[:, 0]
    slopes = torch.autograd.grad(value.sum(), [seen[number] for number in sites.numbers])
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    found = torch.zeros(len(ids), len(sites.parts), sites.width, **wide)
    for number, slope in zip(sites.numbers, slopes, strict=True):
        own = (seen[number].detach().double() * slope.double()).reshape(*mask.shape, -1)
        own = own.masked_fill(mask.to(own.device)[..., None] == 0, 0.0)
        found[:, number, : own.shape[-1]] = own.sum(1).cpu()
    return Relevance(found, value.detach().double().cpu())
