"""Relations and their facts: reads files in the format of the LRE data set and splits them.

The `prompts` stage calls it. A fact file is one relation; its name is the file's stem.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from relneuron.artifact import RelneuronError

SUFFIX = "? Answer:"  # follows every English template (arXiv 2502.17355, table 5)


class Fact(NamedTuple):
    subject: str
    object: str


class Templates(NamedTuple):
    """Sentences with one `{}` for the subject: the main ones and other wordings of the same."""

    main: tuple[str, ...]
    alternative: tuple[str, ...]


@dataclass(frozen=True)
class Language:
    """A relation's templates in another language, and its entities' names there."""

    templates: Templates
    entities: dict[str, str]


@dataclass(frozen=True)
class Relation:
    """One relation: templates with their suffix, distinct facts, other languages.

    `neutral_templates` are sentences with one `{}` for the object that do not ask for the fact;
    `domain` is the kind of its subjects, "" where the file does not say.
    """

    name: str
    templates: Templates
    facts: tuple[Fact, ...]
    languages: dict[str, Language]
    neutral_templates: tuple[str, ...] = ()
    domain: str = ""


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


def _one_slot(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError(f"a template needs exactly one {{}}, got {template!r}")
    return template.strip()


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text.strip()


_Template = Annotated[str, AfterValidator(_one_slot)]
_Name = Annotated[str, AfterValidator(_not_blank)]


class _Sample(BaseModel):
    subject: _Name
    object: _Name


class _Language(BaseModel):
    prompt_templates: list[_Template] = Field(min_length=1)
    prompt_templates_zs: list[_Template] = []
    entities: dict[str, _Name] = {}


class _Properties(BaseModel):
    domain_name: str = ""


class _FactFile(BaseModel):
    """The keys that are read; a file may carry more."""

    model_config = ConfigDict(extra="ignore")
    prompt_templates: list[_Template] = Field(min_length=1)
    prompt_templates_zs: list[_Template] = []
    neutral_templates: list[_Template] = []
    properties: _Properties = _Properties()
    samples: list[_Sample] = Field(min_length=1)
    languages: dict[str, _Language] = {}


def _templates(main: list[str], zero_shot: list[str], suffix: str) -> Templates:
    """Main templates, and the zero-shot ones that are not main ones; each once, with suffix."""

    def ended(template: str) -> str:
        return template if template.endswith(suffix) else template + suffix

    first = tuple(dict.fromkeys(map(ended, main)))
    other = tuple(dict.fromkeys(map(ended, zero_shot)))
    return Templates(first, tuple(template for template in other if template not in first))


def read_relation(path: Path, *, suffix: str = SUFFIX) -> Relation:
    """Read one fact file.

    JSON object with `prompt_templates` (main), `prompt_templates_zs` (alternative; those that are
    main ones too are left out), `samples` [{subject, object}], optionally `properties`
    {domain_name} and, our additions, `neutral_templates` (see `Relation`) and `languages` {code:
    {prompt_templates, prompt_templates_zs, entities {name: translated name}}}. Exact duplicate
    pairs count once. `suffix` follows the templates of the file's own language, not those of
    `languages`. The LRE files of the paper's relations get the paper's templates.

    Raises RelneuronError naming file and field if the file is not JSON, lacks `samples`, has an
    empty subject or object, or a template without exactly one `{}`.
    """
    try:
        data = _FactFile.model_validate_json(path.read_text(encoding="utf-8-sig"))
    except (ValidationError, UnicodeDecodeError) as error:
        cause = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            cause = f"{where}: {first['msg']}" if where else first["msg"]
        raise RelneuronError(
            f"{path}: {cause}",
            "a fact file is a JSON object with prompt_templates (each with one {}) and samples "
            "[{subject, object}]",
        ) from error
    main, zero_shot = data.prompt_templates, data.prompt_templates_zs
    if path.stem in _PAPER and tuple(main) == _PAPER[path.stem][0]:
        paper = _PAPER[path.stem][1]
        main, zero_shot = list(paper.main), list(paper.alternative)
    facts = dict.fromkeys(Fact(sample.subject, sample.object) for sample in data.samples)
    languages = {
        code: Language(
            _templates(language.prompt_templates, language.prompt_templates_zs, ""),
            language.entities,
        )
        for code, language in data.languages.items()
    }
    return Relation(
        path.stem,
        _templates(main, zero_shot, suffix),
        tuple(facts),
        languages,
        tuple(data.neutral_templates),
        data.properties.domain_name.strip(),
    )


def read_relations(folder: Path, *, suffix: str = SUFFIX) -> list[Relation]:
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
    relation's split does not depend on which others are present; whole groups of one subject's
    facts are taken until eva holds exactly `n_eva` (a group that would overshoot is skipped).
    The split of arXiv 2502.17355, section 3.2. Both lists are in the file's order.
    """
    groups: dict[str, list[Fact]] = {}
    for fact in relation.facts:
        groups.setdefault(fact.subject, []).append(fact)
    subjects = sorted(groups)
    random.Random(f"relneuron.split.{seed}.{relation.name}").shuffle(subjects)
    eva: set[Fact] = set()
    for subject in subjects:
        if len(eva) + len(groups[subject]) <= n_eva:
            eva.update(groups[subject])
    det = [fact for fact in relation.facts if fact not in eva]
    if len(eva) < n_eva or not det:
        raise RelneuronError(
            f"relation {relation.name} has {len(relation.facts)} distinct facts, too few for "
            f"{n_eva} evaluation facts and at least one to find neurons with",
            "give it more facts, or ask for fewer with --eva",
        )
    return det, [fact for fact in relation.facts if fact in eva]
