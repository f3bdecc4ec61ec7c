"""Runs any backend of the ops of relneuron.ops.peaks, and has values that are hard for them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from relneuron.ops import BestPeaks, histogram, merge_peaks, peaks
from relneuron.testing.oracle import integers, normal
from tests.ops.peaks.brute import no_peaks
from tests.ops.swiglu_stats.runs import device_of, move

op: Any = importlib.import_module("relneuron.ops.peaks.op")
BACKENDS = ["reference"]

SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 1e-39, 3e38, -3e38, torch.inf, -torch.inf, torch.nan)


def wild(n_rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random values; some are special, some columns have few values, one NaN alone, one -inf."""
    values = normal(n_rows, width, dtype=dtype, seed=seed)
    values[:, ::5] = integers(-1, 2, n_rows, width, seed=seed)[:, ::5].to(dtype)
    flat = values.view(-1)
    places = integers(0, max(flat.numel(), 1), flat.numel() // 9, seed=seed + 1).long()
    flat[places] = torch.tensor(SPECIAL).to(dtype)[places % len(SPECIAL)]
    values[:, 3:4], values[:, 4:5] = torch.nan, -torch.inf
    return values


def run_peaks(
    backend: str,
    gate: Tensor,
    up: Tensor | None,
    ids: Tensor | None,
    n_segments: int,
    before: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """values and positions after one call, on the CPU."""
    device = device_of(backend)
    values, positions = (
        part.to(device, copy=True) for part in before or no_peaks(n_segments, gate.shape[1])
    )
    peaks(
        move(gate, device),  # type: ignore[arg-type]
        move(up, device),
        values=values,
        positions=positions,
        segment_ids=move(ids, device),
        backend=backend,
        **options,
    )
    return values.cpu(), positions.cpu()


def run_merge(
    backend: str,
    best: BestPeaks,
    values: Tensor,
    positions: Tensor,
    numbers: Tensor,
    ids: Tensor | None,
    **options: Any,
) -> BestPeaks:
    """`best` after one call, on the CPU; what is given stays as it is."""
    device = device_of(backend)
    own = best.to(device)
    merge_peaks(
        values.to(device),
        positions.to(device),
        best=own,
        numbers=numbers.to(device),
        group_ids=move(ids, device),
        backend=backend,
        **options,
    )
    return own.to("cpu")


def run_histogram(
    backend: str,
    gate: Tensor,
    up: Tensor | None,
    ids: Tensor | None,
    counts: Tensor,
    exponent: Tensor,
    first: Tensor,
    **options: Any,
) -> Tensor:
    """The counts after one call, on the CPU; what is given stays as it is."""
    device = device_of(backend)
    own = counts.to(device, copy=True)
    histogram(
        move(gate, device),  # type: ignore[arg-type]
        move(up, device),
        counts=own,
        exponent=exponent.to(device),
        first=first.to(device),
        group_ids=move(ids, device),
        backend=backend,
        **options,
    )
    return own.cpu()
