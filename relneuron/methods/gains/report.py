"""The report's page on an attribution: which neurons, heads and layers raise the answers.

cli/pages.py calls it for a folder of `attribute`; here are the first words,
methods/gains/page.py makes the sections and report_attribution.html.j2 lays out.
"""

from __future__ import annotations

import math

from relneuron.artifact.files import Json
from relneuron.methods.gains.page import METHODS, change, effects_table, random_of, sections
from relneuron.methods.gains.study import AttributionStudy
from relneuron.methods.gains.tables import attribution_tables
from relneuron.report.parts import n_of
from relneuron.report.tables import percent, significant

OURS = "log_prob_gain"  # the method of arXiv 2312.12141 among METHODS


def attribution_page(study: AttributionStudy) -> Json:
    """Everything that report_attribution.html.j2 names, but the commands."""
    return {
        "model": study.model.get("id") or "an unnamed model",
        "facts": facts(study),
        "answer": answer(study),
        "tiles": tiles(study),
        "sections": sections(study, attribution_tables(study)),
        "manifest": study.manifest,
    }


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
    others = {name: known[name].prob_drop[0] for name in METHODS if name in known and name != OURS}
    if others:
        best = max(others, key=lambda name: others[name])
        text += f"; with the {n} best by another score ({METHODS[best]}) it {change(others[best])}"
    drops = [c.prob_drop[0] for c in random_of(study, "random")]
    if drops:
        text += f"; with random ones it {change(sum(drops) / len(drops))}"
    return f"{text}."


def _best_neuron(study: AttributionStudy) -> str:
    """What can be said where nothing was set to zero."""
    n = n_of(len(study.scored), "sentence")
    layers = study.sums.layers["ffn_layer"].sum(axis=0) / max(1, len(study.scored))
    if not layers.any():
        return (
            f"{n} of {n_of(len(study.relations), 'relation')} are scored; nothing was set to zero."
        )
    best = int(layers.argmax())
    return (
        f"Over {n} FFN layer {best} raises the answer most, by "
        f"{significant(float(layers[best]), 3)} nats on average; nothing was set to zero."
    )


def tiles(study: AttributionStudy) -> list[tuple[str, str, str]]:
    """A title, a number, and what it is over, for each of the head numbers."""
    kept = sum(target.kept for target in study.targets)
    found = [("sentences", f"{len(study.targets):,}", f"{kept:,} known")]
    known = study.of()
    if "clean" in known:
        small = f"reciprocal rank {significant(known['clean'].mrr, 3)}"
        found.append(("the answer's probability", percent(known["clean"].prob), small))
    rows = [("lost without the best by gain", [known[OURS]])] if OURS in known else []
    if drawn := random_of(study, "random"):
        rows.append(("lost without random ones", drawn))
    for title, *_, drop, low, high in effects_table(rows, "").rows:
        ends = f"{percent(float(low))} to {percent(float(high))}"
        small = ends if math.isfinite(float(low)) else ""
        found.append((str(title), percent(float(drop)), small))
    return found
