"""How many neurons: effects by the size of a set, and whether small effects add up to large ones.

`run_all` calls these; methods A10.5 and 6 (arXiv 2502.17355, sections 4 and 5.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from relneuron.analyses.outcomes import (
    Row,
    asked,
    conditions_by_relation,
    others_under,
    outcomes,
    relations,
    shares,
)
from relneuron.analyses.uncertainty import NAN
from relneuron.artifact.effects import Condition, Grid
from relneuron.report.tables import Share, Table

SIZES = ("relation", "size", "own", "own_low", "own_high", "others", "own_drop", "others_drop")
CUMULATIVITY = ("relation", "from", "to", "total", "affected", "cumulativity")
SUMMARY = ("from", "to", "total", "affected", "macro", "micro")


def _by_size(conditions: Iterable[Condition]) -> dict[int, str]:
    """The conditions that switch the best neurons of a relation off, by their number, ascending."""
    found = {c.last: c.name for c in conditions if c.last}
    return dict(sorted(found.items()))


def sizes(grid: Grid) -> Table:
    """Accuracy with the best `size` neurons off: of the relation, and the others' unweighted mean.

    Size 0 is the model as it is.
    """
    rows: list[Row] = []
    tops = conditions_by_relation(grid, "size")
    for relation in relations(grid):
        found = _by_size(tops.get(relation, ()))
        for size, condition in ({0: "clean", **found} if found else {}).items():
            own, others = (
                outcomes(grid, relation, condition),
                others_under(grid, relation, condition),
            )
            measured = own.after, *own.intervals().after, others.after.mean
            rows.append([relation, size, *shares(*measured, own.drop, others.drop.mean)])
    return Table("Effects by number of neurons", SIZES, rows)


def cumulativity(grid: Grid) -> Table:
    """Whether the neurons that break a prompt together also break it alone, by range of ranks.

    For consecutive sizes a < b: total = the relation's prompts that are right with the best a off
    and wrong with the best b off; affected = those of them that are wrong when only ranks a + 1 to
    b are off. cumulativity = 1 - affected / total (arXiv 2502.17355, section 5.1).
    """
    rows: list[Row] = []
    sizes, ranges = (conditions_by_relation(grid, kind) for kind in ("size", "range"))
    for relation in relations(grid):
        tops = _by_size(sizes.get(relation, ()))
        only = {(c.first, c.last): c.name for c in ranges.get(relation, ())}
        for a, b in pairwise(tops):
            if (a + 1, b) not in only:
                continue
            names = tops[a], tops[b], only[a + 1, b]
            places = asked(grid, relation, *names)
            smaller, larger, alone = (grid.correct[name][places] == 1 for name in names)
            broken = smaller & ~larger
            total, affected = int(broken.sum()), int((broken & ~alone).sum())
            share = macro_micro([(total, affected)])[0]
            rows.append([relation, a, b, total, affected, Share(share)])
    return Table("Cumulativity", CUMULATIVITY, rows)


def macro_micro(pairs: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Cumulativity over several (total, affected): over relations, and over prompts.

    macro: the mean of 1 - affected / total where total > 0; micro: 1 - the sum of affected / the
    sum of total. NaN if no total is above 0.
    """
    each = [1 - affected / total for total, affected in pairs if total]
    if not each:
        return NAN, NAN
    total, affected = np.sum(pairs, axis=0).tolist()
    return sum(each) / len(each), 1 - affected / total


def cumulativity_summary(table: Table) -> Table:
    """The relations of `cumulativity` taken together, by range of ranks."""
    numbers = [[int(cell) for cell in row[1:5]] for row in table.rows]
    rows: list[Row] = []
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for first, last, total, affected in numbers:
        found.setdefault((first, last), []).append((total, affected))
    for (a, b), pairs in sorted(found.items()):
        total, affected = np.sum(pairs, axis=0).tolist()
        rows.append([a, b, total, affected, *shares(*macro_micro(pairs))])
    return Table("Cumulativity over all relations", SUMMARY, rows)
