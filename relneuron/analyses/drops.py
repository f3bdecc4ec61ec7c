"""What switching a set off does: to its own relation, to the others, and by type of neuron.

`run_all` calls these; methods A10.1, 2, 7, 8 and 9 (arXiv 2502.17355, sections 4 and 5).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from relneuron.analyses.outcomes import (
    Mean,
    Row,
    conditions_by_relation,
    effects,
    filled_sets,
    known,
    mean_of,
    others_under,
    outcomes,
    relations,
    sets_off,
    shares,
    with_q,
)
from relneuron.analyses.uncertainty import NAN
from relneuron.artifact.effects import Grid
from relneuron.artifact.neurons import ATTENTION, SITES
from relneuron.report.tables import Array, Spread, Table, spread

ACCURACY = (
    *("split", "relation", "n_prompts", "before", "before_low", "before_high"),
    *("own", "own_low", "own_high", "drop", "drop_low", "drop_high"),
    *("lost", "gained", "p_value", "q_value", "others", "others_low", "others_high"),
    *("random", "random_low", "random_high", "random_drop"),
    *("matched", "matched_low", "matched_high", "matched_drop"),
)
DROP = (
    *("relation", "off", "own", "n_prompts", "n_before", "n_after"),
    *("drop", "drop_low", "drop_high", "lost", "gained", "p_value", "q_value"),
)
SITE_COLUMNS = (
    *("relation", "site", "n_neurons", "own", "own_low", "own_high"),
    *("own_drop", "others_drop"),
)

MODULE_COLUMNS = (
    "relation",
    "modules",
    "n_neurons",
    "before",
    "own",
    "own_low",
    "own_high",
    "drop",
)


def accuracy(grids: Mapping[str, Grid]) -> Table:
    """Intra-relation effects on every split: accuracy clean and with the own set off.

    Intervals are those of a bootstrap over facts (`paired_bootstrap`); the own set's p is that of
    the sign-flip test over facts, its q over the split's relations. Both are NaN where no drop is
    defined and for a set without neurons. others: the mean, least and greatest accuracy of the
    relation with another relation's set off; random and matched: the same over the random sets'
    seeds.
    """
    rows: list[Row] = []
    for grid in grids.values():
        rows += with_q(ACCURACY, _accuracy_rows(grid))
    return Table("Accuracy before and after", ACCURACY, rows)


def _accuracy_rows(grid: Grid) -> list[Row]:
    sets, matched = sets_off(grid), conditions_by_relation(grid, "matched")
    place = {name: i for i, name in enumerate(grid.relations)}
    others = effects(grid, sets.values())
    random = effects(grid, [condition.name for condition in grid.of_kind("random")])
    rows = []
    for relation in relations(grid):
        i, foreign = place[relation], [other != relation for other in sets]
        drawn = effects(grid, [condition.name for condition in matched.get(relation, ())])
        means = (
            mean_of(others.after[i, foreign], others.drop[i, foreign]),
            *(mean_of(found.after[i], found.drop[i]) for found in (random, drawn)),
        )
        rows.append(_accuracy_row(grid, relation, sets.get(relation), *means))
    return rows


def _accuracy_row(
    grid: Grid, relation: str, off: str | None, others: Mean, random: Mean, matched: Mean
) -> Row:
    clean, own = (outcomes(grid, relation, name) for name in ("clean", off))
    ends = own.intervals()
    return [
        *(grid.split, relation, clean.n),
        *shares(clean.before, *clean.intervals().before),
        *shares(own.after, *ends.after, own.drop, *ends.drop),
        *((own.lost, own.gained) if own.n else (NAN, NAN)),
        own.p_value,
        *shares(*others.after, *random.after, random.drop.mean),
        *shares(*matched.after, matched.drop.mean),
    ]


def drop_table(grid: Grid) -> Table:
    """Inter-relation effects: what every set does to every relation.

    drop = (acc_before - acc_after) / acc_before from whole numbers of prompts; negative where
    the set's absence helps, NaN where nothing was right before. Intervals and p as in `accuracy`,
    q over the whole matrix.
    """
    rows: list[Row] = []
    sets = sets_off(grid)
    for relation in relations(grid):
        for off, condition in sets.items():
            found = outcomes(grid, relation, condition)
            rows.append(
                [
                    *(relation, off, int(off == relation), found.n, found.n_before, found.n_after),
                    *shares(found.drop, *found.intervals().drop),
                    *(found.lost, found.gained, found.p_value),
                ]
            )
    return Table("Accuracy drop of every relation under every set", DROP, with_q(DROP, rows))


class Headline(NamedTuple):
    """Relative drops of a relation's accuracy: over relations, over pairs, over seeds."""

    own: Spread
    other: Spread
    random: Spread


def headline(grid: Grid) -> Headline:
    """The three numbers that answer the question, of the relations that the model knows (`known`).

    Under sets that have neurons; the random range is over the seeds' means.
    """
    names, sets = known(grid), filled_sets(grid)
    drop = drop_matrix(grid, names, sets.values())
    own = np.array([[name == off for off in sets] for name in names], np.bool_).reshape(drop.shape)
    random = drop_matrix(grid, names, random_sets(grid))
    seeds = np.array([spread(column).mean for column in random.T])
    return Headline(
        spread(drop[own]), spread(drop[~own]), spread(seeds)._replace(mean=spread(random).mean)
    )


def random_sets(grid: Grid) -> list[str]:
    """The random sets' conditions, in the order of their seeds."""
    return [c.name for c in sorted(grid.of_kind("random"), key=lambda c: c.seed or 0)]


def drop_matrix(grid: Grid, names: Collection[str], conditions: Collection[str]) -> Array:
    """(R, C): the drop of every relation of `names` under every condition (see `drop_table`)."""
    measured = [name if name in grid.conditions else None for name in conditions]
    place = {name: i for i, name in enumerate(grid.relations)}
    found = effects(grid, measured).drop
    # Of a relation that was not asked nothing is known: the row behind them all.
    found = np.concatenate([found, np.full((1, found.shape[1]), NAN)])
    return found[np.array([place.get(name, -1) for name in names], np.int64)]


def sites(grid: Grid) -> Table:
    """Types of neurons: the best neurons of one site alone off, and the own set of all sites."""
    rows: list[Row] = []
    off, alone = sets_off(grid), conditions_by_relation(grid, "site")
    for relation in relations(grid):
        found = {c.site: c for c in alone.get(relation, ())}
        if not found:
            continue
        if relation in off:
            found["all"] = grid.conditions[off[relation]]
        for site in [site for site in (*SITES, *ATTENTION, "all") if site in found]:
            own = outcomes(grid, relation, found[site].name)
            others = others_under(grid, relation, found[site].name)
            measured = shares(own.after, *own.intervals().after, own.drop, others.drop.mean)
            rows.append([relation, site, found[site].n_neurons, *measured])
    return Table("Effects by type of neuron", SITE_COLUMNS, rows)


def modules(grid: Grid) -> Table:
    """Of a relation's set the neurons in some modules off (MMNeuron, arXiv 2406.11193)."""
    rows: list[Row] = []
    parts = conditions_by_relation(grid, "modules")
    for relation in relations(grid):
        for condition in parts.get(relation, ()):
            own = outcomes(grid, relation, condition.name)
            measured = shares(own.before, own.after, *own.intervals().after, own.drop)
            rows.append([relation, condition.site, condition.n_neurons, *measured])
    return Table("Effects by set of modules", MODULE_COLUMNS, rows)
