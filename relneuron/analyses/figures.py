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

from relneuron.report import kit
from relneuron.report.tables import Array, Table, percent, split_title, visible

MOST_BARS = 16  # with a number each
OTHERS: dict[str, Any] = {
    "ls": "none",
    "marker": "D",
    "ms": 5.5,
    "mfc": "none",
    "mec": kit.MUTED,
    "mew": 1.3,
}
# Kinds of wrong answers: title, colour, and lines that tell colours apart that are alike in grey.
ERROR_TITLES = {
    "empty": ("empty", "#b9c0c8", ""),
    "article": ("article or punctuation", "#66ccee", "/" * 5),
    "repeats_prompt": ("words of the prompt", "#4477aa", ""),
    "same_relation": ("object of the relation", "#ee7733", ""),
    "other_relation": ("object of another relation", "#aa3377", "\\" * 5),
    "other": ("something else", "#59636f", ""),
}
TICKS = (0.1, 1, 10, 20, 33, 50, 67, 80, 90, 100, 110, 125, 150, 200, 300, 500)
TICKS += tuple(10**n for n in range(3, 12))


def texts(table: Table, name: str) -> list[str]:
    return [str(cell) for cell in table.column(name)]


def splits_plot(table: Table) -> kit.Drawing:
    """Mean drops by kind of prompt."""
    names = [split_title(split) for split in texts(table, "split")]
    with kit.figure() as fig:
        ax = kit.rows_axes(fig, names)
        drawn = table.floats("random_drop")
        _drops(ax, table.floats("own_drop"), table.floats("others_drop"), drawn)
        random = 100 * drawn
        ax.plot(random, range(len(names)), "s", color=kit.RANDOM, ms=5.5, clip_on=False)
        marks = [kit.mark("own neurons off", c=kit.OFF), kit.mark("other sets off", **OTHERS)]
        marks.append(kit.mark("random neurons off", marker="s", ms=5.5, c=kit.RANDOM))
        kit.legend(fig, marks[: 3 if np.isfinite(random).any() else 2], kit.ROW * len(names) + 0.3)
        return kit.inline(fig, "splits", "Mean accuracy drop by kind of prompt", table)


def _drops(ax: Axes, own: Array, others: Array, *drawn: Array) -> None:
    """Relative drops in %: of the own relation and of the others, one row each.

    What is `drawn` into it besides has room, too.
    """
    y = range(len(own))
    least = 100 * kit.ends(own, others, *drawn, 0)[0]
    ax.hlines(y, least, 100, color=kit.LINE, lw=0.6)
    ax.axvline(0, color=kit.MUTED, lw=0.8)
    ax.plot(100 * others, y, **OTHERS, clip_on=False)
    ax.plot(100 * own, y, "o", color=kit.OFF, ms=6, clip_on=False)
    ax.set(xlim=(least, 100), xticks=(0, 50, 100), xlabel="accuracy lost, %")


def versatility_plot(table: Table) -> kit.Drawing:
    """How many neurons are in just 1, 2, ... sets."""
    n_sets, n_neurons = (table.floats(name) for name in table.columns[:2])
    with kit.figure() as fig:
        few, most = len(n_sets) <= MOST_BARS, max(n_neurons)
        ax = fig.add_axes((0, 0, float(np.clip(0.45 * len(n_sets), 2, kit.BROAD)), 1.7))
        ax.bar(n_sets, n_neurons, width=0.8, color=kit.MUTED)
        for x, n in zip(n_sets, n_neurons, strict=True):
            if few or n == most:
                ax.text(x, n, kit.whole(n), ha="center", va="bottom", fontsize=8)
        ax.set(xticks=n_sets, yticks=[], xlabel="number of sets that a neuron is in")
        step = -(-len(n_sets) // MOST_BARS)
        ax.set_xticks(n_sets[::step], [kit.whole(x) for x in n_sets[::step]])
        ax.set_title("neurons", loc="left", fontsize=8.5, color=kit.MUTED, pad=14)
        return kit.inline(fig, "versatility", "Neurons by the number of sets they are in", table)


def sizes_plot(table: Table, n_columns: int = 4) -> kit.Drawing:
    """Accuracy against the number of neurons: their mean over relations, then each relation."""
    relations = list(dict.fromkeys(texts(table, "relation")))
    names = ["mean of the relations", *relations] if len(relations) > 1 else relations
    width, high, gap = 1.45, 1.05, 0.62
    n_rows = -(-len(names) // n_columns)
    with kit.figure() as fig:
        for place, name in enumerate(names):
            i, j = divmod(place, n_columns)
            box = (j * (width + 0.25), (n_rows - 1 - i) * (high + gap), width, high)
            ax = fig.add_axes(box)
            is_mean = len(names) > 1 and place == 0
            _sizes_panel(ax, table if is_mean else table.where("relation", name), is_mean)
            title = name if is_mean else kit.short(name)
            ax.set_title(title, loc="left", fontsize=8.5, fontweight="bold")
            if j:
                ax.set_yticklabels([])
            if i == n_rows - 1 or place + n_columns >= len(names):
                ax.set_xlabel("neurons off")
        marks = [kit.mark("the relation itself, %", c=kit.OFF, ls="-", lw=1.6, ms=4)]
        if np.isfinite(table.floats("own_low")).any():
            marks.append(
                kit.mark("its 95 % interval", c=kit.OFF, alpha=0.25, lw=7, ls="-", marker="")
            )
        marks.append(
            kit.mark("mean of the others, %", c=kit.MUTED, ls="--", lw=1.3, marker="D", ms=4)
        )
        kit.legend(fig, marks, n_rows * (high + gap) - gap + 0.35)
        return kit.inline(fig, "sizes", "Accuracy by number of neurons switched off", table)


def _sizes_panel(ax: Axes, table: Table, is_mean: bool) -> None:
    sizes = np.unique(table.floats("size"))
    # The logarithm has no place for 0: it stands one step left of the smallest set.
    x = np.log10(np.where(sizes > 0, sizes, sizes[sizes > 0].min() / 3))

    def curve(name: str) -> Array:
        values, at = 100 * table.floats(name), table.floats("size")
        found = [values[(at == size) & np.isfinite(values)] for size in sizes]
        return np.array([some.mean() if some.size else np.nan for some in found])

    if not is_mean:
        ax.fill_between(x, curve("own_low"), curve("own_high"), color=kit.OFF, alpha=0.25, lw=0)
    ax.plot(x, curve("others"), "--D", color=kit.MUTED, lw=1.3, ms=3, clip_on=False)
    ax.plot(x, curve("own"), "-o", color=kit.OFF, lw=1.6, ms=3, clip_on=False)
    ax.set(ylim=(0, 100), yticks=(0, 50, 100))
    ax.tick_params(labelsize=7.5)
    ax.grid(axis="y", color=kit.LINE, lw=0.6)
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


def cumulativity_plot(table: Table, summary: Table) -> kit.Drawing:
    """Cumulativity by range of ranks: each relation, their mean, and over all prompts."""
    first, last = summary.floats("from"), summary.floats("to")
    x = np.arange(len(first))
    with kit.figure() as fig:
        ax = fig.add_axes((0, 0, max(2.5, 0.72 * len(x)), 1.9))
        for start, value in zip(table.floats("from"), table.floats("cumulativity"), strict=True):
            place = np.flatnonzero(first == start)
            ax.plot(place, [100 * value] * len(place), "o", color=kit.RANDOM, ms=4, clip_on=False)
        ax.plot(x, 100 * summary.floats("micro"), "-", color=kit.MUTED, lw=1)
        ax.plot(x, 100 * summary.floats("micro"), **OTHERS, clip_on=False)
        ax.plot(x, 100 * summary.floats("macro"), "-o", color=kit.OFF, lw=1.4, ms=6, clip_on=False)
        counts = summary.floats("total")
        labels = [
            f"{kit.whole(a + 1)}–{kit.whole(b)}\nn = {kit.whole(n)}"
            for a, b, n in zip(first, last, counts, strict=True)
        ]
        ax.set(ylim=(0, 100), xlim=(-0.5, len(x) - 0.5), yticks=(0, 25, 50, 75, 100))
        ax.set_xticks(x, labels, fontsize=7.5)
        ax.grid(axis="y", color=kit.LINE, lw=0.6)
        ax.set_axisbelow(True)
        ax.set_xlabel("ranks of the neurons; n facts are lost when these join those before")
        ax.set_title("cumulativity, %", loc="left", fontsize=8.5, color=kit.MUTED)
        marks = [kit.mark("mean of the relations (macro)", c=kit.OFF, ms=6)]
        marks += [
            kit.mark("all facts (micro)", **OTHERS),
            kit.mark("a relation", c=kit.RANDOM, ms=4),
        ]
        kit.legend(fig, marks, 2.2)
        return kit.inline(fig, "cumulativity", "Cumulativity by range of ranks", summary)


def sites_plot(table: Table) -> kit.Drawing:
    """Drops with only gate, up or down neurons off, and with the relation's own set."""
    relations = list(dict.fromkeys(texts(table, "relation")))
    with kit.figure() as fig:
        for j, site in enumerate(dict.fromkeys(texts(table, "site"))):
            ax = kit.rows_axes(fig, relations, left=j * 1.6, width=1.3, named=j == 0)
            part = table.where("site", site)
            drops = np.full((2, len(relations)), np.nan)
            where = [relations.index(name) for name in texts(part, "relation")]
            drops[:, where] = part.floats("own_drop"), part.floats("others_drop")
            _drops(ax, *drops)
            title = "own set" if site == "all" else f"{site} only"
            ax.set_title(title, loc="left", fontsize=9, fontweight="bold")
        marks = [
            kit.mark("the relation itself", c=kit.OFF),
            kit.mark("mean of the others", **OTHERS),
        ]
        kit.legend(fig, marks, kit.ROW * len(relations) + 0.45)
        return kit.inline(fig, "sites", "Accuracy drop by type of neuron", table)


def concept_heatmaps(table: Table) -> list[kit.Drawing]:
    """Neurons that relations share with concepts, and the relations' drops with a concept off."""
    rows, columns, found = kit.pivot(table, "relation", "concept", "shared", "drop", "q_value")
    shared, drop = found["shared"], 100 * found["drop"]
    top = max(1, int(np.nanmax(shared)))
    blues = ScalarMappable(Normalize(0, top), mpl.colormaps["Blues"])
    reds = ScalarMappable(Normalize(-100, 100, clip=True), mpl.colormaps["RdBu_r"])
    drawn = []
    with kit.figure() as fig:
        kit.matrix(fig, rows, columns, shared, blues, sure=found["q_value"] <= kit.SURE)
        kit.scale(fig, blues, [0, top], ["0", f"{top:,} shared neurons"])
        drawn.append(
            kit.inline(fig, "concepts", "Neurons that relations share with concepts", table)
        )
    if np.isfinite(drop).any():
        with kit.figure() as fig:
            kit.matrix(fig, rows, columns, drop, reds)
            kit.scale(fig, reds, [-100, 0, 100], ["≤ −100, gained", "0 % lost", "100"])
            drawn.append(
                kit.inline(fig, "concepts1", "Accuracy drop with a concept's neurons off", table)
            )
    return drawn


def perplexity_plot(table: Table) -> kit.Drawing:
    """Perplexity with the own set off in % of that before, and with random sets, on a log axis."""
    names = texts(table, "relation")
    before, own = table.floats("before"), table.floats("own")
    ratio, low, high = (100 * table.floats(f"ratio{end}") for end in ("", "_low", "_high"))
    random = 100 * table.floats("random") / before
    least, most = kit.ends(ratio, low, high, random, 90, 110)
    limits = 0.93 * least, 1.07 * most
    y = np.arange(len(names))
    with kit.figure() as fig:
        ax = kit.rows_axes(fig, names)
        ax.set(xscale="log", xlim=limits, xlabel="perplexity, % of that before")
        ax.set_xticks([], minor=True)
        ticks = _log_ticks(*limits)
        ax.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        ax.hlines(y, *limits, color=kit.LINE, lw=0.6)
        ax.axvline(100, color=kit.MUTED, lw=0.8)
        ax.plot(random, y, "s", color=kit.RANDOM, ms=5.5)
        ax.hlines(y, low, high, color=kit.OFF, lw=6, alpha=0.35)
        ax.plot(ratio, y, "o", color=kit.OFF, ms=6)
        notes = [f"{_ppl(b)} → {_ppl(a)}" for b, a in zip(before, own, strict=True)]
        kit.beside(ax, "before → off", notes)
        marks = [kit.mark("own neurons off", c=kit.OFF)]
        marks.append(kit.mark("95 % interval", c=kit.OFF, alpha=0.35, lw=6, ls="-", marker=""))
        if np.isfinite(random).any():
            marks.append(kit.mark("random neurons off", marker="s", ms=5.5, c=kit.RANDOM))
        kit.legend(fig, marks, kit.ROW * len(names) + 0.4)
        return kit.inline(fig, "perplexity", "Perplexity of neutral sentences", table)


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


def resilience_plot(table: Table) -> kit.Drawing:
    """How many facts outlive their set, and how sure the model was of both kinds before."""
    names = texts(table, "relation")
    y = np.arange(len(names))
    kept, lost = table.floats("n_resilient"), table.floats("n_sensitive")
    total = np.where(kept + lost > 0, kept + lost, np.nan)
    share = 100 * lost / total
    with kit.figure() as fig:
        ax = kit.rows_axes(fig, names, width=2.2)
        ax.barh(y, np.where(np.isnan(share), 0, share), height=0.55, color=kit.OFF)
        ax.barh(y, np.nan_to_num(100 - share), 0.55, np.nan_to_num(share), color=kit.RANDOM)
        ax.set(xlim=(0, 100), xticks=(0, 50, 100), xlabel="facts answered before, %")
        notes = [f"{kit.whole(b)} of {kit.whole(b + a)}" for a, b in zip(kept, lost, strict=True)]
        kit.beside(ax, "lost", notes)
        right = kit.rows_axes(fig, names, left=3.3, width=2.2, named=False)
        logprobs = [table.floats(f"logprob_{kind}") for kind in ("resilient", "sensitive")]
        least = kit.ends(*logprobs, -0.1)[0]
        right.hlines(y, least, 0, color=kit.LINE, lw=0.6)
        right.plot(logprobs[0], y, "o", **kit.BEFORE, ms=7, clip_on=False)
        right.plot(logprobs[1], y, "o", color=kit.OFF, ms=6, clip_on=False)
        right.set(xlim=(least, 0), xlabel="mean log-probability before, nats")
        right.locator_params(axis="x", nbins=4)
        marks = [Patch(color=kit.OFF, label="lost"), Patch(color=kit.RANDOM, label="kept")]
        kit.legend(fig, marks, kit.ROW * len(names) + 0.4)
        dots = [kit.mark("lost", c=kit.OFF), kit.mark("kept", **kit.BEFORE)]
        kit.legend(fig, dots, kit.ROW * len(names) + 0.4, left=3.3)
        return kit.inline(
            fig, "resilience", "Facts that outlive their set and facts that do not", table
        )


def errors_plot(table: Table) -> kit.Drawing:
    """What lost answers become, by kind; beside it the most common wrong answer."""
    names = texts(table, "relation")
    y = np.arange(len(names))
    with kit.figure() as fig:
        ax = kit.rows_axes(fig, names, width=4.2)
        left = np.zeros(len(names))
        looks: dict[str, dict[str, Any]] = {
            kind: {"fc": colour, "hatch": hatch, "ec": kit.LIGHT, "lw": 0}
            for kind, (_, colour, hatch) in ERROR_TITLES.items()
        }
        for kind, look in looks.items():
            n = table.floats(kind)
            ax.barh(y, n, height=0.55, left=left, **look)
            left = left + n
        ax.set(xlim=(0, max(1, left.max())), xlabel="answers lost")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        said = zip(texts(table, "most_common"), table.column("n_most_common"), strict=True)
        notes = [f"{_quoted(text)} ×{n}" if n else "–" for text, n in said]
        kit.beside(ax, "most common", notes)
        kit.legend(
            fig,
            [Patch(label=ERROR_TITLES[kind][0], **look) for kind, look in looks.items()],
            kit.ROW * len(names) + 0.4,
        )
        return kit.inline(fig, "errors", "What lost answers become", table)


def _quoted(text: str) -> str:
    text = visible(text.strip()) or percent(math.nan)
    return f"“{text if len(text) <= 24 else text[:23] + '…'}”"


METHOD_TITLES = {"ap": "found by average precision", "gain": "found by gain"}


def gain_plot(table: Table) -> kit.Drawing:
    """Drops of each relation and of the others, with the AP set off and with the gain set off."""
    relations = list(dict.fromkeys(str(name) for name in table.column("relation")))
    names = ("drop", "drop_low", "drop_high", "others_drop")
    least = kit.ends(*(100 * table.floats(name) for name in names), 0.0)[0]
    with kit.figure() as fig:
        for place, (method, title) in enumerate(METHOD_TITLES.items()):
            part = table.where("method", method)
            y = [relations.index(str(name)) for name in part.column("relation")]
            own, low, high, others = (100 * part.floats(name) for name in names)
            ax = kit.rows_axes(fig, relations, left=place * 2.6, width=2.3, named=place == 0)
            ax.hlines(range(len(relations)), least, 100, color=kit.LINE, lw=0.6)
            ax.axvline(0, color=kit.MUTED, lw=0.8)
            ax.hlines(y, low, high, color=kit.OFF, lw=6, alpha=0.35)
            ax.plot(others, y, **OTHERS, clip_on=False)
            ax.plot(own, y, "o", color=kit.OFF, ms=6, clip_on=False)
            ax.set(xlim=(least, 100), xticks=(0, 50, 100), xlabel="accuracy lost, %")
            ax.set_title(title, loc="left", fontsize=9, fontweight="bold")
        marks = [kit.mark("the relation itself", c=kit.OFF)]
        if np.isfinite(table.floats("drop_low")).any():
            marks.append(
                kit.mark("its 95 % interval", c=kit.OFF, alpha=0.35, lw=6, ls="-", marker="")
            )
        kit.legend(
            fig, [*marks, kit.mark("mean of the others", **OTHERS)], kit.ROW * len(relations) + 0.45
        )
        return kit.inline(
            fig, "gain", "Accuracy drop under sets by average precision and by gain", table
        )
