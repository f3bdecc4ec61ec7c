"""What listed neurons give at every token of some texts: a pass over those texts alone.

The cards of `study/cards.py` shade tokens by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relneuron.artifact.journal import Journal
from relneuron.artifact.neurons import Neuron
from relneuron.model.ask import Asker
from relneuron.model.batches import Budget, cut, shared
from relneuron.model.converse import Step
from relneuron.model.layers import compute_dtype, device_of
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.shape import Part
from relneuron.model.patch import Patch
from relneuron.model.questions import Questions
from relneuron.model.states import LayerState, Tokens

Values = NDArray[np.float32]

# Beside the outputs of the maps (gate, up, down, q, k, v, o): what is made of gate and of both.
MADE = {"act": ("gate",), "product": ("gate", "up")}
# A pass holds the outputs of whole maps at every token of a batch; more of them than this do not
# share one.
MOST_BYTES = 1 << 29


def token_values(
    model: Any,
    tokenizer: Any,
    mlps: Sequence[Part],
    texts: Sequence[Sequence[int]],
    neurons: Sequence[Sequence[Neuron]],
    budget: Budget,
    *,
    backend: str = "auto",
    journal: Journal | None = None,
    part: str = "",
) -> list[Values]:
    """(K, T) float32 of each text: the values of its own K neurons (layer, site, index) at its T
    tokens.

    The site is one of `mlps`, `act` (the activation of gate) or `product` (act times up, what down
    reads). The values are those that `record` sums up, number by number: each token is a prompt of
    its own. A neuron of an expert that a token was not sent to gives 0 there. With a `journal` its
    processes share the batches, which it calls by `part`.
    """
    reader = _Reader(model, tokenizer, mlps, texts, neurons, backend)
    rows = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    length = reader.length
    found: dict[int, Values] = {}
    most = max(1, min(budget.planned, MOST_BYTES // reader.bytes_a_token))

    def read(batch: list[int]) -> list[list[list[float]]]:
        return [values.tolist() for values in budget.run(batch, length, reader.read)]

    batches = cut(rows, length, most)
    for batch, said in zip(batches, shared(journal, f"values {part}", batches, read), strict=True):
        for row, values in zip(batch, said, strict=True):
            found[row] = np.array(values, np.float32).reshape(len(neurons[row]), length(row))
    return [found[row] for row in range(len(texts))]


class _Reader:
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        mlps: Sequence[Part],
        texts: Sequence[Sequence[int]],
        neurons: Sequence[Sequence[Neuron]],
        backend: str,
    ) -> None:
        self.asker, self.backend = Asker(model, tokenizer), backend
        self.dtype = compute_dtype(model)
        self.questions = Questions([], [list(ids) for ids in texts], [])
        self.mlps, self.neurons = mlps, neurons
        asked = {(layer, site) for some in neurons for layer, site, _ in some}
        self.parts = {(layer, part) for layer, site in asked for part in MADE.get(site, (site,))}
        widths = [
            mlp.hidden if site == "down" else mlp.width
            for mlp in mlps
            for layer, site in self.parts
            if layer == mlp.layer
        ]
        self.bytes_a_token = max(1, 4 * sum(widths))

    def length(self, row: int) -> int:
        return self.questions.length(row)

    def read(self, rows: list[int]) -> list[Values]:
        """The values of one batch."""
        n_tokens = sum(self.length(row) for row in rows)
        states = [self._state(mlp, n_tokens) for mlp in self.mlps]
        with Patch(self.mlps, states, backend=self.backend) as patch:

            def number(step: Step) -> None:
                tokens = step.mask.bool()
                ids = torch.full_like(step.mask, -1)
                ids[tokens] = torch.arange(n_tokens, device=ids.device)
                patch.tokens = Tokens(prompt_ids=ids.int())

            self.asker.read(self.questions, rows, number)
        # Row by row of the batch, as their tokens were numbered.
        ends = np.cumsum([self.length(row) for row in rows])
        found = []
        for row, end in zip(rows, ends.tolist(), strict=True):
            values = np.zeros((len(self.neurons[row]), self.length(row)), np.float32)
            for place, neuron in enumerate(self.neurons[row]):
                for mlp, state in zip(self.mlps, states, strict=True):
                    column = self._column(mlp, state.responses or {}, neuron)
                    if column is not None:
                        values[place] = column[end - values.shape[1] : end]
                        break
            found.append(values)
        return found

    def _state(self, mlp: Part, n_tokens: int) -> LayerState:
        sites = [site for layer, site in sorted(self.parts) if layer == mlp.layer]
        # Without up the product is the activation.
        sites = [site for site in sites if site != "up" or mlp.is_gated]
        if not mlp.runs or not sites:
            return LayerState()
        outside = {part.site: part.width for part in mlp.projections} | {"down": mlp.hidden}
        inside = (n_tokens * mlp.n_experts, mlp.width // mlp.n_experts)
        shapes = {s: (n_tokens, outside[s]) if s in outside else inside for s in sites}
        device = device_of(mlp.module)
        sums = {s: torch.zeros(shape, device=device) for s, shape in shapes.items()}
        return LayerState(responses=sums)

    def _column(self, mlp: Part, sums: dict[str, Tensor], neuron: Neuron) -> Values | None:
        """(T,) what a neuron gave at all tokens of the batch; None if it is another part's."""
        layer, site, index = neuron
        if layer != mlp.layer or not sums:
            return None
        if site in ("down", *(part.site for part in mlp.projections)):
            column = sums[site][:, index]
        elif not mlp.inside.start <= index < mlp.inside.stop:
            return None
        else:
            column = self._inside(mlp, sums, site, index - mlp.inside.start)
        values: Values = column.float().cpu().numpy()
        return values

    def _inside(self, mlp: Part, sums: dict[str, Tensor], site: str, place: int) -> Tensor:
        """(T,) of a neuron at gate or up, or what is made of them."""
        if isinstance(mlp, Experts):
            expert, place = divmod(place, mlp.expert_width)
            n = len(next(iter(sums.values()))) // mlp.n_experts
            rows = slice(expert * n, (expert + 1) * n)
        else:
            rows = slice(None)
        parts = [sums[part][rows, place, None] for part in MADE.get(site, (site,)) if part in sums]
        if site not in MADE:
            return parts[0][:, 0]
        # In the model's own numbers, as its activation has them.
        gate, *up = (part.to(self.dtype) for part in parts)
        act = mlp.act(gate) if isinstance(mlp, Experts) else mlp.own_activation()(gate)
        for factor in up:
            act = act * (mlp.factor(factor) if isinstance(mlp, Experts) else factor)
        return act[:, 0]
