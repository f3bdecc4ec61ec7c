"""The tables of `ablate`: effects, a row an answer, written as they come, and their accuracies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from relneuron.artifact.effects import CHOICE, WRITTEN
from relneuron.artifact.files import RelneuronError, csv_bytes, csv_pieces
from relneuron.artifact.installed import need
from relneuron.artifact.parquet import Sink

_ROWS = 1 << 15  # of a .parquet that are objects at a time
_GROUP = 1 << 20  # rows of a row group of a .parquet, as pyarrow cuts a table
Effect = tuple[Any, ...]


class Accuracy:
    """Counts right answers by condition, relation and split, in order of appearance."""

    def __init__(self) -> None:
        self.n_effects = 0
        self._total: Counter[tuple[str, str, str]] = Counter()
        self._correct: Counter[tuple[str, str, str]] = Counter()

    def count(self, effects: Iterable[Effect]) -> Iterator[Effect]:
        """The same rows of effects, counted as they go by."""
        for effect in effects:
            condition, relation, split, _, _, _, is_right, *_ = effect
            self._total[condition, relation, split] += 1
            self._correct[condition, relation, split] += is_right
            self.n_effects += 1
            yield effect

    def rows(self) -> list[tuple[str, str, str, int, int, float]]:
        """(condition, relation, split, n_prompts, n_correct, accuracy)."""
        correct = self._correct
        return [(*key, n, correct[key], correct[key] / n) for key, n in self._total.items()]

    def pieces(self) -> Iterator[bytes]:
        """accuracy.csv, of what was counted when it is asked for."""
        columns = ("condition", "relation", "split", "n_prompts", "n_correct", "accuracy")
        yield csv_bytes(columns, self.rows())


def check_format(output: Path) -> None:
    """Refuse a table format that cannot be written, before any prompt is asked."""
    if output.suffix not in (".csv", ".parquet"):
        raise RelneuronError(f"{output} is neither .csv nor .parquet", "choose one of the two", 2)
    if output.suffix == ".parquet":
        need("writing .parquet", "pyarrow", otherwise=", or write .csv")


def table_pieces(path: Path, effects: Iterable[Effect]) -> Iterator[bytes]:
    """A table of effects, some rows at a time; of .parquet a row group."""
    left = iter(effects)
    first = next(left)
    names, left = (*WRITTEN, CHOICE)[: len(first)], chain([first], left)
    if path.suffix == ".csv":
        yield from csv_pieces(names, left)
        return
    import pyarrow
    import pyarrow.parquet

    sink, schema, writer = Sink(), None, None
    some = [*islice(left, _ROWS)]
    while some:
        tables: list[Any] = []
        while some and len(tables) * _ROWS < _GROUP:
            columns = dict(zip(names, map(list, zip(*some, strict=True)), strict=True))
            tables.append(pyarrow.table(columns, schema=schema))
            schema = tables[0].schema
            some = [*islice(left, _ROWS)]
        writer = writer or pyarrow.parquet.ParquetWriter(sink, schema)
        writer.write_table(pyarrow.concat_tables(tables).combine_chunks())
        yield sink.taken()
    if writer is not None:
        writer.close()
    yield sink.taken()
