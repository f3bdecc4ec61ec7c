"""The pages of `look --serve`: layers, sets and scores of all neurons, and the card of each.

Each is made when a browser asks for it; `serve.py` decides who may ask.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from relneuron.artifact.chosen import read_name
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.neurons import Neuron
from relneuron.artifact.words import whole_number
from relneuron.model.mlps.shape import model_shape
from relneuron.report.cards import view
from relneuron.report.served import Cell, Listing, ServedPage, number_cell, served_html
from relneuron.study.cards import Cards
from relneuron.study.look import Sets
from relneuron.study.ranked import Ranked

PER_PAGE = 100  # neurons of a list
KEPT = 500  # cards that are not made again


class NoPage(Exception):
    """What is asked for is not there, and why."""


class Row(NamedTuple):
    """A neuron of a list: the sets that it is in, the best place first."""

    neuron: Neuron
    sets: Sequence[Json]

    @property
    def score(self) -> float:
        """The largest score that a set has it with; -inf without a set."""
        return max((one["score"] for one in self.sets), default=-math.inf)


# Ways to sort a list of neurons, the first by default.
SORTS: dict[str, Callable[[Row], Any]] = {
    "index": lambda row: row.neuron,
    "score": lambda row: (-row.score, row.neuron),
    "sets": lambda row: (-len(row.sets), -row.score, row.neuron),
}
OF_SET: dict[str, Callable[[Row], Any]] = {
    "rank": lambda row: row.sets[0]["rank"],
    "layer": lambda row: row.neuron,
}


class Pages:
    """The pages of a model's neurons. A model computes one card at a time."""

    def __init__(self, cards: Cards, sets: Sets, ranked: Ranked, model: str) -> None:
        self.cards, self.ranked, self.model = cards, ranked, model
        self.shape: Json = model_shape(cards.mlps)
        self._of: dict[Neuron, list[Json]] = sets.by_neuron()
        self._sets = {
            name: [row[:3] for row in chosen]
            for name, chosen in (sets.file.sets if sets.file else {}).items()
        }
        self._made: OrderedDict[Neuron, Json] = OrderedDict()
        self._lock = threading.Lock()
        first = next(site for site in cards.order.widths)
        self.example = f"0.{first}.0"

    def routes(self) -> list[Route]:
        """What is answered at which address."""
        return [
            Route("/", self._page(self.home)),
            Route("/set", self._page(self.set)),
            Route("/scores", self._page(self.scores)),
            Route("/layer/{layer}/{site}", self._page(self.layer)),
            Route("/neuron/{neuron}", self._page(self.neuron)),
            Route("/find", self._page(self.find)),
            Route("/{path:path}", self._page(self.nothing)),
        ]

    def _page(self, make: Callable[[Request], Response | ServedPage]) -> Any:
        """An endpoint, in a thread, from what makes its page; an error is said, not shown."""

        def answer(request: Request) -> Response:
            status = 200
            try:
                made = make(request)
            except NoPage as error:
                # As the browser counts: a slash that is escaped makes no folder.
                depth = request.scope["raw_path"].count(b"/") - 2
                made, status = self._of_page("Not found", depth, said=str(error)), 404
            except Exception as error:
                # The terminal says it; whoever looks sees no path of this machine.
                warnings.warn(f"look: {type(error).__name__}: {error}", stacklevel=2)
                return PlainTextResponse("This page cannot be made; the terminal says why.", 500)
            return made if isinstance(made, Response) else HTMLResponse(served_html(made), status)

        return answer

    def _of_page(self, title: str, depth: int, **more: Any) -> ServedPage:
        return ServedPage(title, self.model, self.example, "../" * depth or "./", **more)

    def home(self, request: Request) -> ServedPage:
        """Every layer and site, every set."""
        order = self.cards.order
        layers = [
            [Cell(order.layer_name(layer))]
            + [
                Cell(f"{width:,}", f"layer/{layer}/{site}", True) if width else Cell("")
                for site in order.widths
                for width in [order.width(layer, site)]
            ]
            for layer in range(order.layers)
        ]
        tables = [Listing(("layer", *order.widths), layers, "Layers")]
        if self._sets:
            rows = [
                [Cell(name, f"set?{urlencode({'name': name})}"), Cell(f"{len(some):,}", "", True)]
                for name, some in self._sets.items()
            ]
            tables.insert(0, Listing(("set", "neurons"), rows, "Sets"))
        if self.ranked.names:
            rows = [[Cell(of, f"scores?{urlencode({'of': of})}")] for of in self.ranked.names]
            tables.insert(1, Listing(("scored for",), rows, "All neurons by their scores"))
        return self._of_page(f"The {order.total:,} neurons of {self.model}", 0, tables=tables)

    def set(self, request: Request) -> ServedPage:
        """The neurons of a set."""
        name = request.query_params.get("name", "")
        if name not in self._sets:
            raise NoPage(f"There is no set {name!r}.")
        rows = [
            Row(neuron, [one for one in self._of[neuron] if one["set"] == name])
            for neuron in dict.fromkeys(self._sets[name])
        ]
        known = [key for key in ("rank", "score", "p", "q")
                 if any(row.sets[0][key] is not None for row in rows)]  # fmt: skip

        def cells(row: Row) -> list[Cell]:
            return [number_cell(row.sets[0][key]) for key in known]

        asked = [("name", name)]
        table = self._listing(request, rows, OF_SET, ("neuron", *known), cells, asked, "")
        return self._of_page(f"The set {name}", 0, tables=[table])

    def scores(self, request: Request) -> ServedPage:
        """All neurons that were scored for a relation or group, by a score."""
        of = request.query_params.get("of", "")
        if of not in self.ranked.names:
            raise NoPage(f"There are no scores for {of!r}.")
        with self._lock:
            columns = self.ranked.columns(of)
            by = request.query_params.get("sort", columns[0])
            column, is_smallest = by.removeprefix("-"), by.startswith("-")
            if column not in columns:
                raise NoPage("There is no such page of this list.")
            number, n_pages = _page_number(request, self.ranked.count(of, column))
            places = slice((number - 1) * PER_PAGE, number * PER_PAGE)
            rows = self.ranked.rows(of, column, is_smallest, places)
        ways = {f"{end} {name}": f"{sign}{name}" for name in columns
                for end, sign in (("largest", ""), ("smallest", "-"))}  # fmt: skip
        table = Listing(
            ("neuron", *columns, "sets"),
            [
                [self._link(n, ""), *map(number_cell, values), self._sets_cell(self._of.get(n, ()))]
                for n, values in rows
            ],
            sorts=[
                (words, "" if way == by else f"?{urlencode({'of': of, 'sort': way})}")
                for words, way in ways.items()
            ],
            number=number,
            n_pages=n_pages,
            asked=[("of", of), ("sort", by)],
        )
        return self._of_page(f"All neurons by their scores for {of}", 0, tables=[table])

    def layer(self, request: Request) -> ServedPage:
        """The neurons of a layer at a site."""
        layer, site = request.path_params["layer"], request.path_params["site"]
        number, order = whole_number(layer), self.cards.order
        if number is None or number >= order.layers or site not in order.widths:
            raise NoPage(f"There is no layer {layer} with neurons of {site}.")
        neurons = [(number, site, index) for index in range(order.width(number, site))]
        rows = [Row(neuron, self._of.get(neuron, ())) for neuron in neurons]
        columns = ("neuron", "sets", "best score")
        table = self._listing(request, rows, SORTS, columns, self._set_cells, [], "../../")
        return self._of_page(f"{order.layer_name(number)}, {site}", 2, tables=[table])

    def _set_cells(self, row: Row) -> list[Cell]:
        return [self._sets_cell(row.sets), number_cell(row.score if row.sets else None)]

    def _sets_cell(self, sets: Sequence[Json]) -> Cell:
        return Cell(", ".join(f"{one['set']} no. {one['rank']:,}" for one in sets))

    def _listing(
        self,
        request: Request,
        rows: list[Row],
        ways: dict[str, Callable[[Row], Any]],
        columns: Sequence[str],
        cells: Callable[[Row], list[Cell]],
        asked: list[tuple[str, str]],
        up: str,
    ) -> Listing:
        """The page of a list of neurons that the address asks for, sorted as it says."""
        by = request.query_params.get("sort", next(iter(ways)))
        if by not in ways:
            raise NoPage("There is no such page of this list.")
        number, n_pages = _page_number(request, len(rows))
        rows.sort(key=ways[by])
        shown = rows[(number - 1) * PER_PAGE : number * PER_PAGE]
        return Listing(
            columns,
            [[self._link(row.neuron, up), *cells(row)] for row in shown],
            sorts=[
                (way, "" if way == by else f"?{urlencode([*asked, ('sort', way)])}") for way in ways
            ],
            number=number,
            n_pages=n_pages,
            asked=[*asked, ("sort", by)],
        )

    def _link(self, neuron: Neuron, up: str) -> Cell:
        return Cell(self.cards.order.name(*neuron), f"{up}neuron/{_name(neuron)}")

    def neuron(self, request: Request) -> ServedPage:
        """The card of a neuron."""
        layer, site, index = neuron = self._neuron(request.path_params["neuron"])
        with self._lock:
            if neuron not in self._made:
                self._made[neuron] = self.cards.card(neuron)
                while len(self._made) > KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(neuron)
            card = self._made[neuron]
        order = self.cards.order
        width = order.width(layer, site if site in order.widths else "gate")
        return self._of_page(
            f"Neuron {card['name']}",
            1,
            card=view(card),
            before=_name((layer, site, index - 1)) if index else "",
            after=_name((layer, site, index + 1)) if index + 1 < width else "",
        )

    def find(self, request: Request) -> Response:
        """The card of the neuron that is named in the form."""
        neuron = self._neuron(request.query_params.get("neuron", "").strip())
        return RedirectResponse(f"neuron/{quote(_name(neuron))}", 303)

    def _neuron(self, name: str) -> Neuron:
        try:
            return read_name(name, self.shape)
        except RelneuronError as error:
            raise NoPage(f"{error.cause}: {error.fix}.") from None

    def nothing(self, request: Request) -> ServedPage:
        """Of an address that is no page's."""
        raise NoPage("There is no such page.")


def _page_number(request: Request, n_rows: int) -> tuple[int, int]:
    """Which page of a list the address asks for, and how many it has."""
    number = whole_number(request.query_params.get("page", "1"))
    n_pages = max(1, math.ceil(n_rows / PER_PAGE))
    if number is None or not 1 <= number <= n_pages:
        raise NoPage("There is no such page of this list.")
    return number, n_pages


def _name(neuron: Neuron) -> str:
    return ".".join(map(str, neuron))
