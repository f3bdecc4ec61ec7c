"""Noise on the products of neurons: a draw is decided by whose it is, and not by its batch.

`generate --mode noise` takes its values from here (arXiv 2406.14144, a control of patching).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron.ablation.exchange import Array, Rows
from relneuron.model.exchange import Value
from relneuron.model.layers import device_of
from relneuron.model.mlps.shape import Part

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


@dataclass
class FromNoise:
    """The products themselves and `factor` standard deviations of noise.

    The noise of a token is drawn from the seed, its prompt, layer, neuron and position: it is the
    same whatever else is in the batch, under every condition and with every seed of a sample.
    """

    patched: Any
    stds: Array  # (L, F) float32
    factor: float
    keys: Sequence[int]  # of the prompts, `prompt_key`
    _rows: list[int] = field(default_factory=list)
    _tokens: Tensor | None = None

    @property
    def model(self) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.patched, name)

    def __call__(self, **given: Any) -> Any:
        keys = torch.tensor([self.keys[row] for row in self._rows], device="cpu")
        places = given["position_ids"]
        self._tokens = keys.to(places.device)[:, None] + places if self._rows else None
        return self.patched(**given)

    def begin(self) -> None: ...

    def value(self, number: int, part: Part, index: Array) -> Value:
        device = device_of(part.module)
        spread = self.stds[part.layer, part.inside][index] * np.float32(self.factor)
        stds = torch.from_numpy(spread).to(device)
        neurons = torch.from_numpy((part.layer << 32) + part.inside.start + index).to(device)

        def noisy(own: Tensor, shape: torch.Size) -> Tensor:
            assert self._tokens is not None, "the rows are said before each forward"
            tokens = self._tokens[:, -shape[1] :].reshape(-1).to(device)
            return (own.float() + normal(tokens, neurons) * stds).to(own.dtype)

        return noisy

    def running(self) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self, rows: Rows) -> None:
        self._rows = list(rows.prompts)
