"""Noise on the products of neurons: a draw is decided by whose it is, and not by its batch.

`generate --mode noise` takes its values from here (arXiv 2406.14144, a control of patching).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron.model.exchange import Exchanged
from relneuron.model.mlps.mlp import MLP

Array = np.ndarray[Any, Any]

_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014) of int64 numbers, which wrap around."""
    x = x + _GOLDEN
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


def normal(tokens: Tensor, neurons: Tensor) -> Tensor:
    """(T, K) float32 draws from N(0, 1) of int64 keys of T tokens and K neurons.

    A draw depends on its two keys and on nothing else; of 2**23 numbers it is at most 5.3 away
    from 0.
    """
    bits = mixed(mixed(tokens)[:, None] + mixed(neurons)) >> 41 & (1 << 23) - 1
    drawn: Tensor = torch.special.ndtri((bits.float() + 0.5) / 2**23)
    return drawn


def prompt_key(seed: int, name: str) -> int:
    """An int64 number of a prompt's id and the seed of the noise."""
    digest = hashlib.sha256(f"relneuron.noise.{seed}.{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


class FromNoise(Exchanged):
    """The products themselves and `factor` standard deviations of noise.

    The noise of a token is drawn from the seed, its prompt, layer, neuron and position: it is the
    same whatever else is in the batch, under every condition and with every seed of a sample.

    stds  (L, F) float32
    keys  of the prompts, as `prompt_key` makes them
    """

    def __init__(
        self, model: Any, mlps: Sequence[MLP], stds: Array, factor: float, keys: Sequence[int]
    ) -> None:
        super().__init__(model, mlps)
        self._spread = stds * np.float32(factor)
        self._keys = keys
        self._places = torch.empty(0, dtype=torch.int64, device="cpu")

    def __call__(self, **given: Any) -> Any:
        if self.rows is not None:
            keys = torch.tensor([self._keys[row] for row in self.rows.prompts], device="cpu")
            self._places = keys[:, None].to(given["position_ids"].device) + given["position_ids"]
        return super().__call__(**given)

    def values(self, number: int, own: Tensor) -> Tensor:
        mlp, index = self.mlps[number], self.puts[number].index
        spread = torch.from_numpy(self._spread[mlp.layer, mlp.inside]).to(own.device)[index]
        neurons = (mlp.layer << 32) + mlp.inside.start + index
        drawn = normal(self._places.to(own.device).reshape(-1), neurons).reshape(own.shape)
        return own.float() + drawn * spread
