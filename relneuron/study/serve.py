"""`look --serve`: the cards of all neurons of a model, each made when a browser asks for it.

An app of starlette that is only read from: it lists layers, sets and neurons, and shows a card. Who
asks must know the token in the address, and name the server as it is named.
"""

from __future__ import annotations

import math
import secrets
import socket
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
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

PER_PAGE = 100  # neurons of a list
KEPT = 500  # cards that are not made again
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
# No script, nothing from elsewhere, in no frame; the address, which has the token, goes nowhere.
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Answers who knows the token and only wants to read; adds HEADERS to every answer.

    Everybody else hears that there is nothing, whatever is asked for. What lies behind sees the
    address without the token.
    """

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.token = app, token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message = message | {"headers": [*message["headers"], *own]}
            await send(message)

        if scope["type"] != "http":
            return
        app = self.app
        given, _, rest = scope["path"].removeprefix("/").partition("/")
        if not secrets.compare_digest(given.encode("utf-8", "replace"), self.token):
            app = PlainTextResponse("Not found", 404)
        elif scope["method"] not in ("GET", "HEAD"):
            app = PlainTextResponse("Only to be read", 405, {"allow": "GET, HEAD"})
        elif "/" not in scope["path"].removeprefix("/"):
            app = RedirectResponse(f"/{given}/")  # links are relative to the folder
        await app(scope | {"path": f"/{rest}"}, receive, send_with_headers)


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


class Server:
    """The pages of a model's neurons. A model computes one card at a time."""

    def __init__(self, cards: Cards, sets: Sets, model: str) -> None:
        self.cards, self.model = cards, model
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

    def app(self, token: str, hosts: Sequence[str]) -> Starlette:
        """The app; it answers under /TOKEN/, to requests for one of `hosts`."""
        return Starlette(
            routes=[
                Route("/", self._page(self.home)),
                Route("/set", self._page(self.set)),
                Route("/layer/{layer}/{site}", self._page(self.layer)),
                Route("/neuron/{neuron}", self._page(self.neuron)),
                Route("/find", self._page(self.find)),
                Route("/{path:path}", self._page(self.nothing)),
            ],
            middleware=[
                Middleware(Guard, token=token),
                Middleware(TrustedHostMiddleware, allowed_hosts=[*hosts], www_redirect=False),
            ],
        )

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
        columns = ("neuron", "rank", "score", "p", "q")
        table = self._listing(request, rows, OF_SET, columns, self._own_cells, [("name", name)], "")
        return self._of_page(f"The set {name}", 0, tables=[table])

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

    def _own_cells(self, row: Row) -> list[Cell]:
        own = row.sets[0]
        return [number_cell(own[key]) for key in ("rank", "score", "p", "q")]

    def _set_cells(self, row: Row) -> list[Cell]:
        names = ", ".join(f"{one['set']} no. {one['rank']:,}" for one in row.sets)
        return [Cell(names), number_cell(row.score if row.sets else None)]

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
        number = whole_number(request.query_params.get("page", "1"))
        n_pages = max(1, math.ceil(len(rows) / PER_PAGE))
        if by not in ways or number is None or not 1 <= number <= n_pages:
            raise NoPage("There is no such page of this list.")
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


def _name(neuron: Neuron) -> str:
    return ".".join(map(str, neuron))


def hosts_of(host: str) -> list[str]:
    """What the Host header of a request may say to a server that listens at `host`.

    At every address of this machine (0.0.0.0, ::) that is each of its names and addresses.
    """
    own = [host, f"[{host}]"] if ":" in host else [host]
    if not ip_address(host).is_unspecified:
        return [*own, *LOOPBACK] if ip_address(host).is_loopback else own
    name = socket.gethostname()
    known = {info[4][0] for info in socket.getaddrinfo(name, None)}
    return [*LOOPBACK, name, socket.getfqdn(), *map(str, known)]


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at an address of this machine; 0 is a port that is free."""
    try:
        family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        raise RelneuronError(
            f"--host {host} is no address", "give one such as 127.0.0.1 or 0.0.0.0", 2
        ) from None
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, port))
        except OSError as error:
            raise RelneuronError(
                f"cannot listen at {host}, port {port}: {error.strerror}",
                "give another --port, or leave it out for one that is free",
            ) from error
        yield found
    finally:
        found.close()


def address(found: socket.socket, token: str) -> str:
    """The URL of a server at a socket."""
    host, port = found.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{token}/"


def serve(app: Starlette, found: socket.socket) -> None:
    """Answer until Ctrl-C, which raises KeyboardInterrupt behind the last answer."""
    config = uvicorn.Config(
        app,
        log_level="critical",
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run(sockets=[found])
