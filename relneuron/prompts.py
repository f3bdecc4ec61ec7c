"""The `prompts` stage: fact files in, prompts.jsonl and sentences.jsonl out.

One prompt per fact and template: det (to find neurons), eva (to measure), eva2 (other wordings).
The sentences do not ask for a fact. Of concept files: one prompt a sentence, which asks nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from relneuron.artifact import (
    Json,
    Prompt,
    RelneuronError,
    atomic_write,
    prompts_bytes,
    refuse_overwrite,
    sha256,
)
from relneuron.concept_files import concept_prompts, find_concepts, read_concept
from relneuron.facts import SUFFIX, Fact, Relation, read_relations, split_facts
from relneuron.manifest import Manifest
from relneuron.sentences import GENERAL, NEUTRAL, Sentence, sentences_bytes

SENTENCES = 50  # of a relation at most (arXiv 2502.17355, section 5.5)


def prompts_inputs(facts: Path, *, n_eva: int, seed: int, suffix: str) -> Json:
    """What the stage depends on, for the manifest; of concepts only their files."""
    if concepts := find_concepts(facts):
        return {"concepts": [f"{path.stem}: {sha256(path)}" for path in concepts]}
    paths = [facts] if facts.is_file() else sorted(facts.glob("*.json"))
    digests = {path.stem: sha256(path) for path in paths}
    return {"facts": digests, "eva": n_eva, "seed": seed, "suffix": suffix}


def make_prompts(relation: Relation, *, n_eva: int, seed: int) -> Iterator[Prompt]:
    """All prompts of a relation: det, eva, eva2 in the file's language, then other languages.

    Only eva facts are asked in other languages: neurons are found in the file's own.
    """

    def ask(
        split: str, language: str, facts: list[Fact], templates: tuple[str, ...]
    ) -> Iterator[Prompt]:
        names = relation.languages[language].entities if language in relation.languages else {}
        for number, fact in enumerate(facts):
            subject = names.get(fact.subject, fact.subject)
            answer = names.get(fact.object, fact.object)
            for variant, template in enumerate(templates):
                yield Prompt(
                    id=f"{relation.name}.{split}.{language}.{number:04d}.{variant}",
                    relation=relation.name,
                    split=split,
                    language=language,
                    template=template,
                    subject=subject,
                    object=answer,
                    prompt=template.replace("{}", subject),
                )

    det, eva = split_facts(relation, n_eva, seed)
    yield from ask("det", "en", det, relation.templates.main)
    yield from ask("eva", "en", eva, relation.templates.main)
    yield from ask("eva2", "en", eva, relation.templates.alternative)
    for code, language in relation.languages.items():
        yield from ask("eva", code, eva, language.templates.main)
        yield from ask("eva2", code, eva, language.templates.alternative)


def make_sentences(relation: Relation, *, n_eva: int, seed: int) -> list[Sentence]:
    """One sentence for each of the first 50 distinct objects of the relation's det facts.

    The template is the first of its fact file's `neutral_templates`; without them that of the
    paper's relation of the same name, or `GENERAL`.
    """
    det, _ = split_facts(relation, n_eva, seed)
    template = next(iter(relation.neutral_templates), NEUTRAL.get(relation.name, GENERAL))
    objects = list(dict.fromkeys(fact.object for fact in det))[:SENTENCES]
    return [
        Sentence(
            id=f"{relation.name}.neutral.{number:04d}",
            relation=relation.name,
            template=template,
            object=name,
            sentence=template.replace("{}", name),
        )
        for number, name in enumerate(objects)
    ]


def write_prompts(
    facts: Path,
    output: Path,
    *,
    n_eva: int = 50,
    seed: int = 0,
    suffix: str = SUFFIX,
    force: bool = False,
) -> list[Prompt]:
    """Read the fact files in `facts`, write prompts.jsonl to `output` and sentences.jsonl beside.

    Of concept files (concept_files.py) there is one prompt a sentence, and nothing beside. Returns
    the prompts.
    """
    if concepts := find_concepts(facts):
        return _write_concepts(facts, concepts, output, force)
    beside = output.with_name("sentences.jsonl")
    for path in (output, beside):
        refuse_overwrite(path, force)
    relations = read_relations(facts, suffix=suffix)
    inputs = prompts_inputs(facts, n_eva=n_eva, seed=seed, suffix=suffix)
    prompts = [p for r in relations for p in make_prompts(r, n_eva=n_eva, seed=seed)]
    sentences = [s for r in relations for s in make_sentences(r, n_eva=n_eva, seed=seed)]
    atomic_write(output, prompts_bytes(prompts))
    atomic_write(beside, sentences_bytes(sentences))
    counts = {
        relation.name: {
            split: sum(p.relation == relation.name and p.split == split for p in prompts)
            for split in ("det", "eva", "eva2")
        }
        for relation in relations
    }
    manifest = Manifest(output.parent)
    manifest.describe(seeds={"split": seed})
    manifest.finish("prompts", inputs, [output, beside], n_prompts=counts)
    return prompts


def _write_concepts(facts: Path, files: list[Path], output: Path, force: bool) -> list[Prompt]:
    concepts = [read_concept(path) for path in files]
    prompts = concept_prompts(concepts)
    data = prompts_bytes(prompts)
    # What a killed run left has these bytes.
    refuse_overwrite(output, force or (output.is_file() and output.read_bytes() == data))
    inputs = prompts_inputs(facts, n_eva=0, seed=0, suffix="")
    atomic_write(output, data)
    counts = {c.name: {"positive": len(c.positive), "negative": len(c.negative)} for c in concepts}
    Manifest(output.parent).finish("prompts", inputs, [output], n_prompts=counts)
    return prompts


def refuse_concepts(place: Path) -> None:
    """Raise for sentences of concepts where facts are needed, of which answers can be asked."""
    if find_concepts(place):
        raise RelneuronError(
            f"{place} holds sentences for concepts, which ask for no answer to measure",
            "give facts; concepts take: relneuron record MODEL CONCEPTS -o DIR, and identify",
            2,
        )


def concepts_beside(place: Path, folder: Path, *, force: bool = False) -> Path:
    """`place`, or where it is one of concepts, the prompts.jsonl in `folder` that is made of it."""
    if place.suffix == ".jsonl" or not place.exists():
        return place
    if not find_concepts(place):
        raise RelneuronError(
            f"{place} is no prompts.jsonl, and holds no concept's sentences",
            "make prompts of facts with: relneuron prompts FACTS -o prompts.jsonl",
            2,
        )
    output = folder / "prompts.jsonl"
    inputs = prompts_inputs(place, n_eva=0, seed=0, suffix="")
    if not Manifest(folder).is_done("prompts", inputs, force=force):
        write_prompts(place, output, force=force)
    return output
