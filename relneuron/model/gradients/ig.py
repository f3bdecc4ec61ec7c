"""Integrated gradients of sentences, by the staircase where it is exact, else by its definition.

The stage `attribute --method ig` makes an `Integrator` of a model and asks it for batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from relneuron.model.batches import pad
from relneuron.model.gradients.reference import Integrated, integrate_reference
from relneuron.model.gradients.sites import Sites, acting
from relneuron.model.gradients.staircase import Staircase, read_staircase
from relneuron.model.layers import Unfound
from relneuron.model.stream.trace import last_logits


class Integrator:
    """A model and the way to integrate on it.

    why_not   why the staircase is not exact, "" where it is
    replaced  the token that stands for each of a sentence's in turn, to make the baseline; None for
              a baseline of zero
    """

    def __init__(
        self, sites: Sites, points: Sequence[float], *, replaced: int | None = None
    ) -> None:
        self.sites, self.points, self.replaced = sites, list(points), replaced
        self.staircase: Staircase | None = None
        self.why_not = ""
        try:
            self.staircase = read_staircase(sites)
        except Unfound as error:
            self.why_not = str(error)

    def __call__(
        self, ids: Sequence[Sequence[int]], targets: Sequence[int], most_rows: int
    ) -> Integrated:
        """The integrated gradients of a batch; at most `most_rows` rows climb at once."""
        baseline = None
        if self.replaced is not None:
            own = [replaced_neurons(self.sites, line, self.replaced, most_rows) for line in ids]
            baseline = torch.stack(own)
        if self.staircase is None:
            return integrate_reference(self.sites, ids, targets, self.points, baseline=baseline)
        return self.staircase.integrate(
            ids, targets, self.points, baseline=baseline, most_rows=most_rows
        )

    def columns(self, n_tokens: int) -> int:
        """How many columns a sentence has at the top of the staircase: its tokens and its rows."""
        return n_tokens + len(self.sites.numbers) * (len(self.points) + 1)


@torch.no_grad()
def replaced_neurons(
    sites: Sites, line: Sequence[int], token: int, most_tokens: int = 2048
) -> Tensor:
    """(L, F) float64: the mean of the neurons at the last token of a sentence, over the sentences
    that have `token` in the place of one of its tokens, each in turn.

    The baseline of the published code for query localization (methods 5.8).
    """
    every = [[*line[:k], token, *line[k + 1 :]] for k in range(len(line))]
    size = (len(sites.parts), sites.width)
    total = torch.zeros(size, dtype=torch.float64, device="cpu")
    at_once = max(1, most_tokens // len(line))
    for start in range(0, len(every), at_once):
        with ExitStack() as stack:
            for number in sites.numbers:
                part: Any = sites.parts[number]
                stack.enter_context(acting(part, _adds(total[number], len(line))))
            last_logits(sites.model, *pad(every[start : start + at_once], sites.device))
    return total / len(every)


def _adds(total: Tensor, n_tokens: int) -> Callable[[Tensor], None]:
    def add(values: Tensor) -> None:
        last = values.reshape(-1, n_tokens, values.shape[-1])[:, -1]
        total[: values.shape[-1]] += last.double().sum(0).cpu()

    return add


@torch.no_grad()
def likeliest(sites: Sites, ids: Sequence[Sequence[int]], pads: bool) -> list[int]:
    """The model's most probable next token of each sentence."""
    found = [0] * len(ids)
    lengths = [0 if pads else len(line) for line in ids]
    for length in dict.fromkeys(lengths):
        rows = [row for row, own in enumerate(lengths) if own == length]
        logits = last_logits(sites.model, *pad([ids[row] for row in rows], sites.device))
        for row, best in zip(rows, logits.argmax(1).tolist(), strict=True):
            found[row] = best
    return found
