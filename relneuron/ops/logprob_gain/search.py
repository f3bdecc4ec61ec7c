"""Finds the largest gains for `logprob_gain` without evaluating the rest.

ops/logprob_gain/op.py calls it. Neurons are visited by the upper bound of their gain, first-order
plus rounding, until the bound of the next is below the worst gain of a full list (arXiv 2312.12141
has no such search; log p(w) is concave along a value vector, so its tangent is above it, and with a
soft cap on the logits is at most `bend` * reach^2 below).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relneuron.ops.logprob_gain.base import Base, exact_gains
from relneuron.ops.logprob_gain.engine import Engine


class Search:
    """The `top` largest gains of each of E sentences over the neurons of some layers."""

    def __init__(
        self, engine: Engine, bases: Sequence[Base], valid: Sequence[Tensor | None], top: int
    ) -> None:
        self.engine, self.bases, self.top = engine, bases, top
        bounds, sizes = [], []
        for base, usable in zip(bases, valid, strict=True):
            reach = base.reach()
            bound = base.first_order() + base.rounding(reach) + base.head.bend * reach * reach
            if usable is not None:
                usable = usable if usable.dim() == 3 else usable[:, :, None]
                bound = bound.masked_fill(~usable, -torch.inf)
            bounds.append(bound.reshape(len(base.x), -1))
            sizes.append(bounds[-1].shape[1])
        self.bounds = torch.cat(bounds, 1)  # (E, all neurons)
        self.starts = torch.tensor([0, *sizes], device=self.bounds.device).cumsum(0)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """gain, layer and index (E, top), best first."""
        n_all = self.bounds.shape[1]
        n_listed = min(n_all, self.top + self.top // 8 + 16)
        gains = errors = self.bounds.new_empty(len(self.bounds), 0, dtype=torch.float64)
        while True:
            # Stable, so that a longer list begins with the shorter one.
            bound, place = _largest(self.bounds, n_listed)
            more = bound.double()[:, gains.shape[1] :]
            visit = (more >= self._worst(gains, errors)[:, None]) & (more > -torch.inf)
            if not bool(visit.any()):
                break
            new_gains, new_errors = self._evaluate(place[:, gains.shape[1] :], visit)
            gains, errors = torch.cat([gains, new_gains], 1), torch.cat([errors, new_errors], 1)
            if n_listed == n_all:
                break
            n_listed = min(n_all, n_listed + max(16, self.top // 8, n_listed // 4))
        return self._choose(gains, errors, place[:, : gains.shape[1]])

    def _worst(self, gains: Tensor, errors: Tensor) -> Tensor:
        """A lower bound on the gain that ends each list (E,); -inf while it is not full."""
        if gains.shape[1] < self.top:
            return torch.full((len(gains),), -torch.inf, dtype=gains.dtype, device=gains.device)
        return (gains - errors).topk(self.top, 1).values[:, -1]

    def _evaluate(
        self, place: Tensor, visit: Tensor, *, exactly: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Gains and error bounds (E, n) of the places to visit, -inf and 0 for the others."""
        gains = torch.full(place.shape, -torch.inf, dtype=torch.float64, device=place.device)
        errors = torch.zeros_like(gains)
        layer = torch.searchsorted(self.starts, place.contiguous(), right=True) - 1
        for number, base in enumerate(self.bases):
            sentence, column = (visit & (layer == number)).nonzero(as_tuple=True)
            if not len(sentence):
                continue
            per_sentence = base.shape[1] * base.shape[2]
            within = place[sentence, column] - self.starts[number]
            flat = sentence * per_sentence + within
            if exactly:
                gains[sentence, column] = exact_gains(base, flat)
            else:
                gains[sentence, column], errors[sentence, column] = self.engine.gains(base, flat)
            base.rest()
        return gains, errors

    def _choose(
        self, gains: Tensor, errors: Tensor, place: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The `top` best of what was visited; those that the error bounds cannot tell from the
        last one are told apart in float64."""
        top = min(self.top, gains.shape[1])
        low = (gains - errors).topk(top, 1).values[:, -1:]
        may_be_in = (gains + errors >= low) & (gains > -torch.inf)
        crowded = may_be_in.sum(1, keepdim=True) > top
        # Certainly in: fewer than `top` others may be above.
        high = (gains + errors).topk(min(top + 1, gains.shape[1]), 1).values[:, -1:]
        unsettled = may_be_in & crowded & (gains - errors <= high) & (errors > 0)
        if bool(unsettled.any()):
            exact, _ = self._evaluate(place, unsettled, exactly=True)
            gains = torch.where(unsettled, exact, gains)
        # Among equal gains the later place first.
        order = place.argsort(1, descending=True)
        gains, place = gains.gather(1, order), place.gather(1, order)
        order = gains.argsort(dim=1, descending=True, stable=True)[:, :top]
        gains, place = gains.gather(1, order), place.gather(1, order)
        layer = torch.searchsorted(self.starts, place.contiguous(), right=True) - 1
        index = place - self.starts[layer]
        missing = gains == -torch.inf
        layer, index = layer.masked_fill(missing, -1), index.masked_fill(missing, -1)
        gains = gains.to(self.bounds.dtype)
        if top < self.top:
            pad = (0, self.top - top)
            gains = torch.nn.functional.pad(gains, pad, value=-torch.inf)
            layer, index = (torch.nn.functional.pad(t, pad, value=-1) for t in (layer, index))
        return gains, layer, index


def _largest(bounds: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The `n` largest of each row, and their places; equal ones in order of place."""
    if n == bounds.shape[1]:
        values, place = bounds.sort(dim=1, descending=True, stable=True)
        return values, place
    # topk chooses as it likes among equals at the end of the list: take them all.
    least = bounds.topk(n, 1).values[:, -1:]
    n_wide = int((bounds >= least).sum(1).max())
    values, place = bounds.topk(n_wide, 1)
    place, order = place.sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values[:, :n], place.gather(1, order)[:, :n]
