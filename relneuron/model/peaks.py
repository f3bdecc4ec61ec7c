"""What a patch keeps of values beside its counts: the largest ones of windows, and histograms.

`states.py` calls `look` where it counts; the corpus pass makes `Looked` and reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
        """Room for G groups; `edges` are exponent and first of each site of a histogram."""
        found, device = cls(), device_of(part.module)
        for site in sites:
            width = part.hidden if site == "down" else part.width
            if asked.k is not None:
                found.best[site] = ops.BestPeaks.none(groups, width, asked.k, device=device)
            if asked.bins is not None:
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
            parts = (best.value, best.number, best.position)
            found |= {f"{name}.{site}": part for name, part in zip(BEST, parts, strict=True)}
        for site, bins in self.bins.items():
            edges = (edge.expand(len(bins.counts), -1) for edge in (bins.exponent, bins.first))
            parts = (bins.counts, *edges)
            found |= {f"{name}.{site}": part for name, part in zip(BINS, parts, strict=True)}
        return found

    def fill(self, name: str, table: Tensor) -> None:
        """Write a table of `tables`; the edges are as they were made."""
        if name.partition(".")[0] not in BINS[1:]:
            self.tables()[name].copy_(table)


def check_can_look(parts: Sequence[Part], asked: Asked) -> None:
    """Refuse histograms of experts, whose bins would be those of each expert."""
    if asked.bins is not None and any(isinstance(part, Experts) for part in parts):
        raise RelneuronError(
            "--histogram: the neurons of a mixture of experts have none",
            "leave out --histogram; --examples works with experts",
            2,
        )


def look(
    part: Part,
    values: Mapping[str, Tensor],
    looked: Looked,
    segments: Segments,
    group_ids: Tensor,
    backend: str,
) -> None:
    """Take what is kept of a forward.

    `values` are gate and up (T, F), or where a site is not made of them by a formula that the
    kernels know, the sites themselves; `group_ids` (T,) int32.
    """
    for site in looked.sites:
        if site == "down" if "down" not in values else site != "down":
            continue
        own = _of_site(part, values, site)
        if site in looked.ranges:
            _widen(looked, site, own, group_ids)
        if site in looked.best:
            _keep_best(part, looked.best[site], own, segments, backend)
        if site in looked.bins:
            bins = looked.bins[site]
            ops.histogram(
                **own,
                counts=bins.counts,
                exponent=bins.exponent,
                first=bins.first,
                group_ids=group_ids,
                ids_checked=True,
                backend=backend,
            )


def _of_site(part: Part, values: Mapping[str, Tensor], site: str) -> dict[str, object]:
    """What the ops are given of a site: values at hand are taken as they are, as a gate."""
    if site == "down" or not {"act", "product"}.isdisjoint(values):
        return {"gate": values[site].contiguous(), "site": "gate"}
    found: dict[str, object] = {"gate": values["gate"], "site": site}
    found["activation"] = part.activation or "silu"
    return found if site in ("gate", "act") else found | {"up": values["up"]}


def _keep_best(
    part: Part, best: ops.BestPeaks, own: Mapping[str, object], segments: Segments, backend: str
) -> None:
    gate, experts = own["gate"], isinstance(part, Experts) and segments.token is not None
    assert isinstance(gate, Tensor)
    n, width = len(segments.numbers), gate.shape[1]
    n_rows = n * part.n_experts if experts else n
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
    if experts:
        # A row of an expert is a token; those of each are in the order of the tokens.
        token = torch.cat([segments.token, segments.token.new_full((1,), -1)]).int()
        peak, position = part.unfold(peak), part.unfold(token[position.long()])
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


def _widen(looked: Looked, site: str, own: Mapping[str, object], group_ids: Tensor) -> None:
    """The range with that of the tokens that are counted."""
    rows = group_ids >= 0
    kept = {k: v[rows] if isinstance(v, Tensor) else v for k, v in own.items()}
    smallest, largest = ops.site_range(**kept)
    low, high = looked.ranges[site]
    looked.ranges[site] = torch.minimum(low, smallest), torch.maximum(high, largest)
