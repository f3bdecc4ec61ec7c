"""Token ids of every kind of file, and Python datasets, read from every position."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.artifact.files import RelneuronError
from relneuron.texts import read as corpus_read
from relneuron.texts.read import read_chunks
from relneuron.texts.sources import File, Source, describe_source, parse_sources
from tests.texts.test_read import IDS, fails, pieces_of, plain, source


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_raw_ids_of_every_dtype(tmp_path: Path, dtype: str) -> None:
    IDS.astype(dtype).tofile(tmp_path / "a.bin")
    pieces = pieces_of(source(tmp_path / "a.bin", ids_dtype=dtype), 100)
    assert pieces[0].content.tolist() == IDS.reshape(-1).tolist()


def test_the_dtype_of_raw_ids_follows_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    np.array([1, 2], np.uint32).tofile(path)
    assert pieces_of(source(path), 65_537)[0].content.tolist() == [1, 2]
    assert pieces_of(source(path), 65_536)[0].content.tolist() == [1, 0, 2, 0]
    fails(path, "dtype of .* is unknown", None)


def test_ids_outside_the_vocabulary_are_named(tmp_path: Path) -> None:
    ids = IDS.copy()
    ids[2, 1] = -1
    np.save(tmp_path / "a.npy", ids)
    fails(tmp_path / "a.npy", "holds the token -1 at position 13, the vocabulary has 100")
    np.save(tmp_path / "b.npy", IDS)
    fails(tmp_path / "b.npy", "holds the token 69 at position 23, the vocabulary has 69", 69)
    np.save(tmp_path / "c.npy", np.array([1 << 31]))
    fails(tmp_path / "c.npy", "holds the token 2147483648 at position 0", None)


def test_files_that_hold_no_ids_are_refused(tmp_path: Path) -> None:
    for name, array in {
        "float": np.zeros(3),
        "cube": np.zeros((2, 2, 2), int),
        "objects": np.array([None]),
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
        fails(tmp_path / f"{name}.npy", "is no file of token ids")
    for name, value in {
        "floats": torch.zeros(3),
        "list": [1, 2],
        "sparse": torch.ones(3, dtype=torch.int64).to_sparse(),
    }.items():
        torch.save(value, tmp_path / f"{name}.pt")
        fails(tmp_path / f"{name}.pt", "is no file of token ids")
    for name in ("a.npy", "a.pt"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        fails(tmp_path / name, "is no file of token ids")
    (tmp_path / "a.bin").write_bytes(b"123")
    fails(tmp_path / "a.bin", "3 bytes, no multiple of 2")
    (tmp_path / "empty.bin").write_bytes(b"")
    assert pieces_of(source(tmp_path / "empty.bin"), 10) == []


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_a_hostile_file_executes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    hostile = pickle.dumps(Hostile(target))
    (tmp_path / "raw.pt").write_bytes(hostile)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as file:
        file.writestr("archive/data.pkl", hostile)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    np.save(tmp_path / "pickled.npy", np.array([Hostile(target)]), allow_pickle=True)
    (tmp_path / "raw.npy").write_bytes(hostile)
    for name in ("raw.pt", "zip.pt", "pickled.npy", "raw.npy"):
        fails(tmp_path / name, r"ids .(it is no plain array, and nothing in it was run|Array can)")
    assert not target.exists()
    assert pickle.loads(hostile) == 0 and target.exists()  # it is hostile indeed


class Stateful:
    """A dataset whose state is what makes it go on."""

    def __init__(self, n: int) -> None:
        self.n, self.at, self.n_states = n, 0, 0

    def __iter__(self) -> Any:
        while self.at < self.n:
            self.at += 1
            yield {"text": f"text {self.at}"}
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize(
    "make", [Stateful, lambda n: [{"text": f"text {i + 1}"} for i in range(n)]]
)
def test_a_dataset_goes_on_from_every_position(
    make: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_read, "STATE_EVERY", 3)
    monkeypatch.setattr(corpus_read, "CHUNK_PIECES", 1)
    expected = [("en", f"text {i}", True) for i in range(1, 11)]
    dataset = make(10)
    chunks = list(read_chunks(Source("en", dataset=dataset), None))
    assert [plain(chunk.pieces)[0] for chunk in chunks] == expected
    for number, chunk in enumerate(chunks, 1):
        position = json.loads(json.dumps(chunk.position))
        for again in (dataset, make(10)):
            rest = [p for c in read_chunks(Source("en", dataset=again), position) for p in c.pieces]
            assert plain(rest) == expected[number:]
    next(read_chunks(Source("en", dataset=dataset), chunks[3].position))  # and no further
    assert plain(pieces_of(Source("en", dataset=dataset))) == expected


def test_a_streamed_folder_goes_on_from_every_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(corpus_read, "STATE_EVERY", 4)
    monkeypatch.setattr(corpus_read, "CHUNK_PIECES", 1)
    folder = tmp_path / "data"
    folder.mkdir()
    for part in range(2):
        lines = [json.dumps({"text": f"text {part} {i}"}) for i in range(9)]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    found = parse_sources([f"en=hf:{folder}"])[0]
    assert found.files == (File(f"hf:{folder}", "hf"),)
    expected = [("en", f"text {part} {i}", True) for part in range(2) for i in range(9)]
    chunks = list(read_chunks(found, None))
    assert [plain(chunk.pieces)[0] for chunk in chunks] == expected
    for number in range(1, len(chunks), 3):
        position = json.loads(json.dumps(chunks[number - 1].position))
        rest = [p for c in read_chunks(found, position) for p in c.pieces]
        assert plain(rest) == expected[number:]
    before = describe_source(found)
    (folder / "1.jsonl").write_text("{}")
    assert describe_source(found) != before
    with pytest.raises(RelneuronError, match="cannot be loaded"):
        list(read_chunks(parse_sources([f"en=hf:{folder}::nosuch"])[0], None))
