"""The tables of an attribution: what its page shows, and csv files for other programs.

methods/gains/page.py shows them, `report` writes them into the folder's analyses/.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from relneuron.artifact.gains import ffn_widths
from relneuron.artifact.neurons import Shape
from relneuron.methods.gains.study import LAYERS, NEURONS, AttributionStudy, Effect, Promoted, Unit
from relneuron.report.tables import Array, Cell, Share, Table

SHOWN = 5  # neurons, or heads, of each relation
VALUE_QUERY = ("value_only", "query_value", "query_only")
TITLES = {
    "ffn_neuron": "FFN value neurons",
    "attention_neuron": "Attention value neurons",
    "query_ffn_neuron": "FFN query neurons",
}
Rows = list[tuple[str, list[Effect]]]
UNKNOWN = Promoted(float("nan"), float("nan"), [], [])
SCORES = {  # that choose a sentence's neurons, by their titles
    "log_prob_gain": "log-probability gain",
    "log_prob": "log-probability alone",
    "prob_gain": "probability gain",
    "norm": "norm of the value vector",
    "coefficient": "size of the activation",
    "reciprocal_rank": "1 / rank of the answer",
    "coefficient_norm": "activation × norm",
    "coefficient_rank": "activation / rank",
}
DROPS = ("mrr_drop", "prob_drop", "logprob_drop")


def attribution_tables(study: AttributionStudy) -> dict[str, Table]:
    """Every table that the attribution has data for, by its file's name without .csv."""
    found = {
        "answers": answers_table(study),
        "layers": layer_table(study),
        "heads": head_table(study),
        **{f"{kind}s": neuron_table(study, kind) for kind in NEURONS},
        "top_layers": top_layers_table(study),
        "value_query": value_query_table(study),
        "query_layers": query_layer_table(study),
        "comparison": comparison_table(study),
    }
    return {name: table for name, table in found.items() if table.rows}


def answers_table(study: AttributionStudy) -> Table:
    """How well the model knew the answers before anything was set to zero."""
    rows: list[list[Cell]] = []
    for relation in dict.fromkeys(target.relation for target in study.targets):
        own = [target for target in study.targets if target.relation == relation]
        several = sum(target.n_answer_tokens > 1 for target in own)
        mrr = float(np.mean([1 / target.rank for target in own]))
        prob, logprob = (float(np.mean([getattr(t, n) for t in own])) for n in ("prob", "logprob"))
        kept = sum(target.kept for target in own)
        rows.append([relation, len(own), kept, several, mrr, Share(prob), logprob])
    columns = ["relation", "sentences", "known", "answers_of_several_tokens"]
    return Table("Sentences and answers", [*columns, "mrr", "prob", "logprob"], rows)


# Layers and heads


def means(study: AttributionStudy, kind: str) -> Array:
    """Mean score over each relation's sentences, (R, L)."""
    found: Array = study.sums.layers[kind] / study.n_sentences[:, None]
    return found


def layer_table(study: AttributionStudy) -> Table:
    by_kind = [means(study, kind) for kind in LAYERS]
    rows: list[list[Cell]] = [
        [relation, layer, *(float(values[r, layer]) for values in by_kind)]
        for r, relation in enumerate(study.relations)
        for layer in range(int(study.model["layers"]))
        if any(values.any() for values in by_kind)
    ]
    columns = ["relation", "layer", "attention", "ffn"]
    return Table("Scores of layers, nats, mean over sentences", columns, rows)


def head_means(study: AttributionStudy) -> Array:
    """Mean score over each relation's sentences, (R, L, H)."""
    shape = len(study.relations), int(study.model["layers"]), study.n_heads
    values = np.zeros(shape)
    for place, total in study.sums.heads.items():
        values[place] = total
    found: Array = values / study.n_sentences[:, None, None]
    return found


def head_table(study: AttributionStudy) -> Table:
    """The best heads of each relation."""
    rows: list[list[Cell]] = []
    for relation, values in zip(study.relations, head_means(study), strict=True):
        best = np.argsort(-values.ravel(), kind="stable")[:SHOWN]
        for rank, place in enumerate(best.tolist(), 1):
            layer, head = divmod(place, study.n_heads)
            rows.append([relation, rank, f"L{layer}.H{head}", float(values[layer, head])])
    return Table(
        "The best heads, nats, mean over sentences", ["relation", "rank", "head", "score"], rows
    )


# Neurons


def unit_name(unit: Unit, shape: Shape) -> str:
    """L3.17 for an FFN neuron, of an expert L3 expert 2 17; L3.H0.17 for an attention neuron."""
    _, layer, head, index = unit
    if head >= 0:
        return f"L{layer}.H{head}.{index}"
    return shape.name(layer, "gate", index).replace(".gate", "").replace(" gate", "")


def neuron_table(study: AttributionStudy, kind: str) -> Table:
    """The neurons that are among the best of most of a relation's sentences.

    score: its mean over the sentences where the neuron is among the best.
    """
    rows: list[list[Cell]] = []
    shape = Shape.of(study.model)
    for r, relation in enumerate(study.relations):
        found = [
            (times, study.sums.total[r, unit] / times, unit)
            for (of, unit), times in study.sums.times.items()
            if of == r and unit[0] == kind
        ]
        best = sorted(found, key=lambda one: (-one[0], -one[1], one[2]))[:SHOWN]
        for rank, (times, score, unit) in enumerate(best, 1):
            share = Share(times / study.n_sentences[r])
            about = study.promoted.get(unit, UNKNOWN)
            name = unit_name(unit, shape)
            rows.append([relation, rank, name, times, share, score, about.coefficient])
            rows[-1] += [quoted(about.raised), quoted(about.lowered)]
    columns = ["relation", "rank", "neuron", "sentences", "share", "score", "coefficient"]
    columns += ["raises", "lowers"]
    return Table(f"{TITLES[kind]} that are among the best of most sentences", columns, rows)


def quoted(tokens: list[str]) -> str:
    return " ".join(f"“{token.strip() or token}”" for token in tokens)


def top_layers_table(study: AttributionStudy) -> Table:
    """Where the sentences' top value and query neurons are: mean number a sentence, by layer."""
    found = {kind: study.sums.by_layer[kind] for kind in NEURONS if kind in study.sums.by_layer}
    n = len(study.scored)
    rows: list[list[Cell]] = [
        [layer, *(float(counts[layer]) / n for counts in found.values())]
        for layer in range(int(study.model["layers"]) if found else 0)
    ]
    return Table("Top neurons of a sentence by layer, mean number", ["layer", *found], rows)


def value_query_counts(study: AttributionStudy) -> NDArray[np.int64]:
    """Of each sentence, FFN neurons among the top value, both, and query neurons: (N, 3)."""
    per_sentence = int(study.model["layers"]) * int(study.model["width"])
    value, query = (
        np.frombuffer(study.sums.places[kind], np.int64)
        for kind in ("ffn_neuron", "query_ffn_neuron")
    )
    both = np.intersect1d(value, query)
    n = [np.bincount(p // per_sentence, minlength=len(study.scored)) for p in (value, both, query)]
    return np.stack([n[0] - n[1], n[1], n[2] - n[1]], axis=1)


def value_query_table(study: AttributionStudy) -> Table:
    """How many top FFN neurons of a sentence are value neurons only, both, and query only; means.

    share: of the value neurons, those that are query neurons too. expected: both, if the two were
    drawn from the FFN neurons at random.
    """
    rows: list[list[Cell]] = []
    if {"ffn_neuron", "query_ffn_neuron"} <= study.sums.places.keys():
        counts = value_query_counts(study)
        total = sum(ffn_widths(study.model))
        of = np.array([study.relations.index(target.relation) for target in study.scored])
        for r, relation in enumerate(study.relations):
            value, both, query = counts[of == r].mean(axis=0).tolist()
            share = Share(both / (value + both) if value + both else np.nan)
            rows.append(
                [relation, value, both, query, share, (value + both) * (query + both) / total]
            )
    columns = ["relation", *VALUE_QUERY, "share", "expected"]
    return Table("Top FFN neurons of a sentence by what they are, mean number", columns, rows)


def query_layer_table(study: AttributionStudy) -> Table:
    """What the top value neurons' activation comes from: h0, then A (attention) and F (FFN)."""
    n_components = 1 + max((component for _, component in study.sums.query_layers), default=-1)
    totals = np.zeros(n_components)
    for (_, component), total in study.sums.query_layers.items():
        totals[component] += total
    rows: list[list[Cell]] = [
        [component_name(i), i / 2 - 0.5, value]
        for i, value in enumerate((totals / max(1, len(study.scored))).tolist())
    ]
    title = "Query scores of layers, mean over sentences"
    return Table(title, ["component", "layer", "score"], rows)


def component_name(place: int) -> str:
    """h0, A0, F0, A1, ... (methods B4)."""
    return f"{'AF'[(place - 1) % 2]}{(place - 1) // 2}" if place else "h0"


# Interventions


def comparison_table(study: AttributionStudy) -> Table:
    """comparison.csv, drops of MRR and probability as shares."""
    rows: list[list[Cell]] = []
    for c in study.conditions:
        drops = [*map(Share, c.mrr_drop), *map(Share, c.prob_drop), *c.logprob_drop]
        rows.append([c.name, c.relation, c.n, c.mrr, Share(c.prob), c.logprob, *drops])
    columns = ["condition", "relation", "n", "mrr", "prob", "logprob"]
    columns += [f"{name}{end}" for name in DROPS for end in ("", "_low", "_high")]
    return Table("Answers with neurons set to zero", columns, rows)


def random_of(study: AttributionStudy, kind: str, relation: str = "") -> list[Effect]:
    """The conditions `kind.<seed>`."""
    found = study.of(relation).items()
    return [c for name, c in found if name.rpartition(".")[0] == kind]


def mean_drop(found: Sequence[Effect]) -> float:
    """What they lose of the answer's probability, on average."""
    return float(np.mean([one.prob_drop[0] for one in found]))


def effects_table(rows: Rows, title: str) -> Table:
    """Drops under one condition each, or their mean and range over several (seeds)."""
    columns = ["off", "is_random"]
    columns += [
        f"{name}{end}" for name in ("mrr_drop", "prob_drop") for end in ("", "_low", "_high")
    ]
    found: list[list[Cell]] = []
    for name, conditions in rows:
        cells: list[Cell] = [name, int("random" in name)]
        for kind in ("mrr_drop", "prob_drop"):
            drops = np.array([getattr(c, kind) for c in conditions])
            ends = drops[0, 1:] if len(drops) == 1 else (drops[:, 0].min(), drops[:, 0].max())
            cells += [Share(x) for x in (drops[:, 0].mean(), *ends)]
        found.append(cells)
    return Table(title, columns, found)


def scores_table(study: AttributionStudy) -> Table:
    """The probability lost by each relation without the best neurons by each score."""
    rows: list[list[Cell]] = [
        [relation, SCORES[name], Share(found.prob_drop[0])]
        for relation in study.relations
        for name, found in study.of(relation).items()
        if name in SCORES
    ]
    return Table("Probability lost by score", ["relation", "off", "prob_drop"], rows)


def heads_table(study: AttributionStudy) -> Table:
    """The best heads of each relation off, asked of all relations."""
    rows: list[list[Cell]] = [
        [relation, off, *map(Share, found.prob_drop)]
        for relation in study.relations
        for off in study.relations
        if (found := study.of(relation).get(f"heads:{off}"))
    ]
    columns = ["relation", "off", "prob_drop", "prob_drop_low", "prob_drop_high"]
    return Table("Probability lost without the best heads of a relation", columns, rows)
