"""What a stage of the command line and a method say of themselves: plain data, imported when used.

methods/__init__.py lists the methods, cli/main.py the other stages; nothing registers itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

from relneuron.artifact.options import Options


class Printed(NamedTuple):
    """A table that a command prints."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def load(name: str) -> Any:
    """What a string "module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


@dataclass(frozen=True)
class Stage:
    """A command of relneuron.

    run     "module:function"; the function's parameters are the command line's (artifact/options),
            its docstring the help, and what it yields, lines and `Printed`, is printed. The module
            imports no torch.
    needs   packages besides those of the command line
    """

    name: str
    run: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ranking:
    """A way to rank neurons: one `identify --method`.

    title    what it is, for help and reports
    options  the class of what it takes
    reads    the file of a folder that it ranks, and `of`, what that holds
    run      "module:function" (folder, output, options, *, method, force, quiet), which yields what
             is printed
    """

    name: str
    title: str
    options: type[Options]
    reads: str
    of: str
    run: str


@dataclass(frozen=True)
class Method:
    """A way to find neurons: its commands, its rankings, its page of a report, and its models.

    page      "module:PAGE" of a report.page.PageKind, if a folder of its files has a page
    supports  "module:function" (model) -> one row of `relneuron doctor`, if it has a say in it
    """

    stages: tuple[Stage, ...] = ()
    rankings: tuple[Ranking, ...] = ()
    page: str = ""
    supports: str = ""
