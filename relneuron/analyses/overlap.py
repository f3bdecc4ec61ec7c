"""Which neurons sets share: with each other, with sets of concepts, and whether sharing explains.

`run_all` calls these; methods A10.4 and 10 (arXiv 2502.17355, sections 4, 5.2 and 5.4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.analyses.outcomes import Row, outcomes, sets_off, with_q
from relneuron.analyses.uncertainty import NAN, overlap_p, overlap_ps, q_values, spearman
from relneuron.artifact.effects import Grid
from relneuron.artifact.neurons import Neuron
from relneuron.report.tables import Share, Table

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
    names, shared = list(sets), shared_counts(sets)
    size = np.array([len(sets[name]) for name in names], np.int64)
    first, second = np.triu_indices(len(names), 1)
    p = np.full(shared.shape, NAN)
    p[first, second] = overlap_ps(
        np.stack([shared[first, second], size[first], size[second]], axis=1), n_neurons
    )
    q = np.full(shared.shape, NAN)
    q[first, second] = q_values(p[first, second])
    for tests in (p, q):
        tests[second, first] = tests[first, second]
    rows: list[Row] = []
    for i, j in product(range(len(names)), repeat=2):
        n, share = int(shared[i, j]), Share(shared[i, j] / size[i] if size[i] else NAN)
        expected = int(size[i]) * int(size[j]) / n_neurons
        rows.append([names[i], names[j], n, share, expected, float(p[i, j]), float(q[i, j])])
    return Table("Neurons that two sets share", OVERLAP, rows)


def shared_counts(sets: Sets) -> NDArray[np.int64]:
    """How many neurons every two sets have in common, (S, S)."""
    owners: dict[Neuron, list[int]] = {}
    for place, chosen in enumerate(sets.values()):
        for neuron in set(chosen):
            owners.setdefault(neuron, []).append(place)
    # Neurons of the same sets are counted at once.
    times = Counter(map(tuple, owners.values()))
    shared = np.zeros((len(sets), len(sets)), np.int64)
    for places, n in times.items():
        shared[np.ix_(places, places)] += n
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
    off = sets_off(grid)
    common, place = shared_counts(sets), {name: i for i, name in enumerate(sets)}
    pairs = []
    for a, b in permutations([name for name, chosen in sets.items() if chosen], 2):
        drop = outcomes(grid, a, off.get(b)).drop
        if np.isfinite(drop):
            pairs.append((int(common[place[a], place[b]]), drop))
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
