"""What a model said of every row of an ablation, in a few bytes a row.

`evaluate.py` puts it together of what the journal holds; whoever asked reads it row by row.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_CODES = {float: "d", int: "q"}  # of numbers that are kept side by side


class Row(NamedTuple):
    """One condition (its place in the plan) and one prompt."""

    condition: int
    prompt: int


class PackedRows(Sequence[Row]):
    """Rows in 8 bytes each: a Row is made when it is asked for."""

    def __init__(self, rows: Iterable[Row]) -> None:
        # (n, 2) of conditions and prompts
        self.numbers = np.fromiter(chain.from_iterable(rows), np.int32).reshape(-1, 2)

    @classmethod
    def of(cls, numbers: NDArray[np.int32]) -> PackedRows:
        """The rows that stand in an array (n, 2)."""
        rows = cls(())
        rows.numbers = numbers
        return rows

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        return Row(*self.numbers[place].tolist())

    def __iter__(self) -> Iterator[Row]:
        return (Row(*numbers) for numbers in self.numbers.tolist())


class _Column:
    """Values, of one type for most: floats or ints of 8 bytes, equal texts once, others as is."""

    def __init__(self, first: Any) -> None:
        self._type: type | None = type(first)
        self._texts: dict[str, str] = {}
        self.values: Any = array(_CODES[type(first)]) if type(first) in _CODES else []

    def append(self, value: Any) -> None:
        if self._type is str:
            value = self._texts.setdefault(value, value) if isinstance(value, str) else value
        elif self._type is not None and type(value) is not self._type:
            self._type, self.values = None, list(self.values)
        self.values.append(value)


class Said(Mapping[Row, Any]):
    """What is said of each row: batches of rows, and of each batch a list with a value a row.

    A value is a number, a text, or a list of as many of them as each other one.
    """

    def __init__(self, batches: Iterable[Sequence[Row]], said: Iterable[Sequence[Any]]) -> None:
        self._columns: list[_Column] = []
        self._is_list = False
        conditions, prompts = array("q"), array("q")
        for rows, values in zip(batches, said, strict=True):
            if len(rows) and not self._columns:
                self._is_list = isinstance(values[0], list | tuple)
                firsts = values[0] if self._is_list else [values[0]]
                self._columns = [_Column(one) for one in firsts]
            for row, value in zip(rows, values, strict=True):
                conditions.append(row.condition)
                prompts.append(row.prompt)
                cells = value if self._is_list else (value,)
                for column, cell in zip(self._columns, cells, strict=True):
                    column.append(cell)
        self._n_prompts = max(prompts, default=0) + 1
        keys = np.array(conditions) * self._n_prompts + np.array(prompts)
        order = np.argsort(keys, kind="stable")
        self._keys, self._places = array("q", keys[order].tobytes()), order

    def __getitem__(self, row: Row) -> Any:
        key = row.condition * self._n_prompts + row.prompt
        at = bisect_left(self._keys, key)
        if row.prompt >= self._n_prompts or at == len(self._keys) or self._keys[at] != key:
            raise KeyError(row)
        place = self._places[at]
        if self._is_list:
            return [column.values[place] for column in self._columns]
        return self._columns[0].values[place]

    def of(self, condition: int, prompts: Sequence[int]) -> Iterator[Any]:
        """What is said of some rows of a condition, in the order of their prompts."""
        keys = condition * self._n_prompts + np.asarray(prompts, np.int64)
        known = np.frombuffer(self._keys, np.int64)
        at = np.searchsorted(known, keys)
        is_there = max(prompts, default=-1) < self._n_prompts and bool((at < len(known)).all())
        if not (is_there and np.array_equal(known[at], keys)):
            raise KeyError(condition)
        places = self._places[at].tolist()
        columns = [[column.values[place] for place in places] for column in self._columns]
        return map(list, zip(*columns, strict=True)) if self._is_list else chain(*columns)

    def __iter__(self) -> Iterator[Row]:
        return (Row(*divmod(key, self._n_prompts)) for key in self._keys)

    def __len__(self) -> int:
        return len(self._keys)
