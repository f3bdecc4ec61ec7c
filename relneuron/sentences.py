"""Neutral sentences: one per object of a relation, none of which asks for the fact.

The `prompts` stage writes them to sentences.jsonl; the perplexity of a model without a relation's
neurons is measured on them (arXiv 2502.17355, section 5.5).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from relneuron.artifact import RelneuronError, require

GENERAL = "The crossword puzzle wanted the word {}."

# By file stem; a relation that the paper and the LRE data set name differently stands twice.
_CONTINENT = "The whole documentary was filmed in {}."
_COUNTRY = "The postcard had a stamp from {}."
_SPORT = "On Sundays the children next door watch {}."
_POSITION = "The coach is still looking for a new {}."
_PRODUCT = "The tall building across the street belongs to {}."
NEUTRAL = {
    "company_ceo": "The first speaker at the dinner was {}.",
    "company_hq": "The train was three hours late when it reached {}.",
    "landmark_continent": _CONTINENT,
    "landmark_on_continent": _CONTINENT,
    "landmark_country": _COUNTRY,
    "landmark_in_country": _COUNTRY,
    "person_father": "The letter on the table was addressed to {}.",
    "person_mother": "The flowers at the door were for {}.",
    "person_occupation": "The story is about an evening with a retired {}.",
    "person_plays_instrument": "In the attic there was nothing but an old {}.",
    "person_pro_sport": _SPORT,
    "person_plays_pro_sport": _SPORT,
    "person_sport_position": _POSITION,
    "person_plays_position_in_sport": _POSITION,
    "product_company": _PRODUCT,
    "product_by_company": _PRODUCT,
    "star_constellation": "Someone had painted the ceiling with the shape of {}.",
}


@dataclass(frozen=True)
class Sentence:
    """One line of sentences.jsonl: a whole sentence, and the object that it names."""

    id: str
    relation: str
    template: str
    object: str
    sentence: str


def sentences_bytes(sentences: Iterable[Sentence]) -> bytes:
    """sentences.jsonl: one JSON object a line."""
    return "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in sentences).encode()


def read_sentences(path: Path) -> list[Sentence]:
    """The sentences of a sentences.jsonl, in the file's order."""
    names = [field.name for field in fields(Sentence)]
    sentences = []
    with require(path, "prompts FACTS_DIR -o prompts.jsonl").open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                values = {name: record[name] for name in names}
                if not all(isinstance(value, str) for value in values.values()):
                    raise TypeError("a field is not a string")
                sentences.append(Sentence(**values))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise RelneuronError(
                    f"{path}, line {number}: not a sentence ({error})",
                    f"give one JSON object a line with the fields {', '.join(names)}",
                ) from error
    if not sentences:
        raise RelneuronError(f"{path} holds no sentence", "make it with: relneuron prompts")
    if len({sentence.id for sentence in sentences}) < len(sentences):
        raise RelneuronError(f"{path} has two sentences with the same id", "give each its own id")
    return sentences
