"""Draws the figures of the page on facts; page.py calls it, report/kit.py has theme and parts."""

from __future__ import annotations

from typing import Any

import numpy as np

from relneuron.report import kit
from relneuron.report.tables import Table, percent

Array = np.ndarray[Any, Any]
WIDE = 5.4  # inches
BINS = 20


def changes_plot(table: Table) -> kit.Drawing:
    """Relative change of P on related and unrelated prompts, and under random sets, in percent."""
    names = [str(name) for name in table.column("relation")]
    series = {
        "related_change": ("prompts that the neurons are about", kit.OFF, "o"),
        "unrelated_change": ("other prompts", kit.MUTED, "D"),
        "matched": ("random neurons, range of seeds", kit.RANDOM, "s"),
    }
    shift = dict(zip(series, (-0.27, 0.0, 0.27), strict=True))
    columns = [f"{key}{end}" for key in series for end in ("", "_low", "_high")]
    low, high = kit.ends(0.0, *(100 * table.floats(name) for name in columns))
    room = 0.04 * (high - low or 1)
    with kit.figure() as fig:
        ax = kit.rows_axes(fig, names, width=3.6)
        ax.axvline(0, color=kit.MUTED, lw=0.8)
        y = np.arange(len(names))
        for key, (_, colour, marker) in series.items():
            mean, least, most = (100 * table.floats(f"{key}{end}") for end in ("", "_low", "_high"))
            ax.hlines(y + shift[key], least, most, color=colour, lw=4, alpha=0.35)
            ax.plot(mean, y + shift[key], marker, color=colour, ms=4.5, clip_on=False)
        ax.set(xlim=(low - room, high + room), xlabel="change of the answer's probability, %")
        ratios = [f"{x:.3g}" if np.isfinite(x) else "–" for x in table.floats("pcr")]
        kit.beside(ax, "PCR", ratios)
        shown = [key for key in series if np.isfinite(table.floats(key)).any()]
        marks = [
            kit.mark(title, c=colour, marker=marker)
            for title, colour, marker in map(series.__getitem__, shown)
        ]
        kit.legend(fig, marks, kit.ROW * len(names) + 0.35)
        return kit.inline(fig, "changes", "Change of the answer's probability by relation", table)


def sizes_plot(sizes: Array, facts: Table) -> kit.Drawing:
    """How many facts have how many neurons; `facts` has each."""
    top = int(sizes.max(initial=0))
    edges = np.arange(top + 2) if top < 40 else np.linspace(0, top + 1, BINS + 1)
    count, _ = np.histogram(sizes, edges)
    with kit.figure() as fig:
        ax = fig.add_axes((0, 0, WIDE, 1.3))
        ax.bar(edges[:-1], count, width=0.9 * np.diff(edges), align="edge", color=kit.MUTED)
        mean = float(sizes.mean())
        ax.axvline(mean + 0.45, color=kit.OFF, lw=1.2)
        ax.text(mean + 0.45, count.max() * 1.05, f" mean {mean:.3g}", fontsize=8.5, color=kit.OFF)
        if top < 40:
            step = max(1, (top + 1) // 12)
            ticks = range(0, top + 1, step)
            ax.set_xticks([tick + 0.45 for tick in ticks], [str(tick) for tick in ticks])
        _counts(ax, int(count.max()), "neurons of a fact")
        return kit.inline(fig, "sizes", "Facts by their number of neurons", facts)


def consistency_plot(scores: Array, name: str, cut: float | None, facts: Table) -> kit.Drawing:
    """How many facts have which consistency, and the cut between consistent and inconsistent."""
    count, edges = np.histogram(scores[np.isfinite(scores)], BINS, (0.0, 1.0))
    with kit.figure() as fig:
        ax = fig.add_axes((0, 0, WIDE, 1.3))
        is_above = edges[:-1] >= (cut if cut is not None else 2)
        colours = np.where(is_above, kit.OFF, kit.MUTED)
        ax.bar(edges[:-1], count, width=0.9 / BINS, align="edge", color=colours.tolist())
        if cut is not None:
            ax.axvline(cut, color=kit.INK, lw=1.2)
            ax.text(cut, max(1, count.max()) * 1.05, f" cut {cut:.3g}", fontsize=8.5)
        _counts(ax, int(count.max()), f"consistency ({name.upper()})")
        ax.set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1])
        return kit.inline(fig, "consistency", "Facts by their consistency", facts)


def _counts(ax: Any, top: int, xlabel: str) -> None:
    ax.set(ylim=(0, 1.18 * max(1, top)), xlabel=xlabel)
    ax.set_yticks([0, max(1, top)], ["0", f"{max(1, top):,}"])
    ax.tick_params(axis="y", labelsize=8, labelcolor=kit.MUTED)
    ax.set_title("facts", loc="left", fontsize=8.5, color=kit.MUTED)


def completeness_plot(table: Table) -> kit.Drawing:
    """By layer: the change of P between baseline and run, and the sum of the attributions."""
    layer, change, total = (table.floats(name) for name in ("layer", "change", "sum"))
    low, high = kit.ends(0.0, change, total)
    room = 0.08 * (high - low or 1)
    with kit.figure() as fig:
        ax = fig.add_axes((0, 0, WIDE, 1.4))
        ax.bar(layer - 0.2, change, width=0.36, color=kit.MUTED)
        ax.bar(layer + 0.2, total, width=0.36, color=kit.OFF)
        ax.axhline(0, color=kit.MUTED, lw=0.6)
        ax.set(xlim=(-0.7, len(layer) - 0.3), ylim=(low - room, high + room), xlabel="layer")
        ticks = range(0, len(layer), -(-len(layer) // 12))
        ax.set_xticks([*ticks], [str(tick) for tick in ticks])
        ax.set_yticks([0, high], ["0", percent(high)])
        ax.tick_params(axis="y", labelsize=8, labelcolor=kit.MUTED)
        marks = [
            kit.mark("change of P", c=kit.MUTED, marker="s"),
            kit.mark("sum of integrated gradients", c=kit.OFF, marker="s"),
        ]
        kit.legend(fig, marks, 1.55)
        return kit.inline(
            fig, "completeness", "Sums of attributions and changes of P by layer", table
        )
