"""Files between stages: atomic writes under faults, the journal after a kill, the lock, neurons.

Every system call of a write is made to fail once; the old file must stay and nothing be left over.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

import relneuron.artifact.files
import relneuron.artifact.journal
import relneuron.artifact.manifest
from relneuron.artifact.files import RelneuronError, atomic_write, csv_bytes, real_path
from relneuron.artifact.journal import Journal
from relneuron.artifact.manifest import Manifest, checked, locked
from relneuron.artifact.neurons import NeuronFile, check_neurons
from relneuron.artifact.prompts import Prompt, read_prompts
from relneuron.artifact.reading import read_csv


@contextmanager
def on_windows() -> Iterator[None]:
    """os.name as files.py reads it; pathlib's own must stay, or it makes other paths."""
    system = SimpleNamespace(**{**vars(os), "name": "nt"})
    with mock.patch.object(relneuron.artifact.files, "os", system):
        yield


@pytest.mark.parametrize("call", ["fsync", "fdopen", "chmod", "replace"])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path if call in ("chmod", "replace") else os, call, fail)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_files_have_the_permissions_of_the_user(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", b"")
    finally:
        os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_windows_opens_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refused(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError):
        atomic_write(tmp_path / "file", b"posix")
    with on_windows():
        atomic_write(tmp_path / "file", b"windows")
    assert (tmp_path / "file").read_bytes() == b"windows"


@pytest.mark.parametrize(("n_refusals", "written"), [(3, b"new"), (99, b"old")])
def test_on_windows_a_write_waits_for_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_refusals: int, written: bytes
) -> None:
    path, asked, waited = tmp_path / "file", [], []
    atomic_write(path, b"old")
    replaces = Path.replace

    def replace(temporary: Path, target: Path) -> Path:
        asked.append(target)
        if len(asked) <= n_refusals:
            raise PermissionError(errno.EACCES, "the file is used by another process")
        return replaces(temporary, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(relneuron.artifact.files.time, "sleep", waited.append)
    with on_windows(), nullcontext() if written == b"new" else pytest.raises(PermissionError):
        atomic_write(path, b"new")
    assert path.read_bytes() == written and [p.name for p in tmp_path.iterdir()] == ["file"]
    assert waited == [*relneuron.artifact.files._WAITS_S[:n_refusals]] and sum(waited) < 1
    assert len(asked) == len(waited) + 1
    asked.clear()
    with pytest.raises(PermissionError):  # a fault of rights elsewhere is one at once
        atomic_write(path, b"new")
    assert len(asked) == 1


def test_a_journal_cut_anywhere_keeps_its_whole_lines(tmp_path: Path) -> None:
    path, inputs = tmp_path / "journal", {"a": 1}
    with Journal(path, inputs) as journal:
        for number in range(5):
            journal.add(str(number), [number, "ä"])
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        # Only a head can be cut that was not killed while it was appended.
        with nullcontext() if cut in (0, *range(ends[0], cut + 1)) else pytest.warns(match="cut"):
            again = Journal(path, inputs)
        n_whole = max(sum(end <= cut for end in ends) - 1, 0)
        assert again.done == {str(i): [i, "ä"] for i in range(n_whole)}
        again.add("next", 0)
        again.commit()
        assert Journal(path, inputs).done == again.done
    with pytest.warns(match=r"of other inputs \(inputs.a: 1 -> 2\)"):
        assert Journal(path, {"a": 2}).done == {}


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_of_a_journal_is_found_and_what_follows_done_again(
    tmp_path: Path, seed: int
) -> None:
    path, inputs = tmp_path / "journal", {"a": 1}
    with Journal(path, inputs) as journal:
        for number in range(5):
            journal.add(str(number), [number, 0.25])
    data, rng = path.read_bytes(), random.Random(seed)
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for _ in range(100):
        place = rng.randrange(len(data) - 1)  # without the last line end the last line is cut
        path.write_bytes(flipped(data, place, rng.randrange(8)))
        with pytest.warns(match="not as they were written"):
            again = Journal(path, inputs)
        n_whole = max(sum(end <= place for end in ends) - 1, 0)
        assert again.done == {str(i): [i, 0.25] for i in range(n_whole)}
        again.add("next", 0)
        again.commit()
        assert Journal(path, inputs).done == again.done


def flipped(data: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


def test_blocks_are_done_again_when_a_stage_says_so(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path, {}) as journal:
        for number in range(4):
            journal.add(str(number), number)
    journal.redo([], "no reason")
    with pytest.warns(match="its rows are gone: 2 of 4 blocks are done again"):
        journal.redo(["0", "2"], "its rows are gone")
    journal.add("2", 7)
    journal.commit()
    assert Journal(path, {}).done == {"1": 1, "3": 3, "2": 7}


def test_a_journal_of_another_version_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(tmp_path / "journal", {}) as journal:
        journal.add("0", 7)
    monkeypatch.setattr(relneuron.artifact.journal, "versions", lambda: {"torch": "9"})
    with pytest.warns(match="versions.torch: .* -> 9"):
        assert Journal(tmp_path / "journal", {}).done == {}


def test_an_error_saves_nothing_an_interrupt_saves_all(tmp_path: Path) -> None:
    for error, saved in ((RuntimeError, {}), (KeyboardInterrupt, {"0": 7})):
        path = tmp_path / error.__name__
        with pytest.raises(error), Journal(path, {}) as journal:
            journal.add("0", 7)
            raise error
        assert Journal(path, {}).done == saved


def test_a_second_writer_is_refused_and_stale_files_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".effects.csv.abcd_123.tmp").write_bytes(b"half")
    other = (
        "import sys, pathlib; from relneuron.artifact.manifest import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('in')"
    )
    words = [sys.executable, "-c", other, str(tmp_path)]
    with locked(tmp_path), locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        refused = subprocess.run(words, capture_output=True, text=True)
        assert "another process is writing" in refused.stderr
    assert subprocess.run(words, capture_output=True, text=True).stdout == "in\n"


def test_temporary_files_of_others_are_not_swept(tmp_path: Path) -> None:
    others = {".lock", ".mine.tmp", ".notes.txt.tmp", ".a.TEMPFILE.tmp", ".folder.abcdefgh.tmp"}
    for name in others - {".lock", ".folder.abcdefgh.tmp"}:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".folder.abcdefgh.tmp").mkdir()
    # What a writer leaves that is killed before its rename.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", interrupt)
        patch.setattr(Path, "unlink", lambda path: None)
        atomic_write(tmp_path / "a.csv", b"half")
    assert len([*tmp_path.glob(".a.csv.*.tmp")]) == 1
    with locked(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == others


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def neuron_file() -> NeuronFile:
    model = {"id": "m", "layers": 2, "width": 4, "hidden": 3}
    return NeuronFile(model, "ap", {"b": [(0, "up", 3, 0.75)], "a": []}, {"b": {"ties": 1}})


def test_neurons_round_trip_and_know_their_model(tmp_path: Path) -> None:
    path, neurons = tmp_path / "neurons.json", neuron_file()
    neurons.write(path)
    data = json.loads(path.read_text())
    assert list(data) == ["format", "model", "method", "selection", "sets"]
    assert data["sets"] == {"b": [[0, "up", 3, 0.75]], "a": []}
    read = NeuronFile.read(path)
    assert read == neurons
    read.check_model({"layers": 2, "width": 4, "hidden": 3})
    with pytest.raises(RelneuronError, match="'layers': 3"):
        read.check_model({"layers": 3, "width": 4, "hidden": 3})


def test_neurons_count_once() -> None:
    shape = {"layers": 1, "width": 4, "hidden": 3}
    rows: list[Any] = [[0, "up", 3, 0.5], [0, "up", 3], (0, "down", 2)]
    assert check_neurons(rows, shape) == [(0, "up", 3), (0, "down", 2)]


def test_a_file_of_the_same_size_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("1")
    Manifest(tmp_path).finish("a", {}, [path])
    assert checked(path) == path
    path.write_text("2")
    with pytest.raises(RelneuronError, match="its digest differs"):
        checked(path)


def test_a_stage_is_forgotten_when_what_it_read_is_another(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in "abcd"}

    def finish(stage: str, text: str, reads: str) -> set[str]:
        files[stage].write_text(text)
        manifest = Manifest(tmp_path)
        manifest.finish(stage, {}, [files[stage]], reads=[files[name] for name in reads])
        return set(Manifest(tmp_path).data["stages"])

    finish("a", "1", "")
    finish("b", "1", "a")
    finish("c", "1", "b")
    assert finish("d", "1", "") == {*"abcd"}
    # The same bytes again, then others: all that was made of them goes, what was not stays.
    assert finish("a", "1", "") == {*"abcd"}
    assert finish("a", "2", "") == {*"ad"}
    assert set(Manifest(tmp_path).data["files"]) == {*"ad"}


def test_a_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema": "relneuron.study/9"}')
    with pytest.raises(RelneuronError, match="relneuron.study/9"):
        Manifest(tmp_path)


def test_a_table_without_a_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    assert list(read_csv(tmp_path / "t.csv", ("a",))) == [{"a": "1", "b": "2"}]
    with pytest.raises(RelneuronError, match="column c"):
        list(read_csv(tmp_path / "t.csv", ("a", "c")))


TEXTS = [
    "=cmd|'/c calc'!A1",
    "+1+1",
    "-a",
    "@SUM(A1)",
    "\t1",
    "\r1",
    " =1",
    "＝1",
    "'=1",
    "''=1",
    "'",
]


def test_no_cell_acts_as_a_formula_and_all_come_back(tmp_path: Path) -> None:
    plain = ["'tis", "a=b", "", "-1.5", "+2", "-inf", "1e-05", "-5 "]
    path = tmp_path / "t.csv"
    path.write_bytes(csv_bytes(("n", "text"), [(-1.5, text) for text in TEXTS + plain]))
    with path.open(newline="") as file:
        cells = [row[1] for row in csv.reader(file)][1:]
    assert cells == [f"'{text}" if text != "'" else text for text in TEXTS] + plain
    assert [row["text"] for row in read_csv(path, ("n", "text"))] == TEXTS + plain
    assert {row["n"] for row in read_csv(path, ("n", "text"))} == {"-1.5"}


def test_prompts_with_a_byte_order_mark_are_read_and_other_encodings_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    fields = ("id", "relation", "split", "language", "template", "subject", "object", "prompt")
    line = json.dumps(dict.fromkeys(fields, "é"), ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    assert read_prompts(path) == [Prompt(*["é"] * 8)]
    path.write_bytes(line.encode() + b"\n" + line.encode("latin-1"))
    with pytest.raises(RelneuronError, match=r"prompts.jsonl, line 2: not UTF-8"):
        read_prompts(path)


def test_a_loop_of_links_has_a_path(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert real_path(loop).name == "loop" and not loop.exists()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert real_path(tmp_path / "x" / ".." / "link") == real_path(tmp_path) / "a"
