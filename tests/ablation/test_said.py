"""What is said of rows, in a few bytes each; and the tables of effects, written as they come."""

from __future__ import annotations

import io
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from relneuron.ablation import tables
from relneuron.ablation.said import PackedRows, Row, Said
from relneuron.ablation.tables import Accuracy, table_pieces
from relneuron.artifact.effects import CHOICE, WRITTEN
from relneuron.artifact.files import csv_bytes


@pytest.mark.parametrize(
    "value",
    [
        lambda n: n / 7,
        lambda n: n,
        lambda n: f"text {n % 3}",
        lambda n: [f"é{n % 5}", n / 3, n % 2],
        lambda n: ["a", 0.5, n, -1],
        lambda n: [f"{n}", n, "eos", [n, None]],
        lambda n: [None, 0.5][n % 2],  # of two types
        lambda n: [["a", None, True][n % 3], [1, 1.0][n % 2], [0.25, "x"][n % 2]],
    ],
)
def test_every_row_has_what_was_said_of_it(value: Any) -> None:
    rng, rows = random.Random(0), [Row(c, p) for c in range(13) for p in range(1, 30, 3)]
    rng.shuffle(rows)
    batches = [rows[at : at + 7] for at in range(0, len(rows), 7)]
    wanted = {row: value(n) for n, row in enumerate(rows)}
    found = Said(batches, [[wanted[row] for row in batch] for batch in batches])
    assert dict(found) == wanted and len(found) == len(rows)
    for row in rows:
        both = found[row], wanted[row]
        kinds = [list(map(type, one)) if isinstance(one, list) else type(one) for one in both]
        assert kinds[0] == kinds[1]
    for condition in range(13):
        prompts = [row.prompt for row in rows if row.condition == condition]
        assert [*found.of(condition, prompts)] == [wanted[Row(condition, p)] for p in prompts]
        assert not [*found.of(condition, [])]
    for row in (Row(0, 0), Row(13, 1), Row(0, 30), Row(0, 99), Row(-1, 32)):
        assert row not in found
        with pytest.raises(KeyError):
            found[row]
        with pytest.raises(KeyError):
            found.of(row.condition, [1, row.prompt])


def test_nothing_was_said_of_no_row() -> None:
    assert dict(Said([], [])) == {} and Row(0, 0) not in Said([], [])


def test_packed_rows_are_the_rows_in_8_bytes_each() -> None:
    rng = random.Random(0)
    rows = [Row(rng.randrange(1 << 20), rng.randrange(1 << 30)) for _ in range(500)]
    packed = PackedRows(iter(rows))
    assert [*packed] == rows == [packed[place] for place in range(len(packed))]
    assert {type(row) for row in packed} == {Row} == {type(packed[3])}
    assert type(packed[3].prompt) is int
    assert packed.numbers.nbytes == 8 * len(rows)
    assert rows[7] in packed and Row(0, 1 << 30) not in packed
    assert [*PackedRows.of(packed.numbers[5:9])] == rows[5:9]
    assert not PackedRows([]) and [*PackedRows([])] == []
    with pytest.raises(IndexError):
        packed[500]
    with pytest.raises(OverflowError):
        PackedRows([Row(0, 1 << 31)])


def test_an_answer_takes_a_few_bytes() -> None:
    n = 20_000
    tracemalloc.start()
    batches = ([Row(c, p) for p in range(20)] for c in range(n // 20))
    found = Said(batches, ([[f"said {p % 9}", p / 7, p % 2] for p in range(20)] for _ in batches))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == n // 2  # every second batch is of the values
    assert size < 70 * len(found)


def effects(n: int, *, choices: bool) -> list[tuple[Any, ...]]:
    about = [("clean", "r", "eva", f"={i}", "x", "", i % 2, "y", -i / 3) for i in range(n)]
    return [(*one, "é") for one in about] if choices else about


@pytest.mark.parametrize("choices", [False, True])
@pytest.mark.parametrize("n", [1, 99, 100, 101, 350])
def test_a_table_in_pieces_is_the_whole_one(
    monkeypatch: pytest.MonkeyPatch, n: int, choices: bool
) -> None:
    import pyarrow.parquet

    rows = effects(n, choices=choices)
    names = (*WRITTEN, CHOICE)[: len(rows[0])]
    assert b"".join(table_pieces(Path("e.csv"), rows)) == csv_bytes(names, rows)
    monkeypatch.setattr(tables, "_ROWS", 25)
    monkeypatch.setattr(tables, "_GROUP", 100)
    table = pyarrow.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    whole = io.BytesIO()
    pyarrow.parquet.write_table(table, whole, row_group_size=100)
    data = b"".join(table_pieces(Path("e.parquet"), rows))
    assert data == whole.getvalue()
    assert pyarrow.parquet.read_table(io.BytesIO(data)).equals(table)


def test_a_row_group_is_as_large_as_pyarrows() -> None:
    """So that a table of fewer rows has the bytes that it had when it was written at once."""
    import pyarrow
    import pyarrow.parquet

    whole = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"a": [0] * (tables._GROUP + 1)}), whole)
    about = pyarrow.parquet.ParquetFile(whole).metadata
    assert [about.row_group(i).num_rows for i in (0, 1)] == [tables._GROUP, 1]


def test_accuracies_are_counted_while_rows_go_by() -> None:
    accuracy, rows = Accuracy(), effects(5, choices=False)
    assert [*accuracy.count(rows)] == rows and accuracy.n_effects == 5
    assert accuracy.rows() == [("clean", "r", "eva", 5, 2, 0.4)]
    assert b"".join(accuracy.pieces()).endswith(b"\nclean,r,eva,5,2,0.4\n")
