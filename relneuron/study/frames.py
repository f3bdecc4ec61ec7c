"""Tables as data frames, and files of tables read into columns.

`folder.Study` calls it. pandas is an extra (`frames`); without it a table is a plain dict of numpy
arrays, one a column.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

import numpy as np

from relneuron.ablation.outputs import LENS
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.installed import missing
from relneuron.artifact.parquet import read_table
from relneuron.artifact.reading import Cells, parse_json, read_csv

Frame = Any  # a pandas.DataFrame, or without pandas a dict of numpy arrays
Array = np.ndarray[Any, Any]

# Columns of the files of stages that are no numbers; what is not named here is one.
TEXTS = frozenset(
    ("answer", "choice", "condition", "end", "fact", "given", "group", "id", "kind", "logprob_of")
    + ("mask", "measure", "prediction", "relation", "site", "split", "target", "token", "window")
    + ("filter", "metric", "neurons", "set", "task", "top")
)
FLAGS = frozenset(("acts", "consistent", "correct", "kept"))  # 1 and 0
# ... and so are those whose name begins with n_, but for a mean.
WHOLE = frozenset(
    ("first", "fold", "gained", "head", "index", "label", "last", "layer", "lost", "n", "place")
    + ("position", "predicted", "rank", "seed", "stage", "target_id", "token_id")
)

# The most that a frame takes, in bytes: what is larger is asked for in parts.
MOST_BYTES = 200 << 20


class Names(NamedTuple):
    """A column of few texts, each of which stands in many rows: a pandas categorical."""

    codes: Array
    names: Sequence[str]


def frame(columns: Mapping[str, Any]) -> Frame:
    """Columns as a data frame; without pandas as a dict of numpy arrays."""
    if missing("pandas"):
        return {name: _plain(values) for name, values in columns.items()}
    import pandas

    def column(values: Any) -> Any:
        if isinstance(values, Names):
            return pandas.Categorical.from_codes(values.codes, list(values.names))
        return values

    return pandas.DataFrame({name: column(v) for name, v in columns.items()}, copy=False)


def _plain(values: Any) -> Array:
    if isinstance(values, Names):
        return np.array(values.names, object)[values.codes]
    if isinstance(values, np.ndarray):
        return values
    result = np.empty(len(values), object)
    result[:] = values
    return result


def check_size(n_rows: int, row_bytes: int, what: str, fix: str) -> None:
    """Raise for a table that would take more memory than MOST_BYTES."""
    if n_rows * row_bytes > MOST_BYTES:
        n_bytes = f"{n_rows * row_bytes / 1e9:.1f} GB"
        raise RelneuronError(f"{what} are {n_rows:,} rows, {n_bytes} as a frame", fix)


# --- files ---------------------------------------------------------------------------------------


def read_columns(path: Path, columns: Sequence[str], more: Sequence[str] = ()) -> dict[str, Any]:
    """The `columns` of a .csv or .parquet that a stage wrote, and those of `more` that it has.

    Texts, flags (bool) and whole numbers (int64) are those of TEXTS, FLAGS and WHOLE, all else are
    float64. A flag or a whole number that is missing somewhere makes its column float64 with NaN.
    """
    found: dict[str, Any] = {}
    for row in read_table(path, columns, _text):
        if not found:
            names = [*columns, *(name for name in more if name in row)]
            found = {name: [] if name in TEXTS else array("d") for name in names}
        for name, values in found.items():
            values.append(_value(row, name))
    found = found or {name: [] if name in TEXTS else array("d") for name in columns}
    return {name: _column(name, values) for name, values in found.items()}


def read_lens(path: Path) -> dict[str, Any]:
    """The columns of a lens.csv: `token`, a number there, as place, and `top` as tuples."""
    found = read_columns(path, LENS)
    numbers = {"place": np.array([int(number) for number in found.pop("token")], np.int64)}
    top = [tuple(parse_json(text, str(path), "make it again")) for text in found.pop("top")]
    about = {name: found.pop(name) for name in ("mask", "group", "id", "seed")}
    return {**about, **numbers, **found, "top": top}


def _text(cell: object) -> str:
    return str(int(cell)) if isinstance(cell, bool) else str(cell)


def _value(row: Cells, name: str) -> Any:
    if name in TEXTS:
        return intern(row[name])
    if not row[name]:
        return np.nan
    if name in FLAGS:
        return row.flag(name)
    return row.whole(name) if _is_whole(name) else row.real(name)


def _is_whole(name: str) -> bool:
    return name in WHOLE or (name.startswith("n_") and name != "n_of_prompt")


def _column(name: str, values: Any) -> Any:
    if name in TEXTS:
        return values
    numbers = np.array(values, np.float64)  # whole numbers here are places, far below 2^53
    if np.isnan(numbers).any():
        return numbers
    return numbers.astype(np.bool_ if name in FLAGS else np.int64 if _is_whole(name) else float)


def read_any(path: Path) -> dict[str, Any]:
    """All columns of a csv of the report: float64 where every cell is a number, else texts."""
    rows = list(read_csv(path, ()))
    names = list(rows[0]) if rows else []
    return {name: _numbers(name, [row[name] for row in rows]) for name in names}


def _numbers(name: str, cells: list[str]) -> Any:
    if name in TEXTS:
        return cells
    try:
        values = np.array([float(cell or "nan") for cell in cells])
    except ValueError:
        return cells
    whole = _is_whole(name) and bool((values == np.floor(values)).all())
    return values.astype(np.int64) if whole else values
