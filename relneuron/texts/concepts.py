"""Concept neurons: those of a kind of subject (company, person, ...), found as a relation's are.

methods/responses/concepts.py calls it: prompts about subjects that ask for no fact, recorded and
identified in a folder of their own, show which of a relation's neurons stand for its subjects' kind
(arXiv 2502.17355, section 5.4).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from relneuron.artifact.prompts import Prompt
from relneuron.texts.facts import ENGLISH, Relation, split_facts

TEMPLATES = ("{} can", "{} has a")  # in English (arXiv 2502.17355, section 5.4)
PER_CONCEPT = 100


def concept_templates(relation: Relation) -> tuple[str, ...]:
    """The fact file's own, or in English TEMPLATES; none in another language without its own."""
    return relation.concept_templates or (TEMPLATES if relation.language == ENGLISH else ())


def concept_subjects(
    relations: Sequence[Relation], *, n_eva: int, seed: int
) -> dict[str, list[str]]:
    """The subjects of each concept's det facts, at most 100, drawn with `seed`; sorted.

    Of the relations that have `concept_templates`. A concept is the `domain` of some of them.
    Concepts whose relations have the same subjects are one, named by all of them joined with "/";
    a subject of more than one concept is in none.
    """
    everyone: dict[str, set[str]] = {}
    det: dict[str, set[str]] = {}
    for relation in relations:
        if relation.domain and concept_templates(relation):
            facts, _ = split_facts(relation, n_eva, seed)
            everyone.setdefault(relation.domain, set()).update(f.subject for f in relation.facts)
            det.setdefault(relation.domain, set()).update(f.subject for f in facts)
    merged: dict[frozenset[str], list[str]] = {}
    for domain in sorted(everyone):
        merged.setdefault(frozenset(everyone[domain]), []).append(domain)
    n_concepts = Counter(subject for subjects in merged for subject in subjects)
    result = {}
    for domains in merged.values():
        name = "/".join(domains)
        found = {subject for domain in domains for subject in det[domain]}
        own = sorted(subject for subject in found if n_concepts[subject] == 1)
        generator = random.Random(f"relneuron.concept.{seed}.{name}")
        if own:
            result[name] = sorted(generator.sample(own, min(len(own), PER_CONCEPT)))
    return result


def make_concept_prompts(relations: Sequence[Relation], *, n_eva: int, seed: int) -> list[Prompt]:
    """A det prompt for each template and each of the concepts' subjects, `relation` the concept.

    A subject's templates are those of the first relation that has it. They ask for no fact, so
    their objects are empty. Fewer than two concepts cannot be told apart: no prompt.
    """
    concepts = concept_subjects(relations, n_eva=n_eva, seed=seed)
    if len(concepts) < 2:
        return []
    of: dict[str, Relation] = {}
    for relation in relations:
        if relation.domain and concept_templates(relation):
            of |= {fact.subject: relation for fact in relation.facts if fact.subject not in of}
    return [
        Prompt(
            id=f"{concept}.det.{of[subject].language}.{number:04d}.{variant}",
            relation=concept,
            split="det",
            language=of[subject].language,
            template=template,
            subject=subject,
            object="",
            prompt=template.replace("{}", subject),
        )
        for concept, subjects in concepts.items()
        for number, subject in enumerate(subjects)
        for variant, template in enumerate(concept_templates(of[subject]))
    ]
