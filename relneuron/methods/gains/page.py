"""The page on an attribution: which neurons, heads and layers raise the answers.

`study.PAGE` names `build`. Every sentence is made from the tables, and what the folder has no data
for has no section. arXiv 2312.12141.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from relneuron.methods.gains import figures as draw
from relneuron.methods.gains.study import BEST, LAYERS, AttributionStudy, read_attribution_study
from relneuron.methods.gains.tables import (
    SCORES,
    SHOWN,
    TITLES,
    Rows,
    attribution_tables,
    effects_table,
    head_means,
    heads_table,
    mean_drop,
    means,
    random_of,
    scores_table,
)
from relneuron.report import kit
from relneuron.report.page import Page, Section, Tile
from relneuron.report.tables import Table, change, n_of, percent, significant

OURS = "log_prob_gain"  # the score of arXiv 2312.12141
STYLE = """\
.data .text { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; max-width: 26rem; }
.data td.text:last-child { min-width: 20rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); }"""
ABOUT_DROPS = (
    "Drop: (clean − off) / clean of the mean over sentences. Intervals: bootstrap over facts, "
    "paired with the clean model; of random neurons the range of the seeds."
)

Tables = Mapping[str, Table]


def build(folder: Path, titles: Mapping[str, str]) -> Page:
    return page(read_attribution_study(folder))


def page(study: AttributionStudy) -> Page:
    model, tables = study.model.get("id") or "an unnamed model", attribution_tables(study)
    makers = (comparison, interventions, heads_off, layers, heads, neurons, sides, answers)
    return Page(
        title=f"Where {model} finds its answers",
        facts=facts(study),
        question=f"Which neurons, heads and layers of the model {model} raise the probability of a "
        "sentence's answer, and is the answer lost without them?",
        answer=answer(study),
        tiles=tiles(study),
        sections=[section for make in makers if (section := make(study, tables))],
        tables=tables,
        manifest=study.manifest,
        style=STYLE,
    )


# The first words


def facts(study: AttributionStudy) -> str:
    found = [n_of(len(study.scored), "sentence"), n_of(len(study.relations), "relation")]
    if len(study.scored) < len(study.targets):
        found[0] += f" of {len(study.targets):,} that were asked"
    found.append(f"{'recomputed' if study.asked.get('own_norm') else 'frozen'} final norm")
    if study.sums.query_layers or "query_ffn_neuron" in study.sums.by_layer:
        is_ffn = study.asked.get("query_of") == "ffn"
        key = f" by their {study.asked.get('key')} key" if is_ffn else ""
        raw = ", keys not centred" if study.asked.get("center_keys") is False else ""
        found.append(f"query of {'FFN' if is_ffn else 'attention'} neurons{key}{raw}")
    return " · ".join(found)


def answer(study: AttributionStudy) -> str:
    """The answer to the question, in one sentence."""
    known = study.of()
    if OURS not in known:
        return _best_neuron(study)
    own, n = known[OURS].prob_drop[0], study.zeroed["method"]
    text = (
        f"When the {n} FFN neurons that raise a sentence's answer most are set to zero, the "
        f"answer's probability {change(own)}"
    )
    others = {name: known[name].prob_drop[0] for name in SCORES if name in known and name != OURS}
    if others:
        best = max(others, key=lambda name: others[name])
        text += f"; with the {n} best by another score ({SCORES[best]}) it {change(others[best])}"
    if drawn := random_of(study, "random"):
        text += f"; with random ones it {change(mean_drop(drawn))}"
    return f"{text}."


def _best_neuron(study: AttributionStudy) -> str:
    """What can be said where nothing was set to zero."""
    n = n_of(len(study.scored), "sentence")
    layers = study.sums.layers["ffn_layer"].sum(axis=0) / max(1, len(study.scored))
    if not layers.any():
        of = n_of(len(study.relations), "relation")
        return f"{n} of {of} are scored; nothing was set to zero."
    best = int(layers.argmax())
    return (
        f"Over {n} FFN layer {best} raises the answer most, by "
        f"{significant(float(layers[best]), 3)} nats on average; nothing was set to zero."
    )


def tiles(study: AttributionStudy) -> list[Tile]:
    kept = sum(target.kept for target in study.targets)
    found = [Tile("sentences", f"{len(study.targets):,}", f"{kept:,} known")]
    known = study.of()
    if "clean" in known:
        small = f"reciprocal rank {significant(known['clean'].mrr, 3)}"
        found.append(Tile("the answer's probability", percent(known["clean"].prob), small))
    rows = [("lost without the best by gain", [known[OURS]])] if OURS in known else []
    if drawn := random_of(study, "random"):
        rows.append(("lost without random ones", drawn))
    for title, *_, drop, low, high in effects_table(rows, "").rows:
        mean, *ends = (percent(float(value)) for value in (drop, low, high))
        small = " to ".join(ends) if math.isfinite(float(low)) else ""
        found.append(Tile(str(title), mean, small, "by gain" in str(title)))
    return found


# Interventions


def comparison(study: AttributionStudy, tables: Tables) -> Section | None:
    known = study.of()
    rows = [(title, [known[name]]) for name, title in SCORES.items() if name in known]
    if not rows:
        return None
    drawn, n = random_of(study, "random"), study.zeroed["method"]
    rows += [("random neurons", drawn)] if drawn else []
    effects = effects_table(rows, "Drops by method, all relations")
    drop = dict(zip(effects.column("off"), effects.floats("prob_drop").tolist(), strict=True))
    methods = [title for title, _ in rows if title in SCORES.values()]
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
        drawings.append(draw.drops_heatmap(scores_table(study), "bymethod", "chosen by"))
    return Section(
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


def interventions(study: AttributionStudy, _: Tables) -> Section | None:
    """Value neurons and query neurons, against as many random ones."""
    known, seen = study.of(), []
    rows: Rows = []
    for name in [name for name in ("value", "query") if name in known]:
        title = f"{name} neurons"
        drawn = random_of(study, f"random_{name}")
        rows += [(title, [known[name]])] + ([(f"random for {title}", drawn)] if drawn else [])
        text = f"Without its {title} the answer's probability {change(known[name].prob_drop[0])}"
        if drawn:
            text += f", without as many random ones it {change(mean_drop(drawn))}"
        seen.append(f"{text}.")
    if not rows:
        return None
    effects = effects_table(rows, "Drops without value and without query neurons")
    sizes = study.zeroed
    if {"value_attention", "value_ffn", "query"} <= sizes.keys():
        seen.append(
            f"Off are the best {sizes['value_attention']:,} attention and {sizes['value_ffn']:,} "
            f"FFN value neurons, or the best {sizes['query']:,} query neurons."
        )
    return Section(
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


def heads_off(study: AttributionStudy, _: Tables) -> Section | None:
    """The best heads of each relation off, asked of all relations."""
    table = heads_table(study)
    if not table.rows:
        return None
    n_heads = n_of(study.zeroed["heads"], "head") if "heads" in study.zeroed else "1 % of all"
    own = [float(row[2]) for row in table.rows if row[0] == row[1]]
    others = [float(row[2]) for row in table.rows if row[0] != row[1]]
    seen = []
    if own:
        seen.append(
            f"The answer's probability {change(float(np.mean(own)))} on average without the "
            "relation's own heads"
            + (f", it {change(float(np.mean(others)))} without another's." if others else ".")
        )
    if drawn := random_of(study, "random_heads"):
        seen.append(f"Without as many random heads it {change(mean_drop(drawn))}.")
    return Section(
        "heads_off",
        "Attention heads off",
        "Do the heads that raise the answers of one relation serve the others too?",
        seen,
        "Probability lost in %. A row is a relation that was asked, a column the relation "
        f"whose best heads ({n_heads}) were off; frames mark a relation's own.",
        [draw.drops_heatmap(table, "headsoff", "heads off", framed=True)],
        [("heads_off", table)],
    )


# Scores


def layers(study: AttributionStudy, tables: Tables) -> Section | None:
    if "layers" not in tables:
        return None
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
    return Section(
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


def heads(study: AttributionStudy, tables: Tables) -> Section | None:
    if study.n_heads * int(study.model["layers"]) < 2 or "heads" not in tables:
        return None
    weights = study.n_sentences / study.n_sentences.sum()
    values = np.tensordot(weights, head_means(study), 1)
    layer, head = divmod(int(values.argmax()), study.n_heads)
    table = tables["heads"]
    first = [(str(row[0]), str(row[2])) for row in table.rows if row[1] == 1]
    named = ", ".join(f"“{kit.short(relation)}” {name}" for relation, name in first[:6])
    return Section(
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


def neurons(study: AttributionStudy, tables: Tables) -> Section | None:
    shown = [(f"{kind}s", tables[f"{kind}s"]) for kind in TITLES if f"{kind}s" in tables]
    if not shown:
        return None
    seen = []
    if "ffn_neurons" in tables:
        table = tables["ffn_neurons"]
        shares = table.floats("share")
        row = table.rows[int(shares.argmax())]
        seen.append(
            f"The FFN neuron that most sentences of a relation share is {row[2]}, among the best "
            f"{BEST} of {percent(float(row[4]))} of those of “{kit.short(str(row[0]))}”."
        )
        if row[7]:
            seen.append(f"It raises {row[7]}.")
    return Section(
        "neurons",
        "The neurons that raise the answer",
        "Which neurons do many sentences of a relation have in common, and what do they say?",
        seen,
        f"The {SHOWN} neurons of each relation that are among the best {BEST} of most of its "
        "sentences; score: mean over these sentences (value neurons: nats). An attention "
        "neuron is a coordinate of a head, at any position. coefficient: what its value "
        "vector is multiplied with, mean over such sentences of all relations; raises, lowers: "
        "the tokens whose logits that raises and lowers most, the first one most. With a negative "
        "coefficient it raises what its value vector suppresses. Of a query neuron: where the "
        "value neurons read it.",
        tables=shown,
        most=SHOWN * max(2, len(study.relations)),
        open=1,
    )


def sides(study: AttributionStudy, tables: Tables) -> Section | None:
    """Value and query neurons side by side."""
    if "top_layers" not in tables or len(tables["top_layers"].columns) < 3:
        return None  # one kind has nothing at its side
    top = tables["top_layers"]
    layer = top.floats("layer")
    middle = {kind: float(np.average(layer, weights=top.floats(kind))) for kind in top.columns[1:]}
    named = {kind: title.replace("Attention", "attention") for kind, title in TITLES.items()}
    text = ", ".join(f"{named[kind]} {mean:.1f}" for kind, mean in middle.items())
    seen = [f"Mean layer: {text}."]
    drawings, shown = [draw.top_layers_plot(top, TITLES)], [("top_layers", top)]
    if "value_query" in tables:
        table, weights = tables["value_query"], study.n_sentences
        value, both, chance = (
            float(np.average(table.floats(name), weights=weights))
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
        best = int(table.floats("score").argmax())
        seen.append(f"What activates the value neurons most: {table.column('component')[best]}.")
        drawings.append(draw.query_layers_plot(table))
        shown.append(("query_layers", table))
    return Section(
        "sides",
        "Value and query neurons side by side",
        "Are the neurons that hold the answer the same as those that call it?",
        seen,
        f"The {study.n_top} best of each sentence. Value neurons write what raises the answer. "
        "Query neurons write what the best value neurons of the attention read: their share of "
        "that key, times the value neuron's gain. A and F with a number are what that attention "
        "and FFN layer writes, h0 the embedding.",
        drawings,
        shown,
    )


def answers(study: AttributionStudy, tables: Tables) -> Section | None:
    table = tables["answers"]
    several = int(table.floats("answers_of_several_tokens").sum())
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
    return Section(
        "answers",
        "What was asked",
        "How well does the model know the answers before anything is set to zero?",
        seen,
        "mrr: mean reciprocal rank of the answer's first token among all tokens; prob and "
        "logprob: means of its probability and its logarithm in nats.",
        tables=[("answers", table)],
        open=1,
    )
