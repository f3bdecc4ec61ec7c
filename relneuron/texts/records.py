"""From a record of JSONL, parquet or a dataset to a document, or to a record with pictures.

`read.py` calls it for each record that it reads; what a record lacks is said here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from relneuron.artifact.files import Json, RelneuronError
from relneuron.texts.pictures import Record, pictures_of
from relneuron.texts.sources import Source

IMAGES = "--image-column"


class Piece(NamedTuple):
    """A document or a part of one: text, or (n,) int32 token ids; None: a record has no text.

    Of a source with an `image_column` a whole `Record`.
    """

    group: str
    content: Any
    begins: bool  # a document; else it goes on with the one before


class TextCheck:
    """Refuses a file whose first `SAMPLE` records, or all, lack the field with the text.

    Then the field has another name. A record among others that have none, or null, is skipped.
    """

    SAMPLE = 1000

    def __init__(self, is_begin: bool) -> None:
        self.first: RelneuronError | None = None
        self.n_wrong, self.is_settled = 0, not is_begin

    def note(self, wrong: RelneuronError | None) -> None:
        """A record has a text or null, or is `wrong`."""
        if self.is_settled:
            return
        self.is_settled = wrong is None
        self.first = self.first or wrong
        self.n_wrong += 1
        if self.n_wrong >= self.SAMPLE:
            self.end()

    def end(self) -> None:
        """No record follows, or enough were seen."""
        if self.first is not None and not self.is_settled:
            raise self.first


def piece_of(source: Source, record: Any, where: str, check: TextCheck, folder: Path) -> Piece:
    """The document of a record; its content is None if the record has no text.

    With an `image_column` its content is a `Record`; paths in it are relative to `folder`.
    """
    if not isinstance(record, dict):
        raise RelneuronError(f"{where}: no object", "give one object with named fields a record")
    if source.image_column is not None:
        return _pictured(source, record, where, folder, source.image_column)
    text = record.get(source.text_column)
    wrong = None
    if source.text_column not in record:
        wrong = no_field(record, source.text_column, where, "--text-column")
    elif not isinstance(text, str | None):
        cause = f"{where}: the field {source.text_column!r} is no string"
        wrong = RelneuronError(cause, "give the text as a string")
    check.note(wrong)
    if wrong is not None or not text:
        # It is skipped, of whatever group it is.
        group = record.get(source.group_column) if source.group is None else source.group
        return Piece(str(group), text if wrong is None else None, True)
    _check_text(text, where)
    return Piece(_group(source, record, where), text, True)


def _pictured(source: Source, record: Json, where: str, folder: Path, column: str) -> Piece:
    """A record with pictures, which must have both, text and pictures; the text may be empty."""
    for name, option in ((source.text_column, "--text-column"), (column, IMAGES)):
        if name not in record:
            raise no_field(record, name, where, option)
    text = record[source.text_column]
    if not isinstance(text, str):
        cause = f"{where}: the field {source.text_column!r} is no string"
        raise RelneuronError(cause, "give every record with pictures a text, an empty one at least")
    _check_text(text, where)
    group = _group(source, record, where)
    pictures = pictures_of(record[column], folder, where)
    return Piece(group, Record(group, text, pictures, where), True)


def _check_text(text: str, where: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RelneuronError(
                f"{where}: the text holds half a surrogate pair", "correct the text"
            ) from error


def _group(source: Source, record: Json, where: str) -> str:
    group: Any = source.group
    if source.group_column is not None:
        if source.group_column not in record:
            raise no_field(record, source.group_column, where, "--group-column")
        group = record[source.group_column]
        if isinstance(group, bool) or not isinstance(group, str | int):
            raise RelneuronError(
                f"{where}: the group {group!r} is neither a string nor an integer",
                "give every record the name of its group",
            )
    return str(group)


def no_field(record: Json, name: str, where: str, option: str) -> RelneuronError:
    return RelneuronError(
        f"{where}: no field {name!r}, only {', '.join(map(str, record)) or 'none'}",
        f"name another with {option}",
    )
