"""Draws the roofline of `relneuron bench`: elements a second over elements a byte moved.

The command line calls it with the rows of bench/timing.py. Below the roof, the bandwidth of the
same run's triad, lies whoever computes more than it moves; further right is who moves less.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from relneuron.artifact.files import atomic_write
from relneuron.bench.timing import Row

INK, MUTED, LINE, OFF = "#15181c", "#5b6470", "#d5dae0", "#c2410c"
# What a point is, by the start of its contestant's name.
COLOURS = {"relneuron": OFF, "eager": "#2563a8", "compile": "#3f8f5b"}
PANELS_PER_ROW = 2


def roofline(rows: Sequence[Row], path: Path) -> bool:
    """One panel for each dtype and number of tokens of swiglu_stats, written as a PNG.

    False, and nothing written, without rows of that op.
    """
    panels: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        if row.op == "swiglu_stats" and row.median_ms:
            panels.setdefault((row.dtype, row.T, row.layout), []).append(row)
    if not panels:
        return False
    # Starting from the library's defaults keeps a user's own matplotlibrc out.
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"font.size": 8, "text.color": INK, "text.parse_math": False})
        n_columns = min(PANELS_PER_ROW, len(panels))
        n_rows = -(-len(panels) // n_columns)
        fig = Figure(figsize=(5.6 * n_columns, 4.6 * n_rows), layout="constrained")
        fig.suptitle(
            f"swiglu_stats on {rows[0].processor}, {rows[0].threads} threads\n"
            f"relneuron {rows[0].relneuron}, torch {rows[0].torch}, commit {rows[0].commit}",
            fontsize=8,
            color=MUTED,
        )
        axes = fig.subplots(n_rows, n_columns, squeeze=False).flat
        for ax, (dtype, n_tokens, layout) in zip(axes, panels, strict=False):
            _panel(ax, panels[dtype, n_tokens, layout])
            title = f"{dtype}, T = {n_tokens:,}, rows {layout} by relation"
            ax.set_title(title, loc="left", fontsize=9, fontweight="bold")
        for ax in list(axes)[len(panels) :]:
            ax.set_visible(False)
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    atomic_write(path, buffer.getvalue())
    return True


def _panel(ax: Axes, rows: Sequence[Row]) -> None:
    points = []
    roof = next((r.GB_s or 0.0 for r in rows if r.contestant == "triad"), 0.0)
    for row in rows:
        if row.variant == "ceiling":
            continue
        assert row.GB_s is not None
        # The share is taken within rounds, so a drift of the machine moves nobody over the roof.
        gb_per_s = roof * row.share_triad if roof and row.share_triad else row.GB_s
        n_elements = row.T * row.F
        per_second = gb_per_s * n_elements / row.bytes
        # The forms of a peer that counts per relation have names of their own.
        ours = row.contestant == "relneuron"
        task = {"swiglu": "counts nothing", "total": "no relations"}.get(row.variant, "")
        note = row.variant if ours else task
        name = f"{row.contestant}: {note}" if note else row.contestant
        points.append((n_elements / row.moved_bytes, per_second, name))
    x, y = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    low, high = 0.7 * x.min(), 1.25 * x.max()
    if roof:
        ends = np.array([low, high])
        ax.plot(ends, roof * ends, color=INK, lw=1.1)
        said = f"roof: triad of the same run, {roof:,.1f} GB/s"
        ax.text(0.02, 0.96, said, fontsize=7.5, color=MUTED, transform=ax.transAxes)
    ax.set(xscale="log", yscale="log", xlim=(low, high * (high / low) ** 0.9))
    ax.set_ylim(0.7 * y.min(), 1.6 * max(y.max(), roof * high))
    ax.set_xlabel("elements per byte moved, by the formula (compiled: at most)", color=MUTED)
    ax.set_ylabel("10⁹ elements per second", color=MUTED)
    ticks = [float(x.min()), float(np.sqrt(x.min() * x.max())), float(x.max())]
    ax.set_xticks(ticks, [f"1/{1 / tick:.3g}" for tick in ticks])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.minorticks_off()
    for spine in ("top", "right"):
        ax.spines[spine].set_visible(False)
    for spine in ("bottom", "left"):
        ax.spines[spine].set_color(LINE)
    ax.tick_params(colors=MUTED, length=2)
    _labels(ax, points, high)


def _labels(ax: Axes, points: Sequence[tuple[float, float, str]], right: float) -> None:
    """Names in a column at the right, spread so that none covers another, joined to the points."""
    bottom, top = np.log(ax.get_ylim())
    step = (top - bottom) / max(26, len(points) + 2)
    ordered = sorted(points, key=lambda point: point[1])
    # The least moves that keep the distance: places that collide are pooled to their mean.
    pools: list[list[float]] = []
    for i, (_, y, _) in enumerate(ordered):
        pools.append([float(np.log(y)) - i * step])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    free = [float(np.mean(pool)) for pool in pools for _ in pool]
    inside = max(0.0, bottom + step - free[0])
    for i, ((x, y, name), place) in enumerate(zip(ordered, free, strict=True)):
        at = float(np.exp(place + i * step + inside))
        colour = COLOURS.get(name.split()[0].rstrip(":"), MUTED)
        ax.plot(x, y, "o", color=colour, ms=6 if colour == OFF else 4, zorder=3)
        ax.plot([x, right], [y, at], color=LINE, lw=0.5, zorder=1)
        ax.text(right * 1.03, at, name, fontsize=6.5, va="center", color=colour)
