"""The files of gradients: how much each neuron of each sentence did for the answer, by its slope.

`attribute --method ig` and `--method relevance` write them; what chooses neurons by them, and the
report, read them. Nothing here needs a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact.dense import create_safetensors, release, rows_digest, zeros_bytes
from relneuron.artifact.files import Json
from relneuron.artifact.reading import open_tensors

# The name of a file's scores, (E, L, F) float32, is that of the method that writes it.
IG, RELEVANCE = "ig", "relevance"
FILES = {IG: "ig.safetensors", RELEVANCE: "relevance.safetensors"}
# What stands beside them, by name: its dimensions of (E, L).
BESIDE: dict[str, dict[str, int]] = {
    IG: {"probability": 1, "probability_at_baseline": 2},
    RELEVANCE: {"value": 1},
}
ABOUT = "relneuron.gradients"  # the key of what such a file says of its rows
COMPLETENESS = "completeness.csv"
COMPLETENESS_COLUMNS = (
    *("id", "relation", "layer", "probability", "probability_at_baseline", "change", "sum", "gap"),
)
EDIT = "edit.csv"  # what `edit` did
EDIT_COLUMNS = (
    *("measure", "n", "before", "before_low", "before_high"),
    *("after", "after_low", "after_high"),
)

Array = np.ndarray[Any, Any]


def made_by(method: str) -> str:
    """The command that writes the file of a method."""
    return f"attribute MODEL PROMPTS -o DIR --method {method}"


class GradientFile:
    """ig.safetensors or relevance.safetensors while it is filled, its tensors memory maps.

    `about` has the keys of `Gradients`; its `ids` are the sentences of the rows.
    """

    def __init__(self, path: Path, method: str, shape: Mapping[str, int], about: Json) -> None:
        self._maps = create_safetensors(path, *_form(method, shape, about))

    def store(self, rows: Sequence[int], found: Mapping[str, Array]) -> None:
        """Write what was found of the sentences in `rows`, each tensor's rows by its name."""
        for name, values in found.items():
            self._maps[name][list(rows)] = values

    def digest(self, rows: Sequence[int]) -> str:
        """Of all that the file holds of some sentences, as it is there."""
        digest = rows_digest(list(self._maps.values()), rows)
        release(self._maps.values())
        return digest

    def flush(self) -> None:
        for array in self._maps.values():
            array.flush()


def _form(
    method: str, shape: Mapping[str, int], about: Json
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The tensors of a method's file and its metadata."""
    size = (len(about["ids"]), shape["layers"], shape["width"])
    names: dict[str, tuple[int, ...]] = {method: size}
    names |= {name: size[:n] for name, n in BESIDE[method].items()}
    # One key only, as in every file: safetensors writes several in any order.
    return names, {ABOUT: json.dumps({"method": method, **about}, ensure_ascii=False)}


def gradients_bytes(method: str, shape: Mapping[str, int], about: Json) -> int:
    """The size of a method's file."""
    return zeros_bytes(*_form(method, shape, about))


@dataclass(frozen=True)
class Gradients:
    """What an ig.safetensors or a relevance.safetensors of E sentences says, but for its scores.

    about      how they came about: `ids`, `relations` and `targets` (a list of token ids each) of
               the rows, in their order; `model` and `prompts`, digests; and the method's options,
               such as `site`, `schedule`, `steps`, `baseline`
    beside     by name: of ig `probability` (E,) and `probability_at_baseline` (E, L), of relevance
               `value` (E,), float32
    """

    path: Path
    method: str
    n_layers: int
    width: int
    about: Json
    beside: dict[str, Array]

    @property
    def ids(self) -> list[str]:
        return list(self.about["ids"])

    @property
    def relations(self) -> list[str]:
        return list(self.about["relations"])

    @property
    def targets(self) -> list[list[int]]:
        return [list(tokens) for tokens in self.about["targets"]]

    @classmethod
    def read(cls, path: Path, method: str) -> Gradients:
        """The file that `attribute --method` METHOD wrote, or an error that says what is wrong."""
        with open_tensors(path, made_by(method), what=f"file of {method}") as file:
            about = file.about(ABOUT)
            if not isinstance(about, dict) or about.get("method") != method:
                raise file.wrong(f"{ABOUT} does not say that it is one")
            rows = [about.get(key) for key in ("ids", "relations", "targets")]
            if not all(isinstance(one, list) and len(one) == len(rows[0] or ()) for one in rows):
                raise file.wrong("its ids, relations and targets are not one of each a sentence")
            n, n_layers, width = file.shape(method, (len(about["ids"]), None, None))
            beside = {
                name: file.get(name, (n, n_layers)[:n_dims])
                for name, n_dims in BESIDE[method].items()
            }
        return cls(path, method, n_layers, width, about, beside)

    def scores(self, rows: Sequence[int] | None = None) -> Iterator[tuple[int, Array]]:
        """(row, scores (L, F) float32) of some sentences, by default of all, one in memory."""
        shape = (len(self.about["ids"]), self.n_layers, self.width)
        for row in range(shape[0]) if rows is None else rows:
            # Opened again for each: what was read of an open file stays in memory.
            with open_tensors(self.path, made_by(self.method)) as file:
                yield row, file.get(self.method, shape, rows=slice(row, row + 1))[0]

    def group_sums(self, groups: Sequence[str] | None = None) -> dict[str, Array]:
        """`signed`, `positive`, `absolute` (G, L, F) float64 and `sentences` (G,) int64.

        Over the sentences e of each relation in `groups` (default: all, in the order of the file),
        the sums of R_e, max(R_e, 0) and |R_e|, R_e (L, F) the scores of a sentence.
        """
        names = list(dict.fromkeys(self.relations)) if groups is None else list(groups)
        place = {name: g for g, name in enumerate(names)}
        shape = (len(names), self.n_layers, self.width)
        kinds = ("signed", "positive", "absolute")
        found: dict[str, Array] = {kind: np.zeros(shape) for kind in kinds}
        found["sentences"] = np.zeros(len(names), np.int64)
        chosen = [row for row, name in enumerate(self.relations) if name in place]
        for row, scores in self.scores(chosen):
            g = place[self.relations[row]]
            found["signed"][g] += scores
            found["positive"][g] += np.maximum(scores, 0)
            found["absolute"][g] += np.abs(scores)
            found["sentences"][g] += 1
        return found
