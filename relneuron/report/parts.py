"""What the report's page is made of: sections, and how sentences name a number of things.

analyses/page.py and analyses/chosen.py make sections, cli/pages.py orders them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from relneuron.report.kit import floats
from relneuron.report.results import Result, Spread, spread
from relneuron.report.tables import Table

Results = Sequence[Result]  # of each split, the main one first


class Section(NamedTuple):
    key: str  # its address in the page
    title: str
    question: str
    seen: Sequence[str]  # sentences made from the numbers
    how: str = ""  # to read the picture
    drawings: Sequence[str] = ()
    tables: Sequence[tuple[str, Table]] = ()  # the file's name, without .csv
    most: int = 200  # rows of a table that the page shows; its file has all
    open: int = 0  # how many of the tables are shown unasked


def mean(table: Table, name: str) -> Spread:
    return spread(floats(table, name))


def n_of(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
