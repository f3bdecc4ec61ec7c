"""The files of an attribution: what is written is read back, ranks, ties, damaged files."""

from __future__ import annotations

import csv
import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import relneuron.artifact.gains
from relneuron.artifact.files import RelneuronError, atomic_write
from relneuron.artifact.gains import (
    ATTRIBUTIONS,
    GAINS,
    TABLES,
    GainFile,
    Target,
    best_first,
    number,
    read_attributions,
    read_gains,
    read_targets,
    rows_text,
    table_pieces,
    targets_bytes,
)

SHAPE = {"layers": 3, "width": 5, "hidden": 4}
TARGET = Target("a.0", "a", " Rome", 7, 2, 6, 1, 0.25, float(np.float32(-1.3862944)), True)


# --- targets.csv -----------------------------------------------------------------------------


def test_targets_are_read_as_they_were_written(tmp_path: Path) -> None:
    odd = replace(TARGET, id='a,"1"\n', relation="b\r", target="\n", kept=False, prob=1e-30)
    path = tmp_path / "targets.csv"
    atomic_write(path, targets_bytes([TARGET, odd]))
    assert path.read_text(encoding="utf-8").startswith(
        "id,relation,target,target_id,n_answer_tokens,n_tokens,rank,prob,logprob,kept\n"
        "a.0,a, Rome,7,2,6,1,0.25,-1.38629436,1\n"
    )
    found = read_targets(path)
    assert [replace(t, logprob=0) for t in found] == [replace(t, logprob=0) for t in (TARGET, odd)]
    assert all(np.float32(t.logprob) == np.float32(TARGET.logprob) for t in found)


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        (",7,", ",x,", "line 2: target_id is 'x', not an integer"),
        (",1\n", ",yes\n", "kept is 'yes'"),
        (",1\n", "\n", "line 2: 9 cells for 10 columns"),
        ("relation,", "relations,", "lacks the column relation"),
    ],
)
def test_damaged_targets(tmp_path: Path, old: str, new: str, cause: str) -> None:
    path = tmp_path / "targets.csv"
    path.write_text(targets_bytes([TARGET]).decode().replace(old, new))
    with pytest.raises(RelneuronError, match=cause):
        read_targets(path)


def test_no_targets(tmp_path: Path) -> None:
    path = tmp_path / "targets.csv"
    with pytest.raises(RelneuronError, match="does not exist") as caught:
        read_targets(path)
    assert caught.value.fix == "make it with: relneuron attribute MODEL PROMPTS -o DIR"
    path.write_bytes(targets_bytes([]))
    with pytest.raises(RelneuronError, match="has no row"):
        read_targets(path)


# --- scores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1, 2, 7, 40, 59, 60, 61, None])
def test_the_best_come_first_and_of_equal_ones_the_later(top: int | None) -> None:
    rng = np.random.default_rng(0)
    for n_values in (2, 5, 1000):
        scores = rng.integers(0, n_values, (4, 15)).astype(np.float32)
        scores[1, 3] = scores[3, 14] = np.nan
        flat = scores.reshape(-1).tolist()
        # Sorted ascending and stably, then turned round, as the published code ranks.
        order = sorted((i for i, x in enumerate(flat) if x == x), key=lambda i: flat[i])[::-1]
        assert best_first(scores, top).tolist() == order[:top]
    assert best_first(np.full((2, 2), np.nan, np.float32), 3).size == 0


def test_nine_digits_give_every_float32_back() -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    for value in bits[np.isfinite(bits)].tolist():
        assert np.float32(number(value)) == np.float32(value)
    assert number(float("nan")) == ""


def table_bytes(name: str, texts: list[str]) -> bytes:
    return b"".join(table_pieces(name, texts))


def rows_of(name: str, n: int) -> list[tuple[object, ...]]:
    rng = random.Random(name)
    rows: list[tuple[object, ...]] = [
        (name, "head", 0, rank, "", "", number(float(np.float32(rng.gauss(0, 1)))), rank + 1)
        for rank in range(n)
    ]
    return [*rows, (name, "query_layer", "", "", 0, "", number(float(np.float32(-1e-30))), 1)]


@pytest.mark.parametrize("block", [1, 300, 1 << 22])
@pytest.mark.parametrize("name", ["attributions.csv", "attributions.parquet"])
def test_both_tables_hold_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int
) -> None:
    monkeypatch.setattr(relneuron.artifact.gains, "BLOCK", block)
    ids = ["a", 'b,"\n', "c\r\nd", "", "1"]
    texts = [rows_text(rows_of(key, 3 + i)) for i, key in enumerate(ids)]
    texts.insert(2, rows_text([]))  # a sentence without rows
    (tmp_path / name).write_bytes(table_bytes(name, texts))
    found = list(read_attributions(tmp_path))
    expected = [row for i, key in enumerate(ids) for row in rows_of(key, 3 + i)]
    assert [tuple(row.values()) for row in found] == [tuple(map(str, row)) for row in expected]
    assert all(tuple(row) == ATTRIBUTIONS for row in found)


def test_a_parquet_table_has_types() -> None:
    import pyarrow.parquet

    data = table_bytes("attributions.parquet", [rows_text(rows_of("a", 2))])
    table = pyarrow.parquet.read_table(io.BytesIO(data))
    types = [str(field.type) for field in table.schema]
    assert types == ["string", "string", *["int32"] * 4, "float", "int32"]
    assert table.column("layer").to_pylist() == [0, 0, None]
    assert table_bytes("attributions.parquet", []) and table.num_rows == 3


def test_a_csv_table_is_plain_text() -> None:
    text = table_bytes("attributions.csv", [rows_text(rows_of("a", 1))]).decode()
    rows = list(csv.reader(io.StringIO(text)))
    assert tuple(rows[0]) == ATTRIBUTIONS and len(rows) == 3 and rows[2][1] == "query_layer"


@pytest.mark.parametrize("name", TABLES)
def test_an_id_like_a_formula_comes_back(tmp_path: Path, name: str) -> None:
    data = table_bytes(name, [rows_text(rows_of("=1+1", 1)), rows_text(rows_of("'=1", 1))])
    (tmp_path / name).write_bytes(data)
    assert {row["id"] for row in read_attributions(tmp_path)} == {"=1+1", "'=1"}
    assert (b"'=1+1," in data) == name.endswith(".csv")


def test_no_table_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(RelneuronError, match="attributions.csv does not exist"):
        list(read_attributions(tmp_path))
    (tmp_path / "attributions.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(RelneuronError, match="is no parquet file"):
        list(read_attributions(tmp_path))


# --- gains -----------------------------------------------------------------------------------


def test_gains_are_read_as_they_were_stored(tmp_path: Path) -> None:
    gains = np.random.default_rng(2).normal(size=(6, 3, 5)).astype(np.float32)
    path = tmp_path / GAINS
    for rows in ([4, 0], [1, 5, 2], [3]):
        file = GainFile(path, SHAPE, {"ids": [*"abcdef"]})  # opened again: what was stored stays
        file.store(rows, gains[rows])
        file.flush()
    found = dict(read_gains(path, SHAPE, 6))
    assert list(found) == [0, 1, 2]
    for layer, values in found.items():
        np.testing.assert_array_equal(values, gains[:, layer])


def test_gains_of_another_attribution(tmp_path: Path) -> None:
    path = tmp_path / GAINS
    with pytest.raises(RelneuronError, match="does not exist"):
        list(read_gains(path, SHAPE, 2))
    GainFile(path, SHAPE, {"ids": [*"ab"]}).flush()
    for shape, n, cause in (
        (SHAPE, 3, r"ffn.0 is F32\[2, 5\], not F32\[3, 5\]"),
        (SHAPE | {"width": 6}, 2, r"not F32\[2, 6\]"),
        (SHAPE | {"layers": 4}, 2, "it has no ffn.3"),
    ):
        with pytest.raises(RelneuronError, match=cause):
            list(read_gains(path, shape, n))
    path.write_bytes(b"nothing")
    with pytest.raises(RelneuronError, match="gains.safetensors is damaged"):
        list(read_gains(path, SHAPE, 2))
