"""The tables of the page on facts: sizes of sets, layers, consistency, completeness.

page.py calls `fact_tables`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relneuron.artifact.reading import Cells
from relneuron.methods.gradients.study import FactStudy
from relneuron.report.tables import Cell, Share, Table

SIZES = (
    *("relation", "n_facts", "n_prompts", "mean_size", "median_size", "largest", "n_without"),
    *("mean_of_prompt", "cs1", "cs2", "consistent"),
)
FACT = ("fact", "n_prompts", "n_neurons", "n_of_prompt", "n_union", "cs1", "cs2", "consistent")
GAPS = ("layer", "n_sentences", "change", "sum", "mean_gap", "largest_gap")

Array = np.ndarray[Any, Any]


def fact_tables(study: FactStudy) -> dict[str, Table]:
    tables = {"relations": relations(study.facts), "facts": facts(study.facts)}
    tables["layers"] = layers(study)
    if study.gaps:
        tables["completeness"] = completeness(study.gaps)
    if study.changes is not None:
        tables["changes"] = study.changes
    return tables


def of_facts(rows: Sequence[Cells], name: str) -> Array:
    """(n,) float64 of a column of facts.csv, NaN where it is empty."""
    return np.array([row.real(name) if row[name] else np.nan for row in rows])


def by_relation(rows: Sequence[Cells]) -> Mapping[str, list[Cells]]:
    found: dict[str, list[Cells]] = {}
    for row in rows:
        found.setdefault(row["relation"], []).append(row)
    return found


def relations(rows: Sequence[Cells]) -> Table:
    """One row a relation: how many neurons its facts have, and how consistent they are."""
    cells: list[list[Cell]] = []
    for name, own in by_relation(rows).items():
        sizes = of_facts(own, "n_neurons")
        scores = (_mean(of_facts(own, key)) for key in ("cs1", "cs2", "consistent"))
        cells.append(
            [
                *(name, len(own), int(of_facts(own, "n_prompts").sum())),
                *(float(sizes.mean()), float(np.median(sizes)), int(sizes.max())),
                *(int((sizes == 0).sum()), float(of_facts(own, "n_of_prompt").mean())),
                *map(Share, scores),
            ]
        )
    return Table("Neurons of facts, by relation", SIZES, cells)


def facts(rows: Sequence[Cells]) -> Table:
    cells: list[list[Cell]] = []
    for row in rows:
        counts = [row.whole(name) for name in ("n_prompts", "n_neurons")]
        scores = (row.real(name) if row[name] else np.nan for name in ("cs1", "cs2", "consistent"))
        about = row.real("n_of_prompt"), row.whole("n_union")
        cells.append([row["fact"], *counts, *about, *map(Share, scores)])
    return Table("Neurons of each fact", FACT, cells)


def layer_counts(study: FactStudy) -> tuple[list[str], NDArray[np.int64]]:
    """The sets' relations and (R, L): in how many sets of a relation the neurons of a layer are."""
    relation = {row["fact"]: row["relation"] for row in study.facts}
    names = list(dict.fromkeys(row["relation"] for row in study.facts))
    count = np.zeros((len(names), int(study.neurons.model["layers"])), np.int64)
    for name, rows in study.neurons.sets.items():
        place = names.index(relation.get(name, name))
        for layer, *_ in rows:
            count[place, layer] += 1
    return names, count


def layers(study: FactStudy) -> Table:
    """One row a layer: the neurons of all sets, each set's counted, and how many differ."""
    _, count = layer_counts(study)
    sets = study.neurons.sets.values()
    distinct = {(layer, index) for rows in sets for layer, _, index, _ in rows}
    cells: list[list[Cell]] = [
        [layer, int(n), sum(found == layer for found, _ in distinct)]
        for layer, n in enumerate(count.sum(0))
    ]
    return Table("Neurons of the sets, by layer", ("layer", "n_neurons", "n_distinct"), cells)


def completeness(rows: Sequence[Cells]) -> Table:
    """One row a layer: the sum of its attributions against the change of P that they add up to."""
    values = {name: np.array([row.finite(name) for row in rows]) for name in GAPS[2:4]}
    layer = np.array([row.whole("layer") for row in rows])
    gap = np.abs(values["sum"] - values["change"])
    cells: list[list[Cell]] = []
    for place in np.unique(layer).tolist():
        here = layer == place
        means = [float(values[name][here].mean()) for name in GAPS[2:4]]
        cells.append(
            [place, int(here.sum()), *means, float(gap[here].mean()), float(gap[here].max())]
        )
    return Table("Sums of integrated gradients against the change of P", GAPS, cells)


def _mean(values: Array) -> float:
    some = values[np.isfinite(values)]
    return float(some.mean()) if some.size else float("nan")
