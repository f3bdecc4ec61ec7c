"""What neurons are ranked with by the counts of a corpus; the defaults of LAPE are its authors'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from relneuron.artifact.counts import SITES
from relneuron.artifact.modules import ASKED
from relneuron.artifact.options import Only, Options, SeedOptions, option

PRECISIONS = ("float32", "float64")
TOP_RATE, FILTER_RATE, BAR_RATIO = 0.01, 0.95, 0.95


@dataclass(frozen=True)
class CountedOptions(Options):
    """Which neurons of which groups are ranked, and how many are chosen."""

    top: int | None = option(
        None,
        "Of counts: neurons of each group, with lape of all groups together; default: what "
        "--top-rate says.",
        least=1,
    )
    site: str = option("act", "Site of the counts.", choices=SITES)
    groups: Sequence[str] | None = option(
        None, "Groups to rank in, such as en,zh; default: all that were counted."
    )
    module: Sequence[str] | None = option(
        None,
        "Of counts of several modules, which are ranked, each by itself; default: all.",
        choices=ASKED,
        is_set=True,
    )
    top_rate: float = option(
        TOP_RATE,
        "Share of the model's neurons to choose.",
        least=0,
        most=1,
        only=Only("without --top", lambda o: o.top is None, clashes=True),
    )
    precision: str = option(
        "float32",
        "Precision of the probabilities: float32, as the authors of LAPE have it, or float64.",
        choices=PRECISIONS,
    )


@dataclass(frozen=True)
class LapeOptions(CountedOptions):
    """Which neurons are active enough to be ranked by entropy, and to be a group's."""

    filter_rate: float = option(
        FILTER_RATE,
        "A neuron is ranked if it is active in a group above this quantile of probabilities.",
        least=0,
        most=1,
    )
    bar_ratio: float = option(
        BAR_RATIO,
        "A neuron belongs to the groups where it is active above this quantile.",
        least=0,
        most=1,
    )


@dataclass(frozen=True)
class RandomOptions(CountedOptions, SeedOptions):
    """Of what random neurons are drawn."""
