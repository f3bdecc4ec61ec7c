"""Adds the rows of a run to a csv of results; the benches of whole stages call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from relneuron.artifact.files import atomic_write, csv_bytes
from relneuron.artifact.reading import read_csv


def add_rows(path: Path | None, rows: Sequence[Mapping[str, object]]) -> None:
    """Append `rows`, all with the same columns, to the csv `path`, and say so; None: nowhere."""
    if path is None:
        return
    names = list(rows[0])
    old: list[Sequence[object]] = []
    if path.exists():
        old = [[line[name] for name in names] for line in read_csv(path, names)]
    atomic_write(path, csv_bytes(names, [*old, *(list(row.values()) for row in rows)]))
    print(f"-> {path}")
