"""Parts of a stage put together; what they are made of is refused where it does not belong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relneuron.artifact.dense import create_safetensors, rows_digest
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.gains import GAINS
from relneuron.artifact.journal import Journal, PartDone
from relneuron.artifact.parts import merge_parts

KEYS = [f"attribute {number}" for number in range(5)]
JOURNAL = "attribute.journal"
N, F = 10, 3  # two rows of a block


def part(folder: Path, shard: tuple[int, int], inputs: Any = None, add: float = 0.0) -> Path:
    """A part of five blocks, each with two rows of a file: their numbers."""
    folder.mkdir()
    maps = list(create_safetensors(folder / GAINS, {"a": (N, F), "b": (N, 1)}).values())
    journal = Journal(folder / JOURNAL, inputs or {"seed": 1}, shard=shard)
    with pytest.raises(PartDone, match=re.escape("part {}/{} is done".format(*shard))), journal:
        for number, key in enumerate(KEYS):
            if journal.takes(key):
                rows = [2 * number, 2 * number + 1]
                for array in maps:
                    array[rows] = np.array(rows)[:, None] + add
                digest = rows_digest(maps, rows)
                journal.add(key, {"found": [number + add], "rows": rows, "digest": digest})
        journal.together()
    return folder


def parts(folder: Path, n: int = 2) -> list[Path]:
    return [part(folder / f"{i}", (i, n)) for i in range(1, n + 1)]


@pytest.mark.parametrize("n", [2, 3, 7])
def test_parts_are_the_whole(tmp_path: Path, n: int) -> None:
    """Of more parts than blocks some have none."""
    output = tmp_path / "all"
    assert merge_parts(parts(tmp_path, n), output) == {JOURNAL: len(KEYS)}
    maps = list(create_safetensors(output / GAINS, {"a": (N, F), "b": (N, 1)}).values())
    journal = Journal(output / JOURNAL, {"seed": 1})
    journal.check(lambda rows: rows_digest(maps, rows), GAINS)  # warns of none
    assert {key: value["found"] for key, value in journal.done.items()} == {
        key: [number] for number, key in enumerate(KEYS)
    }
    assert maps[0].tolist() == [[row] * F for row in range(N)]
    assert not any(journal.takes(key) for key in KEYS)


def test_what_a_part_lacks_is_left_to_do(tmp_path: Path) -> None:
    first, second = parts(tmp_path)
    path = second / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))  # killed before its last block
    assert merge_parts([first, second], tmp_path / "all") == {JOURNAL: 4}
    maps = list(create_safetensors(second / GAINS, {"a": (N, F), "b": (N, 1)}).values())
    maps[0][2, 0] = 7  # a row that is not as it was noted
    merge_parts([first, second], tmp_path / "again")
    maps = list(create_safetensors(tmp_path / "again" / GAINS, {"a": (N, F), "b": (N, 1)}).values())
    journal = Journal(tmp_path / "again" / JOURNAL, {"seed": 1})
    with pytest.warns(UserWarning, match="1 of 4 blocks are done again"):
        journal.check(lambda rows: rows_digest(maps, rows), GAINS)
    assert [key for key in KEYS if journal.takes(key)] == [KEYS[1], KEYS[3]]


def test_the_smallest_budget_stays(tmp_path: Path) -> None:
    folders = parts(tmp_path)
    for folder, budget in zip(folders, (64, 32), strict=True):
        with Journal(folder / JOURNAL, {"seed": 1}) as journal:
            journal.add("budget", budget)
    assert merge_parts(folders, tmp_path / "all") == {JOURNAL: len(KEYS)}
    assert Journal(tmp_path / "all" / JOURNAL, {"seed": 1}).done["budget"] == 32


def refused(folders: list[Path], output: Path, cause: str, **asked: Any) -> None:
    with pytest.raises(RelneuronError, match=cause):
        merge_parts(folders, output, **asked)


def test_parts_that_do_not_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = parts(tmp_path)
    output = tmp_path / "all"
    other = part(tmp_path / "other", (2, 2), inputs={"seed": 2})
    refused([first, other], output, "parts of different runs: inputs.seed: 1 -> 2")
    twice = part(tmp_path / "twice", (1, 2), add=1.0)
    refused([first, twice], output, "other results of the same batch")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused([first, empty], output, "does not hold the unfinished stages")
    refused([first, second], second, "is one of the parts")
    (second / GAINS).write_bytes((second / GAINS).read_bytes()[:-4])
    refused([first, second], output, "is damaged")
    whole = (first / GAINS).read_bytes()
    for data in (
        whole[8:],
        b"\xff" * 8 + whole[8:],
        whole.replace(b"[10,3]", b"[3,10]"),
        whole.replace(b"[10,3]", b"[10,9]"),
        whole.replace(b"[10,3]", b"[30.]0"),
        whole.replace(b'"shape"', b'"shave"'),
        (4).to_bytes(8, "little") + b"1.50" + whole,
    ):
        (second / GAINS).write_bytes(data)
        refused([first, second], output, "is damaged|is not of the shape")
    assert not (output / GAINS).exists()
    with monkeypatch.context() as patch:
        patch.setattr("relneuron.artifact.parts.versions", lambda: {"torch": "0"})
        refused([first, first], output, "other versions: .*torch")
    assert not (output / JOURNAL).exists()
    assert merge_parts([first, first], output, force=True) == {JOURNAL: 3}
    refused([first, first], output, "exists")
