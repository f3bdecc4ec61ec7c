"""prompts.jsonl: the questions that stages put to a model, and the facts that they ask.

`prompts` writes it, every stage with a model reads it; `generate` reads free prompts, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from sys import intern

from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    composed,
    fold,
    refuse_overwrite,
    require,
    sha256,
)
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.reading import one_line, parse_json, read_lines


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of prompts.jsonl: a question about a fact, and where it belongs.

    `objects` are all right answers, the first is `object`: those of another first one do not count.
    A concept's sentence asks nothing: it has no object. `negative_of`: the concepts that it is not
    about; what they rank it against. `group`: what kind of concept it is, as its file says.
    `options`: of a multiple-choice question, all that may be answered.
    `images`: the paths of the pictures that the prompt is about.
    """

    id: str
    relation: str
    split: str  # det: neurons are found with it; neg: against it; eva, eva2: effects are measured
    language: str
    template: str
    subject: str
    object: str
    prompt: str
    objects: tuple[str, ...] = ()
    negative_of: tuple[str, ...] = ()
    group: str = ""
    options: tuple[str, ...] = ()
    images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.objects[:1] != (self.object,):
            object.__setattr__(self, "objects", (self.object,))

    @property
    def right(self) -> str:
        """The right answers as people read them."""
        return " / ".join(self.objects)


SPLITS = ("det", "eva", "eva2")  # of a relation's prompts
RECORDED = ("det", "neg")  # the splits whose prompts have responses, in the order of the file


def prompts_bytes(prompts: Iterable[Prompt]) -> bytes:
    """prompts.jsonl: one JSON object a line; `objects` stands there if there are several.

    What only concepts or multiple-choice questions have stands there if it is said.
    """
    lines = []
    for prompt in prompts:
        record = asdict(prompt)
        if len(prompt.objects) == 1:
            del record["objects"]
        for name in ("negative_of", "group", "options", "images"):
            if not record[name]:
                del record[name]
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a prompts.jsonl, in the file's order.

    A line's right answers are those of `object` and `objects`, each a text or a list of them, and
    those of the lines that ask the same: one text, and the same pictures, in one relation. A line
    about pictures (`image`) may call its text `text`, its relation `group` and its right answers
    `answers`, and leave out what else a fact has: it is asked in the split eva.
    """
    plain = [field.name for field in fields(Prompt) if field.default is MISSING]
    names = [name for name in plain if name != "object"]
    prompts = []
    asked: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    known: dict[tuple[str, ...], tuple[str, ...]] = {}  # right answers: of many prompts the same
    for record in read_records(path, names, "prompt", _right):
        right, images = record.pop("objects"), record.pop("images", ())
        right = known.setdefault(right, right)
        images = tuple(str(path.parent / image) for image in images)
        p = Prompt(**record, object=right[0], objects=right, images=images)
        prompts.append(p)
        asked.setdefault((p.relation, p.prompt, p.images), []).extend(right)
    for place, p in enumerate(prompts):
        others = asked[p.relation, p.prompt, p.images]
        if len(others) > len(p.objects):
            prompts[place] = replace(p, objects=distinct((*p.objects, *others)))
    return prompts


def distinct(names: Iterable[str]) -> tuple[str, ...]:
    """Names that differ by `fold`, each as it is written first."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(fold(name), name)
    return tuple(found.values())


def right_answers(record: Json) -> tuple[str, ...]:
    """The texts of `object`, `objects` and `answers` in a JSON object, each one or a list."""
    given = [record[key] for key in ("object", "objects", "answers") if key in record]
    names = [name for some in given for name in (some if isinstance(some, list) else [some])]
    if not names:
        raise KeyError("object")
    if not all(isinstance(name, str) for name in names):
        raise TypeError("an object is not a string")
    return distinct(names) if names[1:] else (names[0],)


def _right(record: Json) -> Json:
    """The right answers of a prompt, and what it says of concepts or options, where it says it."""
    found: Json = {"objects": right_answers(record)}
    if record.get("image"):
        found["images"] = pictures_of(record)
    elif record.get("group"):
        found["group"] = record["group"]
    lists = [name for name in ("negative_of", "options") if record.get(name)]
    found |= {name: tuple(record[name]) for name in lists}
    texts = [found.get("group", ""), *(text for name in lists for text in found[name])]
    is_text = any(isinstance(record[name], str) for name in lists)
    if is_text or not all(isinstance(t, str) for t in texts):
        raise TypeError("negative_of or options is no list of strings, or group no string")
    return found


def pictures_of(record: Json) -> tuple[str, ...]:
    """The paths of `image` in a JSON object, a text or a list of them."""
    given = record.get("image") or ()
    images = (given,) if isinstance(given, str) else given
    if not (isinstance(images, list | tuple) and all(isinstance(name, str) for name in images)):
        raise TypeError("image is no path, and no list of them")
    return tuple(images)


def _about_pictures(record: Json, number: int) -> Json:
    """A line about pictures with all that a prompt has."""
    given = {"id": str(number), "split": "eva", "language": "en", "template": "", "subject": ""}
    own = {name: record[key] for name, key in _SHORT.items() if key in record}
    return given | own | record


_SHORT = {"prompt": "text", "relation": "group"}


def read_records(
    path: Path, names: Sequence[str], what: str, more: Callable[[Json], Json] = lambda _: {}
) -> Iterator[Json]:
    """The `names` of every line of a JSONL file that `relneuron prompts` writes: texts, own ids.

    `more` adds to them what it takes from the line's object.
    """
    seen = set()
    for number, line in read_lines(require(path, "prompts FACTS_DIR -o prompts.jsonl")):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        also = ", object or objects" if more is _right else ""
        fix = f"give one JSON object a line with the fields {', '.join(names)}{also}"
        try:
            record = parse_json(line, where, fix)
            if not isinstance(record, dict):
                raise TypeError("no object")
            if more is _right and record.get("image"):
                record = _about_pictures(record, number)
            values = {name: record[name] for name in names}
            if not all(isinstance(value, str) for value in values.values()):
                raise TypeError("a field is not a string")
            # Most texts stand in many lines: each is kept once.
            values = {name: intern(value) for name, value in values.items()} | more(record)
        except (ValueError, KeyError, TypeError) as error:
            raise RelneuronError(f"{where}: not a {what} ({one_line(error)})", fix) from error
        if values["id"] in seen:
            raise RelneuronError(
                f"{where}: a second {what} with the id {values['id']!r}", "give each its own id"
            )
        seen.add(values["id"])
        yield values
    if not seen:
        fix = f"make it again with: relneuron prompts FACTS_DIR -o {path} --force"
        raise RelneuronError(f"{path} holds no {what}", fix)


def fact_name(prompt: Prompt) -> str:
    """The fact that a prompt asks, however it asks it: relation/subject; without one its words."""
    return f"{prompt.relation}/{composed(prompt.subject or prompt.prompt)}"


def rows_about(prompts: Iterable[Prompt]) -> dict[str, list[int]]:
    """What sets may be named after, and the places of the prompts that are about it.

    A relation; a fact (`fact_name`); or a subject, as files of others call a fact by its uuid.
    """
    found: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        names = {prompt.relation, fact_name(prompt), composed(prompt.subject)} - {""}
        for name in names:
            found.setdefault(name, []).append(row)
    return found


def relation_names(prompts: Iterable[Prompt]) -> list[str]:
    """The relations of some prompts, in order of their names."""
    return sorted({prompt.relation for prompt in prompts})


# --- the prompts beside what was found of them ---------------------------------------------------


def is_copy(copy: Path, source: Path, data: bytes) -> bool:
    return copy.is_file() and (copy.samefile(source) or copy.read_bytes() == data)


def check_recorded(folder: Path, source: Path, data: bytes, model: Json) -> None:
    """Refuse the folder of a recorded study of another model or of other prompts."""
    manifest = Manifest(folder)
    manifest.check_model(model)
    recorded = manifest.data["stages"].get("record", {}).get("inputs")
    if recorded is None:
        return
    copy = folder / "prompts.jsonl"
    if not is_copy(copy, source, data) or sha256(copy) != recorded.get("prompts"):
        raise RelneuronError(
            f"{folder} holds a study of other prompts", "use another output, or its prompts", 2
        )


def check_copy(copy: Path, source: Path, data: bytes, force: bool) -> None:
    """Refuse to replace other prompts than these."""
    if not is_copy(copy, source, data):
        refuse_overwrite(copy, force)


def write_copy(copy: Path, source: Path, data: bytes) -> None:
    if not is_copy(copy, source, data):
        atomic_write(copy, data)


# --- free prompts ----------------------------------------------------------------------------

FIELD = "{prompt}"


def read_questions(path: Path, template: str | None = None) -> list[Prompt]:
    """The prompts of a .txt (one a line, empty lines skipped) or .jsonl file (`prompt`, `id`).

    Without an `id` a prompt is named by its line, from 1. A `template` has the one field
    `{prompt}`. Of a .jsonl also: `group` (or `relation`), the domain that it belongs to; `answers`
    (or `object`, `objects`), the right ones, a text or a list of them; `image`, the path of a
    picture from the file's folder, or a list of them, where `prompt` may be called `text`.
    """
    if template is not None and template.count(FIELD) != 1:
        raise RelneuronError(
            f"the template {template!r} does not have {FIELD} once", f"use 'Q: {FIELD}', say", 2
        )
    if path.suffix not in (".txt", ".jsonl"):
        raise RelneuronError(f"{path} is neither .txt nor .jsonl", "give one of the two", 2)
    if not path.is_file():
        raise RelneuronError(f"{path} does not exist", "give a file of prompts", 2)
    found: dict[str, Prompt] = {}
    for number, line in read_lines(path):
        if not line.strip():
            continue
        p = Prompt(str(number), "", "", "", template or "", "", "", line)
        if path.suffix == ".jsonl":
            p = _question(line, number, f"{path}, line {number}", path.parent, p)
        if p.id in found:
            raise RelneuronError(
                f"{path}, line {number}: a second prompt with the id {p.id}", "give each its own"
            )
        asked = p.prompt if template is None else template.replace(FIELD, p.prompt)
        found[p.id] = replace(p, prompt=asked)
    if not found:
        raise RelneuronError(f"{path} holds no prompt", "give one prompt a line")
    return list(found.values())


def _question(line: str, number: int, where: str, folder: Path, plain: Prompt) -> Prompt:
    """The prompt of one line of a .jsonl."""
    fix = "give one JSON object a line with the field prompt"
    record = parse_json(line, where, fix)
    record = record if isinstance(record, dict) else {}
    text = record.get("prompt", record.get("text") if record.get("image") else None)
    if not isinstance(text, str):
        raise RelneuronError(f"{where}: not a prompt (it has no text called prompt)", fix)
    group = record.get("group", record.get("relation", ""))
    name = record.get("id")
    try:
        images = pictures_of(record)
        answers = right_answers(record) if {"object", "objects", "answers"} & {*record} else ()
        if not isinstance(group, str):
            raise TypeError("its group is no text")
    except (KeyError, TypeError) as error:
        raise RelneuronError(f"{where}: not a prompt ({one_line(error)})", fix) from error
    return replace(
        plain,
        id=str(number if name is None else name),
        relation=group,
        object=answers[0] if answers else "",
        objects=answers,
        prompt=text,
        images=tuple(str(folder / image) for image in images),
    )
