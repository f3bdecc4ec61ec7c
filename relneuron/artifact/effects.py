"""What `ablate` measured, as arrays: one grid of answers per split, conditions by prompts.

The analyses and the report read it; nothing here needs a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relneuron.artifact.files import RelneuronError, composed, csv_bytes
from relneuron.artifact.installed import need
from relneuron.artifact.parquet import read_table
from relneuron.artifact.prompts import Prompt
from relneuron.artifact.reading import read_csv

EFFECTS = ("condition", "relation", "split", "id", "prediction", "correct", "logprob")
# As it is written: also which right object the prediction gives, and which one `logprob` is of.
WRITTEN = (*EFFECTS[:5], "given", "correct", "logprob_of", "logprob")
CHOICE = "choice"  # a column behind them where prompts have options: the most probable one
NOT_ASKED = -1
KINDS = ("clean", "set", "random", "matched", "size", "range", "site", "concept", "gain")


@dataclass(frozen=True)
class Condition:
    """One row of conditions.csv: which neurons were off under a name in effects.csv.

    | kind | name | neurons |
    |---|---|---|
    | clean | `clean` | none |
    | set | the relation, or the fact | the relation's or fact's set in neurons.json |
    | random | `random.<seed>` | drawn from all, as many as the largest set has |
    | matched | `<relation>~<seed>` | drawn from all, as many per layer and site as the set has |
    | size | `<relation>@<last>` | the best `last` of the relation's ranking |
    | range | `<relation>@<first>-<last>` | ranks `first` to `last` of it, counted from 1 |
    | site | `<relation>@<site>` | the best of one site, as many as the set has |
    | concept | `concept:<name>` | the set of a kind of subject |
    | gain | `gain:<relation>` | those that raise the answer most, as many as the set has |
    | modules | `<relation>@<modules>` | those of the set in some modules of the model |

    KINDS are those that a model of text can have.
    """

    name: str
    kind: str
    relation: str = ""  # whose neurons; for a concept its name
    seed: int | None = None
    first: int | None = None  # ranks, from 1
    last: int | None = None
    site: str = ""
    n_neurons: int = 0


def conditions_bytes(conditions: Iterable[Condition]) -> bytes:
    """conditions.csv."""
    names = [f.name for f in fields(Condition)]
    rows = [["" if (v := getattr(c, n)) is None else v for n in names] for c in conditions]
    return csv_bytes(["condition", *names[1:]], rows)


def read_conditions(path: Path) -> dict[str, Condition]:
    """conditions.csv by name, in the file's order."""
    found = {}
    for row in read_csv(path, ("condition", *[f.name for f in fields(Condition)][1:])):
        seed, first, last = (row.whole(n) if row[n] else None for n in ("seed", "first", "last"))
        site, kind, relation = row["site"], row["kind"], row["relation"]
        n_neurons = row.whole("n_neurons")
        name = row["condition"]
        if name in found:
            raise RelneuronError(f"{path} holds {name} twice", "run ablate again")
        found[name] = Condition(name, kind, relation, seed, first, last, site, n_neurons)
    return found


# --- splits ----------------------------------------------------------------------------------


def own_languages(prompts: Iterable[Prompt]) -> dict[str, str]:
    """Each relation's own language: that of its first det prompt, or else of its first prompt."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        first = found.setdefault(prompt.relation, prompt)
        if prompt.split == "det" != first.split:
            found[prompt.relation] = prompt
    return {relation: prompt.language for relation, prompt in found.items()}


def split_name(prompt: Prompt, own: Mapping[str, str]) -> str:
    """The split as effects name it: `eva`, and `eva.de` for the same in another language.

    `own`: each relation's own language, which no name says.
    """
    is_own = prompt.language == own.get(prompt.relation)
    return prompt.split if is_own else f"{prompt.split}.{prompt.language}"


def split_order(name: str) -> tuple[bool, bool, str]:
    """A key that sorts eva first, then its alternatives, other languages after them."""
    return not name.startswith("eva"), "." in name, name


def main_split(names: Iterable[str]) -> str:
    """The split that the analyses are of, the first by `split_order`.

    `ablate` asks it what only one split is asked, and the report reads it there.
    """
    return min(names, key=split_order)


# --- answers ---------------------------------------------------------------------------------

_NO_ROWS: NDArray[np.int64] = np.empty(0, np.int64)


@dataclass
class Grid:
    """The answers of one split: N prompts under some of the conditions.

    A condition that was asked only some of the prompts has NOT_ASKED, NaN and "" at the others.
    Prompts that ask the same fact in other words have the same number in `facts`; without
    numbers every prompt asks a fact of its own.
    """

    split: str  # eva, eva2, det, or with a language: eva.de
    ids: list[str]  # (N,)
    relation: NDArray[Any]  # (N,) str: the relation that the prompt asks
    conditions: dict[str, Condition]
    correct: dict[str, NDArray[np.int8]] = field(default_factory=dict)  # (N,) 1, 0, NOT_ASKED
    logprob: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # (N,) nats
    prediction: dict[str, list[str]] = field(default_factory=dict)
    choice: dict[str, list[str]] = field(default_factory=dict)  # of prompts with options, else ""
    facts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # (N,)

    def __post_init__(self) -> None:
        if not self.facts.size:
            self.facts = np.arange(len(self.ids))

    @cached_property
    def relations(self) -> list[str]:
        """The relations asked, in order of appearance."""
        return list(dict.fromkeys(self.relation.tolist()))

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """(N,): the place in `relations` of the relation that each prompt asks."""
        place = {name: i for i, name in enumerate(self.relations)}
        return np.array([place[name] for name in self.relation.tolist()], np.int64)

    @cached_property
    def _rows(self) -> dict[str, NDArray[np.int64]]:
        order = np.argsort(self.numbers, kind="stable")
        ends = np.cumsum(np.bincount(self.numbers, minlength=len(self.relations)))
        return dict(zip(self.relations, np.split(order, ends[:-1]), strict=True))

    def rows(self, relation: str) -> NDArray[np.int64]:
        """The places of the prompts that ask a relation, ascending."""
        return self._rows.get(relation, _NO_ROWS)

    def of_kind(self, kind: str) -> list[Condition]:
        return [condition for condition in self.conditions.values() if condition.kind == kind]


def fact_numbers(ids: Iterable[str], prompts: Mapping[str, Prompt]) -> NDArray[np.int64]:
    """(N,) the fact that each prompt asks: its relation and subject, numbered.

    Without a subject, prompts of the same words about the same pictures ask the same.
    """
    numbers: dict[tuple[str, ...], int] = {}
    found = []
    for key in ids:
        p = prompts[key]
        words = (p.relation, "", p.prompt, *p.images)
        fact = (p.relation, composed(p.subject)) if p.subject else words
        found.append(numbers.setdefault(fact, len(numbers)))
    return np.array(found, np.int64)


def read_effects(path: Path, conditions: dict[str, Condition]) -> dict[str, Grid]:
    """The grids of an effects.csv or .parquet by split, in order of appearance.

    Every prompt was asked under `clean`; a condition that conditions.csv lacks raises.
    """
    if path.suffix == ".parquet":
        need(f"reading {path}", "pyarrow")
    # `ablate` writes the answers of clean first: what comes before all others is all that has to be
    # known of a file to fill its grids row by row. A file in another order is read whole for it.
    grids = _filled(path, conditions, whole=False)
    return grids if grids is not None else _filled(path, conditions, whole=True) or {}


def _filled(path: Path, conditions: dict[str, Condition], *, whole: bool) -> dict[str, Grid] | None:
    """The grids; None if clean asks more than its first rows, and these are all that was read."""
    places, grids = _asked_clean(path, whole=whole)
    # Answers repeat, under many conditions most of all: each text is held once.
    texts: dict[str, str] = {}
    empty: dict[str, list[str]] = {}  # by split, for every condition, where prompts have no options
    for row in read_table(path, EFFECTS, _text):
        condition, split, prompt = row["condition"], row["split"], row["id"]
        i = places.get(split, {}).get(prompt)
        if condition not in conditions or (i is None and whole):
            raise RelneuronError(
                f"{path}: conditions.csv does not know {condition}, or it asks what clean does not",
                "run ablate again",
            )
        if i is None:
            return None
        grid = grids[split]
        if condition not in grid.conditions:
            n = len(grid.ids)
            grid.conditions[condition] = conditions[condition]
            grid.correct[condition] = np.full(n, NOT_ASKED, np.int8)
            grid.logprob[condition] = np.full(n, np.nan)
            grid.prediction[condition] = [""] * n
            grid.choice[condition] = (
                [""] * n if CHOICE in row else empty.setdefault(split, [""] * n)
            )
        if grid.correct[condition][i] != NOT_ASKED:
            raise RelneuronError(f"{path} holds {prompt} twice", "run ablate again")
        grid.correct[condition][i] = row.flag("correct")
        grid.logprob[condition][i] = row.real("logprob")
        grid.prediction[condition][i] = texts.setdefault(row["prediction"], row["prediction"])
        if CHOICE in row:
            grid.choice[condition][i] = texts.setdefault(row[CHOICE], row[CHOICE])
    return grids


def _asked_clean(path: Path, *, whole: bool) -> tuple[dict[str, dict[str, int]], dict[str, Grid]]:
    """Where each prompt that clean asks stands in the grid of its split, and grids without answers.

    Of the whole file, or of what stands before another condition.
    """
    places: dict[str, dict[str, int]] = {}
    relations: dict[str, list[str]] = {}
    for row in read_table(path, EFFECTS, _text):
        if row["condition"] != "clean":
            if whole:
                continue
            break
        place = places.setdefault(row["split"], {})
        if row["id"] in place:
            raise RelneuronError(f"{path} holds {row['id']} twice", "run ablate again")
        place[row["id"]] = len(place)
        relations.setdefault(row["split"], []).append(row["relation"])
    grids = {
        split: Grid(split, list(place), np.array(relations[split]), {})
        for split, place in places.items()
    }
    return places, grids


def _text(cell: object) -> str:
    return str(int(cell)) if isinstance(cell, bool) else str(cell)
