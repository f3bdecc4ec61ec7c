"""Draws the figures of the page on a contrast; page.py calls it, report/kit.py has the parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relneuron.report import kit
from relneuron.report.tables import Table, n_of, percent, significant

Array = np.ndarray[Any, Any]
WIDE = 5.4  # inches
BINS = 40


def layers_plot(table: Table, chosen: str | None) -> kit.Drawing:
    """By layer: the share of the squared change, and of the chosen neurons."""
    layer, squares = table.floats("layer"), table.floats("of_squares")
    series = [("of the squared change", squares, kit.MUTED)]
    count = table.floats("n_chosen")
    if chosen is not None and count.any():
        series.append((f"of the neurons of {kit.short(chosen)}", count / count.sum(), kit.OFF))
    _, high = kit.ends(0.0, *(values for _, values, _ in series))
    high = high or 1.0
    width = 0.8 / len(series)
    with kit.figure() as fig:
        ax = fig.add_axes((0, 0, WIDE, 1.5))
        for place, (_, values, colour) in enumerate(series):
            shift = (place - (len(series) - 1) / 2) * width
            ax.bar(layer + shift, np.nan_to_num(values), width=0.92 * width, color=colour)
        ax.set(xlim=(-0.6, len(layer) - 0.4), ylim=(0, 1.05 * high), xlabel="layer")
        ticks = range(0, len(layer), -(-len(layer) // 16))
        ax.set_xticks([*ticks], [str(tick) for tick in ticks])
        _share_ticks(ax, [0, high])
        kit.legend(fig, [kit.mark(name, c=c, marker="s") for name, _, c in series], 1.65)
        return kit.inline(
            fig, "layers", "Share of the change and of the chosen neurons by layer", table
        )


def concentration_plot(share: Array, sets: Mapping[str, int]) -> kit.Drawing:
    """The share (N,) of the squared change that the k neurons have that change most, over k / N.

    A dot for each set that is the beginning of the ranking, by its size.
    """
    n = share.size
    part = np.arange(1, n + 1) / n
    # A curve of many neurons is drawn at as many places as can be told apart.
    drawn = np.unique(np.geomspace(1, n, 400).round().astype(int)) - 1
    with kit.figure() as fig:
        ax = fig.add_axes((0, 0, WIDE, 2.2))
        ax.plot(part, part, color=kit.LINE, lw=1.2)
        ax.plot(part[drawn], share[drawn], color=kit.INK, lw=1.6)
        sizes = [size for size in sets.values() if 0 < size <= n]
        for size in sizes:
            ax.plot([size / n], [share[size - 1]], "o", color=kit.OFF, ms=6, clip_on=False)
        least = min(1 / n, 0.01)
        ax.set(xscale="log", xlim=(least, 1), ylim=(0, 1.02))
        ax.set_xlabel("neurons, those that change most first")
        ticks = [tick for tick in (0.0001, 0.001, 0.01, 0.1, 1.0) if tick >= least]
        ax.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        _share_ticks(ax, [0, 0.25, 0.5, 0.75, 1])
        marks = [
            kit.mark("their share of the squared change", c=kit.INK, ls="-", marker=""),
            kit.mark("if all changed alike", c=kit.LINE, ls="-", marker=""),
        ]
        if sizes:
            marks.append(kit.mark("a set", c=kit.OFF))
        kit.legend(fig, marks, 2.35)
        return kit.inline(fig, "concentration", "How concentrated the change is")


def scores_plot(score: Array, chosen: Array, name: str | None) -> kit.Drawing:
    """How many neurons have which S (N,), on a logarithmic scale; those `chosen` (N,) apart."""
    positive = score[score > 0]
    edges = np.geomspace(positive.min(), positive.max() * 1.0001, BINS + 1)
    if not np.diff(edges).all():  # all of one score
        edges = np.array([positive.min() / 1.1, positive.min() * 1.1])
    count, _ = np.histogram(positive, edges)
    own, _ = np.histogram(score[chosen & (score > 0)], edges)
    with kit.figure() as fig:
        ax = fig.add_axes((0, 0, WIDE, 1.4))
        for some, colour in ((count, kit.MUTED), (own, kit.OFF)):
            wide, full = 0.94 * np.diff(edges), some > 0
            ax.bar(edges[:-1][full], some[full], wide[full], align="edge", color=colour)
        top = max(1, int(count.max()))
        ax.set(xscale="log", ylim=(0, 1.05 * top), xlim=(edges[0], edges[-1]))
        ax.set_xlabel("S, root mean square of the change")
        ticks = np.geomspace(edges[0], edges[-1], 5)
        ax.set_xticks(ticks, [significant(float(tick), 2) for tick in ticks])
        ax.set_xticks([], minor=True)
        ax.set_yticks([0, top], ["0", f"{top:,}"])
        ax.tick_params(axis="y", labelsize=8, labelcolor=kit.MUTED)
        marks = [kit.mark("neurons", c=kit.MUTED, marker="s")]
        if name is not None and own.any():
            marks.append(kit.mark(f"of {kit.short(name)}", c=kit.OFF, marker="s"))
        kit.legend(fig, marks, 1.5)
        return kit.inline(fig, "scores", "Neurons by their change")


def effects_plot(table: Table) -> kit.Drawing:
    """Causal effect over the number of patched neurons, beside it that of random neurons."""
    x = table.floats("n_neurons")
    effect, low, high = (table.floats(f"effect{end}") for end in ("", "_low", "_high"))
    random, least, most = (table.floats(f"random{end}") for end in ("", "_low", "_high"))
    bottom, top = kit.ends(0.0, 1.0, effect, low, high, least, most)
    room = 0.06 * (top - bottom)
    with kit.figure() as fig:
        ax = fig.add_axes((0, 0, WIDE, 2.2))
        for value, words in ((0.0, "model A"), (1.0, "model B")):
            ax.axhline(value, color=kit.MUTED, lw=0.8)
            where = ax.get_yaxis_transform()
            ax.text(1.02, value, words, va="center", fontsize=8.5, transform=where)
        _with_range(ax, x, random, least, most, kit.RANDOM, "s--")
        _with_range(ax, x, effect, low, high, kit.OFF, "o-")
        ax.set(xscale="log", ylim=(bottom - room, top + room), xlim=(x.min() / 1.3, x.max() * 1.3))
        ax.set(xlabel="patched neurons")
        ticks = _apart(x)
        ax.set_xticks(ticks, [f"{int(tick):,}" for tick in ticks])
        ax.set_xticks([], minor=True)
        ends = [tick for tick in (bottom, 0.0, 0.5, 1.0, top) if tick in (0, 0.5, 1) or _far(tick)]
        ax.set_yticks(ends, [f"{tick:.2g}".replace("-", "−") for tick in ends])
        ax.tick_params(axis="y", labelsize=8, labelcolor=kit.MUTED)
        marks = [kit.mark("C with B's values there, and its 95 % interval", c=kit.OFF)]
        if np.isfinite(random).any():
            marks.append(kit.mark("of as many random neurons, and range", c=kit.RANDOM, marker="s"))
        kit.legend(fig, marks, 2.35)
        return kit.inline(fig, "effects", "Causal effect by the number of patched neurons", table)


def _far(tick: float) -> bool:
    """Whether a number can be written beside those at 0, 0.5 and 1."""
    return min(abs(tick - other) for other in (0.0, 0.5, 1.0)) > 0.12


def _with_range(
    ax: Any, x: Array, mean: Array, low: Array, high: Array, colour: str, line: str
) -> None:
    ax.fill_between(x, low, high, color=colour, alpha=0.25, lw=0)
    ax.vlines(x, low, high, color=colour, lw=3, alpha=0.6)
    ax.plot(x, mean, line, color=colour, ms=5, lw=1.4, clip_on=False)


def _apart(x: Array) -> Sequence[float]:
    """Of some numbers those whose names have room beside one another on a logarithmic axis."""
    found: list[float] = []
    span = np.log(x.max() / x.min()) or 1.0
    for value in np.unique(x):
        if not found or np.log(value / found[-1]) > 0.09 * span:
            found.append(float(value))
    return found


def _share_ticks(ax: Any, ticks: Sequence[float]) -> None:
    ax.set_yticks(ticks, [percent(tick) if tick % 0.25 else f"{100 * tick:g} %" for tick in ticks])
    ax.tick_params(axis="y", labelsize=8, labelcolor=kit.MUTED)


def texts_plot(table: Table) -> kit.Drawing:
    """Of each mask the share of texts that are those of A itself, and those of B."""
    names = [
        str(mask) + ("" if np.isnan(n) else f" ({n_of(int(n), 'neuron')})")
        for mask, n in zip(table.column("mask"), table.floats("n_neurons"), strict=True)
    ]
    with kit.figure() as fig:
        ax = kit.rows_axes(fig, names, width=3.6)
        y = np.arange(len(names))
        for shift, column, colour in ((-0.17, "as_clean", kit.MUTED), (0.17, "as_donor", kit.OFF)):
            values = 100 * np.nan_to_num(table.floats(column))
            ax.barh(y + shift, values, height=0.3, color=colour)
        ax.set(xlim=(0, 100), xticks=range(0, 101, 25), xlabel="texts, %")
        marks = [
            kit.mark("the same text as A", c=kit.MUTED, marker="s"),
            kit.mark("the same text as B", c=kit.OFF, marker="s"),
        ]
        kit.legend(fig, marks, kit.ROW * len(names) + 0.35)
        return kit.inline(
            fig, "texts", "Texts that are those of A, and of B, under each mask", table
        )
