"""Intervals and tests for the analyses: exact where that is possible, seeded where it is not.

Every other module of the analyses calls it; it knows numbers only, no relations and no files.
NaN stands for what cannot be tested.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.report.tables import Array

Counts = NDArray[np.int64]

N_RESAMPLES = 1000
ENDS = (0.025, 0.975)  # of a 95 % interval
NAN = float("nan")


class Interval(NamedTuple):
    """A 95 % interval, of a bootstrap by percentiles (Efron and Tibshirani 1993, 13.3)."""

    low: float
    high: float


UNKNOWN = Interval(NAN, NAN)


def percentile_interval(resampled: Array) -> Interval:
    """The 2.5 and 97.5 percentiles, interpolated linearly; NaN where nothing was resampled."""
    return Interval(*np.quantile(resampled, ENDS).tolist()) if resampled.size else UNKNOWN


def wilson_interval(share: float, n: int) -> Interval:
    """Wilson's 95 % score interval of a share of n cases (Wilson 1927).

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.96.
    """
    z = NormalDist().inv_cdf(ENDS[1])
    middle = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = ((middle + side * half) / (1 + z**2 / n) for side in (-1, 1))
    return Interval(max(0.0, low), min(1.0, high))


class Paired(NamedTuple):
    """Intervals of the accuracy before, the accuracy after, and the drop between them."""

    before: Interval
    after: Interval
    drop: Interval


def paired_bootstrap(facts: Counts, seed: int = 0) -> Paired:
    """Intervals over resampled facts, each of which was asked once or more, before and after.

    `facts`: (F, 3) of each fact the prompts that ask it, those right before, those right after.
    Facts are drawn, with all their prompts, as the prompts of a fact are no independent cases (a
    cluster bootstrap; Davison and Hinkley 1997, 3.8). To draw F facts with replacement makes the
    numbers of facts of each kind multinomial with F trials; so the numbers are drawn. The drop is
    (before - after) / before; resamples with nothing right before are left out of it.

    Where all resamples have the same accuracy, as with all or no answers right, the interval is
    Wilson's with n = F. Where they all have the same drop, its interval is NaN.
    """
    if not len(facts):
        return Paired(UNKNOWN, UNKNOWN, UNKNOWN)
    # Under many sets a relation's facts often go the same way.
    return _of_kinds(tuple(sorted(Counter(map(tuple, facts.tolist())).items())), seed)


@lru_cache(maxsize=1 << 14)
def _of_kinds(facts: tuple[tuple[tuple[int, ...], int], ...], seed: int) -> Paired:
    """`paired_bootstrap` of so many facts of each kind."""
    kinds, times = (np.array(some, np.int64) for some in zip(*facts, strict=True))
    n_facts = int(times.sum())
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n_facts, times / n_facts, size=N_RESAMPLES)
    n, before, after = (drawn @ kinds).T
    some = before > 0
    drop = percentile_interval((before[some] - after[some]) / before[some])
    return Paired(
        _accuracy_interval(before / n, n_facts),
        _accuracy_interval(after / n, n_facts),
        UNKNOWN if drop.low == drop.high else drop,
    )


def _accuracy_interval(resampled: Array, n_facts: int) -> Interval:
    low, high = percentile_interval(resampled)
    return wilson_interval(low, n_facts) if low == high else Interval(low, high)


def resampled(n: int, seed: int = 0) -> NDArray[np.float64]:
    """How often each of n cases is drawn in each of R resamples with replacement: (R, n)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / max(n, 1)), size=N_RESAMPLES).astype(np.float64)


def ratio_bootstrap(before: Array, after: Array, seed: int = 0) -> Interval:
    """The interval of mean(after) / mean(before) over resampled pairs, (N,) and (N,)."""
    n = before.size
    if not n or not np.isfinite([before, after]).all():
        return UNKNOWN
    drawn = resampled(n, seed)
    return percentile_interval((drawn @ after) / (drawn @ before))


def sign_flip_p(changes: Counts) -> float:
    """The exact two-sided sign-flip test of paired counts, (F,) int: P(|sum of +-d| >= |sum of d|).

    d is by how many right answers a fact changed. If the neurons do nothing, a fact is as likely
    to gain d as to lose d, so every sign is a fair coin (Fisher 1935, section 21). Where every d
    is -1, 0 or 1 this is McNemar's exact test; 1 if nothing changed.
    """
    times = Counter(np.abs(changes[changes != 0]).tolist())
    return _flipped(tuple(sorted(times.items())), abs(int(changes.sum())))


@lru_cache(maxsize=1 << 14)
def _flipped(times: tuple[tuple[int, int], ...], total: int) -> float:
    """`sign_flip_p` of so many changes of each size, which sum to `total`."""
    chance = np.ones(1)  # of the sum of those |d| whose sign is +, from 0 on
    for size, n in times:
        positive = np.zeros(size * n + 1)
        positive[::size] = _heads(n)
        chance = np.convolve(chance, positive)
    sums = 2 * np.arange(chance.size) - (chance.size - 1)
    return min(1.0, float(chance[np.abs(sums) >= total].sum()))


def _heads(n: int) -> list[float]:
    """The chances of 0 to n heads of n fair coins: integers over 2**n, rounded once."""
    ways = accumulate(range(n), lambda found, k: found * (n - k) // (k + 1), initial=1)
    return [found / 2**n for found in ways]


def q_values(p: Sequence[float] | Array) -> Array:
    """Adjusted p-values of Benjamini and Hochberg (1995) over the finite p; NaN stays NaN.

    q is the least false discovery rate at which a case is chosen: {q <= fdr} holds a share of at
    most fdr of cases where there is nothing, on average. That is proved for cases independent of
    each other (that their p-values share one null does no harm: arXiv 2104.08279) or positively
    dependent; for others it is the usual approximation.
    """
    from scipy.stats import false_discovery_control

    q = np.array(p, np.float64)
    tested = np.isfinite(q)
    if tested.any():
        q[tested] = false_discovery_control(q[tested], method="bh")
    return q


def overlap_p(shared: int, n_first: int, n_second: int, n_all: int) -> float:
    """P(two random sets of these sizes out of `n_all` share at least `shared`), hypergeometric."""
    return float(overlap_ps(np.array([[shared, n_first, n_second]]), n_all)[0])


def overlap_ps(pairs: Counts, n_all: int) -> Array:
    """`overlap_p` of many pairs (P, 3) of shared, n_first and n_second, in one call."""
    from scipy.stats import hypergeom

    # Of many pairs most are alike, and scipy takes them one by one.
    kinds, place = np.unique(pairs.reshape(-1, 3), axis=0, return_inverse=True)
    shared, n_first, n_second = kinds.T
    found: Array = hypergeom.sf(shared - 1, n_all, n_first, n_second)[place.reshape(-1)]
    return found


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


def signed_rank_ps(samples: Sequence[Array]) -> list[float]:
    """The p of `signed_rank` of each sample; samples of one kind are tested in one call."""
    from scipy.stats import wilcoxon

    p = [NAN] * len(samples)
    # scipy chooses one way to compute p for a call: by the number of differences and by ties.
    alike: dict[tuple[int, bool], list[int]] = {}
    changed = [sample[sample != 0] for sample in samples]
    for place, (sample, some) in enumerate(zip(samples, changed, strict=True)):
        if not sample.size or np.isnan(sample).any():
            continue
        if some.size:
            has_ties = np.unique(np.abs(some)).size < some.size
            alike.setdefault((some.size, has_ties), []).append(place)
        else:
            p[place] = 1.0
    for places in alike.values():
        found = wilcoxon(np.stack([changed[place] for place in places]), axis=1).pvalue
        for place, value in zip(places, np.atleast_1d(found).tolist(), strict=True):
            p[place] = value
    return p


def signed_rank_rows(differences: Array) -> Array:
    """The p of `signed_rank` of each row of (C, n), n > 0; rows of one kind are tested at once."""
    from scipy.stats import wilcoxon

    p = np.full(len(differences), NAN)
    is_whole = (differences != 0).all(1) & ~np.isnan(differences).any(1)
    has_ties = (np.diff(np.sort(np.abs(differences), axis=1), axis=1) == 0).any(1)
    for rows in (is_whole & has_ties, is_whole & ~has_ties):
        if rows.any():
            p[rows] = wilcoxon(differences[rows], axis=1).pvalue
    p[~is_whole] = signed_rank_ps(list(differences[~is_whole]))
    return p


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
