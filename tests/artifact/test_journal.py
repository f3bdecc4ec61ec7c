"""A journal that several processes share, each noting its own blocks; and the bar of a stage."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tqdm.std import tqdm

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal, is_first, n_started, progress_bar

KEYS = [f"block {number}" for number in range(40)]


class Threads:
    """As `model.ranks.Ranks`, of threads."""

    def __init__(self, rank: int, size: int, barrier: Any, numbers: Any) -> None:
        self.rank, self.size = rank, size
        self.wait, self._numbers = barrier.wait, numbers

    def take(self) -> int:
        return next(self._numbers)


def by_threads(path: Path, size: int, until: int = 99) -> list[dict[str, Any]]:
    """What each of some threads that share a journal has in the end, and how many it did itself.

    None of them does more than `until` blocks, as if it was killed then.
    """
    barrier, numbers = threading.Barrier(size, timeout=10), itertools.count()

    def work(rank: int) -> dict[str, Any]:
        ranks = Threads(rank, size, barrier, numbers)
        if rank:
            ranks.wait()
        journal = Journal(path, {"a": 1}, ranks=ranks)
        if not rank:
            ranks.wait()
        ranks.wait()
        journal.SAVE_EVERY_S = 0.0
        n_own = 0
        for key in KEYS:
            if n_own == until:
                return dict(journal.done)
            if journal.takes(key):
                journal.add(key, [key, "ä"])
                n_own += 1
        journal.together()
        return {**journal.done, "own": n_own}

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_block_is_done_once_and_known_to_all(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.journal"
    found = by_threads(path, size)
    assert sum(one.pop("own") for one in found) == len(KEYS)
    assert all(one == {key: [key, "ä"] for key in KEYS} for one in found)
    assert names(tmp_path) == ["a.journal", *(f"a.journal.{n}" for n in range(1, size))]
    journal = Journal(path, {"a": 1})  # whoever goes on has what all of them did
    assert journal.done == found[0] and names(tmp_path) == ["a.journal"]
    journal.remove()
    assert names(tmp_path) == []


@pytest.mark.parametrize(("before", "size"), [(3, 2), (2, 4), (4, 1), (1, 3)])
def test_another_number_goes_on(tmp_path: Path, before: int, size: int) -> None:
    path = tmp_path / "a.journal"
    by_threads(path, before, until=5)
    with (tmp_path / f"a.journal.{before - 1}" if before > 1 else path).open("ab") as file:
        file.write(b'cut {"key": "bl')  # by the kill
    found = by_threads(path, size)
    assert sum(one.pop("own") for one in found) == len(KEYS) - 5 * before
    assert all(one == {key: [key, "ä"] for key in KEYS} for one in found)


def test_what_one_of_them_noted_otherwise_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    by_threads(path, 2, until=5)
    part = tmp_path / "a.journal.1"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([*lines[:3], lines[3].replace(b"block", b"black"), *lines[4:]]))
    with pytest.warns(UserWarning, match="3 of 6 lines are not as they were written"):
        journal = Journal(path, {"a": 1})
    assert len(journal.done) == 7
    part.write_bytes(b"".join(lines))  # of other inputs
    with pytest.warns(UserWarning, match="other inputs"):
        assert len(Journal(path, {"a": 2}).done) == 0


def test_rows_that_are_not_as_noted_are_done_again(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.journal", {"x": [0, 1], "y": [2], "z": []}
    journal = Journal(path, {})
    for key, own in rows.items():
        journal.add(key, {"rows": own, "digest": str(own) if own else None})
    journal.add("of no rows", ["said"])
    with pytest.warns(UserWarning, match="rows of a file are not as .*: 1 of 4 blocks"):
        journal.check(lambda own: "[2]" if own == [2] else "other", "a file")
    left = ["y", "z", "of no rows"]
    assert list(journal.done) == list(Journal(path, {}).done) == left


def test_processes_that_share_no_folder_are_told(tmp_path: Path) -> None:
    second = Threads(1, 2, threading.Barrier(1), None)
    with pytest.raises(RelneuronError, match="not the folder that the first process") as caught:
        Journal(tmp_path / "a.journal", {}, ranks=second)
    assert "all processes share" in caught.value.fix and names(tmp_path) == []


def test_blocks_of_others_that_are_lost_are_missed(tmp_path: Path) -> None:
    class Gone(Threads):
        def take(self) -> int:
            return 7

    path = tmp_path / "a.journal"
    journal = Journal(path, {}, ranks=Gone(0, 2, threading.Barrier(1), None))
    assert [key for key in KEYS[:9] if journal.takes(key)] == [KEYS[7]]
    journal.add(KEYS[7], 1)
    with pytest.raises(RelneuronError, match="8 blocks that other processes have done are lost"):
        journal.together()


def test_one_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, size, n, first in (
        (None, None, 1, True),
        (None, "4", 1, True),  # of a cluster whose jobs are not torchrun's
        ("0", "4", 4, True),
        ("2", "4", 4, False),
        ("2", "1", 1, True),
    ):
        for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        assert (n_started(), is_first()) == (n, first)


class Widget(tqdm):
    """As tqdm.auto gives in a notebook."""


Widget.__module__ = "tqdm.notebook"


@pytest.mark.parametrize("quiet", [False, True])
def test_a_bar_is_off_where_there_is_no_terminal(quiet: bool) -> None:
    with progress_bar(3, "record", "prompt", quiet) as bar:
        assert bar.disable


@pytest.mark.parametrize("quiet", [False, True])
def test_a_notebook_shows_it(quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("tqdm.auto.tqdm", Widget)
    with progress_bar(3, "record", "prompt", quiet, done=1) as bar:
        assert isinstance(bar, Widget) and bar.disable == quiet
        bar.update(2)
    assert ("record" in capsys.readouterr().err) != quiet
