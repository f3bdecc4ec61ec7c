"""histogram.safetensors: how the values of each neuron are spread in each group, in fixed bins.

`count --histogram` writes it, `merge` adds several. Quantiles, the separation of groups and rates
above a threshold follow from it, each between two bounds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relneuron.artifact.counts import SITES
from relneuron.artifact.dense import safetensors_pieces
from relneuron.artifact.files import RelneuronError, atomic_write
from relneuron.artifact.neurons import Neuron
from relneuron.artifact.reading import Tensors, open_tensors

NAME = "histogram.safetensors"
ABOUT = "relneuron.histogram"
MADE_BY = "count MODEL GROUP=TEXT... -o DIR --histogram 64"

Array = np.ndarray[Any, Any]


class Bounds(NamedTuple):
    """What a histogram tells of a number: it is at least `low` and at most `high`."""

    low: Array
    high: Array


@dataclass(frozen=True)
class Histogram:
    """How many values of each neuron fall into each of B bins, by group.

    Bin b of a neuron begins at (first + b) * 2^exponent, which float32 holds exactly, and ends
    where the next one begins; bin 0 also has all that is below, bin `last` all that is above.
    What is not a number is in no bin.

    groups    G names
    count     by site, (G, L, F, B) int64; F is D at site down
    exponent  by site, (L, F) int32
    first     by site, (L, F) int32
    last      by site, (L, F) int32: B - 1 as counted, less where different bins were added
    """

    groups: list[str]
    count: dict[str, Array]
    exponent: dict[str, Array]
    first: dict[str, Array]
    last: dict[str, Array]

    @property
    def sites(self) -> list[str]:
        return [site for site in SITES if site in self.count]

    def edges(self, site: str) -> Array:
        """(L, F, B + 1) float64, where the bins begin and end; the outer ones at infinity."""
        bins = np.arange(self.count[site].shape[-1] + 1)
        places = self.first[site][..., None].astype(np.float64) + bins
        found: Array = np.ldexp(places, self.exponent[site][..., None])
        found[bins > self.last[site][..., None]] = np.inf
        found[..., 0] = -np.inf
        return found

    def quantile(self, site: str, q: float, group: str | None = None) -> Bounds:
        """Bounds (L, F) float64 of the smallest value that a share q of the values is at most.

        That is the ceil(q * n)-th smallest of n (inverted_cdf of numpy.quantile). Of all groups
        together, or of one. NaN where there is no value.
        """
        if not 0 <= q <= 1:
            raise RelneuronError(f"a quantile of {q}", "give a number from 0 to 1", 2)
        sums = self._of(site, group).cumsum(-1)
        n = sums[..., -1:]
        wanted = np.maximum(np.ceil(q * n), 1)
        place = (sums < wanted).sum(-1, keepdims=True).clip(max=sums.shape[-1] - 1)
        edges = self.edges(site)
        low, high = (np.take_along_axis(edges, place + i, -1)[..., 0] for i in (0, 1))
        return Bounds(*(np.where(n[..., 0] > 0, bound, np.nan) for bound in (low, high)))

    def auroc(self, site: str, group: str) -> Bounds:
        """Bounds (L, F) float64 of how well a neuron separates a group from all others.

        The area under the ROC curve: the chance that a value of the group is above a value of the
        others, where equal ones count one half. NaN where there is none of either.
        """
        # As float64: the product of two counts may be above 2^63.
        own = self._of(site, group).astype(np.float64)
        others = self._of(site, None) - own
        below = others.cumsum(-1) - others
        pairs = own.sum(-1) * others.sum(-1)
        with np.errstate(invalid="ignore"):
            low = (own * below).sum(-1) / pairs
            high = low + (own * others).sum(-1) / pairs
        return Bounds(low, high)

    def rate_above(self, site: str, threshold: float, group: str | None = None) -> Bounds:
        """Bounds (L, F) float64 of the share of values above a threshold.

        They are equal where no value is in the threshold's bin.
        """
        count, edges = self._of(site, group), self.edges(site)
        with np.errstate(invalid="ignore"):
            n = count.sum(-1)
            low = (count * (edges[..., :-1] > threshold)).sum(-1) / n
            high = (count * (edges[..., 1:] > threshold)).sum(-1) / n
        return Bounds(low, high)

    def _of(self, site: str, group: str | None) -> Array:
        """(L, F, B) of a group, or of all."""
        if site not in self.count:
            raise RelneuronError(
                f"the histogram has no site {site!r}", f"it has {', '.join(self.sites)}", 2
            )
        if group is not None and group not in self.groups:
            raise RelneuronError(
                f"the histogram has no group {group!r}", f"it has {', '.join(self.groups)}", 2
            )
        count = self.count[site]
        found: Array = count.sum(0) if group is None else count[self.groups.index(group)]
        return found

    def __add__(self, other: Histogram) -> Histogram:
        """The values of both; groups match by their names.

        Where the bins differ those of the sum are as fine as can be told exactly: it keeps the
        edges that both have.
        """
        if (self.sites, self.n_bins) != (other.sites, other.n_bins):
            raise RelneuronError(
                f"histograms: {self.n_bins} bins at {self.sites} and {other.n_bins} at "
                f"{other.sites}",
                "count with the same --sites and --histogram",
            )
        groups = [*self.groups, *(name for name in other.groups if name not in self.groups)]
        count, tables = {}, {}
        for site in self.sites:
            tables[site] = _common(self, other, site)
            sums = np.zeros((len(groups), *self.count[site].shape[1:]), np.int64)
            for one in (self, other):
                rows = [groups.index(name) for name in one.groups]
                sums[rows] += one._in_bins(site, *tables[site])
            count[site] = sums
        exponent, first, last = ({s: t[i] for s, t in tables.items()} for i in range(3))
        return Histogram(groups, count, exponent, first, last)

    @property
    def n_bins(self) -> int:
        return int(next(iter(self.count.values())).shape[-1])

    def _in_bins(self, site: str, exponent: Array, first: Array, last: Array) -> Array:
        """The counts in other bins, whose edges are all among the own ones."""
        count = self.count[site]
        if np.array_equal(exponent, self.exponent[site]) and np.array_equal(last, self.last[site]):
            return count  # with all edges of the own ones they are the own ones
        found = np.zeros_like(count)
        for b in range(self.n_bins):
            place = (self.first[site].astype(np.int64) + b) >> (exponent - self.exponent[site])
            into = np.broadcast_to((place - first).clip(0, last)[..., None], (*count.shape[:-1], 1))
            sums = np.take_along_axis(found, into, -1) + count[..., b : b + 1]
            np.put_along_axis(found, into, sums, -1)
        return found

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        return b"".join(self._pieces())

    def _pieces(self) -> Iterator[bytes | memoryview]:
        tables = {"count": self.count, "exponent": self.exponent}
        tables |= {"first": self.first, "last": self.last}
        tensors = {
            f"{kind}.{site}": array
            for kind, of_sites in tables.items()
            for site, array in of_sites.items()
        }
        text = json.dumps({"groups": self.groups}, ensure_ascii=False)
        return safetensors_pieces(tensors, {ABOUT: text})

    def write(self, path: Path) -> None:
        atomic_write(path, self._pieces())

    @classmethod
    def read(cls, path: Path, neuron: Neuron | None = None) -> Histogram:
        """All of a file, or one neuron (layer, site, index) of it, then with L = F = 1."""
        with open_tensors(path, MADE_BY, what="file of a histogram") as file:
            groups, sites, size = form_of(file, ABOUT, "count", "I64")
            place: tuple[slice, ...] | None = None
            if neuron is not None:
                check_place(path, neuron, {site: size[site][1:3] for site in sites})
                layer, only, index = neuron
                sites = [only]
                place = (slice(layer, layer + 1), slice(index, index + 1))
            count: dict[str, Array] = {}
            tables: dict[str, dict[str, Array]] = {name: {} for name in _TABLES}
            for site in sites:
                rows = None if place is None else (slice(None), *place)
                count[site] = file.get(f"count.{site}", size[site], "I64", rows=rows)
                for name, found in tables.items():
                    found[site] = file.get(f"{name}.{site}", size[site][1:3], "I32", rows=place)
                last = tables["last"][site]
                beyond = np.arange(size[site][3]) > last[..., None]
                if (count[site] < 0).any() or (count[site] * beyond).any() or (last < 0).any():
                    raise file.wrong(f"count.{site} is below 0, or has values behind its last bin")
        return cls([str(name) for name in groups], count, **tables)


_TABLES = ("exponent", "first", "last")


def _common(one: Histogram, other: Histogram, site: str) -> tuple[Array, Array, Array]:
    """exponent, first and last of the bins whose edges both have."""
    exponent = np.maximum(one.exponent[site], other.exponent[site])
    low, high = [], []
    for each in (one, other):
        shift = exponent - each.exponent[site]
        first = each.first[site].astype(np.int64)
        low.append(-(-(first + 1) >> shift))  # rounded up
        high.append((first + each.last[site]) >> shift)
    first, last = np.maximum(*low), np.minimum(*high)
    n_edges = (last - first + 1).clip(0)
    begin = np.where(n_edges > 0, first - 1, 0)
    return exponent, begin.astype(np.int32), n_edges.astype(np.int32)


def form_of(
    file: Tensors, about: str, statistic: str, dtype: str
) -> tuple[list[str], list[str], dict[str, tuple[int, ...]]]:
    """The groups, the sites and the shape (G, L, F, .) by site of `statistic` in an open file.

    `about` is the key of the metadata that name the groups.
    """
    said = file.about(about)
    groups = said.get("groups") if isinstance(said, dict) else None
    if not isinstance(groups, list) or len(set(map(str, groups))) < len(groups):
        raise file.wrong("it has no groups")
    sites = [site for site in SITES if f"{statistic}.{site}" in file.names]
    if not sites:
        raise file.wrong(f"it has no {statistic}")
    shape = (len(groups), None, None, None)
    size = {site: file.shape(f"{statistic}.{site}", shape, dtype) for site in sites}
    return [str(name) for name in groups], sites, size


def check_place(path: Path, neuron: Neuron, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a neuron that a file does not have; `sizes` are (L, F) by site."""
    layer, site, index = neuron
    size = sizes.get(site, (0, 0))
    if not (0 <= layer < size[0] and 0 <= index < size[1]):
        raise RelneuronError(
            f"{path} has no neuron {index} at {site} of layer {layer}",
            "it has " + ", ".join(f"{n} layers of {f} at {s}" for s, (n, f) in sizes.items()),
            2,
        )
