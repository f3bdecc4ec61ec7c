"""The documents of a source in their order, from any position that was reached before.

windows.py calls it, mostly in a worker process: nothing here imports torch, except for a .pt.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.parquet import group_rows, open_parquet
from relneuron.artifact.reading import MIB, decoded, parse_json, too_large
from relneuron.texts.ids import open_ids
from relneuron.texts.records import IMAGES, Piece, TextCheck, no_field, piece_of
from relneuron.texts.sources import GZIP, ID_KINDS, File, Source, split_hf

PIECE_BYTES = MIB  # of one line of text; memory stays bounded in a file that is one line
PIECE_TOKENS = 1 << 18  # of one document of token ids
CHUNK_CHARACTERS = 1 << 18  # of documents that are tokenised together
CHUNK_PIECES = 1 << 12
CHARACTER_BYTES = 4  # of UTF-8 at most: a line is cut before a character
STATE_EVERY = 1000  # records of a dataset between two states: taking one is slow

_BOM = b"\xef\xbb\xbf"

Array = np.ndarray[Any, Any]


# A piece, the position after it (JSON), and the share of the file that is read by then, if known.
Step = tuple[Piece, Any, float | None]


@dataclass(frozen=True)
class Chunk:
    """Pieces that are tokenised together, and where the source goes on after them.

    fraction: how much of the source is read by then, by bytes of files; None if unknown.
    """

    pieces: list[Piece]
    position: Json
    fraction: float | None


def read_chunks(
    source: Source, position: Json | None, vocabulary: int | None = None
) -> Iterator[Chunk]:
    """The pieces of a source after `position` (None: all), in chunks of about 256 KiB of text.

    The chunks after a chunk's position are the same however often the source is opened.
    """
    if source.dataset is None:
        check_all(source, vocabulary)
    files = source.files or (File("", "dataset"),)
    sizes = [_size(file) for file in files]
    number, inside = (position["file"], position["at"]) if position else (0, None)
    pieces: list[Piece] = []
    for place in range(number, len(files)):
        n_characters = 0
        share: float | None = None
        steps = read_file(source, files[place], inside if place == number else None, vocabulary)
        with closing(steps):
            for piece, after, share in steps:
                pieces.append(piece)
                n_characters += 0 if piece.content is None else len(piece.content)
                if n_characters >= CHUNK_CHARACTERS or len(pieces) >= CHUNK_PIECES:
                    fraction = _fraction(sizes, place, share)
                    yield Chunk(pieces, {"file": place, "at": after}, fraction)
                    pieces, n_characters = [], 0
        if pieces:
            fraction = _fraction(sizes, place, 1.0)
            yield Chunk(pieces, {"file": place + 1, "at": None}, fraction)
            pieces = []


def _size(file: File) -> int | None:
    return None if file.kind in ("hf", "dataset") else Path(file.path).stat().st_size


def _fraction(sizes: Sequence[int | None], place: int, share: float | None) -> float | None:
    known = [size for size in sizes if size is not None]
    if share is None or len(known) < len(sizes):
        return None
    return (sum(known[:place]) + share * known[place]) / max(1, sum(known))


def read_file(source: Source, file: File, at: Any, vocabulary: int | None) -> Any:
    if file.kind in ID_KINDS:
        return _read_ids(source, file, at, vocabulary)
    readers: dict[str, Callable[[Source, File, Any], Iterator[Step]]] = {
        "text": _read_text,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "hf": _read_dataset,
        "dataset": _read_dataset,
    }
    return readers[file.kind](source, file, at)


def check_all(source: Source, vocabulary: int | None) -> None:
    """Refuse what the heads of the files show to be wrong, before the first one is read."""
    for file in source.files:
        if file.kind in ID_KINDS:
            open_ids(source, file, vocabulary)
        elif file.kind == "parquet":
            _open_parquet(source, file).close()


# --- lines -----------------------------------------------------------------------------------


def _open(path: str) -> tuple[IO[bytes], IO[bytes]]:
    """A file to read lines from, and the file on the disk below it."""
    raw = Path(path).open("rb")  # noqa: SIM115
    if path.lower().endswith(".gz") or raw.peek(2)[:2] == GZIP:
        return gzip.GzipFile(fileobj=raw), raw  # type: ignore[return-value]
    return raw, raw


def lines_of(
    file: File, at: Any, limit: int
) -> Iterator[tuple[bytes, bool, int, list[Any], float]]:
    """(bytes, whether a line begins, its number, position after, share) of a file's lines.

    A line longer than `limit` comes in several pieces that end at a character; the line end is
    taken off. A position is (uncompressed bytes, number of the line, whether it begins there).
    """
    offset, number, begins = at or (0, 1, True)
    size = max(1, Path(file.path).stat().st_size)
    lines, raw = _open(file.path)
    carried = b""
    with raw, lines:
        try:
            lines.seek(offset)
            while data := carried + lines.readline(limit - len(carried)):
                is_cut = len(data) == limit and not data.endswith(b"\n")
                end = _whole_characters(data) if is_cut else len(data)
                data, carried = data[:end], data[end:]
                bom = len(_BOM) if offset == 0 and data.startswith(_BOM) else 0
                offset += len(data)
                ends = data.endswith(b"\n")
                after = [offset, number + ends, ends]
                text = data[bom:].removesuffix(b"\n").removesuffix(b"\r") if ends else data[bom:]
                yield text, begins, number, after, raw.tell() / size
                number, begins = number + ends, ends
        except (OSError, EOFError, zlib.error) as error:
            raise RelneuronError(f"{file.path}: {error}", "give a whole file") from error


def _whole_characters(data: bytes) -> int:
    """How many bytes of a cut line to take: no part of a character, no half of a line end."""
    if data.endswith(b"\r"):
        return len(data) - 1
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            needed = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
            return len(data) - back if needed > back else len(data)
    return len(data)


def _read_text(source: Source, file: File, at: Any) -> Iterator[Step]:
    for data, begins, number, after, share in lines_of(file, at, PIECE_BYTES):
        if data:
            text = decoded(data, f"{file.path}, line {number}")
            yield Piece(source.group or "", text, begins), after, share


def _read_jsonl(source: Source, file: File, at: Any) -> Iterator[Step]:
    check = TextCheck(at is None)
    limit = source.max_record_mib
    for data, begins, number, after, share in lines_of(file, at, limit * MIB):
        where = f"{file.path}, line {number}"
        is_whole = after[-1] or len(data) < limit * MIB - CHARACTER_BYTES
        if not begins or not is_whole:
            raise too_large(where, "a record", limit)
        line = decoded(data, where)
        if not line or line.isspace():
            continue
        record = parse_json(line, where, "give one JSON object a line")
        piece = piece_of(source, record, where, check, Path(file.path).parent)
        yield piece, after, share
    check.end()


# --- parquet and datasets --------------------------------------------------------------------


def _open_parquet(source: Source, file: File) -> Any:
    opened = open_parquet(file.path, [source.text_column])
    options = {"--text-column": source.text_column, "--group-column": source.group_column}
    options[IMAGES] = source.image_column
    for option, name in options.items():
        if name is not None and name not in opened.schema_arrow.names:
            raise no_field(dict.fromkeys(opened.schema_arrow.names), name, file.path, option)
    kind = opened.schema_arrow.field(source.text_column).type
    kind = kind.value_type if str(kind).startswith("dictionary") else kind
    if str(kind) not in ("string", "large_string", "string_view", "null"):
        cause = f"{file.path}: the field {source.text_column!r} is no string, but {kind}"
        raise RelneuronError(" ".join(cause.split())[:300], "give the text as a string")
    return opened


def _read_parquet(source: Source, file: File, at: Any) -> Iterator[Step]:
    """Positions are (row group, row in it)."""
    every = (source.text_column, source.group_column, source.image_column)
    columns = [name for name in every if name is not None]
    check = TextCheck(at is None)
    with closing(_open_parquet(source, file)) as opened:
        first, skip = at or (0, 0)
        n_rows = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        total, before = max(1, sum(n_rows)), sum(n_rows[:first])
        for number in range(first, len(n_rows)):
            for place, record in enumerate(group_rows(opened, file.path, columns, number)):
                if place >= skip:
                    where = f"{file.path}, row {before + place}"
                    piece = piece_of(source, record, where, check, Path(file.path).parent)
                    yield piece, [number, place + 1], (before + place + 1) / total
            before, skip = before + n_rows[number], 0
    check.end()


def load_dataset_of(file: File) -> Any:
    name, config, split = split_hf(file.path)
    try:
        datasets = import_module("datasets")
        if any((Path(name) / one).is_file() for one in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(name)  # one, or one for each split
            return (saved[split] if isinstance(saved, dict) else saved).to_iterable_dataset()
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # the hub, a loader or a file, each with errors of its own
        line = " ".join(str(error).split()) or type(error).__name__
        raise RelneuronError(
            f"{file.path} cannot be loaded ({line})", "check its name, configuration and split"
        ) from error


def _read_dataset(source: Source, file: File, at: Any) -> Iterator[Step]:
    """Positions are the dataset's own state (None: its begin) and the records after it."""
    name = file.path or source.name
    dataset = source.dataset if source.dataset is not None else load_dataset_of(file)
    has_state = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
    at = at or {"state": None, "skip": 0, "records": 0}
    state, number = at["state"], at["records"]
    base = number - at["skip"]  # the record that the state stands before
    folder = Path(split_hf(file.path)[0] if file.kind == "hf" else ".")
    if has_state:
        dataset = copy(dataset)  # the caller's object is left where it stands
        if state is not None:
            dataset.load_state_dict(json.loads(json.dumps(state)))
    check = TextCheck(number == 0)
    for record in islice(iter(dataset), at["skip"], None):
        piece = piece_of(source, record, f"{name}, record {number}", check, folder)
        number += 1
        if has_state and number % STATE_EVERY == 0:
            state, base = json.loads(json.dumps(dataset.state_dict())), number
        yield piece, {"state": state, "skip": number - base, "records": number}, None
    check.end()


# --- token ids -------------------------------------------------------------------------------


def _read_ids(source: Source, file: File, at: Any, vocabulary: int | None) -> Iterator[Step]:
    """Positions are numbers of tokens; each row of a 2-D file is a document."""
    ids = open_ids(source, file, vocabulary)
    width = ids.shape[-1] or 1
    flat = ids.reshape(-1)
    offset = at or 0
    while offset < len(flat):
        end = min(offset + PIECE_TOKENS, offset - offset % width + width)
        piece = flat[offset:end]
        low, high = int(piece.min()), int(piece.max())
        limit = vocabulary if vocabulary is not None else 1 << 31
        if low < 0 or high >= limit:
            wrong = offset + int(np.argmax((piece < 0) | (piece >= limit)))
            raise RelneuronError(
                f"{file.path} holds the token {int(flat[wrong])} at position {wrong}, "
                f"the vocabulary has {limit}",
                "give ids of this model's tokenizer, or correct --ids-dtype",
            )
        begins = offset % width == 0
        yield Piece(source.group or "", piece.astype(np.int32), begins), end, end / len(flat)
        offset = end
