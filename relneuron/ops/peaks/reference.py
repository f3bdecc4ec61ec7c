"""The plain-torch references of `peaks`, `merge_peaks` and `histogram`.

`op.py` calls them, on any device; tests compare the C++ and Triton kernels with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from relneuron.ops.peaks.best import BestPeaks, best_of, ordered_bits
from relneuron.ops.swiglu_stats.reference import ieee_arithmetic, site_values

# Values at a time: bounds the references' memory at about 100 MB.
_CHUNK = 1 << 21
_LOW = 0xFFFFFFFF


@dataclass(slots=True)
class SiteCall:
    """The inputs of `peaks` and `histogram`, as every backend takes them."""

    gate: Tensor
    up: Tensor | None
    activation: str
    site: str
    ids: Tensor | None  # segment_ids or group_ids; None: all rows are of the first one


@dataclass(slots=True)
class PeaksCall(SiteCall):
    """One checked call of `peaks`."""

    values: Tensor
    positions: Tensor
    first_row: int


@dataclass(slots=True)
class HistogramCall(SiteCall):
    """One checked call of `histogram`."""

    counts: Tensor
    exponent: Tensor
    first: Tensor


@dataclass(slots=True)
class MergeCall:
    """One checked call of `merge_peaks`."""

    best: BestPeaks
    values: Tensor
    positions: Tensor
    group_ids: Tensor | None
    numbers: Tensor


def _by_rows(call: SiteCall) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, values (t, F) float32 without -0, ids (t,) int64) of a few rows at a time."""
    n_rows, width = call.gate.shape
    step = max(1, _CHUNK // max(1, width))
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        up = None if call.up is None else call.up[rows]
        value = site_values(call.gate[rows], up, call.activation, (call.site,))[call.site] + 0.0
        ids = torch.zeros(len(value), dtype=torch.int64, device=value.device)
        if call.ids is not None:
            ids = call.ids[rows].long()
        yield start, value, ids


def keys_of(values: Tensor, positions: Tensor) -> Tensor:
    """int64 in the order of peaks: the larger value, then the lower position; -1 is last."""
    return (ordered_bits(values).long() << 32) | (~positions.long() & _LOW)


def peaks_reference(call: PeaksCall) -> None:
    """`peaks` in plain torch: a peak is the largest key of its segment."""
    best = keys_of(call.values, call.positions)
    device = best.device
    nothing = BestPeaks.none(1, 1, 1, device=device)
    none = keys_of(nothing.value, nothing.position).view(())
    with ieee_arithmetic():
        for start, value, ids in _by_rows(call):
            rows = torch.arange(start, start + len(value), device=device) + call.first_row
            keys = keys_of(value, rows[:, None]).where(~value.isnan(), none)
            kept = ids >= 0
            where = ids[kept, None].expand(-1, value.shape[1])
            best.scatter_reduce_(0, where, keys[kept], reduce="amax", include_self=True)
    bits = ordered_bits((best >> 32).int().view(torch.float32))
    call.values.copy_(bits.view(torch.float32))
    call.positions.copy_(~best.int())


def merge_peaks_reference(call: MergeCall) -> None:
    """`merge_peaks` in plain torch: the old and the new peaks of a group sorted by the order."""
    best, k = call.best, call.best.value.shape[-1]
    is_peak = (call.positions >= 0) & ~call.values.isnan()
    with ieee_arithmetic():
        values = torch.where(is_peak, call.values + 0.0, -math.inf)
    positions = torch.where(is_peak, call.positions, -1)
    numbers = torch.where(is_peak, call.numbers[:, None], -1)
    for group in range(best.value.shape[0]):
        rows = slice(None) if call.group_ids is None else call.group_ids == group
        own = best_of(
            torch.cat([best.value[group], values[rows].T], -1),
            torch.cat([best.number[group], numbers[rows].T], -1),
            torch.cat([best.position[group], positions[rows].T], -1),
            k,
        )
        best.value[group] = own.value
        best.number[group] = own.number
        best.position[group] = own.position


def histogram_reference(call: HistogramCall) -> None:
    """`histogram` in plain torch, in float64, where all of it is exact."""
    _, width, bins = call.counts.shape
    steps = ((1023 - call.exponent.long()) << 52).view(torch.float64)  # 2^-exponent
    neuron = torch.arange(width, device=call.gate.device)
    with ieee_arithmetic():
        for _, value, ids in _by_rows(call):
            place = torch.floor(value.double() * steps) - call.first
            place = place.clamp(0, bins - 1).nan_to_num().long()
            cell = (ids[:, None] * width + neuron) * bins + place
            cell = cell[(ids >= 0)[:, None] & ~value.isnan()]
            call.counts.view(-1).index_add_(0, cell, torch.ones_like(cell))
