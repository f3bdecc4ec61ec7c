"""What peaks, merge_peaks and histogram must give, a value after another, and data for them.

The checks of `check_backend` and the tests of our backends compare with it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from relneuron.ops import BestPeaks
from relneuron.testing.oracle import integers, normal

Peaks = tuple[Tensor, Tensor]
# values, positions, numbers and group_ids of segments.
Segments = tuple[Tensor, Tensor, Tensor, Tensor]


def no_peaks(n_segments: int, width: int) -> Peaks:
    """values and positions before the first call."""
    return torch.full((n_segments, width), -math.inf), torch.full(
        (n_segments, width), -1, dtype=torch.int32
    )


def brute_peaks(value: Tensor, ids: Tensor, before: Peaks, first_row: int = 0) -> Peaks:
    """The peaks of values (T, F) in the dtype of the call, after those of `before`."""
    values, positions = (part.tolist() for part in before)
    for t, (row, segment) in enumerate(zip(value.double().tolist(), ids.tolist(), strict=True)):
        for f, v in enumerate(row):
            if segment < 0 or math.isnan(v):
                continue
            old, place = values[segment][f], positions[segment][f]
            if place < 0 or v > old or (v == old and first_row + t < place):
                values[segment][f], positions[segment][f] = v + 0.0, first_row + t
    shape = before[0].shape
    return (
        torch.tensor(values, dtype=torch.float32).reshape(shape),
        torch.tensor(positions, dtype=torch.int32).reshape(shape),
    )


def brute_best(calls: list[Segments], groups: int, width: int, k: int) -> BestPeaks:
    """The best peaks of calls of (values, positions, numbers, group_ids)."""
    best = BestPeaks.none(groups, width, k)
    for group in range(groups):
        for f in range(width):
            own = sorted(
                (-v, int(numbers[s]), p)
                for values, positions, numbers, ids in calls
                for s, (v, p) in enumerate(
                    zip(values[:, f].tolist(), positions[:, f].tolist(), strict=True)
                )
                if int(ids[s]) == group and p >= 0 and not math.isnan(v)
            )
            for i, (v, number, position) in enumerate(own[:k]):
                best.value[group, f, i] = 0.0 - v
                best.number[group, f, i] = number
                best.position[group, f, i] = position
    return best


def brute_histogram(
    value: Tensor, ids: Tensor, groups: int, bins: int, exponent: Tensor, first: Tensor
) -> Tensor:
    """numpy's searchsorted on the inner edges, which are exact in float64."""
    counts = torch.zeros(groups, value.shape[1], bins, dtype=torch.int64)
    for f in range(value.shape[1]):
        edges = np.ldexp(np.arange(1, bins) + float(first[f]), int(exponent[f]))
        for group in range(groups):
            own = value[ids == group, f].double().numpy()
            place = np.searchsorted(edges, own[~np.isnan(own)], side="right")
            counts[group, f] = torch.from_numpy(np.bincount(place, minlength=bins))
    return counts


# --- data ------------------------------------------------------------------------------------

SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 1e-39, 3e38, -3e38, torch.inf, -torch.inf, torch.nan)


def wild(n_rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random values, some of them special; columns of few values, of NaN alone and of -inf."""
    values = normal(n_rows, width, dtype=dtype, seed=seed)
    values[:, ::5] = integers(-1, 2, n_rows, width, seed=seed)[:, ::5].to(dtype)
    flat = values.view(-1)
    places = integers(0, max(flat.numel(), 1), flat.numel() // 9, seed=seed + 1).long()
    flat[places] = torch.tensor(SPECIAL).to(dtype)[places % len(SPECIAL)]
    values[:, 3:4], values[:, 4:5] = torch.nan, -torch.inf
    return values


def some_peaks(n_segments: int, width: int, seed: int, groups: int = 3) -> Segments:
    """Peaks of which many are equal, some infinite and some none; numbers in any order."""
    values = integers(-2, 3, n_segments, width, seed=seed).float() / 2
    values[:, ::3] = normal(n_segments, width, dtype=torch.float32, seed=seed)[:, ::3]
    values[:, 1::7], values[:, 2::7] = torch.inf, -torch.inf
    positions = integers(-1, 4, n_segments, width, seed=seed + 1)
    values[positions < 0] = -torch.inf
    numbers = integers(0, 40, n_segments, seed=seed + 2).long()
    numbers[::4] += 2**40
    return values, positions, numbers, integers(-1, groups, n_segments, seed=seed + 3)
