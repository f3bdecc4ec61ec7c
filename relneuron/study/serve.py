"""The server of `look --serve`, which is only read from: who may ask, and where it listens.

Who asks must know the token in the address, and name the server as it is named. The pages are
browse.py's.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse, RedirectResponse

from relneuron.artifact.files import RelneuronError
from relneuron.study.browse import Pages

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


def app_of(pages: Pages, token: str, hosts: Sequence[str]) -> Starlette:
    """The app; it answers under /TOKEN/, to requests for one of `hosts`."""
    return Starlette(
        routes=pages.routes(),
        middleware=[
            Middleware(Guard, token=token),
            Middleware(TrustedHostMiddleware, allowed_hosts=[*hosts], www_redirect=False),
        ],
    )


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
    """The URL of a server at a socket; at every address of this machine by its name."""
    host, port = found.getsockname()[:2]
    if ip_address(host).is_unspecified:
        host = socket.gethostname()
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
