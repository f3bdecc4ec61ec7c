"""What a long stage has finished so far, so that a killed run goes on; and its progress bar.

Every stage that asks a model keeps a `Journal`; manifest.py says what is finished altogether.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from relneuron.artifact.files import Json, atomic_write, sha256
from relneuron.artifact.manifest import Manifest, differences, versions
from relneuron.artifact.reading import parse_json


class Journal:
    """What a long stage has finished so far: one line per block, appended and synced.

    A line is a SHA-256 and the JSON that it is of, with all lines before it. A line cut short by a
    kill is ignored, so the block is simply done again; so is all from the first line on that is
    not as it was written, with a warning, and all of a journal of other inputs or versions. What
    the lines stand for besides is for the stage to check, see `redo`. Used as a context manager,
    it also saves what is finished when the stage is interrupted. `before_commit` runs first: it
    makes safe what the lines stand for.
    """

    SAVE_EVERY_S = 10.0

    def __init__(
        self, path: Path, inputs: Json, before_commit: Callable[[], None] = lambda: None
    ) -> None:
        self.path, self.before_commit = path, before_commit
        self._saved = time.monotonic()
        self._head = json.loads(json.dumps({"versions": versions(), "inputs": inputs}))
        self._last = ""  # the digest of the last line
        self._pending: list[str] = []
        data = path.read_bytes() if path.exists() else b""
        self.done, n_bytes = self._read(data)
        if n_bytes:
            # A cut last line must not join the next one.
            os.truncate(path, n_bytes)
        else:
            self._write()

    def _read(self, data: bytes) -> tuple[dict[str, Any], int]:
        """The blocks that are as they were written, and where in the file they end."""
        done: dict[str, Any] = {}
        lines, end, last = data.split(b"\n")[:-1], 0, ""
        for number, line in enumerate(lines):
            digest, _, text = line.partition(b" ")
            if _chained(last, text) != digest.decode(errors="replace"):
                n_bad = len(lines) - number
                self._warn(f"{n_bad} of {len(lines)} lines are not as they were written")
                break
            last = digest.decode()
            value = parse_json(text.decode(), f"{self.path}, line {number + 1}", "delete it")
            if number == 0 and value != self._head:
                known = value if isinstance(value, dict) else {}
                changed = "; ".join(differences(known, self._head))
                self._warn(f"it is of other inputs ({changed})")
                break
            if number and not (isinstance(value, dict) and {"key", "value"} <= value.keys()):
                self._warn("a line is no block")
                break
            if number:
                done[str(value["key"])] = value["value"]
            end, self._last = end + len(line) + 1, last
        if data and not lines:
            self._warn("it is cut short")
        return done, end

    def _warn(self, why: str) -> None:
        warnings.warn(f"{self.path}: {why}; what it noted there is done again", stacklevel=4)

    def _write(self) -> None:
        """The whole file: the head and all that is done."""
        self._last = ""
        self._pending.clear()
        blocks = [{"key": key, "value": value} for key, value in self.done.items()]
        atomic_write(self.path, "".join(map(self._line, [self._head, *blocks])).encode())

    def _line(self, value: Json) -> str:
        text = json.dumps(value, ensure_ascii=False)
        self._last = _chained(self._last, text.encode())
        return f"{self._last} {text}\n"

    def redo(self, keys: Collection[str], why: str) -> None:
        """Forget finished blocks whose results are not as they were noted, and say so."""
        if keys:
            what = f"{len(keys)} of {len(self.done)} blocks are done again"
            warnings.warn(f"{self.path}: {why}: {what}", stacklevel=2)
            self.done = {key: value for key, value in self.done.items() if key not in keys}
            self._write()

    def add(self, key: str, value: object) -> None:
        """Note a finished block; it is safe after the next `commit`, at most 10 s later."""
        block = json.loads(json.dumps({"key": key, "value": value}))
        self._pending.append(self._line(block))
        self.done[key] = block["value"]
        if time.monotonic() - self._saved > self.SAVE_EVERY_S:
            self.commit()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.commit()

    def commit(self) -> None:
        """Append what was added and wait until it is on the disk."""
        self.before_commit()
        with self.path.open("ab") as file:
            file.write("".join(self._pending).encode())
            file.flush()
            os.fsync(file.fileno())
        self._pending.clear()
        self._saved = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _chained(last: str, text: bytes) -> str:
    return hashlib.sha256(last.encode() + text).hexdigest()


def progress_bar(
    total: int | None, stage: str, unit: str, quiet: bool, *, scale: bool = False, done: int = 0
) -> Any:
    """A stage's one progress bar: rate and time left, off when not a terminal or `quiet`.

    In a notebook it is a widget. A `total` of None is not known yet; with `scale` numbers are shown
    as 12.3k; `done` of them were done before.
    """
    from tqdm.auto import tqdm

    # A notebook's output is no terminal, and shows widgets all the same.
    is_widget = any(one.__module__ == "tqdm.notebook" for one in tqdm.__mro__)
    off = True if quiet else False if is_widget else None
    return tqdm(total=total, desc=stage, unit=unit, unit_scale=scale, initial=done, disable=off)


def is_unfinished(output: Path, stage: str) -> bool:
    """Whether an output was left by a run of `stage` that was killed before it was done.

    Its journal is still there, and no manifest knows the file as it is. The journal of a run that
    was killed behind its manifest is removed.
    """
    journal = output.parent / f"{stage}.journal"
    if not journal.exists() or not output.exists():
        return False
    known = Manifest(output.parent).data
    if known["files"].get(output.name, {}).get("sha256") != sha256(output):
        return True
    with suppress(ValueError, KeyError):
        head = json.loads(journal.read_bytes().partition(b"\n")[0].partition(b" ")[2])
        if head["inputs"] == known["stages"][stage]["inputs"]:
            journal.unlink()
    return False
