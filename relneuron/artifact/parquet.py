"""Rows of parquet files, which can claim, or pack, far more than they hold.

The corpus' reader and those that read and write tables call it; pyarrow is imported when needed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from relneuron.artifact.files import Json
from relneuron.artifact.reading import MIB, Cells, max_record_mib, read_csv, reading, too_large

ROWS = 256  # decoded together
# Text is packed to a third or a tenth. What is packed more than this is decoded row by row.
_PACKED = 50

FIX = "give a whole parquet file"


def open_parquet(path: Path | str, texts: Sequence[str] = ()) -> Any:
    """A ParquetFile; equal values of the columns `texts` are kept once, as the file packs them."""
    parquet = import_module("pyarrow.parquet")
    with reading(path, "parquet file", FIX):
        opened = parquet.ParquetFile(path)
        schema = opened.schema_arrow
        known = [name for name in texts if name in schema.names]
        known = [name for name in known if "string" in str(schema.field(name).type).split("<")[0]]
        if not known:
            return opened
        opened.close()
        return parquet.ParquetFile(path, read_dictionary=known)


def group_rows(opened: Any, path: Path | str, columns: Sequence[str], group: int) -> Iterator[Json]:
    """The rows of a row group, each by column; a value above the limit of a record raises."""
    limit = max_record_mib()
    with reading(path, "parquet file", FIX):
        about = opened.metadata.row_group(group)
        chunks = [about.column(i) for i in range(about.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema in columns]
        size = sum(chunk.total_uncompressed_size for chunk in chunks)
        packed = min(sum(c.total_compressed_size for c in chunks), Path(path).stat().st_size)
        if size > len(chunks) * about.num_rows * limit * MIB:
            raise too_large(f"{path}, row group {group}", "a value", limit)
        n_rows = 1 if size > max(limit * MIB, _PACKED * packed) else ROWS
        for batch in opened.iter_batches(n_rows, row_groups=[group], columns=list(columns)):
            for column in batch.columns:
                if _longest(column) > limit * MIB:
                    raise too_large(f"{path}, row group {group}", "a value", limit)
            cells = [(name, batch.column(name)) for name in columns]
            for i in range(batch.num_rows):
                yield {name: column[i].as_py() for name, column in cells}


def _longest(column: Any) -> int:
    """The bytes of the longest text or picture in a column, inside of others, too; else 0."""
    compute, types = import_module("pyarrow.compute"), import_module("pyarrow.types")
    values = getattr(column, "dictionary", column)
    if types.is_struct(values.type):
        return max((_longest(part) for part in values.flatten()), default=0)
    if types.is_list(values.type) or types.is_large_list(values.type):
        return _longest(values.flatten())
    if not any(word in str(values.type) for word in ("string", "binary")):
        return 0
    return int(compute.max(compute.binary_length(values)).as_py() or 0)


class Sink(io.RawIOBase):
    """What a table is written to and, piece by piece, taken from: for `atomic_write`."""

    def __init__(self) -> None:
        self._data, self._n_taken = bytearray(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._data += data
        return len(data)

    def tell(self) -> int:
        return self._n_taken + len(self._data)

    def taken(self) -> bytes:
        data = bytes(self._data)
        self._n_taken += len(data)
        self._data.clear()
        return data


def read_table(
    path: Path, columns: Sequence[str], text: Callable[[Any], str] = str
) -> Iterator[Cells]:
    """The rows of a .csv or .parquet, each cell as text ("" for none)."""
    if path.suffix != ".parquet":
        yield from read_csv(path, columns)
        return
    opened = open_parquet(path)
    with opened, reading(path, "parquet file", FIX):
        missing = [name for name in columns if name not in opened.schema_arrow.names]
        if missing:
            raise ValueError(f"it lacks the column {', '.join(missing)}")
        line = 1
        for group in range(opened.num_row_groups):
            for row in group_rows(opened, path, columns, group):
                cells = ((k, "" if v is None else text(v)) for k, v in row.items())
                yield Cells(cells, path, line)
                line += 1
