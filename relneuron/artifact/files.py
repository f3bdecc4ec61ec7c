"""How a file of a study is written: whole or not at all, with a digest, as csv, JSON or tensors.

Every stage calls this module to write; `reading` is the other half.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class RelneuronError(Exception):
    """An error a user can mend: one line of cause, one line of fix, and the exit code."""

    def __init__(self, cause: str, fix: str, exit_code: int = 1) -> None:
        super().__init__(cause)
        self.cause, self.fix, self.exit_code = cause, fix, exit_code


# --- bytes -----------------------------------------------------------------------------------


def atomic_write(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part.

    Large data may come in pieces, which are not put together in memory.

    Temporary file in the same folder, fsync, rename, fsync of the folder; on any error the
    temporary file is removed and the old file stays. On Windows, where a file that somebody reads
    cannot be replaced, it waits a second for them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in [data] if isinstance(data, bytes) else _joined(data):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        _replace(Path(name), path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
    fsync_folder(path.parent)


def _joined(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes with small pieces put together."""
    small = bytearray()
    for piece in pieces:
        if len(small) + len(piece) > _JOINED:
            yield bytes(small)
            small.clear()
        if len(piece) > _JOINED:
            yield piece
        else:
            small += piece
    yield bytes(small)


_JOINED = 1 << 20  # bytes
_ROWS = 1000  # of a table that are text at a time

# Seconds between tries to replace a file on Windows: a scanner of viruses reads every new file.
_WAITS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.3)


def _replace(temporary: Path, path: Path) -> None:
    for wait_s in _WAITS_S if os.name == "nt" else ():
        try:
            temporary.replace(path)
            return
        except PermissionError:
            time.sleep(wait_s)
    temporary.replace(path)


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut, where a folder can be opened."""
    if os.name == "nt":  # its file system keeps a journal of renames
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Digests of files that were read to their end: by what the file system says of them.
_HASHED: dict[tuple[int, ...], str] = {}
# A file that was written so lately may be written again with the same time; no clock is coarser.
_SETTLED_NS = 2_000_000_000


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes (about 1 GB a second).

    A process reads a file once, as long as its inode, size and times stay as they are.
    """
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        times = about.st_mtime_ns, about.st_ctime_ns
        key = (about.st_dev, about.st_ino, about.st_size, *times)
        if key in _HASHED:
            return _HASHED[key]
        is_settled = max(times) < time.time_ns() - _SETTLED_NS
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if is_settled:
        _HASHED[key] = digest
    return digest


def hashing_threads() -> ThreadPoolExecutor:
    """Threads that hash side by side: hashlib lets others run meanwhile."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def check_place(path: Path) -> None:
    """Raise if nothing can be written at `path`: what should be its folder is a file, or closed."""
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise RelneuronError(
            f"{folder} is a file, {path} cannot be written in it", "choose another output", 2
        )
    if not path.exists() and not os.access(folder, os.W_OK | os.X_OK):
        raise RelneuronError(
            f"{folder} cannot be written to", "choose a folder you have the right to write to", 2
        )


def real_path(path: Path | str) -> Path:
    """The path from the root on, without links; a loop of links, too, has one."""
    return Path(os.path.realpath(path))


def check_folder(path: Path) -> None:
    """Raise if a file is where a folder is to be."""
    if path.is_file():
        raise RelneuronError(f"{path} is a file", "give a folder", 2)


def refuse_overwrite(path: Path, force: bool) -> None:
    """Raise if `path` is a folder or under a file, or exists and `--force` was not given."""
    check_place(path)
    if path.is_dir():
        raise RelneuronError(f"{path} is a folder", "name a file in it", 2)
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced by a file
        raise RelneuronError(f"{path} is no file", "choose another output", 2)
    if path.exists() and not force:
        raise RelneuronError(f"{path} exists", "choose another output or add --force", 2)


def require(path: Path, made_by: str) -> Path:
    """Return `path`, or say which command makes it: again, where a study is that has lost it."""
    if path.is_dir():
        raise RelneuronError(f"{path} is a folder, not a file", "move it, or name a file", 2)
    if not path.is_file():
        is_lost = (path.parent / "manifest.json").is_file() and made_by.partition(" ")[0] != "run"
        again = " --force" if is_lost and "--force" not in made_by else ""
        raise RelneuronError(
            f"{path} does not exist", f"make it with: relneuron {made_by}{again}", 2
        )
    return path


# --- tables -----------------------------------------------------------------------------------


def json_bytes(value: object) -> bytes:
    """`value` as indented UTF-8 JSON with a closing newline, keys in the order given."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def csv_bytes(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A header and `rows` as UTF-8 csv with Unix line ends; no cell of text acts as a formula.

    A spreadsheet runs text that begins like a formula. An apostrophe before it, as OWASP advises
    (CSV injection), makes it text; `read_csv` takes it off. Numbers are as they are.
    """
    return b"".join(csv_pieces(columns, rows))


def csv_pieces(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[bytes]:
    """The bytes of `csv_bytes`, of some rows at a time, for `atomic_write`."""
    # The writer only quotes a carriage return inside of a cell if it also ends the lines with one.
    lines = _Lines()
    writer = csv.writer(lines, lineterminator="\r\n")
    left = chain([columns], rows)
    while some := [
        # Numbers, and most texts, are as they are: most of the time goes by here.
        [v if v.__class__ is not str or not v or v[:1].isalnum() else _as_cell(v) for v in row]
        for row in islice(left, _ROWS)
    ]:
        writer.writerows(some)
        yield "".join([f"{line[:-2]}\n" for line in lines.written]).encode()
        lines.written.clear()


# With any apostrophes before it, so that a text that has its own comes back whole.
_FORMULA = re.compile(r"'*(?:\s*[=+\-@＝＋－＠]|[\t\r])")


def _is_formula(text: str) -> bool:
    """Whether a spreadsheet runs `text` once its apostrophes are off: it begins so, no number."""
    if text[:1].isalnum() or not _FORMULA.match(text):  # most text, soon
        return False
    try:
        float(text)
    except ValueError:
        return True
    return text[0] not in "+-"


def _as_cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and _is_formula(value) else value


def cell_text(cell: str) -> str:
    """The text that `csv_bytes` wrote as `cell`."""
    return cell[1:] if cell[:1] == "'" and _is_formula(cell[1:]) else cell


class _Lines:
    """Takes a csv writer's lines: by a list's own method, as there are many."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.write = self.written.append


def fold(text: str) -> str:
    """`text` as names are compared: outer space off, case folded, composed (NFC).

    So "Łódź" is "łódź" however its marks are encoded, and "Straße" is "STRASSE" (Unicode's
    canonical caseless matching).
    """
    return composed(unicodedata.normalize("NFD", text.strip()).casefold())


def composed(text: str) -> str:
    """`text` in NFC: each letter one with its marks, as far as there is such a letter."""
    return unicodedata.normalize("NFC", text)


# --- files that belong together -----------------------------------------------------------------
#
# What is noted of them while a stage writes them: `.unfinished` beside them. Stages that keep no
# journal write through `writing`; `refuse_output` lets the same command go on where it was killed,
# and the readers of manifest.py refuse what was half written.

NOTE = ".unfinished"


def unfinished(folder: Path) -> dict[str, str]:
    """The files in `folder` that a killed or failed stage did not finish, each with that stage."""
    try:
        found = json.loads((folder / NOTE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RelneuronError(f"{folder / NOTE} is damaged", "delete it, and make the files again")
    return found


@contextmanager
def writing(stage: str, folder: Path, files: Iterable[Path]) -> Iterator[None]:
    """Note in `folder` that `stage` writes `files` there or below, until the block ends well.

    The folder is held (manifest.locked). What another run left unfinished there stays noted.
    """
    names = [file.relative_to(folder).as_posix() for file in files]
    _save(folder, unfinished(folder) | dict.fromkeys(names, stage))
    yield
    _save(folder, {name: by for name, by in unfinished(folder).items() if name not in names})


def _save(folder: Path, noted: dict[str, str]) -> None:
    if noted:
        atomic_write(folder / NOTE, json_bytes(noted))
    else:
        (folder / NOTE).unlink(missing_ok=True)


def refuse_output(path: Path, stage: str, force: bool, folder: Path | None = None) -> None:
    """`refuse_overwrite`, but what `stage` did not finish is written again without --force.

    `folder` has the note; default: the one of `path`.
    """
    place = folder or path.parent
    is_left = unfinished(place).get(path.relative_to(place).as_posix()) == stage
    refuse_overwrite(path, force or is_left)


def refuse_unfinished(path: Path) -> None:
    """Raise if `path` is one of several files that were not all written."""
    stage = unfinished(path.parent).get(path.name)
    if stage is not None:
        raise RelneuronError(
            f"{path} is of a run of relneuron {stage} that was not finished",
            f"run that relneuron {stage} again",
        )
