"""What a long stage has finished so far, so that a killed run goes on; and its progress bar.

Every stage that asks a model keeps a `Journal`; manifest.py says what is finished altogether.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any, Protocol

from relneuron.artifact.files import Json, RelneuronError, atomic_write, sha256
from relneuron.artifact.manifest import Manifest, differences, versions
from relneuron.artifact.reading import parse_json


def n_started() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this process is the first of those that torchrun started: the one that speaks."""
    return n_started() == 1 or os.environ["RANK"] == "0"


class Processes(Protocol):
    """Those that share the blocks of a stage (model/ranks.Ranks); this one is number `rank`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def take(self) -> int:
        """The next number, from 0 on, that none of them has taken."""

    def wait(self) -> None:
        """Until all of them are here."""


class PartDone(Exception):
    """A stage has done the part that it was asked for, and has no results."""

    def __init__(self, journal: Path, shard: tuple[int, int]) -> None:
        part = "{}/{}".format(*shard)
        super().__init__(f"part {part} is done -> {journal}; add the parts with: relneuron merge")


def has_rows(value: Any) -> bool:
    """Whether a block's value notes rows of a file."""
    return isinstance(value, dict) and bool(value.get("digest"))


class Journal:
    """What a long stage has finished so far: one line per block, appended and synced.

    A line is a SHA-256 and the JSON that it is of, with all lines before it. A line cut short by a
    kill is ignored, so the block is simply done again; so is all from the first line on that is
    not as it was written, with a warning, and all of a journal of other inputs or versions. What
    the lines stand for besides is for the stage to check, see `redo`. Used as a context manager,
    it also saves what is finished when the stage is interrupted. `before_commit` runs first: it
    makes safe what the lines stand for.

    Several processes, `ranks`, each note the blocks of their own: the first one in `path`, number r
    in `path`.r. The first one opens it before the others do, with all that any of them left. Of a
    `shard` (i, n) only every n-th block is done, from the i-th; `together` then raises PartDone.
    """

    SAVE_EVERY_S = 10.0

    def __init__(
        self,
        path: Path,
        inputs: Json,
        before_commit: Callable[[], None] = lambda: None,
        ranks: Processes | None = None,
        shard: tuple[int, int] = (1, 1),
    ) -> None:
        self.before_commit, self._ranks, self._shard = before_commit, ranks, shard
        self._whole = path
        number = ranks.rank if ranks is not None else 0
        self.path = path.with_name(f"{path.name}.{number}") if number else path
        self._saved = time.monotonic()
        self._head = head_of(inputs)
        self._last = ""  # the digest of the last line
        self._pending: list[str] = []
        # The keys asked for, those of them that were not done, and of these the one that is taken.
        self._n_keys = 0
        self._asked: list[str] = []
        self._taken = -1
        self.done: dict[str, Any] = {}
        if self.is_first:
            self._open()
        else:
            self._follow()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes the results."""
        return self.path == self._whole

    @property
    def is_shared(self) -> bool:
        return self._ranks is not None and self._ranks.size > 1

    def _open(self) -> None:
        """Take over what each process of a run that was killed has noted."""
        parts = parts_of(self._whole)
        self.done, n_bytes, self._last = read_blocks(self.path, self._head)
        for part in parts:
            self.done = read_blocks(part, self._head)[0] | self.done
        if parts or not n_bytes:
            self._write(self.done)
            for part in parts:
                part.unlink()
        else:
            # A cut last line must not join the next one.
            os.truncate(self.path, n_bytes)

    def _follow(self) -> None:
        """Begin with what the first process has found."""
        if not self._whole.exists():
            raise RelneuronError(
                f"{self._whole.parent} is not the folder that the first process writes to",
                "give a folder that all processes share",
            )
        self.done = read_blocks(self._whole, self._head)[0]
        self._write({})

    def _write(self, done: dict[str, Any]) -> None:
        """The whole file: the head and what is done."""
        self._last = ""
        self._pending.clear()
        blocks = [{"key": key, "value": value} for key, value in done.items()]
        atomic_write(self.path, "".join(map(self._line, [self._head, *blocks])).encode())

    def _line(self, value: Json) -> str:
        text = json.dumps(value, ensure_ascii=False)
        self._last = _chained(self._last, text.encode())
        return f"{self._last} {text}\n"

    def check(self, digest: Callable[[Sequence[int]], str | None], what: str) -> None:
        """Have the finished blocks done again whose rows of a file are not as they were noted.

        A block's value notes its `rows` and their `digest`. The first process does it before the
        others begin.
        """
        if self.is_first:
            noted = {key: value for key, value in self.done.items() if has_rows(value)}
            lost = [key for key, one in noted.items() if one["digest"] != digest(one["rows"])]
            self.redo(lost, f"rows of {what} are not as they were written")

    def redo(self, keys: Collection[str], why: str) -> None:
        """Forget finished blocks whose results are not as they were noted, and say so."""
        if keys:
            what = f"{len(keys)} of {len(self.done)} blocks are done again"
            warnings.warn(f"{self.path}: {why}: {what}", stacklevel=3)
            self.done = {key: value for key, value in self.done.items() if key not in keys}
            self._write(self.done)

    def takes(self, key: str) -> bool:
        """Whether this process does a block now: it is not done, and no other one has taken it.

        All processes ask for the same blocks in the same order; each goes on to the next one that
        is free, so that a slow one does not hold the others.
        """
        self._n_keys += 1
        number, of = self._shard
        if key in self.done or (self._n_keys - number) % of:
            return False
        if self._ranks is None or self._ranks.size == 1:
            return True
        self._asked.append(key)
        number = len(self._asked) - 1
        if self._taken < number:
            self._taken = self._ranks.take()
        return self._taken == number

    def add(self, key: str, value: object) -> None:
        """Note a finished block; it is safe after the next `commit`, at most 10 s later."""
        block = json.loads(json.dumps({"key": key, "value": value}))
        self._pending.append(self._line(block))
        self.done[key] = block["value"]
        if time.monotonic() - self._saved > self.SAVE_EVERY_S:
            self.commit()

    def together(self) -> None:
        """Have in `done` the blocks of all processes, each of which has done its own."""
        if self._ranks is not None and self._ranks.size > 1:
            self._read_others(self._ranks)
        if self._shard[1] > 1:
            self.commit()
            raise PartDone(self._whole, self._shard)

    def _read_others(self, ranks: Processes) -> None:
        self.commit()
        ranks.wait()
        for path in {self._whole, *parts_of(self._whole)} - {self.path}:
            self.done |= read_blocks(path, self._head)[0]
        ranks.wait()  # the first one may then remove them
        lost = [key for key in self._asked if key not in self.done]
        if lost:
            raise RelneuronError(
                f"{self._whole.parent}: {len(lost)} blocks that other processes have done are lost",
                "give a folder that all processes share, and run the same command again",
            )

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Of several processes the first one may have removed the files of all by now.
        has_more = bool(self._pending) or not self.is_shared
        if has_more and (kind is None or issubclass(kind, KeyboardInterrupt)):
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
        for path in (*parts_of(self._whole), self._whole):
            path.unlink(missing_ok=True)


def head_of(inputs: Json) -> Json:
    """The first line of a journal: what its blocks depend on."""
    found: Json = json.loads(json.dumps({"versions": versions(), "inputs": inputs}))
    return found


def parts_of(path: Path) -> list[Path]:
    """The journals of the other processes beside that of the first one."""
    found = path.parent.glob(f"{escape(path.name)}.*")
    return sorted(part for part in found if part.suffix[1:].isdecimal())


def read_blocks(path: Path, head: Json) -> tuple[dict[str, Any], int, str]:
    """The blocks of a journal that are as they were written, where they end, the last digest.

    Of one with another `head` (`head_of`) none are.
    """
    data = path.read_bytes() if path.exists() else b""
    done: dict[str, Any] = {}
    lines, end, last = data.split(b"\n")[:-1], 0, ""
    for number, line in enumerate(lines):
        digest, _, text = line.partition(b" ")
        if _chained(last, text) != digest.decode(errors="replace"):
            n_bad = len(lines) - number
            _warn(path, f"{n_bad} of {len(lines)} lines are not as they were written")
            break
        value = parse_json(text.decode(), f"{path}, line {number + 1}", "delete it")
        if number == 0 and value != head:
            known = value if isinstance(value, dict) else {}
            changed = "; ".join(differences(known, head))
            _warn(path, f"it is of other inputs ({changed})")
            break
        if number and not (isinstance(value, dict) and {"key", "value"} <= value.keys()):
            _warn(path, "a line is no block")
            break
        if number:
            done[str(value["key"])] = value["value"]
        end, last = end + len(line) + 1, digest.decode()
    if data and not lines:
        _warn(path, "it is cut short")
    return done, end, last


def _warn(path: Path, why: str) -> None:
    warnings.warn(f"{path}: {why}; what it noted there is done again", stacklevel=5)


def _chained(last: str, text: bytes) -> str:
    return hashlib.sha256(last.encode() + text).hexdigest()


def progress_bar(
    total: int | None, stage: str, unit: str, quiet: bool, *, scale: bool = False, done: int = 0
) -> Any:
    """A stage's one progress bar: rate and time left, off when not a terminal or `quiet`.

    In a notebook it is a widget; of several processes the first one shows it. A `total` of None is
    not known yet; with `scale` numbers are shown as 12.3k; `done` of them were done before.
    """
    from tqdm.auto import tqdm

    # A notebook's output is no terminal, and shows widgets all the same.
    is_widget = any(one.__module__ == "tqdm.notebook" for one in tqdm.__mro__)
    off = True if quiet or not is_first() else False if is_widget else None
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
    with suppress(ValueError, KeyError, FileNotFoundError):  # other processes look, too
        head = json.loads(journal.read_bytes().partition(b"\n")[0].partition(b" ")[2])
        if head["inputs"] == known["stages"][stage]["inputs"]:
            journal.unlink()
    return False
