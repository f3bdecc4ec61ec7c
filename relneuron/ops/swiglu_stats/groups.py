"""The statistics that `swiglu_stats` updates: counts and moments per group of tokens and neuron.

Recording and merging of results both use it; the op itself is in `op.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from relneuron.ops.tensors import check_tensors

# The order is the code of a site in the C++ and Triton kernels.
SITES = ("gate", "up", "act", "product")
# The site of `residual_stats`.
DOWN = "down"
# Those of `pair_stats`.
PAIR_SITES = ("a", "b", "difference")


class GroupStats:
    """Statistics of `width` neurons for each of `groups` groups of tokens, at some sites.

    groups     G, the number of groups (relations)
    width      F, the number of neurons
    sites      which of gate, up, act, product (see `swiglu_stats`) are recorded, or down (see
               `residual_stats`), or which of a, b, difference (see `pair_stats`)
    threshold  a value v at a site is active when v > threshold, compared exactly
    moments    also record sums, sums of squares, maxima and the number of non-finite values

    tokens             (G,) int64    tokens seen per group
    count[site]        (G, F) int64  of those, the active ones; NaN is never active, +inf always is
    sum[site]          (G, F) float64  the sum of the finite values
    sum_sq[site]       (G, F) float64  the sum of their squares
    max[site]          (G, F) float32  the largest finite value, -inf where there was none; -0 is
                                       recorded as +0
    n_nonfinite[site]  (G, F) int64  values that are NaN or infinite

    The last four are empty dicts without `moments`. `a + b` is the statistics of both inputs
    together; counts, tokens and maxima of a merge are exact, sums are rounded in float64.
    """

    def __init__(
        self,
        *,
        groups: int,
        width: int,
        sites: Sequence[str] = ("act",),
        threshold: float = 0.0,
        moments: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        if groups < 1:
            raise ValueError(f"GroupStats: groups must be at least 1, got {groups}")
        if width < 0:
            raise ValueError(f"GroupStats: width must be at least 0, got {width}")
        if isinstance(sites, str):
            raise TypeError(f"GroupStats: sites must be a sequence such as ({sites!r},), got str")
        sites = tuple(sites)
        known = (*SITES, DOWN, *PAIR_SITES)
        if not sites or len(set(sites)) != len(sites) or not set(sites) <= set(known):
            raise ValueError(
                f"GroupStats: sites must be one or more distinct names of {known}, got {sites}"
            )
        threshold = float(threshold)
        if math.isnan(threshold):
            raise ValueError("GroupStats: threshold must be a number, got nan")
        self.groups = groups
        self.width = width
        self.sites = sites
        self.threshold = threshold
        self.moments = moments
        self._threshold_bits = threshold_bits(threshold)
        self._made = (groups, width, sites, threshold, moments)
        shape = (len(sites), groups, width)
        self.tokens = torch.zeros(groups, dtype=torch.int64, device=device)
        # One tensor per statistic with a leading site axis, so that an op has few arguments.
        self._count = torch.zeros(shape, dtype=torch.int64, device=device)
        self._sum: Tensor | None = None
        self._sum_sq: Tensor | None = None
        self._max: Tensor | None = None
        self._n_nonfinite: Tensor | None = None
        if moments:
            self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
            self._sum_sq = torch.zeros(shape, dtype=torch.float64, device=device)
            self._max = torch.full(shape, -math.inf, dtype=torch.float32, device=device)
            self._n_nonfinite = torch.zeros(shape, dtype=torch.int64, device=device)
        # Of every attribute that is a tensor: an op may write into no other one.
        self._layout = {
            name: (tensor.shape, tensor.dtype)
            for name, tensor in vars(self).items()
            if isinstance(tensor, Tensor)
        }

    def _by_site(self, stacked: Tensor | None) -> dict[str, Tensor]:
        return {} if stacked is None else {s: stacked[i] for i, s in enumerate(self.sites)}

    @property
    def count(self) -> dict[str, Tensor]:
        """Views per site (G, F) int64; writing into one writes into the statistics."""
        return self._by_site(self._count)

    @property
    def sum(self) -> dict[str, Tensor]:
        """Views per site (G, F) float64."""
        return self._by_site(self._sum)

    @property
    def sum_sq(self) -> dict[str, Tensor]:
        """Views per site (G, F) float64."""
        return self._by_site(self._sum_sq)

    @property
    def max(self) -> dict[str, Tensor]:
        """Views per site (G, F) float32."""
        return self._by_site(self._max)

    @property
    def n_nonfinite(self) -> dict[str, Tensor]:
        """Views per site (G, F) int64."""
        return self._by_site(self._n_nonfinite)

    @property
    def device(self) -> torch.device:
        """Where all the tensors are."""
        return self.tokens.device

    def tensors(self, op: str) -> dict[str, Tensor]:
        """tokens, count, ... for `op` to write into, those by site as (sites, G, F).

        Raises ValueError where anything is not as it was made: a kernel that trusted it would write
        beside the memory, or count by a threshold that no one reads.
        """
        self.check_fields(op)
        found = {name.strip("_"): getattr(self, name) for name in self._layout}
        check_tensors(op, {f"stats.{name}": tensor for name, tensor in found.items()})
        for attribute, (shape, dtype) in self._layout.items():
            name = attribute.strip("_")
            tensor = found[name]
            is_as_made = tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
            if not is_as_made or tensor.device != self.device:
                raise ValueError(
                    f"{op}: stats.{name} must be contiguous {tuple(shape)} {dtype} as it was made, "
                    f"on {self.device} (from stats.tokens), got {tuple(tensor.shape)} "
                    f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}; "
                    "make another GroupStats"
                )
        return found

    def check_fields(self, op: str) -> None:
        """What of `tensors` is about fields that are no tensors."""
        if not self._has_own_fields():
            now = (self.groups, self.width, self.sites, self.threshold, self.moments)
            raise ValueError(
                f"{op}: stats must have groups, width, sites, threshold and moments as it was made "
                f"with, {self._made}, got {now}; make another GroupStats"
            )

    def _has_own_fields(self) -> bool:
        now = (self.groups, self.width, self.sites, self.threshold, self.moments)
        return now == self._made

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """Of `tensors` those that the op takes, unchecked, in its order."""
        moments = (self._sum, self._sum_sq, self._max, self._n_nonfinite)
        return (self._count, self.tokens, *moments)

    def _like(self, device: torch.device | str) -> GroupStats:
        return GroupStats(
            groups=self.groups,
            width=self.width,
            sites=self.sites,
            threshold=self.threshold,
            moments=self.moments,
            device=device,
        )

    def to(self, device: torch.device | str) -> GroupStats:
        """A copy on `device` (always a copy, so the two never share memory)."""
        other = self._like(device)
        targets = other.tensors("GroupStats")
        for name, source in self.tensors("GroupStats").items():
            targets[name].copy_(source)
        return other

    def __add__(self, other: GroupStats) -> GroupStats:
        if not isinstance(other, GroupStats):
            return NotImplemented
        for name in ("groups", "width", "sites", "threshold", "moments", "device"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(
                    f"GroupStats: {name} must be equal to merge, got {mine} and {theirs}"
                )
        merged = self.to(self.device)
        targets = merged.tensors("GroupStats")
        for name, source in other.tensors("GroupStats").items():
            if name == "max":
                torch.maximum(targets[name], source, out=targets[name])
            else:
                targets[name] += source
        return merged

    def __repr__(self) -> str:
        return (
            f"GroupStats(groups={self.groups}, width={self.width}, sites={self.sites}, "
            f"threshold={self.threshold}, moments={self.moments}, device='{self.device}')"
        )


def threshold_bits(threshold: float) -> int:
    """The bit pattern (as a signed int32) of the largest float32 that is <= threshold.

    For a float32 v, `v > threshold` in the reals is then exactly `v > that float32`. Written in
    integers, so that a flush-to-zero mode of the processor cannot change it.
    """
    largest = 0x7F7FFFFF  # bits of the largest finite float32, (2 - 2^-23) * 2^127
    if threshold == 0.0 or math.isinf(threshold):
        bits, negative = (0 if threshold == 0.0 else 0x7F800000), threshold < 0
    else:
        mantissa, exponent = math.frexp(abs(threshold))
        quantum = max(exponent - 24, -149)  # spacing of float32 around |threshold|
        # |threshold| = whole * 2^(exponent - 53) with an integer `whole`.
        whole, shift = int(math.ldexp(mantissa, 53)), quantum - (exponent - 53)
        negative = threshold < 0
        steps = -(-whole >> shift) if negative else whole >> shift
        # Spacings count up from zero in the same order as bit patterns do.
        bits = steps + ((quantum + 149) << 23)
        bits = min(bits, 0x7F800000 if negative else largest)
    return bits - (1 << 31) if negative else bits
