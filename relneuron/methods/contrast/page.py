"""The page on a contrast: how two models differ, in which neurons, and what these do.

`study.PAGE` names `build`. Every sentence is made from the tables, and what the folder has no data
for has no section.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from relneuron.ablation.options import DONOR
from relneuron.methods.contrast import figures as draw
from relneuron.methods.contrast.study import ContrastStudy, read_contrast_study
from relneuron.methods.contrast.tables import contrast_tables, curve, gini, shown_mask
from relneuron.report.page import Page, Section, Tile
from relneuron.report.tables import Cell, Share, Table, label, n_of, percent, significant

Tables = Mapping[str, Table]

STYLE = """\
.data .text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 17rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); }"""
TOKENS = {"completion": "completions", "prompt": "prompts", "last": "last tokens of prompts"}


def build(folder: Path, titles: Mapping[str, str]) -> Page:
    study = read_contrast_study(folder)
    tables = contrast_tables(study)
    a, b = study.names
    makers = (_effects, _texts, _layers, _concentration, _scores, _groups)
    tokens = int(study.contrast.tokens.sum())
    facts = [n_of(tokens, "token"), n_of(study.there.size, "neuron")]
    if len(study.contrast.groups) > 1:
        facts.append(n_of(len(study.contrast.groups), "group"))
    asked = study.manifest["stages"].get("contrast", {}).get("inputs", {})
    if asked.get("tokens") in TOKENS:
        facts.append(f"of {TOKENS[asked['tokens']]}")
    return Page(
        title="Two models side by side",
        facts=" · ".join(facts),
        question=f"A is {a}, B is {b}. Which neurons of A and B differ on the same tokens, and "
        "what does A say with B's values there?",
        answer=_answer(study, tables),
        tiles=_tiles(study, tables),
        sections=[section for make in makers if (section := make(study, tables))],
        tables=tables,
        manifest=study.manifest,
        style=STYLE,
    )


# The first words


def _row(table: Table, name: str) -> dict[str, Cell]:
    """The row of a set, by column."""
    [row] = table.where(table.columns[0], name).rows
    return dict(zip(table.columns, row, strict=True))


def _best_effect(tables: Tables) -> dict[str, Cell] | None:
    """Of the sets that were patched the one with the largest effect."""
    if "effects" not in tables:
        return None
    found = [_row(tables["effects"], str(name)) for name in tables["effects"].column("set")]
    known = [row for row in found if math.isfinite(float(row["effect"]))]
    return max(known, key=lambda row: float(row["effect"]), default=None)


def _answer(study: ContrastStudy, tables: Tables) -> str:
    if not study.squares.any():
        return "The models are the same on these tokens: no neuron changes."
    share = curve(study)
    k = len(study.sets[study.largest]) if study.largest is not None else 0
    k = k or max(1, round(0.05 * share.size))
    who, has = f"The {k:,} neurons that change", "have"
    if k == 1:
        who, has = "The neuron that changes", "has"
    part = percent(share[k - 1])
    text = f"{who} most, {percent(k / share.size)} of all, {has} {part} of the squared change"
    if best := _best_effect(tables):
        text += (
            f"; with B's values in the {n_of(int(best['n_neurons']), 'neuron')} of "
            f"{label(str(best['set']))} A makes {percent(float(best['effect']))} of B's change of "
            "the cost"
        )
        if math.isfinite(float(best["random"])):
            text += f", with random ones {percent(float(best['random']))}"
    elif "texts" in tables and (mask := shown_mask(study)) is not None:
        said = _said(study, tables, mask)
        text += f"; {said[0].lower()}{said[1:]}"
    return f"{text}."


def _tiles(study: ContrastStudy, tables: Tables) -> list[Tile]:
    squares = study.squares[study.there]
    rms = float(np.sqrt(squares.mean()))
    tiles = []
    if best := _best_effect(tables):
        ends = [float(best[f"effect_{end}"]) for end in ("low", "high")]
        small = (
            " to ".join(significant(end, 2) for end in ends)
            if all(map(math.isfinite, ends))
            else ""
        )
        name = f"{label(str(best['set']))}{', ' if small else ''}{small}"
        tiles.append(Tile("causal effect C", significant(float(best["effect"]), 2), name, True))
        if math.isfinite(float(best["random"])):
            ends = [float(best[f"random_{end}"]) for end in ("low", "high")]
            tiles.append(
                Tile(
                    "C of random neurons",
                    significant(float(best["random"]), 2),
                    " to ".join(significant(end, 2) for end in ends),
                )
            )
    tiles.append(Tile("change S", significant(rms, 3), "root mean square over all neurons"))
    tiles.append(Tile("Gini coefficient", significant(gini(squares), 2), "of the squared change"))
    return tiles


def _span(row: Mapping[str, Cell], name: str, before: str = "") -> str:
    """The ends of an interval or a range; nothing where they were not measured."""
    ends = [float(row[f"{name}_{end}"]) for end in ("low", "high")]
    if not all(map(math.isfinite, ends)):
        return ""
    return before + " to ".join(significant(end, 2) for end in ends)


def _said(study: ContrastStudy, tables: Tables, mask: str) -> str:
    """Whose texts A writes with the values of a set."""
    row = _row(tables["texts"], mask)
    n = n_of(int(row["n_neurons"]), "neuron")
    text = f"With B's values in the {n} of {label(mask)} A writes"
    if DONOR in study.outputs:
        text += f" B's text in {percent(float(row['as_donor']))} of cases,"
    return f"{text} its own in {percent(float(row['as_clean']))}"


# Sections


def _effects(study: ContrastStudy, tables: Tables) -> Section | None:
    if "effects" not in tables:
        return None
    table = tables["effects"]
    rows = [_row(table, str(name)) for name in table.column("set")]
    seen = [
        f"The cost is {significant(float(rows[0]['cost_clean']), 4)} of A and "
        f"{significant(float(rows[0]['cost_donor']), 4)} of B, mean over the texts."
    ]
    if not np.isfinite(table.floats("effect")).any():
        seen.append("B costs what A costs, so there is no effect.")
    if np.isfinite(table.floats("random_high")).any():
        seen.append(_above_random(rows))
    return Section(
        "effects",
        "What the neurons do",
        "Does A say what B says, with B's values in a few neurons?",
        seen,
        "C = (cost of A with B's values − cost of A) / (cost of B − cost of A), of the means over "
        "texts (arXiv 2406.14144): 0 is A, 1 is B. Intervals: bootstrap over prompts. Random: as "
        "many other neurons of each layer, mean and range of the seeds.",
        [draw.effects_plot(table)],
        [("effects", table)],
        open=1,
    )


def _above_random(rows: Sequence[Mapping[str, Cell]]) -> str:
    """The smallest set whose interval is above all of its random sets."""
    for row in rows:
        low, most = float(row["effect_low"]), float(row["random_high"])
        if low > most:
            return (
                f"The {n_of(int(row['n_neurons']), 'neuron')} of {label(str(row['set']))} make "
                f"{percent(float(row['effect']))} of the change, {percent(low)} at least; none of "
                f"{n_of(int(row['n_random']), 'random set')} makes more than {percent(most)}."
            )
    return "No set makes clearly more of the change than all of its random sets."


def _texts(study: ContrastStudy, tables: Tables) -> Section | None:
    if "texts" not in tables:
        return None
    table, mask = tables["texts"], shown_mask(study)
    seen = []
    if mask is not None:
        seen = [
            f"{_said(study, tables, mask)}.",
            f"Below, patched is {label(mask)}; texts that it changes come first. Random is the "
            "first of its sets of random neurons.",
        ]
    return Section(
        "texts",
        "What is written, side by side",
        "What do A, B, and A with B's values write behind the same prompts?",
        seen,
        "The same text: character for character.",
        [draw.texts_plot(table)],
        [("examples", tables["examples"]), ("texts", table)],
        most=20,
        open=1,
    )


def _layers(study: ContrastStudy, tables: Tables) -> Section:
    table = tables["layers"]
    share, relative = table.floats("of_squares"), table.floats("relative_change")
    seen = ["No neuron changes."]
    if np.isfinite(share).any():
        best = int(np.nanargmax(share))
        seen = [
            f"Layer {best} has {percent(share[best])} of the squared change, more than any other "
            f"(of {n_of(len(share), 'layer')})."
        ]
    if np.isfinite(relative).any():
        most = int(np.nanargmax(relative))
        seen.append(
            f"Beside what A's own neurons are, layer {most} changes most: by "
            f"{percent(relative[most])}."
        )
    return Section(
        "layers",
        "Change by layer",
        "In which layers do the models differ?",
        seen,
        "Squared change: the sum of S² over a layer's neurons. Relative change: the root of the "
        "sum of (a − b)² over that of a².",
        [draw.layers_plot(table, study.largest)],
        [("layers", table)],
    )


def _concentration(study: ContrastStudy, tables: Tables) -> Section | None:
    share = curve(study)
    if not np.isfinite(share).all():
        return None
    n, half = share.size, int(np.searchsorted(share, 0.5)) + 1
    seen = [
        f"{n_of(half, 'neuron')} of {n:,} ({percent(half / n)}) have half of the squared change.",
        f"Its Gini coefficient is {significant(gini(study.squares[study.there]), 2)}: 0 if all "
        "changed alike, 1 if one had it all.",
    ]
    none = int((study.squares[study.there] == 0).sum())
    if none:
        seen.append(f"{n_of(none, 'neuron')} are the same in both models.")
    return Section(
        "concentration",
        "How concentrated the change is",
        "Do a few neurons change, or all of them a little?",
        seen,
        drawings=[draw.concentration_plot(share, _beginnings(study))],
        tables=[("concentration", tables["concentration"])],
    )


def _beginnings(study: ContrastStudy) -> dict[str, int]:
    """The sets that are the first of the ranking over all layers, and their sizes."""
    squares = study.squares
    ordered = np.sort(squares[study.there])[::-1]
    found = {}
    for name, places in study.sets.items():
        own = np.sort(squares[places])[::-1]
        if own.size and np.allclose(own, ordered[: own.size], rtol=1e-6):
            found[name] = own.size
    return found


def _scores(study: ContrastStudy, tables: Tables) -> Section | None:
    score = study.score.reshape(-1)[study.there]
    if not score.any():
        return None
    name = study.largest
    chosen = np.isin(study.there, () if name is None else study.sets[name])
    first = dict(zip(tables["neurons"].columns, tables["neurons"].rows[0], strict=True))
    seen = [
        f"The largest change is {significant(float(first['change']), 3)}, of {first['neuron']}; "
        f"the median is {significant(float(np.median(score)), 3)}.",
    ]
    if name is not None and chosen.any():
        least = significant(float(score[chosen].min()), 3)
        seen.append(f"The neurons of {label(name)} change by {least} or more.")
    return Section(
        "scores",
        "How much neurons change",
        "How are the changes distributed?",
        seen,
        "S of a neuron: the root mean square of a − b over the tokens, where a and b are what it "
        "passes on to the layer's output in A and in B.",
        [draw.scores_plot(score, chosen, name)],
        [("neurons", tables["neurons"])],
    )


def _groups(study: ContrastStudy, tables: Tables) -> Section | None:
    if "groups" not in tables:
        return None
    table = tables["groups"]
    rms = table.floats("rms")
    names = [label(str(name)) for name in table.column("group")]
    seen = [
        f"The models differ most on {names[int(rms.argmax())]} and least on "
        f"{names[int(rms.argmin())]}: by {significant(float(rms.max()), 3)} and "
        f"{significant(float(rms.min()), 3)} in the root mean square."
    ]
    shared = Share(table.mean("among_top"))
    seen.append(
        f"Of as many neurons as are chosen {percent(shared)} are among those that change most in a "
        "group alone, mean over groups."
    )
    return Section(
        "groups",
        "Change by group",
        "Do the same neurons change whatever the text is about?",
        seen,
        tables=[("groups", table)],
        open=1,
    )
