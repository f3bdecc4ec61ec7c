"""What a study shows of its model before the long work: an answer a relation, what it knows.

`run` calls it, so that prompts that the model does not understand are seen at once.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from relneuron.analyses.outcomes import is_known
from relneuron.artifact.effects import fact_numbers, own_languages
from relneuron.artifact.prompts import read_prompts
from relneuron.artifact.reading import read_csv
from relneuron.model.ask import Asker
from relneuron.model.batches import Budget, plan_batches
from relneuron.model.questions import Questions


def first_answers(asker: Asker, questions: Questions, batch_tokens: int) -> list[str]:
    """Of each relation its first prompt, the model's answer and the right ones, a line each."""
    first: dict[str, int] = {}
    for row, prompt in enumerate(questions.prompts):
        first.setdefault(prompt.relation, row)
    lines = {}
    budget = Budget(batch_tokens)

    def ask(rows: list[int]) -> list[str]:
        return asker.ask(questions, rows).predictions

    for batch in plan_batches(questions, batch_tokens, [*first.values()]):
        for row, said in zip(batch, budget.run(batch, questions.length, ask), strict=True):
            p = questions.prompts[row]
            lines[p.relation] = f"{p.relation}: {p.prompt!r} -> {said!r} (right: {p.right})"
    return [lines[relation] for relation in first]


def warn_of_unknown(folder: Path) -> None:
    """Warn of the relations that the model as it is hardly knows, before anything is off."""
    rows = read_csv(folder / "validated.csv", ("id", "correct"))
    right = {row["id"]: row.flag("correct") for row in rows}
    everything = read_prompts(folder / "prompts.jsonl")
    own = own_languages(everything)
    asked = [p for p in everything if p.split != "det" and p.language == own[p.relation]]
    facts = fact_numbers([p.id for p in asked], {p.id: p for p in asked})
    low = []
    for relation in dict.fromkeys(p.relation for p in asked):
        of = np.array([p.relation == relation for p in asked])
        correct = np.array([right[p.id] for p in asked])[of]
        if not is_known(correct.mean(), np.unique(facts[of][correct]).size):
            low.append(f"{relation} {correct.mean():.1%}")
    if low:
        warnings.warn(
            f"few answers are right before anything is off ({', '.join(low)}): drops mean nothing "
            "there; do the prompts, printed above, ask as this model expects?",
            stacklevel=3,
        )
