"""Windows of tokens against a plain packing written from its definition, and restarts of blocks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relneuron.artifact.files import RelneuronError
from relneuron.texts import read as corpus_read
from relneuron.texts import windows as corpus_windows
from relneuron.texts.sources import Source, parse_sources
from relneuron.texts.windows import Block, Packing, default_bos, make_blocks

BOS = 99
Plain = tuple[str, list[int], list[bool]]


def encode(texts: Sequence[str]) -> list[list[int]]:
    """One token a character; spaces have none."""
    return [[ord(c) - 97 for c in text if c != " "] for text in texts]


def reference(documents: Sequence[tuple[str, list[int]]], packing: Packing) -> list[Plain]:
    """All windows of (group, tokens) documents, by the definition, one token at a time."""
    window, bos = packing.window, packing.bos
    open_: dict[str, list[tuple[int, bool]]] = {}
    total: dict[str, int] = {}
    full: set[str] = set()
    made: list[Plain] = []

    def close(group: str) -> None:
        tokens = open_.pop(group)
        limit = packing.max_tokens
        if group in full or (limit is not None and total.get(group, 0) + len(tokens) > limit):
            full.add(group)
            return
        total[group] = total.get(group, 0) + len(tokens)
        made.append((group, [token for token, _ in tokens], [first for _, first in tokens]))

    def put(group: str, token: int, first: bool) -> None:
        if bos == "window" and group not in open_:
            open_[group] = [(BOS, first)]
            first = False
        open_.setdefault(group, []).append((token, first))
        if len(open_[group]) == window:
            close(group)

    for group, tokens in documents:
        if tokens and bos == "document":
            put(group, BOS, True)
        for i, token in enumerate(tokens):
            put(group, token, i == 0 and bos != "document")
        if packing.mode == "documents" and group in open_:
            close(group)
    return made


def blocks_of(source: Source, packing: Packing, state: Any = None) -> tuple[list[Block], Any]:
    *blocks, notes = make_blocks(source, packing, encode, state=state)
    assert all(isinstance(block, Block) for block in blocks) and isinstance(notes, dict)
    return [block for block in blocks if isinstance(block, Block)], notes


def plain(blocks: Sequence[Block]) -> list[Plain]:
    return [
        (block.groups[window.group], window.ids.tolist(), window.first.tolist())
        for block in blocks
        for window in block.windows
    ]


def column(documents: Sequence[tuple[str, str]], groups: tuple[str, ...] | None = None) -> Source:
    records = [{"text": text, "lang": group} for group, text in documents]
    return Source(group_column="lang", groups=groups, dataset=records)


DOCUMENTS = st.lists(
    st.tuples(st.sampled_from(["en", "zh", "fr"]), st.text("abcdef ", min_size=1, max_size=20)),
    max_size=16,
)


@settings(max_examples=150, deadline=None)
@given(
    DOCUMENTS,
    st.integers(2, 9),
    st.sampled_from(["packed", "documents"]),
    st.sampled_from(["document", "window", "none"]),
    st.none() | st.integers(1, 40),
)
def test_windows_are_those_of_a_plain_packing_from_every_block_on(
    documents: list[tuple[str, str]], window: int, mode: str, bos: str, limit: int | None
) -> None:
    packing = Packing(window, mode, bos, BOS, limit)
    source = column(documents)
    expected = reference([(g, t) for (g, text) in documents for t in encode([text])], packing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_read, "CHUNK_PIECES", 2)
        patch.setattr(corpus_windows, "BLOCK_WINDOWS", 2)
        blocks, notes = blocks_of(source, packing)
        assert plain(blocks) == expected
        for number, block in enumerate(blocks):
            start = json.loads(json.dumps(block.start))
            assert (start is None) == (number == 0)
            again, same = blocks_of(source, packing, start)
            assert plain(again) == plain(blocks[number:]) and same == notes
            assert [b.n_tokens for b in again] == [b.n_tokens for b in blocks[number:]]


def test_the_plain_packing_is_what_it_should_be() -> None:
    documents = [("en", [0, 1, 2]), ("en", []), ("en", [3, 4])]
    packed = reference(documents, Packing(3, "packed", "document", BOS))
    assert packed == [
        ("en", [BOS, 0, 1], [True, False, False]),
        ("en", [2, BOS, 3], [False, True, False]),
    ]
    window = reference(documents, Packing(3, "packed", "window", BOS))
    assert window == [
        ("en", [BOS, 0, 1], [True, False, False]),
        ("en", [BOS, 2, 3], [False, False, True]),
    ]
    single = reference(documents, Packing(3, "documents", "document", BOS))
    assert [ids for _, ids, _ in single] == [[BOS, 0, 1], [2], [BOS, 3, 4]]


def test_pieces_of_a_document_are_one_document(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(corpus_read, "PIECE_BYTES", 5)
    monkeypatch.setattr(corpus_read, "CHUNK_PIECES", 1)
    monkeypatch.setattr(corpus_windows, "BLOCK_WINDOWS", 1)
    texts = ["abcdefabcdefabcdef", "abc", "      ", "          abcd", "abcde"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    source = parse_sources([f"en={tmp_path / 'a.txt'}"])[0]
    documents = [("en", tokens) for tokens in encode(texts)]
    for mode in ("packed", "documents"):
        for bos in ("document", "window", "none"):
            packing = Packing(4, mode, bos, BOS)
            blocks, notes = blocks_of(source, packing)
            assert plain(blocks) == reference(documents, packing)
            assert notes["empty_documents"] == 1
            for number, block in enumerate(blocks):
                assert plain(blocks_of(source, packing, block.start)[0]) == plain(blocks[number:])


def test_ids_get_no_bos(tmp_path: Path) -> None:
    ids = np.arange(24).reshape(4, 6)
    np.save(tmp_path / "a.npy", ids)
    source = parse_sources([f"en={tmp_path / 'a.npy'}"])[0]
    documents = [("en", row.tolist()) for row in ids]
    for mode in ("packed", "documents"):
        expected = reference(documents, Packing(4, mode))
        for bos in ("document", "window", "none"):
            assert plain(blocks_of(source, Packing(4, mode, bos, BOS))[0]) == expected
        exact = plain(blocks_of(source, Packing(6, mode, "none"))[0])
        assert [w for _, w, _ in exact] == ids.tolist()


def test_notes_say_what_no_window_shows() -> None:
    documents = [("en", "abcde"), ("zh", "abc"), ("en", " "), ("fr", "ab"), ("de", "abcd")]
    _, notes = blocks_of(column(documents, ("zh", "en")), Packing(4))
    assert notes == {
        "dropped_tokens": {"zh": 3, "en": 1},
        "empty_documents": 1,
        "records_without_text": 0,
        "records_of_other_groups": 2,
    }
    _, notes = blocks_of(column(documents, ("zh", "en")), Packing(4, "documents"))
    assert notes["dropped_tokens"] == {} and notes["empty_documents"] == 1


@pytest.mark.parametrize("mode", ["packed", "documents"])
def test_records_without_text_change_no_window_and_are_counted_also_by_a_resumed_run(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{letter * 5}" for letter in "abcdef"]
    good = [{"text": text} for text in texts]
    holes: list[Any] = [{"text": None}, {"no": "x"}, {"text": 3}, {"text": ""}]
    records = [record for pair in zip(good, holes * 2, strict=False) for record in pair]
    monkeypatch.setattr(corpus_read, "CHUNK_PIECES", 1)
    monkeypatch.setattr(corpus_windows, "BLOCK_WINDOWS", 1)
    packing = Packing(4, mode, "document", BOS)
    expected, _ = blocks_of(Source("en", dataset=good), packing)
    blocks, notes = blocks_of(Source("en", dataset=records), packing)
    assert plain(blocks) == plain(expected)
    assert notes["records_without_text"] == 5 and notes["empty_documents"] == 1
    for number, block in enumerate(blocks):
        start = json.loads(json.dumps(block.start))
        again, same = blocks_of(Source("en", dataset=records), packing, start)
        assert plain(again) == plain(blocks[number:]) and same == notes


class Endless:
    """Fails when it is read far beyond what is needed."""

    def __iter__(self) -> Any:
        for number in range(20_000):
            yield {"text": "abcd", "lang": ("en", "zh")[number % 2]}
        raise AssertionError("read on")


def test_a_source_ends_when_its_groups_are_full() -> None:
    for mode in ("packed", "documents"):
        packing = Packing(4, mode, max_tokens=4003)
        blocks, notes = blocks_of(Source("en", dataset=Endless()), packing)
        assert len(plain(blocks)) == 1000 and notes["dropped_tokens"] == {}
        just = Packing(4, mode, max_tokens=4000)
        assert plain(blocks_of(Source("en", dataset=Endless()), just)[0]) == plain(blocks)
        assert blocks[-1].fraction == pytest.approx(4000 / 4003)
        source = Source(group_column="lang", groups=("en", "zh"), dataset=Endless())
        assert len(plain(blocks_of(source, packing)[0])) == 2000
    assert blocks_of(Source("en", dataset=Endless()), Packing(4, max_tokens=3))[0] == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0,), "--window 0, --max-tokens all"),
        ((1, "packed", "window", 0), "at least 2"),
        ((4, "padded"), "unknown packing"),
        ((4, "packed", "always", 0), "unknown BOS policy"),
        ((4, "packed", "document"), "needs a BOS token"),
        ((4, "packed", "none", None, 0), "--window 4, --max-tokens 0"),
    ],
)
def test_bad_packings_are_refused(arguments: tuple[Any, ...], match: str) -> None:
    with pytest.raises(RelneuronError) as caught:
        Packing(*arguments)
    assert match in caught.value.cause + caught.value.fix and caught.value.exit_code == 2


def test_a_text_that_begins_with_bos_gets_no_second_one(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("one two\nthree four\n")
    (source,) = parse_sources([f"en={tmp_path / 'en.txt'}"])
    ids = {"one two": [1, 5, 6], "three four": [7, 8]}
    packing = Packing(3, "documents", "document", 1)
    block, _ = make_blocks(source, packing, lambda texts: [ids[text] for text in texts])
    assert isinstance(block, Block)
    assert [window.ids.tolist() for window in block.windows] == [[1, 5, 6], [1, 7, 8]]
    assert [window.first.tolist() for window in block.windows] == [[True, False, False]] * 2


class Speaker:
    """A tokenizer that puts some tokens before a text."""

    def __init__(self, before: list[int], bos_token_id: int | None, bare: list[int]) -> None:
        self.before, self.bos_token_id, self.bare = before, bos_token_id, bare

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, Any]:
        ids = [*(self.before if add_special_tokens else []), *self.bare]
        return {"input_ids": [ids for _ in texts]}


def test_the_default_policy_is_the_tokenizers_own() -> None:
    assert default_bos(Speaker([1], 1, [5])) == ("document", 1)
    assert default_bos(Speaker([0], 0, [5])) == ("document", 0)
    assert default_bos(Speaker([], 1, [5])) == ("none", None)
    assert default_bos(Speaker([2], 1, [5])) == ("none", None)
    assert default_bos(Speaker([7], None, [5])) == ("none", None)
    assert default_bos(Speaker([], 1, [1])) == ("none", None)  # a text's own token


# --- documents that are joined -----------------------------------------------------------------

RECORDS = ["ab c", "", "d", "e f gh", "", "i"]


def merging(texts: Sequence[str]) -> list[list[int]]:
    """One token a character, but one of what meets where documents are joined."""
    return [[ord(c) for c in text.replace("c\n\n", "#").replace("\n\n\n\n", "*")] for text in texts]


@pytest.mark.parametrize("bos", ["document", "window", "none"])
def test_joined_documents_are_tokenised_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bos: str
) -> None:
    lines = [json.dumps({"text": t, "of": g}) for t in RECORDS for g in ("a", "b")]
    (tmp_path / "x.jsonl").write_text("".join(line + "\n" for line in [*lines, '{"of": "c"}']))
    source = parse_sources([str(tmp_path / "x.jsonl")], group_column="of")[0]
    packing = Packing(4, "packed", bos, None if bos == "none" else BOS, join="\n\n")
    (whole,) = merging(["\n\n".join(RECORDS)])
    documents = [("a", whole), ("b", whole)]
    monkeypatch.setattr(corpus_read, "CHUNK_PIECES", 3)
    *blocks, notes = make_blocks(source, packing, merging)
    found = [
        (block.groups[window.group], window.ids.tolist(), window.first.tolist())
        for block in blocks
        for window in block.windows
    ]
    assert sorted(found) == sorted(reference(documents, packing)) and len(found) > 7
    assert notes["records_without_text"] == 1 and notes["empty_documents"] == 0
    # From the state of a block on the same ones follow.
    again = list(make_blocks(source, packing, merging, state=blocks[0].start))
    assert [w.ids.tolist() for w in again[0].windows] == [w.ids.tolist() for w in blocks[0].windows]


def test_a_long_line_is_joined_as_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij\nkl\n")
    monkeypatch.setattr(corpus_read, "PIECE_BYTES", 4)
    (source,) = parse_sources([f"en={tmp_path / 'a.txt'}"])
    blocks = list(make_blocks(source, Packing(14, join="--"), merging))[:-1]
    (window,) = (window for block in blocks for window in block.windows)
    assert "".join(map(chr, window.ids)) == "abcdefghij--kl"


def test_joined_documents_are_no_larger_than_a_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(("x" * 999 + "\n") * 1100)
    (source,) = parse_sources([f"en={tmp_path / 'a.txt'}"])
    source = replace(source, max_record_mib=1)
    with pytest.raises(RelneuronError, match="a text of joined documents of more than 1 MiB"):
        list(make_blocks(source, Packing(14, join="\n\n"), merging))
    assert list(make_blocks(source, Packing(14, max_tokens=28), merging))
