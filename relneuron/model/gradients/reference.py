"""Integrated gradients as they are defined: a whole forward and backward for each layer and step.

`staircase.py` is held to it, and it serves the models whose staircase is not exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relneuron.model.batches import pad
from relneuron.model.gradients.sites import Sites, acting, frozen, probability
from relneuron.model.stream.trace import last_logits


def alphas(schedule: str, steps: int) -> list[float]:
    """The s points of a path from 0 to 1, each of the weight 1/s in the sum.

    `inclusive` k/(s-1) for k = 0 ... s-1, as in the code of knowledge neurons (arXiv 2104.08696)
    and of QRNCA (2406.10868); `right` k/s for k = 1 ... s, as in their papers; `midpoint`
    (k - 1/2)/s, whose error falls with 1/s^2.
    """
    if schedule == "inclusive":
        return [k / (steps - 1) for k in range(steps)]
    shift = {"right": 0.0, "midpoint": 0.5}[schedule]
    return [(k - shift) / steps for k in range(1, steps + 1)]


class Integrated(NamedTuple):
    """Of E sentences, float64, on the CPU.

    ig                       (E, L, F), 0 in a layer without neurons and beyond a layer's width
    probability              (E,) P of the target as the model runs
    probability_at_baseline  (E, L) with the layer's whole vector at its baseline; NaN in a layer
                             without neurons
    """

    ig: Tensor
    probability: Tensor
    probability_at_baseline: Tensor


def empty(n_sentences: int, sites: Sites) -> Integrated:
    size, wide = (n_sentences, len(sites.parts)), {"dtype": torch.float64, "device": "cpu"}
    return Integrated(
        torch.zeros(*size, sites.width, **wide),  # type: ignore[call-overload]
        torch.zeros(n_sentences, **wide),  # type: ignore[call-overload]
        torch.full(size, torch.nan, **wide),  # type: ignore[call-overload]
    )


def integrate_reference(
    sites: Sites,
    ids: Sequence[Sequence[int]],
    targets: Sequence[int],
    points: Sequence[float],
    *,
    baseline: Tensor | None = None,
    layers: Sequence[int] | None = None,
) -> Integrated:
    """Integrated gradients of P(target) along each layer's neurons at the last token.

        IG[l, i] = (m_i - b_i) / s * sum_k dP(b + a_k (m - b)) / dm_i

    m (F,) are the layer's neurons at the last token, b its `baseline`, (L, F) or (E, L, F), 0 by
    default; the whole vector of layer l is scaled at once and all other layers run on from it;
    a_k are `points`. `layers`: only these, by default all. One sentence, layer and step at a time,
    without padding and without a cache.
    """
    found = empty(len(ids), sites)
    with frozen(sites.model):
        for row, line in enumerate(ids):
            run = _Run(sites, line, targets[row])
            found.probability[row] = run.plain
            for layer in sites.numbers if layers is None else layers:
                m = run.neurons[layer]
                b = torch.zeros_like(m) if baseline is None else _of(baseline, row, layer, m)
                slopes = [run.slope(layer, b + a * (m - b))[1] for a in points]
                total = torch.stack(slopes).double().sum(0)
                own = (m - b).double() * total / len(points)
                found.ig[row, layer, : len(m)] = own.cpu()
                found.probability_at_baseline[row, layer] = run.slope(layer, b)[0]
    return found


def _of(baseline: Tensor, row: int, layer: int, like: Tensor) -> Tensor:
    own = baseline[layer] if baseline.dim() == 2 else baseline[row, layer]
    return own[: len(like)].to(like)


class _Run:
    """One sentence: its neurons at the last token, and slopes of P with other ones there."""

    def __init__(self, sites: Sites, line: Sequence[int], target: int) -> None:
        self.sites = sites
        self.tokens, self.mask = pad([line], sites.device)
        self.target = torch.tensor([target], device=sites.device)
        self.neurons: dict[int, Tensor] = {}
        with torch.no_grad(), ExitStack() as stack:
            for layer in sites.numbers:
                stack.enter_context(acting(self._part(layer), self._reads(layer)))
            self.plain = float(self._probability())

    def _part(self, layer: int) -> Any:
        return self.sites.parts[layer]

    def _reads(self, layer: int) -> Any:
        def read(values: Tensor) -> None:
            self.neurons[layer] = values.reshape(-1, values.shape[-1])[-1].clone()

        return read

    def _probability(self) -> Tensor:
        logits = last_logits(self.sites.model, self.tokens, self.mask)
        return probability(logits, self.target.to(logits.device))[0]

    def slope(self, layer: int, vector: Tensor) -> tuple[float, Tensor]:
        """P, and dP/dv, with `vector` v (F,) as the layer's neurons at the last token."""
        leaf = vector.detach().requires_grad_()

        def replace(values: Tensor) -> Tensor:
            rows = values.reshape(-1, values.shape[-1])
            return torch.cat([rows[:-1], leaf[None]]).reshape(values.shape)

        with torch.enable_grad(), acting(self._part(layer), replace):
            p = self._probability()
        (slope,) = torch.autograd.grad(p, leaf)
        return float(p.detach()), slope
