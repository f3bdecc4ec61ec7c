"""Sentences whose next token is an answer: their files, their target tokens, the rule to keep them.

The `attribute` stage calls it. A sentence is a Prompt whose relation is its knowledge type
(language, capital, country, color, number, month, or any other).
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relneuron.artifact import Prompt, RelneuronError, read_prompts
from relneuron.facts import read_relations
from relneuron.predict import encode

N_MOST_PROBABLE = 10  # a kept sentence's answer is among so many (arXiv 2312.12141, section 4)
SPLIT = "eva"  # of sentences whose file knows no splits

# What a table's column may be called; of each line one name is used.
_SENTENCE = ("prompt", "sentence")
_ANSWER = ("answer", "object", "target")
_TYPE = ("type", "relation")
_COLUMNS = "a column prompt or sentence, one of answer, object or target, one of type or relation"
_FORMATS = (".csv", ".jsonl", ".tsv")


# --- files -----------------------------------------------------------------------------------


def read_knowledge(path: Path) -> list[Prompt]:
    """The sentences of a file or folder, in its order; the relation of each is its type.

    - A prompts.jsonl, as `relneuron prompts` writes it: its prompts as they are.
    - A table (.csv, .tsv, or .jsonl with one object a line) with a column `prompt` or `sentence`,
      one of `answer`, `object` or `target`, one of `type` or `relation`, and optionally `id`,
      `subject`, `language` and `template`. Outer space of a cell does not count. Without ids the
      rows of a type are numbered: `<type>.0000`.
    - A folder of fact files in the format of the LRE data set, or one of them (.json): every fact
      in every main template.

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
    text = _read_text(path)
    if suffix == ".jsonl":
        if _is_prompts(text):
            prompts = read_prompts(path)
            _check_filled(path, prompts)
            return prompts
        records = _jsonl_records(path, text)
    else:
        records = _csv_records(path, text, "\t" if suffix == ".tsv" else ",")
    return _table_prompts(path, records)


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RelneuronError(
            f"{path}, line {line}: not UTF-8 ({error.reason})", "save the file as UTF-8"
        ) from error


def _fact_prompts(path: Path) -> list[Prompt]:
    return [
        Prompt(
            id=f"{relation.name}.{number:04d}.{variant}",
            relation=relation.name,
            split=SPLIT,
            language="en",
            template=template,
            subject=fact.subject,
            object=fact.object,
            prompt=template.replace("{}", fact.subject),
        )
        for relation in read_relations(path)
        for number, fact in enumerate(relation.facts)
        for variant, template in enumerate(relation.templates.main)
    ]


def _is_prompts(text: str) -> bool:
    """Whether the first line is one of a prompts.jsonl."""
    try:
        first = json.loads(text.partition("\n")[0])
    except ValueError:
        return False
    return isinstance(first, dict) and {field.name for field in fields(Prompt)} <= first.keys()


def _check_filled(path: Path, prompts: Sequence[Prompt]) -> None:
    for line, prompt in enumerate(prompts, 1):
        for name in ("id", "relation", "object", "prompt"):
            if not getattr(prompt, name).strip():
                raise _empty(path, line, name)


def _empty(path: Path, line: int, column: str) -> RelneuronError:
    return RelneuronError(
        f"{path}, line {line}: {column} is empty", f"give every line its {column}, or remove it"
    )


_Record = tuple[int, Mapping[str, str]]  # a line's number and its cells


def _csv_records(path: Path, text: str, delimiter: str) -> Iterator[_Record]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    fix = f"give every line as many cells as the first, separated by {delimiter!r}"
    try:
        header = [name.strip().lower() for name in next(reader, [])]
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
                yield line, dict(zip(header, (cell.strip() for cell in cells), strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise RelneuronError(f"{path}, line {reader.line_num}: {error}", fix) from error


def _jsonl_records(path: Path, text: str) -> Iterator[_Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise TypeError("no object")
            cells = {name.strip().lower(): _cell(value) for name, value in record.items()}
        except (ValueError, TypeError, RecursionError) as error:
            raise RelneuronError(
                f"{path}, line {number}: {error}", f"give one JSON object a line with {_COLUMNS}"
            ) from error
        yield number, cells


def _cell(value: object) -> str:
    """A text or a number of a JSON object; of anything else the text is not known."""
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair is no text
        return value.strip()
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else ""


def _table_prompts(path: Path, records: Iterator[_Record]) -> list[Prompt]:
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    numbers: Counter[str] = Counter()
    for line, cells in records:
        sentence = cells[_column(path, line, cells, _SENTENCE)]
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
        about: dict[str, Any] = {key: cells.get(key, "") for key in ("template", "subject")}
        language = cells.get("language") or "en"
        prompts.append(Prompt(name, kind, SPLIT, language, **about, object=answer, prompt=sentence))
    if not prompts:
        raise RelneuronError(f"{path} holds no sentence", f"give a table with {_COLUMNS}")
    return prompts


def _column(path: Path, line: int, cells: Mapping[str, str], names: Sequence[str]) -> str:
    """Which of `names` this line has: exactly one, and something in it."""
    found = [name for name in names if name in cells]
    if len(found) > 1:
        raise RelneuronError(
            f"{path}, line {line}: the columns {' and '.join(found)} mean the same",
            f"keep one of {', '.join(names)}",
        )
    if not found:
        raise RelneuronError(
            f"{path}, line {line}: no column {' or '.join(names)}", f"give a table with {_COLUMNS}"
        )
    if not cells[found[0]]:
        raise _empty(path, line, found[0])
    return found[0]


# --- targets ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """N sentences as tokens, with the token that each is asked for: its answer's first one."""

    ids: list[list[int]]  # of each sentence, special tokens included
    targets: list[int]
    n_answer_tokens: list[int]

    @property
    def n_several(self) -> int:
        """How many answers have more than one token."""
        return sum(n > 1 for n in self.n_answer_tokens)


def encode_targets(
    tokenizer: Any, model: Any, prompts: Sequence[Prompt], *, strict: bool = False
) -> Targets:
    """Tokenise sentences and their answers, an answer with a space in front of it.

    The target is the first token by which sentence and answer differ from the sentence alone. An
    answer of several tokens is stood for by its first one, or with `strict` refused. Raises
    RelneuronError that names the prompt, too, for a sentence without a token or longer than the
    context, an answer without a token, and a token that the model does not have.
    """
    if not prompts:
        raise RelneuronError("there is no sentence to attribute", "give at least one prompt")
    _check_lengths(tokenizer, model, prompts)
    asked = encode(tokenizer, model, prompts, n_tokens=0)
    whole = tokenizer([f"{prompt.prompt} {prompt.object}" for prompt in prompts])["input_ids"]
    n_logits = _n_logits(model)
    counts = []
    for prompt, head, full, target in zip(prompts, asked.ids, whole, asked.answers, strict=True):
        if n_logits is not None and target >= n_logits:
            raise RelneuronError(
                f"prompt {prompt.id}: its answer {prompt.object!r} begins with the token "
                f"{target}, the model predicts {n_logits} tokens",
                "give a model and a tokenizer that belong together",
            )
        pairs = enumerate(zip(head, full, strict=False))
        counts.append(len(full) - next((i for i, (a, b) in pairs if a != b), len(head)))
        if strict and counts[-1] > 1:
            raise RelneuronError(
                f"prompt {prompt.id}: its answer {prompt.object!r} has {counts[-1]} tokens",
                "leave --strict out to ask for the first one, or remove the prompt",
            )
    return Targets(asked.ids, asked.answers, counts)


def _check_lengths(tokenizer: Any, model: Any, prompts: Sequence[Prompt]) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return
    ids = tokenizer([prompt.prompt for prompt in prompts])["input_ids"]
    for prompt, line in zip(prompts, ids, strict=True):
        if len(line) > context:
            raise RelneuronError(
                f"prompt {prompt.id} has {len(line)} tokens, the model's context {context}",
                "shorten or remove it",
            )


def _n_logits(model: Any) -> int | None:
    """V, the tokens that the unembedding knows; not known without one."""
    head = model.get_output_embeddings()
    return None if head is None else int(head.weight.shape[0])


# --- the rule to keep a sentence -------------------------------------------------------------


def type_tokens(targets: Sequence[int], types: Sequence[str]) -> dict[str, Tensor]:
    """Each type's target tokens, (K,) int64, each once and ascending."""
    found: dict[str, set[int]] = {}
    for target, kind in zip(targets, types, strict=True):
        found.setdefault(kind, set()).add(target)
    return {kind: torch.tensor(sorted(tokens)) for kind, tokens in found.items()}


def keep(
    logits: Tensor, targets: Tensor, types: Sequence[str], type_tokens: Mapping[str, Tensor]
) -> Tensor:
    """Which sentences the model knows (arXiv 2312.12141, section 4): (E,) bool.

    `logits` (E, V) at the last position, `targets` (E,) int64. A sentence is kept if at most nine
    tokens have a larger logit than its target, and its target a larger one than every other token
    of `type_tokens[type]`. Where the type has no other token the first condition alone decides. A
    target whose logit is not finite is not kept.
    """
    own = logits.gather(1, targets[:, None])
    kept = ((logits > own).sum(1) < N_MOST_PROBABLE) & own[:, 0].isfinite()
    for kind in dict.fromkeys(types):
        rows = torch.tensor([i for i, name in enumerate(types) if name == kind])
        rows, tokens = rows.to(logits.device), type_tokens[kind].to(logits.device)
        is_own = tokens == targets[rows, None]
        above = (own[rows] > logits[rows[:, None], tokens]) | is_own
        kept[rows] &= above.all(1)
    return kept
