"""Concept neurons: the study of kinds of subject, made as a study of relations is.

`run` calls it for the analysis of concepts (arXiv 2502.17355, section 5.4).
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from relneuron.artifact.files import atomic_write, writing
from relneuron.artifact.manifest import Manifest, locked
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import Prompt, prompts_bytes
from relneuron.methods.responses.at_once import record_and_identify
from relneuron.methods.responses.options import RankOptions, RecordOptions
from relneuron.methods.responses.places import Store
from relneuron.model.load import describe_model
from relneuron.model.mlps.find import find_mlps
from relneuron.model.ranks import Ranks
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


def concept_study(
    name: str,
    model: Any,
    tokenizer: Any,
    relations: Sequence[Relation],
    folder: Path,
    *,
    n_eva: int,
    seed: int,
    top: int | None,
    options: RecordOptions,
    store: Store | None = None,
    ranks: Ranks | None = None,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> NeuronFile | None:
    """Make, or go on with, the study of the concepts in `folder`: prompts, record, identify.

    `ranks` are processes that share the recording, and wait to hear of it (`Ranks.serve`); with a
    `store` responses are there until the neurons are ranked, and not kept.
    Returns each concept's `top` neurons, or None if there are fewer than two concepts. Warns of
    relations that are left out.
    """
    silent = [r.name for r in relations if r.domain and not concept_templates(r)]
    if silent:
        warnings.warn(
            f"concepts left out of {', '.join(silent)}: their fact files are not in English and "
            "have no concept_templates",
            stacklevel=2,
        )
    prompts = make_concept_prompts(relations, n_eva=n_eva, seed=seed)
    if not prompts:
        return None
    described = describe_model(name, model, find_mlps(model), backend)
    path = folder / "prompts.jsonl"
    recording = replace(options, attention=False, accept_object_prefix=False, validate=False)
    # Scores alone: as many negatives as positives, nothing of how sure a score is.
    ranking = RankOptions(top=top, negatives=1, permutations=0, bootstrap=0, noise=0, seed=seed)
    with locked(folder):
        manifest = Manifest(folder)
        data = prompts_bytes(prompts)
        inputs = {"concepts": hashlib.sha256(data).hexdigest(), "eva": n_eva, "seed": seed}
        if not manifest.is_done("prompts", inputs, force=force):
            with writing("prompts", folder, [path]):
                atomic_write(path, data)
                manifest.describe(seeds={"split": seed})
                manifest.finish("prompts", inputs, [path], reads=[])
        return record_and_identify(
            name,
            model,
            tokenizer,
            described,
            path,
            folder,
            recording,
            ranking,
            store,
            ranks=ranks,
            backend=backend,
            force=force,
            quiet=quiet,
        )
