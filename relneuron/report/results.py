"""The numbers that the report's words rest on, as arrays: accuracies, drops, counts of neurons.

cli/pages.py and the analyses call it; pure functions. NaN stands for what was not measured.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.artifact.effects import NOT_ASKED, Grid, split_order
from relneuron.artifact.neurons import SITES, Neuron

Array = NDArray[np.float64]

# Each file the report reads, and the command that writes it.
INPUTS = {
    "manifest.json": "run MODEL --facts DIR -o DIR",
    "prompts.jsonl": "prompts FACTS_DIR -o prompts.jsonl",
    "neurons.json": "identify DIR -o neurons.json",
    "significance.csv": "identify DIR -o neurons.json",
    "effects.csv": "ablate MODEL neurons.json prompts.jsonl -o effects.csv",
    "effects.parquet": "ablate MODEL neurons.json prompts.jsonl -o effects.parquet",
    "accuracy.csv": "ablate MODEL neurons.json prompts.jsonl -o effects.csv",
    "conditions.csv": "ablate MODEL neurons.json prompts.jsonl -o effects.csv",
    "perplexity.csv": "ablate MODEL neurons.json prompts.jsonl -o effects.csv",
    "frequency.csv": "no command, but by counting documents: id, documents",
    "concepts/neurons.json": "run MODEL --facts DIR -o DIR --analyses concepts",
    "attribution/neurons.json": "run MODEL --facts DIR -o DIR --analyses gain",
    "attribution/scores.safetensors": "run MODEL --facts DIR -o DIR --analyses gain",
}
# A study that was not asked for them has no such files; one whose manifest names them must.
OPTIONAL = (
    *("significance.csv", "effects.parquet", "conditions.csv", "perplexity.csv"),
    *("frequency.csv", "concepts/neurons.json"),
    *("attribution/neurons.json", "attribution/scores.safetensors"),
)


# A relation that the model hardly answers has no drop that means anything: up to this share, or
# fewer facts than half of them and than six, of which losing all is no more than chance (five:
# sign-flip p = 0.06).
LOW, HALF, FEW = 0.1, 0.5, 6


def is_known(share: float, n_facts: int) -> bool:
    """Whether a relation is answered well enough: the share right, the facts with a right one."""
    return share > LOW and (share >= HALF or n_facts >= FEW)


def drop_matrix(before: Array, off: Array) -> Array:
    """(before - off) / before, (R,) and (R, C) -> (R, C); NaN where nothing was right before."""
    base = np.where(before > 0, before, np.nan)[:, None]
    result: Array = (base - off) / base
    return result


class Spread(NamedTuple):
    """Mean, least and greatest of what was measured; NaN if nothing was."""

    mean: float
    low: float
    high: float


def spread(values: Array) -> Spread:
    found = values[np.isfinite(values)]
    if not found.size:
        return Spread(np.nan, np.nan, np.nan)
    return Spread(float(found.mean()), float(found.min()), float(found.max()))


@dataclass(frozen=True)
class Result:
    """Accuracies of one split: R relations, C sets switched off, S random sets."""

    split: str
    relations: list[str]
    sets: list[str]
    n_prompts: NDArray[np.int64]  # (R,)
    before: Array  # (R,)
    off: Array  # (R, C)
    random: Array  # (R, S)
    n_right: NDArray[np.int64] | None = None  # (R,) facts with a right answer before

    @property
    def own(self) -> NDArray[np.bool_]:
        """(R, C): where the set is the relation's own."""
        pairs = [[name == relation for name in self.sets] for relation in self.relations]
        return np.array(pairs, dtype=np.bool_).reshape(self.off.shape)

    @property
    def known(self) -> NDArray[np.bool_]:
        """(R,): whose drops mean something, as far as `n_right` is known."""
        n_right = [FEW] * len(self.before) if self.n_right is None else self.n_right.tolist()
        pairs = zip(self.before.tolist(), n_right, strict=True)
        return np.array([is_known(*pair) for pair in pairs], np.bool_)

    @property
    def drop(self) -> Array:
        return drop_matrix(self.before, self.off)


def in_order(grids: Mapping[str, Grid]) -> dict[str, Grid]:
    """The grids with eva first, then its alternatives, other languages after them."""
    return {split: grids[split] for split in sorted(grids, key=split_order)}


def split_results(grids: Mapping[str, Grid]) -> list[Result]:
    """One result per split; the same relations and conditions in each, sets in the file's order.

    A set without neurons switches nothing off and is no set of a result.
    """
    known = {name: c for grid in grids.values() for name, c in grid.conditions.items()}
    sets, random = ([c for c in known.values() if c.kind == kind] for kind in ("set", "random"))
    random.sort(key=lambda condition: condition.seed or 0)
    asked = dict.fromkeys(name for grid in grids.values() for name in grid.relations)
    order = [condition.relation for condition in sets]
    relations = sorted(asked, key=lambda name: order.index(name) if name in order else len(order))
    sets = [condition for condition in sets if condition.n_neurons]
    own = [condition.relation for condition in sets]
    results = []
    for split, grid in grids.items():
        rows = [grid.relation == name for name in relations]
        before, off, drawn = (
            np.array([[_accuracy(grid, name, row) for name in names] for row in rows])
            for names in (["clean"], [c.name for c in sets], [c.name for c in random])
        )
        n_prompts = np.array([row.sum() for row in rows])
        right = [np.unique(grid.facts[row & (grid.correct["clean"] == 1)]) for row in rows]
        n_right = np.array([facts.size for facts in right])
        results.append(Result(split, relations, own, n_prompts, before[:, 0], off, drawn, n_right))
    return results


def _accuracy(grid: Grid, condition: str, rows: NDArray[np.bool_]) -> float:
    if condition not in grid.conditions:
        return np.nan
    correct = grid.correct[condition][rows]
    asked = correct[correct != NOT_ASKED]
    return float(asked.mean()) if asked.size else np.nan


class Headline(NamedTuple):
    """Relative drops of a relation's accuracy: over relations, over pairs, over seeds."""

    own: Spread
    other: Spread
    random: Spread


def headline(result: Result) -> Headline:
    """The three numbers that answer the question; the random range is over the seeds' means.

    Of the relations that the model knows (`is_known`).
    """
    before = np.where(result.known, result.before, 0)
    drop, random = (drop_matrix(before, after) for after in (result.off, result.random))
    seeds = np.array([spread(column).mean for column in random.T])
    return Headline(
        spread(drop[result.own]),
        spread(drop[~result.own]),
        spread(seeds)._replace(mean=spread(random).mean),
    )


def site_counts(
    sets: Collection[Sequence[Neuron]], n_layers: int, sites: Sequence[str] = SITES
) -> NDArray[np.int64]:
    """Chosen neurons per set, site and layer: (R, S, L)."""
    count = np.zeros((len(sets), len(sites), n_layers), dtype=np.int64)
    for r, neurons in enumerate(sets):
        for layer, site, _ in neurons:
            count[r, sites.index(site), layer] += 1
    return count
