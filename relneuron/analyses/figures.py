"""Draws the figures of the single analyses from their tables; analyses/page.py calls it.

Each takes the table of the analysis of its name; report/kit.py has the theme and the parts.
"""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from relneuron.report.kit import (
    BEFORE,
    BROAD,
    LINE,
    MUTED,
    OFF,
    RANDOM,
    ROW,
    SURE,
    beside,
    ends,
    figure,
    floats,
    inline,
    legend,
    mark,
    matrix,
    pivot,
    rows_axes,
    scale,
    short,
    whole,
)
from relneuron.report.results import Array
from relneuron.report.tables import Table, percent, split_title, visible

MOST_BARS = 16  # with a number each
OTHERS: dict[str, Any] = {
    "ls": "none",
    "marker": "D",
    "ms": 5.5,
    "mfc": "none",
    "mec": MUTED,
    "mew": 1.3,
}
ERRORS = {
    "empty": ("empty", "#b9c0c9"),
    "article": ("article or punctuation", "#66ccee"),
    "repeats_prompt": ("words of the prompt", "#4477aa"),
    "same_relation": ("object of the relation", "#ee7733"),
    "other_relation": ("object of another relation", "#aa3377"),
    "other": ("something else", "#59636f"),
}
TICKS = (0.1, 1, 10, 20, 33, 50, 67, 80, 90, 100, 110, 125, 150, 200, 300, 500)
TICKS += tuple(10**n for n in range(3, 12))


def texts(table: Table, name: str) -> list[str]:
    return [str(cell) for cell in table.column(name)]


def splits_plot(table: Table) -> str:
    """Mean drops by kind of prompt."""
    names = [split_title(split) for split in texts(table, "split")]
    with figure() as fig:
        ax = rows_axes(fig, names)
        drawn = floats(table, "random_drop")
        _drops(ax, floats(table, "own_drop"), floats(table, "others_drop"), drawn)
        random = 100 * drawn
        ax.plot(random, range(len(names)), "s", color=RANDOM, ms=5.5, clip_on=False)
        marks = [mark("own neurons off", c=OFF), mark("other sets off", **OTHERS)]
        marks.append(mark("random neurons off", marker="s", ms=5.5, c=RANDOM))
        legend(fig, marks[: 3 if np.isfinite(random).any() else 2], ROW * len(names) + 0.3)
        return inline(fig, "splits", "Mean accuracy drop by kind of prompt")


def _drops(ax: Axes, own: Array, others: Array, *drawn: Array) -> None:
    """Relative drops in %: of the own relation and of the others, one row each.

    What is `drawn` into it besides has room, too.
    """
    y = range(len(own))
    least = 100 * ends(own, others, *drawn, 0)[0]
    ax.hlines(y, least, 100, color=LINE, lw=0.6)
    ax.axvline(0, color=MUTED, lw=0.8)
    ax.plot(100 * others, y, **OTHERS, clip_on=False)
    ax.plot(100 * own, y, "o", color=OFF, ms=6, clip_on=False)
    ax.set(xlim=(least, 100), xticks=(0, 50, 100), xlabel="accuracy lost, %")


def versatility_plot(table: Table) -> str:
    """How many neurons are in just 1, 2, ... sets."""
    n_relations, n_neurons = floats(table, "n_relations"), floats(table, "n_neurons")
    with figure() as fig:
        few, most = len(n_relations) <= MOST_BARS, max(n_neurons)
        ax = fig.add_axes((0, 0, float(np.clip(0.45 * len(n_relations), 2, BROAD)), 1.7))
        ax.bar(n_relations, n_neurons, width=0.8, color=MUTED)
        for x, n in zip(n_relations, n_neurons, strict=True):
            if few or n == most:
                ax.text(x, n, whole(n), ha="center", va="bottom", fontsize=8)
        ax.set(xticks=n_relations, yticks=[], xlabel="number of sets that a neuron is in")
        step = -(-len(n_relations) // MOST_BARS)
        ax.set_xticks(n_relations[::step], [whole(x) for x in n_relations[::step]])
        ax.set_title("neurons", loc="left", fontsize=8.5, color=MUTED, pad=14)
        return inline(fig, "versatility", "Neurons by the number of sets they are in")


def sizes_plot(table: Table, n_columns: int = 4) -> str:
    """Accuracy against the number of neurons: their mean over relations, then each relation."""
    relations = list(dict.fromkeys(texts(table, "relation")))
    names = ["mean of the relations", *relations] if len(relations) > 1 else relations
    width, high, gap = 1.45, 1.05, 0.62
    n_rows = -(-len(names) // n_columns)
    with figure() as fig:
        for place, name in enumerate(names):
            i, j = divmod(place, n_columns)
            box = (j * (width + 0.25), (n_rows - 1 - i) * (high + gap), width, high)
            ax = fig.add_axes(box)
            is_mean = len(names) > 1 and place == 0
            _sizes_panel(ax, table if is_mean else table.where("relation", name), is_mean)
            title = name if is_mean else short(name)
            ax.set_title(title, loc="left", fontsize=8.5, fontweight="bold")
            if j:
                ax.set_yticklabels([])
            if i == n_rows - 1 or place + n_columns >= len(names):
                ax.set_xlabel("neurons off")
        marks = [mark("the relation itself, %", c=OFF, ls="-", lw=1.6, ms=4)]
        if np.isfinite(floats(table, "own_low")).any():
            marks.append(mark("its 95 % interval", c=OFF, alpha=0.25, lw=7, ls="-", marker=""))
        marks.append(mark("mean of the others, %", c=MUTED, ls="-", lw=1.6, ms=4))
        legend(fig, marks, n_rows * (high + gap) - gap + 0.35)
        return inline(fig, "sizes", "Accuracy by number of neurons switched off")


def _sizes_panel(ax: Axes, table: Table, is_mean: bool) -> None:
    sizes = np.unique(floats(table, "size"))
    # The logarithm has no place for 0: it stands one step left of the smallest set.
    x = np.log10(np.where(sizes > 0, sizes, sizes[sizes > 0].min() / 3))

    def curve(name: str) -> Array:
        values, at = 100 * floats(table, name), floats(table, "size")
        found = [values[(at == size) & np.isfinite(values)] for size in sizes]
        return np.array([some.mean() if some.size else np.nan for some in found])

    if not is_mean:
        ax.fill_between(x, curve("own_low"), curve("own_high"), color=OFF, alpha=0.25, lw=0)
    ax.plot(x, curve("others"), "-o", color=MUTED, lw=1.3, ms=3, clip_on=False)
    ax.plot(x, curve("own"), "-o", color=OFF, lw=1.6, ms=3, clip_on=False)
    ax.set(ylim=(0, 100), yticks=(0, 50, 100))
    ax.tick_params(labelsize=7.5)
    ax.grid(axis="y", color=LINE, lw=0.6)
    ax.set_axisbelow(True)
    shown = _apart(x, 0.24 * np.ptp(x))
    ax.set_xticks(x[shown], [_thousands(sizes[i]) for i in shown])


def _apart(x: Array, least: float) -> list[int]:
    """Places of values `least` apart: the first, and the last rather than its neighbour."""
    kept = [0]
    for i in range(1, len(x)):
        if x[i] - x[kept[-1]] >= least:
            kept.append(i)
    if kept[-1] != len(x) - 1:
        kept[-1 if len(kept) > 1 else len(kept) :] = [len(x) - 1]
    return kept


def _thousands(n: float) -> str:
    return f"{n / 1000:.3g}k" if n >= 1000 else f"{n:g}"


def cumulativity_plot(table: Table, summary: Table) -> str:
    """Cumulativity by range of ranks: each relation, their mean, and over all prompts."""
    first, last = floats(summary, "from"), floats(summary, "to")
    x = np.arange(len(first))
    with figure() as fig:
        ax = fig.add_axes((0, 0, max(2.5, 0.72 * len(x)), 1.9))
        for start, value in zip(floats(table, "from"), floats(table, "cumulativity"), strict=True):
            place = np.flatnonzero(first == start)
            ax.plot(place, [100 * value] * len(place), "o", color=RANDOM, ms=4, clip_on=False)
        ax.plot(x, 100 * floats(summary, "micro"), "-", color=MUTED, lw=1)
        ax.plot(x, 100 * floats(summary, "micro"), **OTHERS, clip_on=False)
        ax.plot(x, 100 * floats(summary, "macro"), "-o", color=OFF, lw=1.4, ms=6, clip_on=False)
        counts = floats(summary, "total")
        labels = [
            f"{whole(a + 1)}–{whole(b)}\nn = {whole(n)}"
            for a, b, n in zip(first, last, counts, strict=True)
        ]
        ax.set(ylim=(0, 100), xlim=(-0.5, len(x) - 0.5), yticks=(0, 25, 50, 75, 100))
        ax.set_xticks(x, labels, fontsize=7.5)
        ax.grid(axis="y", color=LINE, lw=0.6)
        ax.set_axisbelow(True)
        ax.set_xlabel("ranks of the neurons; n facts are lost when these join those before")
        ax.set_title("cumulativity, %", loc="left", fontsize=8.5, color=MUTED)
        marks = [mark("mean of the relations (macro)", c=OFF, ms=6)]
        marks += [mark("all facts (micro)", **OTHERS), mark("a relation", c=RANDOM, ms=4)]
        legend(fig, marks, 2.2)
        return inline(fig, "cumulativity", "Cumulativity by range of ranks")


def sites_plot(table: Table) -> str:
    """Drops with only gate, up or down neurons off, and with the relation's own set."""
    relations = list(dict.fromkeys(texts(table, "relation")))
    with figure() as fig:
        for j, site in enumerate(dict.fromkeys(texts(table, "site"))):
            ax = rows_axes(fig, relations, left=j * 1.6, width=1.3, named=j == 0)
            part = table.where("site", site)
            drops = np.full((2, len(relations)), np.nan)
            where = [relations.index(name) for name in texts(part, "relation")]
            drops[:, where] = floats(part, "own_drop"), floats(part, "others_drop")
            _drops(ax, *drops)
            title = "own set" if site == "all" else f"{site} only"
            ax.set_title(title, loc="left", fontsize=9, fontweight="bold")
        marks = [mark("the relation itself", c=OFF), mark("mean of the others", **OTHERS)]
        legend(fig, marks, ROW * len(relations) + 0.45)
        return inline(fig, "sites", "Accuracy drop by type of neuron")


def concept_heatmaps(table: Table) -> list[str]:
    """Neurons that relations share with concepts, and the relations' drops with a concept off."""
    rows, columns, found = pivot(table, "relation", "concept", "shared", "drop", "q_value")
    shared, drop = found["shared"], 100 * found["drop"]
    top = max(1, int(np.nanmax(shared)))
    blues = ScalarMappable(Normalize(0, top), mpl.colormaps["Blues"])
    reds = ScalarMappable(Normalize(-100, 100, clip=True), mpl.colormaps["RdBu_r"])
    drawn = []
    with figure() as fig:
        matrix(fig, rows, columns, shared, blues, sure=found["q_value"] <= SURE)
        scale(fig, blues, [0, top], ["0", f"{top:,} shared neurons"])
        drawn.append(inline(fig, "concepts", "Neurons that relations share with concepts"))
    if np.isfinite(drop).any():
        with figure() as fig:
            matrix(fig, rows, columns, drop, reds)
            scale(fig, reds, [-100, 0, 100], ["≤ −100, gained", "0 % lost", "100"])
            drawn.append(inline(fig, "concepts1", "Accuracy drop with a concept's neurons off"))
    return drawn


def perplexity_plot(table: Table) -> str:
    """Perplexity with the own set off in % of that before, and with random sets, on a log axis."""
    names = texts(table, "relation")
    before, own = floats(table, "before"), floats(table, "own")
    ratio, low, high = (100 * floats(table, f"ratio{end}") for end in ("", "_low", "_high"))
    random = 100 * floats(table, "random") / before
    least, most = ends(ratio, low, high, random, 90, 110)
    limits = 0.93 * least, 1.07 * most
    y = np.arange(len(names))
    with figure() as fig:
        ax = rows_axes(fig, names)
        ax.set(xscale="log", xlim=limits, xlabel="perplexity, % of that before")
        ax.set_xticks([], minor=True)
        ticks = _log_ticks(*limits)
        ax.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        ax.hlines(y, *limits, color=LINE, lw=0.6)
        ax.axvline(100, color=MUTED, lw=0.8)
        ax.plot(random, y, "s", color=RANDOM, ms=5.5)
        ax.hlines(y, low, high, color=OFF, lw=6, alpha=0.35)
        ax.plot(ratio, y, "o", color=OFF, ms=6)
        notes = [f"{_ppl(b)} → {_ppl(a)}" for b, a in zip(before, own, strict=True)]
        beside(ax, "before → off", notes)
        marks = [mark("own neurons off", c=OFF)]
        marks.append(mark("95 % interval", c=OFF, alpha=0.35, lw=6, ls="-", marker=""))
        if np.isfinite(random).any():
            marks.append(mark("random neurons off", marker="s", ms=5.5, c=RANDOM))
        legend(fig, marks, ROW * len(names) + 0.4)
        return inline(fig, "perplexity", "Perplexity of neutral sentences")


def _ppl(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1}f}" if np.isfinite(value) else "–"


def _log_ticks(low: float, high: float) -> list[float]:
    """100 and the round numbers within the limits that are far enough from those nearer to it."""
    least = math.log(high / low) / 6
    ticks: list[float] = []
    inside = [tick for tick in TICKS if low <= tick <= high]
    for tick in sorted(inside, key=lambda t: abs(math.log(t / 100))):
        if all(abs(math.log(tick / other)) >= least for other in ticks):
            ticks.append(tick)
    return sorted(ticks)


def resilience_plot(table: Table) -> str:
    """How many facts outlive their set, and how sure the model was of both kinds before."""
    names = texts(table, "relation")
    y = np.arange(len(names))
    kept, lost = floats(table, "n_resilient"), floats(table, "n_sensitive")
    total = np.where(kept + lost > 0, kept + lost, np.nan)
    share = 100 * lost / total
    with figure() as fig:
        ax = rows_axes(fig, names, width=2.2)
        ax.barh(y, np.where(np.isnan(share), 0, share), height=0.55, color=OFF)
        ax.barh(y, np.nan_to_num(100 - share), 0.55, np.nan_to_num(share), color=RANDOM)
        ax.set(xlim=(0, 100), xticks=(0, 50, 100), xlabel="facts answered before, %")
        notes = [f"{whole(b)} of {whole(b + a)}" for a, b in zip(kept, lost, strict=True)]
        beside(ax, "lost", notes)
        right = rows_axes(fig, names, left=3.3, width=2.2, named=False)
        logprobs = [floats(table, f"logprob_{kind}") for kind in ("resilient", "sensitive")]
        least = ends(*logprobs, -0.1)[0]
        right.hlines(y, least, 0, color=LINE, lw=0.6)
        right.plot(logprobs[0], y, "o", **BEFORE, ms=7, clip_on=False)
        right.plot(logprobs[1], y, "o", color=OFF, ms=6, clip_on=False)
        right.set(xlim=(least, 0), xlabel="mean log-probability before, nats")
        right.locator_params(axis="x", nbins=4)
        marks = [Patch(color=OFF, label="lost"), Patch(color=RANDOM, label="kept")]
        legend(fig, marks, ROW * len(names) + 0.4)
        dots = [mark("lost", c=OFF), mark("kept", **BEFORE)]
        legend(fig, dots, ROW * len(names) + 0.4, left=3.3)
        return inline(fig, "resilience", "Facts that outlive their set and facts that do not")


def errors_plot(table: Table) -> str:
    """What lost answers become, by kind; beside it the most common wrong answer."""
    names = texts(table, "relation")
    y = np.arange(len(names))
    with figure() as fig:
        ax = rows_axes(fig, names, width=4.2)
        left = np.zeros(len(names))
        for kind, (_, colour) in ERRORS.items():
            n = floats(table, kind)
            ax.barh(y, n, height=0.55, left=left, color=colour)
            left = left + n
        ax.set(xlim=(0, max(1, left.max())), xlabel="answers lost")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        said = zip(texts(table, "most_common"), table.column("n_most_common"), strict=True)
        notes = [f"{_quoted(text)} ×{n}" if n else "–" for text, n in said]
        beside(ax, "most common", notes)
        legend(fig, [Patch(color=c, label=n) for n, c in ERRORS.values()], ROW * len(names) + 0.4)
        return inline(fig, "errors", "What lost answers become")


def _quoted(text: str) -> str:
    text = visible(text.strip()) or percent(math.nan)
    return f"“{text if len(text) <= 24 else text[:23] + '…'}”"


METHOD_TITLES = {"ap": "found by average precision", "gain": "found by gain"}


def gain_plot(table: Table) -> str:
    """Drops of each relation and of the others, with the AP set off and with the gain set off."""
    relations = list(dict.fromkeys(str(name) for name in table.column("relation")))
    names = ("drop", "drop_low", "drop_high", "others_drop")
    least = ends(*(100 * floats(table, name) for name in names), 0.0)[0]
    with figure() as fig:
        for place, (method, title) in enumerate(METHOD_TITLES.items()):
            part = table.where("method", method)
            y = [relations.index(str(name)) for name in part.column("relation")]
            own, low, high, others = (100 * floats(part, name) for name in names)
            ax = rows_axes(fig, relations, left=place * 2.6, width=2.3, named=place == 0)
            ax.hlines(range(len(relations)), least, 100, color=LINE, lw=0.6)
            ax.axvline(0, color=MUTED, lw=0.8)
            ax.hlines(y, low, high, color=OFF, lw=6, alpha=0.35)
            ax.plot(others, y, **OTHERS, clip_on=False)
            ax.plot(own, y, "o", color=OFF, ms=6, clip_on=False)
            ax.set(xlim=(least, 100), xticks=(0, 50, 100), xlabel="accuracy lost, %")
            ax.set_title(title, loc="left", fontsize=9, fontweight="bold")
        marks = [mark("the relation itself", c=OFF)]
        if np.isfinite(floats(table, "drop_low")).any():
            marks.append(mark("its 95 % interval", c=OFF, alpha=0.35, lw=6, ls="-", marker=""))
        legend(fig, [*marks, mark("mean of the others", **OTHERS)], ROW * len(relations) + 0.45)
        return inline(fig, "gain", "Accuracy drop under sets by average precision and by gain")
