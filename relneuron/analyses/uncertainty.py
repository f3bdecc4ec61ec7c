"""Intervals and tests for the analyses: exact where that is possible, seeded where it is not.

Every other module of the analyses calls it; it knows numbers only, no relations and no files.
NaN stands for what cannot be tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

N_RESAMPLES = 1000
ENDS = (0.025, 0.975)  # of a 95 % interval
NAN = float("nan")


class Interval(NamedTuple):
    """The percentile interval of a bootstrap (Efron and Tibshirani 1993, 13.3)."""

    low: float
    high: float


UNKNOWN = Interval(NAN, NAN)


def percentile_interval(resampled: Array) -> Interval:
    """The 2.5 and 97.5 percentiles, interpolated linearly; NaN where nothing was resampled."""
    return Interval(*np.quantile(resampled, ENDS).tolist()) if resampled.size else UNKNOWN


class Paired(NamedTuple):
    """Intervals of the accuracy before, the accuracy after, and the drop between them."""

    before: Interval
    after: Interval
    drop: Interval


def paired_bootstrap(kept: int, lost: int, gained: int, wrong: int, seed: int = 0) -> Paired:
    """Intervals over resampled prompts, each of which was answered before and after.

    Drawing n prompts with replacement makes the counts of the four outcomes (right both times,
    right then wrong, wrong then right, wrong both times) multinomial with n trials and their
    shares as probabilities; so the counts are drawn, and no prompt is. The drop is
    (before - after) / before; resamples with nothing right before are left out of it.
    """
    n = kept + lost + gained + wrong
    if not n:
        return Paired(UNKNOWN, UNKNOWN, UNKNOWN)
    shares = np.array([kept, lost, gained, wrong]) / n
    counts = np.random.default_rng(seed).multinomial(n, shares, size=N_RESAMPLES)
    before, after = counts[:, 0] + counts[:, 1], counts[:, 0] + counts[:, 2]
    some = before > 0
    drop = (before[some] - after[some]) / before[some]
    return Paired(*map(percentile_interval, (before / n, after / n, drop)))


def ratio_bootstrap(before: Array, after: Array, seed: int = 0) -> Interval:
    """The interval of mean(after) / mean(before) over resampled pairs, (N,) and (N,)."""
    n = before.size
    if not n or not np.isfinite([before, after]).all():
        return UNKNOWN
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)
    return percentile_interval((drawn @ after) / (drawn @ before))


def mcnemar_p(lost: Any, gained: Any) -> Array:
    """McNemar's exact test of paired answers, two-sided, of counts of any one shape.

    The p-value of a fair coin for `lost` of lost + gained changed answers; 1 if none changed.
    """
    from scipy.stats import binom

    n = np.add(lost, gained)
    result: Array = np.minimum(1.0, 2 * binom.cdf(np.minimum(lost, gained), n, 0.5))
    return result


def q_values(p: Sequence[float] | Array) -> Array:
    """Adjusted p-values of Benjamini and Hochberg (1995) over the finite p; NaN stays NaN."""
    from scipy.stats import false_discovery_control

    q = np.array(p, np.float64)
    tested = np.isfinite(q)
    if tested.any():
        q[tested] = false_discovery_control(q[tested], method="bh")
    return q


def overlap_p(shared: int, n_first: int, n_second: int, n_all: int) -> float:
    """P(two random sets of these sizes out of `n_all` share at least `shared`), hypergeometric."""
    from scipy.stats import hypergeom

    return float(hypergeom.sf(shared - 1, n_all, n_first, n_second))


def signed_rank(differences: Array) -> tuple[float, float]:
    """Wilcoxon's signed-rank test, two-sided: (statistic, p); differences of 0 are left out.

    Exact up to 50 differences without ties and up to 13 with ties, normal beyond (scipy's choice).
    Nothing but zeros has p = 1.
    """
    from scipy.stats import wilcoxon

    if not differences.size or np.isnan(differences).any():
        return NAN, NAN
    changed = differences[differences != 0]
    if not changed.size:
        return 0.0, 1.0
    found = wilcoxon(changed)
    return float(found.statistic), float(found.pvalue)


def rank_sum_p(first: Array, second: Array) -> float:
    """The p-value of Mann and Whitney's U test, two-sided; NaN if a sample is empty."""
    from scipy.stats import mannwhitneyu

    if not first.size or not second.size:
        return NAN
    return float(mannwhitneyu(first, second).pvalue)


def spearman(x: Array, y: Array) -> tuple[float, float]:
    """Spearman's rank correlation and its two-sided p; NaN below 3 pairs or for a constant."""
    from scipy.stats import spearmanr

    if x.size < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return NAN, NAN
    found = spearmanr(x, y)
    return float(found.statistic), float(found.pvalue)
