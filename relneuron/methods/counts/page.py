"""The report's sections on a corpus study; methods/counts/report.py has its first words.

Every sentence is made from the tables, and what the study has no data for has no section.
arXiv 2402.16438 (LAPE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from relneuron.analyses import figures as draw
from relneuron.analyses.overlap import VERSATILITY
from relneuron.methods.counts import figures as draw_groups
from relneuron.methods.counts.study import GroupStudy, NllCell, rise
from relneuron.methods.counts.tables import layer_counts, neuron_table
from relneuron.report import kit as figures
from relneuron.report.kit import MOST, SURE, ends, every, floats, short
from relneuron.report.parts import Section, n_of
from relneuron.report.tables import Table, percent, significant

METHODS = {
    "lape": "activation probability entropy (LAPE)",
    "probability": "activation probability",
    "mean": "mean activation",
    "random": "chance",
    "imported": "others (imported)",
}
SHOWN = 10  # neurons of each set that the page shows
MOST_CELLS = 60_000  # in the page's tables of neurons: about 1 MB

Tables = Mapping[str, Table]


def nats(value: float) -> str:
    """A number of nats to two decimals, a small one to two digits."""
    is_plain = abs(value) >= 0.1 or not np.isfinite(value) or value == 0
    text = f"{value + 0.0:,.2f}" if is_plain else f"{value:.2g}"
    return text.replace("-", "−") if np.isfinite(value) else "–"


def changed(value: float) -> str:
    verb = "rises" if value > 0 else "falls"
    return f"{verb} by {nats(abs(value))} nats" if value else "stays the same"


def threshold(study: GroupStudy) -> str:
    asked = study.manifest["stages"].get("count", {}).get("inputs", {})
    value = asked.get("threshold", study.manifest.get("threshold"))
    return f", active above {value:g}" if isinstance(value, int | float) else ""


def thinned(n: int) -> str:
    """What a picture of n rows leaves out, for the words below it; nothing where it has room."""
    if n <= MOST:
        return ""
    return (
        f" Of {n:,} rows there is room for the colours, and for the name of every "
        f"{every(n)}{'nd' if every(n) == 2 else 'rd' if every(n) == 3 else 'th'}; the table has "
        "every number."
    )


def greatest(table: Table, name: str, n: int) -> Table:
    """The n rows with the greatest numbers in a column, in the table's order."""
    values = floats(table, name)
    order = np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable")
    return table._replace(rows=[table.rows[i] for i in sorted(order[:n].tolist())])


# Sections


def scores(study: GroupStudy, tables: Tables) -> list[Section]:
    """The histogram of the entropies, or of what the method scores with."""
    if "entropy" in tables:
        return [_entropies(study, tables["entropy"])]
    if "scores" not in tables:
        return []
    table, name = tables["scores"], METHODS.get(study.method, study.method)
    low, high = ends(floats(table, "from"), floats(table, "to"))
    return [
        Section(
            "scores",
            "The scores of the chosen neurons",
            f"How far apart are the neurons by {name}?",
            [f"Scores go from {significant(low)} to {significant(high)}."],
            "A neuron that is in several sets counts in each.",
            [draw_groups.histogram_plot(table, [], "score")],
            [("scores", table)],
        )
    ]


def _entropies(study: GroupStudy, table: Table) -> Section:
    n, groups, highest = study.n_neurons, study.entropy_groups, study.highest_entropy
    seen = []
    if study.candidates is not None:
        filtered = n - int(study.candidates.sum())
        seen.append(
            f"{filtered:,} of {n:,} neurons ({percent(filtered / n)}) were left out: in no group "
            "are they active more often than the threshold, "
            f"{percent(study.selected('threshold'))} of the tokens."
        )
    marks = [(highest, f"ln {groups} = {highest:.2f}")]
    if (chosen := study.chosen_entropies).size:
        cut = float(chosen.max())
        seen.append(
            f"The {n_of(chosen.size, 'chosen neuron')} have entropies up to {cut:.3g} nats; evenly "
            f"active in all groups would be ln {groups} = {highest:.3g}."
        )
        marks.append((cut, f"cut {cut:.3g}"))
    return Section(
        "entropy",
        "How specific neurons are",
        "Are neurons active in one group only, or evenly in all?",
        seen,
        "Entropy of a neuron's activation probabilities, made to sum to 1 over the groups: 0 is "
        "active in one group only (or never), ln of the number of groups is evenly active. "
        "Number of neurons on a log axis; each colour is a part of the one behind it.",
        [draw_groups.histogram_plot(table, marks, "entropy, nats")],
        [("entropy", table)],
    )


def layers(study: GroupStudy, tables: Tables) -> list[Section]:
    if not study.times:
        return []
    count, distinct = layer_counts(study)
    n, top = len(study.times), int(distinct.argmax())
    seen = [f"Most are in layer {top}: {distinct[top]:,} of {n:,} ({percent(distinct[top] / n)})."]
    if (quarter := study.n_layers // 4) > 1:
        first, last = (percent(int(x.sum()) / n) for x in (distinct[:quarter], distinct[-quarter:]))
        seen.append(
            f"The first {quarter} of {study.n_layers} layers hold {first}, the last {quarter} "
            f"{last}."
        )
    if empty := [f"“{short(name)}”" for name, chosen in study.sets.items() if not chosen]:
        seen.append(f"No neurons: {', '.join(empty)}.")
    return [
        Section(
            "layers",
            "Where the chosen neurons are",
            "In which layers are the neurons of a group?",
            seen,
            "Bars: neurons of any group, each once. Squares: one group; the colour goes with the "
            f"square root of the number.{thinned(len(study.sets))}",
            [draw_groups.group_layers_plot(count, distinct, list(study.sets))],
            [("layers", tables["layers"])],
        )
    ]


def shared(study: GroupStudy, tables: Tables) -> list[Section]:
    if "overlap" not in tables:
        return []
    pairs, times = tables["overlap"], tables["multiplicity"]
    total, single = len(study.times), sum(n == 1 for n in study.times.values())
    seen = [
        f"{single:,} of {n_of(total, 'chosen neuron')} ({percent(single / total)}) are in one "
        "group only."
    ]
    best = max((row for row in pairs.rows if row[0] != row[1]), key=lambda row: float(row[2]))
    if best[2]:
        a, b = short(str(best[0])), short(str(best[1]))
        seen.append(
            f"Most shared: {best[2]:,}, by “{a}” and “{b}” ({percent(float(best[4]))} of those in "
            "either)."
        )
    # The figures know these columns by the names that a study of relations has for them.
    plots = [
        figures.overlap_heatmap(pairs._replace(columns=["relation", *pairs.columns[1:]])),
        draw_groups.jaccard_heatmap(pairs),
        draw.versatility_plot(times._replace(columns=VERSATILITY)),
    ]
    return [
        Section(
            "overlap",
            "What groups share",
            "Is a neuron of one group also one of another?",
            seen,
            "First: neurons that two groups have in common; the frames hold the sizes of the sets; "
            "bold: more than two random sets would share (hypergeometric test, q ≤ "
            f"{SURE}). Second: the same in % of the neurons in either (Jaccard index). Last: "
            f"chosen neurons by the number of groups they are in.{thinned(len(study.sets))}",
            plots,
            [("overlap", pairs), ("multiplicity", times)],
        )
    ]


def nll(study: GroupStudy, tables: Tables) -> list[Section]:
    if not study.cells:
        return []
    rises, table = tables["rises"], tables["nll"]
    kinds = (
        ("a group whose own neurons are off", study.own),
        ("another group", study.others),
        ("any group, with random neurons off,", study.random),
    )
    seen = [_risen(text, cells) for text, cells in kinds if np.isfinite(rise(cells).mean)]
    if empty := sum(not chosen for chosen in study.sets.values()):
        seen.append(f"Left out of the means: {n_of(empty, 'set')} without neurons.")
    if broken := sum(c.n_windows > 0 and not np.isfinite(c.nll) for c in study.cells):
        seen.append(f"{n_of(broken, 'cell')} without a finite NLL: left out of the means.")
    if not any(np.isfinite(cell.p_value) for cell in study.cells):
        seen.append("No windows belong to these numbers, so nothing says how sure they are.")
    drawn = greatest(rises, "own", MOST)
    if len(drawn.rows) < len(rises.rows):
        seen.append(
            f"Drawn one by one: the {MOST} of {len(rises.rows):,} sets whose own text rises most."
        )
    drawings = [draw_groups.rises_plot(drawn)] if drawn.rows else []
    if any(np.isfinite(cell.rise) for cell in study.cells):
        drawings.append(draw_groups.rise_heatmap(table.where("is_clean", 0), SURE))
    return [
        Section(
            "nll",
            "What it costs to switch them off",
            "Is the text of a group less probable without its neurons, and is only that?",
            seen,
            "Rise: mean over windows of the NLL with the neurons off less that of the same window "
            "with the model as it is, in nats per token; ± its standard error. Matrix: a row is "
            "the set that was off, a column the text; frames: a group's own text. Bold: beyond "
            "chance (Wilcoxon's signed-rank test over windows, which count as independent; "
            f"Benjamini–Hochberg over the matrix, q ≤ {SURE}).{thinned(len(study.groups))}",
            drawings,
            [(name, tables[name]) for name in ("clean", "rises", "nll")],
            open=1,
        )
    ]


def _risen(text: str, cells: Sequence[NllCell]) -> str:
    found = rise(cells)
    said = f"The NLL of the text of {text} {changed(found.mean)}"
    if nats(found.low) != nats(found.high):
        said += f" on average, from {nats(found.low)} to {nats(found.high)}"
    if not any(np.isfinite(cell.p_value) for cell in cells):
        return f"{said}."
    sure = [cell.rise for cell in cells if cell.q_value <= SURE]
    up, down = sum(value > 0 for value in sure), sum(value < 0 for value in sure)
    n = sum(np.isfinite(cell.rise) for cell in cells)
    return f"{said}; of {n_of(n, 'cell')} {up:,} up and {down:,} down beyond chance."


def neurons(study: GroupStudy, _: Tables) -> list[Section]:
    """The best neurons of each set, a table for each."""
    filled = [name for name, chosen in study.sets.items() if chosen]
    if not filled:
        return []
    n_filled = len(filled)
    if n_filled > MOST:
        largest = sorted(filled, key=lambda name: -len(study.sets[name]))[:MOST]
        filled = [name for name in filled if name in largest]
    n_columns = len(neuron_table(study, [], "", SHOWN).columns)
    most = max(SHOWN, MOST_CELLS // (n_columns * len(filled)))
    seen = [f"The first {SHOWN} of each group; the file beside them has more."]
    if (longest := max(map(len, study.sets.values()))) > most:
        seen = [
            f"The first {SHOWN} of each group; the file beside them has the best {most:,} (the "
            f"longest set has {longest:,}), analyses/neurons.csv all."
        ]
    if n_filled > MOST:
        seen.append(f"Shown: the {MOST} largest of {n_filled:,} sets; all in analyses/neurons.csv.")
    best = [
        (f"neurons.{place:02d}", neuron_table(study, [name], f"best of “{short(name)}”", most))
        for place, name in enumerate(filled, 1)
    ]
    score = "its entropy in nats (low is specific)" if study.method == "lape" else "its score"
    return [
        Section(
            "neurons",
            "The best neurons of each group",
            "How often are they active in each group?",
            seen,
            f"score: {score}; groups: in how many sets it is; p(group): the share of the group's "
            "tokens that it is active at; of many groups its own, and the other one with the "
            "highest share.",
            tables=best,
            most=SHOWN,
            open=1,
        )
    ]


def counted(study: GroupStudy, tables: Tables) -> list[Section]:
    """What was counted in each group, and how much of it the sets are."""
    seen = [f"Site {study.activity.site}{threshold(study)}."] if study.activity else []
    if total := sum(study.dropped.values()):
        seen.append(f"{n_of(total, 'token')} of windows that were not full were not counted.")
    bounds = {
        "threshold": "A neuron is left out that is in no group active at more than",
        "bar": "A chosen neuron belongs to the groups where it is active at more than",
    }
    for key, text in bounds.items():
        if np.isfinite(value := study.selected(key)):
            seen.append(f"{text} {percent(value)} of the tokens ({key}).")
    shown = [(name, tables[name]) for name in ("groups", "names") if name in tables]
    question = "How much text is behind the numbers, and where are the lines drawn?"
    return [Section("counted", "What was counted", question, seen, tables=shown, open=1)]
