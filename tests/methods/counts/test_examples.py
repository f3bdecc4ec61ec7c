"""`count --examples --histogram` against a loop over all values of plain hooks, to the last bit.

The loop runs the unpatched model on the same batches, and looks at one neuron and token at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import relneuron
from relneuron.artifact.counts import SITES, Counts
from relneuron.artifact.examples import Examples, examples_of
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.histogram import Histogram
from relneuron.demo import CHECKPOINT
from relneuron.methods.counts.batches import pool_windows
from relneuron.methods.counts.count import count
from relneuron.methods.counts.merge import merge
from relneuron.model.load import load_tokenizer
from relneuron.model.passes import plan_pool
from relneuron.ops.swiglu_stats.reference import site_values
from relneuron.texts.options import CountOptions
from relneuron.texts.sources import Source
from tests.kit.counted import (
    BOS,
    Documents,
    Numbers,
    Windows,
    alone,
    draw,
    hooked,
    packed,
    run,
    stopping,
)

THREE = ("en", "zh", "fr")
K, BINS = 4, 16
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def documents() -> dict[str, list[list[int]]]:
    """Some lines stand twice, so that equal values must be told apart by where they are."""
    found = draw(THREE, 150)
    return {name: [*lines, *lines[::2]] for name, lines in found.items()}


def in_turn(windows: Windows) -> list[tuple[int, int, list[int]]]:
    """(group, number in it, tokens): the groups take turns until each one ends."""
    of = [[ids for group, ids in windows if group == g] for g in range(len(THREE))]
    rows = itertools.zip_longest(*of)
    return [(g, i, ids) for i, row in enumerate(rows) for g, ids in enumerate(row) if ids]


def all_values(
    model: Any, windows: Windows, batch_tokens: int, window: int
) -> Iterator[tuple[int, int, list[int], list[dict[str, Array]]]]:
    """group, number, tokens and, by layer, the values (T, F) of every site of each window."""
    order = in_turn(windows)
    step = pool_windows(window, batch_tokens)
    for start in range(0, len(order), step):
        pool = order[start : start + step]
        for own in plan_pool([len(w[2]) for w in pool], [w[0] for w in pool], batch_tokens):
            rows = [pool[i] for i in own]
            longest = max(len(ids) for _, _, ids in rows)
            padded = [ids + [0] * (longest - len(ids)) for _, _, ids in rows]
            mask = [[1] * len(ids) + [0] * (longest - len(ids)) for _, _, ids in rows]
            asked = {} if all(map(all, mask)) else {"attention_mask": torch.tensor(mask)}
            with torch.no_grad(), hooked(model) as seen:
                model(torch.tensor(padded), **asked)
            for place, (group, number, ids) in enumerate(rows):
                yield group, number, ids, [_sites(layer, place, len(ids)) for layer in seen]


def _sites(layer: dict[str, Any], place: int, length: int) -> dict[str, Array]:
    gate, up, down = (
        layer[name][place, :length].contiguous() for name in ("gate_proj", "up_proj", "down_proj")
    )
    found = site_values(gate, up, "silu", SITES[:4]) | {"down": down}
    return {site: values.float().numpy() for site, values in found.items()}


def check(folder: Path, model: Any, windows: Windows, batch_tokens: int, window: int, **how: Any):
    """What was written is what the loop finds, at all sites."""
    examples = Examples.read(folder / "examples.safetensors")
    histogram = Histogram.read(folder / "histogram.safetensors")
    assert examples.groups == histogram.groups == list(THREE)
    assert examples.sites == histogram.sites == how.get("sites", list(SITES))
    peaks: dict[tuple[int, int, str, int], list[tuple[float, int, int]]] = {}
    counts = {site: np.zeros_like(table) for site, table in histogram.count.items()}
    tokens = {}
    for group, number, ids, layers in all_values(model, windows, batch_tokens, window):
        tokens[group, number] = ids
        kept = [t for t, token in enumerate(ids) if token != how.get("not_counted")]
        for (layer, values), site in itertools.product(enumerate(layers), examples.sites):
            inner = histogram.edges(site)[layer, :, 1:-1]
            for f, column in enumerate(values[site].T.tolist() if kept else ()):
                top = max(column[t] for t in kept)
                first = next(t for t in kept if column[t] == top)
                peaks.setdefault((group, layer, site, f), []).append((-top, number, first))
                for t in kept:
                    b = np.searchsorted(inner[f], column[t], "right")
                    counts[site][group, layer, f, b] += 1
    for site in examples.sites:
        assert (histogram.count[site] == counts[site]).all(), site
        numbers = examples.numbers(site)
        for g, layer, f in np.ndindex(numbers.shape[:3]):
            wanted = sorted(peaks.get((g, layer, site, f), []))[:K]
            place = (g, layer, f)
            tables = (examples.value[site], numbers, examples.position[site])
            rows = zip(*(table[place].tolist() for table in tables), strict=True)
            found = [(-value, number, t) for value, number, t in rows if number >= 0]
            assert found == wanted, (site, place)
    for key, ids in examples.windows.items().items():
        assert ids.tolist() == tokens[key]
    n = [sum(g == group for g, _ in windows) for group in range(len(THREE))]
    assert examples.n_windows.tolist() == n


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_packed_windows(model: Any, documents: Documents, tmp_path: Path, batch: int) -> None:
    asked: dict[str, Any] = {"window": 12, "batch_tokens": 12 * batch, "sites": SITES}
    run(model, documents, tmp_path / "o", examples=K, histogram=BINS, **asked)
    check(tmp_path / "o", model, packed(documents, 12), 12 * batch, 12)


@pytest.mark.parametrize("batch_tokens", [1, 64, 640])
def test_padded_documents(
    model: Any, documents: Documents, tmp_path: Path, batch_tokens: int
) -> None:
    asked: dict[str, Any] = {"window": 10, "mode": "documents", "batch_tokens": batch_tokens}
    run(model, documents, tmp_path / "o", examples=K, histogram=BINS, sites=SITES, **asked)
    check(tmp_path / "o", model, alone(documents, 10), batch_tokens, 10)


def test_tokens_that_are_not_counted_are_no_example(
    model: Any, documents: Documents, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"window": 12, "batch_tokens": 48, "exclude_bos": True}
    run(model, documents, tmp_path / "o", examples=K, histogram=BINS, **asked)
    how = {"sites": ["act"], "not_counted": BOS}
    check(tmp_path / "o", model, packed(documents, 12), 48, 12, **how)


# --- the same bits, however it is run ------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def test_stopped_and_resumed(
    model: Any, documents: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"window": 12, "batch_tokens": 48, "examples": K, "histogram": BINS}
    asked["sites"] = ("act", "down")
    run(model, documents, tmp_path / "whole", **asked)
    stopping(monkeypatch, after=3)
    stops = 0
    while True:
        try:
            run(model, documents, tmp_path / "o", **asked)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 2
    assert files(tmp_path / "o") == files(tmp_path / "whole")
    assert files(tmp_path / "o").keys() == {
        "counts.safetensors",
        "examples.safetensors",
        "histogram.safetensors",
    }


@pytest.mark.parametrize("of", [2, 3])
def test_shards_are_one_process(model: Any, documents: Documents, tmp_path: Path, of: int) -> None:
    asked: dict[str, Any] = {"window": 10, "mode": "documents", "batch_tokens": 40}
    asked |= {"examples": K, "histogram": BINS}
    run(model, documents, tmp_path / "whole", **asked)
    shards = [tmp_path / str(number) for number in range(1, of + 1)]
    for number, shard in enumerate(shards, 1):
        run(model, documents, shard, shard=(number, of), **asked)
    for name, order in (("o", shards), ("back", shards[::-1])):
        merge(order, tmp_path / name)
        assert files(tmp_path / name) == files(tmp_path / "whole")


def test_corpora_are_merged_as_if_one_stood_behind_the_other(
    model: Any, documents: Documents, tmp_path: Path
) -> None:
    """One window a batch: its values are then the same in each run."""
    asked: dict[str, Any] = {"window": 10, "mode": "documents", "batch_tokens": 1, "examples": K}
    first = {name: lines[:4] for name, lines in documents.items()}
    rest = {name: lines[4:] for name, lines in documents.items() if name != "en"}
    whole = first | {name: first[name] + lines for name, lines in rest.items()}
    for name, lines in (("first", first), ("rest", rest), ("whole", whole)):
        run(model, lines, tmp_path / name, histogram=BINS, **asked)
    run(model, {"en": documents["en"][4:9]}, tmp_path / "en", histogram=BINS, **asked)
    merge([tmp_path / "first", tmp_path / "rest"], tmp_path / "o")
    name = "examples.safetensors"
    assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    merge([tmp_path / "o", tmp_path / "en"], tmp_path / "of merged")
    merge([tmp_path / n for n in ("first", "rest", "en")], tmp_path / "of three")
    assert files(tmp_path / "of merged") == files(tmp_path / "of three")
    total = Histogram.read(tmp_path / "of three" / "histogram.safetensors")
    n = [counts.tokens for counts in (Counts.read(tmp_path / "of three" / "counts.safetensors"),)]
    assert (total.count["act"].sum(-1) == n[0][:, None, None]).all()


def test_counts_with_other_examples_are_not_merged(
    model: Any, documents: Documents, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"window": 12, "batch_tokens": 48}
    for number, k in ((1, 3), (2, 4)):
        run(model, documents, tmp_path / str(number), shard=(number, 2), examples=k, **asked)
    with pytest.raises(RelneuronError, match="examples: 3 -> 4"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "o")


def test_a_count_without_them_leaves_none_of_an_earlier_one(
    model: Any, documents: Documents, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"window": 12, "batch_tokens": 48}
    run(model, documents, tmp_path / "o", examples=K, histogram=BINS, **asked)
    run(model, documents, tmp_path / "o", force=True, **asked)
    assert files(tmp_path / "o").keys() == {"counts.safetensors"}
    with pytest.raises(RelneuronError, match="other inputs: examples: None -> 4"):
        run(model, documents, tmp_path / "o", examples=K, **asked)


def test_groups_that_come_later_number_their_own_windows(
    model: Any, documents: Documents, tmp_path: Path
) -> None:
    """Records of all groups in one file; one window a batch, whose values are then the same."""
    rows = [
        {"group": name, "text": " ".join(map(str, line))}
        for name in THREE  # the second group begins when the first one has ended
        for line in documents[name][:6]
    ]
    source = Source(group_column="group", dataset=rows)
    asked: dict[str, Any] = {"window": 10, "mode": "documents", "batch_tokens": 1, "examples": K}
    found = count(
        "m", model, Numbers(), [source], tmp_path / "o", CountOptions(**asked), quiet=True
    )
    assert found is not None and found.counts.groups == list(THREE)
    run(model, {n: documents[n][:6] for n in THREE}, tmp_path / "apart", **asked)
    assert files(tmp_path / "o") == files(tmp_path / "apart")


def test_texts_that_can_be_read_once_only_are_refused(model: Any, tmp_path: Path) -> None:
    rows = iter([{"text": "5 6 7"}])
    for asked in ({"examples": 1}, {"histogram": 8}):
        with pytest.raises(RelneuronError, match="can be read once only"):
            count(
                "m",
                model,
                Numbers(),
                [Source("en", dataset=rows)],
                tmp_path / "o",
                CountOptions(window=2, **asked),
                quiet=True,
            )
    assert not (tmp_path / "o").exists()


# --- as data frames ------------------------------------------------------------------------------


def test_a_neuron_is_a_data_frame(model: Any, documents: Documents, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    folder = tmp_path / "o"
    run(model, documents, folder, examples=K, histogram=BINS, window=12, batch_tokens=48)
    study, tokenizer = relneuron.load(folder), load_tokenizer(str(CHECKPOINT))
    frame = study.examples("1.act.7", tokenizer, context=2)
    (found,) = examples_of(folder / "examples.safetensors", [(1, "act", 7)])
    assert frame["rank"].tolist() == [1, 2, 3, 4] * 3
    assert frame["group"].tolist() == [name for name in THREE for _ in range(K)]
    for row, one in zip(frame.itertuples(), found, strict=True):
        assert (row.layer, row.site, row.index) == (1, "act", 7)
        told = (row.value, row.position, row.window, row.token_id)
        assert told == (one.value, one.position, one.number, one.token)
        ids, t = one.ids.tolist(), one.position
        assert row.before == tokenizer.decode(ids[max(0, t - 2) : t])
        assert row.after == tokenizer.decode(ids[t + 1 : t + 3])
        assert row.text == tokenizer.decode(ids) and row.token in row.text
    drawn = frame._repr_html_()
    assert "L1.act.7" in drawn and "largest value in a window" in drawn
    assert all(escape(row.token.strip()) in drawn for row in frame.itertuples())
    assert "<table" in frame[:3]._repr_html_()  # some rows are a plain frame
    spread = study.histogram((1, "act", 7))
    assert spread.groupby("group", observed=True)["count"].sum().tolist() == (
        Counts.read(folder / "counts.safetensors").tokens.tolist()
    )
    assert (spread["low"] < spread["high"]).all() and len(spread) == 3 * BINS
    for wrong in ("act.7", "1.act", (1, 2), "1.act.x"):
        with pytest.raises(RelneuronError, match="is no (name of a )?neuron"):
            study.examples(wrong, tokenizer)
    with pytest.raises(RelneuronError, match="has no neuron 48 at act of layer 1"):
        study.histogram((1, "act", 48))
    with pytest.raises(RelneuronError, match="m has no usable tokenizer|is no model folder"):
        study.examples("1.act.7")


def test_what_was_not_kept_says_how_to(model: Any, documents: Documents, tmp_path: Path) -> None:
    run(model, documents, tmp_path / "o", window=12)
    study = relneuron.load(tmp_path / "o")
    for read, flag in ((study.examples, "--examples"), (study.histogram, "--histogram")):
        with pytest.raises(RelneuronError, match="does not exist") as caught:
            read("1.act.7")
        assert flag in caught.value.fix
