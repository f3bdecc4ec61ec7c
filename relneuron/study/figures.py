"""The figures of a study as files for a paper, with the references of its methods."""

from __future__ import annotations

from pathlib import Path

from relneuron.artifact.files import RelneuronError
from relneuron.report.page import make_page
from relneuron.report.save import FigureOptions, figure_files, refuse_folder, write_files
from relneuron.study.cite import bibtex
from relneuron.study.pages import PAGES, titles


def figures(
    study: Path, output: Path, options: FigureOptions | None = None, *, force: bool = False
) -> list[Path]:
    """Write every figure of a study's report to the folder `output`; returns the files' paths.

    Beside each its numbers as csv and a caption as text, beside all references.bib. The same study
    gives the same bytes. Raises RelneuronError, before anything is written, for a folder without a
    study, for one whose report has no figure, and for files that are there, unless `force`.
    """
    refuse_folder(study, output)
    page = make_page(study, PAGES, titles())
    references = bibtex(study) if (study / "manifest.json").exists() else ""
    files = figure_files(page, options or FigureOptions(), references)
    if not files:
        raise RelneuronError(
            f"the report on {study} has no figure", "run more stages of the study first"
        )
    return write_files(output, files, force=force)
