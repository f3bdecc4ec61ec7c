"""The page on facts: which neurons answer them, how many, how consistently, and what they do.

`study.PAGE` names `build`. Every sentence is made from the tables, and what the folder has no data
for has no section.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from relneuron.analyses.changes import ALL
from relneuron.methods.gradients import figures as draw
from relneuron.methods.gradients.study import FactStudy, read_fact_study
from relneuron.methods.gradients.tables import fact_tables, layer_counts, of_facts
from relneuron.report import figures
from relneuron.report.page import Page, Section, Tile
from relneuron.report.tables import Share, Table, n_of, percent, significant

Tables = Mapping[str, Table]


def build(folder: Path, titles: Mapping[str, str]) -> Page:
    study = read_fact_study(folder)
    tables = fact_tables(study)
    model = study.neurons.model.get("id") or "an unnamed model"
    title = titles.get(study.neurons.method, study.neurons.method)
    makers = (_changes, _sizes, _layers, _consistency, _completeness)
    n_prompts = int(of_facts(study.facts, "n_prompts").sum())
    found = [
        n_of(len(study.facts), "fact"),
        n_of(n_prompts, "prompt"),
        n_of(len(tables["relations"].rows), "relation"),
        title,
    ]
    return Page(
        title=f"Which neurons answer the facts of {model}",
        facts=" · ".join(found),
        question=f"Which neurons of the model {model} raise the probability of a fact's answer, "
        "and does it change with them, and only with them?",
        answer=_answer(study),
        tiles=_tiles(study, title),
        sections=[section for make in makers if (section := make(study, tables))],
        tables=tables,
        manifest=study.manifest,
    )


# The first words


def _overall(study: FactStudy) -> dict[str, float]:
    """The last row of the changes, that of all relations."""
    assert study.changes is not None
    names = study.changes.columns[1:]
    return dict(zip(names, map(float, study.changes.rows[-1][1:]), strict=True))


def _acting(study: FactStudy) -> str:
    """What was done to the neurons, and where."""
    mode, factor = study.off.get("mode", "zero"), study.off.get("factor")
    text = f"times {factor:g}" if mode == "scale" and factor is not None else f"set to {mode}"
    where = {"last": "at the last token of the prompt", "prompt": "at the prompt's tokens"}
    return f"{text} {where.get(study.off.get('positions', 'all'), 'at all tokens')}"


def _answer(study: FactStudy) -> str:
    sizes = of_facts(study.facts, "n_neurons")
    text = f"A fact has {significant(float(sizes.mean()), 3)} neurons on average"
    if study.changes is None:
        return f"{text}; nothing was switched off."
    found = _overall(study)
    text += (
        f"; with them {_acting(study)} its answer's probability changes by "
        f"{_signed(found['related_change'])}, that of other facts by "
        f"{_signed(found['unrelated_change'])}"
    )
    if math.isfinite(found["matched"]):
        text += f"; with random neurons by {_signed(found['matched'])}"
    return f"{text}."


def _signed(value: float) -> str:
    return f"+{percent(value)}" if value > 0 else percent(value)


def _tiles(study: FactStudy, title: str) -> list[Tile]:
    sizes = of_facts(study.facts, "n_neurons")
    tiles = [
        Tile("facts", f"{len(study.facts):,}", title),
        Tile("neurons of a fact", significant(float(sizes.mean()), 3), f"at most {sizes.max():g}"),
    ]
    if study.changes is not None:
        found = _overall(study)
        for name, words in (("related", "on their own facts"), ("unrelated", "on other facts")):
            ends = [found[f"{name}_change_{end}"] for end in ("low", "high")]
            small = " to ".join(map(percent, ends)) if all(map(math.isfinite, ends)) else ""
            value = _signed(found[f"{name}_change"])
            tiles.append(Tile(f"change {words}", value, small, name == "related"))
    return tiles


# Sections


def _changes(study: FactStudy, tables: Tables) -> Section | None:
    if study.changes is None:
        return None
    found, n = _overall(study), len(study.changes.rows)
    seen = [
        f"Sets of {significant(found['n_neurons'], 3)} neurons on average, {_acting(study)}; "
        f"{int(found['n_related']):,} answers of what they are about, "
        f"{int(found['n_unrelated']):,} of others.",
        f"Right answers: {percent(found['related_before'])} before, "
        f"{percent(found['related_after'])} after; of others {percent(found['unrelated_before'])} "
        f"and {percent(found['unrelated_after'])}.",
    ]
    if math.isfinite(found["pcr"]):
        seen.append(f"The change on the own prompts is {found['pcr']:.3g} times that on others.")
    if math.isfinite(found["related_flips"]):
        others = found["unrelated_flips"]
        flips = f"Another option is the most probable one in {percent(found['related_flips'])}"
        seen.append(
            flips + (f", of others in {percent(others)}." if math.isfinite(others) else ".")
        )
    last = study.changes.rows[-1][0]
    return Section(
        "changes",
        "What the neurons do to the answers",
        "Does the probability of the right answer change with the neurons, and only on the facts "
        "that they are about?",
        seen,
        "Mean over prompts of (P with the neurons changed − P) / P. Other prompts: of other "
        "relations. Intervals: bootstrap over facts. PCR: the change on own prompts over that on "
        "others, without signs (arXiv 2406.10868)."
        + (f" The row “{ALL}” has all sets." if last == ALL and n > 1 else ""),
        [draw.changes_plot(study.changes)],
        [("changes", tables["changes"])],
    )


def _sizes(study: FactStudy, tables: Tables) -> Section:
    sizes = of_facts(study.facts, "n_neurons")
    each = float(of_facts(study.facts, "n_of_prompt").mean())
    seen = [
        f"{significant(float(sizes.mean()), 3)} neurons of a fact on average, median "
        f"{np.median(sizes):g}, at most {sizes.max():g}; "
        f"{n_of(int((sizes == 0).sum()), 'fact')} without any.",
        f"One prompt alone has {significant(each, 3)}.",
    ]
    if "share" in study.how:
        seen.append(f"A neuron is in more than {percent(study.how['share'])} of a fact's prompts.")
    if study.how.get("common_neurons"):
        n = n_of(int(study.how["common_neurons"]), "neuron")
        seen.append(f"{n} are in the clusters of so many queries that they count as common.")
    return Section(
        "sizes",
        "How many neurons a fact has",
        "Is a fact answered by a few neurons?",
        seen,
        drawings=[draw.sizes_plot(sizes, tables["facts"])],
        tables=[("relations", tables["relations"]), ("facts", tables["facts"])],
    )


def _layers(study: FactStudy, tables: Tables) -> Section:
    names, count = layer_counts(study)
    total = count.sum(0)
    seen = ["No set has a neuron."]
    if total.any():
        best = int(total.argmax())
        share = percent(Share(total[best] / total.sum()))
        seen = [f"{share} of the sets' neurons are in layer {best}, more than in any other."]
    return Section(
        "layers",
        "Where the neurons are",
        "In which layers are the neurons of facts?",
        seen,
        "A neuron counts once for each set that has it. Bars: all relations.",
        [figures.layers_plot(count[:, None, :], names, ["neurons"])],
        [("layers", tables["layers"])],
    )


def _consistency(study: FactStudy, tables: Tables) -> Section | None:
    name = str(study.how.get("consistency", "cs2"))
    scores = of_facts(study.facts, name)
    known = scores[np.isfinite(scores)]
    if not known.size:
        return None
    cut = study.how.get("cut")
    seen = [f"{name.upper()} is {significant(float(known.mean()), 3)} on average."]
    if known.size < scores.size:
        n = n_of(scores.size - known.size, "fact")
        seen.append(f"{n} with one prompt, or without a neuron, have none.")
    if cut is not None:
        n_above = int((known > cut).sum())
        seen.append(
            f"{n_above:,} of {known.size:,} facts are consistent ({name.upper()} above {cut:.3g})."
        )
    return Section(
        "consistency",
        "Whether a fact's prompts have the same neurons",
        "Is it the fact that the neurons belong to, or the way it is asked?",
        seen,
        "CS1: neurons of all of a fact's prompts, over those of any; CS2: neurons of more than one "
        "prompt, over those of any (arXiv 2405.14117, as recalled).",
        [draw.consistency_plot(scores, name, cut, tables["facts"])],
        [("consistency", tables["relations"])],
    )


def _completeness(study: FactStudy, tables: Tables) -> Section | None:
    if "completeness" not in tables:
        return None
    table = tables["completeness"]
    largest = float(table.floats("largest_gap").max())
    seen = [
        f"A layer's attributions add up to the change of P within "
        f"{significant(float(table.floats('mean_gap').mean()), 2)} on average, "
        f"{significant(largest, 2)} at most."
    ]
    return Section(
        "completeness",
        "How complete the gradients are",
        "Do the attributions of a layer add up to what the layer does to the probability?",
        seen,
        "Along a path from the baseline to the layer's own values the gradients sum to the "
        "difference of P, but for the steps of the path: more of them bring the two together.",
        [draw.completeness_plot(table)],
        [("completeness", table)],
    )
