"""The report's page on a corpus study: which neurons are specific to a group, and what they carry.

cli/pages.py calls it for a folder of counts; here are the first words, methods/counts/page.py makes
the sections and report_groups.html.j2 lays out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from relneuron.artifact.files import Json
from relneuron.methods.counts.page import (
    METHODS,
    changed,
    counted,
    layers,
    nats,
    neurons,
    nll,
    scores,
    shared,
    threshold,
)
from relneuron.methods.counts.study import CLEAN, GroupStudy, rise
from relneuron.methods.counts.tables import group_tables
from relneuron.report.parts import Section, n_of
from relneuron.report.tables import NBSP, Table, percent

# Letters: names are cut to so many where a table of all pairs would hold more than that.
SHORT_NAME, MANY_NAMES = 40, 80_000


def group_page(study: GroupStudy) -> Json:
    """Everything that report_groups.html.j2 names, but the commands."""
    name = study.model.get("id") or (study.manifest.get("model") or {}).get("id")
    return {
        "model": name or "an unnamed model",
        "facts": facts(study),
        "answer": answer(study),
        "tiles": tiles(study),
        "sections": group_sections(study),
        "manifest": study.manifest,
    }


def group_sections(study: GroupStudy) -> list[Section]:
    """What the study has data for, in the order of the page."""
    is_much = len(study.groups) * sum(map(len, study.groups)) > MANY_NAMES
    study, names = with_short_names(study, SHORT_NAME) if is_much else (study, {})
    tables = group_tables(study)
    if names:
        rows = [list(row) for row in names.items()]
        tables["names"] = Table("Groups whose names are cut here", ["group", "name"], rows)
    makers = (scores, layers, shared, nll, neurons, counted)
    return [section for make in makers for section in make(study, tables)]


# The first words


def facts(study: GroupStudy) -> str:
    found = [n_of(len(study.groups), "group")]
    if study.activity:
        found.append(f"site {study.activity.site}{threshold(study)}")
    if study.method:
        found.append(f"chosen by {METHODS.get(study.method, study.method)}")
    if cells := [cell for cell in study.cells if cell.mask == CLEAN]:
        found.append(f"NLL over {n_of(sum(cell.n_windows for cell in cells), 'window')}")
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


def tiles(study: GroupStudy) -> list[tuple[str, str, str]]:
    """A title, a number, and what it is over, for each of the head numbers."""
    found = [("groups", f"{len(study.groups):,}", "")]
    if study.counts:
        least, most = int(study.counts.tokens.min()), int(study.counts.tokens.max())
        span = " to ".join(dict.fromkeys(map(amount, (least, most))))
        found.append(("tokens", amount(int(study.counts.tokens.sum())), f"{span} a group"))
    if study.neurons:
        sizes = [len(chosen) for chosen in study.sets.values()] or [0]
        span = " to ".join(dict.fromkeys(f"{n:,}" for n in (min(sizes), max(sizes))))
        found.append(("neurons chosen", f"{len(study.times):,}", f"{span} a group"))
        several = sum(n > 1 for n in study.times.values())
        share = percent(several / len(study.times)) if study.times else "none chosen"
        found.append(("in more than one group", f"{several:,}", share))
    kinds = (
        ("rise of its own text", study.own),
        ("rise of the others", study.others),
        ("rise with random neurons", study.random),
    )
    for title, cells in kinds:
        if np.isfinite((over := rise(cells)).mean):
            span = " to ".join(dict.fromkeys(map(nats, (over.low, over.high))))
            span += f" over {n_of(len(cells), 'cell')}"
            found.append((f"{title}, nats", nats(over.mean), span))
    return found


def amount(n: int) -> str:
    """12,345,678 -> 12.3 million."""
    for size, name in ((10**9, "billion"), (10**6, "million")):
        if n >= size:
            value = n / size
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:,.{digits}f}{NBSP}{name}"
    return f"{n:,}"


def _by(own: float, others: float) -> str:
    """The others' change, with a verb only if it goes the other way."""
    return f"by {nats(others)}" if own > 0 < others else changed(others)


def with_short_names(study: GroupStudy, most: int) -> tuple[GroupStudy, dict[str, str]]:
    """The study with names of at most about `most` letters, and the whole names of the short ones.

    A table of pairs repeats every name once a group: with many long names that is a large page.
    """
    masks = dict.fromkeys([*study.groups, *(cell.mask for cell in study.cells)])
    long = {name: f"{name[:most]}… #{n}" for n, name in enumerate(masks, 1) if len(name) > most}
    if not long:
        return study, {}

    def names(known: Iterable[str]) -> list[str]:
        return [long.get(name, name) for name in known]

    counts, neurons, activity = study.counts, study.neurons, study.activity
    if neurons:
        sets = dict(zip(names(neurons.sets), neurons.sets.values(), strict=True))
        neurons = replace(neurons, sets=sets)
    result = replace(
        study,
        counts=counts and replace(counts, groups=names(counts.groups)),
        neurons=neurons,
        activity=activity and activity._replace(groups=names(activity.groups)),
        cells=[
            cell._replace(
                mask=long.get(cell.mask, cell.mask), group=long.get(cell.group, cell.group)
            )
            for cell in study.cells
        ],
        dropped=dict(zip(names(study.dropped), study.dropped.values(), strict=True)),
    )
    return result, {short: name for name, short in long.items()}
