"""What single neurons write: tokens that a value vector promotes, and the vectors nearest to it.

The cards of `study/cards.py` show both. A neuron's value vector is what it adds to the residual
stream: of gate and up the column of down, of down and of o a coordinate of the stream itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from relneuron.artifact.neurons import Neuron
from relneuron.model.stream.parts import ResidualModel

NEURONS = ("gate", "up", "act", "product")  # sites whose neurons are the products of an MLP
COORDINATES = ("down", "o")
DIGITS = 4  # of a cosine: float32 sums of thousands of products have no more


class Ends(NamedTuple):
    """Tokens and their logits at both ends of a value vector."""

    largest: list[tuple[int, float]]
    least: list[tuple[int, float]]


class Near(NamedTuple):
    """An FFN neuron, and the cosine of its value vector with another one's."""

    layer: int
    number: int
    cosine: float


def value_of(residual: ResidualModel, neuron: Neuron) -> Tensor | None:
    """(D,) float32, or float64 of such a model: what a neuron writes; None of q, k and v."""
    layer, site, index = neuron
    if site in NEURONS:
        return residual.layers[layer].ffn_value(index).to(residual.unembed.dtype)
    if site in COORDINATES:
        vector = residual.unembed.new_zeros(residual.hidden)
        vector[index] = 1
        return vector
    return None


def promoted(residual: ResidualModel, values: Sequence[Tensor], n: int) -> list[Ends]:
    """Of each value vector v the `n` tokens with the largest logits unembed @ v, and the least.

    As (token id, logit), the largest and the least first; of equal ones the lower token. The
    logits are without the final norm's scale, but with its gain (the logit lens of a vector).
    """
    if not values:
        return []
    found = []
    for logits in torch.stack(list(values)) @ residual.unembed.T:
        ends = []
        for sign in (1, -1):
            order = (sign * logits).argsort(descending=True, stable=True)[:n]
            ends.append(list(zip(order.tolist(), logits[order].tolist(), strict=True)))
        found.append(Ends(*ends))
    return found


def nearest(
    residual: ResidualModel, values: Sequence[Tensor], neurons: Sequence[Neuron], n: int
) -> list[list[Near]]:
    """Of each value vector the `n` FFN neurons of the model whose own have the largest cosine.

    All of them are compared, a block of a layer's at a time; a neuron is not near itself. Cosines
    are rounded to `DIGITS`; of equal ones the neuron that comes first. A vector of zeros has 0.
    """
    if not neurons:
        return []
    ours = _unit(torch.stack(list(values)))
    cosines = ours.new_empty(len(ours), 0)
    places = torch.empty(0, 2, dtype=torch.int64, device=ours.device)
    for layer in residual.layers:
        start = 0
        for block in layer.value_blocks():
            found = ours @ _unit(block.to(ours.dtype)).T
            for row, (own, site, index) in enumerate(neurons):
                if own == layer.layer and site in NEURONS and 0 <= index - start < len(block):
                    found[row, index - start] = -2.0
            numbers = torch.arange(start, start + len(block), device=ours.device)
            here = torch.stack([torch.full_like(numbers, layer.layer), numbers], 1)
            cosines, places = _best(cosines, places, found.round(decimals=DIGITS), here, n)
            start += len(block)
    return [
        [
            Near(layer, index, round(cosine, DIGITS) + 0.0)
            for cosine, (layer, index) in zip(row, where, strict=True)
            if cosine >= -1.5
        ]
        for row, where in zip(cosines.tolist(), places.tolist(), strict=True)
    ]


def _best(
    cosines: Tensor, places: Tensor, found: Tensor, here: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """The n largest of each row and where they are: (K, n) so far, and a block's (K, F)."""
    k = len(found)
    before = places if places.dim() == 3 else places.expand(k, 0, 2)
    # A sort of n and F numbers a row; a stable one keeps what came first of equal ones.
    top = found.sort(dim=1, descending=True, stable=True)
    both = torch.cat([cosines, top.values[:, :n]], 1)
    where = torch.cat([before, here[top.indices[:, :n]]], 1)
    order = both.argsort(dim=1, descending=True, stable=True)[:, :n]
    return both.gather(1, order), where.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))


def _unit(vectors: Tensor) -> Tensor:
    norms = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(norms > 0, norms, torch.ones_like(norms))
