"""The `prompts` stage: fact files in, prompts.jsonl and sentences.jsonl out.

One prompt per fact and template: det (to find neurons), eva (to measure), eva2 (other wordings).
The sentences do not ask for a fact. Of concept files: one prompt a sentence, which asks nothing; of
the JSON of texts/queries.py: its sentences. With --choices facts are multiple-choice questions.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    composed,
    refuse_output,
    sha256,
    writing,
)
from relneuron.artifact.manifest import Manifest, checked, locked
from relneuron.artifact.prompts import SPLITS, Prompt, distinct, prompts_bytes, read_prompts
from relneuron.artifact.stage import command, placed
from relneuron.texts.choices import make_choices
from relneuron.texts.concept_files import concept_prompts, find_concepts, read_concept
from relneuron.texts.facts import ENGLISH, Fact, Relation, join_facts, read_relations, split_facts
from relneuron.texts.neutral import GENERAL, NEUTRAL, Sentence, sentences_bytes
from relneuron.texts.options import PromptsOptions
from relneuron.texts.queries import are_queries, read_queries

SENTENCES = 50  # of a relation at most (arXiv 2502.17355, section 5.5)

Wrap = Callable[[str], str]


def prompts_inputs(facts: Path, options: PromptsOptions, chat: Any = None) -> Json:
    """What the stage depends on, for the manifest; of concepts only their files.

    `chat`: the tokenizer that wraps prompts.
    """
    if concepts := find_concepts(facts):
        return {"concepts": [f"{path.stem}: {sha256(path)}" for path in concepts]}
    if are_queries(facts):
        return {"queries": sha256(facts)}
    paths = [facts] if facts.is_file() else sorted(facts.glob("*.json"))
    digests = {path.stem: sha256(path) for path in paths}
    inputs: Json = {"facts": digests, **options.recorded()}
    if chat is None:
        return inputs
    return inputs | {"chat_template": hashlib.sha256(chat_wrap(chat)("{}").encode()).hexdigest()}


def chat_wrap(tokenizer: Any) -> Wrap:
    """Puts a text as the user's into a tokenizer's chat template, where the answer begins.

    A template that writes BOS itself would get a second one from a tokenizer that adds BOS; such a
    template's is left out.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RelneuronError(
            "the tokenizer has no chat template", "leave out --chat-template, or use a chat model"
        )

    def wrap(text: str) -> str:
        wrapped = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        )
        ids, bos = list(tokenizer(wrapped)["input_ids"][:2]), tokenizer.bos_token_id
        if bos is not None and ids == [bos, bos]:
            wrapped = wrapped.removeprefix(tokenizer.bos_token)
        return wrapped

    return wrap


def make_prompts(
    relation: Relation, *, n_eva: int, seed: int, wrap: Wrap = str
) -> Iterator[Prompt]:
    """All prompts of a relation: det, eva, eva2 in the file's language, then other languages.

    Only eva facts are asked in other languages: neurons are found in the file's own. `wrap` makes
    what the model reads of the sentence that a template and a subject are.
    """

    def ask(
        split: str, language: str, facts: Sequence[Fact], templates: tuple[str, ...]
    ) -> Iterator[Prompt]:
        numbers: dict[str, int] = {}
        for number, fact in enumerate(facts):
            numbers.setdefault(composed(fact.subject), number)
        # In another language two subjects may have one name: that is asked once.
        for fact in join_facts(facts):
            number = numbers[composed(fact.subject)]
            for variant, template in enumerate(templates):
                yield Prompt(
                    id=f"{relation.name}.{split}.{language}.{number:04d}.{variant}",
                    relation=relation.name,
                    split=split,
                    language=language,
                    template=template,
                    subject=fact.subject,
                    object=fact.object,
                    prompt=wrap(template.replace("{}", fact.subject)),
                    objects=fact.objects,
                )

    det, eva = split_facts(relation, n_eva, seed)
    own = relation.language
    yield from ask("det", own, det, relation.templates.main)
    yield from ask("eva", own, eva, relation.templates.main)
    yield from ask("eva2", own, eva, relation.templates.alternative)
    for code, language in relation.languages.items():
        there = language.translate(eva)
        yield from ask("eva", code, there, language.templates.main)
        yield from ask("eva2", code, there, language.templates.alternative)


def neutral_template(relation: Relation) -> str | None:
    """The first of the fact file's `neutral_templates`; in English, without them, a known one.

    That is the one of the paper's relation of the same name, or `GENERAL`.
    """
    known = NEUTRAL.get(relation.name, GENERAL) if relation.language == ENGLISH else None
    return next(iter(relation.neutral_templates), known)


def make_sentences(relation: Relation, *, n_eva: int, seed: int) -> list[Sentence]:
    """One sentence for each of the first 50 distinct objects of the relation's det facts.

    None without a `neutral_template`.
    """
    template = neutral_template(relation)
    if template is None:
        return []
    det, _ = split_facts(relation, n_eva, seed)
    objects = distinct(name for fact in det for name in fact.objects)[:SENTENCES]
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
    options: PromptsOptions | None = None,
    *,
    chat: Any = None,
    force: bool = False,
) -> list[Prompt]:
    """Read the fact files in `facts`, write prompts.jsonl to `output` and sentences.jsonl beside.

    `suffix`: see `facts.read_relation`. `chat`: a tokenizer whose chat template wraps every prompt,
    the sentences are left as they are. Of concept files (texts/concept_files.py) there is one
    prompt a sentence, and nothing beside. Returns the prompts.
    """
    if concepts := find_concepts(facts):
        return _write_concepts(facts, concepts, output, force)
    if are_queries(facts):
        return _write_queries(facts, output, force)
    options = options or PromptsOptions()
    n_eva, seed = options.eva, options.seed
    beside = output.with_name("sentences.jsonl")
    for path in (output, beside):
        refuse_output(path, "prompts", force)
    suffix = "" if options.choices and options.suffix is None else options.suffix
    relations = read_relations(facts, suffix=suffix)
    inputs = prompts_inputs(facts, options, chat)
    wrap = str if chat is None else chat_wrap(chat)
    prompts = [prompt for relation in relations for prompt in _asked(relation, options, wrap)]
    sentences = [s for r in relations for s in make_sentences(r, n_eva=n_eva, seed=seed)]
    _say_left_out(relations)
    written = {output: prompts_bytes(prompts)}
    # Without a sentence there is no file: the next stage would take an empty one for damaged.
    if sentences:
        written[beside] = sentences_bytes(sentences)
    counts = {
        relation.name: {
            split: sum(p.relation == relation.name and p.split == split for p in prompts)
            for split in SPLITS
        }
        for relation in relations
    }
    made_by = command(
        "prompts",
        placed(facts, output.parent),
        *("-o", placed(output, output.parent), *options.words()),
        chat_template=getattr(chat, "name_or_path", None),
    )
    folder = output.parent
    manifest = Manifest(folder)
    manifest.describe(seeds={"split": seed})
    with locked(folder), writing("prompts", folder, [output, beside]):
        for path, data in written.items():
            atomic_write(path, data)
        if not sentences:
            beside.unlink(missing_ok=True)
        manifest.finish(
            "prompts", inputs, list(written), reads=[], n_prompts=counts, commands=made_by
        )
    return prompts


def _asked(relation: Relation, options: PromptsOptions, wrap: Wrap) -> Iterator[Prompt]:
    if options.choices is None:
        return make_prompts(relation, n_eva=options.eva, seed=options.seed, wrap=wrap)
    made = make_choices(
        relation,
        n_eva=options.eva,
        seed=options.seed,
        shuffles=options.choices,
        n_options=options.choose_from,
    )
    return (replace(prompt, prompt=wrap(prompt.prompt)) for prompt in made)


def _say_left_out(relations: Iterable[Relation]) -> None:
    names = [r.name for r in relations if neutral_template(r) is None]
    if names:
        warnings.warn(
            f"neutral sentences left out of {', '.join(names)}: their fact files are not in "
            "English and have no neutral_templates",
            stacklevel=3,
        )


def _write_concepts(facts: Path, files: list[Path], output: Path, force: bool) -> list[Prompt]:
    concepts = [read_concept(path) for path in files]
    counts = {c.name: {"positive": len(c.positive), "negative": len(c.negative)} for c in concepts}
    return _write_plain(facts, output, concept_prompts(concepts), counts, force)


def _write_queries(facts: Path, output: Path, force: bool) -> list[Prompt]:
    prompts = read_queries(facts)
    numbers = Counter((p.relation, p.split) for p in prompts)
    counts = {relation: {split: n} for (relation, split), n in numbers.items()}
    return _write_plain(facts, output, prompts, counts, force)


def _write_plain(
    facts: Path, output: Path, prompts: list[Prompt], counts: Json, force: bool
) -> list[Prompt]:
    """Write prompts that stand in their file as they are; no sentences beside them."""
    data = prompts_bytes(prompts)
    refuse_output(output, "prompts", force)
    inputs = prompts_inputs(facts, PromptsOptions())
    folder = output.parent
    made_by = command("prompts", placed(facts, folder), "-o", placed(output, folder))
    manifest = Manifest(folder)
    with locked(folder), writing("prompts", folder, [output]):
        atomic_write(output, data)
        manifest.finish("prompts", inputs, [output], reads=[], n_prompts=counts, commands=made_by)
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
    if not _are_concepts(place):
        return place
    output = folder / "prompts.jsonl"
    inputs = prompts_inputs(place, PromptsOptions())
    if not Manifest(folder).is_done("prompts", inputs, force=force):
        write_prompts(place, output, force=force)
    return output


def concepts_of(place: Path) -> list[Prompt]:
    """The prompts that `record` reads at `place`, where nothing is written."""
    if not _are_concepts(place):
        return read_prompts(checked(place))
    return list(concept_prompts([read_concept(path) for path in find_concepts(place)]))


def _are_concepts(place: Path) -> bool:
    """Whether it is one of concepts; what is neither that nor a prompts.jsonl raises."""
    if place.suffix == ".jsonl" or not place.exists():
        return False
    if not find_concepts(place):
        raise RelneuronError(
            f"{place} is no prompts.jsonl, and holds no concept's sentences",
            "make prompts of facts with: relneuron prompts FACTS -o prompts.jsonl",
            2,
        )
    return True
