"""The feed: the same windows whatever makes them, and the rest of them from every position."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relneuron.artifact.files import RelneuronError
from relneuron.texts import feed
from relneuron.texts import read as corpus_read
from relneuron.texts import windows as corpus_windows
from relneuron.texts.feed import Feed
from relneuron.texts.sources import Source, parse_sources
from relneuron.texts.windows import Packing

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
Plain = tuple[str, list[int], list[bool]]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A fast tokenizer of single bytes that would truncate, pad and add a BOS if it were let."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    raw.add_special_tokens(["<s>"])
    raw.enable_truncation(5)
    raw.enable_padding(length=50)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")


class Slow:
    """A tokenizer written in Python: a token a letter."""

    bos_token_id = 26

    def __len__(self) -> int:
        return 27

    def __call__(self, texts: Any, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        assert not add_special_tokens
        return {"input_ids": [[ord(c) - 97 for c in text if c != " "] for text in texts]}


def plain(windows: Sequence[Any], feed: Feed) -> list[Plain]:
    return [(feed.groups[w.group], w.ids.tolist(), w.first.tolist()) for w in windows]


def everything(sources: Sequence[Source], tokenizer: Any, packing: Packing, **o: Any) -> Any:
    """All windows of a feed, its groups and its notes."""
    with Feed(sources, tokenizer, packing, **o) as feed:
        found: list[Plain] = []
        while windows := feed.take(7):
            found += plain(windows, feed)
        assert feed.take(1) == []
    return found, feed.groups, feed.notes


def turns(streams: Sequence[Sequence[Plain]]) -> list[Plain]:
    """Sources take turns; an exhausted one drops out."""
    longest = max(map(len, streams))
    return [stream[i] for i in range(longest) for stream in streams if i < len(stream)]


def packed(tokens: Sequence[tuple[int, bool]], group: str, window: int) -> list[Plain]:
    rows = [tokens[i : i + window] for i in range(0, len(tokens) - window + 1, window)]
    return [(group, [t for t, _ in row], [f for _, f in row]) for row in rows]


def write_texts(folder: Path, seed: int = 0) -> list[str]:
    """Three groups of text and one of ids, as arguments."""
    rng = np.random.default_rng(seed)
    for name, n in (("en", 40), ("zh", 90), ("fr", 3)):
        lines = [" ".join(rng.choice(WORDS, rng.integers(1, 20))) for _ in range(n)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    np.save(folder / "ids.npy", rng.integers(0, 250, 700))
    texts = [f"{name}={folder / name}.txt" for name in ("en", "zh", "fr")]
    return [*texts, f"ids={folder / 'ids.npy'}"]


def test_windows_equal_a_plain_packing_for_every_number_of_workers(
    tmp_path: Path, tokenizer: Any
) -> None:
    texts = write_texts(tmp_path)
    streams = []
    for text in texts[:3]:
        group, path = text.split("=")
        tokens = []
        for line in Path(path).read_text().split("\n"):
            ids = tokenizer(line, add_special_tokens=False)["input_ids"]
            tokens += [(0, True), *((token, False) for token in ids)]
        streams.append(packed(tokens, group, 16))
    ids = np.load(tmp_path / "ids.npy").tolist()
    streams.append(packed([(token, i == 0) for i, token in enumerate(ids)], "ids", 16))
    packing = Packing(16, "packed", "document", 0)
    for n_workers in (1, 2, 4):
        found, groups, notes = everything(
            parse_sources(texts), tokenizer, packing, n_workers=n_workers
        )
        assert found == turns(streams) and groups == ["en", "zh", "fr", "ids"]
        assert notes["dropped_tokens"]["ids"] == 700 % 16


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.text("abcdef ", max_size=12), max_size=9), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([Packing(4), Packing(5, "documents", "document", 26), Packing(3, bos="none")]),
)
def test_a_feed_goes_on_from_every_window(
    documents: list[list[str]], has_column: bool, packing: Packing
) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        patch.setattr(corpus_read, "CHUNK_PIECES", 2)
        patch.setattr(corpus_windows, "BLOCK_WINDOWS", 2)
        texts = []
        for number, lines in enumerate(documents):
            path = Path(name) / f"{number}.txt"
            path.write_text("\n".join(lines))
            texts.append(f"group {number}={path}")
        sources = parse_sources(texts)
        if has_column:
            records = [{"text": t, "g": len(t) % 3} for lines in documents for t in lines]
            sources.append(Source(group_column="g", dataset=records))
        expected, groups, notes = everything(sources, Slow(), packing)
        for number in range(len(expected) + 1):
            with Feed(sources, Slow(), packing) as feed:
                assert plain(feed.take(number), feed) == expected[:number]
                state = json.loads(json.dumps(feed.state()))
                assert feed.state() == json.loads(json.dumps(state))
            again = everything(sources, Slow(), packing, state=state)
            assert again == (expected[number:], groups, notes)


def test_processes_go_on_from_a_state(tmp_path: Path, tokenizer: Any) -> None:
    texts, packing = write_texts(tmp_path), Packing(16, "documents", "window", 0, 4000)
    sources = parse_sources(texts)
    expected, groups, notes = everything(sources, tokenizer, packing)
    state = None
    found: list[Plain] = []
    for n in (1, 70, 71, 0, 10_000):
        with Feed(sources, tokenizer, packing, state=state) as feed:
            found += plain(feed.take(n), feed)
        state = json.loads(json.dumps(feed.state()))
    assert found == expected and (feed.groups, feed.notes) == (groups, notes)
    assert everything(sources, tokenizer, packing, state=state)[0] == []


def test_groups_of_a_column_come_in_the_order_asked_or_met(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"text": "x" * 9, "lang": lang} for lang in ("zh", "en", 7, "en")]
    path.write_text("\n".join(map(json.dumps, records)))
    sources = parse_sources([str(path)], group_column="lang")
    found, groups, notes = everything(sources, tokenizer, Packing(4))
    assert groups == ["zh", "en", "7"] and [group for group, *_ in found].count("en") == 4
    asked = parse_sources([str(path)], group_column="lang", groups=["fr", "en"])
    found, groups, notes = everything(asked, tokenizer, Packing(4))
    assert groups == ["fr", "en"] and {group for group, *_ in found} == {"en"}
    assert notes["records_of_other_groups"] == 2


def test_expected_tokens_waits_and_cheap_states(tmp_path: Path, tokenizer: Any) -> None:
    sources = parse_sources(write_texts(tmp_path))
    with Feed(sources, tokenizer, Packing(16)) as feed:
        assert feed.expected_tokens is None
        n_tokens = 0
        while windows := feed.take(20):
            n_tokens += sum(len(window.ids) for window in windows)
            assert feed.expected_tokens is None or feed.expected_tokens >= n_tokens
            begin = time.perf_counter()
            for _ in range(10):
                feed.state()
            assert time.perf_counter() - begin < 0.1
        assert feed.started_s > 0 and feed.waited_s >= 0
        assert feed.expected_tokens == pytest.approx(n_tokens)


def test_a_slow_tokenizer_and_a_fast_one_in_a_thread(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc def\nghi")
    expected = [("en", [0, 1, 2, 3], [True, False, False, False])]
    expected += [("en", [4, 5, 6, 7], [False, False, True, False])]
    assert everything(parse_sources([f"en={path}"]), Slow(), Packing(4))[0] == expected
    records = [{"text": "abc def"}, {"text": "ghi"}]
    found = everything([Source("en", dataset=records)], tokenizer, Packing(4))[0]
    assert found == everything(parse_sources([f"en={path}"]), tokenizer, Packing(4))[0]


# --- errors ----------------------------------------------------------------------------------


def test_what_cannot_be_read_together_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    write_texts(tmp_path)
    text = parse_sources([f"en={tmp_path}/en.txt"])[0]
    mixed = parse_sources([f"en={tmp_path}/en.txt", f"en={tmp_path}/ids.npy"])
    for sources, given_, packing, match in (
        ([], tokenizer, Packing(4), "none or not distinct"),
        ([text, text], tokenizer, Packing(4), "none or not distinct"),
        ([Source(dataset=[])], tokenizer, Packing(4), "needs a group"),
        ([Source("en", group_column="g", dataset=[])], tokenizer, Packing(4), "needs a group"),
        ([text], None, Packing(4), "no tokenizer"),
        (mixed, tokenizer, Packing(4, "packed", "window", 0), "text and token ids"),
    ):
        with pytest.raises(RelneuronError, match=match):
            Feed(sources, given_, packing)
    with pytest.raises(RelneuronError, match="another corpus"):
        Feed([text], tokenizer, Packing(4), state={"sources": [], "turn": 0, "groups": []})


def test_an_error_of_a_worker_arrives_with_its_cause(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "abcd" * 300 + '"}\n' + '{"text": "\\ud800"}')
    for given_ in (tokenizer, Slow()):
        with Feed(parse_sources([f"en={path}"]), given_, Packing(4)) as feed:
            for _ in range(2):
                with pytest.raises(RelneuronError, match="a.jsonl, line 2: it holds half") as got:
                    feed.take(1000)
                assert got.value.fix == "correct the text"
    np.save(tmp_path / "a.npy", np.array([1, 2, 300]))
    with (
        Feed(parse_sources([f"en={tmp_path / 'a.npy'}"]), tokenizer, Packing(1)) as feed,
        pytest.raises(RelneuronError, match="a.npy holds the token 300 at position 2"),
    ):
        feed.take(1)
    with Feed(
        parse_sources([f"en={tmp_path / 'a.npy'}"]), None, Packing(1), vocabulary=301
    ) as feed:
        assert [w.ids.tolist() for w in feed.take(9)] == [[1], [2], [300]]


def test_what_breaks_in_the_middle_is_one_line_that_names_the_source(
    tmp_path: Path, tokenizer: Any
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"text {i}" for i in range(9999)]}), path)
    data = bytearray(path.read_bytes())
    data[100:5000] = os.urandom(4900)
    path.write_bytes(data)
    with (
        Feed(parse_sources([f"group={path}"]), tokenizer, Packing(4)) as feed,
        pytest.raises(RelneuronError, match="is no parquet file") as caught,
    ):
        feed.take(100_000)
    assert "\n" not in caught.value.cause


def test_a_streamed_folder_goes_on_in_another_process(tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": f"text number {i}"}) for i in range(3000)]
    (tmp_path / "data" / "a.jsonl").write_text("\n".join(lines))
    packing = Packing(16)
    expected = everything(
        parse_sources([f"en={tmp_path / 'data' / 'a.jsonl'}"]), tokenizer, packing
    )
    sources = parse_sources([f"en=hf:{tmp_path / 'data'}"])
    with Feed(sources, tokenizer, packing) as feed:
        found = plain(feed.take(2500), feed)
        assert feed.expected_tokens is None
    rest, groups, notes = everything(sources, tokenizer, packing, state=feed.state())
    assert (found + rest, groups, notes) == expected


def test_cores_and_ctrl_c_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    assert feed.usable_cores() == len(os.sched_getaffinity(0))
    assert feed._apart() == {"process_group": 0}
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS and Windows
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert feed.usable_cores() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert feed.usable_cores() == 2
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    assert feed._apart() == {"creationflags": 512}
