"""All neurons of a model by what they were scored for a relation or a group.

`browse.py` lists them; the scores are those of a folder's scores.safetensors.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import checked
from relneuron.artifact.neurons import Neuron, Shape
from relneuron.artifact.reading import open_tensors
from relneuron.study import tensors
from relneuron.study.held import HELD

Array = np.ndarray[Any, Any]
PLACE = ("layer", "site", "index")


class Ranked:
    """The scores of a folder; `names` are its relations or groups, none where it has no scores."""

    def __init__(self, folder: Path, order: Shape) -> None:
        held = HELD["scores"]
        self._path, self._made_by, self._order = folder / held.files[0], held.made_by, order
        self.names: list[str] = []
        if not self._path.exists():
            return
        try:
            with open_tensors(checked(self._path), self._made_by, what="file of scores") as file:
                self.names = file.names_of("relations") or file.names_of("groups")
        except RelneuronError as error:
            warnings.warn(f"no lists by score: {error.cause}", stacklevel=2)
        # A list is sorted once, and its pages are cut from it.
        self._columns = lru_cache(maxsize=2)(self._read)
        self._sorted = lru_cache(maxsize=4)(self._sort)

    def _read(self, name: str) -> dict[str, Any]:
        return tensors.scores(self._path, self._made_by, name, self._order)

    def columns(self, name: str) -> list[str]:
        """The scores that neurons have for a relation or group."""
        return [column for column in self._columns(name) if column not in PLACE]

    def _sort(self, name: str, column: str, smallest: bool) -> Array:
        values: Array = np.asarray(self._columns(name)[column], np.float64)
        ranked = np.flatnonzero(~np.isnan(values))  # what was not ranked has no place
        found: Array = ranked[
            np.argsort(values[ranked] if smallest else -values[ranked], kind="stable")
        ]
        return found

    def count(self, name: str, column: str) -> int:
        """How many neurons have a score."""
        return len(self._sorted(name, column, False))

    def rows(
        self, name: str, column: str, smallest: bool, places: slice
    ) -> list[tuple[Neuron, list[float]]]:
        """Neurons with all of their scores, by one of them, the largest or the smallest first."""
        found, columns = self._columns(name), self.columns(name)
        sites = found["site"]
        return [
            (
                (int(found["layer"][row]), sites.names[sites.codes[row]], int(found["index"][row])),
                [float(found[one][row]) for one in columns],
            )
            for row in self._sorted(name, column, smallest)[places].tolist()
        ]
