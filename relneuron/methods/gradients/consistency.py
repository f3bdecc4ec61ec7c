"""Query localization: do the prompts of a fact have the same neurons (arXiv 2405.14117)?

`rank.py` calls it. The paper's equations for CS and CAS, and its numbers 0.7, 0.3 and 0.3, stand
here as they are recalled, not as they were read: the text of the paper could not be had. A neuron
is its flat place l * F + i, sets of them are ascending (K,) int64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from relneuron.methods.gradients.facts import Array, Places, counted

SCORES = ("cs1", "cs2")


def consistency(sets: Sequence[Places]) -> tuple[float, float]:
    """CS1 and CS2 of the sets N_1 ... N_k of a fact's prompts.

    CS1 = |those in every N_j| / |those in any|, the strict one;
    CS2 = |those in more than one N_j| / |those in any|, the relaxed one.
    NaN where a fact has one prompt, or no neuron at all: there is nothing to compare.
    """
    times = counted(sets)
    if len(sets) < 2 or not times:
        return np.nan, np.nan
    return (
        sum(n == len(sets) for n in times.values()) / len(times),
        sum(n > 1 for n in times.values()) / len(times),
    )


def otsu(scores: Array) -> float:
    """Otsu's threshold of scores (n,): those at most T and those above it differ most.

    T is the score with the largest w0 * w1 * (mu0 - mu1)^2 (IEEE Trans. SMC 9, 1979, eq. 14), the
    lowest of equal ones; w and mu are share and mean of the scores <= T and > T. No histogram: the
    scores are fractions of small numbers. NaN if they are not of two values at least.
    """
    values = np.sort(np.asarray(scores, np.float64))
    values = values[np.isfinite(values)]
    cuts = np.flatnonzero(np.diff(values)) + 1  # how many are at most each T
    if not cuts.size:
        return float("nan")
    below, n = np.cumsum(values), values.size
    mean0 = below[cuts - 1] / cuts
    mean1 = (below[-1] - below[cuts - 1]) / (n - cuts)
    between = cuts * (n - cuts) * (mean0 - mean1) ** 2
    return float(values[cuts[int(between.argmax())] - 1])


def consistency_aware(
    attributions: Array, weights: tuple[float, float] = (0.7, 0.3), *, unbiased: bool = False
) -> Array:
    """CAS (N,) float64 of a fact: weights[0] * mean - weights[1] * deviation over its prompts.

    `attributions` (k, N). The deviation is that of the population, or with `unbiased` of a sample,
    which one prompt does not have: it is 0 there.
    """
    values = np.asarray(attributions, np.float64)
    if unbiased:
        deviation = values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
    else:
        deviation = values.std(0)
    scores: Array = weights[0] * values.mean(0) - weights[1] * deviation
    return scores
