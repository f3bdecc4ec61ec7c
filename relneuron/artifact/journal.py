"""What a long stage has finished so far, so that a killed run goes on; and its progress bar.

Every stage that asks a model keeps a `Journal`; manifest.py says what is finished altogether.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any, Protocol

from relneuron.artifact.blocks import BUDGET, Blocks, chained
from relneuron.artifact.files import Json, RelneuronError, atomic_write, sha256
from relneuron.artifact.manifest import Manifest, versions


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
    """What a long stage has finished so far: one line per block, appended, and synced now and then.

    A line is a SHA-256 and the JSON that it is of, with all lines before it. A line cut short by a
    kill is ignored, so the block is simply done again; so is all from the first line on that is
    not as it was written, with a warning, and all of a journal of other inputs or versions. What
    the lines stand for besides is for the stage to check, see `redo`. Used as a context manager,
    it also saves what is finished when the stage is interrupted. `before_commit` runs first: it
    makes safe what the lines stand for.

    `done` has the values of blocks by their keys. They stay on the disk: each is read when it is
    asked for. What of a block is large comes in pieces (`keep`), each a line of its own. Lines that
    later ones have replaced are left out of the file once they outweigh the others.

    Several processes, `ranks`, each note the blocks of their own: the first one in `path`, number r
    in `path`.r. The first one opens it before the others do, with all that any of them left. Of a
    `shard` (i, n) only every n-th block is done, from the i-th; `together` then raises PartDone.
    """

    SAVE_EVERY_S = 10.0
    WAITING_BYTES = 1 << 22  # of lines that are not in the file yet

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
        # Where the next line begins, and the digest of the one before it.
        self._end, self._last = 0, ""
        self._waiting: list[bytes] = []  # lines that are not in the file yet
        self._waiting_bytes = 0
        self._is_synced = True
        self._kept: dict[int, int] = {}  # where each piece of the next block is
        # The keys asked for, those of them that were not done, and of these the one that is taken.
        self._n_keys = 0
        self._asked: list[str] = []
        self._taken = -1
        self.done = Blocks()
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
        own = self.done.read(self.path, self._head)
        for part in parts:
            self.done.read(part, self._head)
        self._end, self._last = own.end, own.last
        if parts or not own.end or self._is_stale:
            self._write()
            for part in parts:
                part.unlink()
        else:
            # A cut last line must not join the next one.
            os.truncate(self.path, own.end)
            self.done.before_read = self._spill

    def _follow(self) -> None:
        """Begin with what the first process has found."""
        if not self._whole.exists():
            raise RelneuronError(
                f"{self._whole.parent} is not the folder that the first process writes to",
                "give a folder that all processes share",
            )
        atomic_write(self.path, self._head_line())
        self.done.read(self._whole, self._head)
        self.done.file(self.path)
        self.done.before_read = self._spill

    @property
    def _is_stale(self) -> bool:
        """Whether more of the file was replaced than stands."""
        return 2 * self.done.stale_bytes > self._end

    def _write(self) -> None:
        """The whole file anew: the head and what is done."""
        self._spill()
        old, new = self.done, Blocks()
        noted: dict[str, list[int]] = {}

        def lines() -> Iterator[bytes]:
            yield self._head_line()
            for key in old:
                noted[key] = []
                for text in old.texts(key):
                    noted[key].append(self._end)
                    yield self._line(text)
            old.close()  # on Windows an open file cannot be replaced

        atomic_write(self.path, lines())
        new.file(self.path)
        for key, (*pieces, place) in noted.items():
            new.add(self.path, key, place, pieces)
        new.before_read = self._spill
        self.done = new

    def _head_line(self) -> bytes:
        self._end, self._last = 0, ""
        return self._line(_text(self._head))

    def _line(self, text: bytes) -> bytes:
        """The next line of the file."""
        self._last = chained(self._last, text)
        line = b"%s %s\n" % (self._last.encode(), text)
        self._end += len(line)
        return line

    def check(self, digest: Callable[[Sequence[int]], str | None], what: str) -> None:
        """Have the finished blocks done again whose rows of a file are not as they were noted.

        A block's value notes its `rows` and their `digest`. The first process does it before the
        others begin.
        """
        if self.is_first:
            lost = [
                key
                for key, one in self.done.items()
                if has_rows(one) and one["digest"] != digest(one["rows"])
            ]
            self.redo(lost, f"rows of {what} are not as they were written")

    def redo(self, keys: Collection[str], why: str) -> None:
        """Forget finished blocks whose results are not as they were noted, and say so."""
        if keys:
            what = f"{len(keys)} of {len(self.done)} blocks are done again"
            warnings.warn(f"{self.path}: {why}: {what}", stacklevel=3)
            self.done.forget(keys)
            self._write()

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

    def keep(self, key: str, number: int, value: object) -> None:
        """Note piece `number`, from 0 on, of the block that is added next.

        Again, of a batch that memory had no room for, in place of what was noted. `piece` reads it.
        """
        self._kept[number] = self._note({"key": key, "piece": number, "value": value})

    def piece(self, key: str, number: int) -> Any:
        """What `keep` noted of a finished block."""
        return self.done.piece(key, number)

    def add(self, key: str, value: object) -> None:
        """Note a finished block; it is safe after the next `commit`, at most 10 s later."""
        place = self._note({"key": key, "value": value})
        pieces = [] if key == BUDGET else [self._kept[n] for n in range(len(self._kept))]
        self.done.add(self.path, key, place, pieces)
        if key != BUDGET:
            self._kept.clear()
        if time.monotonic() - self._saved > self.SAVE_EVERY_S:
            self.commit()

    def _note(self, value: Json) -> int:
        """Have a line be the next one; where it begins."""
        place, line = self._end, self._line(_text(value))
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self._is_synced = False
        if self._waiting_bytes > self.WAITING_BYTES:
            self._spill()
        return place

    def _spill(self) -> None:
        """Have in the file what waits; it is not safe there yet."""
        if self._waiting:
            with self.path.open("ab") as file:
                file.writelines(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0

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
        for path in sorted({self._whole, *parts_of(self._whole)} - {self.path}):
            self.done.read(path, self._head)
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
        has_more = not self._is_synced or not self.is_shared
        if has_more and (kind is None or issubclass(kind, KeyboardInterrupt)):
            self.commit()

    def commit(self) -> None:
        """Append what was added and wait until it is on the disk."""
        self.before_commit()
        self._spill()
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
        self._is_synced, self._saved = True, time.monotonic()
        # What others have read of the file stays where it is.
        if self._is_stale and not self._kept and not self.is_shared:
            self._write()

    def remove(self) -> None:
        self.done.close()
        for path in (*parts_of(self._whole), self._whole):
            path.unlink(missing_ok=True)


def _text(value: Json) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def head_of(inputs: Json) -> Json:
    """The first line of a journal: what its blocks depend on."""
    found: Json = json.loads(json.dumps({"versions": versions(), "inputs": inputs}))
    return found


def first_line(path: Path) -> bytes:
    """The text of a journal's head."""
    with path.open("rb") as file:
        return file.readline().rstrip(b"\n").partition(b" ")[2]


def parts_of(path: Path) -> list[Path]:
    """The journals of the other processes beside that of the first one."""
    found = path.parent.glob(f"{escape(path.name)}.*")
    return sorted(part for part in found if part.suffix[1:].isdecimal())


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
        head = json.loads(first_line(journal))
        if head["inputs"] == known["stages"][stage]["inputs"]:
            journal.unlink()
    return False
