"""Readers: limits of what a file may fill the memory with, and one line for each thing wrong."""

from __future__ import annotations

import errno
import gzip
import io
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.numpy import save_file

from relneuron.artifact import reading
from relneuron.artifact.files import RelneuronError, csv_bytes
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.parquet import read_table
from relneuron.artifact.prompts import read_prompts
from relneuron.artifact.reading import (
    MIB,
    allow_record_mib,
    open_tensors,
    read_csv,
    read_json,
    read_lines,
)
from relneuron.texts.read import read_chunks
from relneuron.texts.sources import parse_sources

PROMPT = {"id": "a", "relation": "r", "split": "eva", "language": "en", "template": "{}"}
PROMPT |= {"subject": "s", "object": "o", "prompt": "p"}


@pytest.fixture(autouse=True)
def one_mib() -> Iterator[None]:
    """Records of one MiB at most."""
    before = reading.max_record_mib()
    allow_record_mib(1)
    yield
    allow_record_mib(before)


def read_corpus(path: Path) -> list[Any]:
    source = parse_sources([f"en={path}"])[0]
    return [piece for chunk in read_chunks(source, None) for piece in chunk.pieces]


# --- limits ----------------------------------------------------------------------------------


def large_records(folder: Path, n_bytes: int) -> dict[str, Path]:
    """A record of `n_bytes` in each format that packs it to next to nothing, or not at all."""
    text = "x" * n_bytes
    paths = {name: folder / f"a.{name}" for name in ("jsonl", "jsonl.gz", "parquet")}
    line = json.dumps({"text": text}).encode() + b"\n"
    paths["jsonl"].write_bytes(line)
    paths["jsonl.gz"].write_bytes(gzip.compress(line))
    table = pyarrow.table({"text": [text]})
    pyarrow.parquet.write_table(table, paths["parquet"], compression="zstd")
    return paths


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_a_record_above_the_limit_is_refused_and_the_option_raises_it(
    tmp_path: Path, kind: str
) -> None:
    path = large_records(tmp_path, 3 * MIB)[kind]
    with pytest.raises(RelneuronError, match=r"a (record|value) of more than 1 MiB") as error:
        read_corpus(path)
    assert str(path) in error.value.cause and "--max-record-mib" in error.value.fix
    allow_record_mib(4)
    assert [len(piece.content) for piece in read_corpus(path)] == [3 * MIB]


def test_a_value_that_a_file_repeats_is_in_memory_once(tmp_path: Path) -> None:
    """600 times one text of 900 KiB, which the file holds once, is read row by row."""
    values = pyarrow.array(["y" * (900 << 10)])
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 600, pyarrow.int32()), values)
    path = tmp_path / "a.parquet"
    how = {"dictionary_pagesize_limit": 1 << 30, "write_statistics": False}
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, compression="zstd", **how)
    del rows, values
    assert path.stat().st_size < 4096
    before = pyarrow.default_memory_pool().max_memory()
    source = parse_sources([f"en={path}"])[0]
    assert sum(len(chunk.pieces) for chunk in read_chunks(source, None)) == 600
    assert pyarrow.default_memory_pool().max_memory() < before + 64 * MIB


def test_what_a_zip_unpacks_to_is_bounded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.zeros(1 << 20, dtype=torch.int64), buffer)
    path = tmp_path / "ids.pt"
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zip_:
        for name in whole.namelist():
            zip_.writestr(name, whole.read(name))
    with pytest.raises(RelneuronError, match=r"ids\.pt: 8,.* bytes, an expansion of more"):
        read_corpus(path)
    (tmp_path / "plain.pt").write_bytes(buffer.getvalue())
    assert sum(len(piece.content) for piece in read_corpus(tmp_path / "plain.pt")) == 1 << 20


def test_a_prompt_is_bounded_and_a_cell_and_a_json_file(tmp_path: Path) -> None:
    prompts, table, value = (tmp_path / name for name in ("p.jsonl", "t.csv", "v.json"))
    prompts.write_text(json.dumps(PROMPT | {"x": [[]] * (1 << 19)}) + "\n")
    with pytest.raises(RelneuronError, match=r"p\.jsonl, line 1: a line of more than 1 MiB"):
        read_prompts(prompts)
    table.write_bytes(csv_bytes(("a", "b"), [(1, "x"), (2, "x" * 2 * MIB)]))
    with pytest.raises(RelneuronError, match=r"t\.csv, line 3: a line of more than 1 MiB"):
        list(read_csv(table, ("a",)))
    value.write_text(json.dumps("x" * 5 * MIB))
    with pytest.raises(RelneuronError, match=r"v\.json: a number of more than 4 MiB"):
        read_json(value, "number")
    allow_record_mib(16)
    assert len(read_prompts(prompts)) == 1 and read_json(value, "number")
    assert [row.whole("a") for row in read_csv(table, ("a",))] == [1, 2]


# --- text, JSON, csv -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "lacks the column a, b"),
        (b"a;b\n1;2\n", "lacks the column a, b: its columns are separated by semicolons"),
        (b"a,b,a\n1,2,3\n", "names a column twice"),
        (b"a,b\n1\n", "line 2: 1 cells for 2 columns"),
        (b"a,b\n1,2\n1,2,3\n", "line 3: 3 cells for 2 columns"),
        (b"a,b\n\xff,2\n", "line 2: .*invalid start byte"),
        (b"a,b\nx,2\n", "line 2: a is 'x', not an integer"),
        (b"a,b\n1e3,2\n", "line 2: a is '1e3', not an integer"),
        (b"a,b\n-1,2\n", "line 2: a is '-1', not at least 0"),
        (b"a,b\n\n1,nan\n", "line 3: b is 'nan', not a finite number"),
        (b"a,b\n1,1e999\n", "line 2: b is '1e999', not a finite number"),
        (b"a,b\n1,\n", "line 2: b is '', not a finite number"),
        (b'a,b\n"1\n2",2\n', r"line 2: a is '1\\n2', not an integer"),
    ],
)
def test_a_csv_says_where_it_is_wrong(tmp_path: Path, data: bytes, cause: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    with pytest.raises(RelneuronError, match=rf"t\.csv.*{cause}"):
        for row in read_csv(path, ("a", "b")):
            assert row.whole("a") + row.finite("b") < 10


def test_cells_of_a_csv_and_of_a_parquet_are_one(tmp_path: Path) -> None:
    rows = [("=1+1", 1, 0.5), ("'x", 0, -2.0), ("a\nb", 1, 1e-300)]
    (tmp_path / "t.csv").write_bytes(csv_bytes(("t", "f", "n"), rows))
    columns = dict(zip(("t", "f", "n"), map(list, zip(*rows, strict=True)), strict=True))
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        found = read_table(tmp_path / name, ("t", "f", "n"))
        assert [(r["t"], r.flag("f"), r.real("n")) for r in found] == rows
    with pytest.raises(RelneuronError, match="it lacks the column u"):
        list(read_table(tmp_path / "t.parquet", ("t", "u")))


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        ("[1]".encode("utf-16"), "not UTF-8"),
    ],
)
def test_json_says_what_is_wrong(tmp_path: Path, data: bytes, cause: str) -> None:
    path = tmp_path / "v.json"
    path.write_bytes(data)
    with pytest.raises(RelneuronError, match=rf"v\.json.*{cause}"):
        read_json(path, "list")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    for read in (
        lambda: read_json(tmp_path, "list"),
        lambda: list(read_csv(tmp_path, ("a",))),
        lambda: list(read_lines(tmp_path)),
        lambda: NeuronFile.read(tmp_path),
    ):
        with pytest.raises(RelneuronError, match="is a folder, not a file"):
            read()


# --- tensors, neurons, manifests -------------------------------------------------------------


def test_tensors_are_checked_before_they_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"x": np.zeros((2, 3), np.float32)}, path, {"names": '["a", "a"]', "bad": "{"})
    with open_tensors(path, "record MODEL") as file:
        assert file.get("x", (2, None)).shape == (2, 3)
        for call, cause in (
            (lambda: file.get("y", (1,)), "it has no y"),
            (lambda: file.get("x", (3, None)), r"x is F32\[2, 3\], not F32\[3, 'any'\]"),
            (lambda: file.get("x", (2, 3, 1)), r"x is F32\[2, 3\], not"),
            (lambda: file.get("x", (2, 3), "I64"), "not I64"),
            (lambda: file.names_of("names"), "names are no names, each of its own"),
            (lambda: file.about("bad"), "bad: not JSON"),
        ):
            with pytest.raises(RelneuronError, match=cause) as error:
                call()
            assert error.value.fix == "make it again with: relneuron record MODEL --force"


@pytest.mark.parametrize("size", [0, 1 << 60, (1 << 64) - 1])
def test_a_header_that_lies(tmp_path: Path, size: int) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b'{"x":{"dtype":"F32","shape":[1]}}')
    with pytest.raises(RelneuronError, match=r"t\.safetensors is damaged"), open_tensors(path, "x"):
        pass


NEURONS: dict[str, Any] = {
    "format": "relneuron.neurons/1",
    "model": {"layers": 2, "width": 4, "hidden": 3},
    "method": "ap",
    "sets": {"r": [[0, "gate", 1, 0.5]]},
}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"format": "x"}, "format is not"),
        ({"model": []}, "model is not an object"),
        ({"model": {"layers": 2, "width": 4.5, "hidden": 3}}, r"model\.width is not"),
        ({"model": NEURONS["model"] | {"q": "4"}}, r"model\.q is not"),
        ({"method": 3}, "method is not a text"),
        ({"selection": []}, "selection is not an object"),
        ({"sets": []}, "sets is not an object"),
        ({"sets": {"r": {}}}, r"sets\.r is not a list"),
        ({"sets": {"r": [[0, "gate", 1, 0.5], [0, "gate", 1]]}}, "neuron 2 of 'r' is not"),
        ({"sets": {"r": [[0, "gate", True, 0.5]]}}, "neuron 1 of 'r' is not"),
        ({"sets": {"r": [[0, "gate", -1, 0.5]]}}, "neuron 1 of 'r' is not"),
        ({"sets": {"r": [[0, "gate", 1 << 40, 0.5]]}}, "neuron 1 of 'r' is not"),
        ({"sets": {"r": [[0.0, "gate", 1, 0.5]]}}, "neuron 1 of 'r' is not"),
        ({"sets": {"r": [[0, "gate", 1, None]]}}, "neuron 1 of 'r' is not"),
    ],
)
def test_neurons_say_where_they_are_wrong(
    tmp_path: Path, change: dict[str, Any], cause: str
) -> None:
    path = tmp_path / "neurons.json"
    path.write_text(json.dumps(NEURONS))
    assert NeuronFile.read(path).sets == {"r": [(0, "gate", 1, 0.5)]}
    path.write_text(json.dumps(NEURONS | change))
    with pytest.raises(RelneuronError, match=rf"neurons\.json .*{cause}"):
        NeuronFile.read(path)


FILE = {"sha256": "0" * 64, "bytes": 1}
STAGE: dict[str, Any] = {"inputs": {}, "files": ["a"]}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"schema": "x"}, "schema"),
        ({"stages": [1]}, "stages is not an object"),
        ({"stages": {"count": 1}}, r"stages\.count is not a stage"),
        ({"stages": {"count": STAGE | {"reads": ["a"]}}}, r"count\.reads is not files"),
        ({"stages": {"count": STAGE | {"inputs": 1}}}, r"count\.inputs is not an object"),
        ({"stages": {"count": STAGE | {"files": "a"}}}, r"count\.files is not a list"),
        ({"stages": {"count": STAGE | {"commands": ["a"]}}}, r"count\.commands is not"),
        ({"files": {"a": {"bytes": 1}}}, r"files\.a is not bytes and sha256"),
        ({"files": {"../a": FILE}}, r"files\.\.\./a is not a file of this folder"),
        ({"files": {"/a": FILE}}, r"files\./a is not a file of this folder"),
        ({"model": {"layers": -1}}, r"model\.layers is not a size"),
    ],
)
def test_a_manifest_says_where_it_is_wrong(
    tmp_path: Path, change: dict[str, Any], cause: str
) -> None:
    data = {"schema": "relneuron.study/1", "stages": {"count": STAGE}, "files": {"a": FILE}}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(data))
    assert Manifest(tmp_path).data["files"] == {"a": FILE}
    path.write_text(json.dumps(data | change))
    with pytest.raises(RelneuronError, match=rf"manifest\.json.*{cause}"):
        Manifest(tmp_path)


@pytest.mark.parametrize(
    ("number", "said"), [(errno.EINVAL, "x.pth is no torch file"), (errno.ENOSPC, "why")]
)
def test_a_place_before_the_begin_is_the_content_s_fault(number: int, said: str) -> None:
    """A reader that is led there by what it read is told so by the system; a full disk is none."""
    kind = OSError if said == "why" else RelneuronError
    with pytest.raises(kind, match=said), reading.reading("x.pth", "torch file", "give another"):
        raise OSError(number, "why")
