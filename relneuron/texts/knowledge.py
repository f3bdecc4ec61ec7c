"""Sentences whose next token is an answer: their files.

The `attribute` stage calls it; which tokens they are asked for says `model/targets.py`. A
sentence is a Prompt whose relation is its knowledge type (language, capital, country, color,
number, month, or any other).
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.prompts import Prompt, distinct, read_prompts
from relneuron.artifact.reading import one_line, parse_json, read_lines
from relneuron.texts.facts import ENGLISH, read_relations
from relneuron.texts.queries import are_queries, read_queries

SPLIT = "eva"  # of sentences whose file knows no splits

# What a table's column may be called; of each line one name is used.
_SENTENCE = ("prompt", "sentence")
_ANSWER = ("answer", "object")
_TYPE = ("type", "relation")
_COLUMNS = "a column prompt or sentence, one of answer, object or target, one of type or relation"
_FORMATS = (".csv", ".jsonl", ".tsv")
_TARGET = "target"
_TARGET_ID = "target_id"


@dataclass(frozen=True)
class TargetPrompt(Prompt):
    """A sentence whose target is given: a token as text, or its id."""

    target: str | int = ""


# --- files -----------------------------------------------------------------------------------


def read_knowledge(path: Path, *, answers: bool = True) -> list[Prompt]:
    """The sentences of a file or folder, in its order; the relation of each is its type.

    - A prompts.jsonl, as `relneuron prompts` writes it: its prompts as they are.
    - A table (.csv, .tsv, or .jsonl with one object a line) with a column `prompt` or `sentence`,
      one of `answer`, `object` or `target`, one of `type` or `relation`, and optionally `id`,
      `subject`, `language` and `template`. Outer space of a cell does not count, but for `target`.
      Without ids the rows of a type are numbered: `<type>.0000`. In .jsonl an answer may be a list
      of right ones, also under `answers` or `objects`.
    - A folder of fact files in the format of the LRE data set, or one of them (.json): every fact
      in every main template; or the JSON of facts and their sentences of texts/queries.py.

    A `target` (also in a prompts.jsonl) is the token to ask for in place of the answer's first: its
    text, or its id (a number in JSON, digits that are no token, or the column `target_id`). Where
    there is no answer it stands for it. Without `answers` none is needed.

    Splits are those of a prompts.jsonl; everything else is `eva`. Raises RelneuronError with the
    line number for a missing column, an empty or missing cell, an id that is there twice, a file
    without a sentence or one that is not UTF-8.
    """
    suffix = path.suffix.lower()
    if not path.exists():
        raise RelneuronError(f"{path} does not exist", "give a file of facts or prompts", 2)
    if path.is_dir() or suffix == ".json":
        return _fact_prompts(path)
    if suffix not in _FORMATS:
        raise RelneuronError(
            f"{path} is no file of facts or prompts",
            f"give a file that ends in {', '.join(_FORMATS)} or .json, or a folder of fact files",
            2,
        )
    text = "".join(f"{line}\n" for _, line in read_lines(path))
    if suffix == ".jsonl":
        if _is_prompts(text):
            prompts = _with_targets(read_prompts(path), text)
            _check_filled(path, text, prompts, answers)
            return prompts
        records = _jsonl_records(path, text)
    else:
        records = _csv_records(path, text, "\t" if suffix == ".tsv" else ",")
    return _table_prompts(path, records, answers)


def _fact_prompts(path: Path) -> list[Prompt]:
    if are_queries(path):
        return read_queries(path)
    return [
        Prompt(
            id=f"{relation.name}.{number:04d}.{variant}",
            relation=relation.name,
            split=SPLIT,
            language=relation.language,
            template=template,
            subject=fact.subject,
            object=fact.object,
            prompt=template.replace("{}", fact.subject),
            objects=fact.objects,
        )
        for relation in read_relations(path)
        for number, fact in enumerate(relation.facts)
        for variant, template in enumerate(relation.templates.main)
    ]


def _is_prompts(text: str) -> bool:
    """Whether the first line, blank ones left out, is one of a prompts.jsonl."""
    try:
        first = json.loads(text.lstrip().partition("\n")[0])
    except (ValueError, RecursionError):
        return False
    if not isinstance(first, dict):
        return False
    names = {field.name for field in fields(Prompt) if field.default is MISSING} - {"object"}
    return names <= first.keys() and bool({"object", "objects"} & first.keys())


def _with_targets(prompts: Sequence[Prompt], text: str) -> list[Prompt]:
    """The prompts of a prompts.jsonl, with the targets that its lines give."""
    records = (json.loads(line) for line in text.split("\n") if '"target"' in line)
    given = {r["id"]: r["target"] for r in records if _is_target(r.get("target"))}
    return [_given(prompt, given.get(prompt.id, "")) for prompt in prompts]


def _is_target(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _given(prompt: Prompt, target: str | int) -> Prompt:
    about = {field.name: getattr(prompt, field.name) for field in fields(Prompt)}
    return prompt if target == "" else TargetPrompt(**about, target=target)


def _check_filled(path: Path, text: str, prompts: Sequence[Prompt], answers: bool) -> None:
    lines = [number for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for line, prompt in zip(lines, prompts, strict=True):
        no_answer = isinstance(prompt, TargetPrompt) or not answers
        for name in ("id", "relation", "prompt", *(() if no_answer else ("object",))):
            if not getattr(prompt, name).strip():
                raise _empty(path, line, name)
        if not no_answer and not all(name.strip() for name in prompt.objects):
            raise _empty(path, line, "objects")


def _empty(path: Path, line: int, column: str) -> RelneuronError:
    return RelneuronError(
        f"{path}, line {line}: {column} is empty", f"give every line its {column}, or remove it"
    )


# A line's number and its cells; where a list stands for the answer, its right answers.
_Record = tuple[int, Mapping[str, str], tuple[str, ...]]


def _csv_records(path: Path, text: str, delimiter: str) -> Iterator[_Record]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    fix = f"give every line as many cells as the first, separated by {delimiter!r}"
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if len(header) == 1 and ";" in header[0] and delimiter == ",":
            raise RelneuronError(
                f"{path}, line 1: its columns are separated by semicolons",
                "save it with commas between the columns, or with tabs as .tsv",
            )
        double = [name for name, n in Counter(header).items() if n > 1]
        if double:
            raise RelneuronError(
                f"{path}, line 1: the column {double[0]!r} is there twice", "name each column once"
            )
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise RelneuronError(
                    f"{path}, line {line}: {len(cells)} cells, the first line has {len(header)}",
                    fix,
                )
            if cells:
                named = zip(header, cells, strict=True)
                yield line, {n: c if n == _TARGET else c.strip() for n, c in named}, ()
            line = reader.line_num + 1
    except csv.Error as error:
        raise RelneuronError(f"{path}, line {reader.line_num}: {error}", fix) from error


def _jsonl_records(path: Path, text: str) -> Iterator[_Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where, fix = f"{path}, line {number}", f"give one JSON object a line with {_COLUMNS}"
        try:
            record = parse_json(line, where, fix)
            if not isinstance(record, dict):
                raise TypeError("no object")
            named = {name.strip().lower(): value for name, value in record.items()}
            if isinstance(named.get(_TARGET), list):  # a target is one token: these are answers
                named.setdefault("answers", named.pop(_TARGET))
            right = _right_answers(named)
            cells = {name: _cell(value) for name, value in named.items()}
            target = named.get(_TARGET)
            if isinstance(target, str):
                cells[_TARGET] = target
            elif _TARGET in cells:
                cells.setdefault(_TARGET_ID, cells.pop(_TARGET))
        except (ValueError, TypeError) as error:
            raise RelneuronError(f"{where}: {one_line(error)}", fix) from error
        yield number, cells, right


def _right_answers(record: Json) -> tuple[str, ...]:
    """The right answers, where there is a list of them; the record's first answer is one of them.

    Two columns that mean the same stay as they are, to be refused.
    """
    for one, several in (("answer", "answers"), ("object", "objects")):
        given = {key: record[key] for key in (one, several) if key in record}
        if any(isinstance(value, list) for value in given.values()):
            record.pop(several, None)
            values = [
                v for some in given.values() for v in (some if isinstance(some, list) else [some])
            ]
            right = distinct(_cell(value) for value in values)
            record[one] = right[0] if all(right) and right else ""
            return right
    return ()


def _cell(value: object) -> str:
    """A text or a number of a JSON object; of anything else the text is not known."""
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair is no text
        return value.strip()
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else ""


def _table_prompts(path: Path, records: Iterator[_Record], answers: bool) -> list[Prompt]:
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    numbers: Counter[str] = Counter()
    for line, cells, right in records:
        sentence = cells[_column(path, line, cells, _SENTENCE)]
        target = _target(path, line, cells)
        answer = target.strip() if isinstance(target, str) else ""
        if any(cells.get(name) for name in _ANSWER) or (answers and target == ""):
            answer = cells[_column(path, line, cells, _ANSWER)]
        kind = cells[_column(path, line, cells, _TYPE)]
        name = cells.get("id", f"{kind}.{numbers[kind]:04d}")
        numbers[kind] += 1
        if not name:
            raise _empty(path, line, "id")
        if name in lines:
            raise RelneuronError(
                f"{path}, line {line}: the id {name!r} is that of line {lines[name]}, too",
                "give each line its own id",
            )
        lines[name] = line
        template, subject = (cells.get(key, "") for key in ("template", "subject"))
        objects = distinct((answer, *right))
        language = cells.get("language") or ENGLISH
        about = name, kind, SPLIT, language, template, subject
        prompts.append(_given(Prompt(*about, answer, sentence, objects), target))
    if not prompts:
        raise RelneuronError(f"{path} holds no sentence", f"give a table with {_COLUMNS}")
    return prompts


def _target(path: Path, line: int, cells: Mapping[str, str]) -> str | int:
    """The target that a line gives: an id, a text that is kept as it is, or nothing."""
    given = cells.get(_TARGET_ID, "")
    if given and not given.isdecimal():
        raise RelneuronError(
            f"{path}, line {line}: {_TARGET_ID} {given!r} is no token id",
            f"give a number from 0 on; a token as text stands in the column {_TARGET}",
        )
    text = cells.get(_TARGET, "")
    return int(given) if given else text if text.strip() else ""


def _column(path: Path, line: int, cells: Mapping[str, str], names: Sequence[str]) -> str:
    """Which of `names` this line has: exactly one, and something in it."""
    found = [name for name in names if name in cells]
    if len(found) > 1:
        raise RelneuronError(
            f"{path}, line {line}: the columns {' and '.join(found)} mean the same",
            f"keep one of {', '.join(names)}",
        )
    if not found:
        also = " or target" if names == _ANSWER else ""
        raise RelneuronError(
            f"{path}, line {line}: no column {' or '.join(names)}{also}",
            f"give a table with {_COLUMNS}",
        )
    if not cells[found[0]]:
        raise _empty(path, line, found[0])
    return found[0]
