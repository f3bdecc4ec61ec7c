"""The command `cite`: which papers a study goes back to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from relneuron.artifact.options import Argument, Options, option

FORMATS = ("bibtex", "text")


@dataclass(frozen=True)
class CiteOptions(Options):
    """How references are written."""

    PANEL = "The references"

    format: str = option(
        "bibtex", "How references are written: entries of BibTeX, or a line each.", choices=FORMATS
    )


def cite(
    options: CiteOptions,
    folder: Annotated[
        Path | None, Argument("[DIR]", "A study directory; without one the papers of all methods.")
    ] = None,
) -> Iterator[str]:
    """The papers behind a study's methods, and relneuron's own entry, as references.

    Examples:
      relneuron cite study > references.bib
      relneuron cite study --format text
      relneuron cite                                    # of all methods
    """
    from relneuron.study import cite as references

    written = {"bibtex": references.bibtex, "text": references.text}[options.format](folder)
    yield written.removesuffix("\n")
