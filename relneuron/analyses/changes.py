"""What neurons of facts do to the probability of answers: of their own prompts and of others.

The page on gradients calls it. The measures are those of arXiv 2104.08696 (relative change of P,
section 4.2) and 2406.10868 (PCR, and how many predictions among the options flip).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from relneuron.analyses.uncertainty import NAN, UNKNOWN, Interval, percentile_interval, resampled
from relneuron.artifact.effects import NOT_ASKED, Condition, Grid
from relneuron.artifact.prompts import Prompt, rows_about
from relneuron.report.tables import Array, Share, Table, spread

ALL = "all relations"
SIDES = ("related", "unrelated")
MEASURES = ("change", "before", "after", "flips")
CHANGES = (
    *("relation", "n_sets", "n_neurons", "n_related", "n_unrelated"),
    *(f"related_change{end}" for end in ("", "_low", "_high")),
    *(f"unrelated_change{end}" for end in ("", "_low", "_high")),
    *("matched", "matched_low", "matched_high", "pcr", "pcr_low", "pcr_high"),
    *(
        f"{side}_{measure}{end}"
        for side in SIDES
        for measure in MEASURES[1:]
        for end in ("", "_low", "_high")
    ),
)

Rows = NDArray[np.intp]


@dataclass
class _Cases:
    """What some sets did to some prompts: one a row of each list, with the fact that was asked."""

    facts: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {m: [] for m in MEASURES})

    def add(self, grid: Grid, name: str, rows: Rows) -> None:
        clean, after = grid.correct["clean"][rows], grid.correct[name][rows]
        with np.errstate(over="ignore", invalid="ignore"):
            change = np.expm1(grid.logprob[name][rows] - grid.logprob["clean"][rows])
        flips = [
            float(before != now) if before and now else NAN
            for before, now in ((grid.choice["clean"][i], grid.choice[name][i]) for i in rows)
        ]
        self.facts += grid.facts[rows].tolist()
        found = {"change": change.tolist(), "before": clean, "after": after, "flips": flips}
        for measure, values in found.items():
            self.values[measure] += [float(value) for value in values]

    def sums(self, measure: str, n_facts: int) -> Array:
        """(F, 2) the sum over each fact's cases, and their number; what is not finite is none."""
        values, facts = np.array(self.values[measure]), np.array(self.facts, np.int64)
        some = np.isfinite(values)
        total = np.bincount(facts[some], values[some], n_facts)
        return np.stack([total, np.bincount(facts[some], minlength=n_facts)], 1)


def changes(grid: Grid, prompts: Mapping[str, Prompt]) -> Table:
    """One row a relation, and one of all: the sets of a relation and of its facts together.

    change    mean over prompts and sets of (P(off) - P) / P, P the probability of the right answer;
              related: the prompts that a set is about, unrelated: of the others that were asked
              those of other relations (of a single relation those of other facts)
    matched   the related change with as many random neurons of each layer and site off, mean and
              range of the seeds
    pcr       |related change| / |unrelated change|
    before, after, flips   the share of answers that are right, and of prompts whose most probable
              option is another one; NaN without options

    Intervals: bootstrap over the facts that are asked, both sides of a ratio by the same draw.
    """
    asked = [prompts[name] for name in grid.ids]
    about = rows_about(asked)
    groups: dict[str, list[Condition]] = {}
    for condition in grid.of_kind("set"):
        if rows := about.get(condition.relation):
            groups.setdefault(asked[rows[0]].relation, []).append(condition)
    if len(groups) > 1:
        groups[ALL] = [condition for own in groups.values() for condition in own]
    matched: dict[str, list[Condition]] = {}
    for condition in grid.of_kind("matched"):
        matched.setdefault(condition.relation, []).append(condition)
    rows_out = [_row(grid, name, own, about, matched) for name, own in groups.items()]
    return Table("Change of the answer's probability", CHANGES, rows_out)


def _row(
    grid: Grid,
    relation: str,
    sets: Sequence[Condition],
    about: Mapping[str, Sequence[int]],
    matched: Mapping[str, Sequence[Condition]],
) -> list[str | float]:
    cases = {side: _Cases() for side in SIDES}
    by_seed: dict[int | None, _Cases] = {}
    for condition in sets:
        related, unrelated = sides(grid, condition, about)
        cases["related"].add(grid, condition.name, related)
        cases["unrelated"].add(grid, condition.name, unrelated)
        for drawn in matched.get(condition.relation, ()):
            rows = related[grid.correct[drawn.name][related] != NOT_ASKED]
            by_seed.setdefault(drawn.seed, _Cases()).add(grid, drawn.name, rows)
    n_facts = int(grid.facts.max()) + 1
    sums = {(s, m): cases[s].sums(m, n_facts) for s in SIDES for m in MEASURES}
    there = np.any([one[:, 1] > 0 for one in sums.values()], axis=0)
    draws = resampled(int(there.sum()))
    means = {key: _means(one[there], draws) for key, one in sums.items()}
    pcr = (abs(_ratio(*(means[side, "change"][i] for side in SIDES))) for i in range(2))
    ratio, drawn_ratios = pcr
    random = spread(np.array([_mean(one.values["change"]) for one in by_seed.values()]))
    cells: list[str | float] = [
        *(relation, len(sets), sum(c.n_neurons for c in sets) / len(sets)),
        *(len(cases[side].facts) for side in SIDES),
    ]
    for side in SIDES:
        cells += _shares(*means[side, "change"])
    cells += map(Share, random)
    cells += [float(ratio[0]), *_interval(drawn_ratios)]
    for side in SIDES:
        for measure in MEASURES[1:]:
            cells += _shares(*means[side, measure])
    return cells


def sides(
    grid: Grid, condition: Condition, about: Mapping[str, Sequence[int]]
) -> tuple[Rows, Rows]:
    """The rows that a set is about, and those that it has nothing to do with; as it was asked."""
    was_asked = grid.correct[condition.name] != NOT_ASKED
    own = np.zeros(len(grid.ids), bool)
    own[list(about[condition.relation])] = True
    others = ~np.isin(grid.relation, np.unique(grid.relation[own]))
    if not others.any():
        others = ~own
    return np.flatnonzero(own & was_asked), np.flatnonzero(others & was_asked)


def _means(sums: Array, draws: Array) -> tuple[Array, Array]:
    """The mean, (1,), and those of resampled facts, (R,), of (F, 2) sums and numbers."""
    return _ratio(*sums.sum(0)[:, None]), _ratio(draws @ sums[:, 0], draws @ sums[:, 1])


def _ratio(above: Array, below: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below != 0, above / below, NAN)


def _interval(values: Array) -> Interval:
    some = values[np.isfinite(values)]
    return percentile_interval(some) if some.size and np.ptp(some) > 0 else UNKNOWN


def _shares(mean: Array, drawn: Array) -> list[Share]:
    return [Share(float(mean[0])), *map(Share, _interval(drawn))]


def _mean(values: Iterable[float]) -> float:
    some = [value for value in values if np.isfinite(value)]
    return sum(some) / len(some) if some else NAN
