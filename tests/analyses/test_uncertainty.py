"""The numbers of the analyses against scipy, plain resampling and the method's vectors."""

from __future__ import annotations

import json
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, false_discovery_control, hypergeom, wilcoxon

from relneuron.analyses import macro_micro
from relneuron.analyses.answers import relative_difference
from relneuron.analyses.outcomes import Outcomes
from relneuron.analyses.uncertainty import (
    N_RESAMPLES,
    overlap_p,
    overlap_ps,
    paired_bootstrap,
    percentile_interval,
    q_values,
    rank_sum_p,
    ratio_bootstrap,
    sign_flip_p,
    signed_rank,
    signed_rank_ps,
    spearman,
    wilson_interval,
)
from tests.conftest import SHARED


def one_each(kept: int, lost: int, gained: int, wrong: int) -> np.ndarray:
    """(F, 3): facts of one prompt each, by whether they are right before and after."""
    kinds = [[1, 1, 1], [1, 1, 0], [1, 0, 1], [1, 0, 0]]
    return np.repeat(np.array(kinds), (kept, lost, gained, wrong), axis=0)


def index_bootstrap(facts: np.ndarray, seed: int) -> list[list[float]]:
    """Low and high of accuracy before, after and drop, from resampled facts."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(facts), size=(20_000, len(facts)))
    n, before, after = (facts[:, column][drawn].sum(1) for column in range(3))
    drop = ((before - after)[before > 0]) / before[before > 0]
    return [np.percentile(values, [2.5, 97.5]).tolist() for values in (before / n, after / n, drop)]


# Facts asked by one to three prompts.
MIXED = np.array([[2, 2, 0], [2, 1, 1], [1, 1, 1], [3, 3, 1], [2, 0, 1], [2, 2, 2], [1, 0, 0]] * 6)


@pytest.mark.parametrize(
    "facts",
    [*(one_each(*counts) for counts in [(20, 15, 3, 12), (3, 0, 9, 28), (40, 5, 0, 5)]), MIXED],
)
def test_counts_resampled_give_the_intervals_of_facts_resampled(facts: np.ndarray) -> None:
    many = np.array([paired_bootstrap(facts, seed=seed) for seed in range(10)])
    expected = index_bootstrap(facts, seed=1)
    # An accuracy moves in steps of 1/50, and so do the ends; the drop of the second is skewed.
    np.testing.assert_allclose(many.mean(0)[:2], expected[:2], atol=0.02)
    np.testing.assert_allclose(many.mean(0)[2], expected[2], rtol=0.15, atol=0.03)


def test_a_fact_asked_twice_is_no_two_facts() -> None:
    """Two templates that always go together say as much as one."""
    once = one_each(20, 15, 3, 12)
    assert paired_bootstrap(2 * once) == paired_bootstrap(once)
    changes = once[:, 2] - once[:, 1]
    assert sign_flip_p(2 * changes) == sign_flip_p(changes)
    assert sign_flip_p(np.repeat(changes, 2)) < sign_flip_p(changes) / 10


def test_an_interval_covers_the_true_accuracy_about_as_often_as_it_says() -> None:
    shares = [0.4, 0.3, 0.1, 0.2]
    drawn = np.random.default_rng(3).multinomial(200, shares, size=300)
    found = [paired_bootstrap(one_each(*counts.tolist())) for counts in drawn]
    for name, truth in (("before", 0.7), ("after", 0.5), ("drop", 2 / 7)):
        ends = [getattr(one, name) for one in found]
        covered = np.mean([low <= truth <= high for low, high in ends])
        assert 0.91 <= covered <= 0.985, name


def test_a_bootstrap_is_seeded_and_knows_its_limits() -> None:
    some = one_each(5, 3, 2, 4)
    assert paired_bootstrap(some) == paired_bootstrap(some, seed=0)
    assert paired_bootstrap(some) == paired_bootstrap(some[::-1])
    assert paired_bootstrap(some) != paired_bootstrap(some, seed=1)
    never = paired_bootstrap(one_each(0, 0, 2, 2))
    assert np.isnan(never.drop).all() and 0 <= never.after.low < never.after.high <= 1
    assert np.isnan(np.array(paired_bootstrap(one_each(0, 0, 0, 0)))).all()
    # One prompt of two right before: a quarter of the resamples has none; the others' drop is 1.
    assert np.isnan(paired_bootstrap(one_each(0, 1, 0, 1)).drop).all()


def test_accuracies_that_no_resample_moves_have_wilson_s_interval() -> None:
    for right, n in [(0, 1), (0, 6), (6, 6), (3, 7), (50, 50), (999, 1000)]:
        expected = binomtest(right, n).proportion_ci(method="wilson")
        assert wilson_interval(right / n, n) == pytest.approx(tuple(expected), abs=1e-12)
    sure = paired_bootstrap(one_each(0, 6, 0, 0))
    assert (sure.before, sure.after) == (wilson_interval(1, 6), wilson_interval(0, 6))
    assert (sure.before.high, sure.after.low) == (1, 0) and sure.after.high > 0.3
    assert np.isnan(sure.drop).all()
    # Twelve prompts of six facts are six cases; so are facts that are all half right.
    np.testing.assert_array_equal(paired_bootstrap(2 * one_each(0, 6, 0, 0)), sure)
    assert paired_bootstrap(np.array([[2, 1, 1]] * 6)).before == wilson_interval(0.5, 6)


def test_percentile_interval_by_hand() -> None:
    assert percentile_interval(np.arange(41.0)) == (1.0, 39.0)


def test_ratio_bootstrap_resamples_pairs() -> None:
    before = np.array([10.0, 20.0, 70.0, 35.0, 90.0])
    low, high = ratio_bootstrap(before, 1.5 * before)
    assert low == pytest.approx(1.5) and high == pytest.approx(1.5)
    after = before * [1.1, 0.9, 1.4, 1.0, 1.2]
    drawn = np.random.default_rng(5).integers(5, size=(20 * N_RESAMPLES, 5))
    expected = np.percentile(after[drawn].sum(1) / before[drawn].sum(1), [2.5, 97.5])
    found = np.mean([ratio_bootstrap(before, after, seed) for seed in range(10)], axis=0)
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert np.isnan(ratio_bootstrap(before, np.full(5, math.nan))).all()
    assert np.isnan(ratio_bootstrap(before[:0], after[:0])).all()


def test_sign_flips_of_single_prompts_are_mcnemar_s_exact_test() -> None:
    pairs = [(lost, gained) for lost in range(13) for gained in range(13) if lost + gained]
    for lost, gained in [*pairs, (150, 90), (900, 1100)]:
        facts = one_each(5, lost, gained, 7)
        expected = binomtest(lost, lost + gained).pvalue
        assert sign_flip_p(facts[:, 2] - facts[:, 1]) == pytest.approx(expected, rel=1e-11)
    assert sign_flip_p(np.zeros(4, np.int64)) == 1
    assert sign_flip_p(np.full(5, -1)) == 2 / 32


def test_sign_flips_are_those_of_every_sign() -> None:
    rng = np.random.default_rng(8)
    for n in (1, 2, 5, 9):
        for _ in range(8):
            changes = rng.integers(-3, 4, size=n)
            sums = [np.dot(signs, changes) for signs in product((-1, 1), repeat=n)]
            expected = np.mean([abs(one) >= abs(changes.sum()) for one in sums])
            assert sign_flip_p(changes) == pytest.approx(expected, rel=1e-12)


def test_q_values_are_those_of_scipy_over_the_finite_p() -> None:
    p = np.random.default_rng(0).random(50)
    np.testing.assert_array_equal(q_values(p), false_discovery_control(p))
    np.testing.assert_allclose(q_values([0.01, math.nan, 0.04, 0.03]), [0.03, math.nan, 0.04, 0.04])
    np.testing.assert_array_equal(q_values([math.nan]), [math.nan])
    assert q_values([]).size == 0


def test_overlap_p_is_the_upper_tail() -> None:
    expected = sum(hypergeom.pmf(k, 20, 6, 8) for k in (4, 5, 6))
    assert overlap_p(4, 6, 8, 20) == pytest.approx(expected, rel=1e-12)
    assert overlap_p(0, 6, 8, 20) == overlap_p(0, 0, 8, 20) == 1
    # All of a set of 3 in a set of 4 out of 10: C(4, 3) / C(10, 3).
    assert overlap_p(3, 3, 4, 10) == pytest.approx(4 / 120)


def test_rank_tests_and_what_they_cannot_say() -> None:
    difference = np.array([0.5, -1.0, 2.0, 0.0, 3.0])
    assert signed_rank(difference) == tuple(wilcoxon(difference[difference != 0]))
    # Ranks 1, 2, 3, 4 with one negative of rank 2: P(W <= 2) = 3/16 on each side.
    assert signed_rank(difference) == (2.0, pytest.approx(6 / 16))
    assert signed_rank(np.zeros(3)) == (0.0, 1.0)
    assert np.isnan(signed_rank(np.empty(0))).all()
    assert np.isnan(signed_rank(np.array([1.0, math.nan]))).all()
    # All of 3 below all of 2: one of C(5, 2) arrangements, on each side.
    assert rank_sum_p(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0])) == pytest.approx(0.2)
    assert np.isnan(rank_sum_p(np.empty(0), np.array([1.0])))
    rho, p = spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 9.0]))
    assert rho == pytest.approx(0.8) and p == pytest.approx(0.2)
    assert np.isnan(spearman(np.ones(4), np.arange(4.0))).all()
    assert np.isnan(spearman(np.arange(2.0), np.arange(2.0))).all()


def vectors(name: str) -> Any:
    path = SHARED / "methods" / "vectors.json"
    if not path.exists():
        pytest.skip("the method's vectors are not beside this checkout")
    return json.loads(path.read_text(encoding="utf-8"))[name]


def test_drop_of_the_method_s_vector() -> None:
    vector = vectors("accuracy_drop")
    found = [
        [drop_of(round(100 * before), round(100 * after)) for after in row]
        for before, row in zip(
            vector["acc_original"], vector["acc_deactivated_rows_ri_cols_rj"], strict=True
        )
    ]
    np.testing.assert_allclose(found, vector["drop"], rtol=0, atol=1e-15)


def drop_of(n_before: int, n_after: int) -> float:
    """Of 100 prompts, of which as many as possible stay right."""
    kept = min(n_before, n_after)
    counts = kept, n_before - kept, n_after - kept, 100 - max(n_before, n_after)
    return Outcomes(*counts, one_each(*counts)).drop


def test_macro_and_micro_of_the_method_s_vector() -> None:
    assert np.isnan(macro_micro([])).all()
    assert np.isnan(macro_micro([(0, 0)])).all()
    vector = vectors("cumulativity")
    found = macro_micro(vector["relations_total_affected"])
    assert found == pytest.approx((vector["macro"], vector["micro"]), abs=1e-15)


def test_frequency_difference_of_the_method_s_vector() -> None:
    assert math.isnan(relative_difference(3.0, 0.0))
    vector = vectors("relative_frequency_difference")
    groups = vector["group_a_resilient"], vector["group_b_sensitive"]
    assert relative_difference(*groups) == vector["diff"]


def test_many_pairs_and_samples_at_once_are_as_one_by_one() -> None:
    rng = np.random.default_rng(3)
    pairs = rng.integers(0, 30, (200, 3))
    pairs[:, 0] = np.minimum(pairs[:, 0], pairs[:, 1:].min(axis=1))
    found = overlap_ps(pairs, 60)
    expected = [
        sum(math.comb(a, k) * math.comb(60 - a, b - k) for k in range(shared, min(a, b) + 1))
        / math.comb(60, b)
        for shared, a, b in pairs.tolist()
    ]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-300)
    samples = [rng.normal(0.2, 1, n) for n in (1, 2, 5, 12, 12, 13, 50, 50, 51, 80)]
    samples += [np.round(sample) for sample in samples]  # ties and zeros
    samples += [np.empty(0), np.zeros(4), np.array([1.0, np.nan])]
    one_by_one = [signed_rank(sample)[1] for sample in samples]
    assert signed_rank_ps(samples) == pytest.approx(one_by_one, rel=1e-12, nan_ok=True)
