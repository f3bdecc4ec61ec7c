"""Files that may hold anything: lines, JSON, csv and tensors are read here, within limits.

Every reader of relneuron calls it. What is wrong with a file is a RelneuronError that says which
file, where in it, what was expected and what to do.
"""

from __future__ import annotations

import csv
import errno
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from relneuron.artifact.files import Json, RelneuronError, cell_text, require

MIB = 1 << 20
MAX_RECORD_MIB = 16
# A JSON file is held as a whole: neurons, facts and manifests have their place in four records.
_RECORDS_A_FILE = 4
_RAISE = "if it is meant to be that large, raise --max-record-mib"

_max_record_mib = MAX_RECORD_MIB


def max_record_mib() -> int:
    """The largest record that is read, in MiB: a line, a cell of a csv, a document of a corpus."""
    return _max_record_mib


def allow_record_mib(size: int) -> int:
    """Read records of up to `size` MiB in this process; returns `size` (typer's callback)."""
    global _max_record_mib  # noqa: PLW0603
    _max_record_mib = size
    return size


def too_large(where: str, what: str, limit_mib: int) -> RelneuronError:
    """The error of a record, or of what a file unpacks to, above the limit."""
    return RelneuronError(f"{where}: {what} of more than {limit_mib} MiB", f"shorten it; {_RAISE}")


@contextmanager
def reading(path: Path | str, expected: str, fix: str) -> Iterator[None]:
    """Turn what a reader raises at a damaged file into an error that names it.

    For readers of foreign formats, which raise whatever a damaged file leads them to.
    """
    try:
        yield
    except (RelneuronError, MemoryError):
        raise
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):
            raise  # of the system, not of the content, which may lead to a place before its begin
        raise RelneuronError(f"{path} is no {expected} ({one_line(error)})", fix) from error
    except Exception as error:
        raise RelneuronError(f"{path} is no {expected} ({one_line(error)})", fix) from error


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 200 printable characters."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more, which was not run"
    if isinstance(error, KeyError):
        return f"{error} is not in it"
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


def _open(path: Path, mode: str = "rb", **how: Any) -> IO[Any]:
    """Open a file; a folder in its place raises."""
    try:
        return path.open(mode, **how)
    except IsADirectoryError as error:
        raise RelneuronError(
            f"{path} is a folder, not a file", "move it, or name a file"
        ) from error


# --- text ------------------------------------------------------------------------------------


def decoded(data: bytes, where: str) -> str:
    """UTF-8 as text."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RelneuronError(
            f"{where}: not UTF-8 ({error.reason}, byte {error.start})", "save the file as UTF-8"
        ) from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of a UTF-8 file's lines, without line ends and byte order mark."""
    limit = _max_record_mib * MIB
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(limit + 1), b""), 1):
            where = f"{path}, line {number}"
            if len(line) > limit:
                raise too_large(where, "a line", _max_record_mib)
            data = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            yield number, decoded(data.removesuffix(b"\n").removesuffix(b"\r"), where)


# --- JSON ------------------------------------------------------------------------------------


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half a pair, or one of two that belong together


def parse_json(text: str, where: str, fix: str) -> Any:
    """The value of a JSON text; a key that an object has twice raises, and half a character."""
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RelneuronError(
            f"{where}: it holds half a surrogate pair", "correct the text"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RelneuronError(f"{where}: not JSON ({one_line(error)})", fix) from error
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> Json:
    """A JSON object; one that has a key twice would lose what stands there first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {double!r} stands twice in one object")
    return found


def read_json(path: Path, what: str) -> Any:
    """The value of a JSON file, or an error that names the file and the line."""
    limit = _RECORDS_A_FILE * _max_record_mib
    with _open(path) as file:
        data = file.read(limit * MIB + 1)
    if len(data) > limit * MIB:
        raise too_large(str(path), f"a {what}", limit)
    text = decoded(data.removeprefix(b"\xef\xbb\xbf"), str(path))
    return parse_json(text, str(path), f"give a valid {what}")


# --- csv -------------------------------------------------------------------------------------


class Cells(dict[str, str]):
    """A row of a csv by column; a cell that is no number where one belongs raises."""

    __slots__ = ("line", "path")

    def __init__(self, cells: Iterator[tuple[str, str]], path: Path, line: int) -> None:
        dict.__init__(self, cells)
        self.path, self.line = path, line

    def whole(self, column: str, least: int = 0) -> int:
        """The integer in a cell, at least `least`."""
        try:
            value = int(self[column])
        except ValueError as error:
            raise self.wrong(column, "an integer") from error
        if value < least:
            raise self.wrong(column, f"at least {least}")
        return value

    def real(self, column: str) -> float:
        """The number in a cell; an empty one is NaN."""
        try:
            return float(self[column] or "nan")
        except ValueError as error:
            raise self.wrong(column, "a number") from error

    def finite(self, column: str) -> float:
        """The finite number in a cell."""
        value = self.real(column)
        if not math.isfinite(value):
            raise self.wrong(column, "a finite number")
        return value

    def flag(self, column: str) -> bool:
        """Whether a cell is 1, where it may be 0 or 1."""
        if self[column] not in ("0", "1"):
            raise self.wrong(column, "0 or 1")
        return self[column] == "1"

    def wrong(self, column: str, expected: str) -> RelneuronError:
        """The error of a cell that is not as expected."""
        cell = self[column] if len(self[column]) <= 40 else f"{self[column][:40]}..."
        return RelneuronError(
            f"{self.path}, line {self.line}: {column} is {cell!r}, not {expected}", _AGAIN
        )


_AGAIN = "make the file again with the stage that writes it"


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[Cells]:
    """The rows of a csv file that must have `columns`, and as many cells a row as columns."""
    limit = _max_record_mib * MIB
    csv.field_size_limit(limit)
    with _open(path, "r", newline="", encoding="utf-8-sig") as file:
        # Whether the record that is read has an apostrophe: `cell_text` changes no other one, and
        # to look at every cell of a large file takes most of the time.
        has_quote = False

        def lines() -> Iterator[str]:
            nonlocal has_quote
            while line := file.readline(limit + 1):
                has_quote = has_quote or "'" in line
                if len(line) > limit:
                    where = f"{path}, line {reader.line_num + 1}"
                    raise too_large(where, "a line", _max_record_mib)
                yield line

        reader = csv.reader(lines())
        try:
            header = next(reader, [])
            _check_header(path, header, columns)
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise RelneuronError(
                        f"{path}, line {line}: {len(cells)} cells for {len(header)} columns", _AGAIN
                    )
                if cells:
                    texts = map(cell_text, cells) if has_quote else cells
                    yield Cells(zip(header, texts, strict=True), path, line)
                line, has_quote = reader.line_num + 1, False
        except UnicodeDecodeError:
            for _ in read_lines(path):  # which says in which line
                pass
            raise
        except csv.Error as error:
            raise RelneuronError(
                f"{path}, line {reader.line_num + 1}: {one_line(error)}", _AGAIN
            ) from error


def _check_header(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in header]
    if missing:
        text = ",".join(header)
        is_other = all(column in text for column in columns) and ";" in text
        raise RelneuronError(
            f"{path} lacks the column {', '.join(missing)}"
            + (": its columns are separated by semicolons" if is_other else ""),
            "save it with commas between the columns" if is_other else _AGAIN,
        )
    if len(set(header)) < len(header):
        raise RelneuronError(f"{path} names a column twice", _AGAIN)


# --- tensors ---------------------------------------------------------------------------------


class Tensors:
    """The tensors of an open safetensors file, by name, each checked before it is loaded."""

    def __init__(self, file: Any, path: Path, what: str | None, fix: str) -> None:
        self._file, self._path, self._fix = file, path, fix
        self._is = f"{path} is no {what}" if what else f"{path} is damaged"
        self.names: tuple[str, ...] = tuple(file.keys())

    def about(self, key: str) -> Any:
        """The JSON value that the file's metadata have under `key`; None if there is none."""
        text = (self._file.metadata() or {}).get(key)
        return None if text is None else parse_json(text, f"{self._is}: {key}", self._fix)

    def names_of(self, key: str) -> list[str]:
        """The list of distinct names that the metadata have under `key`; [] if there is none."""
        found = self.about(key)
        found = [] if found is None else found
        is_list = isinstance(found, list) and all(isinstance(name, str) for name in found)
        if not is_list or len(set(found)) < len(found):
            raise self.wrong(f"{key} are no names, each of its own")
        return list(found)

    def n_dims(self, name: str) -> int:
        """How many dimensions a tensor of the file has."""
        return len(self._file.get_slice(name).get_shape())

    def shape(self, name: str, shape: Sequence[int | None], *dtypes: str) -> tuple[int, ...]:
        """A tensor's shape: this one (None: any length), of one of the `dtypes` (default: F32)."""
        if name not in self.names:
            raise self.wrong(f"it has no {name}")
        about = self._file.get_slice(name)
        found, kind = tuple(about.get_shape()), about.get_dtype()
        fits = len(found) == len(shape) and all(
            size in (None, n) for size, n in zip(shape, found, strict=True)
        )
        if kind not in (dtypes or ("F32",)) or not fits:
            wanted = [("any" if n is None else n) for n in shape]
            raise self.wrong(
                f"{name} is {kind}{list(found)}, not {' or '.join(dtypes or ('F32',))}{wanted}"
            )
        return found

    def get(
        self,
        name: str,
        shape: Sequence[int | None],
        *dtypes: str,
        rows: slice | tuple[slice, ...] | None = None,
    ) -> Any:
        """A tensor as `shape` checks it, or some of its `rows` (and columns)."""
        self.shape(name, shape, *dtypes)
        return self._file.get_tensor(name) if rows is None else self._file.get_slice(name)[rows]

    def wrong(self, why: str) -> RelneuronError:
        """The error of a file that is not as expected."""
        return RelneuronError(f"{self._is}: {why}", self._fix)


@contextmanager
def open_tensors(
    path: Path, made_by: str, framework: str = "numpy", what: str | None = None
) -> Iterator[Tensors]:
    """The tensors of a safetensors file that `relneuron MADE_BY` writes.

    What was read of a file stays in this process's memory as long as the file is open: open it
    again for each block of a large one.
    """
    from safetensors import SafetensorError, safe_open

    again = "" if "--force" in made_by else " --force"
    fix = f"make it again with: relneuron {made_by}{again}"
    try:
        file = safe_open(require(path, made_by), framework)
    except (SafetensorError, ValueError) as error:
        wrong = f"is no {what}" if what else "is damaged"
        raise RelneuronError(f"{path} {wrong}: {one_line(error)}", fix) from error
    with file as opened:
        yield Tensors(opened, path, what, fix)


RESPONSE_ROWS = "relneuron.responses"  # the key of what responses.safetensors says of its rows


def check_rows(path: Path, key: str, ids: Sequence[str], made_by: str) -> None:
    """Raise if a safetensors file says under `key` that its rows are of others than `ids`."""
    with open_tensors(path, made_by) as file:
        about = file.about(key)
        if about is None:
            return
        if not isinstance(about, dict):
            raise file.wrong(f"{key} is no object")
        if about.get("ids", list(ids)) != list(ids):
            raise RelneuronError(
                f"the rows of {path} are of other prompts than those beside it",
                f"make it again with: relneuron {made_by}",
            )


# --- expansions ------------------------------------------------------------------------------


def check_zip(path: Path) -> None:
    """Refuse a zip file whose parts unpack to more than the file and a record's limit.

    torch writes its parts as they are; who packs them can have a small file fill the memory.
    """
    with _open(path) as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if not (is_zip or zipfile.is_zipfile(path)):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > path.stat().st_size + _max_record_mib * MIB:
        raise too_large(str(path), f"{unpacked:,} bytes, an expansion", _max_record_mib)
