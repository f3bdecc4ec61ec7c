"""Which neurons sets share: with each other, with sets of concepts, and whether sharing explains.

`run_all` calls these; methods A10.4 and 10 (arXiv 2502.17355, sections 4, 5.2 and 5.4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.analyses.outcomes import Row, effects, sets_off, with_q
from relneuron.analyses.uncertainty import NAN, overlap_p, overlap_ps, q_values, spearman
from relneuron.artifact.effects import Grid
from relneuron.artifact.neurons import Neuron
from relneuron.report.tables import Column, Rows, Share, Table

Sets = Mapping[str, Sequence[Neuron]]

OVERLAP = ("relation", "other", "shared", "share", "expected", "p_value", "q_value")
VERSATILITY = ("n_relations", "n_neurons", "share")
CONCEPTS = ("relation", "concept", "shared", "share", "expected", "drop", "p_value", "q_value")


def _shared(a: Sequence[Neuron], b: Sequence[Neuron], n_neurons: int) -> list[float]:
    """Neurons in both, their share of a, and how many two random sets would share: |A||B| / n."""
    shared = len(set(a) & set(b))
    return [shared, Share(shared / len(a) if a else NAN), len(a) * len(b) / n_neurons]


def overlap(sets: Sets, n_neurons: int, of: Collection[str] | None = None) -> Table:
    """The table of `overlap_columns`, a row a pair."""
    return Table("Neurons that two sets share", OVERLAP, Rows(overlap_columns(sets, n_neurons, of)))


def overlap_columns(sets: Sets, n_neurons: int, of: Collection[str] | None = None) -> list[Column]:
    """How many neurons every two sets share, and the chance that random sets share as many.

    `n_neurons` the model has. p is hypergeometric, q over the pairs; NaN for a set with itself.
    `of`: names of sets, each of which is compared with all; without it all are.
    """
    names = list(sets)
    own = [i for i, name in enumerate(names) if of is None or name in of]
    shared = shared_counts(sets, own)
    size = np.array([len(sets[name]) for name in names], np.int64)
    # A pair of two such sets is one test, and has two rows.
    twin = np.full(len(names), -1, np.int64)
    twin[own] = range(len(own))
    is_tested = (twin < 0) | (twin > np.arange(len(own))[:, None])
    first, second = np.nonzero(is_tested)
    p = np.full(shared.shape, NAN)
    pairs = np.stack([shared[first, second], size[own][first], size[second]], axis=1)
    p[first, second] = overlap_ps(pairs, n_neurons)
    q = np.full(shared.shape, NAN)
    q[first, second] = q_values(p[first, second])
    both = twin[second] >= 0
    here, there = (first[both], second[both]), (twin[second[both]], np.array(own, int)[first[both]])
    for tests in (p, q):
        tests[there] = tests[here]
    length = size[own][:, None]
    share = shared / np.where(length, length, NAN)
    expected = length * size / n_neurons
    row, other = np.indices(shared.shape)
    return [
        Column(np.array(own, np.int64)[row.ravel()], names),
        Column(other.ravel(), names),
        Column(shared.ravel()),
        Column(share.ravel(), is_share=True),
        *(Column(values.ravel()) for values in (expected, p, q)),
    ]


def shared_counts(sets: Sets, of: Sequence[int] | None = None) -> NDArray[np.int64]:
    """How many neurons every two sets have in common, (S, S); of some sets with all, (O, S)."""
    owners: dict[Neuron, list[int]] = {}
    for place, chosen in enumerate(sets.values()):
        for neuron in set(chosen):
            owners.setdefault(neuron, []).append(place)
    # Neurons of the same sets are counted at once.
    times = Counter(map(tuple, owners.values()))
    own = range(len(sets)) if of is None else of
    row = {place: i for i, place in enumerate(own)}
    shared = np.zeros((len(row), len(sets)), np.int64)
    for places, n in times.items():
        shared[np.ix_([row[place] for place in places if place in row], places)] += n
    return shared


def versatility(sets: Sets) -> Table:
    """How many neurons are in just 1, 2, ... of the sets, and their share of all chosen ones."""
    times = Counter(Counter(neuron for chosen in sets.values() for neuron in set(chosen)).values())
    rows: list[Row] = [
        [n, times[n], Share(times[n] / times.total())] for n in range(1, max(times, default=0) + 1)
    ]
    return Table("Neurons by the number of sets they are in", VERSATILITY, rows)


class OverlapEffect(NamedTuple):
    """Spearman's correlation over ordered pairs of relations, which are not independent."""

    rho: float
    p_value: float
    n_pairs: int


def overlap_effect(sets: Sets, grid: Grid) -> OverlapEffect:
    """Neurons that two sets share against the drop of the first relation with the second's off.

    Over pairs of different relations that both have neurons and whose drop is defined.
    """
    off, asked = sets_off(grid), {name: i for i, name in enumerate(grid.relations)}
    filled = [(place, name) for place, (name, chosen) in enumerate(sets.items()) if chosen]
    known = [(place, name) for place, name in filled if name in asked]
    rows, columns = (np.array([place for place, _ in some], np.int64) for some in (known, filled))
    common = shared_counts(sets, rows.tolist())[:, columns].astype(np.float64)
    drops = effects(grid, [off.get(name) for _, name in filled]).drop
    drops = drops[np.array([asked[name] for _, name in known], np.int64)]
    is_pair = np.isfinite(drops) & (columns != rows[:, None])
    return OverlapEffect(*spearman(common[is_pair], drops[is_pair]), int(is_pair.sum()))


def concepts(sets: Sets, concept_sets: Sets, grid: Grid, n_neurons: int) -> Table:
    """Relations against kinds of subjects: neurons that their sets share, and the concept's effect.

    drop: of the relation's accuracy with the concept's set off. q over all pairs.
    """
    off = {condition.relation: condition.name for condition in grid.of_kind("concept")}
    asked = {name: i for i, name in enumerate(grid.relations)}
    drops = dict(
        zip(concept_sets, effects(grid, [*map(off.get, concept_sets)]).drop.T, strict=True)
    )
    rows: list[Row] = []
    for relation, concept in product(sets, concept_sets):
        own, other = sets[relation], concept_sets[concept]
        shared = _shared(own, other, n_neurons)
        drop = float(drops[concept][asked[relation]]) if relation in asked else NAN
        p = overlap_p(int(shared[0]), len(own), len(other), n_neurons)
        rows.append([relation, concept, *shared, Share(drop), p])
    return Table("Relations and kinds of subjects", CONCEPTS, with_q(CONCEPTS, rows))
