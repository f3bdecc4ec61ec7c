"""The report's sections on what sets do: a question, what is seen, a picture, and the numbers.

analyses/page.py puts them in order. Every sentence is made from the tables; an analysis without a
table has no section. arXiv 2502.17355, sections 4 and 5.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from relneuron.analyses import figures as draw
from relneuron.analyses import resilience_test
from relneuron.analyses.drops import headline
from relneuron.analyses.study import Study
from relneuron.report import figures, kit
from relneuron.report.page import Section
from relneuron.report.tables import (
    Cell,
    Share,
    Table,
    label,
    n_of,
    percent,
    significant,
    split_title,
    spread,
)

MOST_COLUMNS = 100  # sets in a picture of what they do

# What sets do


def accuracy(study: Study) -> Section:
    main = study.main
    table = accuracy_of(main.split, study.tables["accuracy"])
    before, own = (table.mean(name) for name in ("before", "own"))
    seen = [f"On average {percent(before)} are answered right before."]
    how = []
    if np.isfinite(own):
        tested = int(np.isfinite(table.floats("p_value")).sum())
        seen[0] = (
            f"On average {percent(before)} are answered right before, {percent(own)} with the own "
            f"neurons off. {_lost(table)} of {n_of(tested, 'relation')} lose answers beyond chance."
        )
        how.append(
            "Intervals: bootstrap over facts, with all prompts of a fact (Wilson's where all or no "
            "answers are right); beyond chance: exact sign-flip test of the right answers per "
            f"fact, q ≤ {kit.SURE} (Benjamini–Hochberg)."
        )
    drops = [(name, table.mean(f"{name}_drop")) for name in ("random", "matched")]
    if known := [f"{name} neurons {percent(x)}" for name, x in drops if np.isfinite(x)]:
        seen.append(f"What other neurons cost instead, mean drop: {', '.join(known)}.")
        how.append(
            f"Grey bars span the sets drawn ({len(main.of_kind('random'))} random ones, as large "
            "as the largest set), a line is their mean."
        )
    else:
        seen.append("No random sets were switched off: nothing says what other neurons would do.")
    if np.isfinite(drops[1][1]):
        how.append(
            "Matched sets have as many neurons in each layer and projection as the relation's own."
        )
    plots = figures.accuracy_plots(table, [main.split], "accuracy")
    question = "Does a relation lose its facts when its own neurons are off?"
    return Section(
        "accuracy",
        "Accuracy before and after",
        question,
        seen,
        " ".join(how),
        plots,
        [(f"accuracy.{main.split}", table)],
    )


def accuracy_of(split: str, table: Table) -> Table:
    title = f"Accuracy on {split_title(split)}"
    return table.where("split", split)._replace(title=title)


def prompts(study: Study) -> Section:
    """Other templates and languages, beside the main split."""
    table = splits_table(study)
    names = [split_title(split) for split in study.grids]
    drops = table.floats("own_drop")
    seen = [f"Mean drop on {names[0]}: {percent(drops[0])}."]
    if np.isfinite(drops[1:]).any():
        least, most = 1 + np.nanargmin(drops[1:]), 1 + np.nanargmax(drops[1:])
        if percent(drops[least]) == percent(drops[most]):
            which = f" ({names[least]})" if len(names) == 2 else ""
            seen.append(f"Asked otherwise: {percent(drops[least])}{which}.")
        else:
            seen.append(
                f"Asked otherwise, from {percent(drops[least])} ({names[least]}) to "
                f"{percent(drops[most])} ({names[most]})."
            )
    everything = study.tables["accuracy"]
    others = [*study.grids][1:]
    return Section(
        "prompts",
        "In other words and languages",
        "Are the same neurons needed when the facts are asked in another way?",
        seen,
        "The neurons were found with the main templates in one language. First figure: "
        "means over relations; then each relation.",
        [draw.splits_plot(table), *figures.accuracy_plots(everything, others, "more")],
        [
            ("splits", table),
            *((f"accuracy.{split}", accuracy_of(split, everything)) for split in others),
        ],
        open=1,
    )


def splits_table(study: Study) -> Table:
    """Mean drops by split: of relations under their own sets, of all other pairs, under random."""
    rows: list[list[Cell]] = [
        [split, *(Share(found.mean) for found in headline(grid))]
        for split, grid in study.grids.items()
    ]
    columns = ["split", "own_drop", "others_drop", "random_drop"]
    return Table("Mean accuracy drop by kind of prompt", columns, rows)


def drop(study: Study) -> Section:
    table = study.tables["drop"]
    foreign = table.where("own", 0)
    drops, q = foreign.floats("drop"), foreign.floats("q_value")
    lose, gain = (
        int(((q <= kit.SURE) & (drops > 0)).sum()),
        int(((q <= kit.SURE) & (drops < 0)).sum()),
    )
    seen = []
    if n := int(np.isfinite(drops).sum()):
        seen.append(
            f"{n_of(n, 'pair')} of a relation and a foreign set: {lose:,} with a loss beyond "
            f"chance (q ≤ {kit.SURE}), {gain:,} with a gain."
        )
        worst = int(np.nanargmax(drops))
        if drops[worst] > 0:
            asked, off = (label(str(foreign.column(name)[worst])) for name in ("relation", "off"))
            seen.append(
                f"The largest side effect: “{asked}” loses {percent(drops[worst])} of its accuracy "
                f"when the neurons of “{off}” are off."
            )
    drawn = costliest(table)
    if len(drawn.rows) < len(table.rows):
        n = len(set(drawn.column("off")))
        seen.append(
            f"Drawn: the sets of the relations that were asked and those that cost one of them "
            f"most, {n:,} of {n_of(len(set(table.column('off'))), 'set')}."
        )
    return Section(
        "drop",
        "Which set breaks which relation",
        "Does a set break only its own relation, or others too?",
        seen,
        "Accuracy lost in % of the accuracy before. A row is a relation that was asked, a column "
        "the set that was off; frames mark a relation's own set. Bold: beyond chance (exact "
        f"sign-flip test over facts, Benjamini–Hochberg over the matrix, q ≤ {kit.SURE}); small: "
        "could be chance. A dash: the model answered none before, or the pair was not run.",
        [figures.drop_heatmap(drawn)],
        [("drop", table)],
    )


def costliest(table: Table) -> Table:
    """The rows of `drop` of the sets that are drawn: all, or of very many some, in their order.

    Those are the sets of the relations that were asked, then those that change a relation most, to
    as many as have a number each.
    """
    change: dict[Cell, float] = {}
    rows = zip(table.column("off"), table.column("own"), table.floats("drop"), strict=True)
    for off, is_own, found in rows:
        weight = np.inf if is_own else abs(found) if np.isfinite(found) else 0.0
        change[off] = max(change.get(off, 0.0), weight)
    if len(change) <= MOST_COLUMNS:
        return table
    n = max(kit.MOST, sum(weight == np.inf for weight in change.values()))
    kept = {*sorted(change, key=lambda off: -change[off])[:n]}
    place = table.columns.index("off")
    return table._replace(rows=[row for row in table.rows if row[place] in kept])


def interference(study: Study) -> Section:
    table = study.tables["interference"]
    pairs = Counter(zip(table.column("relation"), table.column("off"), strict=True))
    (relation, off), n = pairs.most_common(1)[0]
    asked = len(set(table.column("id")))
    return Section(
        "interference",
        "Answers that get better",
        "Which wrong answers become right when the neurons of another relation are off?",
        [
            f"{n_of(len(table.rows), 'answer')} to {n_of(asked, 'prompt')} get right; most of a "
            f"pair, {n:,}, of “{label(str(relation))}” with the neurons of “{label(str(off))}” off."
        ],
        tables=[("interference", table)],
        most=50,
        open=1,
    )


def errors(study: Study) -> Section:
    table = study.tables["errors"]
    counts = {name: int(table.floats(kind).sum()) for kind, (name, *_) in draw.ERROR_TITLES.items()}
    lost = int(table.floats("n_lost").sum())
    most = max(counts, key=lambda name: counts[name])
    seen = [f"Lost: {n_of(lost, 'answer')} that were right before."]
    if lost:
        seen.append(
            f"The most frequent kind of new answer: {most} ({percent(counts[most] / lost)})."
        )
    return Section(
        "errors",
        "What lost answers become",
        "What does the model say instead, when the own neurons are off?",
        seen,
        "Wrong answers with the own neurons off, each counted as the first kind that fits, in the "
        "order of the legend; right of the bars, each relation's most common one.",
        [draw.errors_plot(table)],
        [("errors", table)],
    )


def resilience(study: Study) -> Section:
    table = study.tables["resilience"]
    kept, lost = (table.floats(f"n_{kind}") for kind in ("resilient", "sensitive"))
    sure, unsure = (table.floats(f"logprob_{kind}") for kind in ("resilient", "sensitive"))
    test = resilience_test(table)
    seen = [f"{int(lost.sum()):,} of {n_of(int((kept + lost).sum()), 'right answer')} are lost."]
    if test.n:
        seen.append(
            f"In {int((unsure < sure).sum())} of {n_of(test.n, 'relation')} with facts of both "
            "kinds the model was less sure of the lost ones before (signed-rank test over "
            f"relations: p = {significant(test.p_value, 2)})."
        )
    rarer = table.floats("frequency_difference")
    if np.isfinite(rarer).any():
        seen.append(
            f"In {int((rarer < 0).sum())} of {n_of(int(np.isfinite(rarer).sum()), 'relation')} "
            "fewer documents name the lost facts than the kept ones, on average."
        )
    return Section(
        "resilience",
        "Facts that survive",
        "Which facts survive the loss of their relation's neurons: those the model is surest of?",
        seen,
        "Left: of the answers that were right before, those the own set breaks. Right: how "
        "probable the right answer's first token was before, for the facts lost and those kept.",
        [draw.resilience_plot(table)],
        [("resilience", table)],
    )


def perplexity(study: Study) -> Section:
    table = study.tables["perplexity"]
    ratio, q = table.floats("ratio"), table.floats("q_value")
    drawn = table.floats("random") / table.floats("before")
    worse, better = ((q <= kit.SURE) & (ratio > 1)).sum(), ((q <= kit.SURE) & (ratio < 1)).sum()
    seen = []
    if np.isfinite(ratio).any():
        seen.append(
            f"With the own neurons off perplexity is {percent(np.nanmin(ratio))} to "
            f"{percent(np.nanmax(ratio))} of that before; beyond chance it rises for {worse} and "
            f"falls for {better} of {n_of(len(ratio), 'relation')}."
        )
    if np.isfinite(drawn).any():
        seen.append(f"With random neurons off it is {percent(spread(drawn).mean)} on average.")
    return Section(
        "perplexity",
        "Perplexity of neutral sentences",
        "Is the text around a relation's objects still likely when its neurons are off?",
        seen,
        "Sentences that name the relation's objects without asking for a fact; perplexity is the "
        "mean over sentences. 100 %: no change. Intervals: bootstrap over sentences; beyond "
        f"chance: Wilcoxon's signed-rank test, q ≤ {kit.SURE} (Benjamini–Hochberg).",
        [draw.perplexity_plot(table)],
        [("perplexity", table)],
    )


# How many neurons, and which


def sizes(study: Study) -> Section:
    table = study.tables["sizes"]
    counts = [int(n) for n in np.unique(table.floats("size")) if n]
    drops = {
        size: [table.where("size", size).mean(f"{who}_drop") for who in ("own", "others")]
        for size in counts
    }
    seen = []
    for place, who in enumerate(("the relation itself", "the others")):
        broken = [size for size in counts if drops[size][place] >= 0.5]
        seen.append(
            f"The accuracy of {who} is halved, on average, from {n_of(broken[0], 'neuron')} on."
            if broken
            else f"No size halves the accuracy of {who} on average; the drop with the largest, "
            f"{n_of(counts[-1], 'neuron')}, is {percent(drops[counts[-1]][place])}."
        )
    return Section(
        "sizes",
        "How many neurons it takes",
        "How does the effect grow with the number of neurons, and when do other relations suffer?",
        seen,
        "Accuracy with the best neurons of the relation's ranking off, by their number (log "
        "scale); 0 is the model as it is. Intervals: 95 %, bootstrap over facts.",
        [draw.sizes_plot(table)],
        [("sizes", table)],
    )


def cumulativity(study: Study) -> Section:
    table, summary = study.tables["cumulativity"], study.tables["cumulativity_summary"]
    total, affected = (int(summary.floats(name).sum()) for name in ("total", "affected"))
    seen = [f"{n_of(total, 'fact')} were lost when a range of neurons joined those before it"]
    if total:
        seen[0] += (
            f"; {affected:,} of them are also lost when that range alone is off, so "
            f"{percent(1 - affected / total)} were lost by the neurons together only"
        )
    return Section(
        "cumulativity",
        "Whether small effects add up",
        "Are facts lost to single groups of neurons, or only to many groups together?",
        [f"{seen[0]}."],
        "For each range of ranks: the facts that get lost when it is off besides the neurons "
        "before it (n); cumulativity is the share of them that the range alone does not break.",
        [draw.cumulativity_plot(table, summary)],
        [("cumulativity_summary", summary), ("cumulativity", table)],
    )


def sites(study: Study) -> Section:
    table = study.tables["sites"]
    means = [
        (site, table.where("site", site).mean("own_drop"))
        for site in dict.fromkeys(map(str, table.column("site")))
    ]
    named = ["own set" if site == "all" else f"{site} only" for site, _ in means]
    text = ", ".join(f"{n} {percent(x)}" for n, (_, x) in zip(named, means, strict=True))
    return Section(
        "sites",
        "Which type of neuron",
        "Do neurons of gate, up or down projections carry the effect?",
        [f"Mean drop of the relation itself: {text}."],
        "The best neurons of one type, as many as the relation's set has (or all there are). "
        "gate and up are the outputs of gate_proj and up_proj, down the output of down_proj.",
        [draw.sites_plot(table)],
        [("sites", table)],
    )


def gain(study: Study) -> Section:
    table, shared = study.tables["gain"], study.tables["gain_overlap"]
    drops = {
        (method, who): percent(table.where("method", method).mean(who))
        for method in ("ap", "gain")
        for who in ("drop", "others_drop")
    }
    seen = [
        f"Mean drop of the relation itself: {drops['ap', 'drop']} with its neurons by average "
        f"precision (AP) off, {drops['gain', 'drop']} with as many by gain. Of the others: "
        f"{drops['ap', 'others_drop']} and {drops['gain', 'others_drop']}."
    ]
    n, by_ap, by_gain, chance = (shared.mean(name) for name in ("shared", "ap", "gain", "expected"))
    if np.isfinite(shared.floats("p_value")).any():
        beyond = int((shared.floats("q_value") <= kit.SURE).sum())
        seen.append(
            f"The sets by AP set {significant(by_ap, 3)} products of the MLPs to zero on average, "
            f"those by gain {significant(by_gain, 3)}, of which {significant(n, 3)} are the same; "
            f"random sets would share {significant(chance, 3)}. {beyond:,} of "
            f"{n_of(len(shared.rows), 'relation')} share more than chance (q ≤ {kit.SURE})."
        )
    if np.isfinite(known := shared.mean("correlation")):
        seen.append(f"Rank correlation of the two scores, mean: {significant(known, 2)}.")
    return Section(
        "gain",
        "Neurons by log-probability gain",
        "Are the neurons that tell a relation's prompts from others those that raise its answers?",
        seen,
        "AP asks how well a neuron's output tells the relation's prompts from others. The gain "
        "(arXiv 2312.12141) asks what it writes: by how many nats its value vector, added to the "
        "residual stream, raises the log-probability of the answer's first token; mean over the "
        "relation's det prompts that are answered right. A set by gain holds products of the "
        "MLPs, as many as the relation's own set has neurons: a zeroed gate or up output zeroes "
        "one product too, a zeroed down output none. Intervals: 95 %, bootstrap over facts.",
        [draw.gain_plot(table)],
        [("gain", table), ("gain_overlap", shared)],
    )


# Numbers in sentences


def _lost(table: Table) -> int:
    """The rows of `accuracy` that lose answers beyond chance."""
    lost, gained, q = (table.floats(name) for name in ("lost", "gained", "q_value"))
    return int(((q <= kit.SURE) & (lost > gained)).sum())
