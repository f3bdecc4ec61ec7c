"""Draws the figures of knowledge attribution: what raises an answer, and what it costs to lose it.

methods/gains/page.py calls it; report/kit.py has the theme and the parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from relneuron.report import kit
from relneuron.report.tables import Array, Table, percent

WIDE = 6.2  # inches: fits the page


def signed(value: float) -> str:
    """A number of nats with two digits, for the end of a scale."""
    return f"{value:.2g}".replace("-", "−")


def _nats_colours(values: Sequence[Array]) -> tuple[ScalarMappable, float]:
    """Colours centred at 0, and the largest size of a value."""
    top = max((float(np.abs(some).max()) for some in values if some.size), default=0.0) or 1.0
    return ScalarMappable(Normalize(-top, top), mpl.colormaps["RdBu_r"]), top


def _nats_scale(fig: Figure, top: float, below: float = 0.75) -> None:
    even = ScalarMappable(Normalize(-1, 1), mpl.colormaps["RdBu_r"])
    names = [f"−{signed(top)}", "0", f"{signed(top)} nats"]
    kit.scale(fig, even, [-1, 0, 1], names, below=below)


def _bar_ticks(ax: Axes, low: float, up: float, *, named: bool = True) -> None:
    """0 and the ends of what bars show, without an end whose name would touch that of 0."""
    ticks = [tick for tick in (low, up) if abs(tick) > 0.15 * (up - low)]
    ticks = sorted([0.0, *ticks])
    room = 0.06 * (up - low or 1)
    ax.set_ylim(low - room, up + room)
    ax.set_yticks(ticks, [signed(tick) if named else "" for tick in ticks])
    ax.tick_params(axis="y", labelsize=8, labelcolor=kit.MUTED)
    ax.axhline(0, color=kit.MUTED, lw=0.6)
    ax.spines["bottom"].set_visible(False)


def _layer_ticks(ax: Axes, n_layers: int, shift: float, most: int = 12) -> None:
    layers = range(0, n_layers, -(-n_layers // most))
    ax.set_xticks([layer + shift for layer in layers], [str(layer) for layer in layers])


def layer_scores_plot(by_kind: dict[str, Array], weights: Array, names: list[str]) -> kit.Drawing:
    """Mean scores (R, L) by relation and layer, above them the mean over all sentences (L,).

    `by_kind`: the scores by the title of their panel; `weights`: sentences of each relation, (R,).
    """
    n_rows, n_layers = next(iter(by_kind.values())).shape
    width, high = 2.9, 0.24 * n_rows
    colours, top = _nats_colours([*by_kind.values()])
    over_all = {title: weights @ values / weights.sum() for title, values in by_kind.items()}
    low, up = kit.ends(0.0, *over_all.values())
    with kit.figure() as fig:
        for place, (title, values) in enumerate(by_kind.items()):
            x = place * (width + 0.3)
            bars = fig.add_axes((x, high + 0.12, width, 1.1))
            bars.bar(np.arange(n_layers) + 0.5, over_all[title], width=0.8, color=kit.MUTED)
            bars.set(xlim=(0, n_layers), xticks=[])
            _bar_ticks(bars, low, up, named=place == 0)
            bars.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
            grid = fig.add_axes((x, 0, width, high))
            kit.cells(grid, values, colours, None, 7)
            kit.hatch(grid, values < 0)
            _layer_ticks(grid, n_layers, 0.5)
            grid.set_xlabel("layer")
            rows = map(kit.short, names) if place == 0 else [""] * n_rows
            grid.set_yticks(np.arange(n_rows) + 0.5, rows)
        _nats_scale(fig, top)
        return kit.inline(fig, "layers", "Scores of attention and FFN layers by relation")


def heads_plot(values: Array) -> kit.Drawing:
    """Mean scores (L, H) of all heads."""
    n_layers, n_heads = values.shape
    wide, high = (float(np.clip(w / n, 0.1, 0.4)) for w, n in ((WIDE, n_heads), (4.0, n_layers)))
    colours, top = _nats_colours([values])
    with kit.figure() as fig:
        ax = fig.add_axes((0, 0, wide * n_heads, high * n_layers))
        kit.cells(ax, values, colours, None, 7)
        kit.hatch(ax, values < 0)
        _layer_ticks(ax, n_heads, 0.5, 16)
        layers = range(0, n_layers, -(-n_layers // 16))
        ax.set_yticks([layer + 0.5 for layer in layers], [str(layer) for layer in layers])
        ax.set(xlabel="head", ylabel="layer")
        _nats_scale(fig, top)
        return kit.inline(fig, "heads", "Scores of all heads, mean over sentences")


def top_layers_plot(table: Table, titles: dict[str, str]) -> kit.Drawing:
    """Where value and query neurons are: mean number of a sentence's top neurons by layer."""
    kinds = [name for name in titles if name in table.columns]
    layer = table.floats("layer")
    high, gap = 0.9, 0.42
    with kit.figure() as fig:
        for place, kind in enumerate(kinds):
            n = table.floats(kind)
            ax = fig.add_axes((0, (len(kinds) - 1 - place) * (high + gap), 5.4, high))
            ax.bar(layer, n, width=0.8, color=kit.OFF if kind.startswith("query") else kit.MUTED)
            top = max(1e-9, float(n.max()))
            ax.set(xlim=(-0.6, len(layer) - 0.4), ylim=(0, 1.05 * top))
            ax.set_yticks([0, top], ["0", f"{top:.3g}"])
            ax.tick_params(axis="y", labelsize=8, labelcolor=kit.MUTED)
            _layer_ticks(ax, len(layer), 0)
            ax.set_title(titles[kind], loc="left", fontsize=9, fontweight="bold")
        ax.set_xlabel("layer")
        return kit.inline(fig, "toplayers", "Value and query neurons of a sentence by layer", table)


PARTS = {
    "value_only": ("value only", kit.MUTED),
    "query_value": ("both", kit.INK),
    "query_only": ("query only", kit.OFF),
}


def value_query_plot(table: Table) -> kit.Drawing:
    """Of a sentence's top FFN neurons: value only, both, query only; means by relation."""
    names = [str(name) for name in table.column("relation")]
    y, left = np.arange(len(names)), np.zeros(len(names))
    with kit.figure() as fig:
        ax = kit.rows_axes(fig, names, width=4.2)
        for column, (_, colour) in PARTS.items():
            n = table.floats(column)
            ax.barh(y, n, height=0.55, left=left, color=colour)
            left = left + n
        ax.set(xlim=(0, max(1e-9, left.max())), xlabel="FFN neurons of a sentence")
        ax.locator_params(axis="x", nbins=5)
        notes = [percent(x) for x in table.column("share")]  # type: ignore[arg-type]
        kit.beside(ax, "value neurons in both", notes)
        marks = [Patch(color=colour, label=title) for title, colour in PARTS.values()]
        kit.legend(fig, marks, kit.ROW * len(names) + 0.4)
        return kit.inline(
            fig, "valuequery", "FFN neurons that are value neurons, query neurons, both", table
        )


def query_layers_plot(table: Table) -> kit.Drawing:
    """Query scores of the residual stream's components, on the axis of their layers."""
    layer, score = table.floats("layer"), table.floats("score")
    kinds = np.array([str(name)[0] for name in table.column("component")])
    colours = {"h": (kit.INK, "embedding"), "A": (kit.MUTED, "attention"), "F": (kit.OFF, "FFN")}
    with kit.figure() as fig:
        ax = fig.add_axes((0, 0, 5.4, 1.3))
        for kind, (colour, _) in colours.items():
            ax.bar(layer[kinds == kind], score[kinds == kind], width=0.42, color=colour)
        ax.set(xlim=(-0.9, layer.max() + 0.4), xlabel="layer")
        _bar_ticks(ax, *kit.ends(0.0, score))
        _layer_ticks(ax, int(layer.max()) + 1, 0)
        ax.set_title("query score", loc="left", fontsize=8.5, color=kit.MUTED)
        kit.legend(fig, [Patch(color=c, label=title) for c, title in colours.values()], 1.6)
        return kit.inline(
            fig, "querylayers", "Query scores of embedding, attention and FFN layers", table
        )


def effects_plot(table: Table, stem: str) -> kit.Drawing:
    """What conditions do to the answer: the drop of MRR and of its probability, one row each."""
    names = [str(name) for name in table.column("off")]
    is_random = table.floats("is_random") > 0
    panels = {"mrr_drop": "reciprocal rank lost, %", "prob_drop": "probability lost, %"}
    y = np.arange(len(names))
    with kit.figure() as fig:
        for place, (column, title) in enumerate(panels.items()):
            drop, low, high = (
                100 * table.floats(f"{column}{end}") for end in ("", "_low", "_high")
            )
            least, most = kit.ends(0.0, 100.0, drop, np.fmax(low, -100.0))
            ax = kit.rows_axes(fig, names, left=place * 2.75, width=1.9, named=place == 0)
            ax.hlines(y, least, most, color=kit.LINE, lw=0.6)
            ax.axvline(0, color=kit.MUTED, lw=0.8)
            for rows, colour in ((is_random, kit.RANDOM), (~is_random, kit.OFF)):
                ax.hlines(
                    y[rows], np.fmax(low, least)[rows], high[rows], color=colour, lw=6, alpha=0.35
                )
                ax.plot(drop[rows], y[rows], "o", color=colour, ms=6, clip_on=False)
            ax.set(xlim=(least, most), xticks=(0, 50, 100), xlabel=title)
            kit.beside(ax, "", [kit.whole(x) for x in drop])
        marks = [kit.mark("mean", c=kit.OFF), kit.mark("mean, random neurons", c=kit.RANDOM)]
        marks.append(
            kit.mark(
                "95 % interval, or range of seeds", c=kit.OFF, alpha=0.35, lw=6, ls="-", marker=""
            )
        )
        kit.legend(
            fig, marks if is_random.any() else [marks[0], marks[2]], kit.ROW * len(names) + 0.3
        )
        return kit.inline(fig, stem, "Drop of the answer's reciprocal rank and probability", table)


def drops_heatmap(table: Table, stem: str, xlabel: str, *, framed: bool = False) -> kit.Drawing:
    """Relative drop of the answer's probability in %, by relation and condition."""
    rows, columns, found = kit.pivot(table, "relation", "off", "prob_drop")
    colours = ScalarMappable(Normalize(-100, 100, clip=True), mpl.colormaps["RdBu_r"])
    own = np.array([[row == column for column in columns] for row in rows], dtype=np.bool_)
    with kit.figure() as fig:
        values = 100 * found["prob_drop"]
        ax = kit.matrix(fig, rows, columns, values, colours, framed=own if framed else None)
        ax.set_xlabel(xlabel, loc="left", labelpad=8)
        ax.set_ylabel("relation asked", loc="top", labelpad=8)
        kit.scale(fig, colours, [-100, 0, 100], ["≤ −100, gained", "0", "100, lost"])
        return kit.inline(fig, stem, "Drop of the answer's probability by relation", table)
