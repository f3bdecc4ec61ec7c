"""A model whose chosen products, the inputs of down, become other values in every forward.

`ablate` and `generate` run it in place of the model: the values are those of another model that
reads the same tokens (model/paired.py), or stored means and noise (ablation/exchange.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relneuron.model.mlps.mlp import MLP
from relneuron.model.pair import Taps
from relneuron.model.states import Tokens


@dataclass(frozen=True)
class Put:
    """Of one MLP the neurons `index` (K,) whose products may become other values.

    `chosen` (C, K) bool: those of each condition; row 0 is clean.
    """

    index: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class Rows:
    """Of a forward that is about to run: the prompts of its rows, and what they are."""

    prompts: Sequence[int]
    is_donor: Tensor  # (b,) bool: another model answers
    is_chosen: Tensor  # (b,) bool: some neuron of the row gets another value


class Exchanged:
    """Stands where a model does; a subclass says in `values` what products become.

    Before each forward `tokens` say the conditions of its tokens, as a patch's do, and `rows` the
    rest; until then the model runs as it is. Everything else that is asked of it the model answers.
    """

    def __init__(self, model: Any, mlps: Sequence[MLP]) -> None:
        self.patched, self.mlps = model, mlps
        self.puts: Mapping[int, Put] = {}  # by the place of the MLP among `mlps`
        self.tokens = Tokens()
        self.rows: Rows | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.patched, name)

    def __call__(self, **given: Any) -> Any:
        if self.rows is None:
            return self.patched(**given)
        with Taps(self.mlps, self.see):
            return self.patched(**given)

    def see(self, number: int, h: Tensor) -> Tensor | None:
        """A copy of h (b, t, F) with other values at the chosen neurons; None without any."""
        put = self.puts.get(number)
        if put is None:
            return None
        own = h[..., put.index]
        where = put.chosen[self.conditions(h)]
        new = torch.where(where, self.values(number, own).to(own.device, own.dtype), own)
        return h.index_copy(-1, put.index, new)

    def conditions(self, h: Tensor) -> Tensor:
        """Of the tokens of h (b, t, F) the rows of `chosen`: (b, t) or (b, 1) int64."""
        rows = self.tokens.on(h.device).rows(h.shape)
        assert rows is not None, "the conditions are said before each forward"
        return rows.long()

    def values(self, number: int, own: Tensor) -> Tensor:
        """What the products `own` (b, t, K) of an MLP's neurons `index` become."""
        raise NotImplementedError
