"""Draws the figures of a corpus study: entropies, layers, overlaps, and what a mask costs in nats.

methods/counts/page.py calls it; report/kit.py has the theme and the parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from relneuron.analyses.figures import OTHERS
from relneuron.report import kit
from relneuron.report.tables import Table

# Columns of a histogram, what they count, and their colour; each is a part of the one before.
PARTS = {
    "neurons": ("all neurons", kit.RANDOM),
    "candidates": ("above the threshold in a group", kit.MUTED),
    "chosen": ("chosen", kit.OFF),
}
WIDE = 6.2  # inches: fits the page


def signed(value: float, digits: int = 3) -> str:
    """A rise with its sign."""
    if not math.isfinite(value):
        return "–"
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def histogram_plot(table: Table, marks: Sequence[tuple[float, str]], title: str) -> kit.Drawing:
    """Neurons by entropy (or another score) on a log axis; `marks` are named lines."""
    low, high = table.floats("from"), table.floats("to")
    edges = np.append(low, high[-1])
    parts = [name for name in PARTS if name in table.columns]
    with kit.figure() as fig:
        ax = fig.add_axes((0, 0, WIDE, 2.1))
        most = 1.0
        for name in parts:
            n = table.floats(name)
            most = max(most, n.max())
            # The logarithm has no place for 0: an empty bin ends below the axis.
            ax.stairs(np.fmax(n, 0.01), edges, baseline=0.01, fill=True, color=PARTS[name][1])
        ax.set(yscale="log", ylim=(0.6, 1.6 * most), xlim=(edges[0], edges[-1]), xlabel=title)
        ticks = [10**k for k in range(int(math.log10(most)) + 1)]
        ax.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.set_yticks([], minor=True)
        ax.tick_params(axis="y", labelcolor=kit.MUTED)
        ax.grid(axis="y", color=kit.LINE, lw=0.6)
        ax.set_axisbelow(True)
        ax.set_title("neurons", loc="left", fontsize=8.5, color=kit.MUTED)
        for place, (x, text) in enumerate(marks):
            ax.axvline(x, color=kit.INK, lw=1.1, ls=(0, (4, 2)), clip_on=False)
            # Names stand above the axes, each in a line of its own, on the side that has room.
            side = "right" if x > edges.mean() else "left"
            where = ax.get_xaxis_transform()
            ax.text(x, 1.03 + 0.09 * place, text, ha=side, fontsize=8.5, transform=where)
        kit.legend(
            fig,
            [Patch(color=PARTS[n][1], label=PARTS[n][0]) for n in parts],
            2.3 + 0.19 * len(marks),
        )
        return kit.inline(fig, "histogram", "Number of neurons by score", table)


def group_layers_plot(
    count: NDArray[np.int64],
    distinct: NDArray[np.int64],
    names: list[str],
    layer_names: list[str],
) -> kit.Drawing:
    """Chosen neurons (G, L) by group and layer, above them each neuron once, (L,)."""
    n_rows, n_layers = count.shape
    wide = float(np.clip(WIDE / n_layers, 0.09, 0.4))
    width, high = wide * n_layers, min(0.24 * n_rows, kit.BROAD)
    step, is_large = kit.every(n_rows), n_rows > kit.MOST
    top, tallest = max(1, int(count.max())), max(1, int(distinct.max()))
    # Layers differ by a factor of a hundred; the root keeps small numbers apart.
    colours = ScalarMappable(PowerNorm(0.5, 0, top), mpl.colormaps["Blues"])
    with kit.figure() as fig:
        bars = fig.add_axes((0, high + 0.1, width, 0.85))
        bars.bar(np.arange(n_layers) + 0.5, distinct, width=0.8, color=kit.MUTED)
        bars.set(xlim=(0, n_layers), ylim=(0, 1.05 * tallest), xticks=[])
        bars.set_yticks([0, tallest], ["0", f"{tallest:,}"])
        bars.tick_params(axis="y", labelsize=8, labelcolor=kit.MUTED)
        grid = fig.add_axes((0, 0, width, high))
        values = count.astype(np.float64)
        has_room = wide >= 0.3 and top < 10_000 and not is_large
        kit.cells(grid, values, colours, values if has_room else None, 7)
        layers = range(0, n_layers, -(-n_layers // 16))
        is_long = max(map(len, layer_names)) > 3
        grid.set_xticks(
            [layer + 0.5 for layer in layers],
            [layer_names[layer] for layer in layers],
            rotation=90 if is_long else 0,
        )
        grid.set_xlabel("layer")
        grid.set_yticks(np.arange(0, n_rows, step) + 0.5, [kit.short(n) for n in names[::step]])
        kit.scale(fig, colours, [0, top], ["0", f"{top:,} chosen neurons"], below=0.75)
        return kit.inline(fig, "layers", "Chosen neurons by group and layer")


def jaccard_heatmap(table: Table) -> kit.Drawing:
    """Shared neurons in % of those in either set; no cell for a set with itself."""
    rows, columns, found = kit.pivot(table, "group", "other", "jaccard")
    values = np.where(np.eye(len(rows), dtype=np.bool_), np.nan, 100 * found["jaccard"])
    top = max(1.0, float(np.nanmax(values))) if np.isfinite(values).any() else 1.0
    colours = ScalarMappable(Normalize(0, top), mpl.colormaps["Blues"])
    with kit.figure() as fig:
        kit.matrix(fig, rows, columns, values, colours)
        kit.scale(fig, colours, [0, math.ceil(top)], ["0", f"{math.ceil(top)} % of both"])
        return kit.inline(fig, "jaccard", "Share of the neurons of two sets that both have", table)


def rises_plot(table: Table) -> kit.Drawing:
    """For each set: the rise of its own group's NLL, and those of the other groups."""
    names = [str(name) for name in table.column("set")]
    own, error, other, low, high = (
        table.floats(name) for name in ("own", "own_se", "others", "others_low", "others_high")
    )
    y = np.arange(len(names))
    least, most = kit.ends(
        own - 2 * np.nan_to_num(error), own + 2 * np.nan_to_num(error), low, high, 0
    )
    room = 0.03 * (most - least or 1)
    limits = least - room, most + room
    with kit.figure() as fig:
        ax = kit.rows_axes(fig, names)
        ax.set(xlim=limits, xlabel="rise of the NLL, nats per token")
        ax.hlines(y, *limits, color=kit.LINE, lw=0.6)
        ax.axvline(0, color=kit.MUTED, lw=0.8)
        ax.hlines(y, low, high, color=kit.RANDOM, lw=5)
        ax.plot(other, y, **OTHERS)
        ax.hlines(y, own - 2 * error, own + 2 * error, color=kit.OFF, lw=6, alpha=0.35)
        ax.plot(own, y, "o", color=kit.OFF, ms=6)
        notes = [f"{signed(a)} / {signed(b)}" for a, b in zip(own, other, strict=True)]
        kit.beside(ax, "own / others", notes)
        marks = [kit.mark("its own text, ± 2 standard errors", c=kit.OFF)]
        marks += [kit.mark("mean of the others", **OTHERS)]
        marks.append(kit.mark("their range", c=kit.RANDOM, lw=5, ls="-", marker=""))
        kit.legend(fig, marks, kit.ROW * len(names) + 0.4)
        return kit.inline(
            fig, "rises", "Rise of the NLL of a set's own text and of the others", table
        )


def rise_heatmap(table: Table, sure: float) -> kit.Drawing:
    """The rise of every text (columns) under every mask (rows), in nats; bold where q <= sure."""
    rows, columns, found = kit.pivot(table, "mask", "group", "rise", "rise_se", "q_value")
    values, q = found["rise"], found["q_value"]
    top = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    top = top or 1.0
    colours = ScalarMappable(Normalize(-top, top), mpl.colormaps["RdBu_r"])
    n = max(values.shape)
    # Width and height in inches, points, decimals; only large cells have room for the error.
    wide, high, size, digits = (
        (0.72, 0.46, 8.5, 3) if n <= 12 else (0.5, 0.32, 7, 2) if n <= 20 else (0.42, 0.3, 6, 2)
    )
    if is_large := n > kit.MOST:
        wide = high = max(kit.BROAD / n, 0.02)
    with kit.figure() as fig:
        ax = fig.add_axes((0, 0, wide * len(columns), high * len(rows)), label=kit.SQUARE)
        kit.cells(ax, values, colours, None, size)
        if is_large and wide >= kit.HATCHED:
            kit.hatch(ax, values < 0)
        rgba = colours.to_rgba(values)
        for (i, j), value in np.ndenumerate(np.empty((0, 0)) if is_large else values):
            texts = [signed(value, digits)]
            if n <= 12 and np.isfinite(found["rise_se"][i, j]):
                texts.append(f"±{found['rise_se'][i, j]:.{digits}f}")
            is_sure = bool(q[i, j] <= sure or np.isnan(q).all())
            _write(ax, (i, j), texts, size, rgba[i, j], is_sure)
            if rows[i] == columns[j]:
                box = Rectangle((j + 0.03, i + 0.04), 0.94, 0.92, fill=False, ec=kit.DARK, lw=1.3)
                ax.add_patch(box)
        kit.name_axes(ax, rows, columns, kit.every(n))
        ax.set_xlabel("text", loc="left", labelpad=8)
        ax.set_ylabel("neurons switched off", loc="top", labelpad=8)
        even = ScalarMappable(Normalize(-1, 1), colours.cmap)
        kit.scale(fig, even, [-1, 0, 1], [signed(-top), "0", f"{signed(top)} nats"])
        return kit.inline(fig, "nll", "Rise of the NLL of each text under each mask", table)


def _write(
    ax: Axes,
    place: tuple[int, int],
    texts: Sequence[str],
    size: float,
    colour: Any,
    is_sure: bool,
) -> None:
    """A rise and, in a line below it, its standard error."""
    light = np.asarray(colour) @ (0.299, 0.587, 0.114, 0)
    ink = kit.INK if texts[0] == signed(math.nan) else kit.LIGHT if light < 0.55 else kit.DARK
    style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "in_layout": False}
    rise = {"fontsize": size, "fontweight": "bold"} if is_sure else {"fontsize": 0.85 * size}
    error = {"fontsize": 0.76 * size, "color": kit.FAINT if light > 0.85 else ink}
    x, y = place[1] + 0.5, place[0] + (0.34 if len(texts) > 1 else 0.5)
    ax.text(x, y, texts[0], gid=kit.CELL, **style | {"color": ink} | rise)
    for text in texts[1:]:
        ax.text(x, y + 0.4, text, gid=kit.ERROR, **style | error)
