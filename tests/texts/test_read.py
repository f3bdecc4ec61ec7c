"""Documents of a corpus: every kind of file, read from every position, and what is wrong in it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.artifact import parquet
from relneuron.artifact.files import RelneuronError
from relneuron.texts import read as corpus_read
from relneuron.texts.read import read_chunks
from relneuron.texts.records import Piece
from relneuron.texts.sources import MIB, Source, parse_sources

TEXTS = ["one", "zwei ä", "三 四", "four\tfour", "fünf"]


def pieces_of(source: Source, vocabulary: int | None = None) -> list[Piece]:
    return [p for chunk in read_chunks(source, None, vocabulary) for p in chunk.pieces]


def plain(pieces: list[Piece]) -> list[Any]:
    """Pieces that can be compared."""
    return [
        (p.group, p.content.tolist() if isinstance(p.content, np.ndarray) else p.content, p.begins)
        for p in pieces
    ]


def source(path: Path, **options: Any) -> Source:
    return parse_sources([f"en={path}"], **options)[0]


def fails(path: Path, match: str, vocabulary: int | None = 100, **options: Any) -> None:
    """Reading raises one line of cause, with the file's name, and one line of fix."""
    with pytest.raises(RelneuronError, match=match) as caught:
        pieces_of(source(path, **options), vocabulary)
    said = caught.value.cause + caught.value.fix
    assert path.name in said and not any(w in said for w in ("\n", "weights_only", "allow_pickle"))


def write_txt(folder: Path) -> tuple[Path, list[Any]]:
    path = folder / "a.txt"
    lines = "\r\n".join([TEXTS[0], "", *TEXTS[1:3]]) + "\n\n" + "\n".join(TEXTS[3:])
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    return path, [("en", text, True) for text in TEXTS]


def write_txt_gz(folder: Path) -> tuple[Path, list[Any]]:
    path, expected = write_txt(folder)
    packed = folder / "b.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed, expected


def write_jsonl(folder: Path) -> tuple[Path, list[Any]]:
    path = folder / "a.ndjson"
    lines = [json.dumps({"text": text, "n": i}) for i, text in enumerate([*TEXTS, ""])]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\n \n")
    return path, [("en", text, True) for text in [*TEXTS, ""]]


def write_jsonl_gz(folder: Path) -> tuple[Path, list[Any]]:
    path, expected = write_jsonl(folder)
    packed = folder / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed, expected


def write_parquet(folder: Path) -> tuple[Path, list[Any]]:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = folder / "a.parquet"
    texts = [*TEXTS, "", None, *(f"document {i}" for i in range(20))]
    table = pyarrow.table({"n": range(len(texts)), "text": texts})
    parquet.write_table(table, path, row_group_size=7)
    return path, [("en", text, True) for text in texts]


IDS = np.arange(24).reshape(4, 6) * 3
ROWS = [("en", row.tolist(), True) for row in IDS]


def write_npy(folder: Path) -> tuple[Path, list[Any]]:
    np.save(folder / "a.npy", IDS.astype(np.uint16))
    return folder / "a.npy", ROWS


def write_pt(folder: Path) -> tuple[Path, list[Any]]:
    torch.save(torch.from_numpy(IDS), folder / "a.pt")
    return folder / "a.pt", ROWS


def write_old_pt(folder: Path) -> tuple[Path, list[Any]]:
    ids = torch.from_numpy(IDS.reshape(-1)).int()
    torch.save(ids, folder / "a.pt", _use_new_zipfile_serialization=False)
    return folder / "a.pt", [("en", ids.tolist(), True)]


def write_bin(folder: Path) -> tuple[Path, list[Any]]:
    IDS.astype(np.uint16).tofile(folder / "a.bin")
    return folder / "a.bin", [("en", IDS.reshape(-1).tolist(), True)]


WRITERS = [write_txt, write_txt_gz, write_jsonl, write_jsonl_gz, write_parquet]
WRITERS += [write_npy, write_pt, write_old_pt, write_bin]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__[6:])
def test_every_kind_is_read_and_goes_on_from_every_position(
    write: Callable[[Path], tuple[Path, list[Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, expected = write(tmp_path)
    monkeypatch.setattr(parquet, "ROWS", 3)
    assert plain(pieces_of(source(path), 100)) == expected
    monkeypatch.setattr(corpus_read, "CHUNK_PIECES", 1)
    chunks = list(read_chunks(source(path), None, 100))
    assert [plain(chunk.pieces)[0] for chunk in chunks] == expected
    fractions = [chunk.fraction for chunk in chunks]
    assert fractions == sorted(fractions) and 0 < fractions[-1] <= 1  # type: ignore[type-var,operator]
    for number, chunk in enumerate(chunks, 1):
        position = json.loads(json.dumps(chunk.position))
        rest = [p for c in read_chunks(source(path), position, 100) for p in c.pieces]
        assert plain(rest) == expected[number:]


def test_the_files_of_a_source_follow_each_other(tmp_path: Path) -> None:
    writers = (write_jsonl, write_bin, write_txt)
    found = [write(tmp_path) for write in writers]
    together = parse_sources([f"en={path}" for path, _ in found])[0]
    expected = [piece for _, pieces in found for piece in pieces]
    assert plain(pieces_of(together, 100)) == expected
    chunks, n = list(read_chunks(together, None, 100)), 0
    assert len(chunks) == len(writers)
    for chunk in chunks:
        n += len(chunk.pieces)
        rest = [p for c in read_chunks(together, chunk.position, 100) for p in c.pieces]
        assert plain(rest) == expected[n:]


@pytest.mark.parametrize("size", [5, 6, 7, 8, 9, 64])
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_a_long_line_comes_in_pieces_that_end_at_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, suffix: str
) -> None:
    monkeypatch.setattr(corpus_read, "PIECE_BYTES", size)
    monkeypatch.setattr(corpus_read, "CHUNK_PIECES", 1)
    lines = ["aé三𝄞" * 5, "x", "𝄞𝄞𝄞𝄞", "abcdefg", "ab\rcdefg\r!", "", "eight888\r"]
    for end in ("\n", "\r\n"):
        path = tmp_path / f"a{suffix}"
        data = end.join(lines).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
        chunks = list(read_chunks(source(path), None))
        pieces = [piece for chunk in chunks for piece in chunk.pieces]
        joined: list[str] = []
        for piece in pieces:
            assert len(piece.content.encode()) <= size
            if piece.begins:
                joined.append("")
            joined[-1] += piece.content
        assert joined == [line for line in lines if line]
        for number, chunk in enumerate(chunks, 1):
            rest = [p for c in read_chunks(source(path), chunk.position) for p in c.pieces]
            assert rest == pieces[number:]


def test_a_line_of_some_mib_comes_in_pieces_of_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "三" * (MIB - 10)
    path.write_text(f"{text}\nend", encoding="utf-8")
    pieces = pieces_of(source(path))
    assert [piece.begins for piece in pieces] == [True, False, False, True]
    assert "".join(piece.content for piece in pieces[:-1]) == text
    assert all(MIB - 4 < len(piece.content.encode()) <= MIB for piece in pieces[:2])


def test_long_rows_of_ids_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_read, "PIECE_TOKENS", 4)
    path, _ = write_npy(tmp_path)
    pieces = pieces_of(source(path), 100)
    assert [piece.begins for piece in pieces] == [True, False] * 4
    assert np.concatenate([piece.content for piece in pieces]).tolist() == IDS.reshape(-1).tolist()
    assert all(piece.content.dtype == np.int32 for piece in pieces)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"not json", "line 2: not JSON"),
        (b'"text"', "line 2: no object"),
        (b'{"text": "a", "text": "b"}', "line 2: not JSON .the key 'text' stands twice"),
        (b'{"text": "\xff"}', "line 2: not UTF-8"),
        (b'{"text": "\\ud800"}', "line 2: it holds half a surrogate pair"),
        (b"[" * 200_000, "line 2: not JSON"),
    ],
    ids=range(6),
)
def test_bad_records_name_file_and_line(tmp_path: Path, line: bytes, match: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    fails(path, match)


def test_a_record_without_text_is_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records: list[Any] = [{"text": None}, {"other": 1}, {"text": 3}, {"text": ["x"]}, {"text": ""}]
    lines = [json.dumps(record) for record in records]
    for place in range(len(lines) + 1):
        path.write_text("\n".join([*lines[:place], '{"text": "good"}', *lines[place:]]))
        assert [p.content for p in pieces_of(source(path)) if p.content] == ["good"]
        contents = [p.content for p in pieces_of(source(path)) if p.content != "good"]
        assert contents == [None] * 4 + [""]


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({}, "line 1: no field 'text'"),
        ({"other": "x"}, "line 1: no field 'text', only other"),
        ({"text": 3}, "line 1: the field 'text' is no string"),
        ({"text": [None]}, "line 1: the field 'text' is no string"),
    ],
)
def test_a_file_without_any_text_is_refused(tmp_path: Path, record: Any, match: str) -> None:
    path, line = tmp_path / "a.jsonl", json.dumps(record) + "\n"
    path.write_text(line * 3)
    fails(path, match)
    # The name of the field is wrong; nobody wants to wait for the end of the file.
    path.write_text(line * 1000 + "never read")
    fails(path, match)


def test_bad_bytes_name_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\nb\xc3\n")
    fails(tmp_path / "a.txt", "line 3: not UTF-8")
    (tmp_path / "cut.txt").write_bytes("ok\n三".encode()[:-1])
    fails(tmp_path / "cut.txt", "line 2: not UTF-8")
    (tmp_path / "b.txt.gz").write_bytes(b"no gzip")
    fails(tmp_path / "b.txt.gz", "b.txt.gz: ")
    noise = np.random.default_rng(0).bytes(99).hex().encode()
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(noise)[:-20])
    fails(tmp_path / "c.txt.gz", "c.txt.gz: ")
    mutant = bytearray(gzip.compress(noise))
    mutant[30:40] = bytes(10)
    (tmp_path / "d.txt.gz").write_bytes(mutant)
    fails(tmp_path / "d.txt.gz", "d.txt.gz: ")


def test_bad_parquet_files_are_refused_before_the_first_file_is_read(tmp_path: Path) -> None:
    path, _ = write_parquet(tmp_path)
    fails(path, "no field 'other', only n, text", text_column="other")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    fails(tmp_path / "bad.parquet", "is no parquet file")
    both = parse_sources([f"en={path}", f"en={tmp_path / 'bad.parquet'}"])[0]
    with pytest.raises(RelneuronError, match="bad.parquet is no parquet file"):
        next(read_chunks(both, None))
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [["a"], None]}), tmp_path / "lists.parquet")
    fails(tmp_path / "lists.parquet", "the field 'text' is no string")


def test_records_name_their_group(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x", "lang": g}) + "\n" for g in ("en", 7, "zh")))
    found = parse_sources([str(path)], group_column="lang")[0]
    assert [piece.group for piece in pieces_of(found)] == ["en", "7", "zh"]
    for value in (None, 1.5, True, ["en"]):
        path.write_text(json.dumps({"text": "x", "lang": value}))
        with pytest.raises(RelneuronError, match="line 1: the group"):
            pieces_of(found)
    path.write_text(json.dumps({"text": "x"}))
    with pytest.raises(RelneuronError, match="line 1: no field 'lang'"):
        pieces_of(found)
