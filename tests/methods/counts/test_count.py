"""The `count` stage against plain hooks: every site, packing, BOS policy and batch size.

The reference runs one window at a time through the unpatched model; see kit/counted.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.artifact.counts import SITES
from relneuron.artifact.files import RelneuronError
from relneuron.methods.counts.batches import make_batch
from relneuron.methods.counts.counter import Counter
from relneuron.model.mlps.find import find_mlps
from relneuron.texts.windows import Window
from tests.conftest import tiny_model
from tests.kit.counted import (
    BOS,
    Numbers,
    alone,
    assert_equal,
    check_between,
    draw,
    packed,
    plain_counts,
    run,
    split_at_bos,
    values_of,
)

FIVE = ("en", "zh", "fr", "es", "vi")


@pytest.fixture(scope="module")
def documents() -> dict[str, list[list[int]]]:
    return draw(FIVE, 250)


# --- equal to hooks ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_one_window_a_batch_is_the_hook_loop_exactly(
    documents: Any, tmp_path: Path, family: str
) -> None:
    model = tiny_model(family)
    counts = run(model, documents, tmp_path / "o", window=16, batch_tokens=16, sites=SITES)
    assert counts.groups == list(FIVE) and counts.sites == list(SITES)
    for site in SITES:
        tokens, active = plain_counts(model, packed(documents, 16), 5, site)
        assert counts.tokens.tolist() == tokens.tolist()
        assert np.array_equal(counts.arrays[f"count.{site}"], active), site
        assert 0 < active.sum() < tokens.sum() * active[0].size


@pytest.mark.parametrize("batch", [2, 3, 8, 64])
def test_many_windows_a_batch_are_the_hook_loop(
    model: Any, documents: Any, tmp_path: Path, batch: int
) -> None:
    counts = run(model, documents, tmp_path / "o", window=16, batch_tokens=16 * batch)
    check_between(counts, model, packed(documents, 16))


@pytest.mark.parametrize("batch_tokens", [1, 20, 64, 1280])
def test_documents_alone_with_padding(
    model: Any, documents: Any, tmp_path: Path, batch_tokens: int
) -> None:
    asked: dict[str, Any] = {"window": 20, "mode": "documents", "batch_tokens": batch_tokens}
    counts = run(model, documents, tmp_path / "o", sites=("act", "down"), **asked)
    assert any(len(line) >= 20 for line in documents["en"])
    for site in ("act", "down"):
        check_between(counts, model, alone(documents, 20), site)


@pytest.mark.parametrize("site", ["gate", "up", "product"])
def test_every_site_in_large_batches(model: Any, documents: Any, tmp_path: Path, site: str) -> None:
    counts = run(model, documents, tmp_path / "o", window=16, batch_tokens=256, sites=(site,))
    assert counts.sites == [site]
    check_between(counts, model, packed(documents, 16), site)


@pytest.mark.parametrize("threshold", [0.01, -0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_and_half_precision(
    documents: Any, tmp_path: Path, dtype: torch.dtype, threshold: float
) -> None:
    model = tiny_model("llama", dtype)
    two = {name: documents[name] for name in ("en", "vi")}
    asked: dict[str, Any] = {"window": 16, "batch_tokens": 16, "threshold": threshold}
    counts = run(model, two, tmp_path / "o", sites=SITES, **asked)
    for site in SITES:
        _, active = plain_counts(model, packed(two, 16), 2, site, threshold)
        assert np.array_equal(counts.arrays[f"count.{site}"], active), site


def test_moments(model: Any, documents: Any, tmp_path: Path) -> None:
    counts = run(
        model, documents, tmp_path / "o", window=16, batch_tokens=16, sites=SITES, moments=True
    )
    n = len(FIVE)
    for site in SITES:
        shape = counts.arrays[f"count.{site}"].shape
        total, squares, largest = np.zeros(shape), np.zeros(shape), np.full(shape, -np.inf)
        for group, _, layers in values_of(model, packed(documents, 16)):
            values = np.stack([layer[site].double().numpy() for layer in layers])
            total[group] += values.sum(1)
            squares[group] += (values**2).sum(1)
            largest[group] = np.maximum(largest[group], values.max(1))
        scale = np.sqrt(squares * counts.tokens.reshape(n, 1, 1))
        found = counts.arrays
        assert (abs(found[f"sum.{site}"] - total) <= 1e-6 * scale).all()
        assert (abs(found[f"sum_sq.{site}"] - squares) <= 1e-6 * squares).all()
        exact = site in ("gate", "up", "down")
        close = abs(found[f"max.{site}"] - largest) <= (0 if exact else 1e-6) * abs(largest)
        assert close.all(), site
        assert not found[f"n_nonfinite.{site}"].any()


def test_values_that_are_not_finite_are_counted_and_in_no_moment(
    documents: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[documents["zh"][0][0]] = torch.nan
    two = {name: documents[name][:6] for name in ("en", "zh")}
    with pytest.warns(UserWarning, match=r"\d+ values at site (up|act) are not finite") as caught:
        counts = run(
            model,
            two,
            tmp_path / "o",
            window=16,
            batch_tokens=16,
            sites=("up", "act"),
            moments=True,
        )
    assert len(caught) == 2
    for site in ("up", "act"):
        shape = counts.arrays["count.act"].shape
        bad, active, total = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        largest = np.full(shape, -np.inf)
        for group, _, layers in values_of(model, packed(two, 16)):
            values = np.stack([layer[site].double().numpy() for layer in layers])
            finite = np.isfinite(values)
            bad[group] += (~finite).sum(1)
            active[group] += (values > 0).sum(1)
            total[group] += np.where(finite, values, 0).sum(1)
            largest[group] = np.maximum(largest[group], np.where(finite, values, -np.inf).max(1))
        found = counts.arrays
        assert bad.any() and np.array_equal(found[f"n_nonfinite.{site}"], bad)
        assert np.array_equal(found[f"count.{site}"], active)
        assert np.allclose(found[f"sum.{site}"], total, rtol=0, atol=1e-5)
        assert np.allclose(found[f"max.{site}"], largest, rtol=1e-6, atol=0)


# --- BOS, documents in one window, limits ------------------------------------------------------


@pytest.mark.parametrize("bos", ["document", "window", "none"])
@pytest.mark.parametrize("exclude", [False, True])
def test_bos_policies(model: Any, documents: Any, tmp_path: Path, bos: str, exclude: bool) -> None:
    asked: dict[str, Any] = {"window": 16, "batch_tokens": 16, "exclude_bos": exclude}
    counts = run(model, documents, tmp_path / "o", bos=bos, **asked)
    windows = packed(documents, 16, bos=bos)
    tokens, active = plain_counts(model, windows, 5, not_counted=BOS if exclude else None)
    assert counts.tokens.tolist() == tokens.tolist()
    assert np.array_equal(counts.arrays["count.act"], active)
    told = json.loads((tmp_path / "o" / "manifest.json").read_text())["tokens"]
    assert (told["bos"], told["bos_counted"]) == (bos, not exclude)


def test_without_a_bos_token_none_is_put(model: Any, documents: Any, tmp_path: Path) -> None:
    counts = run(model, documents, tmp_path / "o", window=16, tokenizer=Numbers(None))
    lengths = [sum(map(len, lines)) // 16 * 16 for lines in documents.values()]
    assert counts.tokens.tolist() == lengths


def test_positions_keep_the_documents_of_a_window_apart(
    model: Any, documents: Any, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"window": 48, "batch_tokens": 480}
    apart = run(model, documents, tmp_path / "a", boundaries="position", **asked)
    check_between(apart, model, split_at_bos(packed(documents, 48)))
    mixed = run(model, documents, tmp_path / "m", **asked)
    check_between(mixed, model, packed(documents, 48))
    assert apart.tokens.tolist() == mixed.tokens.tolist()
    assert not np.array_equal(apart.arrays["count.act"], mixed.arrays["count.act"])


def test_an_attention_that_mixes_documents_is_refused(
    documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    true = model.model.forward

    def blind(position_ids: Any = None, **asked: Any) -> Any:
        return true(**asked)

    monkeypatch.setattr(model.model, "forward", blind)
    with pytest.raises(RelneuronError, match="'sdpa' a document sees the ones before it"):
        run(model, documents, tmp_path / "o", window=32, boundaries="position")
    assert not (tmp_path / "o").exists()


def test_at_most_so_many_tokens_of_each_group(model: Any, documents: Any, tmp_path: Path) -> None:
    counts = run(model, documents, tmp_path / "o", window=16, batch_tokens=16, max_tokens=250)
    first: dict[int, int] = dict.fromkeys(range(5), 0)
    windows = []
    for group, ids in packed(documents, 16):
        if first[group] < 15:
            windows.append((group, ids))
        first[group] += 1
    tokens, active = plain_counts(model, windows, 5)
    assert counts.tokens.tolist() == tokens.tolist() == [240] * 5
    assert np.array_equal(counts.arrays["count.act"], active)


# --- what is not computed ----------------------------------------------------------------------


@pytest.mark.parametrize(("site", "n_calls"), [("act", [0, 0, 0]), ("down", [1, 1, 0])])
def test_a_forward_ends_with_the_last_statistics(site: str, n_calls: list[int]) -> None:
    """Of the last down_proj, the final norm and the lm_head only what the site needs is called."""
    model = tiny_model("llama")
    counter = Counter(model, find_mlps(model), sites=(site,))
    calls = [0, 0, 0]
    last = model.model.layers[-1].mlp.down_proj
    for place, module in enumerate((last, model.model.norm, model.lm_head)):

        def note(_m: Any, _i: Any, _o: Any, place: int = place) -> None:
            calls[place] += 1

        module.register_forward_hook(note)
    with counter:
        counter.count(make_batch([Window(0, np.arange(5, dtype=np.int32), np.zeros(5, bool))]))
    assert calls == n_calls
    assert counter.result(["en"]).tokens.tolist() == [5]


def test_the_bare_forward_is_timed_now_and_then_and_counts_nothing(
    model: Any, documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(model, documents, tmp_path / "a", window=16, batch_tokens=16)
    monkeypatch.setattr("relneuron.methods.counts.counter.EVERY", 4)
    assert_equal(run(model, documents, tmp_path / "b", window=16, batch_tokens=16), plain)
