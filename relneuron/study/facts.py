"""The facts of a study: a folder of fact files, or facts in memory, which become such files.

`run.make_study` reads them; the command line gives a folder, `relneuron.run` either.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relneuron.artifact.files import Json, RelneuronError, atomic_write, json_bytes
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.reading import one_line
from relneuron.texts.facts import Relation, read_relations, relation_of
from relneuron.texts.prompts import refuse_concepts

FOLDER = "facts"  # of a study whose facts were no files

FactFiles = dict[str, Json]  # the content of each relation's fact file


@dataclass(frozen=True)
class Facts:
    """A folder (or file) of facts, or the content of each relation's fact file."""

    path: Path | None
    files: FactFiles

    @classmethod
    def of(cls, given: Any) -> Facts:
        """A path, or what `fact_files` takes; one that holds no facts raises."""
        if not isinstance(given, str | Path):
            return cls(None, fact_files(given))
        path = Path(given)
        if not path.exists():
            raise RelneuronError(f"{path} does not exist", "give a folder of fact files", 2)
        refuse_concepts(path)
        return cls(path, {})

    @property
    def where(self) -> str:
        """What errors call them."""
        return str(self.path) if self.path is not None else "the list of facts"

    def relations(self, suffix: str | None) -> list[Relation]:
        """The relations, in order of their names."""
        if self.path is not None:
            return read_relations(self.path, suffix=suffix)
        files = sorted(self.files.items())
        return [relation_of(name, f, f"relation {name}", suffix=suffix) for name, f in files]

    def check(self, study: Path, force: bool) -> None:
        """Refuse the study of other facts, unless `force`; a killed run may have left some."""
        if self.path is not None:
            return
        before = {path.name: path.read_bytes() for path in (study / FOLDER).glob("*.json")}
        written, is_made = self._written(), "prompts" in Manifest(study).data["stages"]
        is_other = before != written if is_made else not before.items() <= written.items()
        if is_other and not force:
            raise RelneuronError(
                f"{study} is a study of other facts", "use another output, or force=True", 2
            )

    def place(self, study: Path) -> Path:
        """Where the stages read them: in `study`, which is held, if they were in memory."""
        if self.path is not None:
            return self.path
        written, folder = self._written(), study / FOLDER
        for path in folder.glob("*.json"):
            if path.name not in written:
                path.unlink()
        for name, data in written.items():
            if not ((folder / name).is_file() and (folder / name).read_bytes() == data):
                atomic_write(folder / name, data)
        return folder

    def _written(self) -> dict[str, bytes]:
        return {f"{name}.json": json_bytes(content) for name, content in self.files.items()}


def fact_files(facts: Any) -> FactFiles:
    """The fact files of facts in memory, by relation.

    Either contents of fact files (`texts.facts.read_relation`), each with its `name`; or one row a
    fact, with relation, subject, object and template (each but relation and subject a text or
    several): a list of dicts, a pandas.DataFrame, a datasets.Dataset. A relation's templates are
    those of its rows, each once; all of its subjects are asked with all of them.
    """
    rows = _rows(facts)
    whole = [row for row in rows if "samples" in row]
    if whole and len(whole) < len(rows):
        raise RelneuronError(
            "some facts are whole relations with samples, others are not",
            "give relations, or one row a fact",
            2,
        )
    files = _whole(whole) if whole else _of_rows(rows)
    for name, content in files.items():
        try:
            json.dumps(content, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RelneuronError(
                f"relation {name} holds what JSON does not ({one_line(error)})",
                "give texts, numbers, lists and dicts only",
                2,
            ) from error
    return files


def _rows(facts: Any) -> list[Mapping[str, Any]]:
    if hasattr(facts, "to_dict") and hasattr(facts, "columns"):  # pandas
        facts = facts.to_dict("records")
    rows = [facts] if isinstance(facts, Mapping) else list(facts)
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise RelneuronError(
            "the facts are no rows" if rows else "there is no fact",
            "give a folder of fact files, a list of dicts, a data frame or a Dataset",
            2,
        )
    return rows


def _whole(relations: Iterable[Mapping[str, Any]]) -> FactFiles:
    files: FactFiles = {}
    for number, relation in enumerate(relations):
        name = _file_name(relation.get("name"), f"relation {number}: name")
        if name in files:
            raise RelneuronError(f"two relations are called {name!r}", "give each its own name", 2)
        files[name] = dict(relation)
    return files


def _of_rows(rows: Iterable[Mapping[str, Any]]) -> FactFiles:
    files: FactFiles = {}
    for number, row in enumerate(rows):
        lacking = [key for key in ("relation", "subject", "object", "template") if key not in row]
        if lacking:
            raise RelneuronError(
                f"fact {number} has no {', '.join(lacking)}",
                "give each row relation, subject, object and template, such as '{} is based in'",
                2,
            )
        name = _file_name(row["relation"], f"fact {number}: relation")
        own = files.setdefault(name, {"name": name, "prompt_templates": [], "samples": []})
        for template in _texts(row["template"]):
            if template not in own["prompt_templates"]:
                own["prompt_templates"].append(template)
        own["samples"].append({"subject": row["subject"], "object": _texts(row["object"])})
    return files


def _texts(cell: Any) -> list[Any]:
    """A text or several; an array's, as data frames have them, too."""
    several = isinstance(cell, Sequence) or hasattr(cell, "tolist")
    return list(cell) if several and not isinstance(cell, str) else [cell]


def _file_name(name: Any, where: str) -> str:
    """A relation's name as that of its file, with lines in place of spaces."""
    is_text = isinstance(name, str) and bool(name.strip()) and name.isprintable()
    if not is_text or name.startswith(".") or "/" in name:
        raise RelneuronError(f"{where} is {name!r}", "give a name that a file can have", 2)
    return str(name).strip().replace(" ", "_")
