"""histogram.safetensors: what follows from it, beside numpy on the values themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.histogram import Histogram

GROUPS = ["en", "zh", "fr"]
SIZE, BINS = (2, 3), 16
Array = np.ndarray[Any, Any]


def values(seed: int = 0, n: int = 200) -> Array:
    """(G, L, F, n) float32; the last group of the first neuron has none (NaN)."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(3, *SIZE, n)).astype(np.float32)
    found *= np.ldexp(1, rng.integers(-3, 4, (3, *SIZE, 1))).astype(np.float32)
    found[2, 0, 0] = np.nan
    return found


def binned(of: Array, seed: int = 0) -> Histogram:
    """The histogram of values (G, L, F, n) by numpy, with bins that differ by neuron and seed."""
    rng = np.random.default_rng(seed)
    exponent = rng.integers(-3, 0, SIZE).astype(np.int32)
    first = rng.integers(-BINS, 0, SIZE).astype(np.int32)
    last = np.full(SIZE, BINS - 1, np.int32)
    count = np.zeros((3, *SIZE, BINS), np.int64)
    for place in np.ndindex(3, *SIZE):
        inner = np.ldexp(first[place[1:]] + np.arange(1.0, BINS), exponent[place[1:]])
        own = of[place][~np.isnan(of[place])]
        count[place] = np.bincount(np.searchsorted(inner, own, "right"), minlength=BINS)
    return Histogram(GROUPS, {"act": count}, {"act": exponent}, {"act": first}, {"act": last})


@pytest.mark.parametrize("group", [None, "en", "fr"])
@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_a_quantile_is_between_its_bounds(q: float, group: str | None) -> None:
    of = values()
    low, high = binned(of).quantile("act", q, group)
    for place in np.ndindex(SIZE):
        rows = of[:, *place] if group is None else of[GROUPS.index(group), *place]
        own = rows[~np.isnan(rows)]
        if not len(own):
            assert np.isnan(low[place])
            assert np.isnan(high[place])
            continue
        true = np.quantile(own, q, method="inverted_cdf")
        assert low[place] <= true <= high[place]
    finite = np.isfinite(low) & np.isfinite(high)
    assert (high > low)[finite].all()
    assert q in (0.0, 1.0) or finite.any()


def test_separation_is_between_its_bounds_and_exact_where_bins_tell_all_values_apart() -> None:
    of = values()
    histogram = binned(of)
    low, high = histogram.auroc("act", "zh")
    for place in np.ndindex(SIZE):
        own = of[1, *place]
        others = of[[0, 2], *place].ravel()
        others = others[~np.isnan(others)]
        true = np.mean((own[:, None] > others) + 0.5 * (own[:, None] == others))
        assert low[place] <= true <= high[place]
        assert high[place] - low[place] < 0.5
    whole = np.rint(of)
    inner = np.arange(-8.0, 8.0)
    count = np.zeros((3, *SIZE, BINS), np.int64)
    for place in np.ndindex(3, *SIZE):
        rows = whole[place][~np.isnan(whole[place])].clip(-8, 7)
        count[place] = np.bincount(np.searchsorted(inner, rows, "right") - 1, minlength=BINS)
    tables = ({"act": np.full(SIZE, n, np.int32)} for n in (0, -8, BINS - 1))
    low, high = Histogram(GROUPS, {"act": count}, *tables).auroc("act", "en")
    own, others = whole[0, 1, 2].clip(-8, 7), whole[1:, 1, 2].ravel().clip(-8, 7)
    assert low[1, 2] == pytest.approx(np.mean(own[:, None] > others))
    assert high[1, 2] == pytest.approx(np.mean(own[:, None] >= others))


def test_the_separation_of_a_group_that_has_no_values_is_unknown() -> None:
    low, high = binned(values()).auroc("act", "fr")
    assert np.isnan(low[0, 0])
    assert np.isnan(high[0, 0])
    assert np.isfinite(low[1]).all()


def test_counts_past_2_to_the_32_do_not_overflow() -> None:
    count = np.full((2, 1, 1, 2), 2**40, np.int64)
    tables = ({"act": np.full((1, 1), n, np.int32)} for n in (0, -1, 1))
    low, high = Histogram(["a", "b"], {"act": count}, *tables).auroc("act", "a")
    assert (low[0, 0], high[0, 0]) == (0.25, 0.75)


@pytest.mark.parametrize("threshold", [-3.0, -0.25, 0.0, 0.3, 2.0])
def test_rates_above_a_threshold_are_between_their_bounds(threshold: float) -> None:
    of = values()
    low, high = binned(of).rate_above("act", threshold, "en")
    true = (of[0] > threshold).mean(-1)
    assert (low <= true).all()
    assert (true <= high).all()
    assert (high - low < 1).all()


def test_equal_bins_are_added_as_they_are() -> None:
    one, other = binned(values(0)), binned(values(1))
    total = one + other
    assert (total.count["act"] == one.count["act"] + other.count["act"]).all()
    assert (total.last["act"] == BINS - 1).all()


def test_other_bins_are_added_exactly_at_the_edges_that_both_have() -> None:
    parts = [(values(seed), seed) for seed in (0, 1, 2)]
    made = [binned(of, seed) for of, seed in parts]
    together = np.concatenate([of for of, _ in parts], axis=-1)
    for total in (made[0] + made[1] + made[2], made[2] + (made[1] + made[0])):
        edges = total.edges("act")
        for g, layer, f in np.ndindex(3, *SIZE):
            own = together[g, layer, f]
            inner = edges[layer, f, 1:-1]
            inner = inner[np.isfinite(inner)]
            true = np.bincount(np.searchsorted(inner, own[~np.isnan(own)], "right"), minlength=BINS)
            assert total.count["act"][g, layer, f].tolist() == true.tolist()
            both = [set(h.edges("act")[layer, f, 1:-1].tolist()) for h in made]
            assert set(inner.tolist()) == set.intersection(*both) - {np.inf}
    assert (total.last["act"] < BINS - 1).any()
    assert (total.last["act"] > 1).any()


def test_bins_without_a_common_edge_are_one_bin() -> None:
    one = binned(values())
    far = Histogram(
        GROUPS, one.count, one.exponent, {"act": one.first["act"] + np.int32(1000)}, one.last
    )
    total = one + far
    assert (total.last["act"] == 0).all()
    assert (total.count["act"][..., 0] == 2 * one.count["act"].sum(-1)).all()


def test_groups_match_by_their_names() -> None:
    one = binned(values())
    renamed = Histogram(["fr", "de", "en"], one.count, one.exponent, one.first, one.last)
    total = one + renamed
    assert total.groups == ["en", "zh", "fr", "de"]
    count = one.count["act"]
    sums = [count[0] + count[2], count[1], count[2] + count[0], count[1]]
    assert (total.count["act"] == np.stack(sums)).all()


def test_a_file_gives_back_what_was_written_and_a_neuron_alone(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    made = binned(values())
    made.write(path)
    assert Histogram.read(path).to_bytes() == made.to_bytes()
    one = Histogram.read(path, (1, "act", 2))
    assert (one.count["act"] == made.count["act"][:, 1:, 2:]).all()
    assert one.quantile("act", 0.5, "zh").low == made.quantile("act", 0.5, "zh").low[1, 2]
    for neuron in ((2, "act", 0), (0, "act", 3), (0, "up", 0), (0, "act", -1)):
        with pytest.raises(RelneuronError, match="has no neuron"):
            Histogram.read(path, neuron)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    made = binned(values())
    with pytest.raises(RelneuronError, match="no group 'de'"):
        made.quantile("act", 0.5, "de")
    with pytest.raises(RelneuronError, match="no site 'up'"):
        made.rate_above("up", 0.0)
    with pytest.raises(RelneuronError, match=r"1\.5"):
        made.quantile("act", 1.5)
    made.write(tmp_path / "h.safetensors")
    tensors = load_file(tmp_path / "h.safetensors")
    about = {"relneuron.histogram": '{"groups": ["en", "zh", "fr"]}'}
    for name, value in (("count.act", -1), ("last.act", -1), ("last.act", 1)):
        changed = tensors | {name: np.full_like(tensors[name], value)}
        save_file(changed, tmp_path / "h.safetensors", about)
        with pytest.raises(RelneuronError, match="is no file of a histogram"):
            Histogram.read(tmp_path / "h.safetensors")
