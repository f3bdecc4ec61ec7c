"""Writes the figures of a page as files for a paper: each alone, its table and a caption beside it.

study/figures.py calls it. paper.py fits a figure to the width that is asked for.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relneuron.artifact.files import (
    RelneuronError,
    atomic_write,
    check_folder,
    real_path,
    refuse_output,
    writing,
)
from relneuron.artifact.manifest import locked
from relneuron.artifact.options import Options, option
from relneuron.report.page import Page, Section
from relneuron.report.tables import visible

if TYPE_CHECKING:  # matplotlib is imported when figures are made
    from matplotlib.transforms import Bbox

    from relneuron.report.kit import Drawing

FORMATS = ("pdf", "svg", "png")
INCHES = {"in": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72}
LEAST, MOST = 3.0, 40.0  # inches: names and a picture need so much, and no printer takes more


def inches(text: str) -> float:
    """A width such as 3.3in, 8.4cm, 84mm or 240pt (of 1/72 inch) in inches."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d*)?|\.\d+)\s*([a-z]+)", text.strip())
    fix = "give a width such as 3.3in, 8.4cm, 84mm or 240pt"
    if found is None or found[2] not in INCHES:
        raise RelneuronError(f"--width {text!r} is no width", fix, 2)
    width = float(found[1]) * INCHES[found[2]]
    if not LEAST <= width <= MOST:
        cause = f"--width {text} is {width:.3g}in, less than {LEAST:g}in or more than {MOST:g}in"
        raise RelneuronError(cause, fix, 2)
    return width


@dataclass(frozen=True)
class FigureOptions(Options):
    """How figures are written."""

    PANEL = "The figures"

    format: Sequence[str] = option(
        ("pdf",), f"Of the figures: {', '.join(FORMATS)}.", choices=FORMATS, is_set=True, some=True
    )
    width: float = option(
        7.0,
        "Of every figure, such as 3.3in, 8.4cm, 84mm or 240pt; 3.3in is one column of most papers. "
        "Figures are drawn anew: text keeps its size.",
        least=LEAST,
        most=MOST,
        read=inches,
        show=lambda width: f"{str(width).removesuffix('.0')}in",
    )


def figure_files(page: Page, options: FigureOptions, references: str = "") -> dict[str, bytes]:
    """The files of all figures of a page by their names.

    A figure is named by its section's key, of several figures with a number: drop.pdf, drop.csv
    (the numbers that it is drawn from, in full precision), drop.txt (a caption). `references`, as
    BibTeX, are references.bib.
    """
    files: dict[str, bytes] = {}
    for section in page.sections:
        several = len(section.drawings) > 1
        for number, drawing in enumerate(section.drawings, 1):
            name = f"{section.key}.{number}" if several else section.key
            made, said = _draw(drawing, options)
            files |= {f"{name}.{suffix}": data for suffix, data in made.items()}
            files[f"{name}.csv"] = (drawing.table or section.tables[0][1]).csv()
            files[f"{name}.txt"] = caption(page, section, drawing, said).encode()
    if files and references:
        files["references.bib"] = references.encode()
    return files


def caption(page: Page, section: Section, drawing: Drawing, said: Sequence[str] = ()) -> str:
    """What a figure shows and how its numbers were made, in the words of its section."""
    sentences = [f"{drawing.alt}.", *section.seen, section.how, *said]
    about = f"{page.title}: {page.facts}."
    return visible(" ".join(filter(None, [*sentences, about]))) + "\n"


def _draw(drawing: Drawing, options: FigureOptions) -> tuple[dict[str, bytes], list[str]]:
    """A figure in each format, and what is shown otherwise than on the page."""
    from relneuron.report import kit
    from relneuron.report.paper import fit

    with kit.themed():
        sheet, said = fit(drawing.figure, options.width)
        write = {"svg": _svg, "pdf": _pdf, "png": _png}
        return {name: write[name](drawing, sheet) for name in options.format}, said


def _svg(drawing: Drawing, sheet: Bbox) -> bytes:
    return f'<?xml version="1.0" encoding="utf-8"?>\n{drawing.svg_of(sheet)}\n'.encode()


def _pdf(drawing: Drawing, sheet: Bbox) -> bytes:
    # Neither times nor versions: the same study gives the same bytes.
    return _saved(drawing, sheet, "pdf", dict.fromkeys(("CreationDate", "Creator", "Producer")))


def _png(drawing: Drawing, sheet: Bbox) -> bytes:
    return _saved(drawing, sheet, "png", {"Software": None})


def _saved(drawing: Drawing, sheet: Bbox, suffix: str, metadata: Mapping[str, Any]) -> bytes:
    from relneuron.report.paper import DPI

    buffer, about = io.BytesIO(), dict(metadata)
    drawing.figure.savefig(
        buffer, format=suffix, dpi=DPI, bbox_inches=sheet, facecolor="white", metadata=about
    )
    return buffer.getvalue()


def refuse_folder(study: Path, folder: Path) -> None:
    """Raise where figures would lie among the files of a study, which have the same names."""
    check_folder(folder)
    is_of_study = real_path(folder) == real_path(study / "analyses")
    if is_of_study or (folder / "manifest.json").exists():
        raise RelneuronError(
            f"{folder} has files of a study in it", "give the figures a folder of their own", 2
        )


def write_files(folder: Path, files: Mapping[str, bytes], *, force: bool) -> list[Path]:
    """Write files to a folder, all or none that counts as finished; an old one only if `force`."""
    paths = [folder / name for name in files]
    for path in paths:
        refuse_output(path, "report", force)
    with locked(folder), writing("report", folder, paths):
        for path, data in zip(paths, files.values(), strict=True):
            atomic_write(path, data)
    return paths
