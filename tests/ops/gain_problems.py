"""Random arguments of `logprob_gain` and its definition; the op's tests import them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def problem(
    shape: tuple[int, int, int, int, int],
    *,
    size: float = 0.3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Random arguments (E, P, K, D, V); logits move by a few times `size`."""
    n_sentences, n_positions, n_neurons, hidden, vocabulary = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    return {
        "x": (normal(n_sentences, hidden) * 3 / hidden**0.5).to(dtype),
        # As a transposed weight lies.
        "values": (normal(hidden, n_neurons) * size / hidden**0.5).to(dtype).T,
        "coefficients": normal(n_sentences, n_positions, n_neurons).to(dtype),
        "unembed": normal(vocabulary, hidden).to(dtype),
        "scale": torch.rand(n_sentences, generator=generator) + 0.5,
        "targets": torch.randint(vocabulary, (n_sentences,), generator=generator),
    }


def naive(given: dict[str, Any]) -> Tensor:
    """The definition, float64, like coefficients (E, P, K)."""
    x, values, c, unembed, scale = (
        given[name].double() for name in ("x", "values", "coefficients", "unembed", "scale")
    )
    offset, after = given.get("offset"), given.get("scale_after")
    offset = 0.0 if offset is None else offset.double()
    result = torch.empty_like(c)
    for e, target in enumerate(given["targets"].tolist()):
        before = (scale[e] * (x[e] @ unembed.T) + offset).log_softmax(0)[target]
        for p in range(c.shape[1]):
            s = scale[e] if after is None else after[e, p].double()[:, None]
            logits = s * ((x[e] + c[e, p][:, None] * values) @ unembed.T) + offset
            result[e, p] = logits.log_softmax(1)[:, target] - before
    return result


def best(gains: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The `top` largest of each row and their places, the later one first among equals."""
    values, order = gains.reshape(len(gains), -1).flip(1).sort(dim=1, descending=True, stable=True)
    return values[:, :top], order.shape[1] - 1 - order[:, :top]


def extras(given: dict[str, Any], *, offset: bool, own_norm: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(9)
    more: dict[str, Any] = {}
    if offset:
        more["offset"] = torch.randn(len(given["unembed"]), generator=generator)
    if own_norm:
        shape = given["coefficients"].shape
        change = 1 + 0.3 * torch.rand(shape, generator=generator).double()
        more["scale_after"] = given["scale"][:, None, None] * change
    return given | more
