"""Draws the report's figures as inline SVG; called by report.py only.

Text stays text, so any script can be read and searched, and the theme's colours are CSS variables:
the page decides how they look in dark mode and in print. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from relneuron.results import Array, Result

# Placeholder colours: _inline turns each into the page's variable of that name.
THEME = ("ink", "muted", "paper", "soft", "line", "off", "random")
INK, MUTED, PAPER, SOFT, LINE, OFF, RANDOM = (f"#01020{i}" for i in range(len(THEME)))
DARK = "#15181c"  # on coloured cells, which the theme leaves alone
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
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
# Panels side by side: three fit the width of a printed page.
PANELS_PER_FIGURE = 3


def accuracy_plots(
    results: Sequence[Result], labels: Sequence[str], titles: Sequence[str], stem: str
) -> list[str]:
    """Accuracy per relation before and after; several splits stand side by side, with titles."""
    width, gap = (5.0, 0.0) if len(results) == 1 else (1.55, 0.9)
    high = 0.3 * len(labels) + 0.1
    marks = [
        Line2D([], [], ls="none", ms=7, marker="o", mfc=PAPER, mec=INK, mew=1.4, label="before"),
        Line2D([], [], ls="none", ms=7, marker="o", c=OFF, label="own neurons off"),
        Line2D([], [], color=RANDOM, lw=7, label="random neurons off, range and mean"),
    ]
    plots = []
    for start in range(0, len(results), PANELS_PER_FIGURE):
        with _figure() as fig:
            for p, result in enumerate(results[start : start + PANELS_PER_FIGURE]):
                ax = fig.add_axes((p * (width + gap), 0, width, high))
                _accuracy_panel(ax, result)
                names = [_short(name) if p == 0 else "" for name in labels]
                ax.set_yticks(range(len(names)), names)
                title = titles[start + p].replace(", ", ",\n")
                ax.set_title(title, loc="left", fontsize=9, fontweight="bold", pad=16)
            fig.legend(
                handles=marks[: 3 if result.random.size else 2],
                loc="lower left",
                bbox_to_anchor=(0, high + (0.75 if titles[start] else 0.4)),
                ncols=3,
                frameon=False,
                borderpad=0,
                borderaxespad=0,
            )
            plots.append(_inline(fig, f"{stem}{start}", "Accuracy per relation before and after"))
    return plots


def _accuracy_panel(ax: Axes, result: Result) -> None:
    y = np.arange(len(result.relations), dtype=np.float64)
    before, after, random = 100 * result.before, 100 * result.after, 100 * result.random
    ax.hlines(y, 0, 100, color=LINE, lw=0.6)
    if random.size:
        mean = random.mean(1)
        # A range of one value still shows as a mark one point of accuracy wide.
        low, high = np.fmin(random.min(1), mean - 0.5), np.fmax(random.max(1), mean + 0.5)
        ax.hlines(y, low, high, color=RANDOM, lw=7)
        ax.vlines(mean, y - 0.17, y + 0.17, color=INK, lw=1.1)
    ax.hlines(y, np.fmin(before, after), np.fmax(before, after), color=OFF, lw=1.4)
    ax.plot(before, y, "o", mfc=PAPER, mec=INK, mew=1.4, ms=7, zorder=4, clip_on=False)
    ax.plot(after, y, "o", color=OFF, ms=6, zorder=5, clip_on=False)
    # The figure is one inch wide, so this is 0.14 inches right of the axis.
    x = 1 + 0.14 / ax.get_position().width
    notes = [f"{_whole(b)} → {_whole(a)}" for b, a in zip(before, after, strict=True)]
    for place, note in zip([-0.9, *y], ["before → off", *notes], strict=True):
        ax.text(x, place, note, va="center", fontsize=8.5, transform=ax.get_yaxis_transform())
    ax.set(xlim=(0, 100), ylim=(len(y) - 0.4, -0.6), xticks=range(0, 101, 25), xlabel="accuracy, %")
    ax.tick_params(axis="y", pad=8)


def drop_heatmap(result: Result, rows: Sequence[str], columns: Sequence[str]) -> str:
    """Relative accuracy drop (R, C) in %, colours centred at 0; own sets are framed."""
    drop = 100 * result.drop
    colours = ScalarMappable(Normalize(-100, 100, clip=True), mpl.colormaps["RdBu_r"])
    with _figure() as fig:
        ax = _matrix(fig, rows, columns, drop, drop, colours, result.own)
        ax.set_xlabel("neurons switched off", loc="left", labelpad=8)
        ax.set_ylabel("relation asked", loc="top", labelpad=8)
        _scale(fig, colours, [-100, 0, 100], ["≤ −100, gained", "0", "100, lost"])
        return _inline(fig, "drop", "Accuracy drop of each relation under each set")


def overlap_heatmap(shared: NDArray[np.int64], labels: Sequence[str]) -> str:
    """Neurons that two sets share (R, R); the diagonal (the sizes) stays out of the colours."""
    sizes = np.eye(len(labels), dtype=np.bool_)
    values = np.where(sizes, np.nan, shared)
    top = max(1, int(shared[~sizes].max()))
    colours = ScalarMappable(Normalize(0, top), mpl.colormaps["Blues"])
    with _figure() as fig:
        _matrix(fig, labels, labels, values, shared.astype(float), colours, sizes)
        _scale(fig, colours, [0, top], ["0", f"{top:,} shared neurons"])
        return _inline(fig, "overlap", "Neurons that two sets share")


def _matrix(
    fig: Figure,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Array,
    numbers: Array,
    colours: ScalarMappable,
    framed: NDArray[np.bool_],
) -> Axes:
    cell, size = (0.46, 8.5) if max(values.shape) <= 20 else (0.34, 6.5)
    ax = fig.add_axes((0, 0, cell * len(columns), cell * len(rows)))
    _cells(ax, values, colours, numbers, size)
    for i, j in np.argwhere(framed):
        ink = INK if np.isnan(values[i, j]) else DARK
        ax.add_patch(Rectangle((j + 0.04, i + 0.04), 0.92, 0.92, fill=False, ec=ink, lw=1.3))
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.set_xticks(
        np.arange(len(columns)) + 0.5,
        [_short(column) for column in columns],
        rotation=45,
        ha="left",
        rotation_mode="anchor",
        color=INK,
    )
    ax.set_yticks(np.arange(len(rows)) + 0.5, [_short(row) for row in rows])
    return ax


def layers_plot(count: NDArray[np.int64], labels: Sequence[str], sites: Sequence[str]) -> str:
    """Chosen neurons (R, S, L) per relation, site and layer, with the sum over relations on top."""
    n_rows, _, n_layers = count.shape
    width, high = 2.2, 0.24 * n_rows
    top, tallest = max(1, int(count.max())), max(1, int(count.sum(axis=0).max()))
    colours = ScalarMappable(Normalize(0, top), mpl.colormaps["Blues"])
    with _figure() as fig:
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
            _cells(grid, values, colours, values if n_layers <= 8 else None, 7)
            layers = range(0, n_layers, -(-n_layers // 8))
            grid.set_xticks([layer + 0.5 for layer in layers], [str(layer) for layer in layers])
            grid.set_xlabel("layer")
            grid.set_yticks(
                np.arange(n_rows) + 0.5, map(_short, labels) if s == 0 else [""] * n_rows
            )
        _scale(fig, colours, [0, top], ["0", f"{top:,} chosen neurons"], below=0.75)
        return _inline(fig, "layers", "Chosen neurons by relation, site and layer")


def _cells(
    ax: Axes, values: Array, colours: ScalarMappable, numbers: Array | None, size: float
) -> None:
    """A matrix as one small image with lines between the cells, and the numbers on top."""
    n_rows, n_columns = values.shape
    rgba = colours.to_rgba(values)
    ax.set_facecolor(SOFT)
    ax.imshow(rgba, interpolation="none", aspect="auto", extent=(0, n_columns, n_rows, 0))
    ax.hlines(range(n_rows + 1), 0, n_columns, color=PAPER, lw=0.8)
    ax.vlines(range(n_columns + 1), 0, n_rows, color=PAPER, lw=0.8)
    ax.spines[:].set_visible(False)
    for (i, j), number in np.ndenumerate(np.empty((0, 0)) if numbers is None else numbers):
        is_dark = rgba[i, j] @ (0.299, 0.587, 0.114, 0) < 0.55
        ink = INK if np.isnan(values[i, j]) else "#ffffff" if is_dark else DARK
        written = ax.text(j + 0.5, i + 0.5, _whole(number), fontsize=size, color=ink)
        written.set(ha="center", va="center_baseline", in_layout=False)


def _scale(
    fig: Figure, colours: ScalarMappable, ticks: list[int], names: list[str], below: float = 0.4
) -> None:
    ax = fig.add_axes((0, -below, 2.4, 0.13))
    low, high = ticks[0], ticks[-1]
    steps = colours.to_rgba(np.linspace(low, high, 64)[None])
    ax.imshow(steps, interpolation="none", aspect="auto", extent=(low, high, 0, 1))
    ax.set_xticks(ticks, names)
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


@contextmanager
def _figure() -> Iterator[Figure]:
    """A figure of one inch, so that axes are placed in inches; saving fits it to what is drawn."""
    # Starting from the library's defaults keeps a user's own matplotlibrc out of the bytes.
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)
        # The browser chooses the font of each label, so a glyph that DejaVu lacks is no fault.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield Figure(figsize=(1, 1))


def _inline(fig: Figure, stem: str, alt: str) -> str:
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


def _whole(value: float) -> str:
    return f"{round(value):,}".replace("-", "−") if np.isfinite(value) else "–"


def _short(label: str) -> str:
    # Long names often differ only at the end, so the middle goes.
    return label if len(label) <= 34 else f"{label[:17]}…{label[-16:]}"
