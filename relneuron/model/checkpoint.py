"""The state of an unfinished pass as one file: its counters, and where in its batches it stands.

The corpus pass and the contrast of two models write it every so many seconds and go on from it. It
is replaced at once (temporary file, fsync, rename) and begins with its digest, so what is read is
what was written, whole.
"""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.numpy import load

from relneuron.artifact.counts import Counts
from relneuron.artifact.files import Json, RelneuronError, atomic_write, refuse_overwrite
from relneuron.artifact.manifest import differences
from relneuron.model.ranks import Ranks


@dataclass(frozen=True)
class Position:
    """Where a pass stands: the batches that were planned together, and how many of them are done.

    feed      where what is read stood at their begin (texts/feed.Feed.state)
    done      batches of them that are counted
    number    batches before them
    n_tokens  in all batches so far
    own       of those of the shard so far: `batches.batch_sizes`
    """

    feed: Json | None
    done: int
    number: int
    n_tokens: int = 0
    own: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    counts: Counts
    position: Position


def write_checkpoint(path: Path, inputs: Json, found: Checkpoint) -> None:
    """Replace the file; its name is that of the stage, with .checkpoint."""
    data = [*found.counts.pieces({"inputs": inputs, "position": asdict(found.position)})]
    digest = hashlib.sha256()
    for piece in data:
        digest.update(piece)
    atomic_write(path, [digest.hexdigest().encode() + b"\n", *data])


def read_checkpoint(path: Path, inputs: Json, kind: type[Counts] = Counts) -> Checkpoint | None:
    """What the file of a stage holds, counters of a kind; None if there is none.

    One that is not as it was written, or was made from other inputs, raises.
    """
    if not path.exists():
        return None
    digest, _, data = path.read_bytes().partition(b"\n")
    if hashlib.sha256(data).hexdigest().encode() != digest:
        raise RelneuronError(
            f"{path} is not the file that was written (its digest differs)",
            f"restore it, or --force to {path.stem} again",
        )
    try:
        return _read(path, data, inputs, kind)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise RelneuronError(
            f"{path} was written by another version of relneuron ({error!r})",
            f"go on with that version, or --force to {path.stem} again",
        ) from error


def _read(path: Path, data: bytes, inputs: Json, kind: type[Counts]) -> Checkpoint:
    size = int.from_bytes(data[:8], "little")
    described = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][kind.KEY])
    changed = differences(described["inputs"], json.loads(json.dumps(inputs)))
    if changed:
        raise RelneuronError(
            f"{path.parent} holds an unfinished {path.stem} of other inputs: {'; '.join(changed)}",
            f"use another output, or --force to {path.stem} again",
        )
    counts = kind.of_tensors(described["groups"], load(data))
    return Checkpoint(counts, Position(**described["position"]))


def refusal(
    path: Path, result: Path, inputs: Json, kind: type[Counts] = Counts, *, force: bool
) -> RelneuronError | None:
    """Why nothing may be written, if so; a folder with a checkpoint holds a pass that goes on."""
    try:
        if read_checkpoint(path, inputs, kind) is None:
            refuse_overwrite(result, force)
    except RelneuronError as error:
        if not force:
            return error
        path.unlink(missing_ok=True)
    return None


def drop_checkpoint(path: Path, inputs: Json, kind: type[Counts] = Counts) -> None:
    """Delete what a pass that was killed behind its manifest left; another one's stays."""
    with suppress(RelneuronError):
        if read_checkpoint(path, inputs, kind) is not None:
            path.unlink()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C only asks to stop, behind the batch and its checkpoint; the second stops."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


_GO_ON, _SAVE, _STOP = 0, 1, 2
_LOOK_EVERY = 8  # batches of each process between two looks at what the others want


class Due(Protocol):
    """Options that say when a checkpoint is due."""

    @property
    def checkpoint_seconds(self) -> float: ...

    @property
    def checkpoint_batches(self) -> int | None: ...


@dataclass
class Saver:
    """Writes checkpoints when they are due, or when the user wants to stop."""

    path: Path
    inputs: Json
    ranks: Ranks
    options: Due
    stopped: Callable[[], bool]
    seconds: float = 0.0  # that it took
    _last: float = field(default_factory=time.monotonic)
    _batches: int = 0

    def look(self, number: int, counts: Callable[[], Counts], position: Position) -> None:
        """After every batch; processes tell each other what they want at fixed batches."""
        self._batches += 1
        every = 1 if self.ranks.size == 1 else _LOOK_EVERY * self.ranks.shares
        if (number + 1) % every:
            return
        if self.options.checkpoint_batches is not None:
            due = self._batches >= self.options.checkpoint_batches
        else:
            due = time.monotonic() - self._last >= self.options.checkpoint_seconds
        want = self.ranks.largest(_STOP if self.stopped() else _SAVE if due else _GO_ON)
        if want == _GO_ON:
            return
        began = time.monotonic()
        total = self.ranks.add(counts())
        if self.ranks.rank == 0:
            write_checkpoint(self.path, self.inputs, Checkpoint(total, position))
        self._last, self._batches = time.monotonic(), 0
        self.seconds += self._last - began
        if want == _STOP:
            raise KeyboardInterrupt
