"""Tables, and how names and numbers are written: visible, short, everywhere the same.

The analyses return tables; the report shows them, and each is a csv file for other programs.
"""

from __future__ import annotations

import base64
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from relneuron.artifact.files import csv_pieces

Array = NDArray[np.float64]
Places = NDArray[np.int64]

SPLITS = {
    "eva": "evaluation prompts",
    "eva2": "alternative templates",
    "det": "prompts that chose the neurons",
}
HIDDEN = ("Cc", "Cf", "Cn", "Cs", "Zl", "Zp")
NBSP = "\N{NO-BREAK SPACE}"
HEADINGS = {"p_value": "p", "q_value": "q", "n_before": "right before", "n_after": "right after"}
NAMES = ("relation", "off", "other", "concept", "group", "mask", "set")  # of sets and texts
TESTS = ("p_value", "q_value")
MOST_HELD = 60_000  # cells of a table whose file is within the page: about 1 MB
ROWS_AT_ONCE = 1000  # that are made of columns
MOST_LISTED = 100  # names in a sentence
RANGES = ("others", "random", "matched")  # from the least to the greatest; the others' are 95 %


# Text


def visible(text: str) -> str:
    """`text` with controls, direction overrides and unencodable characters written as escapes."""
    if text.isascii() and text.isprintable():  # most text, soon
        return text
    return "".join(
        char.encode("unicode_escape", "surrogatepass").decode("ascii")
        # The zero-width joiners are part of ordinary words in several scripts.
        if unicodedata.category(char) in HIDDEN and char not in "\u200c\u200d"
        else char
        for char in text
    )


def label(name: str) -> str:
    """A relation's name for people: company_ceo -> company ceo."""
    return visible(name).replace("_", " ")


def split_title(split: str) -> str:
    """eva2.de -> alternative templates, de."""
    base, _, language = split.partition(".")
    title = SPLITS.get(base, base)
    return visible(f"{title}, {language}" if language else title)


def one_decimal(value: float) -> str:
    text = f"{round(value, 1) + 0.0:,.1f}".replace("-", "−")
    return text if math.isfinite(value) else "–"


def percent(value: float) -> str:
    return f"{one_decimal(100 * value)}{NBSP}%" if math.isfinite(value) else "–"


def significant(value: float, digits: int = 4) -> str:
    """A number with so many significant digits, whole from a thousand on; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return text.replace("-", "−")


def change(drop: float) -> str:
    """What a relative drop does, for a sentence."""
    if not math.isfinite(drop):
        return "cannot be compared"
    text = percent(abs(drop))
    if text == percent(0):
        return "stays the same"
    return f"{'falls' if drop > 0 else 'rises'} by {text}"


def n_of(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence; of very many the first ones, and how many more there are."""
    left = len(names) - MOST_LISTED
    return ", ".join(names[:MOST_LISTED]) + (f" and {left:,} more" if left > 0 else "")


def amount(n: int) -> str:
    """12,345,678 -> 12.3 million."""
    for size, name in ((10**9, "billion"), (10**6, "million")):
        if n >= size:
            value = n / size
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:,.{digits}f}{NBSP}{name}"
    return f"{n:,}"


def nats(value: float) -> str:
    """A number of nats to two decimals, a small one to two digits."""
    is_plain = abs(value) >= 0.1 or not math.isfinite(value) or value == 0
    text = f"{value + 0.0:,.2f}" if is_plain else f"{value:.2g}"
    return text.replace("-", "−") if math.isfinite(value) else "–"


# Numbers


class Spread(NamedTuple):
    """Mean, least and greatest of what was measured; NaN if nothing was."""

    mean: float
    low: float
    high: float


def spread(values: Array) -> Spread:
    found = values[np.isfinite(values)]
    if not found.size:
        return Spread(np.nan, np.nan, np.nan)
    return Spread(float(found.mean()), float(found.min()), float(found.max()))


# Tables


class Share(float):
    """A fraction: people read it in percent, files hold the fraction."""

    __slots__ = ()  # a table of pairs has millions


class Number(str):
    """A number, or several, written as text."""


Cell = str | float


class Column(NamedTuple):
    """A column of many rows as one array: of numbers, fractions, or places of text in `names`."""

    values: NDArray[Any]
    names: Sequence[str] | None = None
    is_share: bool = False

    def cells(self, rows: slice | Places) -> list[Cell]:
        found: list[Any] = self.values[rows].tolist()
        if self.names is not None:
            return [self.names[place] for place in found]
        return [*map(Share, found)] if self.is_share else found

    def plain(self, rows: slice | Places) -> list[Cell]:
        """The cells as a csv file has them (`_plain`), but for the names."""
        if self.names is not None:
            return self.cells(rows)
        found = self.values[rows]
        if found.dtype.kind != "f" or np.isfinite(found).all():
            return list(found.tolist())
        return [cell if math.isfinite(cell) else "" for cell in found.tolist()]


class Rows(Sequence[Sequence[Cell]]):
    """The rows of a table that is held as columns: each is made when it is asked for.

    which  of the columns' entries the rows are, in their order; None: all
    """

    def __init__(self, columns: Sequence[Column], which: Places | None = None) -> None:
        self.columns, self.which = columns, which

    def __len__(self) -> int:
        return len(self.columns[0].values if self.which is None else self.which)

    @overload
    def __getitem__(self, rows: int) -> Sequence[Cell]: ...
    @overload
    def __getitem__(self, rows: slice) -> Sequence[Sequence[Cell]]: ...
    def __getitem__(self, rows: int | slice) -> Any:
        if isinstance(rows, slice):
            some = self._entries(rows)
            return [*zip(*(column.cells(some) for column in self.columns), strict=True)]
        row = range(len(self))[rows]
        return self[row : row + 1][0]

    def __iter__(self) -> Iterator[Sequence[Cell]]:
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self[start : start + ROWS_AT_ONCE]

    def _entries(self, rows: slice) -> slice | Places:
        return rows if self.which is None else self.which[rows]

    def column(self, place: int) -> list[Cell]:
        return self.columns[place].cells(self._entries(slice(None)))

    def floats(self, place: int) -> Array:
        """A column of numbers."""
        values, names, _ = self.columns[place]
        if names is not None:
            raise ValueError("a column of text has no numbers")
        return np.array(values[self._entries(slice(None))], np.float64)

    def plain(self) -> Iterator[Sequence[Cell]]:
        """The rows as a csv file has them; each name is looked at once."""
        columns = [
            column._replace(names=[*map(visible, column.names)]) if column.names else column
            for column in self.columns
        ]
        for start in range(0, len(self), ROWS_AT_ONCE):
            some = self._entries(slice(start, start + ROWS_AT_ONCE))
            yield from zip(*(column.plain(some) for column in columns), strict=True)

    def at(self, rows: Places) -> Rows:
        """Some of the rows."""
        return Rows(self.columns, rows if self.which is None else self.which[rows])


class Table(NamedTuple):
    """Cells are text, whole numbers, shares, or other numbers; NaN was not measured."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def column(self, name: str) -> list[Cell]:
        place = self.columns.index(name)
        if isinstance(self.rows, Rows):
            return self.rows.column(place)
        return [row[place] for row in self.rows]

    def floats(self, name: str) -> Array:
        if isinstance(self.rows, Rows):
            return self.rows.floats(self.columns.index(name))
        return np.array(self.column(name), dtype=np.float64)

    def mean(self, name: str) -> float:
        """The mean of what was measured."""
        return spread(self.floats(name)).mean

    def where(self, name: str, value: Cell) -> Table:
        """The rows that hold `value` in the column `name`."""
        kept = [i for i, cell in enumerate(self.column(name)) if cell == value]
        return self.at(kept)

    def at(self, places: Sequence[int]) -> Table:
        """The rows at some places."""
        if isinstance(self.rows, Rows):
            return self._replace(rows=self.rows.at(np.array(places, np.int64)))
        return self._replace(rows=[self.rows[place] for place in places])

    def csv(self) -> bytes:
        """The table as a csv file in full precision (artifact.csv_bytes)."""
        return b"".join(self.csv_pieces())

    def csv_pieces(self) -> Iterator[bytes]:
        """The bytes of `csv`, of some rows at a time: a table of a million is written so."""
        rows: Iterable[Sequence[Cell]] = ([*map(_plain, row)] for row in self.rows)
        if isinstance(self.rows, Rows):
            rows = self.rows.plain()
        return csv_pieces([visible(name) for name in self.columns], rows)

    @property
    def is_small(self) -> bool:
        """Whether a page may hold the csv file."""
        return len(self.rows) * len(self.columns) <= MOST_HELD

    def uri(self) -> str:
        """The csv file as a link."""
        return "data:text/csv;charset=utf-8;base64," + base64.b64encode(self.csv()).decode("ascii")

    def shown(self, most: int) -> Table:
        """The first `most` rows as people read them.

        x, x_low and x_high share a cell; a column of which nothing was measured is left out.
        """
        rows = self.rows[:most]
        place = {name: i for i, name in enumerate(self.columns)}
        headings: list[str] = []
        columns: list[list[Cell]] = []
        for name, i in place.items():
            base, _, end = name.rpartition("_")
            is_end = end in ("low", "high") and base in place
            if is_end or (rows and all(_is_nan(row[i]) for row in rows)):
                continue
            heading = label(HEADINGS.get(name, name.removeprefix("n_")))
            write = _writer(name)
            if f"{name}_low" in place:
                ends = [place[f"{name}_low"], place[f"{name}_high"]]
                heading += " (range)" if name in RANGES else f" (95{NBSP}%)"
                columns.append([_span(row[i], *(row[k] for k in ends)) for row in rows])
            else:
                columns.append([write(row[i]) for row in rows])
            headings.append(heading)
        return Table(self.title, headings, list(zip(*columns, strict=True)))


def show(value: Cell) -> str:
    """A cell as a person reads it."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Share):
        return percent(value)
    return significant(value) if isinstance(value, float) else f"{value:,}"


def short(value: float) -> str:
    """A number whose size is what matters, such as a p-value."""
    return significant(value, 2)


def _writer(column: str) -> Callable[[Cell], Cell]:
    """How a column's cells are written."""
    if column in TESTS:
        return lambda value: Number(short(float(value)))
    names = label if column in NAMES else split_title if column == "split" else visible
    return lambda value: names(value) if isinstance(value, str) else Number(show(value))


def _span(value: Cell, *ends: Cell) -> Number:
    """A value, its low and its high as `40.0 % (35.5 to 44.5)`."""
    if any(_is_nan(end) for end in ends):
        return Number(show(value))
    low, high = (show(end).removesuffix(f"{NBSP}%") for end in ends)
    return Number(f"{show(value)} ({low} to {high})")


def _is_nan(value: Cell) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _plain(value: Cell) -> Cell:
    """A cell as a csv file has it: the writer knows numbers, and gives them all their digits."""
    if isinstance(value, str):
        return visible(value)
    return "" if isinstance(value, float) and not math.isfinite(value) else value
