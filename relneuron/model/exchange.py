"""What a patch does with products, the inputs of down: it keeps some of them, or puts others there.

`ablation/exchange.py` makes these for a patch's states: the values come from another model that
reads the same tokens (model/paired.py), from stored means, or are the products' own with noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from relneuron.model.states import Tokens

# Of the products (T, K) of some neurons and the shape of the layer's input, what they become.
Value = Callable[[Tensor, torch.Size], Tensor]


@dataclass
class Take:
    """Keeps the products (T, K) of the neurons `index` (K,) of the forward that ran last."""

    index: Tensor
    kept: Tensor | None = None

    def __call__(self, h: Tensor, tokens: Tokens, shape: torch.Size) -> Tensor:
        self.kept = h[:, self.index]
        return h

    def give(self, own: Tensor, shape: torch.Size) -> Tensor:
        """What was kept, once, for products `own` (T, K) of the same tokens in another model."""
        kept, self.kept = self.kept, None
        if kept is None or kept.shape != own.shape:
            found = None if kept is None else tuple(kept.shape)
            raise ValueError(
                f"Take: products {tuple(own.shape)} (from the patched model) are expected of the "
                f"other model, got {found}"
            )
        return kept.to(own.device, own.dtype)


@dataclass
class Put:
    """Puts `value` in the place of the products `index` (K,) that are `chosen` (C, K) bool."""

    index: Tensor
    chosen: Tensor
    value: Value

    def __call__(self, h: Tensor, tokens: Tokens, shape: torch.Size) -> Tensor:
        rows = tokens.rows(shape)
        own = h[:, self.index]
        where = self.chosen[:1]
        if rows is not None:
            where = self.chosen[rows.expand(shape[:-1]).reshape(-1).long()]
        # A copy: h may be a tensor of the model's own.
        return h.index_copy(1, self.index, torch.where(where, self.value(own, shape), own))
