"""The tables of a corpus study: what its page shows, and csv files for other programs.

methods/counts/page.py shows them, `report` writes them into the study's folder analyses/.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relneuron.analyses.overlap import OVERLAP, overlap_columns, versatility
from relneuron.artifact.files import Json
from relneuron.artifact.neurons import Shape
from relneuron.methods.counts.rises import NUMBERS, NllCells
from relneuron.methods.counts.study import GroupStudy, rise
from relneuron.report.tables import Array, Cell, Column, Rows, Share, Table

BINS = 60
DIGITS = 6  # of a probability in a table of the page
MANY = 40  # groups with a column each in it
# Letters: names are cut to so many where a table of all pairs would hold more than that.
SHORT_NAME, MANY_NAMES = 40, 80_000


def group_tables(study: GroupStudy) -> dict[str, Table]:
    """Every table that the study has data for, by its file's name without .csv."""
    found: dict[str, Table | None] = {
        "entropy": entropy_table(study),
        "scores": scores_table(study),
        "groups": groups_table(study),
    }
    if study.times:
        found["layers"] = layer_table(study)
        found["neurons"] = neuron_table(study, list(study.sets))
        if len(study.sets) > 1:
            found["overlap"] = overlap_table(study)
            times = versatility(study.sets)
            columns = ["n_groups", *times.columns[1:]]
            found["multiplicity"] = times._replace(columns=columns)
    if study.cells:
        found |= {"clean": clean_table(study), "rises": rises_table(study), "nll": nll_table(study)}
    return {name: table for name, table in found.items() if table is not None}


def entropy_table(study: GroupStudy) -> Table | None:
    """Neurons by entropy: all, those above the threshold in a group, and those chosen.

    None for one group, over which every entropy is 0.
    """
    if study.entropy is None or study.entropy_groups < 2:
        return None
    parts = {"neurons": study.entropy.ravel()}
    if study.candidates is not None:
        parts["candidates"] = study.entropy[study.candidates]
    if study.chosen_entropies.size:
        parts["chosen"] = study.chosen_entropies
    return histogram("Neurons by entropy", parts, 0.0, study.highest_entropy)


def scores_table(study: GroupStudy) -> Table | None:
    """Chosen neurons by score, once in each set; None if the scores do not differ."""
    rows = [row for rows in study.neurons.sets.values() for row in rows] if study.neurons else []
    found = np.array([row[3] for row in rows])
    if study.entropy is not None or not np.isfinite(found).all():
        return None
    if not found.size or not np.ptp(found):
        return None
    return histogram("Chosen neurons by score", {"chosen": found}, found.min(), found.max())


def histogram(title: str, parts: dict[str, Array], low: float, high: float) -> Table:
    """How many of each part are in each of 60 bins of one width; the last holds its upper end."""
    edges = np.linspace(low, high, BINS + 1)
    # Rounding may lift an entropy over its bound.
    found = [np.histogram(np.clip(part, low, high), edges)[0].tolist() for part in parts.values()]
    rows: list[list[Cell]] = [
        list(row) for row in zip(edges[:-1].tolist(), edges[1:].tolist(), *found, strict=True)
    ]
    return Table(title, ["from", "to", *parts], rows)


def layer_table(study: GroupStudy) -> Table:
    count, _ = layer_counts(study)
    columns = [
        "group",
        "all_layers",
        *(f"layer_{name.replace(' ', '_')}" for name in study.layer_names),
    ]
    rows: list[list[Cell]] = [
        [name, sum(row), *row] for name, row in zip(study.sets, count.tolist(), strict=True)
    ]
    return Table("Chosen neurons by group and layer", columns, rows)


def layer_counts(study: GroupStudy) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Chosen neurons per set and layer (G, L), and of all sets with each neuron once (L,)."""
    found = [[neuron[0] for neuron in some] for some in (*study.sets.values(), study.times)]
    count = np.array(
        [np.bincount(np.array(some, np.int64), minlength=study.n_layers) for some in found]
    )
    return count[:-1], count[-1]


def overlap_table(study: GroupStudy) -> Table:
    """The analysis `overlap`, of groups, with the Jaccard index |A and B| / |A or B|."""
    first, second, shared, share, *chance = overlap_columns(study.sets, study.n_neurons)
    size = np.array([len(chosen) for chosen in study.sets.values()], np.int64)
    either = (size[first.values] + size[second.values] - shared.values).astype(np.float64)
    jaccard = shared.values / np.where(either, either, np.nan)
    is_one = first.values == second.values
    for column in chance:
        column.values[is_one] = np.nan
    columns = ["group", *OVERLAP[1:4], "jaccard", *OVERLAP[4:]]
    rows = Rows([first, second, shared, share, Column(jaccard, is_share=True), *chance])
    return Table("Neurons that two groups share", columns, rows)


def clean_table(study: GroupStudy) -> Table:
    """NLL and perplexity of each text with the model as it is."""
    columns = ["group", "n_windows", "n_tokens", "nll", "nll_se", "perplexity"]
    cells = _columns(study.cells.at(study.cells.is_clean))
    rows = Rows([cells[name] for name in columns])
    return Table("NLL of each text with the model as it is, nats per token", columns, rows)


def _columns(cells: NllCells) -> dict[str, Column]:
    found = {name: Column(getattr(cells, name)) for name in NUMBERS}
    found["mask"] = Column(cells.mask, cells.masks)
    found["group"] = Column(cells.group, cells.groups)
    return found | {"is_clean": Column(cells.is_clean.astype(np.int64))}


def rises_table(study: GroupStudy) -> Table:
    """For each set that has neurons: the rise of its own text, and of the others'."""
    cells = study.off
    rows: list[list[Cell]] = []
    ends = [*(1 + np.flatnonzero(np.diff(cells.mask))).tolist(), len(cells)]
    for start, end in pairwise([0, *ends] if len(cells) else []):
        some = cells.at(slice(start, end))
        own = some.at(some.is_own)
        mine = [*own.rise.tolist(), *own.rise_se.tolist()] or [np.nan, np.nan]
        rows.append([some.masks[int(some.mask[0])], *mine, *rise(some.at(~some.is_own))])
    columns = ["set", "own", "own_se", "others", "others_low", "others_high"]
    return Table("Rise of the NLL, own text and others, nats per token", columns, rows)


def nll_table(study: GroupStudy) -> Table:
    columns = ["mask", "group", "is_clean", "n_windows", "n_tokens", "nll", "nll_se", "perplexity"]
    columns += ["rise", "rise_se", "p_value", "q_value"]
    cells = _columns(study.cells)
    rows = Rows([cells[name] for name in columns])
    return Table("NLL of each text under each mask", columns, rows)


def neuron_table(
    study: GroupStudy, names: Sequence[str], title: str = "all", most: int | None = None
) -> Table:
    """The neurons of some sets, best first, with their probability in each group that is known.

    Up to `most` of each, then with probabilities to 6 significant digits, and of more than
    MANY groups only the own one's and the highest of the others.
    """
    activity = study.activity
    columns = ["group", "rank", "neuron", "score", "n_groups"]
    is_short = most is not None and activity is not None and len(activity.groups) > MANY
    if is_short:
        columns += ["p(own)", "other", "p(other)"]
    elif activity:
        columns += [f"p({name})" for name in activity.groups]
    order = Shape.of(study.neurons.model)  # type: ignore[union-attr]
    rows: list[list[Cell]] = []
    for name in names:
        score = {tuple(row[:3]): row[3] for row in reversed(study.neurons.sets[name])}  # type: ignore[union-attr]
        for rank, neuron in enumerate(study.sets[name][:most], 1):
            layer, site, index = neuron
            row: list[Any] = [name, rank, order.name(layer, site, index), score[neuron]]
            row.append(study.times[neuron])
            found = activity.probability[:, layer, index].tolist() if activity else []
            if most is not None:
                found = [float(f"{p:.{DIGITS}g}") for p in found]
            if is_short and activity:
                row += _own_and_other(found, activity.groups, name)
            else:
                row += map(Share, found)
            rows.append(row)
    # A table of one group need not name it.
    start = 0 if most is None else 1
    return Table(f"Neurons, {title}", columns[start:], [row[start:] for row in rows])


def _own_and_other(found: Sequence[float], groups: Sequence[str], own: str) -> list[Cell]:
    """A neuron's probability in its own group, and the other group with the highest one."""
    by_group = dict(zip(groups, found, strict=True))
    mine = by_group.pop(own, np.nan)
    other = max(
        by_group, key=lambda name: -1.0 if by_group[name] != by_group[name] else by_group[name]
    )
    return [Share(mine), other, Share(by_group[other])]


def groups_table(study: GroupStudy) -> Table:
    """Tokens of each group, those that were dropped, and the size of its set."""
    tokens: Json = {}
    if study.counts:
        tokens = dict(zip(study.counts.groups, study.counts.tokens.tolist(), strict=True))
    rows: list[list[Cell]] = []
    for name in study.groups:
        chosen = study.sets.get(name, [])
        scores = [row[3] for row in study.neurons.sets.get(name, [])] if study.neurons else []
        single = sum(study.times[neuron] == 1 for neuron in chosen)
        sizes = [len(chosen), single] if name in study.sets else [np.nan, np.nan]
        ends = [scores[0], scores[-1]] if scores else [np.nan, np.nan]
        rows.append(
            [name, tokens.get(name, np.nan), study.dropped.get(name, np.nan), *sizes, *ends]
        )
    columns = ["group", "tokens", "dropped_tokens", "neurons", "in_no_other_set"]
    return Table("Groups", [*columns, "best_score", "last_score"], rows)


def greatest(table: Table, name: str, n: int) -> Table:
    """The n rows with the greatest numbers in a column, in the table's order."""
    values = table.floats(name)
    order = np.argsort(np.where(np.isnan(values), np.inf, -values), kind="stable")
    return table.at(sorted(order[:n].tolist()))


# Names


def with_short_names(study: GroupStudy) -> tuple[GroupStudy, dict[str, str]]:
    """The study with names that are cut where all would be too much, and the whole names of those.

    A table of pairs repeats every name once a group: with many long names that is a large page.
    """
    masks = dict.fromkeys([*study.groups, *study.cells.masks])
    most = SHORT_NAME
    long = {name: f"{name[:most]}… #{n}" for n, name in enumerate(masks, 1) if len(name) > most}
    if not long or len(study.groups) * sum(map(len, study.groups)) <= MANY_NAMES:
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
        cells=replace(
            study.cells, masks=names(study.cells.masks), groups=names(study.cells.groups)
        ),
        dropped=dict(zip(names(study.dropped), study.dropped.values(), strict=True)),
    )
    return result, {short: name for name, short in long.items()}
