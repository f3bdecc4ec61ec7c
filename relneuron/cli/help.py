"""How the help of a command is laid out: options under headings, examples as they are typed.

cli/flags.py and cli/main.py write their pages by it. Plain text, in up to `WIDEST` columns.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

WIDEST = 120  # columns of a page; wider lines are hard to read
ARGUMENTS, FILES, RUNS = "Arguments", "Input and output", "How it runs"
EXAMPLES = "\n\nExamples:\n"  # what begins the examples in a docstring
_FLAG = 30  # columns of a flag beside its help; a longer one has lines of its own


def parts_of(function: Callable[..., Any]) -> tuple[str, str]:
    """A command's help, and its examples, from its docstring."""
    text, _, examples = (inspect.getdoc(function) or "").partition(EXAMPLES)
    return text, inspect.cleandoc(examples)


def write_panels(params: Iterable[Any], ctx: Any, formatter: Any) -> None:
    """Arguments and options of typer's, each heading once, in the order that they come in."""
    panels: dict[str, list[tuple[str, str]]] = {ARGUMENTS: [], FILES: []}
    running: list[tuple[str, str]] = []
    for param in params:
        record = param.get_help_record(ctx)
        if record is None:
            continue
        panel = getattr(param, "rich_help_panel", None) or RUNS
        left = folded(record[0], formatter.width - 2)
        if param.param_type_name == "argument":
            panel, left = ARGUMENTS, param.metavar
        rows = running if panel == RUNS else panels.setdefault(panel, [])
        rows.append((left, record[1].replace("\\[", "[")))  # typer before 0.25 escapes it
    for panel, rows in {**panels, RUNS: running}.items():
        if rows:
            with formatter.section(panel):
                # The same width everywhere: the page has two columns.
                formatter.write_dl([(left.ljust(_FLAG), right) for left, right in rows], _FLAG)


def folded(flag: str, width: int) -> str:
    """A flag with its choices, in more lines where it is longer than `width`."""
    lines = [""]
    for part in re.split(r"(?<=\|)", flag):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append(" " * 6)
        lines[-1] += part
    return "\n".join(lines)


def write_examples(examples: str, formatter: Any) -> None:
    """Lines as they are typed, none broken."""
    with formatter.section("Examples"):
        for line in examples.splitlines():
            formatter.write(f"{'':{formatter.current_indent}}{line}".rstrip() + "\n")
