"""p-values, q-values and intervals: uniform where nothing is, and equal to what others compute.

Others are scikit-learn and the enumeration of all arrangements; test_rank.py has the stage.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from sklearn.metrics import average_precision_score

from relneuron import ops
from relneuron.analyses.uncertainty import q_values
from relneuron.methods.responses import significance
from relneuron.methods.responses.significance import (
    bootstrap_interval,
    fdr_resolution,
    noise_ap,
    p_values,
    permutation_p,
    resamples,
    seed_of,
    shuffled_labels,
)

N, POSITIVES = 150, 30
ROW = np.array([1] * POSITIVES + [0] * (N - POSITIVES), np.int8)


def noise(n_columns: int, n_levels: int | None = None) -> torch.Tensor:
    """Columns that know nothing of the labels; with `n_levels` their values are tied."""
    rng = np.random.default_rng(1)
    if n_levels:
        return torch.from_numpy(rng.integers(0, n_levels, (N, n_columns)).astype(np.float32))
    return torch.from_numpy(rng.standard_normal((N, n_columns)))


def ap(values: torch.Tensor, row: Any = ROW) -> np.ndarray[Any, Any]:
    return ops.average_precision(values, torch.from_numpy(row)[None])[0].numpy()


# Calibration


def test_p_values_of_nothing_are_uniform() -> None:
    values = noise(1500)
    scores = ap(values)
    assert kstest(permutation_p(values, shuffled_labels(ROW, 999, 1), scores), "uniform")[1] > 0.01
    null = noise_ap(ROW[None], 20_000, 2)[0]
    assert kstest(p_values(scores, null), "uniform")[1] > 0.01
    # The same would be said of p-values a hundredth part too low, were this no test.
    assert kstest(p_values(scores + 0.02, null), "uniform")[1] < 0.01


@pytest.mark.parametrize("n_levels", [1, 2, 3, 10])
def test_permutation_p_is_valid_with_ties(n_levels: int) -> None:
    values = noise(1500, n_levels)
    p = permutation_p(values, shuffled_labels(ROW, 499, 1), ap(values))
    for level in (0.01, 0.05, 0.1, 0.5):
        assert (p <= level).mean() <= level + 3 * np.sqrt(level * (1 - level) / 1500)
    if n_levels == 1:
        assert (p == 1).all()


def test_planted_neurons_are_found_and_few_others() -> None:
    values = noise(1500)
    values[:POSITIVES, :50] += 1.5
    scores = ap(values)
    p = permutation_p(values, shuffled_labels(ROW, 999, 1), scores)
    assert (p[:50] == 1 / 1000).mean() > 0.95
    q = q_values(p_values(scores, noise_ap(ROW[None], 50_000, 2)[0]))
    found = np.flatnonzero(q <= 0.1)
    assert (q[:50] <= 0.1).mean() > 0.95
    assert (found >= 50).mean() < 0.2
    # Without planted neurons, next to nothing is left.
    q = q_values(p_values(scores[50:], noise_ap(ROW[None], 50_000, 2)[0]))
    assert (q <= 0.1).sum() <= 2


# Values


def test_q_values_by_hand() -> None:
    # Sorted: 0.005, 0.01, 0.03, 0.04, 0.2 times 5 / rank, then the least from the right.
    q = q_values(np.array([0.01, 0.04, 0.03, 0.005, 0.2]))
    np.testing.assert_allclose(q, [0.025, 0.05, 0.05, 0.025, 0.2])


def test_p_values_count_the_score_itself_and_what_is_equal() -> None:
    null = np.array([0.1, 0.2, 0.2, 0.5], np.float32)
    scores = np.array([[0.05, 0.2], [0.3, 0.6]], np.float32)
    np.testing.assert_array_equal(p_values(scores, null), [[1, 0.8], [0.4, 0.2]])


@pytest.mark.parametrize(
    ("m", "n", "fdr"), [(1000, 999, 0.1), (2208, 1000, 0.05), (70, 100_000, 0.05), (50, 19, 0.05)]
)
def test_fdr_resolution_is_the_smallest_set_that_passes(m: int, n: int, fdr: float) -> None:
    least = fdr_resolution(m, n, fdr)
    for k, passes in ((least - 1, False), (least, True)):
        q = q_values(np.array([1 / (1 + n)] * k + [1.0] * (m - k)))
        assert (q[:k] <= fdr).all() == (passes or not k)


@pytest.mark.parametrize("n_levels", [None, 3])
def test_permutation_p_of_all_arrangements_is_the_exact_test(n_levels: int | None) -> None:
    row = np.array([1, 0, 1, 0, 0, 1, 0], np.int8)
    values = noise(20, n_levels)[:7]
    arrangements = np.zeros((35, 7), np.int8)
    for place, positives in enumerate(itertools.combinations(range(7), 3)):
        arrangements[place, list(positives)] = 1
    null = np.array(
        [
            [average_precision_score(labels, column) for column in values.T.numpy()]
            for labels in arrangements
        ]
    )
    truth = np.array(
        [average_precision_score(row, column) for column in values.T.numpy()], np.float32
    )
    n_reached = (null.astype(np.float32) >= truth).sum(0)
    scores = ap(values, row)
    np.testing.assert_array_equal(permutation_p(values, arrangements, scores), (1 + n_reached) / 36)
    # Random shuffles come close to the exact p-value.
    exact = n_reached / 35
    p = permutation_p(values, shuffled_labels(row, 20_000, 3), scores)
    assert (np.abs(p - exact) <= 1e-4 + 4 * np.sqrt(exact * (1 - exact) / 20_000)).all()


def test_shuffles_keep_the_counts_and_who_is_left_out() -> None:
    row = np.array([1, -1, 0, 0, 1, -1, 0], np.int8)
    shuffled = shuffled_labels(row, 300, 5)
    assert shuffled.shape == (300, 7) and shuffled.dtype == np.int8
    assert ((shuffled == -1) == (row == -1)).all()
    assert ((shuffled == 1).sum(1) == 2).all()
    assert len(np.unique(shuffled, axis=0)) == 10
    assert (shuffled_labels(row, 300, 5) == shuffled).all()
    assert (shuffled_labels(row, 300, 6) != shuffled).any()


def test_the_interval_is_of_scikit_learns_scores() -> None:
    row = np.concatenate([ROW, np.full(10, -1, np.int8)])
    values = torch.cat([noise(4), noise(4)[:10]])
    values[:, 2:] = values[:, 2:].round(decimals=1)
    weights = resamples(row, 9, 3)
    assert weights.dtype == np.uint8
    assert (weights[:, row == 1].sum(1) == POSITIVES).all()
    assert (weights[:, row == 0].sum(1) == N - POSITIVES).all()
    assert not weights[:, row == -1].any() and (weights > 1).any()
    drawn = [
        [
            average_precision_score(row[row >= 0], column[row >= 0], sample_weight=w[row >= 0])
            for column in values.T.numpy()
        ]
        for w in weights
    ]
    truth = np.quantile(drawn, [0.05, 0.95], axis=0)
    np.testing.assert_allclose(bootstrap_interval(values, row, weights, 0.9), truth, rtol=1e-6)


def test_the_interval_covers_the_true_score() -> None:
    """Normal values, one apart: the true AP is that of a sample too large to matter."""
    rng = np.random.default_rng(11)
    labels = np.repeat([1, 0], [100_000, 400_000]).astype(np.int8)
    truth = ap(torch.from_numpy(rng.standard_normal((500_000, 1)) + labels[:, None]), labels)[0]
    values = noise(500)
    values[:POSITIVES] += 1
    low, high = bootstrap_interval(values, ROW, resamples(ROW, 400, 3))
    assert 0.88 < ((low <= truth) & (truth <= high)).mean() < 0.99
    assert ((low <= ap(values)) & (ap(values) <= high)).mean() > 0.99
    # A narrower level is a narrower interval; a perfect ranking has no width.
    narrow = bootstrap_interval(values, ROW, resamples(ROW, 400, 3), 0.5)
    assert (narrow[0] > low).mean() > 0.99 and (narrow[1] < high).mean() > 0.99
    perfect = torch.from_numpy(ROW.astype(np.float32))[:, None]
    assert bootstrap_interval(perfect, ROW, resamples(ROW, 40, 3)).tolist() == [[1], [1]]


def test_blocks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.stack([ROW, ROW[::-1], np.where(np.arange(N) < 100, ROW, -1)]).astype(np.int8)
    values, scores = noise(40), ap(noise(40))

    def everything() -> list[Any]:
        return [
            noise_ap(labels, 500, 1),
            permutation_p(values, shuffled_labels(ROW, 50, 1), scores),
            bootstrap_interval(values, ROW, resamples(ROW, 50, 1)),
        ]

    try:
        torch.set_num_threads(2)
        whole = everything()
        torch.set_num_threads(1)
        monkeypatch.setattr(significance, "BLOCK_BYTES", 5000)
        for ours, theirs in zip(everything(), whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    finally:
        torch.set_num_threads(1)
    # A relation's noise is the same whatever the order of the relations.
    np.testing.assert_array_equal(noise_ap(labels[::-1], 500, 1), whole[0][::-1])
    assert noise_ap(labels, 0, 1).shape == (3, 0)


def test_each_use_has_a_seed_of_its_own() -> None:
    uses = itertools.product(("noise", "bootstrap"), (0, 1), ("a", "b"))
    assert len({seed_of(*use) for use in uses}) == 8
    assert seed_of("noise", 0) == seed_of("noise", 0, "")
