"""What a count keeps beside its counters: examples with their windows, and histograms.

`count` asks here before it begins, and for the files at its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact import examples, histogram
from relneuron.artifact.counts import Counts
from relneuron.artifact.examples import Examples, Windows, used
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.histogram import Histogram
from relneuron.artifact.journal import progress_bar
from relneuron.model.mlps.shape import Part
from relneuron.model.peaks import BEST, TABLES, Asked, bytes_a_group, n_neurons
from relneuron.texts.feed import Feed
from relneuron.texts.options import CountOptions
from relneuron.texts.sources import Source

Array = np.ndarray[Any, Any]

_AT_ONCE = 256  # windows that are taken from a feed


def asked_of(options: CountOptions) -> Asked:
    """What is kept beside counts."""
    return Asked(options.examples, options.histogram)


def check_twice(sources: Sequence[Source], asked: Asked) -> None:
    """Refuse sources that can be read once only: what is kept of them needs their begin again."""
    for source in sources if asked != Asked() else ():
        if source.dataset is not None and iter(source.dataset) is source.dataset:
            raise RelneuronError(
                f"{source.name} can be read once only, and --examples and --histogram read its "
                "texts a second time",
                "give a list, a data set or files, or leave them out",
            )


def needed(parts: Sequence[Part], sources: Sequence[Source], options: CountOptions) -> str:
    """What the examples and histograms of a count take, in words."""
    asked = asked_of(options)
    n_bytes = bytes_a_group(parts, options.sites, asked)
    each = 12 * (asked.k or 0) + 8 * (asked.bins or 0)  # a window's place takes 4 there
    on_disk = n_neurons(parts, options.sites) * each
    names = [name for s in sources for name in (s.groups or () if s.group is None else (s.group,))]
    is_known = all(source.groups or source.group for source in sources)
    n, of = (len(names), ", ".join(names)) if is_known else (1, "each group")
    windows = ", and 4 for each token of the examples' windows" if asked.k else ""
    return (
        f"to keep of {of}: {n * n_bytes:,} bytes with the model, as many in memory while they are "
        f"saved, and in a checkpoint; {n * on_disk:,} on the disk{windows}"
    )


@dataclass(frozen=True)
class Kept:
    """The files of a count beside its counts."""

    examples: Examples | None = None
    histogram: Histogram | None = None

    def write(self, folder: Path) -> list[Path]:
        """Write what there is; what an earlier count left is removed."""
        paths = []
        files = {examples.NAME: self.examples, histogram.NAME: self.histogram}
        for name, found in files.items():
            if found is None:
                (folder / name).unlink(missing_ok=True)
            else:
                found.write(folder / name)
                paths.append(folder / name)
        return paths

    def lines(self, folder: Path) -> Iterator[str]:
        """What was written, for the terminal."""
        if self.examples is not None:
            windows = self.examples.windows
            yield (
                f"-> {folder / examples.NAME}: {self.examples.k} of each neuron and group, in "
                f"{len(windows):,} windows of {len(windows.ids):,} tokens"
            )
        if self.histogram is not None:
            yield f"-> {folder / histogram.NAME}: {self.histogram.n_bins} bins"


def separate(counts: Counts) -> tuple[Counts, dict[str, dict[str, Array]]]:
    """The counts alone, and what was kept beside them: by table and site."""
    own = {n: a for n, a in counts.arrays.items() if n.partition(".")[0] not in TABLES}
    kept: dict[str, dict[str, Array]] = {name: {} for name in TABLES}
    for name in counts.arrays.keys() - own.keys():
        table, _, site = name.partition(".")
        kept[table][site] = counts.arrays[name]
    return Counts(counts.groups, counts.tokens, own, counts.beside), kept


def made(
    groups: Sequence[str],
    kept: dict[str, dict[str, Array]],
    again: Feed | None,
    n_windows: Sequence[int],
    quiet: bool,
) -> Kept:
    """The files' contents; `again` reads the corpus from its begin."""
    found = spread = None
    if kept["peak"]:
        assert again is not None
        value, number, position = (kept[name] for name in BEST)
        windows = _windows(again, used(number), quiet)
        found = Examples.of_numbers(
            groups, value, number, position, windows, np.array(n_windows, np.int64)
        )
    if kept["bin"]:
        # What no layer has is in no bin, wherever its bins are.
        exponent, first = (
            {s: np.where(a[0] == TABLES[name][1], 0, a[0]) for s, a in kept[name].items()}
            for name in ("exponent", "first")
        )
        last = {s: np.full(a.shape[1:3], a.shape[3] - 1, np.int32) for s, a in kept["bin"].items()}
        spread = Histogram(list(groups), kept["bin"], exponent, first, last)
    return Kept(found, spread)


def _windows(feed: Feed, wanted: set[tuple[int, int]], quiet: bool) -> Windows:
    """The tokens of windows by their group and number, read again."""
    found: dict[tuple[int, int], Array] = {}
    bar = progress_bar(len(wanted), "examples", "window", quiet)
    with bar, feed:
        while len(found) < len(wanted):
            taken = feed.take(_AT_ONCE)
            if not taken:
                raise RelneuronError(
                    "the texts have fewer windows than when they were counted",
                    "leave the texts as they are meanwhile, and count them again with --force",
                )
            before = len(found)
            for window in taken:
                key = window.group, window.number
                if key in wanted:
                    found[key] = window.ids
            bar.update(len(found) - before)
    return Windows.of(found)
