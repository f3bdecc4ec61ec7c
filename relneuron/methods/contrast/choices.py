"""What `identify --method contrast` takes; `rank.py` and the command line read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relneuron.artifact.options import Only, Options, option

# Of arXiv 2406.14144; its scripts take 20,000 of 341,248 neurons, 5.9 %.
RATE = 0.05
_NO_SIZES = Only("without --sizes", lambda o: not o.sizes, clashes=True)


@dataclass(frozen=True)
class ChangeOptions(Options):
    """Which neurons of the ranking by change are chosen, and on which tokens it is made."""

    top: int | None = option(
        None,
        "Of a contrast: neurons of a set; default: what --rate says.",
        least=1,
        only=_NO_SIZES,
    )
    rate: float = option(
        RATE,
        "Of a contrast: share of the neurons that are ranked to choose.",
        above=0,
        most=1,
        only=Only("without --top and --sizes", lambda o: o.top is None and not o.sizes, True),
    )
    sizes: Sequence[int] = option(
        (),
        "Of a contrast: in place of one set one of each of these sizes, such as 50,200,1000, each "
        "within the next.",
        least=1,
        is_set=True,
    )
    from_rank: int = option(
        0, "Of a contrast: begin behind so many neurons of the ranking; 0 is its first.", least=0
    )
    without_layers: Sequence[int] = option(
        (), "Of a contrast: layers that are not ranked, from zero, such as 0,31.", is_set=True
    )
    groups: Sequence[str] | None = option(
        None, "Of a contrast: groups whose tokens count; default: all."
    )
    by_group: bool = option(
        False, "Of a contrast: a ranking and a set for each group, not one for all tokens."
    )
    within: Path | None = option(
        None, "Of a contrast: rank only neurons that are in a set of this neurons.json."
    )
    without: Path | None = option(
        None, "Of a contrast: rank no neuron that is in a set of this neurons.json."
    )
