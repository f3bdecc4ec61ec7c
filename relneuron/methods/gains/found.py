"""What the journal of an attribution holds of each sentence, read when it is asked for.

`attribute.py` notes and reads it: memory holds a few numbers a sentence, however many rows of the
table each has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from relneuron.artifact.files import Json
from relneuron.artifact.journal import Journal
from relneuron.methods.gains.scorer import unpack

Array = np.ndarray[Any, Any]
# Of a sentence's two pieces of its batch: the rows of the table as text, and the rest.
_PIECES = 2
# Sentences whose sets are at hand: batches go through those of one length, condition by condition.
_AT_HAND = 2048


class Found:
    """What `Scorer.score` says of N sentences, by their rows, in a journal of `batches`."""

    def __init__(self, journal: Journal, batches: Mapping[str, Sequence[int]]) -> None:
        self._journal, self._batches = journal, batches
        n = sum(map(len, batches.values()))
        self._keys = list(batches)
        self._batch, self._place = np.empty(n, np.int32), np.empty(n, np.int32)
        for number, rows in enumerate(batches.values()):
            self._batch[rows], self._place[rows] = number, np.arange(len(rows))

    def keep(self, key: str, row: int, text: str, rest: Json) -> None:
        """Note what was found of a sentence of the batch that is added next."""
        place = int(self._place[row])
        self._journal.keep(key, _PIECES * place, text)
        self._journal.keep(key, _PIECES * place + 1, rest)

    def known(self) -> list[Json]:
        """How the model knows each sentence: `rank`, `prob`, `logprob` and `kept`."""
        found: list[Json] = [{}] * len(self._batch)
        for key, rows in self._batches.items():
            for row, one in zip(rows, self._journal.done[key]["found"], strict=True):
                found[row] = one
        return found

    def _piece(self, row: int, number: int) -> Any:
        place = _PIECES * int(self._place[row]) + number
        return self._journal.piece(self._keys[self._batch[row]], place)

    def texts(self) -> Iterator[str]:
        """The rows of the table of each sentence, in their order."""
        return (self._piece(row, 0) for row in range(len(self._batch)))

    def best(self) -> Iterator[Json]:
        """The best neurons of each sentence, in their order."""
        return (self.rest(row) for row in range(len(self._batch)))

    def rest(self, row: int) -> Json:
        """The best neurons of a sentence and, if it is compared, what is zeroed."""
        found: Json = self._piece(row, 1)
        return found

    def heads(self, rows: Sequence[int]) -> Array:
        """The value scores of the heads in some sentences, (n, L * H) float32."""
        return np.stack([unpack(self.rest(row)["heads"], "<f4") for row in rows])


class Sets(Sequence[Mapping[str, Sequence[int]]]):
    """What `comparison.choose` chose in each of some sentences, read from what was found."""

    def __init__(self, found: Found, rows: Sequence[int]) -> None:
        self._found, self._rows = found, rows
        self._read = lru_cache(_AT_HAND)(self._read_packed)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        return {name: places.tolist() for name, places in self._read(self._rows[place]).items()}

    def _read_packed(self, row: int) -> dict[str, Array]:
        off = self._found.rest(row)["off"]
        return {name: unpack(places, "<i4") for name, places in off.items()}
