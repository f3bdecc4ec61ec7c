"""Facts with the sentences that ask them, in the JSON of QRNCA and of knowledge neurons.

The `prompts` and `attribute` stages read it, `export` writes it. A file is `{uuid: {"sentences":
[...], "obj_label": ..., "relation_name": ...}}`: several sentences a fact (PARAREL's templates, or
shuffles of a multiple-choice question), and the right answer, of all or of each.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.prompts import Prompt, fact_name
from relneuron.artifact.reading import read_json
from relneuron.texts.facts import ENGLISH

SPLIT = "eva"
_FIX = (
    'give {uuid: {"sentences": [text, ...], "obj_label": answer or one of each sentence, '
    '"relation_name": name}}'
)
# The answer's place in a sentence for BERT. What a decoder reads ends there.
_MASK = re.compile(r"\s*\[MASK\]")
_END = re.compile(r"\[MASK\]\s*[.?!。]?\s*\Z")


def are_queries(path: Path) -> bool:
    """Whether a file is such JSON, by its first fact."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    data = read_json(path, "JSON file")
    first = next(iter(data.values()), None) if isinstance(data, dict) else None
    return isinstance(first, dict) and "sentences" in first


def read_queries(path: Path) -> list[Prompt]:
    """The sentences of a file as prompts, `<uuid>.<number>`; a fact's subject is its uuid.

    A sentence with `[MASK]`, as for BERT, ends before it, and before the space in front. One that
    goes on behind it but for a point is no question to a decoder and is left out with a warning.
    Where every answer is a single capital letter, the letters of the whole file are the options of
    each prompt. Raises RelneuronError that names the fact for anything that is not as described.
    """
    data = read_json(path, "JSON file of facts")
    if not isinstance(data, dict) or not data:
        raise RelneuronError(f"{path} holds no fact", _FIX)
    prompts: list[Prompt] = []
    n_left_out = 0
    for key, fact in data.items():
        sentences, labels, relation = _parts(f"{path}: {key!r}", key, fact)
        for number, (text, label) in enumerate(zip(sentences, labels, strict=True)):
            if _MASK.search(text) and not _END.search(text):
                n_left_out += 1
                continue
            asked = _MASK.split(text)[0]
            if not asked.strip():
                raise RelneuronError(f"{path}: {key!r}: sentence {number} asks nothing", _FIX)
            about = relation, SPLIT, ENGLISH, "", key, label
            prompts.append(Prompt(f"{key}.{number}", *about, asked))
    if not prompts:
        raise RelneuronError(
            f"{path}: no sentence ends with [MASK], which a decoder has to answer",
            "give sentences that end where the answer begins",
        )
    if n_left_out:
        warnings.warn(
            f"{path}: {n_left_out} sentences go on behind [MASK]: they are left out", stacklevel=2
        )
    letters = {prompt.object for prompt in prompts}
    if all(re.fullmatch("[A-Z]", letter) for letter in letters) and len(letters) > 1:
        options = tuple(sorted(letters))
        prompts = [replace(prompt, options=options) for prompt in prompts]
    return prompts


def _parts(where: str, key: str, fact: object) -> tuple[list[str], list[str], str]:
    """The sentences of a fact, the answer of each, and the relation."""

    def check(holds: bool, what: str) -> None:
        if not holds:
            raise RelneuronError(f"{where}: {what}", _FIX)

    check(bool(key.strip()), "a fact without a name")
    if not isinstance(fact, dict):
        raise RelneuronError(f"{where} is no object", _FIX)
    sentences, label, relation = map(fact.get, ("sentences", "obj_label", "relation_name"))
    if not isinstance(sentences, list) or not sentences:
        raise RelneuronError(f"{where}: sentences are no list of texts", _FIX)
    check(all(isinstance(s, str) and s.strip() for s in sentences), "a sentence is no text")
    labels = label if isinstance(label, list) else [label] * len(sentences)
    check(len(labels) == len(sentences), f"{len(labels)} answers for {len(sentences)} sentences")
    check(all(isinstance(x, str) and x.strip() for x in labels), "obj_label is no text")
    name = relation.strip() if isinstance(relation, str) else ""
    check(bool(name), "relation_name is no text")
    return list(sentences), [str(x).strip() for x in labels], name


def queries_bytes(prompts: Sequence[Prompt]) -> bytes:
    """The same JSON of prompts: a fact's uuid is its subject, or relation/subject (`uuids`).

    Its obj_label is one text where all of its prompts have one answer and no options, else a list.
    """
    facts: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        facts.setdefault(fact_name(prompt), []).append(prompt)
    found: Json = {}
    for key, own in zip(uuids(list(facts)), facts.values(), strict=True):
        labels = [prompt.object for prompt in own]
        is_one = len({*labels}) == 1 and not any(prompt.options for prompt in own)
        found[key] = {
            "sentences": [prompt.prompt for prompt in own],
            "obj_label": labels[0] if is_one else labels,
            "relation_name": own[0].relation,
        }
    return (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()


def uuids(names: Sequence[str]) -> list[str]:
    """What authors' files call facts: what follows the relation, if that names each, else all."""
    short = [name.partition("/")[2] or name for name in names]
    return short if len({*short}) == len(short) else list(names)
