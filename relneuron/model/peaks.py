"""What a patch keeps of values beside its counts: the largest ones of windows, and histograms.

`states.py` calls `look` where it counts; the corpus pass makes `Looked` and reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron import ops
from relneuron.artifact.files import RelneuronError
from relneuron.model.layers import device_of
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.shape import Part

# Names of the tables, each followed by .SITE, in the order of ops.BestPeaks and of Bins.
BEST = ("peak", "window", "position")
BINS = ("bin", "exponent", "first")
# What a table is made of, and what stands where nothing was seen.
TABLES: dict[str, tuple[Any, float]] = {
    "peak": (np.float32, -np.inf),
    "window": (np.int64, -1),
    "position": (np.int32, -1),
    "bin": (np.int64, 0),
    "exponent": (np.int32, -(2**31)),
    "first": (np.int32, -(2**31)),
}

_ROWS = 64  # tokens of a sample whose range is taken at a time


@dataclass(frozen=True)
class Asked:
    """What is kept: the `k` largest peaks of each neuron and group, histograms of `bins` bins."""

    k: int | None = None
    bins: int | None = None


@dataclass(frozen=True)
class Segments:
    """The S windows of a forward, whose rows lie one behind the other.

    ids      (B, T) int32: the window of each token, -1 = of none, as padding
    numbers  (S,) int64: what each is called among those of its group
    groups   (S,) int32
    starts   (S,) int32: the first token of each among the B * T
    token    (R,) int64 of experts, whose rows are pairs: the token of each; S is then E times as
             many for `ids`, those of expert e at e * S
    """

    ids: Tensor
    numbers: Tensor
    groups: Tensor
    starts: Tensor
    token: Tensor | None = None

    def on(self, device: torch.device) -> Segments:
        found = (part.to(device) for part in (self.ids, self.numbers, self.groups, self.starts))
        return Segments(*found)

    def group_ids(self) -> Tensor:
        """(B * T,) int32: the group of each token, -1 = of none."""
        # -1 is the last one.
        return torch.nn.functional.pad(self.groups, (0, 1), value=-1)[self.ids.reshape(-1).long()]


@dataclass(frozen=True)
class Bins:
    """Counts (G, F, B) int64 of a site's values; exponent and first (F,) int32, as ops.histogram's.

    The edges are those of all groups.
    """

    counts: Tensor
    exponent: Tensor
    first: Tensor


@dataclass
class Looked:
    """What was kept of a part of a layer, by site.

    ranges  of a first sample, in place of all else: the smallest and the largest value (F,) float32
    """

    best: dict[str, ops.BestPeaks] = field(default_factory=dict)
    bins: dict[str, Bins] = field(default_factory=dict)
    ranges: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def sites(self) -> list[str]:
        return [*dict.fromkeys((*self.best, *self.bins, *self.ranges))]

    @classmethod
    def nothing(
        cls,
        part: Part,
        groups: int,
        sites: Sequence[str],
        asked: Asked,
        edges: Mapping[str, tuple[Tensor, Tensor]],
    ) -> Looked:
        """Room for G groups; `edges` are exponent and first of the histograms, once known."""
        found, device = cls(), device_of(part.module)
        for site in sites:
            width = part.hidden if site == "down" else part.width
            if asked.k is not None:
                found.best[site] = ops.BestPeaks.none(groups, width, asked.k, device=device)
            if asked.bins is not None and site in edges:
                size = (groups, width, asked.bins)
                counts = torch.zeros(size, dtype=torch.int64, device=device)
                found.bins[site] = Bins(counts, *(edge.to(device) for edge in edges[site]))
        return found

    @classmethod
    def sample(cls, part: Part, sites: Sequence[str]) -> Looked:
        """Takes the range of values only."""
        found, device = cls(), device_of(part.module)
        for site in sites:
            width = part.hidden if site == "down" else part.width
            most = torch.full((width,), torch.inf, device=device)
            found.ranges[site] = (most, -most)
        return found

    def tables(self) -> dict[str, Tensor]:
        """All that was kept of G groups: `peak.act` (G, F, K), `bin.act` (G, F, B) and so on."""
        found = {}
        for site, best in self.best.items():
            for name, part in zip(BEST, (best.value, best.number, best.position), strict=True):
                found[f"{name}.{site}"] = part
        for site, bins in self.bins.items():
            edges = [edge.expand(len(bins.counts), -1) for edge in (bins.exponent, bins.first)]
            for name, part in zip(BINS, (bins.counts, *edges), strict=True):
                found[f"{name}.{site}"] = part
        return found

    def fill(self, name: str, table: Tensor) -> None:
        """Write a table of `tables`; the edges are as they were made."""
        if name.partition(".")[0] not in BINS[1:]:
            self.tables()[name].copy_(table)


def bytes_a_group(parts: Sequence[Part], sites: Sequence[str], asked: Asked) -> int:
    """What is kept of a group of tokens, on all devices together, as `Looked.nothing` makes it."""
    return beside_bytes(n_neurons(parts, sites), asked)


def beside_bytes(n: int, asked: Asked) -> int:
    """Likewise of so many neurons."""
    sizes = {name: np.dtype(kind).itemsize for name, (kind, _) in TABLES.items()}
    each = (asked.k or 0) * sum(sizes[name] for name in BEST) + (asked.bins or 0) * sizes["bin"]
    return int(n * each)


def n_neurons(parts: Sequence[Part], sites: Sequence[str]) -> int:
    """How many of them there are at all sites together."""
    return sum(part.hidden if s == "down" else part.width for part in parts for s in sites)


def check_can_look(parts: Sequence[Part], asked: Asked) -> None:
    """Refuse histograms of experts, whose bins would be those of each expert."""
    if asked.bins is not None and any(isinstance(part, Experts) for part in parts):
        raise RelneuronError(
            "--histogram: the neurons of a mixture of experts have none",
            "leave out --histogram; --examples works with experts",
            2,
        )


def look(
    part: Part | None,
    values: Mapping[str, Tensor],
    looked: Looked | None,
    segments: Segments | None,
    backend: str,
) -> None:
    """Take what is kept of a forward, if there are windows of a corpus.

    `values` are gate and up (T, F), or where a site is not made of them by a formula that the
    kernels know, the sites themselves, or `down` alone, without a part.
    """
    if looked is None or segments is None:
        return
    values = {site: x.detach() for site, x in values.items()}
    for site in looked.sites:
        if (site == "down") != ("down" in values):
            continue
        own = _of_site(part, values, site)
        if site in looked.ranges:
            _widen(looked, site, own, segments)
        if site in looked.best:
            _keep_best(part, looked.best[site], own, segments, backend)
        if site in looked.bins:
            bins = looked.bins[site]
            ops.histogram(
                **own,
                counts=bins.counts,
                exponent=bins.exponent,
                first=bins.first,
                group_ids=segments.group_ids(),
                ids_checked=True,
                backend=backend,
            )


def _of_site(part: Part | None, values: Mapping[str, Tensor], site: str) -> dict[str, Any]:
    """What the ops are given of a site: values at hand are taken as they are, as a gate."""
    if part is None or not {"act", "product"}.isdisjoint(values):
        return {"gate": values[site].contiguous(), "site": "gate"}
    found: dict[str, Any] = {"gate": values["gate"], "site": site}
    found["activation"] = part.activation or "silu"
    return found if site in ("gate", "act") else found | {"up": values["up"]}


def _keep_best(
    part: Part | None,
    best: ops.BestPeaks,
    own: Mapping[str, Any],
    segments: Segments,
    backend: str,
) -> None:
    gate, experts = own["gate"], part if isinstance(part, Experts) else None
    n_rows, width = len(segments.numbers), gate.shape[1]
    n_rows *= 1 if experts is None else experts.n_experts
    peak = gate.new_full((n_rows, width), -torch.inf, dtype=torch.float32)
    position = gate.new_full((n_rows, width), -1, dtype=torch.int32)
    ops.peaks(
        **own,
        values=peak,
        positions=position,
        segment_ids=segments.ids.reshape(-1),
        ids_checked=True,
        backend=backend,
    )
    if experts is not None and segments.token is not None:
        # Its rows are pairs, those of each expert in the order of the tokens; -1 is of none.
        token = torch.nn.functional.pad(segments.token, (0, 1), value=-1).int()
        peak, position = experts.unfold(peak), experts.unfold(token[position.long()])
    # Where there is no peak the position stays negative.
    position -= segments.starts[:, None]
    ops.merge_peaks(
        peak,
        position,
        best=best,
        numbers=segments.numbers,
        group_ids=segments.groups,
        ids_checked=True,
        backend=backend,
    )


def _widen(looked: Looked, site: str, own: Mapping[str, Any], segments: Segments) -> None:
    """The range with that of the tokens that are counted."""
    low, high = looked.ranges[site]
    # A part at a time: plain torch copies it several times.
    counted = (segments.ids.reshape(-1) >= 0).nonzero().squeeze(1)
    for rows in torch.split(counted, _ROWS):
        taken: dict[str, Any] = {k: v[rows] if isinstance(v, Tensor) else v for k, v in own.items()}
        smallest, largest = ops.site_range(**taken)
        low, high = torch.minimum(low, smallest), torch.maximum(high, largest)
    looked.ranges[site] = low, high
