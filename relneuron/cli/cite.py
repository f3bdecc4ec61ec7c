"""The command `cite`: which papers a study goes back to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from relneuron.artifact.files import atomic_write, refuse_overwrite
from relneuron.artifact.options import Argument, Named, Options, option, refuse_stray

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
    output: Annotated[
        Path | None, Named("File to write; default: they are printed.", ("-o", "--output"))
    ] = None,
    force: bool = False,
) -> Iterator[str]:
    """The papers behind a study's methods, and relneuron's own entry, as references.

    Examples:
      relneuron cite study -o references.bib
      relneuron cite study --format text
      relneuron cite  # of all methods
    """
    from relneuron.study import cite as references

    if output is not None:
        refuse_overwrite(output, force)
    elif force:
        refuse_stray("--force", "with -o")
    written = {"bibtex": references.bibtex, "text": references.text}[options.format](folder)
    if output is None:
        yield written.removesuffix("\n")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(output, written.encode())
    yield f"-> {output}"
