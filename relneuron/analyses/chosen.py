"""The report's sections on the chosen neurons: where they are, how sure, and what sets share.

analyses/page.py puts them between those of analyses/sections.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from relneuron.analyses import figures as draw
from relneuron.analyses import overlap_effect
from relneuron.analyses.study import Study
from relneuron.artifact.files import Json
from relneuron.artifact.neurons import SITES, Neuron, Shape
from relneuron.report import figures, kit
from relneuron.report.page import Section
from relneuron.report.tables import NBSP, Cell, Table, label, listed, n_of, percent, significant

SHOWN = 5  # neurons of each set in the table of neurons, before its last


def chosen(study: Study) -> list[Section]:
    sites = tuple(Shape.of(study.neurons.model).widths)
    count = site_counts(study.sets.values(), study.neurons.model["layers"], sites)
    tables = [
        ("selection", selection_table(study, count)),
        ("layers", layer_table(list(study.sets), count, sites)),
    ]
    found = [
        Section(
            "layers",
            "Where the chosen neurons are",
            "In which layers and projections are the neurons of a relation?",
            [_layer_note(study, count), *_selection_notes(study)],
            "Bars: sum over the relations. Squares: one relation. gate and up are the outputs of "
            "gate_proj and up_proj, down the output of down_proj, q, k, v and o those of the "
            "attention's projections, where they were recorded.",
            [figures.layers_plot(count, list(study.sets), sites)] if count.any() else [],
            tables,
        )
    ]
    if (table := neuron_table(study)).rows:
        notes = significance_notes(study) or [
            "No significance.csv belongs to these neurons, so nothing here says how sure their "
            "scores are."
        ]
        found.append(
            Section(
                "scores",
                "The scores, and how sure they are",
                "Could a neuron be in a set by chance?",
                notes,
                tables=[("neurons", table)],
            )
        )
    return found


def overlap(study: Study) -> Section:
    table = study.tables["overlap"]
    question = "How many neurons do two relations share, and do they break each other for it?"
    title = "What the sets share"
    shared, place_of = table.floats("shared"), {name: i for i, name in enumerate(study.sets)}
    compared = dict.fromkeys(map(str, table.column("relation")))
    own, other = (
        np.array([place_of[str(name)] for name in table.column(key)], np.int64)
        for key in ("relation", "other")
    )
    # A pair of two sets of which each is compared with all stands there twice.
    is_twin = np.isin(other, [place_of[name] for name in compared])
    pairs = np.flatnonzero((own < other) | (~is_twin & (own != other)))
    if not any(study.sets.values()) or not pairs.size:
        return Section("overlap", title, question, ["There are no two sets to compare."])
    if most := int(shared[pairs].max()):
        place = int(pairs[np.argmax(shared[pairs])])
        a, b = (label(str(table.column(name)[place])) for name in ("relation", "other"))
        chance = table.floats("expected")[pairs]
        beyond = int((table.floats("q_value")[pairs] <= kit.SURE).sum())
        seen = [
            f"Most shared: {most:,}, by “{a}” and “{b}”. Two random sets of such sizes would "
            f"share {significant(chance.mean(), 2)} on average; {beyond:,} of "
            f"{n_of(len(pairs), 'pair')} share more than chance (q ≤ {kit.SURE})."
        ]
    else:
        seen = ["No two sets share a neuron."]
    effect = overlap_effect(study.sets, study.main)
    if np.isfinite(effect.rho):
        seen.append(
            "Rank correlation of shared neurons with the damage a set does to the other relation: "
            f"{significant(effect.rho, 2)} (p = {significant(effect.p_value, 2)}, "
            f"{n_of(effect.n_pairs, 'pair')})."
        )
    how = (
        "Number of neurons that two sets have in common; the frames hold the sizes of the sets. "
        "Bold: more than two random sets would share (hypergeometric test, Benjamini–Hochberg over "
        f"the pairs, q ≤ {kit.SURE})."
    )
    drawn = table
    if len(compared) < len(study.sets):
        seen.append(
            f"Of {len(study.sets):,} sets those of the {n_of(len(compared), 'relation')} that were "
            "asked are compared, each with all others; drawn: with each other."
        )
        drawn = table._replace(rows=[row for row in table.rows if row[1] in compared])
    drawings = [figures.overlap_heatmap(drawn)] if len(compared) > 1 else []
    return Section("overlap", title, question, seen, how, drawings, [("overlap", table)])


def versatility(study: Study) -> Section:
    table = study.tables["versatility"]
    n, neurons, share = (table.floats(name) for name in table.columns)
    single = neurons[n == 1].sum()
    return Section(
        "versatility",
        "In how many sets a neuron is",
        "Are there neurons that serve many relations?",
        [
            f"{single:,.0f} of {n_of(int(neurons.sum()), 'chosen neuron')} "
            f"({percent(share[n == 1].sum())}) are in one set only; the most versatile are in "
            f"{n.max():.0f} ({n_of(int(neurons[n == n.max()].sum()), 'neuron')})."
        ],
        drawings=[draw.versatility_plot(table)],
        tables=[("versatility", table)],
    )


def concepts(study: Study) -> Section:
    table = study.tables["concepts"]
    shared, drops, q = (table.floats(name) for name in ("shared", "drop", "q_value"))

    def pair(place: int) -> str:
        names = (label(str(table.column(name)[place])) for name in ("relation", "concept"))
        return "“{}” and the concept “{}”".format(*names)

    seen = [
        f"Most shared: {int(shared.max()):,}, by {pair(int(shared.argmax()))}; "
        f"{int((q <= kit.SURE).sum()):,} of {n_of(len(q), 'pair')} share more than chance."
    ]
    if np.isfinite(drops).any():
        worst = int(np.nanargmax(drops))
        seen.append(f"The largest drop with a concept off: {percent(drops[worst])}, {pair(worst)}.")
    return Section(
        "concepts",
        "Relations and kinds of subjects",
        "Are a relation's neurons those of the things it speaks of?",
        seen,
        "First: neurons shared by the set of a relation and the set of a concept, found with "
        f"prompts that ask for nothing; bold: beyond chance (q ≤ {kit.SURE}). Then: accuracy that "
        "the relation (row) loses in % when the concept's neurons (column) are off.",
        draw.concept_heatmaps(table),
        [("concepts", table)],
    )


# Tables


def site_counts(
    sets: Collection[Sequence[Neuron]], n_layers: int, sites: Sequence[str] = SITES
) -> NDArray[np.int64]:
    """Chosen neurons per set, site and layer: (R, S, L)."""
    count = np.zeros((len(sets), len(sites), n_layers), dtype=np.int64)
    for r, neurons in enumerate(sets):
        times = Counter((layer, site) for layer, site, _ in neurons)
        for (layer, site), n in times.items():
            count[r, sites.index(site), layer] = n
    return count


def layer_table(
    names: Sequence[str], count: NDArray[np.int64], sites: Sequence[str] = SITES
) -> Table:
    columns = ["relation", "site", "all_layers", *(f"layer_{i}" for i in range(count.shape[2]))]
    rows = [
        [name, site, sum(row), *row]
        for name, by_site in zip(names, count.tolist(), strict=True)
        for site, row in zip(sites, by_site, strict=True)
    ]
    return Table("Chosen neurons by site and layer", columns, rows)


def selection_table(study: Study, count: NDArray[np.int64]) -> Table:
    """How each set was cut out of the ranking, and on how many prompts the ranking rests."""
    sites = Shape.of(study.neurons.model).widths
    columns = [
        *("relation", "prompts", "answered_right", "neurons", *sites),
        *("best_score", "score_at_cut", "ties_at_cut", "perfect"),
    ]
    rows: list[list[Cell]] = []
    sets, cuts = study.neurons.sets.items(), _cuts(study)
    det = Counter(p.relation for p in study.prompts.values() if p.split == "det")
    for (name, chosen), by_site in zip(sets, count.sum(axis=2).tolist(), strict=True):
        n_prompts, cut = det[name], cuts.get(name, {})
        right, *ties = (cut.get(key, 0) for key in ("positives", "ties_at_cut", "perfect"))
        ends = [chosen[0][3], chosen[-1][3]] if chosen else [np.nan, np.nan]
        rows.append([name, n_prompts, right, sum(by_site), *by_site, *ends, *ties])
    return Table("How the sets were chosen", columns, rows)


def neuron_table(study: Study) -> Table:
    """The best neurons of each set and its last, with what identify knows of their scores."""
    columns = ["relation", "rank", "neuron", "score", "score_low", "score_high"]
    rows: list[list[Cell]] = []
    order = Shape.of(study.neurons.model)
    for name, chosen in study.neurons.sets.items():
        for place, (layer, site, index, score) in enumerate(chosen):
            if SHOWN <= place < len(chosen) - 1:
                continue
            p, q, low, high = study.significance[name][place].tolist()
            rows.append([name, place + 1, order.name(layer, site, index), score, low, high, p, q])
    return Table(
        "The best neurons of each set and its last", [*columns, "p_value", "q_value"], rows
    )


def modules(study: Study) -> Section:
    table = study.tables["modules"]
    means = [
        (name, table.where("modules", name).mean("drop"))
        for name in dict.fromkeys(map(str, table.column("modules")))
    ]
    text = ", ".join(f"{label(name)} {percent(drop)}" for name, drop in means)
    return Section(
        "modules",
        "Which modules",
        "In which modules of the model are the neurons that matter to a domain?",
        [f"Mean drop of the domain itself: {text}."],
        "Off are those of the domain's own neurons that are in some modules of the model, for the "
        "domain's own prompts: the sets of modules of MMNeuron (arXiv 2406.11193).",
        [],
        [("modules", table)],
    )


# Sentences


def _cuts(study: Study) -> dict[str, Json]:
    """How each set was cut; what chose neurons of groups of text says one thing of all sets."""
    found = study.neurons.selection
    return {name: found[name] for name in study.neurons.sets if isinstance(found.get(name), dict)}


def _layer_note(study: Study, count: NDArray[np.int64]) -> str:
    if not count.any():
        return "No neuron was chosen."
    order = Shape.of(study.neurons.model)
    chosen, all_neurons = (
        ", ".join(
            f"{site} {percent(n / sum(ns))}" for site, n in zip(order.widths, ns, strict=True)
        )
        for ns in (
            count.sum(axis=(0, 2)),
            np.array([order.site_places(site).size for site in order.widths]),
        )
    )
    return f"Of the chosen neurons: {chosen}; of all neurons: {all_neurons}."


def _selection_notes(study: Study) -> list[str]:
    """How the sets were cut, if by q, and why some are empty."""
    cuts = _cuts(study)
    rates = {f"{cut['fdr']}" for cut in cuts.values() if "fdr" in cut}
    notes = [f"A set is every neuron with q ≤ {rate}." for rate in sorted(rates)]
    empty = [
        f"{label(name)} ({cuts.get(name, {}).get('reason', 'no reason given')})"
        for name, chosen in study.neurons.sets.items()
        if not chosen
    ]
    if empty:
        notes.append(f"No neurons: {listed(empty)}.")
    return notes


def significance_notes(study: Study) -> list[str]:
    """What the interval, p and q of a score are, and the least sure ones; of those that are there.

    The numbers of draws are those that identify noted.
    """
    measured = [rows for rows in study.significance.values() if len(rows)]
    rows = np.concatenate(measured) if measured else np.empty((0, 4))
    has_p, has_q, has_interval = (bool(np.isfinite(rows[:, c]).any()) for c in range(3))
    stages = study.manifest.get("stages", {})
    inputs = stages.get("identify", {}).get("inputs", {})

    def count(name: str) -> str:
        n = inputs.get(name)
        return f"{n:,} " if isinstance(n, int) else ""

    notes = []
    if has_interval:
        notes.append(
            f"The 95{NBSP}% interval of a score is that of {count('bootstrap')}bootstrap resamples "
            "of the relation's facts, with all prompts of a fact, positives and negatives apart."
        )
    if has_p:
        notes.append(
            f"p: the share of {count('permutations')}shufflings of the relation's labels that "
            f"score the neuron as high, itself counted; at most {np.nanmax(rows[:, 0]):.2g} here."
        )
    if has_q:
        notes.append(
            "q: among all neurons that rank as high, the expected share that carry nothing "
            f"(Benjamini–Hochberg over the model's {study.n_neurons:,} neurons, against "
            f"{count('noise')}columns of noise); at most {np.nanmax(rows[:, 1]):.2g} here."
        )
    if has_p or has_q:
        notes.append(
            "Low p and q say that a neuron tells the relation's prompts from the others', "
            "not that it does nothing else. Prompts count as independent of each other."
        )
    return notes
