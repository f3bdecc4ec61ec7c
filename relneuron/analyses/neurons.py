"""Which neurons sets share: with each other, with sets of concepts, and whether sharing explains.

`run_all` calls these; methods A10.4 and 10 (arXiv 2502.17355, sections 4, 5.2 and 5.4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations, product
from typing import NamedTuple

import numpy as np

from relneuron.analyses.outcomes import Row, outcomes, sets_off, with_q
from relneuron.analyses.uncertainty import NAN, overlap_p, q_values, spearman
from relneuron.artifact import Neuron
from relneuron.effects import Grid
from relneuron.tables import Share, Table

Sets = Mapping[str, Sequence[Neuron]]

OVERLAP = ("relation", "other", "shared", "share", "expected", "p_value", "q_value")
VERSATILITY = ("n_relations", "n_neurons", "share")
CONCEPTS = ("relation", "concept", "shared", "share", "expected", "drop", "p_value", "q_value")


def _shared(a: Sequence[Neuron], b: Sequence[Neuron], n_neurons: int) -> list[float]:
    """Neurons in both, their share of a, and how many two random sets would share: |A||B| / n."""
    shared = len(set(a) & set(b))
    return [shared, Share(shared / len(a) if a else NAN), len(a) * len(b) / n_neurons]


def overlap(sets: Sets, n_neurons: int) -> Table:
    """How many neurons every two sets share, and the chance that random sets share as many.

    `n_neurons` the model has. p is hypergeometric, q over the pairs; NaN for a set with itself.
    """
    pairs = list(combinations(sets, 2))
    sizes = [(len(set(sets[a]) & set(sets[b])), len(sets[a]), len(sets[b])) for a, b in pairs]
    p = [overlap_p(*size, n_neurons) for size in sizes]
    tests = dict(zip(pairs, zip(p, q_values(p).tolist(), strict=True), strict=True))
    rows: list[Row] = []
    for a, b in product(sets, repeat=2):
        test = tests.get((a, b)) or tests.get((b, a)) or (NAN, NAN)
        rows.append([a, b, *_shared(sets[a], sets[b], n_neurons), *test])
    return Table("Neurons that two sets share", OVERLAP, rows)


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
    off = sets_off(grid)
    pairs = []
    for a, b in permutations([name for name, chosen in sets.items() if chosen], 2):
        drop = outcomes(grid, a, off.get(b)).drop
        if np.isfinite(drop):
            pairs.append((len(set(sets[a]) & set(sets[b])), drop))
    shared, drops = np.array(pairs, np.float64).reshape(-1, 2).T
    return OverlapEffect(*spearman(shared, drops), len(pairs))


def concepts(sets: Sets, concept_sets: Sets, grid: Grid, n_neurons: int) -> Table:
    """Relations against kinds of subjects: neurons that their sets share, and the concept's effect.

    drop: of the relation's accuracy with the concept's set off. q over all pairs.
    """
    off = {condition.relation: condition.name for condition in grid.of_kind("concept")}
    rows: list[Row] = []
    for relation, concept in product(sets, concept_sets):
        own, other = sets[relation], concept_sets[concept]
        shared = _shared(own, other, n_neurons)
        drop = outcomes(grid, relation, off.get(concept)).drop
        p = overlap_p(int(shared[0]), len(own), len(other), n_neurons)
        rows.append([relation, concept, *shared, Share(drop), p])
    return Table("Relations and kinds of subjects", CONCEPTS, with_q(CONCEPTS, rows))
