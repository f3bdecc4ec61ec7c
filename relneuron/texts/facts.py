"""Relations and their facts: reads files in the format of the LRE data set and splits them.

The `prompts` stage calls it. A fact file is one relation; its name is the file's stem. A fact is
one subject with all of its right objects.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from relneuron.artifact.files import RelneuronError, composed, fold
from relneuron.artifact.prompts import distinct
from relneuron.artifact.reading import one_line, read_json

ENGLISH = "en"  # the language of a file that does not say its own
SUFFIX = "? Answer:"  # follows every English template (arXiv 2502.17355, table 5)


class Fact(NamedTuple):
    """A subject and its right objects, each once (`artifact.files.fold` tells them apart)."""

    subject: str
    object: str
    others: tuple[str, ...] = ()

    @property
    def objects(self) -> tuple[str, ...]:
        return self.object, *self.others


def fact_of(subject: str, objects: Iterable[str]) -> Fact:
    """The fact that each of the objects is right, the first of them first."""
    first, *others = distinct(objects)
    return Fact(subject, first, tuple(others))


class Templates(NamedTuple):
    """Sentences with one `{}` for the subject: the main ones and other wordings of the same."""

    main: tuple[str, ...]
    alternative: tuple[str, ...]


@dataclass(frozen=True)
class Language:
    """A relation's templates in another language, and its entities' names there."""

    templates: Templates
    entities: dict[str, str]

    def translate(self, facts: Iterable[Fact]) -> list[Fact]:
        """The facts with the names of their entities here; what has no name keeps its own.

        A name is looked up as it is written and, if that is not there, as `artifact.files.fold` has
        it.
        """
        folded = {fold(name): there for name, there in self.entities.items()}

        def name(text: str) -> str:
            return self.entities.get(text, folded.get(fold(text), text))

        return [fact_of(name(fact.subject), map(name, fact.objects)) for fact in facts]


@dataclass(frozen=True)
class Relation:
    """One relation: templates with their suffix, its facts by subject, other languages.

    `neutral_templates` are sentences with one `{}` for the object that do not ask for the fact,
    `concept_templates` beginnings of sentences with one `{}` for the subject, likewise; `domain`
    is the kind of its subjects, "" where the file does not say. `language` is that of the
    templates and names, `suffix` what follows the templates.
    """

    name: str
    templates: Templates
    facts: tuple[Fact, ...]
    languages: dict[str, Language]
    neutral_templates: tuple[str, ...] = ()
    domain: str = ""
    language: str = ENGLISH
    suffix: str = ""
    concept_templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", tuple(join_facts(self.facts)))


# The paper's templates where they are not the file's own (arXiv 2502.17355, tables 5-7 and 9-20;
# its alternative templates for products could not be read, so the file's are used). The first
# member of each pair is how the LRE file words it: only a file with that wording is the paper's.
_PAPER = {
    "person_plays_instrument": (
        ("{} plays the",),
        Templates(
            ("{} plays the instrument of",),
            (
                "What instrument does {} play? They play the",
                "The instrument that {} plays is called the",
            ),
        ),
    ),
    "person_plays_pro_sport": (
        ("{} plays the sport of",),
        Templates(("{} plays the sport of",), ("What sport does {} play? They play",)),
    ),
    "product_by_company": (
        ("{} was created by", "{} is a product of"),
        Templates(
            ("{} was created by which company", "{} is a product of which company"),
            ("Which company developed {}? It was developed by",),
        ),
    ),
    "star_constellation": (
        ("{} is part of the constellation named",),
        Templates(
            ("{} is part of the constellation named",),
            ("What is the name of the constellation that {} is part of? It is part of",),
        ),
    ),
}


# --- a fact file -----------------------------------------------------------------------------


def _one_slot(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError(f"a template needs exactly one {{}}, got {template!r}")
    return template.strip()


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text.strip()


def _language_code(text: str) -> str:
    # It stands between dots in ids and names of splits.
    if not re.fullmatch(r"[A-Za-z0-9]+([-_][A-Za-z0-9]+)*", text):
        raise ValueError(f"a language is a code such as pl or pt-BR, got {text!r}")
    return text


_Template = Annotated[str, AfterValidator(_one_slot)]
_Name = Annotated[str, AfterValidator(_not_blank)]
_Code = Annotated[str, AfterValidator(_language_code)]


class _Part(BaseModel):
    """A JSON object of a fact file; keys that are not read are kept, to be named."""

    model_config = ConfigDict(extra="allow")


class _Sample(_Part):
    subject: _Name
    object: list[_Name] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _together(cls, data: Any) -> Any:
        """`object` and `objects`, each one name or a list of them, as one list."""
        if not isinstance(data, dict):
            return data
        given = [data[key] for key in ("object", "objects") if key in data]
        names = [name for some in given for name in (some if isinstance(some, list) else [some])]
        rest = {key: value for key, value in data.items() if key not in ("object", "objects")}
        return rest | ({"object": names} if given else {})


class _Language(_Part):
    prompt_templates: list[_Template] = Field(min_length=1)
    prompt_templates_zs: list[_Template] = []
    suffix: str = ""
    entities: dict[str, _Name] = {}


class _Properties(_Part):
    domain_name: str = ""


class _FactFile(_Part):
    language: _Code = ENGLISH
    suffix: str | None = None
    prompt_templates: list[_Template] = Field(min_length=1)
    prompt_templates_zs: list[_Template] = []
    neutral_templates: list[_Template] = []
    concept_templates: list[_Template] = []
    properties: _Properties = _Properties()
    samples: list[_Sample] = Field(min_length=1)
    languages: dict[_Code, _Language] = {}

    @model_validator(mode="after")
    def _each_language_once(self) -> _FactFile:
        seen = {_same_code(self.language): "the file's own"}
        for code in self.languages:
            if _same_code(code) in seen:
                raise ValueError(
                    f"languages.{code} is {seen[_same_code(code)]} language; the file's own is "
                    f'said with "language", and is {self.language!r}'
                )
            seen[_same_code(code)] = f"the {code}"
        return self


def _same_code(code: str) -> str:
    return code.casefold().replace("_", "-")


# Keys of the LRE data set that nothing here needs.
_UNREAD = {"name", "domain", "range", "_domain", "_range"}
_UNREAD |= {
    f"properties.{key}"
    for key in ("relation_type", "range_name", "symmetric", "fn_type", "disambiguating")
}


def _unknown_keys(data: _FactFile) -> list[str]:
    """The keys that are not read, each once and with where it stands."""
    parts: list[tuple[str, _Part]] = [("", data), ("properties.", data.properties)]
    parts += [(f"languages.{code}.", found) for code, found in data.languages.items()]
    parts += [("samples.", sample) for sample in data.samples]
    names = dict.fromkeys(where + key for where, part in parts for key in part.model_extra or {})
    unknown = [name for name in names if name not in _UNREAD]
    return [name if name.isprintable() else repr(name) for name in unknown]


def _templates(main: list[str], zero_shot: list[str], suffix: str) -> Templates:
    """Main templates, and the zero-shot ones that are not main ones; each once, with suffix."""

    def ended(template: str) -> str:
        return template if template.endswith(suffix) else template + suffix

    first = tuple(dict.fromkeys(map(ended, main)))
    other = tuple(dict.fromkeys(map(ended, zero_shot)))
    return Templates(first, tuple(template for template in other if template not in first))


def join_facts(facts: Iterable[Fact]) -> Iterator[Fact]:
    """One fact for each subject, with the objects of all of its facts, in order of appearance.

    Subjects are the same if they are so composed (NFC): case tells some apart, as in "Co" and
    "CO". They are spelled as the first.
    """
    found: dict[str, tuple[str, list[str]]] = {}
    for fact in facts:
        _, objects = found.setdefault(composed(fact.subject), (fact.subject, []))
        objects += fact.objects
    return (fact_of(subject, objects) for subject, objects in found.values())


def read_relation(path: Path, *, suffix: str | None = None) -> Relation:
    """Read one fact file.

    JSON object with `prompt_templates` (main), `prompt_templates_zs` (alternative; those that are
    main ones too are left out), `samples` [{subject, object}], optionally `properties`
    {domain_name} and, our additions, `language` (default: en), `suffix`, `neutral_templates` and
    `concept_templates` (see `Relation`) and `languages` {code: {prompt_templates,
    prompt_templates_zs, suffix, entities {name: translated name}}}. A sample may name several
    right objects, as a list or under `objects`; those of all samples of a subject are right.

    `suffix` follows the templates of the file's own language. Without it the file's own does, or
    SUFFIX in English, or nothing. The LRE files of the paper's relations get the paper's templates.

    Warns of keys that are not read. Raises RelneuronError naming file and field if the file is not
    JSON, lacks `samples`, has an empty subject or object, a template without exactly one `{}`, or
    a key or a language twice.
    """
    return relation_of(path.stem, read_json(path, _FACT_FILE), str(path), suffix=suffix)


def relation_of(name: str, content: Any, where: str, *, suffix: str | None = None) -> Relation:
    """The relation that the content of a fact file is (`read_relation`); errors name `where`."""
    data = _validated(content, where)
    unknown = _unknown_keys(data)
    if unknown:
        warnings.warn(f"{where}: unknown, not read: {', '.join(unknown)}", stacklevel=3)
    main, zero_shot = data.prompt_templates, data.prompt_templates_zs
    if name in _PAPER and tuple(main) == _PAPER[name][0]:
        paper = _PAPER[name][1]
        main, zero_shot = list(paper.main), list(paper.alternative)
    if suffix is None:
        default = SUFFIX if _same_code(data.language) == ENGLISH else ""
        suffix = default if data.suffix is None else data.suffix
    languages = {
        code: Language(
            _templates(found.prompt_templates, found.prompt_templates_zs, found.suffix),
            found.entities,
        )
        for code, found in data.languages.items()
    }
    return Relation(
        name,
        _templates(main, zero_shot, suffix),
        tuple(fact_of(sample.subject, sample.object) for sample in data.samples),
        languages,
        tuple(data.neutral_templates),
        data.properties.domain_name.strip(),
        data.language,
        suffix,
        tuple(data.concept_templates),
    )


# What `read_json` asks for.
_FACT_FILE = (
    "fact file: a JSON object with prompt_templates (each with one {}) and samples "
    "[{subject, object}]; each key and each language stands there once"
)


def _validated(data: Any, where: str) -> _FactFile:
    try:
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
        return _FactFile.model_validate(data)
    except ValueError as error:
        cause = one_line(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            said = re.sub(" or instance of .*", "", first["msg"])
            cause = f"{place}: {said}" if place else said
        raise RelneuronError(f"{where}: {cause}", f"give a valid {_FACT_FILE}") from error


def read_relations(folder: Path, *, suffix: str | None = None) -> list[Relation]:
    """Read every `*.json` of a folder (or one file), in order of their names."""
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.json"))
    if not paths:
        raise RelneuronError(
            f"{folder} has no fact files", "give a folder of LRE-format *.json files", 2
        )
    return [read_relation(path, suffix=suffix) for path in paths]


def split_facts(relation: Relation, n_eva: int, seed: int) -> tuple[list[Fact], list[Fact]]:
    """Split a relation's facts into (det, eva) that share no subject, eva with `n_eva` facts.

    Subjects are shuffled by a generator seeded with `seed` and the relation's name, so a
    relation's split does not depend on which others are present. The split of arXiv 2502.17355,
    section 3.2. Both lists are in the file's order.
    """
    subjects = sorted(fact.subject for fact in relation.facts)
    random.Random(f"relneuron.split.{seed}.{relation.name}").shuffle(subjects)
    drawn = set(subjects[:n_eva])
    det = [fact for fact in relation.facts if fact.subject not in drawn]
    if len(drawn) < n_eva or not det:
        raise RelneuronError(
            f"relation {relation.name} has {len(relation.facts)} facts (subjects), too few for "
            f"{n_eva} evaluation facts and at least one to find neurons with",
            "give it more facts, or ask for fewer with --eva",
        )
    return det, [fact for fact in relation.facts if fact.subject in drawn]
