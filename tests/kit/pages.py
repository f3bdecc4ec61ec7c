"""Readers of a report: its elements, text, sections and tables; and text that must stay text."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

# Text that must never act as anything else.
PAYLOADS = [
    "<script>alert(1)</script></svg></details><img src=x onerror=alert(1)>",
    "\"><a href='javascript:alert(1)'>x</a>' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% include 'x' %}${1+1}</title></style><style>*{display:none}</style>",
    '<!-- ]]> <?php --> &lt;b&gt; &#60;i&#62; data:text/html,<b> id="x" url(#y) 0.12345',
    "\x1b]8;;evil\x07 \u202e \x00 $\\frac{1}{0}$ _^",
]


class Page(HTMLParser):
    """The elements, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def ids(html: str) -> list[str]:
    """The addresses of the page's sections, in order."""
    return re.findall(r'<h2 id="([\w-]+)">', html)


def text_of(html: str, section: str = "") -> str:
    """The text of the page, or of one of its sections."""
    if section:
        html = html[html.index(f'<h2 id="{section}">') :]
        html = html[: html.index("</section>")]
    return " ".join(Page(html).text.split())


def downloads(html: str) -> dict[str, bytes]:
    """The csv files in the page's links."""
    link = r'download="([^"]+)" href="data:text/csv;charset=utf-8;base64,([^"]+)"'
    return {name: base64.b64decode(data) for name, data in re.findall(link, html)}


def tables_of(html: str) -> dict[str, list[dict[str, str]]]:
    """The rows of the csv files in the page's links."""
    files = downloads(html).items()
    return {name: list(csv.DictReader(io.StringIO(data.decode()))) for name, data in files}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
