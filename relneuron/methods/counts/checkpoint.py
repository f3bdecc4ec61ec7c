"""The state of an unfinished count: counters and the position in every source, in one file.

`count` writes it every so many seconds and begins from it. It is replaced at once (temporary file,
fsync, rename) and begins with its digest, so what is read is what was written, whole.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.numpy import load

from relneuron.artifact.counts import Counts
from relneuron.artifact.files import Json, RelneuronError, atomic_write
from relneuron.artifact.manifest import differences
from relneuron.methods.counts.ranks import Ranks
from relneuron.texts.options import CountOptions

NAME = "count.checkpoint"
_GO_ON, _SAVE, _STOP = 0, 1, 2
_LOOK_EVERY = 8  # batches of each process between two looks at what the others want


@dataclass(frozen=True)
class Position:
    """Where a count stands: the pool of windows that it is in, and the batches of it that are done.

    feed      where the sources stood at the pool's begin (corpus_feed.Feed.state)
    done      batches of the pool that are counted
    number    batches before the pool
    n_tokens  in all batches so far
    """

    feed: Json | None
    done: int
    number: int
    n_tokens: int = 0


@dataclass(frozen=True)
class Checkpoint:
    counts: Counts
    position: Position


def write_checkpoint(folder: Path, inputs: Json, found: Checkpoint) -> None:
    data = found.counts.to_bytes({"inputs": inputs, "position": asdict(found.position)})
    digest = hashlib.sha256(data).hexdigest()
    atomic_write(folder / NAME, digest.encode() + b"\n" + data)


def read_checkpoint(folder: Path, inputs: Json) -> Checkpoint | None:
    """The checkpoint of a folder, None if there is none.

    One that is not as it was written, or was made from other inputs, raises.
    """
    path = folder / NAME
    if not path.exists():
        return None
    digest, _, data = path.read_bytes().partition(b"\n")
    if hashlib.sha256(data).hexdigest().encode() != digest:
        raise RelneuronError(
            f"{path} is not the file that was written (its digest differs)",
            "restore it, or --force to count anew",
        )
    try:
        return _read(folder, data, inputs)
    except (KeyError, TypeError, ValueError) as error:
        raise RelneuronError(
            f"{path} was written by another version of relneuron ({error!r})",
            "go on with that version, or --force to count anew",
        ) from error


def _read(folder: Path, data: bytes, inputs: Json) -> Checkpoint:
    size = int.from_bytes(data[:8], "little")
    described = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["relneuron.counts"])
    changed = differences(described["inputs"], json.loads(json.dumps(inputs)))
    if changed:
        raise RelneuronError(
            f"{folder} holds an unfinished count of other inputs: {'; '.join(changed)}",
            "use another output, or --force to count anew",
        )
    arrays = load(data)
    counts = Counts(described["groups"], arrays.pop("tokens"), arrays)
    return Checkpoint(counts, Position(**described["position"]))


@dataclass
class Saver:
    """Writes checkpoints when they are due, or when the user wants to stop."""

    folder: Path
    inputs: Json
    ranks: Ranks
    options: CountOptions
    stopped: Callable[[], bool]
    seconds: float = 0.0  # that it took
    _last: float = field(default_factory=time.monotonic)
    _batches: int = 0

    def look(self, number: int, counts: Callable[[], Counts], position: Position) -> None:
        """After every batch; processes tell each other what they want at fixed batches."""
        self._batches += 1
        every = 1 if self.ranks.size == 1 else _LOOK_EVERY * self.ranks.size
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
            write_checkpoint(self.folder, self.inputs, Checkpoint(total, position))
        self._last, self._batches = time.monotonic(), 0
        self.seconds += self._last - began
        if want == _STOP:
            raise KeyboardInterrupt
