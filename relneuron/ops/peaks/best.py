"""The K largest peaks of every neuron and group: what `merge_peaks` updates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A key of the kernels holds a place in the list in 7 bits.
MOST_KEPT = 128
_SIGN_64, _SIGN_32 = -(2**63), -(2**31)


@dataclass(frozen=True, eq=False, repr=False)
class BestPeaks:
    """The K largest peaks of F neurons for each of G groups, the best one first.

    value     (G, F, K) float32  the peak, -inf where there are fewer than K
    number    (G, F, K) int64    the number of the segment that it is of, -1 where there is none
    position  (G, F, K) int32    where it is in the segment, -1 where there is none

    One peak is before another if its value is larger, or equal and the number of its segment lower,
    or that equal, too, and its position lower. It is a total order, so the same peaks give the same
    bits, whatever order they come in. `a + b` has the K best peaks of both.
    """

    value: Tensor
    number: Tensor
    position: Tensor

    @classmethod
    def none(
        cls, groups: int, width: int, k: int, *, device: torch.device | str | None = None
    ) -> BestPeaks:
        """Of nothing seen yet."""
        if groups < 1 or width < 0 or not 1 <= k <= MOST_KEPT:
            raise ValueError(
                f"BestPeaks: groups must be at least 1, width at least 0 and k in [1, {MOST_KEPT}],"
                f" got groups={groups}, width={width}, k={k}"
            )
        shape = (groups, width, k)
        return cls(
            torch.full(shape, -math.inf, dtype=torch.float32, device=device),
            torch.full(shape, -1, dtype=torch.int64, device=device),
            torch.full(shape, -1, dtype=torch.int32, device=device),
        )

    def to(self, device: torch.device | str) -> BestPeaks:
        """A copy on `device` (always a copy, so the two never share memory)."""
        parts = (self.value, self.number, self.position)
        return BestPeaks(*(part.to(device, copy=True) for part in parts))

    def __repr__(self) -> str:
        groups, width, k = self.value.shape
        device = self.value.device
        return f"BestPeaks(groups={groups}, width={width}, k={k}, device='{device}')"

    def __add__(self, other: BestPeaks) -> BestPeaks:
        if not isinstance(other, BestPeaks):
            return NotImplemented
        if self.value.shape != other.value.shape or self.value.device != other.value.device:
            raise ValueError(
                "BestPeaks: groups, width, k and device must be equal to merge, got "
                f"{tuple(self.value.shape)} on {self.value.device} and "
                f"{tuple(other.value.shape)} on {other.value.device}"
            )
        return best_of(
            torch.cat([self.value, other.value], -1),
            torch.cat([self.number, other.number], -1),
            torch.cat([self.position, other.position], -1),
            self.value.shape[-1],
        )


def best_of(value: Tensor, number: Tensor, position: Tensor, k: int) -> BestPeaks:
    """The k best along the last axis: of its members (*, n) what stands first in the order."""
    order = torch.arange(value.shape[-1], device=value.device).expand(value.shape)
    # Stable sorts, the least important one first. -1 is the largest of the numbers without a sign,
    # and none is behind -inf. Of a value what has the order of its bits, so that subnormal numbers
    # keep theirs under torch.set_flush_denormal.
    keys = (position ^ _SIGN_32, number ^ _SIGN_64, ~ordered_bits(value))
    for key in keys:
        order = order.gather(-1, key.gather(-1, order).sort(dim=-1, stable=True).indices)
    order = order[..., :k]
    return BestPeaks(*(part.gather(-1, order) for part in (value, number, position)))


def ordered_bits(value: Tensor) -> Tensor:
    """int32 in the order of float32 values that are not NaN; -0 is below +0. Its own inverse."""
    bits = value.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
