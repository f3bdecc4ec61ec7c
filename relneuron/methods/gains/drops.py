"""What zeroing cost: means and drops of every condition of a comparison, with intervals.

The `attribute` stage makes comparison.csv with it, of what `intervene` measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.ablation.rows import Answered
from relneuron.artifact.files import RelneuronError
from relneuron.methods.gains.comparison import Array, Row

N_RESAMPLES, ENDS = 1000, (0.025, 0.975)  # of a 95 % bootstrap interval


class Summary(NamedTuple):
    """One row of comparison.csv. Intervals are NaN where there is only one fact."""

    condition: str
    relation: str  # "": all
    n: int
    mrr: float  # mean of 1 / rank
    prob: float
    logprob: float
    mrr_drop: float  # (clean mean - mean) / clean mean
    prob_drop: float
    logprob_drop: float  # clean mean - mean, nats
    mrr_drop_low: float
    mrr_drop_high: float
    prob_drop_low: float
    prob_drop_high: float
    logprob_drop_low: float
    logprob_drop_high: float


def summary(
    rows: Iterable[Row], facts: Mapping[str, int] | None = None, *, seed: int = 0
) -> list[Summary]:
    """Means and drops of every condition over all sentences and over those of each relation.

    The intervals are 95 % bootstrap intervals by percentiles over 1,000 resamples of facts, each
    drawn with its sentences and their answers under all conditions, so a drop is paired with
    clean. `facts`: the fact that a sentence says, by id; default: each one of its own. Rows of a
    condition that did not ask what `clean` asked are refused.
    """
    by_condition: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_condition.setdefault(row.condition, {})[row.id] = row
    asked = by_condition.get("clean", {})
    for name, answers in by_condition.items():
        if answers.keys() != asked.keys():
            raise RelneuronError(
                f"{name} was not asked the sentences that clean was asked",
                "make it again with: relneuron attribute MODEL PROMPTS -o DIR --force",
            )
    values = np.array(
        [
            [(1 / a.rank, a.prob, a.logprob) for a in (answers[i] for i in asked)]
            for answers in by_condition.values()
        ]
    ).reshape(len(by_condition), len(asked), 3)
    relation = np.array([row.relation for row in asked.values()])
    numbers = np.array([(facts or {}).get(i, -1 - n) for n, i in enumerate(asked)])
    return summarise(list(by_condition), relation, numbers, values, seed=seed)


def measures(answered: Answered) -> Array:
    """1 / rank, probability and log-probability of every condition and sentence: (C, n, 3)."""
    return np.stack([1 / answered.rank, answered.prob, answered.logprob], -1)


def summarise(
    conditions: Sequence[str],
    relation: NDArray[np.str_],
    facts: NDArray[np.int64],
    values: Array,
    *,
    seed: int = 0,
) -> list[Summary]:
    """`summary` of `measures` (C, n, 3), and of each sentence (n,) its relation and its fact."""
    found = []
    for kind in ("", *dict.fromkeys(relation.tolist())):
        rows_of = relation == kind if kind else np.ones(len(relation), bool)
        found += _summaries(list(conditions), kind, values[:, rows_of], facts[rows_of], seed)
    return found


def _summaries(
    conditions: Sequence[str], relation: str, values: Array, facts: NDArray[np.int64], seed: int
) -> list[Summary]:
    """Of values (C, n, 3), clean among the conditions, and the sentences' facts (n,)."""
    n = values.shape[1]
    if not n:
        return []
    clean = conditions.index("clean")
    means = values.mean(1)
    drops = _drops(means, clean)
    rng = np.random.default_rng(seed)
    # Facts in the order of their first sentences.
    _, first, place = np.unique(facts, return_index=True, return_inverse=True)
    place = np.argsort(np.argsort(first))[place]
    n_facts = len(first)
    sums = np.zeros((n_facts, means.size + 1))
    np.add.at(sums, place, np.c_[values.transpose(1, 0, 2).reshape(n, -1), np.ones(n)])
    drawn = (rng.multinomial(n_facts, np.full(n_facts, 1 / n_facts)) for _ in range(N_RESAMPLES))
    resampled = np.stack([times @ sums for times in drawn])
    parts = (resampled[:, :-1] / resampled[:, -1:]).reshape(N_RESAMPLES, *means.shape)
    low, high = np.quantile(_drops(parts, clean), ENDS, axis=0)
    if n_facts == 1:
        low, high = np.full_like(low, np.nan), np.full_like(high, np.nan)
    ends = np.stack([low, high], -1).reshape(len(conditions), 6)
    return [
        Summary(name, relation, n, *means[c].tolist(), *drops[c].tolist(), *ends[c].tolist())
        for c, name in enumerate(conditions)
    ]


def _drops(means: Array, clean: int) -> Array:
    """(..., C, 3): relative of MRR and probability, absolute of log-probability; NaN of 0."""
    base = means[..., clean : clean + 1, :]
    divisor = np.where(base > 0, base, np.nan)
    divisor[..., 2] = 1
    result: Array = (base - means) / divisor
    return result
