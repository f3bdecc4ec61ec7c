"""The pages of `look --serve`, as served.html.j2 lays them out: lists of neurons, and one's card.

study/browse.py gives them what they show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlencode

from relneuron.report.cards import View
from relneuron.report.page import environment
from relneuron.report.tables import significant


class Cell(NamedTuple):
    """A cell of a list; `link` is relative to the page."""

    text: str
    link: str = ""
    is_number: bool = False


def number_cell(value: float | None) -> Cell:
    """A number, or nothing."""
    return Cell("" if value is None else significant(value), is_number=True)


@dataclass(frozen=True)
class Listing:
    """A list, or one page of it.

    sorts    ways to sort, each with its link; the one that it is sorted by has none
    number   of the page, from 1, of `n_pages`; `asked` is what else the address says
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    sorts: Sequence[tuple[str, str]] = ()
    number: int = 1
    n_pages: int = 1
    asked: Sequence[tuple[str, str]] = ()

    def link(self, number: int) -> str:
        """The address of another page of the list."""
        return f"?{urlencode([*self.asked, ('page', number)])}"


@dataclass(frozen=True)
class ServedPage:
    """A page of the server; `home` is where it begins, relative to the page."""

    title: str
    model: str
    example: str  # of a neuron's name
    home: str = ""
    said: str = ""
    tables: Sequence[Listing] = ()
    card: View | None = None
    before: str = ""  # the neurons beside that of the card
    after: str = ""


def served_html(page: ServedPage) -> str:
    """The page as HTML."""
    template: Any = environment().get_template("served.html.j2")
    return str(template.render(page=page))
