"""Sentences for a concept, in the JSON of selfcond and lang_neuron, as prompts that ask nothing.

The `prompts` stage calls it. A file is `{"concept", "group", "sentences": {"positive": [...],
"negative": [...]}}`; a concept_list.csv or .json beside such files says which of them are meant.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.prompts import Prompt
from relneuron.artifact.reading import read_csv, read_json

LISTS = ("concept_list.csv", "concept_list.json")
_NAME_BYTES = 240  # of a file's name, at most
_FIX = 'a concept file is {"concept": NAME, "sentences": {"positive": [...], "negative": [...]}}'


@dataclass(frozen=True)
class Concept:
    """The sentences that show a concept, and the ones to compare them with."""

    name: str
    group: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]


def find_concepts(place: Path) -> list[Path]:
    """The concept files of a file, a list of concepts or a folder; none if these are facts.

    A folder stands for those that its list names, or without a list for the concept files in it
    and in its groups' folders. Raises RelneuronError if a file that a list names is not there, or
    a folder holds other JSON beside concepts.
    """
    if place.is_file():
        kind = place.suffix.lower()
        if kind == ".csv" or (kind == ".json" and _is_list(place)):
            return _listed(place)
        return [place] if kind == ".json" and _is_concept(place) else []
    for name in LISTS:
        if (place / name).is_file():
            return _listed(place / name)
    files = sorted([*place.glob("*.json"), *place.glob("*/*.json")])
    concepts = [path for path in files if _is_concept(path)]
    others = [path for path in files if path not in concepts and path.parent == place]
    if concepts and others:
        raise RelneuronError(
            f"{concepts[0]} holds a concept's sentences, {others[0]} does not",
            "give folders of their own to concepts and to facts",
            2,
        )
    return concepts


def read_concept(path: Path) -> Concept:
    """One concept file; its name where it does not say one is the file's stem."""
    data = read_json(path, "concept file")
    sentences = data.get("sentences") if isinstance(data, dict) else None
    if not isinstance(sentences, dict):
        raise RelneuronError(f"{path} has no sentences", _FIX)
    unknown = [key for key in sentences if key not in ("positive", "negative")]
    if unknown:
        raise RelneuronError(f"{path}: sentences are {unknown[0]!r}, what is that?", _FIX)
    found = {}
    for label in ("positive", "negative"):
        texts = sentences.get(label) or []
        if not isinstance(texts, list):
            raise RelneuronError(f"{path}: {label} is no list of sentences", _FIX)
        found[label] = tuple(texts)
        for number, text in enumerate(found[label], 1):
            if not isinstance(text, str) or not text:
                raise RelneuronError(f"{path}: {label} sentence {number} is no text", _FIX)
    if not found["positive"]:
        raise RelneuronError(f"{path} has no positive sentence", _FIX)
    about = {key: data.get(key) or "" for key in ("concept", "group")}
    for key, value in about.items():
        if not isinstance(value, str):
            raise RelneuronError(f"{path}: {key} is no text", _FIX)
    return Concept(about["concept"] or path.stem, about["group"], **found)


def concept_prompts(concepts: Sequence[Concept]) -> list[Prompt]:
    """One prompt a sentence, shared by the concepts that have it: first the positive ones.

    A negative that is a sentence of another concept, too, is the same prompt, so that one pass
    reads it once; a sentence that a list has twice is two.
    """
    names = [concept.name for concept in concepts]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise RelneuronError(f"two concepts are called {twice[0]!r}", "rename one of them")

    def prompt(concept: Concept, split: str, number: int, text: str) -> Prompt:
        key = f"{concept.name}.{split}.{number:05d}"
        return Prompt(key, concept.name, split, "", "", "", "", text, group=concept.group)

    prompts = [prompt(c, "det", i, text) for c in concepts for i, text in enumerate(c.positive)]
    places: dict[str, list[int]] = defaultdict(list)
    for place, made in enumerate(prompts):
        places[made.prompt].append(place)
    for concept in concepts:
        n_new = 0
        for text in concept.negative:
            free = (
                place
                for place in places[text]
                if prompts[place].split == "neg" or prompts[place].relation != concept.name
                if concept.name not in prompts[place].negative_of
            )
            place = next(free, len(prompts))
            if place == len(prompts):
                places[text].append(place)
                prompts.append(prompt(concept, "neg", n_new, text))
                n_new += 1
            had = prompts[place].negative_of
            prompts[place] = replace(prompts[place], negative_of=(*had, concept.name))
    return prompts


def _json(path: Path) -> Any:
    """The value of a JSON file; None for what is none, whose fault the reader of facts says."""
    try:
        return read_json(path, "concept file")
    except RelneuronError:
        return None


def _is_concept(path: Path) -> bool:
    """Whether a JSON file holds sentences."""
    data = _json(path)
    return isinstance(data, dict) and "sentences" in data


def _is_list(path: Path) -> bool:
    """Whether a JSON file is a list, or lists under names."""
    data = _json(path)
    values = list(data.values()) if isinstance(data, dict) else [data]
    return bool(values) and all(isinstance(names, list) for names in values)


def _listed(path: Path) -> list[Path]:
    """The files of a list: GROUP/CONCEPT.json beside it, or CONCEPT.json."""
    files = []
    for group, concept in _entries(path):
        if max(len(group.encode()), len(concept.encode())) > _NAME_BYTES:
            raise RelneuronError(
                f"{path} names the concept {concept[:40]!r}...: no file has so long a name",
                "give the names of files",
                2,
            )
        tried = [path.parent / group / f"{concept}.json", path.parent / f"{concept}.json"]
        there = next((file for file in tried if file.is_file()), None)
        if there is None:
            raise RelneuronError(
                f"{path} names the concept {concept!r}: there is no {tried[0]}",
                "put its file there, or take it off the list",
                2,
            )
        files.append(there)
    if not files:
        raise RelneuronError(f"{path} names no concept", "write group,concept lines", 2)
    return files


def _entries(path: Path) -> Iterator[tuple[str, str]]:
    """(group, concept) of a csv with these columns, or of JSON: objects, GROUP/CONCEPT, a map."""
    if path.suffix.lower() == ".csv":
        for row in read_csv(path, ("group", "concept")):
            yield row["group"], row["concept"]
        return
    data = read_json(path, "concept list")
    entries: list[Any] = data if isinstance(data, list) else []
    if isinstance(data, dict):
        lists = {g: names for g, names in data.items() if isinstance(names, list)}
        entries = [{"group": g, "concept": c} for g, names in lists.items() for c in names]
    for entry in entries:
        if isinstance(entry, str):
            parts = entry.rpartition("/")
            entry = {"group": parts[0], "concept": parts[2]}
        values: Json = entry if isinstance(entry, dict) else {}
        group, concept = values.get("group", ""), values.get("concept")
        if not (isinstance(group, str) and isinstance(concept, str)):
            raise RelneuronError(
                f"{path}: {str(entry)[:80]!r} names no concept",
                'give [{"group": ..., "concept": ...}, ...], or "GROUP/CONCEPT" each',
            )
        yield group, concept
