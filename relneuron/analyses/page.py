"""The page on a study of relations: the first words, and the order of the sections.

`study.PAGE` names `build`. sections.py and chosen.py make the sections from the tables, figures.py
draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from relneuron.analyses import chosen, sections
from relneuron.analyses.drops import Headline, headline
from relneuron.analyses.outcomes import filled_sets, known, outcomes, relations
from relneuron.analyses.study import MOST_EXAMPLES, Study, examples, read_study
from relneuron.artifact.effects import Grid
from relneuron.artifact.files import Json
from relneuron.report.page import Page, Section, Tile
from relneuron.report.tables import NBSP, Spread, change, label, listed, n_of, percent, split_title

BEFORE: dict[str, Callable[[Study], Section]] = {  # the sections on the chosen neurons
    "accuracy": sections.accuracy,
    "prompts": sections.prompts,
    "drop": sections.drop,
    "interference": sections.interference,
    "perplexity": sections.perplexity,
    "sizes": sections.sizes,
    "cumulativity": sections.cumulativity,
    "sites": sections.sites,
    "modules": chosen.modules,
}
AFTER: dict[str, Callable[[Study], Section]] = {
    "overlap": chosen.overlap,
    "versatility": chosen.versatility,
    "concepts": chosen.concepts,
    "gain": sections.gain,
    "resilience": sections.resilience,
    "errors": sections.errors,
}


def build(folder: Path, titles: Mapping[str, str]) -> Page:
    return page(read_study(folder), titles)


def page(study: Study, titles: Mapping[str, str]) -> Page:
    numbers, grid = headline(study.main), study.main
    sizes = sorted(len(found) for found in study.sets.values() if found)
    model = study.neurons.model.get("id", "an unnamed model")
    asked = list(dict.fromkeys(name for one in study.grids.values() for name in relations(one)))
    method = titles.get(study.neurons.method, study.neurons.method)
    sure = set(known(grid))
    left_out = [label(name) for name in asked if name not in sure]
    return Page(
        title=f"Relation-specific neurons of {model}",
        facts=f"{n_of(len(asked), 'relation')} · {len(grid.ids):,} {split_title(grid.split)} · "
        f"{_span(sizes)} neurons each, ranked by {method}",
        question=f"Does the model {model} keep the knowledge of a relation in neurons of its own, "
        "so that switching them off costs the facts of that relation and spares the others?",
        answer=unknown(grid) or answer(numbers, sizes, study.n_neurons),
        tiles=tiles(numbers, len(grid.of_kind("random"))),
        sections=made(study),
        tables=study.tables,
        manifest=study.manifest,
        note=note(study.manifest, left_out, len(filled_sets(grid))),
        examples=list(examples(study).items()),
    )


def made(study: Study) -> list[Section]:
    """The sections that the study has data for."""
    there = {*study.tables, *(["prompts"] if len(study.grids) > 1 else [])}
    before, after = (
        [make(study) for key, make in makers.items() if key in there] for makers in (BEFORE, AFTER)
    )
    return [*before, *chosen.chosen(study), *after]


# The first words


def unknown(grid: Grid) -> str:
    """Why nothing can be answered where the model knows none of the relations; "" if it does."""
    measured = np.array([outcomes(grid, name, "clean").before for name in relations(grid)])
    if not measured.size or known(grid):
        return ""
    return (
        f"Nothing can be said: the model as it is answers {percent(measured.mean())} of the "
        f"prompts right, at most {percent(measured.max())} of a relation's, too few for a drop or "
        "a rise to mean anything."
    )


def answer(numbers: Headline, sizes: Sequence[int], n_neurons: int) -> str:
    """The answer to the question, in one sentence."""
    if not sizes or not sizes[-1]:
        return "Nothing can be said: no neuron was chosen for any relation."
    share = " to ".join(dict.fromkeys(f"{100 * n / n_neurons:.2g}" for n in (sizes[0], sizes[-1])))
    text = (
        f"When the {_span(sizes)} neurons chosen for a relation ({share}{NBSP}% of the model's "
        f"{n_neurons:,} MLP neurons) are off, accuracy on that relation "
        f"{change(numbers.own.mean)} on average"
    )
    if math.isfinite(numbers.other.mean):
        text += f"; on the other relations it {change(numbers.other.mean)}"
    if math.isfinite(numbers.random.mean):
        # Random sets are as large as the largest set.
        number = "as many" if sizes[0] == sizes[-1] else f"{sizes[-1]:,}"
        text += f"; with {number} random neurons off instead it {change(numbers.random.mean)}"
    return f"{text}."


def tiles(numbers: Headline, n_seeds: int) -> list[Tile]:
    def tile(title: str, drop: Spread, over: str) -> Tile:
        ends = " to ".join(dict.fromkeys(map(percent, drop[1:])))
        is_measured = math.isfinite(drop.mean)
        return Tile(
            title, percent(drop.mean), f"{ends} over {over}" if is_measured else "not measured"
        )

    return [
        tile("drop on its own relation", numbers.own, "the relations"),
        tile("drop on other relations", numbers.other, "all pairs"),
        tile("drop with random neurons", numbers.random, n_of(n_seeds, "seed")),
    ]


def note(manifest: Json, left_out: Sequence[str], n_sets: int = 0) -> str:
    """What the tiles show, and of which relations; and of how many sets there are answers below."""
    text = "Mean accuracy drop, (before − after) / before. A negative drop is a gain."
    if found := off(manifest):
        text += f" {found}"
    if left_out:
        text += (
            " Left out of the means, because the model answered too few before for a drop to mean "
            f"anything: {listed(left_out)}."
        )
    if n_sets > MOST_EXAMPLES:
        text += f" Single answers are shown of {MOST_EXAMPLES} of {n_of(n_sets, 'set')}."
    return text


def off(manifest: Json) -> str:
    """What sets and "off" are where not as in the paper: the best, at zero at every position."""
    asked = manifest.get("stages", {}).get("ablate", {}).get("inputs", {})
    of = {"all": "all det prompts", "relation": "the relation's det prompts"}
    means = {
        "scale": f"outputs times {asked.get('factor')}",
        "mean": f"outputs at their mean over {of.get(asked.get('mean_of', ''), 'det prompts')}",
        "p50": "outputs at their median over what the relation was found with",
        "p90": "outputs at their 90th percentile over what the relation was found with",
        "off_mean": "outputs at their mean over what the relation was compared with",
    }
    tokens = {
        "prompt": "at the tokens of the prompt only",
        "last": "at the last token of the prompt and those of the answer only",
    }
    known = [means.get(asked.get("mode", "")), tokens.get(asked.get("positions", ""))]
    found = manifest.get("stages", {}).get("identify", {}).get("inputs", {})
    ends = {
        "bottom": "A set holds the neurons with the lowest scores.",
        "both": "A set holds the neurons with the highest scores and as many with the lowest.",
    }
    sentences = [ends.get(found.get("ends", ""), "")]
    if any(known):
        where = f", {known[1]}" if known[1] else ""
        sentences.append(f"“Off” means here: {known[0] or 'outputs at zero'}{where}.")
    return " ".join(filter(None, sentences))


def _span(sizes: Sequence[int]) -> str:
    return " to ".join(dict.fromkeys(f"{n:,}" for n in (sizes[0], sizes[-1]))) if sizes else "no"
