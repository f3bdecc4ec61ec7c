"""What an edit did: the same prompts and texts asked before and after, and the rows of edit.csv.

edit.py calls it (the measures of arXiv 2405.14117, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.analyses.uncertainty import (
    UNKNOWN,
    Interval,
    percentile_interval,
    resampled,
    wilson_interval,
)
from relneuron.artifact.effects import fact_numbers
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import checked
from relneuron.artifact.prompts import Prompt
from relneuron.methods.gradients.options import EditOptions
from relneuron.model.ask import Asker
from relneuron.model.batches import Budget, plan_batches
from relneuron.model.questions import Questions, encode, is_correct
from relneuron.texts.neutral import read_sentences

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Asked:
    """What is asked before and after: prompts, whom they are about, and how they are right."""

    questions: Questions
    facts: Array  # (N,) the fact of each
    related: dict[str, list[int]]  # the edited facts' prompts: the first of each, and the others
    others: list[int]
    new: Questions | None  # the related prompts with the new answer, in `rows`
    rows: list[int]


@dataclass(frozen=True)
class Said:
    """The answers to all prompts: predictions, P of the old answer, P of the new one, NLL."""

    predictions: list[str]
    prob: Array
    prob_new: Array
    perplexity: float


def questions_of(
    tokenizer: Any,
    model: Any,
    prompts: list[Prompt],
    sets: Mapping[str, Sequence[Any]],
    about: Mapping[str, Sequence[int]],
    options: EditOptions,
) -> Asked:
    rows = sorted({row for name in sets for row in about[name]})
    facts = fact_numbers((p.id for p in prompts), {p.id: p for p in prompts})
    first: dict[int, int] = {}
    for row in rows:
        first.setdefault(int(facts[row]), row)
    related = {
        "reliability": list(first.values()),
        "generalization": [row for row in rows if first[int(facts[row])] != row],
    }
    new = None
    if options.to is not None:
        to = options.to.strip()
        if not to:
            raise RelneuronError("--to names no answer", "give the new answer", 2)
        asked = [replace(prompts[row], object=to, objects=(to,), options=()) for row in rows]
        new = encode(tokenizer, model, asked)
    others = [row for row in range(len(prompts)) if int(facts[row]) not in first]
    return Asked(encode(tokenizer, model, prompts), facts, related, others, new, rows)


def texts_of(
    tokenizer: Any, model: Any, path: Path, prompts: Sequence[Prompt], others: Sequence[int]
) -> Questions:
    """The texts whose perplexity is taken."""
    if path.exists():
        asked = [
            Prompt(s.id, s.relation, "neutral", "", s.template, "", s.object, s.sentence)
            for s in read_sentences(checked(path))
        ]
    else:
        asked = [
            replace(prompts[row], prompt=f"{prompts[row].prompt} {prompts[row].object}")
            for row in others
        ]
    if not asked:
        return Questions([], [], [])
    return encode(tokenizer, model, asked, answers=False, n_tokens=0)


def ask_all(
    asker: Asker, asked: Asked, texts: Questions, budget: Budget, options: EditOptions, bar: Any
) -> Said:
    """All answers of the model as it is now."""

    def run(questions: Questions, ask: Any) -> list[Any]:
        found: dict[int, Any] = {}
        for batch in plan_batches(questions, options.batch_tokens):
            found |= zip(batch, budget.run(batch, questions.length, ask), strict=True)
            bar.update(len(batch))
        return [found[row] for row in range(len(questions.prompts))]

    def answers(questions: Questions) -> list[tuple[str, float]]:
        def ask(rows: list[int]) -> list[tuple[str, float]]:
            said = asker.ask(questions, rows)
            return list(zip(said.predictions, said.logprobs, strict=True))

        return run(questions, ask)

    said = answers(asked.questions)
    new = answers(asked.new) if asked.new is not None else []
    nll = run(texts, lambda rows: asker.score(texts, rows)) if texts.prompts else []
    n_tokens = sum(len(ids) - 1 for ids in texts.ids)
    return Said(
        [text for text, _ in said],
        np.exp([logprob for _, logprob in said]),
        np.exp(np.array([logprob for _, logprob in new])),
        math.exp(sum(nll) / n_tokens) if n_tokens else math.nan,
    )


def measures(asked: Asked, before: Said, after: Said) -> Iterator[tuple[object, ...]]:
    """The rows of edit.csv."""
    prompts = asked.questions.prompts

    def is_done(said: Said, row: int) -> bool:
        if asked.new is None:
            return not any(is_correct(said.predictions[row], name) for name in prompts[row].objects)
        return is_correct(said.predictions[row], asked.new.prompts[0].object)

    def row(name: str, rows: Sequence[int], *values: Sequence[float] | Array) -> tuple[Any, ...]:
        cells: list[object] = []
        for one in values:
            mean = float(np.mean(one)) if len(rows) else math.nan
            is_share = name in ("reliability", "generalization", "locality")
            ends = _interval(np.asarray(one, np.float64), asked.facts[list(rows)], is_share)
            cells += ["" if math.isnan(x) else x for x in (mean, *ends)]
        return name, len(rows), *cells

    for name, rows in asked.related.items():
        yield row(name, rows, *([is_done(said, r) for r in rows] for said in (before, after)))
    others = asked.others
    same = [before.predictions[r] == after.predictions[r] for r in others]
    yield row("locality", others, [True] * len(others), same)
    yield row("prob_old", asked.rows, *(said.prob[asked.rows] for said in (before, after)))
    if asked.new is not None:
        yield row("prob_new", asked.rows, before.prob_new, after.prob_new)
    yield row("prob_others", others, *(said.prob[others] for said in (before, after)))
    ppl = ["" if math.isnan(x) else x for x in (before.perplexity, after.perplexity)]
    yield "perplexity", "", ppl[0], "", "", ppl[1], "", ""


def _interval(values: Array, facts: Array, is_share: bool) -> Interval:
    """The interval of a mean over resampled facts, each with all of its prompts."""
    if not values.size:
        return UNKNOWN
    _, place = np.unique(facts, return_inverse=True)
    n = np.bincount(place)
    drawn = resampled(len(n))
    low, high = percentile_interval((drawn @ np.bincount(place, values)) / (drawn @ n))
    if low == high:
        return wilson_interval(low, len(n)) if is_share else UNKNOWN
    return Interval(low, high)
