"""Draws the figures of the main sections; pages call it, kit.py has the theme and the parts."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from relneuron.report import kit
from relneuron.report.tables import Table, split_title

# Panels side by side: three fit the width of a printed page.
PANELS_PER_FIGURE = 3
MOST_NAMES = 100  # rows of a picture that have a name each, where its page scrolls past them


def accuracy_plots(table: Table, splits: Sequence[str], stem: str) -> list[kit.Drawing]:
    """Accuracy per relation before and after, from the rows of the analysis `accuracy`.

    One split fills the width; several stand side by side, with titles.
    """
    width, gap = (5.0, 0.0) if len(splits) == 1 else (1.55, 0.9)
    table = table._replace(
        rows=[row for split in splits for row in table.where("split", split).rows]
    )
    relations = list(dict.fromkeys(str(name) for name in table.column("relation")))
    high = kit.ROW * len(relations) + 0.1
    marks = [
        kit.mark("before", **kit.BEFORE),
        kit.mark("own neurons off", c=kit.OFF),
        kit.mark("its 95 % interval", c=kit.OFF, alpha=0.35, lw=6, ls="-", marker=""),
    ]
    for kind, colour in (("random", kit.RANDOM), ("matched", kit.MUTED)):
        if np.isfinite(table.floats(kind)).any():
            name = f"{kind} neurons off, range and mean"
            marks.append(kit.mark(name, c=colour, lw=5, ls="-", marker=""))
    plots = []
    for start in range(0, len(splits), PANELS_PER_FIGURE):
        with kit.figure() as fig:
            for p, split in enumerate(splits[start : start + PANELS_PER_FIGURE]):
                left = p * (width + gap)
                ax = kit.rows_axes(fig, relations, left=left, width=width, named=p == 0)
                _accuracy_panel(ax, table.where("split", split), relations)
                if len(splits) > 1:
                    title = split_title(split).replace(", ", ",\n")
                    ax.set_title(title, loc="left", fontsize=9, fontweight="bold", pad=16)
            kit.legend(fig, marks, high + (0.75 if len(splits) > 1 else 0.4))
            plots.append(
                kit.inline(fig, f"{stem}{start}", "Accuracy per relation before and after", table)
            )
    return plots


def _accuracy_panel(ax: Axes, table: Table, relations: Sequence[str]) -> None:
    y = np.array([relations.index(str(name)) for name in table.column("relation")], np.float64)
    before, own, low, high = (
        100 * table.floats(name) for name in ("before", "own", "own_low", "own_high")
    )
    ax.hlines(y, 0, 100, color=kit.LINE, lw=0.6)
    drawn = {kind: 100 * table.floats(kind) for kind in ("random", "matched")}
    is_matched = bool(np.isfinite(drawn["matched"]).any())
    shift = {"random": -0.17 if is_matched else 0.0, "matched": 0.17}
    for (kind, mean), colour in zip(drawn.items(), (kit.RANDOM, kit.MUTED), strict=True):
        # A range of one value still shows as a mark one point of accuracy wide.
        least = np.fmin(100 * table.floats(f"{kind}_low"), mean - 0.5)
        most = np.fmax(100 * table.floats(f"{kind}_high"), mean + 0.5)
        place = y + shift[kind]
        ax.hlines(place, least, most, color=colour, lw=4 if is_matched else 7)
        ax.vlines(mean, place - 0.15, place + 0.15, color=kit.INK, lw=1.1)
    ax.hlines(y, np.fmin(before, own), np.fmax(before, own), color=kit.OFF, lw=1.1)
    ax.hlines(y, low, high, color=kit.OFF, lw=6, alpha=0.35)
    ax.plot(before, y, "o", **kit.BEFORE, ms=7, zorder=4, clip_on=False)
    ax.plot(own, y, "o", color=kit.OFF, ms=6, zorder=5, clip_on=False)
    notes = [""] * len(relations)
    for place, b, a in zip(y.astype(int), before, own, strict=True):
        notes[place] = f"{kit.whole(b)} → {kit.whole(a)}"
    kit.beside(ax, "before → off", notes)
    ax.set(xlim=(0, 100), xticks=range(0, 101, 25), xlabel="accuracy, %")


def drop_heatmap(table: Table) -> kit.Drawing:
    """Relative accuracy drop in %, colours centred at 0; own sets are framed, sure cells bold."""
    rows, columns, found = kit.pivot(table, "relation", "off", "drop", "q_value", "own")
    colours = ScalarMappable(Normalize(-100, 100, clip=True), mpl.colormaps["RdBu_r"])
    with kit.figure() as fig:
        ax = kit.matrix(
            fig,
            rows,
            columns,
            100 * found["drop"],
            colours,
            framed=found["own"] == 1,
            sure=found["q_value"] <= kit.SURE,
        )
        ax.set_xlabel("neurons switched off", loc="left", labelpad=8)
        ax.set_ylabel("relation asked", loc="top", labelpad=8)
        kit.scale(fig, colours, [-100, 0, 100], ["≤ −100, gained", "0", "100, lost"])
        return kit.inline(fig, "drop", "Accuracy drop of each relation under each set", table)


def overlap_heatmap(table: Table, row: str = "relation") -> kit.Drawing:
    """Neurons that two sets share; the diagonal (the sizes) stays out of the colours."""
    rows, columns, found = kit.pivot(table, row, "other", "shared", "q_value")
    sizes = np.eye(len(rows), dtype=np.bool_)
    shared = found["shared"]
    values = np.where(sizes, np.nan, shared)
    top = max(1, int(shared[~sizes].max()))
    colours = ScalarMappable(Normalize(0, top), mpl.colormaps["Blues"])
    with kit.figure() as fig:
        sure = found["q_value"] <= kit.SURE
        kit.matrix(fig, rows, columns, values, colours, numbers=shared, framed=sizes, sure=sure)
        kit.scale(fig, colours, [0, top], ["0", f"{top:,} shared neurons"])
        return kit.inline(fig, "overlap", "Neurons that two sets share", table)


def layers_plot(
    count: NDArray[np.int64], names: Sequence[str], sites: Sequence[str]
) -> kit.Drawing:
    """Chosen neurons (R, S, L) per relation, site and layer, with the sum over relations on top."""
    n_rows, _, n_layers = count.shape
    # Of so many rows there is room for some names.
    step = kit.every(n_rows) if n_rows > MOST_NAMES else 1
    width, high = 2.2, 0.24 * n_rows if step == 1 else kit.BROAD
    top, tallest = max(1, int(count.max())), max(1, int(count.sum(axis=0).max()))
    colours = ScalarMappable(Normalize(0, top), mpl.colormaps["Blues"])
    with kit.figure() as fig:
        for s, site in enumerate(sites):
            x = s * (width + 0.22)
            bars = fig.add_axes((x, high + 0.1, width, 0.85))
            bars.bar(np.arange(n_layers) + 0.5, count[:, s].sum(axis=0), width=0.8, color=kit.MUTED)
            bars.set(xlim=(0, n_layers), ylim=(0, 1.05 * tallest), xticks=[])
            bars.set_yticks([0, tallest], ["0", f"{tallest:,}"] if s == 0 else ["", ""])
            bars.tick_params(axis="y", labelsize=8, labelcolor=kit.MUTED)
            bars.set_title(site, loc="left", fontsize=9.5, fontweight="bold")
            grid = fig.add_axes((x, 0, width, high))
            values = count[:, s].astype(float)
            kit.cells(grid, values, colours, values if n_layers <= 8 and step == 1 else None, 7)
            layers = range(0, n_layers, -(-n_layers // 8))
            grid.set_xticks([layer + 0.5 for layer in layers], [str(layer) for layer in layers])
            grid.set_xlabel("layer")
            shown = [kit.short(name) if s == 0 else "" for name in names[::step]]
            grid.set_yticks(np.arange(0, n_rows, step) + 0.5, shown)
        kit.scale(fig, colours, [0, top], ["0", f"{top:,} chosen neurons"], below=0.75)
        return kit.inline(fig, "layers", "Chosen neurons by relation, site and layer")
