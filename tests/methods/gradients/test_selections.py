"""What is chosen of attributions: the published vectors, and plain restatements of the rules."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from relneuron.methods.gradients.clusters import Scores, cluster, passed, query_neurons
from relneuron.methods.gradients.consistency import consistency, consistency_aware, otsu
from relneuron.methods.gradients.facts import coarse, counted, refined, stepped, without
from relneuron.methods.gradients.shares import group_shares, specific

WIDTH = 10


def places(*found: int) -> np.ndarray[Any, Any]:
    return np.array(found, np.int64)


# --- knowledge neurons -----------------------------------------------------------------------


def test_a_coarse_set_is_strictly_above_its_threshold() -> None:
    values = np.array([[0.5, 1.0, 0.3], [-2.0, 0.30000001, 0.0]])
    assert coarse(values, "adaptive", 0.3).tolist() == [0, 1, 4]
    assert coarse(values, "absolute", 0.5).tolist() == [1]
    # numpy: of (-2, 0, .3, .30000001, .5, 1) the 50th percentile is .300000005
    assert coarse(values, "percentile", 50).tolist() == [0, 1, 4]
    assert coarse(-values.clip(0), "adaptive", 0.3).size == 0
    assert coarse(np.zeros(5), "adaptive", 0.3).size == 0


def test_a_neuron_of_half_of_the_prompts_is_not_of_more_than_half() -> None:
    """Vector E5: counts (3, 2, 1) over 4 prompts."""
    sets = [places(7, 8, 9), places(7, 8), places(7), places()]
    assert counted(sets) == {7: 3, 8: 2, 9: 1}
    assert refined(sets, 0.5).tolist() == [7]
    assert refined(sets, 0.49).tolist() == [7, 8]
    assert refined(sets, 0).tolist() == [7, 8, 9]
    # 0.29 * 100 is 28.999999999999996 in binary.
    assert refined([places(1)] * 29 + [places()] * 71, 0.29).size == 0


def test_negative_prompts_take_their_neurons_off() -> None:
    assert without(places(1, 2, 3), [places(2), places(5, 3)]).tolist() == [1]
    assert without(places(1, 2), []).tolist() == [1, 2]


def facts_of(counts: list[int], n: int) -> list[np.ndarray[Any, Any]]:
    """n coarse sets in which neuron i is counts[i] times."""
    return [places(*(i for i, times in enumerate(counts) if times > k)) for k in range(n)]


def test_the_step_rule_ends_where_the_mean_size_is_in_aim() -> None:
    # By 20 prompts: at 0.7 one neuron has more than 14, at 0.65 two have more than 13.
    fact = facts_of([15, 14, 13, 3], 20)
    assert stepped([fact]) == (Fraction(13, 20), 2.0, True)
    many = facts_of([19, 18, 18, 17, 17, 17, 1], 20)
    assert stepped([many]) == (Fraction(17, 20), 3.0, True)  # more than 17 of 20
    assert stepped([many, fact])[2]


def test_the_step_rule_says_when_no_share_is_in_aim() -> None:
    # From six neurons to none in one step.
    cliff = facts_of([15] * 6, 20)
    assert stepped([cliff]) == (Fraction(7, 10), 6.0, False)  # 6 is nearer to 5 than 0 to 2
    assert stepped([[places(1), places(2)]])[1:] == (2.0, True)
    assert stepped([[places(), places()]]) == (Fraction(7, 10), 0.0, False)
    always = [places(*range(9))] * 3
    found = stepped([always])
    assert found == (Fraction(19, 20), 9.0, False)


# --- query-relevant neurons: vector E4 --------------------------------------------------------

E4: list[list[dict[tuple[int, int], float]]] = [
    [
        {(1, 3): 1.0, (2, 7): 0.5, (0, 4): 0.2, (2, 9): 0.19},
        {(1, 3): 0.8, (2, 7): 0.1, (2, 9): 0.4},
        {(1, 3): 0.6, (0, 4): 0.3, (2, 9): 0.05},
    ],
    [
        {(2, 9): 0.9, (0, 4): 0.5},
        {(2, 9): 1.0, (3, 1): 0.25},
        {(2, 9): 0.7, (3, 1): 0.2},
    ],
    [{(2, 9): 0.3, (3, 5): 0.6}, {(3, 5): 0.5, (2, 9): 0.5}, {(3, 5): 0.4}],
    [{(2, 9): 0.4, (2, 7): 0.4}, {(2, 9): 0.2, (1, 8): 1.0}, {(1, 8): 0.6}],
]


def dense(entries: dict[tuple[int, int], float]) -> np.ndarray[Any, Any]:
    values = np.full((4, WIDTH), -0.1)
    for place, value in entries.items():
        values[place] = value
    return values


def e4_clusters() -> list[Scores]:
    return [cluster([passed(dense(p), 0.2) for p in prompts]) for prompts in E4]


def named(scores: Any) -> dict[tuple[int, int], float]:
    return {divmod(place, WIDTH): value for place, value in dict(scores).items()}


def test_clusters_of_the_vector() -> None:
    found = [named(one) for one in e4_clusters()]
    assert found[0] == pytest.approx({(1, 3): 2.4, (2, 7): 0.5, (2, 9): 0.4, (0, 4): 0.3})
    assert set(found[1]) == {(2, 9), (0, 4), (3, 1)}


def test_query_neurons_of_the_vector() -> None:
    found = query_neurons(e4_clusters(), top=2, common=0.3)
    assert {divmod(p, WIDTH) for p in found.common} == {(0, 4), (2, 7), (2, 9)}
    expected = {(1, 3): 0.46209812, (2, 7): 0.03995584, (0, 4): 0.02397351, (2, 9): -0.02479373}
    assert named(found.scores[0]) == pytest.approx(expected, abs=5e-9)
    final: list[dict[tuple[int, int], float]] = [
        {(1, 3): 0.46209812},
        {(3, 1): 0.08786373},
        {(3, 5): 0.45205251},
        {(1, 8): 0.46209812},
    ]
    assert [named(one) for one in found.sets] == [pytest.approx(e, abs=5e-9) for e in final]


def test_the_published_code_keeps_common_neurons() -> None:
    """As it ran on the vector: it compares "2_7" with [2, 7], so that none is removed."""
    found = query_neurons(e4_clusters(), top=2, common=0.3, remove=False)
    ran = [[(1, 3), (2, 7)], [(3, 1), (0, 4)], [(3, 5)], [(1, 8), (2, 7)]]
    assert [list(named(one)) for one in found.sets] == ran


def test_a_query_without_a_positive_attribution_has_an_empty_cluster() -> None:
    assert passed(np.array([-1.0, 0.0]), 0.2) == {}
    assert query_neurons([cluster([{}]), {}]).sets == [[], []]
    # Rounded to nothing: the sum of the cluster is not above 0.
    tiny = cluster([passed(np.array([1e-8, 2e-8]), 0.2)])
    assert tiny == {0: 0.0, 1: 0.0} and query_neurons([tiny, {}]).sets[0] == []
    assert passed(np.array([1e-8, 2e-8]), 0.2, decimals=9) == {0: 1e-8, 1: 2e-8}


def test_equal_scores_are_in_the_order_of_the_neurons() -> None:
    found = query_neurons([{5: 1.0, 2: 1.0, 9: 1.0}, {1: 1.0}, {3: 1.0}], top=2, common=0.9)
    assert [place for place, _ in found.sets[0]] == [2, 5]


# --- query localization: vector E5 ------------------------------------------------------------


def test_consistency_of_the_vector() -> None:
    a, b, c, d, e = range(5)
    assert consistency([places(a, b, c), places(b, c, d), places(c, e)]) == (0.2, 0.4)


def test_nothing_to_compare_has_no_consistency() -> None:
    assert np.isnan(consistency([places(1, 2)])).all()
    assert np.isnan(consistency([places(), places()])).all()
    assert consistency([places(1), places()]) == (0, 0)


def test_consistency_aware_scores_of_the_vector() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.7, 0.1, 0.1], [0.8, 0.1, 0.9]])
    expected = [0.53550510, 0.07, 0.25202041]
    assert consistency_aware(scores) == pytest.approx(expected, abs=5e-9)
    assert consistency_aware(scores, unbiased=True) == pytest.approx([0.53, 0.07, 0.23])
    assert consistency_aware(scores[:1], unbiased=True) == pytest.approx(0.7 * scores[0])


def otsu_by_search(values: list[float]) -> float:
    """The least variance within the two sides, which is the same cut; in whole fractions."""

    def within(cut: Fraction) -> Fraction:
        sides = [[v for v in exact if v <= cut], [v for v in exact if v > cut]]
        means = [Fraction(sum(side), len(side)) for side in sides]
        squares = [(v - mean) ** 2 for side, mean in zip(sides, means, strict=True) for v in side]
        return sum(squares, Fraction(0))

    exact = [Fraction(v) for v in values]
    return float(min(sorted({*exact})[:-1], key=within))


@pytest.mark.parametrize("seed", range(20))
def test_otsu_is_the_cut_with_the_least_variance_within(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.round(rng.beta(0.4, 0.8, size=rng.integers(2, 30)), 3)
    if len({*values}) > 1:
        assert otsu(values) == otsu_by_search(values.tolist())


def test_otsu_of_two_heaps_and_of_one() -> None:
    assert otsu(np.array([0.1, 0.12, 0.8, np.nan, 0.82])) == 0.12
    assert np.isnan(otsu(np.array([0.5, 0.5]))) and np.isnan(otsu(np.array([])))


# --- relevance -------------------------------------------------------------------------------


def test_specific_neurons_have_their_share() -> None:
    relevance = np.array([[4.0, 1.0, 0.0, 3.0, 3.0], [4.0, 0.5, 0.0, 0.0, 1.0]])
    shares = group_shares(relevance)
    assert shares[:, 0].tolist() == [0.5, 0.5] and np.isnan(shares[:, 2]).all()
    assert specific(relevance, 3, 0.5) == [[(0, 4.0), (3, 3.0), (4, 3.0)], [(0, 4.0)]]
    assert specific(relevance, 9, 0.51) == [[(3, 3.0), (4, 3.0), (1, 1.0)], []]


def test_rules_hold_for_random_sets() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(1, 8))
        sets = [np.flatnonzero(rng.random(12) < 0.4) for _ in range(n)]
        share = Fraction(int(rng.integers(0, 20)), 20)
        plain = [p for p in range(12) if sum(p in s for s in sets) > share * n]
        assert refined(sets, float(share)).tolist() == plain
        union = {p for s in sets for p in s.tolist()}
        if n > 1 and union:
            pairs = [{*a} & {*b} for a, b in itertools.combinations([s.tolist() for s in sets], 2)]
            strict = set.intersection(*({*s.tolist()} for s in sets))
            assert consistency(sets) == (
                len(strict) / len(union),
                len(set().union(*pairs)) / len(union),
            )
