"""Neutral sentences: one per object of a relation, none of which asks for the fact.

The `prompts` stage writes them to sentences.jsonl; the perplexity of a model without a relation's
neurons is measured on them (arXiv 2502.17355, section 5.5).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from relneuron.artifact.prompts import read_records

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
    return [Sentence(**values) for values in read_records(path, names, "sentence")]
