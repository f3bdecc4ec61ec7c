"""LAPE on counts: the worked example, an independent implementation in torch, ties and limits."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.artifact.files import RelneuronError
from relneuron.methods.counts.lape import (
    activation_probability,
    entropies,
    highest_mean,
    highest_probability,
    lape,
    random_choice,
)

# Worked by hand: two layers of five neurons, three groups; the counts of each neuron per group.
E1 = [
    [[900, 100, 200], [500, 500, 1000], [0, 0, 0], [50, 50, 1900], [10, 0, 0]],
    [[700, 20, 10], [300, 310, 590], [0, 800, 0], [600, 610, 20], [400, 30, 40]],
]
E1_TOKENS = np.array([1000, 1000, 2000])
E1_ENTROPY = [
    [0.60016609, 1.09861229, 0, 0.38050623, 0],
    [0.16725018, 1.09839916, 0, 0.73497203, 0.42361116],
]


def e1(precision: str = "float32") -> Any:
    count = np.array(E1, np.int64).transpose(2, 0, 1)
    return activation_probability(count, E1_TOKENS, precision=precision)


def random_probability(seed: int, groups: int, layers: int, width: int) -> Any:
    rng = np.random.default_rng(seed)
    p = rng.beta(0.3, 4, (1, layers, width)) * np.exp(rng.normal(0, 1, (groups, layers, width)))
    tokens = rng.integers(1 << 17, 1 << 20, groups)
    count = np.minimum(np.rint(p * tokens[:, None, None]), tokens[:, None, None])
    return count.astype(np.int64), tokens


def by_the_formulas(probability: Any, top_rate: float, filter_rate: float, bar_ratio: float) -> Any:
    """The same in plain torch: entropy with the filter in it, who is chosen, who belongs where."""
    p = torch.from_numpy(np.moveaxis(probability, 0, -1).copy())
    share = torch.nan_to_num(p.double() / p.double().sum(-1, keepdim=True), nan=0.0)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    flat = p.flatten()
    threshold = flat.kthvalue(round(flat.numel() * filter_rate)).values
    entropy[~(p > threshold).any(-1)] = math.inf
    value, chosen = entropy.flatten().topk(round(entropy.numel() * top_rate), largest=False)
    bar = flat.kthvalue(round(flat.numel() * bar_ratio)).values
    belongs = p.flatten(0, 1)[chosen] > bar
    members = [set(chosen[belongs[:, g]].tolist()) for g in range(p.shape[-1])]
    return set(chosen.tolist()), members, float(value.max()), float(threshold), float(bar)


def test_entropies_of_the_worked_example() -> None:
    found = entropies(e1())
    assert found.dtype == np.float64 and not np.signbit(found).any()
    np.testing.assert_array_equal(found.round(8), E1_ENTROPY)
    expected = []
    for counts in (neuron for layer in E1 for neuron in layer):
        p = [n / tokens for n, tokens in zip(counts, E1_TOKENS.tolist(), strict=True)]
        expected.append(-sum(x / sum(p) * math.log(x / sum(p)) for x in p if x))
    exact = entropies(e1("float64")).reshape(-1)
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("top_rate", "chosen", "members"),
    [
        (0.2, [7, 5], [[5], [7], []]),
        (0.3, [7, 5, 3], [[5], [7], [3]]),
        (0.4, [7, 5, 3, 0], [[0, 5], [7], [3]]),
        (0.5, [7, 5, 3, 0, 8], [[0, 5, 8], [7, 8], [3]]),
    ],
)
def test_sets_of_the_worked_example(
    top_rate: float, chosen: list[int], members: list[list[int]]
) -> None:
    found = lape(e1(), top_rate=top_rate, filter_rate=0.8, bar_ratio=0.8)
    assert (found.threshold, found.bar, found.candidates) == (0.5, 0.5, 5)
    assert found.chosen.tolist() == chosen
    assert [row.tolist() for row in found.members] == members
    assert all(row.dtype == np.int64 for row in (found.chosen, *found.members))


def test_more_are_wanted_than_pass_the_filter() -> None:
    found = lape(e1(), top_rate=0.9, filter_rate=0.8, bar_ratio=0.8)
    assert found.chosen.tolist() == [7, 5, 3, 0, 8]
    assert (found.wanted, found.candidates) == (9, 5)
    assert lape(e1(), top=2, filter_rate=0.8, bar_ratio=0.8).chosen.tolist() == [7, 5]


def test_rates_of_zero_and_one() -> None:
    nothing_filtered = lape(e1(), top_rate=0.3, filter_rate=0, bar_ratio=0)
    assert nothing_filtered.threshold == nothing_filtered.bar == -math.inf
    # The three with the entropy 0, the dead one among them: equal ones by flat index.
    assert nothing_filtered.chosen.tolist() == [2, 4, 7]
    assert [row.tolist() for row in nothing_filtered.members] == [[2, 4, 7]] * 3
    nothing_left = lape(e1(), top_rate=1, filter_rate=1, bar_ratio=1)
    assert nothing_left.candidates == 0 and nothing_left.wanted == 10
    assert [row.tolist() for row in nothing_left.members] == [[], [], []]


def test_half_is_rounded_to_even() -> None:
    # 2 neurons in 5 groups: 10 values. k = round(2.5) = 2, round(3.5) = 4.
    p = np.arange(1, 11).reshape(5, 1, 2) / 10
    assert lape(p, filter_rate=0.25, bar_ratio=0.35).threshold == 0.2
    assert lape(p, filter_rate=0.25, bar_ratio=0.35).bar == 0.4


def test_ties_go_to_the_lowest_flat_index() -> None:
    p = np.full((2, 3, 20), 0.001)
    p[0, :, ::2] = 0.5
    found = lape(p, top=7, filter_rate=0.5, bar_ratio=0.5)
    assert found.chosen.tolist() == list(range(0, 14, 2))
    assert found.members[1].tolist() == []


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_7b_model_equals_plain_torch_and_is_fast(precision: str) -> None:
    count, tokens = random_probability(3, 7, 32, 11008)
    started = time.perf_counter()
    probability = activation_probability(count, tokens, precision=precision)
    found = lape(probability)
    elapsed = time.perf_counter() - started
    print(f"LAPE of 32 x 11008 x 7, {precision}: {elapsed:.2f} s")
    assert elapsed < 10
    chosen, members, cut, threshold, bar = by_the_formulas(probability, 0.01, 0.95, 0.95)
    assert (found.threshold, found.bar, found.chosen.size) == (threshold, bar, 3523)
    # Two sums of the same numbers may differ in the last digits: at the cut, either may be chosen.
    entropy = found.entropy.reshape(-1)
    band = set(np.flatnonzero(abs(entropy - cut) < 1e-12).tolist())
    assert len(band) < 20
    assert set(found.chosen.tolist()) - band == chosen - band
    for own, theirs in zip(found.members, members, strict=True):
        assert set(own.tolist()) - band == theirs - band
    # With equal rates every chosen neuron is in a set.
    assert set(np.concatenate(found.members).tolist()) == set(found.chosen.tolist())
    assert (np.diff(entropy[found.chosen]) >= 0).all()


def test_float32_rounds_both_numbers_before_the_division() -> None:
    n = (1 << 24) + 1
    count, tokens = np.array([[[n, 3]]]), np.array([n + 2])
    found = activation_probability(count, tokens, precision="float32")
    expected = torch.tensor([n, 3], dtype=torch.int32) / torch.tensor(n + 2)
    assert found.reshape(-1).tolist() == expected.tolist()
    assert activation_probability(count, tokens).dtype == np.float32  # the default
    exact = activation_probability(count, tokens, precision="float64")
    assert exact.reshape(-1).tolist() == [n / (n + 2), 3 / (n + 2)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_rate": 1.5}, "--top-rate must be from 0 to 1, got 1.5"),
        ({"filter_rate": -0.1}, "--filter-rate"),
        ({"bar_ratio": math.nan}, "--bar-ratio"),
    ],
)
def test_rates_outside_of_0_to_1(changes: dict[str, float], words: str) -> None:
    with pytest.raises(RelneuronError, match=words):
        lape(e1(), **changes)


def test_bad_probabilities_and_counts() -> None:
    with pytest.raises(RelneuronError, match="over 1 groups"):
        lape(e1()[:1])
    broken = e1()
    broken[0, 1, 2] = math.nan
    with pytest.raises(RelneuronError, match="not all finite"):
        lape(broken)
    with pytest.raises(RelneuronError, match="--precision 'half'"):
        e1("half")
    one = np.array([[[3, 4]]])
    with pytest.raises(RelneuronError, match="group 0 has 0 tokens"):
        activation_probability(one, np.array([0]))
    with pytest.raises(RelneuronError, match="3 tokens, but counts from 3 to 4"):
        activation_probability(one, np.array([3]))
    with pytest.raises(RelneuronError, match="counts from -4 to -3"):
        activation_probability(-one, np.array([9]))


def test_baselines_take_the_highest_of_each_group() -> None:
    rng = np.random.default_rng(0)
    total = rng.integers(-3, 4, (3, 2, 30)).astype(np.float64)  # with many ties
    tokens = np.array([1, 2, 4])
    for found, values in (
        (highest_probability(abs(total), 11), abs(total)),
        (highest_mean(total, tokens, 11), total / tokens[:, None, None]),
    ):
        for (order, score), row in zip(found, values.reshape(3, -1).tolist(), strict=True):
            expected = sorted(range(60), key=lambda i: (-row[i], i))[:11]
            assert order.tolist() == expected
            assert score.tolist() == [row[i] for i in expected]
    with pytest.raises(RelneuronError, match="sums are not all finite"):
        highest_mean(np.full((1, 1, 2), math.inf), np.array([1]), 1)
    with pytest.raises(RelneuronError, match="without tokens"):
        highest_mean(total, np.array([1, 0, 1]), 1)


def test_random_draws_depend_on_seed_and_name_only() -> None:
    a, b = random_choice(["a", "b"], 1000, 50, 0)
    again = random_choice(["c", "a"], 1000, 50, 0)[1]
    assert a[0].tolist() == again[0].tolist() == sorted(set(a[0].tolist()))
    assert a[0].size == 50 and not a[1].any()
    assert a[0].tolist() != b[0].tolist()
    assert a[0].tolist() != random_choice(["a"], 1000, 50, 1)[0][0].tolist()
    assert random_choice(["a"], 3, 50, 1)[0][0].tolist() == [0, 1, 2]
