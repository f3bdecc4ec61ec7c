"""The page engine: what a page is, which kind of study a folder holds, and the `report` stage.

A kind of study is plain data (`PageKind`); the module that it names reads the folder and makes its
`Page`, and report.html.j2 lays out every page. The same study gives the same bytes.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from relneuron.artifact.cards import NAME as CARDS
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    real_path,
    refuse_output,
    require,
    writing,
)
from relneuron.artifact.installed import need
from relneuron.artifact.manifest import Manifest, checked, locked
from relneuron.artifact.prompts import Prompt
from relneuron.artifact.stage import commands, load
from relneuron.report.cards import View, cards_of
from relneuron.report.tables import Number, Table, label, short, show, visible

if TYPE_CHECKING:  # matplotlib is imported when a page is made
    from relneuron.report.kit import Drawing


# What reading files raises that are damaged; OverflowError: an integer of more than 64 bits.
DAMAGE = (LookupError, TypeError, ValueError, OverflowError, csv.Error, SafetensorError)


@dataclass(frozen=True)
class PageKind:
    """A kind of study that has a page.

    name   of such a study, in words
    reads  the files that its page is made from, each with the command that makes it
    needs  those that must be there; another one must if the manifest names it
    marks  a folder with one of these files holds such a study
    hints  ... and so does one with one of these, where no mark of any kind is
    again  what to do about files that are damaged
    build  "module:function", called with a folder and the titles of the rankings: its `Page`
    first  whether its marks count before those of kinds that do not say so
    """

    name: str
    reads: Mapping[str, str]
    needs: tuple[str, ...]
    marks: tuple[str, ...]
    hints: tuple[str, ...]
    again: str
    build: str
    first: bool = False


# What a page is


class Section(NamedTuple):
    key: str  # its address in the page
    title: str
    question: str
    seen: Sequence[str]  # sentences made from the numbers
    how: str = ""  # to read the picture
    drawings: Sequence[Drawing] = ()
    tables: Sequence[tuple[str, Table]] = ()  # the file's name, without .csv
    most: int = 200  # rows of a table that the page shows; its file has all
    open: int = 0  # how many of the tables are shown unasked


class Tile(NamedTuple):
    """A number of the page's head."""

    title: str
    value: str
    small: str  # what it is over
    is_main: bool = False


class Answer(NamedTuple):
    prediction: str
    correct: bool


class Example(NamedTuple):
    """One prompt, answered by the model as it is and with a set switched off."""

    prompt: Prompt
    before: Answer
    after: Answer


class Script(NamedTuple):
    """What a page runs: its text, and the hash by which the page's policy knows it."""

    text: str
    digest: str


@dataclass(frozen=True)
class Page:
    """Everything that report.html.j2 names; all of it is shown as text, but drawings and style."""

    title: str
    facts: str
    question: str
    answer: str  # in one sentence
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    tables: Mapping[str, Table]  # for other programs, by the file's name without .csv
    manifest: Json
    note: str = ""  # below the tiles
    examples: Sequence[tuple[str, Sequence[Example]]] | None = None  # by set; None: of no such kind
    style: str = ""  # CSS of wider tables and smaller tiles
    cards: Sequence[View] = ()  # of neurons, as report/cards.py has them
    script: Script | None = None  # of a page of cards alone


# From a folder to its page


def kind_of(folder: Path, kinds: Sequence[PageKind]) -> PageKind:
    """The first kind of which the folder has a mark, or else a hint; the first of all if none."""
    ordered = sorted(kinds, key=lambda kind: not kind.first)
    for files in ([kind.marks for kind in ordered], [kind.hints for kind in ordered]):
        for kind, names in zip(ordered, files, strict=True):
            if any((folder / name).exists() for name in names):
                return kind
    return kinds[0]


def _need_tools() -> None:
    need("a report", "jinja2", "matplotlib", "scipy")


def load_tools() -> None:
    """Load all that a page is made with, as making one does: for what a plan says of memory."""
    _need_tools()
    import scipy.stats

    from relneuron.report.kit import figure, inline

    with figure() as fig:
        fig.subplots().set_title("a")
        text = inline(fig, "plan", "").svg
    assert text and scipy.stats
    environment().get_template("report.html.j2")


def make_page(
    folder: Path, kinds: Sequence[PageKind], titles: Mapping[str, str] | None = None
) -> Page:
    """The page of a study folder, as the kind of study that it holds.

    `titles` says what each ranking of neurons is, by its name.
    """
    _need_tools()
    page: Page = load(kind_of(folder, kinds).build)(folder, titles or {})
    return replace(page, cards=cards_of(folder, Manifest(folder).data))


@contextmanager
def opened(folder: Path, kind: PageKind) -> Iterator[Json]:
    """The manifest of a study folder that is read while the context lasts.

    Raises RelneuronError unless the files that are needed are there, and all are as the manifest
    notes them; and if what is read in the context does not fit together.
    """
    manifest = Manifest(folder).data
    for name, made_by in kind.reads.items():
        checked(folder / name)
        if name in kind.needs or name in manifest["files"]:
            require(folder / name, made_by)
    # A report does not describe itself.
    report = manifest["stages"].pop("report", {})
    for name in ("report.html", *report.get("files", ())):
        manifest["files"].pop(name, None)
    try:
        yield manifest
    except DAMAGE as error:
        raise RelneuronError(
            f"{folder}: a file is damaged or of another {kind.name} ({error!r})", kind.again
        ) from error


def files_read(kinds: Sequence[PageKind]) -> list[str]:
    """Every file of a folder that a page may be made from."""
    return list(dict.fromkeys([*(name for kind in kinds for name in kind.reads), CARDS]))


def write_report(
    study: Path,
    output: Path,
    kinds: Sequence[PageKind],
    titles: Mapping[str, str] | None = None,
    *,
    force: bool = False,
    finish: Callable[[list[Path]], object] = lambda tables: None,
) -> Path:
    """Write the report on the study directory `study` to `output`, one self-contained HTML file.

    Inside the study directory the tables of its analyses are written too. `finish` is called with
    their paths once all is written; without it the files count as unfinished.
    """
    refuse_output(output, "report", force)
    if real_path(output) in [real_path(study / name) for name in files_read(kinds)]:
        raise RelneuronError(f"{output} is a file of the study", "choose another output", 2)
    folder, page = output.parent, make_page(study, kinds, titles)
    is_inside = real_path(folder) == real_path(study)
    with locked(folder, *([folder / "analyses"] if is_inside else [])):
        html = render(page)
        tables = page.tables if is_inside else {}
        paths = [folder / "analyses" / f"{key}.csv" for key in tables]
        with writing("report", folder, [output, *paths]):
            if is_inside:
                write_tables(folder, tables)
            atomic_write(output, html.encode())
            finish(paths)
    return output


def write_tables(folder: Path, tables: Mapping[str, Table]) -> list[Path]:
    """Write each table to analyses/<key>.csv in `folder`, in full precision; others there go."""
    paths = [folder / "analyses" / f"{key}.csv" for key in tables]
    for old in set((folder / "analyses").glob("*.csv")) - set(paths):
        old.unlink()
    for path, table in zip(paths, tables.values(), strict=True):
        atomic_write(path, table.csv_pieces())
    return paths


def render(page: Page) -> str:
    """The page as HTML text; whatever the study holds is shown as text."""
    from relneuron.report.kit import THEME

    template = environment().get_template("report.html.j2")
    made = commands(page.manifest)
    return str(template.render(page=page, commands=made, theme=THEME)) + "\n"


def environment() -> Any:
    """What reads the templates: all that they are given is escaped, and visible."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else visible(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"show": show, "label": label, "short": short}
    found.tests["text"] = lambda cell: isinstance(cell, str) and not isinstance(cell, Number)
    return found
