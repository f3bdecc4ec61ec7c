"""Sources of a corpus: what parses, what is refused, and what their fingerprint sees."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.artifact.files import RelneuronError
from relneuron.texts.read import read_chunks
from relneuron.texts.sources import MIB, Source, describe_source, parse_sources

TEXTS = ["one", "zwei ä", "三 四", "four\tfour", "fünf"]


def source(path: Path, **options: Any) -> Source:
    return parse_sources([f"en={path}"], **options)[0]


def test_paths_of_a_name_are_one_source_and_folders_are_sorted(tmp_path: Path) -> None:
    folder = tmp_path / "zh"
    folder.mkdir()
    for name in ("b.jsonl", "a.txt", "c.parquet", "notes.md", ".hidden.txt"):
        (folder / name).write_bytes(b"")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.bin").write_bytes(b"")
    texts = [f"en={tmp_path}/a.txt", f"zh={folder}", f"en={tmp_path}/a.bin"]
    found = parse_sources(texts, text_column="content", ids_dtype="uint32")
    assert [s.group for s in found] == ["en", "zh"]
    assert [(Path(f.path).name, f.kind) for f in found[0].files] == [
        ("a.txt", "text"),
        ("a.bin", "bin"),
    ]
    assert [Path(f.path).name for f in found[1].files] == ["a.txt", "b.jsonl", "c.parquet"]
    assert found[0].text_column == "content" and found[0].ids_dtype == "uint32"
    assert not found[0].is_ids and parse_sources(texts[2:])[0].is_ids


def test_paths_without_a_name_are_one_source_with_a_group_column(tmp_path: Path) -> None:
    (tmp_path / "x=y.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text("")
    texts = [str(tmp_path / "x=y.jsonl"), str(tmp_path / "b.jsonl")]
    found = parse_sources(texts, group_column="lang", groups=["zh", "en"])
    assert len(found) == 1 and len(found[0].files) == 2
    assert (found[0].group, found[0].groups) == (None, ("zh", "en"))


@pytest.mark.parametrize(
    ("texts", "options", "match"),
    [
        ([], {}, "no corpus"),
        (["en={}/none.txt"], {}, "none.txt does not exist"),
        (["en={}/empty"], {}, "empty holds no file of a corpus"),
        (["en={}/a.csv"], {}, "a.csv has an unknown suffix"),
        (["en="], {}, "names no path"),
        (["{}/a.txt"], {}, "has no group"),
        (["/x=/y"], {}, "is no name of a group"),
        (["en={}/a.txt", "zh={}/a.txt"], {}, "twice"),
        (["en={}/a.txt", "en={}/empty/../a.txt"], {}, "twice"),
        (["en={}/a.jsonl"], {"group_column": "lang"}, "so does --group-column"),
        (["{}/a.txt"], {"group_column": "lang"}, "has no fields"),
        (["en={}/a.txt"], {"groups": ["en"]}, "needs --group-column"),
        (["{}/a.jsonl"], {"group_column": "lang", "groups": ["en", "en"]}, "en,en"),
        (["en={}/a.txt"], {"ids_dtype": "float32"}, "unknown --ids-dtype"),
    ],
)
def test_bad_sources_are_refused(
    tmp_path: Path, texts: list[str], options: dict[str, Any], match: str
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("a.txt", "a.csv", "a.jsonl"):
        (tmp_path / name).write_text("x")
    with pytest.raises(RelneuronError, match=match) as caught:
        parse_sources([text.replace("{}", str(tmp_path)) for text in texts], **options)
    assert caught.value.exit_code == 2 and "\n" not in caught.value.cause


def as_bytes(save: Any, *options: Any, **named: Any) -> bytes:
    buffer = io.BytesIO()
    save(*options, buffer, **named)
    return buffer.getvalue()


LINES = ("\n".join(TEXTS) + "\n").encode()
RECORDS = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
IDS = torch.tensor([5, 6, 7])


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (as_bytes(torch.save, IDS), "pt"),
        (as_bytes(torch.save, IDS, _use_new_zipfile_serialization=False), "pt"),
        (as_bytes(lambda ids, file: np.save(file, ids), IDS.numpy()), "npy"),
        (b"PAR1...", "parquet"),
        (LINES, "text"),
        (gzip.compress(LINES, mtime=0), "text"),
        (LINES * 9999, "text"),
        (gzip.compress(LINES * 9999, mtime=0), "text"),
        (b"\xef\xbb\xbf" + LINES, "text"),
        (b"{{Infobox}}\n", "text"),
        (b"[1] a footnote\n", "text"),
        (b"", "text"),
        (RECORDS, "jsonl"),
        (b"\n" + RECORDS, "jsonl"),
        (gzip.compress(RECORDS, mtime=0), "jsonl"),
        (RECORDS[:-1], "jsonl"),
        (b'{"text": "' + b"x" * 100_000 + b'"}\n', "jsonl"),
        (json.dumps({"text": TEXTS}, indent=1).encode(), None),
        (json.dumps(TEXTS).encode(), None),
        (b"\0\1\2", None),
        ("ä".encode("latin-1"), None),
        ("abc".encode("utf-16"), None),
        (pickle.dumps([1, 2]), None),
        (gzip.compress(b"\0\1\2", mtime=0), None),
        (gzip.compress(LINES, mtime=0)[:30], None),
        (as_bytes(lambda file: np.savez(file, ids=IDS.numpy())), None),
    ],
)
def test_what_a_file_holds_shows_in_its_first_bytes(
    tmp_path: Path, data: bytes, kind: str | None
) -> None:
    path = tmp_path / "id.en.train.llama-7b"
    path.write_bytes(data)
    if kind is None:
        with pytest.raises(RelneuronError, match="by its content it is no text") as caught:
            source(path)
        assert path.name in caught.value.cause and ".jsonl" in caught.value.fix
        return
    (file,) = source(path).files
    assert file.kind == kind
    if kind == "parquet":
        return
    pieces = [piece for chunk in read_chunks(source(path), None, 100) for piece in chunk.pieces]
    if kind in ("pt", "npy"):
        assert [p.content.tolist() for p in pieces] == [[5, 6, 7]]
    elif TEXTS[0] in data.decode(errors="ignore") or data[:2] == b"\x1f\x8b":
        assert [p.content for p in pieces][:5] == TEXTS


def test_token_ids_of_the_authors_name_their_group(tmp_path: Path) -> None:
    for name in ("id.en.train.llama", "id.zh.valid.qwen-2.5", "README", "notes.md"):
        torch.save(IDS, tmp_path / name) if name[:3] == "id." else (tmp_path / name).write_text("x")
    found = parse_sources([str(tmp_path / "id.en.train.llama")])
    assert [s.group for s in found] == ["en"] and found[0].is_ids
    # In a folder, token ids need no suffix, but text does.
    files = source(tmp_path).files
    assert [Path(f.path).name for f in files] == ["id.en.train.llama", "id.zh.valid.qwen-2.5"]
    with pytest.raises(RelneuronError, match="README has no group"):
        parse_sources([str(tmp_path / "README")])


def ids_of(path: Path, vocabulary: int, **options: Any) -> list[int]:
    chunks = read_chunks(source(path, **options), None, vocabulary)
    return [int(i) for chunk in chunks for piece in chunk.pieces for i in piece.content]


@pytest.mark.parametrize(
    ("wide", "guessed", "vocabulary"),
    [("uint32", "uint16", 300), ("int64", "uint16", 300), ("int64", "uint32", 70_000)],
)
def test_raw_ids_wider_than_their_guessed_dtype_are_refused(
    tmp_path: Path, wide: str, guessed: str, vocabulary: int
) -> None:
    path, ids = tmp_path / "a.bin", [*range(290), 0, 0, 7]
    np.array(ids, wide).tofile(path)
    with pytest.raises(RelneuronError, match=f"every second id is 0.* wider than {guessed}") as no:
        ids_of(path, vocabulary)
    assert path.name in no.value.cause and "--ids-dtype" in no.value.fix
    assert ids_of(path, vocabulary, ids_dtype=wide) == ids


@pytest.mark.parametrize(
    "ids",
    [[0] * 1000, [5, 0] * 500 + [5, 9], [0, 5] * 500, [5, 0] * 7, [5] + [0] * 14, []],
    ids=["zeros", "one odd id", "even zeros", "short", "one id", "empty"],
)
def test_raw_ids_with_many_zeros_are_read(tmp_path: Path, ids: list[int]) -> None:
    np.array(ids, np.uint16).tofile(tmp_path / "a.bin")
    assert ids_of(tmp_path / "a.bin", 300) == ids
    np.array([5, 0] * 500, np.uint16).tofile(tmp_path / "b.bin")
    assert ids_of(tmp_path / "b.bin", 300, ids_dtype="uint16") == [5, 0] * 500


@pytest.mark.parametrize(("suffix", "package"), [("parquet", "pyarrow"), ("hf", "datasets")])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, package: str
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setattr("relneuron.artifact.installed.find_spec", lambda name: None)
    path = "hf:x" if suffix == "hf" else tmp_path / "a.parquet"
    with pytest.raises(RelneuronError, match=f"needs {package}") as caught:
        parse_sources([f"en={path}"])
    assert "[data]" in caught.value.fix


def test_the_fingerprint_changes_with_the_content_and_not_with_place_or_time(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.txt"
    data = bytearray(b"x" * (3 * MIB))
    path.write_bytes(data)
    before = describe_source(source(path))
    assert json.loads(json.dumps(before)) == before and str(tmp_path) not in json.dumps(before)
    os.utime(path, (1, 1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_bytes(data)
    assert describe_source(source(path)) == before
    assert describe_source(source(tmp_path / "other" / "a.txt")) == before
    for place in (0, MIB - 1, MIB, 3 * MIB // 2, 2 * MIB, 3 * MIB - 1):
        changed = data.copy()
        changed[place] = 0
        path.write_bytes(changed)
        assert describe_source(source(path)) != before
    path.write_bytes(data[:-1])
    assert describe_source(source(path)) != before
    path.write_bytes(data)
    assert describe_source(source(path)) == before and before["text_column"] is None
    (tmp_path / "a.jsonl").write_bytes(b"")
    columns = [
        describe_source(source(tmp_path / "a.jsonl", text_column=name))["text_column"]
        for name in (None, "other")
    ]
    assert columns == ["text", "other"]
