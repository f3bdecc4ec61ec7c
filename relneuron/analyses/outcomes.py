"""Counts behind the tables: how a relation's prompts went as the model is and with neurons off.

Every analysis of a grid starts here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.analyses.uncertainty import (
    NAN,
    Counts,
    Paired,
    paired_bootstrap,
    q_values,
    sign_flip_p,
)
from relneuron.artifact.effects import NOT_ASKED, Condition, Grid
from relneuron.report.tables import Array, Share, Spread, spread

Row = list[str | float]

# A relation that the model hardly answers has no drop that means anything: up to this share, or
# fewer facts than half of them and than six, of which losing all is no more than chance (five:
# sign-flip p = 0.06).
LOW, HALF, FEW = 0.1, 0.5, 6


def is_known(share: float, n_facts: int) -> bool:
    """Whether a relation is answered well enough: the share right, the facts with a right one."""
    return share > LOW and (share >= HALF or n_facts >= FEW)


class Outcomes(NamedTuple):
    """Prompts asked both clean and under a condition, by whether their answers were right."""

    kept: int  # right, right
    lost: int  # right, wrong
    gained: int  # wrong, right
    wrong: int  # wrong, wrong
    facts: Counts  # (F, 3) of each fact: prompts, right before, right after
    off: int | None = None  # neurons that were off; None: the clean model

    @property
    def n(self) -> int:
        return self.kept + self.lost + self.gained + self.wrong

    @property
    def n_before(self) -> int:
        return self.kept + self.lost

    @property
    def n_after(self) -> int:
        return self.kept + self.gained

    @property
    def before(self) -> float:
        return self.n_before / self.n if self.n else NAN

    @property
    def after(self) -> float:
        return self.n_after / self.n if self.n else NAN

    @property
    def drop(self) -> float:
        """(before - after) / before (methods A10.2); NaN where nothing was right before."""
        return (self.before - self.after) / self.before if self.n_before else NAN

    @property
    def p_value(self) -> float:
        """The sign-flip test over facts; NaN where no drop is defined and where nothing was off."""
        if not self.n_before or not self.off:
            return NAN
        return sign_flip_p(self.facts[:, 2] - self.facts[:, 1])

    def intervals(self) -> Paired:
        return paired_bootstrap(self.facts)


NOT_MEASURED = Outcomes(0, 0, 0, 0, np.empty((0, 3), np.int64))


def sets_off(grid: Grid) -> dict[str, str]:
    """The condition that switches a relation's own set off, by relation."""
    return {condition.relation: condition.name for condition in grid.of_kind("set")}


def conditions_by_relation(grid: Grid, kind: str) -> dict[str, list[Condition]]:
    """The conditions of a kind, in their order, by whose neurons they switch off."""
    found: dict[str, list[Condition]] = {}
    for condition in grid.of_kind(kind):
        found.setdefault(condition.relation, []).append(condition)
    return found


def filled_sets(grid: Grid) -> dict[str, str]:
    """`sets_off` of the sets that have neurons: another one switches nothing off."""
    return {name: off for name, off in sets_off(grid).items() if grid.conditions[off].n_neurons}


def relations(grid: Grid) -> list[str]:
    """The relations asked: those with a set in the order of the sets, then the others."""
    asked = dict.fromkeys(grid.relations)
    with_set = {name: None for name in sets_off(grid) if name in asked}
    return [*with_set, *(name for name in asked if name not in with_set)]


def own_sets(grid: Grid) -> dict[str, str]:
    """`sets_off` of the relations asked."""
    off = sets_off(grid)
    return {name: off[name] for name in relations(grid) if name in off}


def asked(grid: Grid, relation: str, *conditions: str) -> NDArray[np.int64]:
    """The places, ascending, of a relation's prompts that were asked under all of `conditions`."""
    rows = grid.rows(relation)
    for condition in conditions:
        rows = rows[grid.correct[condition][rows] != NOT_ASKED]
    return rows


def outcomes(grid: Grid, relation: str, condition: str | None) -> Outcomes:
    """How a relation's prompts went, clean and under `condition`; None was not measured."""
    if condition is None:
        return NOT_MEASURED
    rows = asked(grid, relation, condition)
    before, after = (grid.correct[name][rows] for name in ("clean", condition))
    wrong, gained, lost, kept = np.bincount(2 * before + after, minlength=4).tolist()
    about = grid.conditions[condition]
    off = None if about.kind == "clean" else about.n_neurons
    return Outcomes(kept, lost, gained, wrong, by_fact(grid.facts[rows], before, after), off)


def by_fact(facts: Counts, before: NDArray[np.int8], after: NDArray[np.int8]) -> Counts:
    """(F, 3): the prompts of each fact that was asked, those right before, those right after."""
    # The facts of a relation may be the last ones of very many.
    _, place, n = np.unique(facts, return_inverse=True, return_counts=True)
    # Sums of zeros and ones: exact as floats.
    right = [np.bincount(place, one, len(n)).astype(np.int64) for one in (before, after)]
    return np.stack([n, *right], axis=1)


def known(grid: Grid) -> list[str]:
    """The relations whose drops mean something."""
    clean = {name: outcomes(grid, name, "clean") for name in relations(grid)}
    right = {name: int((found.facts[:, 1] > 0).sum()) for name, found in clean.items()}
    return [name for name, found in clean.items() if is_known(found.before, right[name])]


class Mean(NamedTuple):
    """Accuracy after, and drop, over several outcomes; those not measured do not count."""

    after: Spread
    drop: Spread


def mean_of(after: Array, drop: Array) -> Mean:
    return Mean(spread(after), spread(drop))


class Effects(NamedTuple):
    """`Outcomes.after` and `Outcomes.drop` of all relations under some conditions, (R, C) both."""

    after: Array
    drop: Array


def effects(grid: Grid, conditions: Collection[str | None]) -> Effects:
    """What conditions do to every relation of `grid.relations`; None was not measured: NaN.

    All relations at once: of many of them, under as many sets, `outcomes` of each would take long.
    """
    n_relations, clean = len(grid.relations), grid.correct["clean"]
    # By what an answer was before and is after: wrong, gained, lost, kept.
    tally = np.zeros((n_relations, len(conditions), 4), np.int64)
    for place, condition in enumerate(conditions):
        if condition is not None:
            after = grid.correct[condition]
            rows = np.flatnonzero(after != NOT_ASKED)
            kind = 4 * grid.numbers[rows] + 2 * clean[rows] + after[rows]
            tally[:, place] = np.bincount(kind, minlength=4 * n_relations).reshape(-1, 4)
    _, gained, lost, kept = np.moveaxis(tally, 2, 0)
    n = tally.sum(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        was, now = np.where(n > 0, [kept + lost, kept + gained] / n, NAN)
        return Effects(now, np.where(kept + lost > 0, (was - now) / was, NAN))


def others_under(grid: Grid, relation: str, condition: str) -> Mean:
    """Unweighted means over the other relations with the condition's neurons off."""
    found = effects(grid, [condition])
    others = [i for i, name in enumerate(grid.relations) if name != relation]
    return mean_of(found.after[others, 0], found.drop[others, 0])


def shares(*values: float) -> list[Share]:
    return [Share(value) for value in values]


def with_q(columns: Sequence[str], rows: Sequence[Row]) -> list[Row]:
    """`rows` that lack only q_value, with it behind p_value: adjusted over these rows."""
    place = columns.index("q_value")
    q = q_values([float(row[place - 1]) for row in rows]).tolist()
    return [[*row[:place], value, *row[place:]] for row, value in zip(rows, q, strict=True)]
