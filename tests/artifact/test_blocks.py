"""A journal that stays small: values on the disk, few open files, lines that were replaced gone."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from relneuron.artifact.blocks import Blocks
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal, head_of
from relneuron.artifact.memory import peak_bytes, resident_bytes
from tests.kit.forked import Forked

TEXT = "ä" * 2000  # of a block of about 4 KB


def filled(path: Path, n: int) -> Journal:
    with Journal(path, {}) as journal:
        for number in range(n):
            journal.keep(str(number), 0, ["a", number])
            journal.keep(str(number), 1, {"b": TEXT})
            journal.add(str(number), number)
    return journal


def pieces(journal: Journal) -> list[Any]:
    return [
        [value, *(journal.piece(key, n) for n in (0, 1))] for key, value in journal.done.items()
    ]


# --- pieces ----------------------------------------------------------------------------------


def test_pieces_belong_to_the_block_that_is_added_next(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    journal = filled(path, 3)
    wanted = [[n, ["a", n], {"b": TEXT}] for n in range(3)]
    assert pieces(journal) == pieces(Journal(path, {})) == wanted
    for number in (1, 0):  # in any order
        journal.keep("3", number, 1)
    journal.add("budget", 64)  # of a batch that did not fit
    journal.keep("3", 0, 0)  # again
    journal.add("3", "last")
    journal.keep("4", 0, "of a block that never ended")
    journal.commit()
    for one in (journal, Journal(path, {})):
        assert one.done["3"] == "last" and [one.piece("3", n) for n in (0, 1)] == [0, 1]
        assert list(one.done) == ["0", "1", "2", "budget", "3"]
    with pytest.raises(KeyError):
        journal.piece("4", 0)


def test_pieces_of_a_block_that_never_ended_are_no_others(tmp_path: Path) -> None:
    """Another process has done it meanwhile; the next block of this one has its own."""
    path = tmp_path / "a.journal"
    with Journal(path, {}) as journal:
        journal.keep("0", 0, "of a block that never ended")
        journal.keep("0", 1, "of it, too")
    with Journal(path, {}) as journal:
        journal.keep("1", 0, "own")
        journal.add("1", 1)
    again = Journal(path, {})
    assert again.piece("1", 0) == "own" and [*again.done] == ["1"]
    with pytest.raises(IndexError):
        again.piece("1", 1)


def test_a_block_that_was_cut_has_no_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    filled(path, 3)
    data = path.read_bytes()
    for cut in range(len(data) - 200, len(data), 7):  # within the last block's own line, or before
        path.write_bytes(data[:cut])
        journal = Journal(path, {})
        assert list(journal.done) == ["0", "1"]
        for number in (0, 1):
            journal.keep("2", number, "again")
        journal.add("2", 2)
        journal.commit()
        assert pieces(Journal(path, {}))[2] == [2, "again", "again"]


def test_blocks_done_again_take_their_pieces_along(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    journal = filled(path, 4)
    size = path.stat().st_size
    with pytest.warns(UserWarning, match="2 of 4 blocks are done again"):
        journal.redo(["1", "3"], "lost")
    assert path.stat().st_size < 0.6 * size
    assert (
        pieces(journal) == pieces(Journal(path, {})) == [[n, ["a", n], {"b": TEXT}] for n in (0, 2)]
    )


def test_a_file_that_changes_under_its_reader_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    journal = filled(path, 3)
    path.write_bytes(path.read_bytes()[100:])
    with pytest.raises(RelneuronError, match="was changed while it was read|not JSON"):
        list(journal.done.values())


# --- what was replaced -----------------------------------------------------------------------


def stale(path: Path, n_times: int = 9) -> dict[str, Any]:
    """A journal of blocks that were done again and of budgets; what stands."""
    with Journal(path, {}, ranks=Others()) as journal:  # which does not leave out lines itself
        for time, key in itertools.product(range(n_times), "ab"):
            journal.add("budget", 100 - time)
            journal.keep(key, 0, [TEXT, time])
            journal.add(key, time)
    return {"budget": 101 - n_times, "a": n_times - 1, "b": n_times - 1}


class Others:
    """As `model.ranks.Ranks`, of two processes of which the other one does nothing."""

    rank, size = 0, 2

    def wait(self) -> None: ...

    def take(self) -> int:
        return 0


def test_lines_that_were_replaced_are_left_out_when_they_outweigh_the_others(
    tmp_path: Path,
) -> None:
    path, once = tmp_path / "a.journal", tmp_path / "once.journal"
    wanted = stale(path)
    stale(once, 1)
    before = path.stat().st_size
    journal = Journal(path, {})
    assert dict(journal.done) == wanted and path.stat().st_size < before / 5
    assert abs(path.stat().st_size - once.stat().st_size) < 200  # a budget
    assert [journal.piece(key, 0) for key in "ab"] == [[TEXT, 8]] * 2
    journal.add("a", 9)  # a little that was replaced stays
    journal.commit()
    size = path.stat().st_size
    assert Journal(path, {}).done["a"] == 9 and path.stat().st_size == size


def test_a_running_stage_leaves_them_out_too(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    journal = Journal(path, {})
    journal.SAVE_EVERY_S = 0.0
    sizes = []
    for number in range(300):
        journal.keep("a", 0, [TEXT, number])
        journal.add("a", number)
        sizes.append(path.stat().st_size)
        assert (journal.done["a"], journal.piece("a", 0)[1]) == (number, number)
    assert max(sizes) < 20_000 and dict(Journal(path, {}).done) == {"a": 299}


def killed_everywhere(folder: Path, wanted: dict[str, Any]) -> None:
    """Open the journal of a folder, killed at the first step of its writing, at the second, ..."""
    from tests.kit.count_crash import KILLED, Faults, code_of

    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    path = folder / "a.journal"
    for at in itertools.count(1):
        for file in folder.iterdir():
            file.unlink()
        for name, data in whole.items():
            (folder / name).write_bytes(data)
        pid = os.fork()
        if not pid:
            Faults(at, lambda: os._exit(KILLED), kills=True)
            Journal(path, {})
            os._exit(0)
        code = code_of(pid)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is lost
            journal = Journal(path, {})
        assert dict(journal.done) == wanted, at
        assert path.stat().st_size < len(whole[path.name])
        if code == 0:
            break
        assert code == KILLED
    print(at)


@pytest.mark.parametrize("of", ["lines that were replaced", "journals of other processes"])
def test_killed_while_it_is_written_again_it_is_as_good_as_before(tmp_path: Path, of: str) -> None:
    path = tmp_path / "a.journal"
    wanted = stale(path)
    if of == "journals of other processes":
        for number in (1, 2):
            part = tmp_path / f"a.journal.{number}"
            with Journal(tmp_path / "b", {}) as journal:
                journal.keep(f"of {number}", 0, TEXT)
                journal.add(f"of {number}", number)
            (tmp_path / "b").rename(part)
        wanted |= {"of 1": 1, "of 2": 2}
    process = Forked(killed_everywhere, tmp_path, wanted)
    assert process.wait(60) == 0, process.said()
    assert int(process.said()[0]) > 5


# --- memory, files and time ------------------------------------------------------------------


def last_long(path: Path, n: int) -> None:
    """Note and read many small batches; what of memory and files they took, and syncs."""
    syncs, true = [0], os.fsync

    def fsync(handle: int) -> None:
        syncs[0] += 1
        true(handle)

    os.fsync = fsync  # type: ignore[assignment]
    found: dict[str, Any] = {}
    files = len([*Path("/proc/self/fd").iterdir()])
    with Journal(path, {}) as journal:
        for number in range(n):
            journal.keep(str(number), 0, [TEXT, number])
            journal.add(str(number), ["said", number])
            if number == n // 10:
                found["first"] = resident_bytes()
        found["files"] = len([*Path("/proc/self/fd").iterdir()]) - files
    assert all(journal.done[str(number)][1] == number for number in range(n))
    assert all(journal.piece(str(number), 0)[1] == number for number in range(n))
    again = Journal(path, {})
    assert len(again.done) == n
    found |= {"peak": peak_bytes(), "syncs": syncs[0], "bytes": path.stat().st_size}
    print(json.dumps(found))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for its memory")
def test_ten_thousand_batches_take_no_memory_few_files_and_few_syncs(tmp_path: Path) -> None:
    process = Forked(last_long, tmp_path / "a.journal", 10_000)
    assert process.wait(300) == 0, process.said()
    found = json.loads(process.said()[0].splitlines()[-1])
    assert found["bytes"] > 40_000_000
    # The places of 9,000 blocks, and what waits to be written; not their 40 MB.
    assert found["peak"] - found["first"] < 12 << 20, found
    assert found["files"] <= 1 and found["syncs"] < 30, found


def test_a_process_reads_on_what_the_first_one_has_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    first = filled(path, 3)
    blocks = Blocks()
    blocks.read(path, head_of({}))
    first.remove()
    assert not path.exists() and [blocks[str(n)] for n in range(3)] == [0, 1, 2]
    assert blocks.piece("1", 1) == {"b": TEXT}
