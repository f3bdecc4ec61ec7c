"""What the command line prints: plain lines and tables, whatever they hold shown as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from relneuron.artifact.stage import Printed


def show(item: str | Printed) -> None:
    """Print what a command yields."""
    if isinstance(item, str):
        say(item)
        return
    table = Table(caption=_printable(item.caption) or None)
    for place, name in enumerate(item.columns):
        table.add_column(Text(_printable(name)), justify="right" if place else "left")
    for row in item.rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))  # a Text has no markup
    Console(highlight=False, emoji=False).print(table)


def say(text: str) -> None:
    """Print plain text: no markup, no control characters from data."""
    Console(highlight=False, soft_wrap=True, emoji=False).print(_printable(text), markup=False)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def rows_of(rows: list[tuple[str, str]]) -> Iterator[str]:
    """Names and findings, the findings below each other."""
    width = max(len(name) for name, _ in rows)
    for name, finding in rows:
        yield f"{name:<{width}}  {finding}"


def bench_lines(title: str, rows: Sequence[Any]) -> Iterator[str]:
    """The rows of one case; a contestant that is wrong or not here has a reason and no times."""
    table = [["task", "who", "ms", "min ms", "x ours", "GB/s", "/triad", "/copy"]]
    for row in rows:
        if row.median_ms is None:
            yield f"{row.variant}, {row.contestant}: {row.note}"
            continue
        shares = ["" if s is None else f"{s:.0%}" for s in (row.share_triad, row.share_copy)]
        times = [f"{row.median_ms:.3g}", f"{row.min_ms:.3g}", f"{row.ratio:.3g}"]
        table.append([row.variant, row.contestant, *times, f"{row.GB_s:.3g}", *shares])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    yield title
    for cells in table:
        pairs = enumerate(zip(cells, widths, strict=True))
        yield " ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in pairs).rstrip()
