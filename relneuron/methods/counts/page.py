"""The page on a corpus study: which neurons are specific to a group, and what they carry.

`study.PAGE` names `build`. Every sentence is made from the tables, and what the study has no data
for has no section. arXiv 2402.16438 (LAPE).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from relneuron.analyses import figures as draw
from relneuron.artifact.modules import module_layers
from relneuron.methods.counts import METHOD
from relneuron.methods.counts import figures as draw_groups
from relneuron.methods.counts.rises import NllCells
from relneuron.methods.counts.study import GroupStudy, read_group_study, rise
from relneuron.methods.counts.tables import (
    greatest,
    group_tables,
    layer_counts,
    neuron_table,
    with_short_names,
)
from relneuron.report import figures, kit
from relneuron.report.page import Page, Section, Tile
from relneuron.report.tables import NBSP, Table, amount, listed, n_of, nats, percent, significant

# Of the rankings that choose neurons, and where none of ours did.
TITLES = {ranking.name: ranking.title for ranking in METHOD.rankings}
TITLES["imported"] = "others (imported)"
SHOWN = 10  # neurons of each set that the page shows
MOST_CELLS = 60_000  # in the page's tables of neurons: about 1 MB

STYLE = """\
.data tbody th { white-space: normal; overflow-wrap: anywhere; }
.data thead th { white-space: normal; overflow-wrap: break-word; max-width: 16rem; }
.data .text { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; max-width: 16rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }"""

Tables = Mapping[str, Table]


def build(folder: Path, titles: Mapping[str, str]) -> Page:
    return page(read_group_study(folder))


def page(study: GroupStudy) -> Page:
    model = study.model.get("id") or (study.manifest.get("model") or {}).get("id")
    model = model or "an unnamed model"
    tables = group_tables(study)
    shown, names = with_short_names(study)
    seen = tables
    if names:
        rows = [list(row) for row in names.items()]
        cut = Table("Groups whose names are cut here", ["group", "name"], rows)
        seen = group_tables(shown) | {"names": cut}
    makers = (scores, layers, shared, nll, neurons, counted)
    return Page(
        title=f"Group-specific neurons of {model}",
        facts=facts(study),
        question=f"Does the model {model} have neurons that are active in the text of one group "
        "and hardly in that of others, and does that text need them?",
        answer=answer(study),
        tiles=tiles(study),
        sections=[section for make in makers if (section := make(shown, seen))],
        tables=tables,
        manifest=study.manifest,
        style=STYLE,
    )


# The first words


def facts(study: GroupStudy) -> str:
    found = [n_of(len(study.groups), "group")]
    if study.activity:
        found.append(f"site {study.activity.site}{threshold(study)}")
    if study.method:
        found.append(f"chosen by {TITLES.get(study.method, study.method)}")
    if study.cells.is_clean.any():
        n_windows = int(study.cells.n_windows[study.cells.is_clean].sum())
        found.append(f"NLL over {n_of(n_windows, 'window')}")
    return " · ".join(found)


def answer(study: GroupStudy) -> str:
    """The answer to the question, in one sentence."""
    text = n_of(len(study.groups), "group")
    if study.counts:
        text += f", {amount(int(study.counts.tokens.sum()))} tokens"
    if study.neurons is None:
        return f"{text}: no neurons are chosen yet."
    if not study.times:
        return f"{text}: no neuron was chosen for any group."
    are = "is" if len(study.times) == 1 else "are"
    kind = "specific to" if study.method == "lape" else "chosen for"
    share = f"{100 * len(study.times) / study.n_neurons:.2f}{NBSP}%"
    text += f": {len(study.times):,} of {study.n_neurons:,} neurons ({share}) {are} {kind} a group"
    own, others = rise(study.own).mean, rise(study.others).mean
    if np.isfinite(own):
        text += f"; without a group's own neurons the NLL of its text {changed(own)}"
        text += f", that of the other groups {_by(own, others)}" if np.isfinite(others) else ""
    elif np.isfinite(others):
        text += f"; without a group's neurons the NLL of other text {changed(others)}"
    return f"{text}."


def tiles(study: GroupStudy) -> list[Tile]:
    found = [Tile("groups", f"{len(study.groups):,}", "")]
    if study.counts:
        least, most = int(study.counts.tokens.min()), int(study.counts.tokens.max())
        span = " to ".join(dict.fromkeys(map(amount, (least, most))))
        found.append(Tile("tokens", amount(int(study.counts.tokens.sum())), f"{span} a group"))
    if study.neurons:
        sizes = [len(chosen) for chosen in study.sets.values()] or [0]
        span = " to ".join(dict.fromkeys(f"{n:,}" for n in (min(sizes), max(sizes))))
        found.append(Tile("neurons chosen", f"{len(study.times):,}", f"{span} a group"))
        several = sum(n > 1 for n in study.times.values())
        share = percent(several / len(study.times)) if study.times else "none chosen"
        found.append(Tile("in more than one group", f"{several:,}", share))
    kinds = (
        ("rise of its own text", study.own),
        ("rise of the others", study.others),
        ("rise with random neurons", study.random),
    )
    for title, cells in kinds:
        if np.isfinite((over := rise(cells)).mean):
            span = " to ".join(dict.fromkeys(map(nats, (over.low, over.high))))
            span += f" over {n_of(len(cells), 'cell')}"
            found.append(Tile(f"{title}, nats", nats(over.mean), span, cells is study.own))
    return found


def _by(own: float, others: float) -> str:
    """The others' change, with a verb only if it goes the other way."""
    return f"by {nats(others)}" if own > 0 < others else changed(others)


def changed(value: float) -> str:
    verb = "rises" if value > 0 else "falls"
    return f"{verb} by {nats(abs(value))} nats" if value else "stays the same"


def threshold(study: GroupStudy) -> str:
    asked = study.manifest["stages"].get("count", {}).get("inputs", {})
    value = asked.get("threshold", study.manifest.get("threshold"))
    return f", active above {value:g}" if isinstance(value, int | float) else ""


def thinned(n: int) -> str:
    """What a picture of n rows leaves out, for the words below it; nothing where it has room."""
    if n <= kit.MOST:
        return ""
    step = kit.every(n)
    return (
        f" Of {n:,} rows there is room for the colours, and for the name of every "
        f"{step}{'nd' if step == 2 else 'rd' if step == 3 else 'th'}; the table has every number."
    )


# Sections


def scores(study: GroupStudy, tables: Tables) -> Section | None:
    """The histogram of the entropies, or of what the method scores with."""
    if "entropy" in tables:
        return _entropies(study, tables["entropy"])
    if "scores" not in tables:
        return None
    table, name = tables["scores"], TITLES.get(study.method, study.method)
    low, high = kit.ends(table.floats("from"), table.floats("to"))
    return Section(
        "scores",
        "The scores of the chosen neurons",
        f"How far apart are the neurons by {name}?",
        [f"Scores go from {significant(low)} to {significant(high)}."],
        "A neuron that is in several sets counts in each.",
        [draw_groups.histogram_plot(table, [], "score")],
        [("scores", table)],
    )


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


def layers(study: GroupStudy, tables: Tables) -> Section | None:
    if not study.times:
        return None
    count, distinct = layer_counts(study)
    n, top = len(study.times), int(distinct.argmax())
    name = study.layer_names[top]
    seen = [f"Most are in layer {name}: {distinct[top]:,} of {n:,} ({percent(distinct[top] / n)})."]
    if "modules" in study.model:
        parts = module_layers(study.model).items()
        held = (f"{name} {int(distinct[own.start : own.stop].sum()):,}" for name, own in parts)
        seen.append(f"By module: {', '.join(held)}.")
    elif (quarter := study.n_layers // 4) > 1:
        first, last = (percent(int(x.sum()) / n) for x in (distinct[:quarter], distinct[-quarter:]))
        seen.append(
            f"The first {quarter} of {study.n_layers} layers hold {first}, the last {quarter} "
            f"{last}."
        )
    if empty := [f"“{kit.short(name)}”" for name, chosen in study.sets.items() if not chosen]:
        seen.append(f"No neurons: {listed(empty)}.")
    return Section(
        "layers",
        "Where the chosen neurons are",
        "In which layers are the neurons of a group?",
        seen,
        "Bars: neurons of any group, each once. Squares: one group; the colour goes with the "
        f"square root of the number.{thinned(len(study.sets))}",
        [draw_groups.group_layers_plot(count, distinct, list(study.sets), study.layer_names)],
        [("layers", tables["layers"])],
    )


def shared(study: GroupStudy, tables: Tables) -> Section | None:
    if "overlap" not in tables:
        return None
    pairs, times = tables["overlap"], tables["multiplicity"]
    total, single = len(study.times), sum(n == 1 for n in study.times.values())
    seen = [
        f"{single:,} of {n_of(total, 'chosen neuron')} ({percent(single / total)}) are in one "
        "group only."
    ]
    most = pairs.floats("shared")
    most[:: len(study.sets) + 1] = -1  # of a set with itself
    best = pairs.rows[int(most.argmax())]
    if best[2]:
        a, b = kit.short(str(best[0])), kit.short(str(best[1]))
        seen.append(
            f"Most shared: {best[2]:,}, by “{a}” and “{b}” ({percent(float(best[4]))} of those in "
            "either)."
        )
    plots = [
        figures.overlap_heatmap(pairs, "group"),
        draw_groups.jaccard_heatmap(pairs),
        draw.versatility_plot(times),
    ]
    return Section(
        "overlap",
        "What groups share",
        "Is a neuron of one group also one of another?",
        seen,
        "First: neurons that two groups have in common; the frames hold the sizes of the sets; "
        "bold: more than two random sets would share (hypergeometric test, Benjamini–Hochberg, q ≤ "
        f"{kit.SURE}). Second: the same in % of the neurons in either (Jaccard index). Last: "
        f"chosen neurons by the number of groups they are in.{thinned(len(study.sets))}",
        plots,
        [("overlap", pairs), ("multiplicity", times)],
    )


def nll(study: GroupStudy, tables: Tables) -> Section | None:
    if not study.cells:
        return None
    rises, table = tables["rises"], tables["nll"]
    kinds = (
        ("a group whose own neurons are off", study.own),
        ("another group", study.others),
        ("any group, with random neurons off,", study.random),
    )
    seen = [_risen(text, cells) for text, cells in kinds if np.isfinite(rise(cells).mean)]
    if empty := sum(not chosen for chosen in study.sets.values()):
        seen.append(f"Left out of the means: {n_of(empty, 'set')} without neurons.")
    cells = study.cells
    if broken := int(((cells.n_windows > 0) & ~np.isfinite(cells.nll)).sum()):
        seen.append(f"{n_of(broken, 'cell')} without a finite NLL: left out of the means.")
    if not np.isfinite(cells.p_value).any():
        seen.append("No windows belong to these numbers, so nothing says how sure they are.")
    drawn = greatest(rises, "own", kit.MOST)
    if len(drawn.rows) < len(rises.rows):
        seen.append(
            f"Drawn one by one: the {len(drawn.rows)} of {len(rises.rows):,} sets whose own text "
            "rises most."
        )
    drawings = [draw_groups.rises_plot(drawn)] if drawn.rows else []
    if np.isfinite(cells.rise).any():
        drawings.append(draw_groups.rise_heatmap(table.where("is_clean", 0), kit.SURE))
    return Section(
        "nll",
        "What it costs to switch them off",
        "Is the text of a group less probable without its neurons, and is only that?",
        seen,
        "Rise: mean over windows of the NLL with the neurons off less that of the same window "
        "with the model as it is, in nats per token; ± its standard error. Matrix: a row is "
        "the set that was off, a column the text; frames: a group's own text. Bold: beyond "
        "chance (Wilcoxon's signed-rank test over windows, which count as independent; "
        f"Benjamini–Hochberg over the matrix, q ≤ {kit.SURE}).{thinned(len(study.groups))}",
        drawings,
        [(name, tables[name]) for name in ("clean", "rises", "nll")],
        open=1,
    )


def _risen(text: str, cells: NllCells) -> str:
    found = rise(cells)
    said = f"The NLL of the text of {text} {changed(found.mean)}"
    if nats(found.low) != nats(found.high):
        said += f" on average, from {nats(found.low)} to {nats(found.high)}"
    if not np.isfinite(cells.p_value).any():
        return f"{said}."
    sure = cells.rise[cells.q_value <= kit.SURE]
    up, down, n = (int(some.sum()) for some in (sure > 0, sure < 0, np.isfinite(cells.rise)))
    return f"{said}; of {n_of(n, 'cell')} {up:,} up and {down:,} down beyond chance."


def neurons(study: GroupStudy, _: Tables) -> Section | None:
    """The best neurons of each set, a table for each."""
    filled = [name for name, chosen in study.sets.items() if chosen]
    if not filled:
        return None
    n_filled = len(filled)
    if n_filled > kit.MOST:
        largest = sorted(filled, key=lambda name: -len(study.sets[name]))[: kit.MOST]
        filled = [name for name in filled if name in largest]
    n_columns = len(neuron_table(study, [], "", SHOWN).columns)
    most = max(SHOWN, MOST_CELLS // (n_columns * len(filled)))
    seen = [f"The first {SHOWN} of each group; the file beside them has more."]
    if (longest := max(map(len, study.sets.values()))) > most:
        seen = [
            f"The first {SHOWN} of each group; the file beside them has the best {most:,} (the "
            f"longest set has {longest:,}), analyses/neurons.csv all."
        ]
    if n_filled > kit.MOST:
        seen.append(
            f"Shown: the {kit.MOST} largest of {n_filled:,} sets; all in analyses/neurons.csv."
        )
    best = [
        (f"neurons.{place:02d}", neuron_table(study, [name], f"best of “{kit.short(name)}”", most))
        for place, name in enumerate(filled, 1)
    ]
    score = "its entropy in nats (low is specific)" if study.method == "lape" else "its score"
    return Section(
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


def counted(study: GroupStudy, tables: Tables) -> Section | None:
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
    chosen = study.neurons.selection.get("modules", {}) if study.neurons else {}
    for name, facts in chosen.items() if isinstance(chosen, dict) else ():
        lines = (f"{key} {percent(facts[key])}" for key in bounds if facts.get(key) is not None)
        if said := ", ".join(lines):
            seen.append(f"Of {name}: {said}.")
    shown = [(name, tables[name]) for name in ("groups", "names") if name in tables]
    question = "How much text is behind the numbers, and where are the lines drawn?"
    return Section("counted", "What was counted", question, seen, tables=shown, open=1)
