"""The report's sections on an attribution; methods/gains/report.py has its first words.

Every sentence is made from the tables, and what the folder has no data for has no section.
arXiv 2312.12141.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from relneuron.methods.gains import figures as draw
from relneuron.methods.gains.study import BEST, LAYERS, AttributionStudy, Condition
from relneuron.methods.gains.tables import SHOWN, TITLES, head_means, means
from relneuron.report.kit import floats, short
from relneuron.report.parts import Section, n_of
from relneuron.report.tables import Cell, Share, Table, percent, significant

METHODS = {
    "log_prob_gain": "log-probability gain",
    "log_prob": "log-probability alone",
    "prob_gain": "probability gain",
    "norm": "norm of the value vector",
    "coefficient": "size of the activation",
    "reciprocal_rank": "1 / rank of the answer",
    "coefficient_norm": "activation × norm",
    "coefficient_rank": "activation / rank",
}
ABOUT_DROPS = (
    "Drop: (clean − off) / clean of the mean over sentences. Intervals: bootstrap over facts, "
    "paired with the clean model; of random neurons the range of the seeds."
)

Tables = Mapping[str, Table]
Rows = Sequence[tuple[str, list[Condition]]]


def sections(study: AttributionStudy, tables: Tables) -> list[Section]:
    makers = (comparison, interventions, heads_off, layers, heads, neurons, sides, answers)
    return [section for make in makers for section in make(study, tables)]


def change(drop: float) -> str:
    """What a relative drop does, for a sentence."""
    if not math.isfinite(drop):
        return "cannot be compared"
    text = percent(abs(drop))
    if text == percent(0):
        return "stays the same"
    return f"{'falls' if drop > 0 else 'rises'} by {text}"


# Interventions


def random_of(study: AttributionStudy, kind: str, relation: str = "") -> list[Condition]:
    """The conditions `kind.<seed>`."""
    found = study.of(relation).items()
    return [c for name, c in found if name.rpartition(".")[0] == kind]


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


def comparison(study: AttributionStudy, tables: Tables) -> list[Section]:
    known = study.of()
    rows = [(title, [known[name]]) for name, title in METHODS.items() if name in known]
    if not rows:
        return []
    drawn, n = random_of(study, "random"), study.zeroed["method"]
    rows += [("random neurons", drawn)] if drawn else []
    effects = effects_table(rows, "Drops by method, all relations")
    drop = dict(zip(effects.column("off"), floats(effects, "prob_drop").tolist(), strict=True))
    methods = [title for title, _ in rows if title in METHODS.values()]
    best = max(methods, key=lambda title: drop[title])
    seen = [
        f"{n_of(known['clean'].n, 'sentence')} whose answer the model knows, {n} FFN neurons of "
        f"each set to zero. Before: mean reciprocal rank {significant(known['clean'].mrr, 3)}, "
        f"probability {percent(known['clean'].prob)}."
        if "clean" in known
        else f"{n} FFN neurons of each sentence are set to zero.",
        f"The neurons by {best} cost the most: the answer's probability {change(drop[best])}.",
    ]
    drawings = [draw.effects_plot(effects, "comparison")]
    if len(study.relations) > 1:
        by_relation: list[list[Cell]] = [
            [relation, METHODS[name], Share(c.prob_drop[0])]
            for relation in study.relations
            for name, c in study.of(relation).items()
            if name in METHODS
        ]
        table = Table("", ["relation", "off", "prob_drop"], by_relation)
        drawings.append(draw.drops_heatmap(table, "bymethod", "chosen by"))
    return [
        Section(
            "comparison",
            "Which score finds the neurons that matter",
            f"If the {n} best FFN neurons of a sentence are set to zero, which way to choose them "
            "costs the answer most?",
            seen,
            f"{ABOUT_DROPS} Neurons are chosen for each sentence, by the method of the row. The "
            "log-probability gain is how much a neuron's value vector, added to the residual "
            "stream, raises the answer's log-probability (“alone”: what it is when nothing else "
            "is in the stream); rank: that of the answer among the tokens the value vector "
            "promotes. Matrix: probability lost in %, by relation.",
            drawings,
            [("comparison", tables["comparison"])],
        )
    ]


def interventions(study: AttributionStudy, _: Tables) -> list[Section]:
    """Value neurons and query neurons, against as many random ones."""
    known = study.of()
    titles = {"value": "value neurons", "query": "query neurons"}
    rows: list[tuple[str, list[Condition]]] = []
    seen = []
    for name, title in titles.items():
        if name not in known:
            continue
        drawn = random_of(study, f"random_{name}")
        rows += [(title, [known[name]])] + ([(f"random for {title}", drawn)] if drawn else [])
        lost = change(known[name].prob_drop[0])
        text = f"Without its {title} the answer's probability {lost}"
        if drawn:
            chance = float(np.mean([c.prob_drop[0] for c in drawn]))
            text += f", without as many random ones it {change(chance)}"
        seen.append(f"{text}.")
    if not rows:
        return []
    effects = effects_table(rows, "Drops without value and without query neurons")
    sizes = study.zeroed
    if {"value_attention", "value_ffn", "query"} <= sizes.keys():
        seen.append(
            f"Off are the best {sizes['value_attention']:,} attention and {sizes['value_ffn']:,} "
            f"FFN value neurons, or the best {sizes['query']:,} query neurons."
        )
    return [
        Section(
            "interventions",
            "Value neurons and query neurons off",
            "Does the answer need the neurons that hold it, and those that call them?",
            seen,
            f"{ABOUT_DROPS} Value neurons: the attention and FFN neurons of a sentence that raise "
            "its answer most. Query neurons: the FFN neurons in earlier layers that activate the "
            "best value neurons.",
            [draw.effects_plot(effects, "interventions")],
            [("drops", effects)],
        )
    ]


def heads_off(study: AttributionStudy, _: Tables) -> list[Section]:
    """The best heads of each relation off, asked of all relations."""
    rows: list[list[Cell]] = [
        [relation, off, Share(c.prob_drop[0]), *map(Share, c.prob_drop[1:])]
        for relation in study.relations
        for off in study.relations
        if (c := study.of(relation).get(f"heads:{off}"))
    ]
    if not rows:
        return []
    columns = ["relation", "off", "prob_drop", "prob_drop_low", "prob_drop_high"]
    table = Table("Probability lost without the best heads of a relation", columns, rows)
    n_heads = n_of(study.zeroed["heads"], "head") if "heads" in study.zeroed else "1 % of all"
    own = [float(row[2]) for row in rows if row[0] == row[1]]
    others = [float(row[2]) for row in rows if row[0] != row[1]]
    seen = []
    if own:
        seen.append(
            f"The answer's probability {change(float(np.mean(own)))} on average without the "
            "relation's own heads"
            + (f", it {change(float(np.mean(others)))} without another's." if others else ".")
        )
    if drawn := random_of(study, "random_heads"):
        chance = float(np.mean([c.prob_drop[0] for c in drawn]))
        seen.append(f"Without as many random heads it {change(chance)}.")
    return [
        Section(
            "heads_off",
            "Attention heads off",
            "Do the heads that raise the answers of one relation serve the others too?",
            seen,
            "Probability lost in %. A row is a relation that was asked, a column the relation "
            f"whose best heads ({n_heads}) were off; frames mark a relation's own.",
            [draw.drops_heatmap(table, "headsoff", "heads off", framed=True)],
            [("heads_off", table)],
        )
    ]


# Scores


def layers(study: AttributionStudy, tables: Tables) -> list[Section]:
    if "layers" not in tables:
        return []
    titles = {"attention_layer": "attention layers", "ffn_layer": "FFN layers"}
    by_kind = {titles[kind]: means(study, kind) for kind in LAYERS}
    weights = study.n_sentences.astype(np.float64)
    seen = []
    for title, values in by_kind.items():
        mean = weights @ values / weights.sum()
        best = int(mean.argmax())
        seen.append(
            f"Of the {title}, layer {best} raises the answer most: by "
            f"{significant(float(mean[best]), 3)} nats on average; all of them together by "
            f"{significant(float(mean.sum()), 3)}."
        )
    return [
        Section(
            "layers",
            "Which layers raise the answer",
            "In which layers is the answer's log-probability won?",
            seen,
            "By how many nats what the layer writes raises the log-probability of the answer's "
            "first token, mean over sentences; the final norm's scale is "
            f"{'that of each state' if study.asked.get('own_norm') else 'that of the whole model'}"
            ". Bars: mean of all sentences. Squares: one relation; red raises, blue lowers. All "
            "attention and FFN layers together make the whole way from the embedding to the "
            "prediction.",
            [draw.layer_scores_plot(by_kind, weights, study.relations)],
            [("layers", tables["layers"])],
        )
    ]


def heads(study: AttributionStudy, tables: Tables) -> list[Section]:
    if study.n_heads * int(study.model["layers"]) < 2 or "heads" not in tables:
        return []
    weights = study.n_sentences / study.n_sentences.sum()
    values = np.tensordot(weights, head_means(study), 1)
    layer, head = divmod(int(values.argmax()), study.n_heads)
    table = tables["heads"]
    first = [(str(row[0]), str(row[2])) for row in table.rows if row[1] == 1]
    named = ", ".join(f"“{short(relation)}” {name}" for relation, name in first[:6])
    return [
        Section(
            "heads",
            "Which heads raise the answer",
            "Do a few attention heads bring the answer?",
            [
                f"Over all sentences: head {head} of layer {layer}, "
                f"{significant(float(values[layer, head]), 3)} nats.",
                f"The best of each relation: {named}{', …' if len(first) > 6 else ''}.",
            ],
            "By how many nats a head's write raises the log-probability of the answer's first "
            "token, mean over sentences: red raises, blue lowers.",
            [draw.heads_plot(values)],
            [("heads", table)],
        )
    ]


def neurons(study: AttributionStudy, tables: Tables) -> list[Section]:
    shown = [(f"{kind}s", tables[f"{kind}s"]) for kind in TITLES if f"{kind}s" in tables]
    if not shown:
        return []
    seen = []
    if "ffn_neurons" in tables:
        table = tables["ffn_neurons"]
        shares = floats(table, "share")
        row = table.rows[int(shares.argmax())]
        seen.append(
            f"The FFN neuron that most sentences of a relation share is {row[2]}, among the best "
            f"{BEST} of {percent(float(row[4]))} of those of “{short(str(row[0]))}”."
        )
        if row[7]:
            seen.append(f"It raises {row[7]}.")
    return [
        Section(
            "neurons",
            "The neurons that raise the answer",
            "Which neurons do many sentences of a relation have in common, and what do they say?",
            seen,
            f"The {SHOWN} neurons of each relation that are among the best {BEST} of most of its "
            "sentences; score: mean over these sentences (value neurons: nats). An attention "
            "neuron is a coordinate of a head, at any position. coefficient: what its value "
            "vector is multiplied with, mean over such sentences of all relations; raises, lowers: "
            "the "
            "tokens whose logits that raises and lowers most, the first one most. With a negative "
            "coefficient it raises what its value vector suppresses. Of a query neuron: where the "
            "value neurons read it.",
            tables=shown,
            most=SHOWN * max(2, len(study.relations)),
            open=1,
        )
    ]


def sides(study: AttributionStudy, tables: Tables) -> list[Section]:
    """Value and query neurons side by side."""
    if "top_layers" not in tables or len(tables["top_layers"].columns) < 3:
        return []  # one kind has nothing at its side
    top, drawings = tables["top_layers"], []
    layer = floats(top, "layer")
    middle = {kind: float(np.average(layer, weights=floats(top, kind))) for kind in top.columns[1:]}
    named = {kind: title.replace("Attention", "attention") for kind, title in TITLES.items()}
    text = ", ".join(f"{named[kind]} {mean:.1f}" for kind, mean in middle.items())
    seen = [f"Mean layer: {text}."]
    drawings.append(draw.top_layers_plot(top, TITLES))
    shown = [("top_layers", top)]
    if "value_query" in tables:
        table = tables["value_query"]
        weights = study.n_sentences
        value, both, chance = (
            float(np.average(floats(table, name), weights=weights))
            for name in ("value_only", "query_value", "expected")
        )
        seen.append(
            f"Of the {significant(value + both, 3)} top FFN value neurons of a sentence, "
            f"{significant(both, 3)} are among its query neurons too; chance would have "
            f"{significant(chance, 3)}."
        )
        drawings.append(draw.value_query_plot(table))
        shown.append(("value_query", table))
    if "query_layers" in tables:
        table = tables["query_layers"]
        best = int(floats(table, "score").argmax())
        seen.append(f"What activates the value neurons most: {table.column('component')[best]}.")
        drawings.append(draw.query_layers_plot(table))
        shown.append(("query_layers", table))
    return [
        Section(
            "sides",
            "Value and query neurons side by side",
            "Are the neurons that hold the answer the same as those that call it?",
            seen,
            f"The {study.n_top} best of each sentence. Value neurons write "
            "what raises the answer. Query neurons write what the best value neurons of the "
            "attention read: their share of that key, times the value neuron's gain. A and F with "
            "a number are what that attention and FFN layer writes, h0 the embedding.",
            drawings,
            shown,
        )
    ]


def answers(study: AttributionStudy, tables: Tables) -> list[Section]:
    table = tables["answers"]
    several = int(floats(table, "answers_of_several_tokens").sum())
    kept = sum(target.kept for target in study.targets)
    seen = [
        f"{n_of(len(study.targets), 'sentence')}, {kept:,} of them known: the answer is among the "
        "model's ten most probable tokens and above every other answer of its relation."
    ]
    if len(study.scored) < len(study.targets):
        seen.append("Only the known ones are scored; all means of scores are over them.")
    if several:
        seen.append(
            f"{n_of(several, 'answer')} {'has' if several == 1 else 'have'} several tokens: the "
            "first one is scored."
        )
    return [
        Section(
            "answers",
            "What was asked",
            "How well does the model know the answers before anything is set to zero?",
            seen,
            "mrr: mean reciprocal rank of the answer's first token among all tokens; prob and "
            "logprob: means of its probability and its logarithm in nats.",
            tables=[("answers", table)],
            open=1,
        )
    ]
