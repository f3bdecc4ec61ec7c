"""Draws the report's figures: the theme, what a drawing is, and the parts of figures.

The figures.py of the rooms draw with it; paper.py makes files of what they draw. Text stays text,
so any script can be read and searched. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import RendererSVG
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from relneuron.report.tables import Array, Table, label

# The colours of a figure by the name of the page's variable. In grey they are steps: the brightness
# (0.299 R + 0.587 G + 0.114 B) of ink is 8 %, muted 30 %, off 53 %, random 76 %. No other part of a
# figure has one of them, because a page finds them by their value.
THEME = {
    "ink": "#111417",
    "muted": "#454d57",
    "paper": "#ffffff",
    "soft": "#eef0f2",
    "line": "#d5dae0",
    "off": "#e8700f",
    "random": "#bcc3cc",
}
INK, MUTED, PAPER, SOFT, LINE, OFF, RANDOM = THEME.values()
DARK, FAINT, LIGHT = "#15181c", "#6a727c", "#fefefe"  # on coloured cells, which no theme changes
FONTS = "DejaVu Sans, Verdana, Arial, Helvetica, sans-serif"  # the first is the one measured with
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    # Journals ask for fonts that can be edited: TrueType, and not type 3.
    "pdf.fonttype": 42,
    # Relation names are data: a dollar sign in one must not start a formula.
    "text.parse_math": False,
    "hatch.linewidth": 0.7,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.edgecolor": LINE,
    "xtick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
# Labels of axes by which paper.py knows them: cells that stay as high as they are wide, scales of
# colours below a figure; and the gids of a number in a cell and of its error.
SQUARE, SCALE, CELL, ERROR = "square", "scale", "cell", "error"
ROW = 0.3  # inches
MOST = 40  # rows or columns of a picture with a number, or a name, for each
BROAD = 8.0  # inches of a matrix of more
HATCHED = 0.05  # inches of a cell that has room for lines: those of a hatch are as far apart
SURE = 0.05  # the largest q that is written bold


# Drawings


@contextmanager
def themed() -> Iterator[None]:
    """Matplotlib as figures are drawn and written with."""
    # Starting from the library's defaults keeps a user's own matplotlibrc out of the bytes.
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)
        # The browser chooses the font of each label, so a glyph that DejaVu lacks is no fault.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


@contextmanager
def figure() -> Iterator[Figure]:
    """A figure of one inch, so that axes are placed in inches; saving fits it to what is drawn."""
    with themed():
        yield Figure(figsize=(1, 1))


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure that is drawn, and what it shows.

    `stem` keeps its ids apart from those of other figures of the page. `table`: the numbers that it
    is drawn from; None: those of its section's first table.
    """

    figure: Figure
    stem: str
    alt: str
    table: Table | None = None

    @property
    def svg(self) -> str:
        """The figure as an element of a page that is a picture on its own, too."""
        return self.svg_of()

    def svg_of(self, sheet: Bbox | None = None) -> str:
        """A picture of the part `sheet` of the figure, on white; without one of all, on nothing.

        Colours of the theme are attributes, which a page's style sheet overrides; a viewer without
        one draws them as they are.
        """
        with themed():
            buffer = io.StringIO()
            mpl.rcParams["svg.hashsalt"] = self.stem
            self.figure.savefig(
                buffer,
                format="svg",
                bbox_inches=sheet or self._whole(),
                facecolor=PAPER if sheet else "none",
                metadata={"Date": None},
            )
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub("<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
        # In the text between tags "<" and ">" are escaped, so only tags change here.
        svg = re.sub(r"<[^>]*>", lambda tag: _tag(tag[0]), svg)
        svg = re.sub(r">\s+<", "><", svg)
        about = f'role="img" aria-label="{self.alt}" font-family="{FONTS}"'
        return svg.replace("<svg", f"<svg {about}", 1)

    def _whole(self) -> Bbox:
        """What savefig finds for "tight", in inches, without drawing all for it once before."""
        dpi, self.figure.dpi = self.figure.dpi, 72  # of a svg
        renderer: Any = RendererSVG  # of no types
        box = self.figure.get_tightbbox(renderer(*self.figure.bbox.size, io.StringIO()))
        self.figure.dpi = dpi
        return box.padded(mpl.rcParams["savefig.pad_inches"])


def inline(fig: Figure, stem: str, alt: str, table: Table | None = None) -> Drawing:
    """The figure, once all is drawn."""
    return Drawing(fig, stem, alt, table)


def _tag(tag: str) -> str:
    tag = re.sub(r'(?<=<g) id="[^"]*"| ?font-family: [^;"]*;?', "", tag)
    tag = tag.replace("base64,\n", "base64,")
    tag = re.sub(r'style="([^"]*)"', lambda style: _style(style[1]), tag)
    tag = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag)
    return " ".join(tag.split())


def _style(style: str) -> str:
    """The attributes in place of a style: colours of the theme each as one of its own."""
    parts = [part.strip() for part in style.split(";") if part.strip()]
    is_theme = {part: part.split(": ")[-1] in THEME.values() for part in parts}
    pairs = [part.split(": ") for part in parts if is_theme[part]]
    colours = " ".join(f'{name}="{value}"' for name, value in pairs)
    rest = "; ".join(part for part in parts if not is_theme[part])
    return f'style="{rest}" {colours}' if rest else colours


# Parts


def whole(value: float) -> str:
    return f"{round(value):,}".replace("-", "−") if np.isfinite(value) else "–"


def short(name: str, most: int = 34) -> str:
    """A name for people that fits beside a figure: of so many characters at most."""
    # Long names often differ only at the end, so the middle goes.
    text, kept = label(name), most - 1
    return text if len(text) <= most else f"{text[: kept - kept // 2]}…{text[-(kept // 2) :]}"


def ends(*values: Array | float) -> tuple[float, float]:
    """The least and the greatest finite number."""
    found = np.concatenate([np.ravel(some) for some in values])
    found = found[np.isfinite(found)]
    return float(found.min()), float(found.max())


def legend(
    fig: Figure, marks: Sequence[Any], high: float, left: float = 0, n_columns: int = 3
) -> Legend:
    """Marks in lines of so many, `high` inches above the figure's origin."""
    return fig.legend(
        handles=marks,
        loc="lower left",
        bbox_to_anchor=(left, high),
        ncols=n_columns,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
    )


def mark(name: str, **style: Any) -> Line2D:
    """A line of a legend."""
    defaults: dict[str, Any] = {"ls": "none", "ms": 7, "marker": "o"}
    return Line2D([], [], label=name, **defaults | style)


BEFORE: dict[str, Any] = {"mfc": PAPER, "mec": INK, "mew": 1.4}


def rows_axes(
    fig: Figure, names: Sequence[str], *, left: float = 0, width: float = 5, named: bool = True
) -> Axes:
    """Axes with one row for each relation, the first on top; row i is at y = i."""
    ax = fig.add_axes((left, 0, width, ROW * len(names) + 0.1))
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_yticks(range(len(names)), [short(name) if named else "" for name in names])
    ax.tick_params(axis="y", pad=8)
    return ax


def beside(ax: Axes, heading: str, notes: Sequence[str]) -> None:
    """A note right of each row, and a heading above them."""
    for place, note in enumerate([heading, *notes]):
        ax.annotate(
            note,
            (1, place - 1 if place else -0.9),
            xytext=(10, 0),
            xycoords=ax.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            annotation_clip=False,
        )


class Pivot(NamedTuple):
    """Cells of a table that name a row and a column, as a matrix; NaN where there is none."""

    rows: list[str]
    columns: list[str]
    values: dict[str, Array]  # (R, C) by column of the table


def pivot(table: Table, row: str, column: str, *names: str) -> Pivot:
    where = [[str(cell) for cell in table.column(name)] for name in (row, column)]
    rows, columns = (list(dict.fromkeys(cells)) for cells in where)
    values = {name: np.full((len(rows), len(columns)), np.nan) for name in names}
    known = [{name: i for i, name in enumerate(names)} for names in (rows, columns)]
    places = tuple([of[n] for n in found] for of, found in zip(known, where, strict=True))
    for name, found in values.items():
        found[places] = table.floats(name)
    return Pivot(rows, columns, values)


def matrix(
    fig: Figure,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Array,
    colours: ScalarMappable,
    *,
    numbers: Array | None = None,
    framed: NDArray[np.bool_] | None = None,
    sure: NDArray[np.bool_] | None = None,
) -> Axes:
    """A coloured cell for each of `values` (R, C), in bold where `sure` and small elsewhere.

    With more than MOST rows or columns there is room for the colours only, and for some names.
    """
    n = max(values.shape)
    cell, size = (0.46, 8.5) if n <= 20 else (0.34, 6.5)
    if is_large := n > MOST:
        cell = max(BROAD / n, 0.02)
    ax = fig.add_axes((0, 0, cell * len(columns), cell * len(rows)), label=SQUARE)
    shown = values if numbers is None else numbers
    cells(ax, values, colours, None if is_large else shown, size, sure)
    if is_large and is_centred(colours) and cell >= HATCHED:
        hatch(ax, values < 0)
    for i, j in np.argwhere(np.zeros(values.shape) if framed is None or is_large else framed):
        ink = INK if np.isnan(values[i, j]) else DARK
        ax.add_patch(Rectangle((j + 0.04, i + 0.04), 0.92, 0.92, fill=False, ec=ink, lw=1.3))
    name_axes(ax, rows, columns, every(n))
    return ax


def every(n: int) -> int:
    """Of n rows or columns the names of every such one are shown."""
    return -(-n // MOST)


def name_axes(ax: Axes, rows: Sequence[str], columns: Sequence[str], step: int = 1) -> None:
    """Names of the rows and, on top, of the columns of a matrix: of every `step`-th."""
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.set_xticks(
        np.arange(0, len(columns), step) + 0.5,
        [short(column) for column in columns[::step]],
        rotation=45,
        ha="left",
        rotation_mode="anchor",
        color=INK,
    )
    ax.set_yticks(np.arange(0, len(rows), step) + 0.5, [short(row) for row in rows[::step]])


def cells(
    ax: Axes,
    values: Array,
    colours: ScalarMappable,
    numbers: Array | None,
    size: float,
    sure: NDArray[np.bool_] | None = None,
) -> None:
    """A matrix of squares with lines between them, a large one as an image; the numbers on top."""
    n_rows, n_columns = values.shape
    rgba = colours.to_rgba(values)
    ax.set_facecolor(SOFT)
    if max(values.shape) > MOST:
        ax.imshow(rgba, interpolation="none", aspect="auto", extent=(0, n_columns, n_rows, 0))
    else:  # programs that scale an image blur its few pixels
        ax.pcolormesh(np.arange(n_columns + 1), np.arange(n_rows + 1), rgba)
        ax.set(xlim=(0, n_columns), ylim=(n_rows, 0))
        ax.hlines(range(n_rows + 1), 0, n_columns, color=PAPER, lw=0.8)
        ax.vlines(range(n_columns + 1), 0, n_rows, color=PAPER, lw=0.8)
    ax.spines[:].set_visible(False)
    for (i, j), number in np.ndenumerate(np.empty((0, 0)) if numbers is None else numbers):
        light = rgba[i, j] @ (0.299, 0.587, 0.114, 0)
        style: dict[str, Any] = {"fontsize": size, "color": LIGHT if light < 0.55 else DARK}
        if sure is not None and sure[i, j]:
            style["fontweight"] = "bold"
        elif sure is not None:
            style |= {"fontsize": 0.82 * size} | ({"color": FAINT} if light > 0.85 else {})
        if np.isnan(values[i, j]):
            style["color"] = INK
        written = ax.text(j + 0.5, i + 0.5, whole(number), **style)
        written.set(ha="center", va="center_baseline", in_layout=False, gid=CELL)


def is_centred(colours: ScalarMappable) -> bool:
    """Whether the colours tell what is below 0 from what is above: two that are alike in grey."""
    return colours.norm.vmin is not None and bool(np.all(np.asarray(colours.norm.vmin) < 0))


def hatch(ax: Axes, where: NDArray[np.bool_]) -> None:
    """Lines over some cells (R, C), for those below 0 where no number has its sign."""
    squares = [
        Path([(j, i), (j + 1, i), (j + 1, i + 1), (j, i + 1), (j, i)], closed=True)
        for i, j in np.argwhere(where)
    ]
    if squares:
        path = Path.make_compound_path(*squares)
        ax.add_patch(PathPatch(path, fill=False, ec=LIGHT, lw=0, hatch="/" * 10))


def scale(
    fig: Figure, colours: ScalarMappable, ticks: list[int], names: list[str], below: float = 0.4
) -> None:
    ax = fig.add_axes((0, -below, 2.4, 0.13), label=SCALE)
    low, high = ticks[0], ticks[-1]
    steps = colours.to_rgba(np.linspace(low, high, 64)[None])
    ax.imshow(steps, interpolation="none", aspect="auto", extent=(low, high, 0, 1))
    if is_centred(colours):
        below_0 = Rectangle((low, 0), -low, 1, fill=False, ec=LIGHT, lw=0, hatch="/" * 10)
        ax.add_patch(below_0)
    ax.set_xticks(ticks, names)
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
