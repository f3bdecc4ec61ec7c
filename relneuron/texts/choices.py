"""Facts as multiple-choice questions: a letter answers, and the options are shuffled several times.

`prompts --choices` calls it (arXiv 2406.10868, section 4.1: three prompts a query, with their
options in other orders). The wordings are our own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from string import ascii_uppercase

from relneuron.artifact.files import RelneuronError, composed, fold
from relneuron.artifact.prompts import Prompt, distinct
from relneuron.texts.facts import Fact, Relation, split_facts

# In turn, one a shuffle.
WORDINGS = (
    "Question: {question}\n{options}\nAnswer:",
    "Choose the right option.\n{question}\n{options}\nThe answer is",
    "{question}\n{options}\nThe letter of the right option is",
)


def make_choices(
    relation: Relation, *, n_eva: int, seed: int, shuffles: int, n_options: int
) -> Iterator[Prompt]:
    """The questions of a relation's facts, split as `split_facts` says: det, then eva.

    Each fact is asked in its first main template, `shuffles` times: its first object and up to
    `n_options` - 1 others, drawn from the objects of the relation's other facts that are no right
    answer of it, in an order drawn for each. `object` is the letter of the right one, `options` are
    all letters. Drawn by `seed`, the relation and the subject alone, so that a fact has the same
    options whatever else is asked. Raises RelneuronError where there is nothing to choose from.
    """
    everything = distinct(name for fact in relation.facts for name in fact.objects)
    det, eva = split_facts(relation, n_eva, seed)
    for split, facts in (("det", det), ("eva", eva)):
        for number, fact in enumerate(facts):
            others = _others(relation, fact, everything, n_options, seed)
            for variant in range(shuffles):
                name = f"relneuron.choices.{seed}.{relation.name}.{composed(fact.subject)}"
                shown = [fact.object, *others]
                random.Random(f"{name}.{variant}").shuffle(shown)
                letters = ascii_uppercase[: len(shown)]
                lines = [f"{a}. {option}" for a, option in zip(letters, shown, strict=True)]
                template = relation.templates.main[0]
                yield Prompt(
                    id=f"{relation.name}.{split}.{relation.language}.{number:04d}.{variant}",
                    relation=relation.name,
                    split=split,
                    language=relation.language,
                    template=template,
                    subject=fact.subject,
                    object=letters[shown.index(fact.object)],
                    prompt=WORDINGS[variant % len(WORDINGS)].format(
                        question=template.replace("{}", fact.subject), options="\n".join(lines)
                    ),
                    options=tuple(letters),
                )


def _others(
    relation: Relation, fact: Fact, everything: Sequence[str], n_options: int, seed: int
) -> list[str]:
    """Wrong options of a fact."""
    right = {fold(name) for name in fact.objects}
    wrong = [name for name in everything if fold(name) not in right]
    if not wrong:
        raise RelneuronError(
            f"relation {relation.name}: there is no other answer than that of {fact.subject}",
            "leave the relation out, or ask without --choices",
        )
    rng = random.Random(f"relneuron.options.{seed}.{relation.name}.{composed(fact.subject)}")
    return rng.sample(wrong, min(n_options - 1, len(wrong)))
