"""Draws the report's figures as inline SVG: the theme, and the figures of the main sections.

Pages call it; the figures.py of the analyses and the methods have the others. Text stays text, so
any script can be read and searched, and the theme's colours are CSS variables: the page decides how
they look in dark mode and in print. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from relneuron.report.tables import Array, Table, label, split_title

# Placeholder colours: inline() turns each into the page's variable of that name.
THEME = ("ink", "muted", "paper", "soft", "line", "off", "random")
INK, MUTED, PAPER, SOFT, LINE, OFF, RANDOM = (f"#01020{i}" for i in range(len(THEME)))
DARK, FAINT = "#15181c", "#6a727c"  # on coloured cells, which the theme leaves alone
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    # Relation names are data: a dollar sign in one must not start a formula.
    "text.parse_math": False,
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
ROW = 0.3  # inches
MOST = 40  # rows or columns of a picture with a number, or a name, for each
BROAD = 8.0  # inches of a matrix of more
# Panels side by side: three fit the width of a printed page.
PANELS_PER_FIGURE = 3
SURE = 0.05  # the largest q that is written bold


# Parts


@contextmanager
def figure() -> Iterator[Figure]:
    """A figure of one inch, so that axes are placed in inches; saving fits it to what is drawn."""
    # Starting from the library's defaults keeps a user's own matplotlibrc out of the bytes.
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)
        # The browser chooses the font of each label, so a glyph that DejaVu lacks is no fault.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield Figure(figsize=(1, 1))


def inline(fig: Figure, stem: str, alt: str) -> str:
    """The figure as an element of the page; `stem` keeps its ids apart from other figures'."""
    buffer = io.StringIO()
    mpl.rcParams["svg.hashsalt"] = stem
    fig.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub("<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    # In the text between tags "<" and ">" are escaped, so only tags change here.
    svg = re.sub(r"<[^>]*>", lambda tag: _tag(tag[0]), svg)
    svg = re.sub(r">\s+<", "><", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)


def _tag(tag: str) -> str:
    tag = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"| ?font-family: [^;"]*;?', "", tag)
    tag = tag.replace("xlink:href", "href").replace("base64,\n", "base64,")
    for i, name in enumerate(THEME):
        tag = tag.replace(f"#01020{i}", f"var(--{name})")
    tag = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag)
    return " ".join(tag.split())


def whole(value: float) -> str:
    return f"{round(value):,}".replace("-", "−") if np.isfinite(value) else "–"


def short(name: str) -> str:
    """A name for people that fits beside a figure."""
    # Long names often differ only at the end, so the middle goes.
    text = label(name)
    return text if len(text) <= 34 else f"{text[:17]}…{text[-16:]}"


def ends(*values: Array | float) -> tuple[float, float]:
    """The least and the greatest finite number."""
    found = np.concatenate([np.ravel(some) for some in values])
    found = found[np.isfinite(found)]
    return float(found.min()), float(found.max())


def legend(fig: Figure, marks: Sequence[Any], high: float, left: float = 0) -> None:
    """Marks in lines of three, `high` inches above the figure's origin."""
    fig.legend(
        handles=marks,
        loc="lower left",
        bbox_to_anchor=(left, high),
        ncols=3,
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
    # The figure is one inch wide, so this is 0.14 inches right of the axis.
    x = 1 + 0.14 / ax.get_position().width
    for place, note in enumerate([heading, *notes]):
        y = place - 1 if place else -0.9
        ax.text(x, y, note, va="center", fontsize=8.5, transform=ax.get_yaxis_transform())


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
    ax = fig.add_axes((0, 0, cell * len(columns), cell * len(rows)))
    shown = values if numbers is None else numbers
    cells(ax, values, colours, None if is_large else shown, size, sure)
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
    """A matrix as one small image with lines between the cells, and the numbers on top."""
    n_rows, n_columns = values.shape
    rgba = colours.to_rgba(values)
    ax.set_facecolor(SOFT)
    ax.imshow(rgba, interpolation="none", aspect="auto", extent=(0, n_columns, n_rows, 0))
    if max(values.shape) <= MOST:
        ax.hlines(range(n_rows + 1), 0, n_columns, color=PAPER, lw=0.8)
        ax.vlines(range(n_columns + 1), 0, n_rows, color=PAPER, lw=0.8)
    ax.spines[:].set_visible(False)
    for (i, j), number in np.ndenumerate(np.empty((0, 0)) if numbers is None else numbers):
        light = rgba[i, j] @ (0.299, 0.587, 0.114, 0)
        style: dict[str, Any] = {"fontsize": size, "color": "#ffffff" if light < 0.55 else DARK}
        if sure is not None and sure[i, j]:
            style["fontweight"] = "bold"
        elif sure is not None:
            style |= {"fontsize": 0.82 * size} | ({"color": FAINT} if light > 0.85 else {})
        if np.isnan(values[i, j]):
            style["color"] = INK
        written = ax.text(j + 0.5, i + 0.5, whole(number), **style)
        written.set(ha="center", va="center_baseline", in_layout=False)


def scale(
    fig: Figure, colours: ScalarMappable, ticks: list[int], names: list[str], below: float = 0.4
) -> None:
    ax = fig.add_axes((0, -below, 2.4, 0.13))
    low, high = ticks[0], ticks[-1]
    steps = colours.to_rgba(np.linspace(low, high, 64)[None])
    ax.imshow(steps, interpolation="none", aspect="auto", extent=(low, high, 0, 1))
    ax.set_xticks(ticks, names)
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


# Figures


def accuracy_plots(table: Table, splits: Sequence[str], stem: str) -> list[str]:
    """Accuracy per relation before and after, from the rows of the analysis `accuracy`.

    One split fills the width; several stand side by side, with titles.
    """
    width, gap = (5.0, 0.0) if len(splits) == 1 else (1.55, 0.9)
    table = table._replace(
        rows=[row for split in splits for row in table.where("split", split).rows]
    )
    relations = list(dict.fromkeys(str(name) for name in table.column("relation")))
    high = ROW * len(relations) + 0.1
    marks = [
        mark("before", **BEFORE),
        mark("own neurons off", c=OFF),
        mark("its 95 % interval", c=OFF, alpha=0.35, lw=6, ls="-", marker=""),
    ]
    for kind, colour in (("random", RANDOM), ("matched", MUTED)):
        if np.isfinite(table.floats(kind)).any():
            name = f"{kind} neurons off, range and mean"
            marks.append(mark(name, c=colour, lw=5, ls="-", marker=""))
    plots = []
    for start in range(0, len(splits), PANELS_PER_FIGURE):
        with figure() as fig:
            for p, split in enumerate(splits[start : start + PANELS_PER_FIGURE]):
                left = p * (width + gap)
                ax = rows_axes(fig, relations, left=left, width=width, named=p == 0)
                _accuracy_panel(ax, table.where("split", split), relations)
                if len(splits) > 1:
                    title = split_title(split).replace(", ", ",\n")
                    ax.set_title(title, loc="left", fontsize=9, fontweight="bold", pad=16)
            legend(fig, marks, high + (0.75 if len(splits) > 1 else 0.4))
            plots.append(inline(fig, f"{stem}{start}", "Accuracy per relation before and after"))
    return plots


def _accuracy_panel(ax: Axes, table: Table, relations: Sequence[str]) -> None:
    y = np.array([relations.index(str(name)) for name in table.column("relation")], np.float64)
    before, own, low, high = (
        100 * table.floats(name) for name in ("before", "own", "own_low", "own_high")
    )
    ax.hlines(y, 0, 100, color=LINE, lw=0.6)
    drawn = {kind: 100 * table.floats(kind) for kind in ("random", "matched")}
    is_matched = bool(np.isfinite(drawn["matched"]).any())
    shift = {"random": -0.17 if is_matched else 0.0, "matched": 0.17}
    for (kind, mean), colour in zip(drawn.items(), (RANDOM, MUTED), strict=True):
        # A range of one value still shows as a mark one point of accuracy wide.
        least = np.fmin(100 * table.floats(f"{kind}_low"), mean - 0.5)
        most = np.fmax(100 * table.floats(f"{kind}_high"), mean + 0.5)
        place = y + shift[kind]
        ax.hlines(place, least, most, color=colour, lw=4 if is_matched else 7)
        ax.vlines(mean, place - 0.15, place + 0.15, color=INK, lw=1.1)
    ax.hlines(y, np.fmin(before, own), np.fmax(before, own), color=OFF, lw=1.1)
    ax.hlines(y, low, high, color=OFF, lw=6, alpha=0.35)
    ax.plot(before, y, "o", **BEFORE, ms=7, zorder=4, clip_on=False)
    ax.plot(own, y, "o", color=OFF, ms=6, zorder=5, clip_on=False)
    notes = [""] * len(relations)
    for place, b, a in zip(y.astype(int), before, own, strict=True):
        notes[place] = f"{whole(b)} → {whole(a)}"
    beside(ax, "before → off", notes)
    ax.set(xlim=(0, 100), xticks=range(0, 101, 25), xlabel="accuracy, %")


def drop_heatmap(table: Table) -> str:
    """Relative accuracy drop in %, colours centred at 0; own sets are framed, sure cells bold."""
    rows, columns, found = pivot(table, "relation", "off", "drop", "q_value", "own")
    colours = ScalarMappable(Normalize(-100, 100, clip=True), mpl.colormaps["RdBu_r"])
    with figure() as fig:
        ax = matrix(
            fig,
            rows,
            columns,
            100 * found["drop"],
            colours,
            framed=found["own"] == 1,
            sure=found["q_value"] <= SURE,
        )
        ax.set_xlabel("neurons switched off", loc="left", labelpad=8)
        ax.set_ylabel("relation asked", loc="top", labelpad=8)
        scale(fig, colours, [-100, 0, 100], ["≤ −100, gained", "0", "100, lost"])
        return inline(fig, "drop", "Accuracy drop of each relation under each set")


def overlap_heatmap(table: Table, row: str = "relation") -> str:
    """Neurons that two sets share; the diagonal (the sizes) stays out of the colours."""
    rows, columns, found = pivot(table, row, "other", "shared", "q_value")
    sizes = np.eye(len(rows), dtype=np.bool_)
    shared = found["shared"]
    values = np.where(sizes, np.nan, shared)
    top = max(1, int(shared[~sizes].max()))
    colours = ScalarMappable(Normalize(0, top), mpl.colormaps["Blues"])
    with figure() as fig:
        sure = found["q_value"] <= SURE
        matrix(fig, rows, columns, values, colours, numbers=shared, framed=sizes, sure=sure)
        scale(fig, colours, [0, top], ["0", f"{top:,} shared neurons"])
        return inline(fig, "overlap", "Neurons that two sets share")


def layers_plot(count: NDArray[np.int64], names: Sequence[str], sites: Sequence[str]) -> str:
    """Chosen neurons (R, S, L) per relation, site and layer, with the sum over relations on top."""
    n_rows, _, n_layers = count.shape
    width, high = 2.2, 0.24 * n_rows
    top, tallest = max(1, int(count.max())), max(1, int(count.sum(axis=0).max()))
    colours = ScalarMappable(Normalize(0, top), mpl.colormaps["Blues"])
    with figure() as fig:
        for s, site in enumerate(sites):
            x = s * (width + 0.22)
            bars = fig.add_axes((x, high + 0.1, width, 0.85))
            bars.bar(np.arange(n_layers) + 0.5, count[:, s].sum(axis=0), width=0.8, color=MUTED)
            bars.set(xlim=(0, n_layers), ylim=(0, 1.05 * tallest), xticks=[])
            bars.set_yticks([0, tallest], ["0", f"{tallest:,}"] if s == 0 else ["", ""])
            bars.tick_params(axis="y", labelsize=8, labelcolor=MUTED)
            bars.set_title(site, loc="left", fontsize=9.5, fontweight="bold")
            grid = fig.add_axes((x, 0, width, high))
            values = count[:, s].astype(float)
            cells(grid, values, colours, values if n_layers <= 8 else None, 7)
            layers = range(0, n_layers, -(-n_layers // 8))
            grid.set_xticks([layer + 0.5 for layer in layers], [str(layer) for layer in layers])
            grid.set_xlabel("layer")
            grid.set_yticks(np.arange(n_rows) + 0.5, map(short, names) if s == 0 else [""] * n_rows)
        scale(fig, colours, [0, top], ["0", f"{top:,} chosen neurons"], below=0.75)
        return inline(fig, "layers", "Chosen neurons by relation, site and layer")
