"""The report's tables, and how names and numbers are written in it: visible, short, the same.

report.py lays them out; a table is also a csv file inside the page.
"""

from __future__ import annotations

import base64
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.artifact import SITES, csv_bytes
from relneuron.results import Result, Study, flips, headline, spread

SPLITS = {
    "eva": "evaluation prompts",
    "eva2": "alternative templates",
    "det": "prompts that chose the neurons",
}
HIDDEN = ("Cc", "Cf", "Cn", "Cs", "Zl", "Zp")
NBSP = "\N{NO-BREAK SPACE}"
SHOWN = 5  # neurons of each set in the table of neurons, before its last


# Text


def visible(text: str) -> str:
    """`text` with controls, direction overrides and unencodable characters written as escapes."""
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


# Tables


def number(value: float, spec: str) -> str:
    """A number in a format of its own; a dash for what was not measured."""
    return format(value, spec) if math.isfinite(value) else "–"


class Table(NamedTuple):
    """Cells are text, whole numbers, or floats that are shown with one decimal."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]

    @property
    def filename(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-") + ".csv"

    def uri(self) -> str:
        """The table as a csv file inside a link; no cell of text can act as a formula."""
        rows = [[_plain(value) for value in row] for row in (self.columns, *self.rows)]
        data = csv_bytes(rows[0], rows[1:])
        return "data:text/csv;charset=utf-8;base64," + base64.b64encode(data).decode("ascii")


def show(value: str | float) -> str:
    """A cell as a person reads it."""
    if isinstance(value, str):
        return visible(value)
    return one_decimal(value) if isinstance(value, float) else f"{value:,}"


def _plain(value: str | float) -> str:
    if isinstance(value, str):
        # Spreadsheets run a cell that begins like a formula; an apostrophe makes it text.
        text = visible(value)
        return f"'{text}" if text.lstrip().startswith(tuple("=+-@＝＋－＠")) else text
    if isinstance(value, int):
        return str(value)
    return f"{value:.6g}" if math.isfinite(value) else ""


def accuracy_table(study: Study, result: Result) -> Table:
    columns = [
        *("relation", "prompts", "before, %", "own set off, %", "answers lost", "answers gained"),
        *("random, mean %", "random, lowest %", "random, highest %"),
    ]
    rows: list[list[str | float]] = [
        [
            label(name),
            int(result.n_prompts[r]),
            *(100 * result.before[r], 100 * result.after[r]),
            *flips(study, name, result.split),
            *(100 * value for value in spread(result.random[r])),
        ]
        for r, name in enumerate(result.relations)
    ]
    return Table(f"Accuracy on {split_title(result.split)}", columns, rows)


def splits_table(results: Sequence[Result]) -> Table:
    columns = ["prompts", "own set, %", "other sets, %", "random sets, %"]
    means = [[100 * drop.mean for drop in headline(result)] for result in results]
    rows = named([split_title(result.split) for result in results], means)
    return Table("Mean accuracy drop by kind of prompt", columns, rows)


def layer_table(names: Sequence[str], count: NDArray[np.int64]) -> Table:
    columns = ["relation", "site", "all layers", *(f"layer {i}" for i in range(count.shape[2]))]
    rows = [
        [name, site, sum(row), *row]
        for name, by_site in zip(names, count.tolist(), strict=True)
        for site, row in zip(SITES, by_site, strict=True)
    ]
    return Table("Chosen neurons by site and layer", columns, rows)


def selection_table(study: Study, count: NDArray[np.int64]) -> Table:
    """How each set was cut out of the ranking, and on how many prompts the ranking rests."""
    columns = [
        *("relation", "prompts", "answered right", "neurons", *SITES),
        *("best score", "score at cut", "ties at cut", "perfect"),
    ]
    rows: list[list[str | float]] = []
    sets = study.neurons.sets.items()
    for (name, chosen), by_site in zip(sets, count.sum(axis=2).tolist(), strict=True):
        n_prompts = sum(p.relation == name and p.split == "det" for p in study.prompts.values())
        cut = study.neurons.selection.get(name, {})
        right, *ties = (cut.get(key, 0) for key in ("positives", "ties_at_cut", "perfect"))
        ends = [f"{end:.4f}" for end in (chosen[0][3], chosen[-1][3])] if chosen else ["–", "–"]
        rows.append([label(name), n_prompts, right, sum(by_site), *by_site, *ends, *ties])
    return Table("How the sets were chosen", columns, rows)


def neuron_table(study: Study) -> Table:
    """The best neurons of each set and its last, with what identify knows of their scores."""
    columns = ["relation", "rank", "neuron", "score", "95 % from", "95 % to", "p", "q"]
    rows: list[list[str | float]] = []
    for name, chosen in study.neurons.sets.items():
        for place, (layer, site, index, score) in enumerate(chosen):
            if SHOWN <= place < len(chosen) - 1:
                continue
            p, q, low, high = study.significance[name][place].tolist()
            cells = [f"{score:.4f}", *(number(x, ".4f") for x in (low, high))]
            cells += [number(x, ".2g") for x in (p, q)]
            rows.append([label(name), place + 1, f"L{layer}.{site}.{index}", *cells])
    return Table("The best neurons of each set and its last", columns, rows)


def named(names: Sequence[str], rows: list[list[float]]) -> list[list[str | float]]:
    return [[name, *row] for name, row in zip(names, rows, strict=True)]
