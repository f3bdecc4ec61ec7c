"""What a study shows of its model before the long work: an answer a relation, what it knows.

`study` calls it, so that prompts that the model does not understand are seen at once.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from relneuron.artifact import read_csv, read_prompts
from relneuron.effects import own_languages
from relneuron.predict import Asker, Questions, plan_batches
from relneuron.results import LOW


def first_answers(asker: Asker, questions: Questions, batch_tokens: int) -> list[str]:
    """Of each relation its first prompt, the model's answer and the right ones, a line each."""
    first: dict[str, int] = {}
    for row, prompt in enumerate(questions.prompts):
        first.setdefault(prompt.relation, row)
    lines = {}
    for batch in plan_batches(questions, batch_tokens, [*first.values()]):
        for row, said in zip(batch, asker.ask(questions, batch).predictions, strict=True):
            p = questions.prompts[row]
            lines[p.relation] = f"{p.relation}: {p.prompt!r} -> {said!r} (right: {p.right})"
    return [lines[relation] for relation in first]


def warn_of_unknown(folder: Path) -> None:
    """Warn of the relations that the model as it is hardly knows, before anything is off."""
    right = {
        row["id"]: row["correct"] == "1"
        for row in read_csv(folder / "validated.csv", ("id", "correct"))
    }
    prompts = read_prompts(folder / "prompts.jsonl")
    own, found = own_languages(prompts), dict[str, list[bool]]()
    for p in prompts:
        if p.language == own[p.relation]:
            found.setdefault(p.relation, []).append(right[p.id])
    shares = {relation: sum(some) / len(some) for relation, some in found.items()}
    low = [f"{relation} {share:.1%}" for relation, share in shares.items() if share <= LOW]
    if low:
        warnings.warn(
            f"few answers are right before anything is off ({', '.join(low)}): drops mean nothing "
            "there; do the prompts, printed above, ask as this model expects?",
            stacklevel=3,
        )
