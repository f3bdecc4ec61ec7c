"""The blocks that journals hold: where each stands in which file, and its value when asked for.

journal.py notes them, parts.py puts those of several machines together. Memory holds a number a
block and a number a piece, however large the values are.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import weakref
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.manifest import differences
from relneuron.artifact.reading import parse_json

BUDGET = "budget"  # the key of what memory had room for (model/batches.Budget), which is no block
_FILE_BITS = 48  # of a place: the offset in a file, below the file's number


def chained(last: str, text: bytes) -> str:
    """The digest of a line, with that of the line before it."""
    return hashlib.sha256(last.encode() + text).hexdigest()


class Lines:
    """The lines of a journal's file that are as they were written, from the first one on.

    A line is a SHA-256, of its text and of the digest before it, and the text. `end` is where the
    last one that was read ends, `last` its digest. The file stays open, so that it is read to its
    end also where another process has removed or replaced it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.end, self.last, self.n_lines = path, 0, "", 0
        # (offset, bytes) of pieces, by their numbers, whose block was not read yet; whose they are.
        self.waiting: dict[int, tuple[int, int]] = {}
        self.waiting_of = ""
        self._file: Any = None
        if path.exists():
            self._file = path.open("rb")
            self._close = weakref.finalize(self, self._file.close)

    def close(self) -> None:
        """No line can be read any more; on Windows the file can then be replaced."""
        if self._file is not None:
            self._close()

    def text(self, offset: int) -> bytes:
        """The text of the line that begins at `offset`."""
        self._file.seek(offset)
        line: bytes = self._file.readline()
        return line.rstrip(b"\n").partition(b" ")[2]

    def new(self, head: Json) -> Iterator[tuple[int, int, Json]]:
        """(offset, bytes, value) of each whole line behind the head that was not read before.

        Of a file with another head (`journal.head_of`) there is none. What is not as it was written
        ends them, with a warning.
        """
        if self._file is None:
            return
        self._file.seek(self.end)
        for line in iter(self._file.readline, b""):
            if not line.endswith(b"\n"):  # cut by a kill
                break
            digest, _, text = line[:-1].partition(b" ")
            if chained(self.last, text) != digest.decode(errors="replace"):
                n_bad = 1 + sum(rest.endswith(b"\n") for rest in iter(self._file.readline, b""))
                n_all = self.n_lines + n_bad
                self._warn(f"{n_bad} of {n_all} lines are not as they were written")
                return
            value = parse_json(text.decode(), f"{self.path}, line {self.n_lines + 1}", "delete it")
            if self.n_lines == 0 and value != head:
                known = value if isinstance(value, dict) else {}
                self._warn(f"it is of other inputs ({'; '.join(differences(known, head))})")
                return
            if self.n_lines and not (isinstance(value, dict) and {"key", "value"} <= value.keys()):
                self._warn("a line is no block")
                return
            offset, self.end, self.last = self.end, self.end + len(line), digest.decode()
            self.n_lines += 1
            if offset:
                yield offset, len(line), value
                self._file.seek(self.end)  # the caller may have read elsewhere
        if not self.n_lines and os.fstat(self._file.fileno()).st_size:
            self._warn("it is cut short")

    def _warn(self, why: str) -> None:
        what = f"{self.path}: {why}; what it noted there is done again"
        warnings.warn(what, stacklevel=6)


class Blocks(Mapping[str, Any]):
    """The values of blocks by their keys, each read from its file when it is asked for.

    A block may have pieces, the lines before its own: values by their numbers 0, 1, ... Pieces
    without their block do not count. Later lines of a file replace earlier ones.
    """

    def __init__(self) -> None:
        self.stale_bytes = 0  # of lines that were replaced, or whose block is not there
        # Called before a value is read: has what was noted be in the file.
        self.before_read: Callable[[], None] = lambda: None
        self._files: dict[Path, int] = {}
        self._lines: list[Lines] = []
        self._places: dict[str, int] = {}
        self._pieces: dict[str, array[int]] = {}

    def __getitem__(self, key: str) -> Any:
        return self._value(self._places[key], key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def piece(self, key: str, number: int) -> Any:
        """Piece `number` of a block."""
        return self._value(self._pieces[key][number], key)

    def n_pieces(self, key: str) -> int:
        return len(self._pieces.get(key, ()))

    def texts(self, key: str) -> Iterator[bytes]:
        """The texts of a block's lines: those of its pieces, then its own."""
        for place in (*self._pieces.get(key, ()), self._places[key]):
            yield self._text(place)

    def _text(self, place: int) -> bytes:
        self.before_read()
        return self._lines[place >> _FILE_BITS].text(place & ((1 << _FILE_BITS) - 1))

    def _value(self, place: int, key: str) -> Any:
        path, text = self._lines[place >> _FILE_BITS].path, self._text(place)
        fix = "run the same command again"
        value = parse_json(text.decode(errors="replace"), str(path), fix)
        if not isinstance(value, dict) or value.get("key") != key:
            raise RelneuronError(f"{path} was changed while it was read", fix)
        return value["value"]

    def file(self, path: Path) -> Lines:
        """The file at `path`, opened once."""
        if path not in self._files:
            self._files[path] = len(self._lines)
            self._lines.append(Lines(path))
        return self._lines[self._files[path]]

    def read(self, path: Path, head: Json) -> Lines:
        """Add what is new in a file; of a block that another file has, too, that one's stays."""
        lines = self.file(path)
        for offset, n_bytes, value in lines.new(head):
            key, number = str(value["key"]), value.get("piece")
            if key == BUDGET:
                self.add(path, key, offset)
                continue
            if lines.waiting_of != key:
                self.stale_bytes += sum(n for _, n in lines.waiting.values())
                lines.waiting, lines.waiting_of = {}, key
            if number is not None:
                self.stale_bytes += lines.waiting.get(number, (0, 0))[1]
                lines.waiting[number] = (offset, n_bytes)
                continue
            pieces = [lines.waiting[n][0] for n in sorted(lines.waiting)]
            if not self.add(path, key, offset, pieces):
                self.stale_bytes += n_bytes + sum(n for _, n in lines.waiting.values())
            lines.waiting = {}
        return lines

    def add(self, path: Path, key: str, offset: int, pieces: Collection[int] = ()) -> bool:
        """Note where the lines of a block begin in a file; not if another file has the block."""
        first, known = self._files[path] << _FILE_BITS, self._places.get(key)
        if known is not None:
            if known >> _FILE_BITS != first >> _FILE_BITS:
                return False
            for text in self.texts(key):
                self.stale_bytes += len(text) + 66  # with its digest and line end
            self.forget([key])
        self._places[key] = first | offset
        if pieces:
            self._pieces[key] = array("q", [first | one for one in pieces])
        return True

    def forget(self, keys: Collection[str]) -> None:
        for key in keys:
            del self._places[key]
            self._pieces.pop(key, None)

    def close(self) -> None:
        for lines in self._lines:
            lines.close()
