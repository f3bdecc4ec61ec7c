"""The bins of `histogram`, chosen from the range of a first sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Of a step 2^exponent: 2^-exponent is then a normal float32.
EXPONENTS = (-126, 126)
FIRST_BITS = 24  # |first| is below 2^24, so that a float32 holds it exactly
BINS = (8, 4096)


def histogram_edges(smallest: Tensor, largest: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """The bins of every neuron: (exponent, first), (F,) int32 each, on the device of `smallest`.

    Bin i of neuron f begins at (first[f] + i) 2^exponent[f], exactly. The step is the smallest
    power of two with which `bins` bins cover [smallest, largest], so at least half of them are
    needed for that, and the others lie below and above, half each. But it is at least 2^-126, and
    at least 2^-23 of the largest magnitude, two units of a float32 there. Where nothing varies the
    range is that from 0 to twice the value, and [-1, 1] where the value is 0, or where there is
    none (smallest > largest, NaN). An infinite end is the largest float32.

    Arguments
        smallest, largest  (F,) float32, such as `site_range` gives
        bins               B, an even number in [8, 4096]
    """
    low, high = BINS
    if isinstance(bins, bool) or not isinstance(bins, int) or not low <= bins <= high or bins % 2:
        raise ValueError(
            f"histogram_edges: bins must be an even number in [{low}, {high}], got {bins!r}"
        )
    for name, tensor in (("smallest", smallest), ("largest", largest)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"histogram_edges: {name} must be a tensor, got {type(tensor)}")
        if tensor.shape != (len(smallest),) or tensor.dtype != torch.float32:
            raise ValueError(
                f"histogram_edges: {name} must be (F,) float32 with F={len(smallest)} (from "
                f"smallest), got {tuple(tensor.shape)} {tensor.dtype}"
            )
    # In numpy, where all of it is exact in float64: ldexp and frexp are.
    largest_float = float(np.finfo(np.float32).max)
    a, b = (
        np.clip(x.detach().cpu().numpy().astype(np.float64), -largest_float, largest_float)
        for x in (smallest, largest)
    )
    seen = a <= b
    a, b = np.where(seen, a, 0.0), np.where(seen, b, 0.0)
    same = a == b
    a, b = (
        np.where(same, np.where(b == 0, -1.0, np.minimum(0.0, 2 * b)), a),
        np.where(same, np.where(b == 0, 1.0, np.maximum(0.0, 2 * b)), b),
    )
    a, b = np.clip(a, -largest_float, largest_float), np.clip(b, -largest_float, largest_float)

    magnitude = np.frexp(np.maximum(np.abs(a), np.abs(b)))[1]  # |v| < 2^magnitude
    floor = np.maximum(magnitude - (FIRST_BITS - 1), EXPONENTS[0])
    exponent = np.maximum(np.frexp((b - a) / bins)[1] - 1, floor)
    # Two more at most: one as 2^(frexp - 1) is below the quotient, one as the bins are aligned.
    for _ in range(2):
        n_used = np.floor(np.ldexp(b, -exponent)) - np.floor(np.ldexp(a, -exponent)) + 1
        exponent = exponent + (n_used > bins)
    lowest = np.floor(np.ldexp(a, -exponent))
    n_used = np.floor(np.ldexp(b, -exponent)) - lowest + 1
    first = lowest - (bins - n_used) // 2
    device = smallest.device
    return (
        torch.tensor(exponent.astype(np.int32), device=device),
        torch.tensor(first.astype(np.int32), device=device),
    )
