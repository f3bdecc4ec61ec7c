"""Two ways to find a relation's neurons: average precision against log-probability gain.

`run_all` calls these (arXiv 2502.17355 and 2312.12141). A set is found by average precision (AP)
among the outputs of gate, up and down, one by gain among the products that the MLP's down_proj
reads; a zeroed gate or up output is a zeroed product, so both are compared as (layer, index).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from relneuron.analyses.outcomes import (
    Row,
    others_under,
    outcomes,
    relations,
    sets_off,
    shares,
    with_q,
)
from relneuron.analyses.overlap import Sets
from relneuron.analyses.uncertainty import NAN, overlap_p
from relneuron.artifact.effects import Grid
from relneuron.artifact.neurons import Neuron
from relneuron.report.tables import Share, Table

Products = set[tuple[int, int]]

GAIN = (
    *("relation", "method", "n_neurons", "n_products", "n_prompts", "n_before", "n_after"),
    *("drop", "drop_low", "drop_high", "lost", "gained", "p_value", "q_value", "others_drop"),
)
GAIN_OVERLAP = (
    *("relation", "ap", "gain", "shared", "share", "expected", "correlation"),
    *("p_value", "q_value"),
)


class Gains(NamedTuple):
    """Each relation's neurons by gain, and how the scores compare with those by AP.

    correlation  by relation: Spearman's, over all products, of the gain with the larger AP of the
                 product's gate and up
    """

    sets: Sets
    n_products: int  # of the model: layers times width
    correlation: Mapping[str, float]


NO_GAINS = Gains({}, 0, {})


def products(neurons: Sequence[Neuron]) -> Products:
    """The (layer, index) of the products that are zero when these neurons are."""
    return {(layer, index) for layer, site, index in neurons if site in ("gate", "up")}


def gain(grid: Grid, sets: Sets, found: Gains) -> Table:
    """What each relation's AP set and gain set do to it, and to the others on average.

    drop, its interval and p as in `drop_table`, q over this table. n_products: how many products
    of the MLPs the set sets to zero. others_drop: the unweighted mean over the other relations.
    """
    gains = {c.relation: c.name for c in grid.of_kind("gain") if c.relation in found.sets}
    rows: list[Row] = []
    for relation in [name for name in relations(grid) if name in gains]:
        off = {"ap": (sets_off(grid).get(relation), sets), "gain": (gains[relation], found.sets)}
        for method, (condition, known) in off.items():
            if condition is None:
                continue
            own = outcomes(grid, relation, condition)
            others = others_under(grid, relation, condition)
            rows.append(
                [
                    *(relation, method, grid.conditions[condition].n_neurons),
                    *(len(products(known.get(relation, ()))), own.n, own.n_before, own.n_after),
                    *shares(own.drop, *own.intervals().drop),
                    *(own.lost, own.gained, own.p_value, Share(others.drop.mean)),
                ]
            )
    return Table("Neurons by average precision and by gain, switched off", GAIN, with_q(GAIN, rows))


def gain_overlap(sets: Sets, found: Gains) -> Table:
    """How many products both sets of a relation set to zero, and whether the two scores agree.

    p is hypergeometric, that random sets of these sizes share as many; q over the relations. NaN
    where a set sets no product to zero.
    """
    rows: list[Row] = []
    for relation in [name for name in sets if name in found.sets]:
        by_ap, by_gain = products(sets[relation]), products(found.sets[relation])
        shared, sizes = len(by_ap & by_gain), (len(by_ap), len(by_gain))
        share = Share(shared / len(by_gain) if by_gain else NAN)
        expected = len(by_ap) * len(by_gain) / found.n_products
        p = overlap_p(shared, *sizes, found.n_products) if all(sizes) else NAN
        correlation = found.correlation.get(relation, NAN)
        rows.append([relation, *sizes, shared, share, expected, correlation, p])
    title = "Products that both sets of a relation set to zero"
    return Table(title, GAIN_OVERLAP, with_q(GAIN_OVERLAP, rows))
