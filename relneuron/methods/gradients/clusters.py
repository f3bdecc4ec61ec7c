"""Query-relevant neurons: clusters, inverse cluster attribution, common neurons (QRNCA).

`rank.py` calls it; the method is that of arXiv 2406.10868 [P] and of the code that its authors
published (tigerchen52/qrneuron) [C]. A neuron is its flat place l * F + i.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Scores = dict[int, float]  # by neuron

DECIMALS = 6  # [C]


def passed(attributions: Array, threshold: float, decimals: int = DECIMALS) -> Scores:
    """The neurons of one prompt above `threshold` times its largest attribution (N,): strict.

    Their attributions are rounded to `decimals` [C]. Without a positive attribution there is none.
    """
    values = np.asarray(attributions, np.float64).reshape(-1)
    above = np.flatnonzero(values > threshold * float(values.max(initial=0.0)))
    return dict(zip(above.tolist(), np.round(values[above], decimals).tolist(), strict=True))


def cluster(prompts: Sequence[Mapping[int, float]]) -> Scores:
    """A query's neurons: the union over its prompts, each with the sum where it passed."""
    total: Scores = {}
    for one in prompts:
        for place, value in one.items():
            total[place] = total.get(place, 0.0) + value
    return total


@dataclass(frozen=True)
class Chosen:
    """The neurons of each query, best first, and what was made on the way."""

    sets: list[list[tuple[int, float]]]  # (neuron, its naica)
    scores: list[Scores]  # naica of every neuron of each cluster
    common: frozenset[int]


def query_neurons(
    clusters: Sequence[Scores], *, top: int = 20, common: float = 0.3, remove: bool = True
) -> Chosen:
    """The neurons that answer each query and not most others (section 3).

    na  = a neuron's sum over the sum of its cluster [C]; 0 where that is not above 0
    ica = ln(|C| / (df + 1)): |C| queries, of which df have the neuron in their cluster
    naica = na * ica

    A query keeps the `top` neurons with the largest naica above 0; of equal ones the lower place
    comes first. Then those are taken off that are common: df > int(|C| * common). So fewer than
    `top` may be left. `remove` False leaves them in, as the published code does, which compares a
    text with a list and so removes none.
    """
    n = len(clusters)
    df = Counter(place for one in clusters for place in one)
    limit = int(n * common)
    shared = frozenset(place for place, times in df.items() if times > limit)
    scores, sets = [], []
    for one in clusters:
        total = sum(one.values())
        naica = {
            place: (value / total if total > 0 else 0.0) * math.log(n / (df[place] + 1))
            for place, value in one.items()
        }
        best = sorted((p for p in naica if naica[p] > 0), key=lambda p: (-naica[p], p))[:top]
        scores.append(naica)
        sets.append([(p, naica[p]) for p in best if not (remove and p in shared)])
    return Chosen(sets, scores, shared)
