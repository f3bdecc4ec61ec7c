"""The windows of all sources in a fixed order, made ahead of time beside the model.

`count` and `nll` take windows from a `Feed`, and save its state to go on from there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any

from relneuron.artifact.files import Json, RelneuronError
from relneuron.texts.sources import ID_KINDS, Source
from relneuron.texts.windows import Block, Encode, Packing, Window
from relneuron.texts.worker import Server, fast_encoder, read_answer, receive, send, source_header

# Blocks that are asked for ahead, of each source. So at most AHEAD + 1 blocks of a source are in
# memory, 5 bytes a token: about 2 MB a source with windows of 4,096 tokens, and never more than
# BLOCK_TOKENS and a chunk of tokens each (50 MB a source).
AHEAD = 3

# What the worker runs: with the paths of this process, and without torch, which takes a second.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from relneuron.texts.worker import main; main()"
)

Answer = Block | Json | RelneuronError


class _Lane:
    """One source: its blocks that came, and the windows of the one that is being taken."""

    def __init__(self, source: Source, state: Json | None) -> None:
        self.source = source
        self.answers: SimpleQueue[Answer] = SimpleQueue()
        self.ask: Any = None  # asks for the next block
        self.start: Json | None = state["start"] if state else None
        self.taken: int = state["taken"] if state else 0
        self.notes: Json | None = state["notes"] if state else None
        self.n_tokens: int = state["n_tokens"] if state else 0
        self.fraction: float | None = state["fraction"] if state else 0.0
        self.windows: list[Window] = []
        self.is_loaded = False

    def state(self) -> Json:
        return {
            "start": self.start,
            "taken": self.taken,
            "notes": self.notes,
            "n_tokens": self.n_tokens,
            "fraction": self.fraction,
        }


class Feed:
    """The windows of some sources: they take turns, window by window, until each one ends.

    `tokenizer` may be None if all sources hold token ids. `vocabulary` bounds these; default: the
    tokenizer's length. `state` is what `state()` gave: exactly the windows after it follow. The
    order depends on neither time nor `n_workers` (default: half of the cores, at most one a
    source). Used as a context manager; what reads ahead ends with it.

    groups       names, in the order of the sources; those of a column when they are first taken
    n_windows    of each group, taken so far
    waited_s     seconds that `take` had to wait for windows, but for the first of each source
    started_s    seconds that it had to wait for those
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Any,
        packing: Packing,
        *,
        vocabulary: int | None = None,
        state: Json | None = None,
        n_workers: int | None = None,
    ) -> None:
        _check(sources, tokenizer, packing)
        self.packing, self.tokenizer = packing, tokenizer
        self.vocabulary = vocabulary
        if vocabulary is None and tokenizer is not None:
            self.vocabulary = len(tokenizer)
        n_cores = usable_cores()
        self.n_workers = n_workers or max(1, min(len(sources), n_cores // 2))
        self._threads_each = max(1, n_cores // (2 * self.n_workers))
        states: list[Json | None] = [None] * len(sources)
        self.groups = _named_groups(sources)
        self.n_windows = [0] * len(self.groups)
        self._turn = 0
        if state is not None:
            if len(state["sources"]) != len(sources):
                raise RelneuronError("the state is of another corpus", "begin again with --force")
            states, self._turn = list(state["sources"]), state["turn"]
            self.groups = list(state["groups"])
            # A state of an older version has none.
            self.n_windows = list(state.get("n_windows", [0] * len(self.groups)))
        self._places = {name: place for place, name in enumerate(self.groups)}
        self._lanes = [_Lane(*pair) for pair in zip(sources, states, strict=True)]
        self._helpers: list[_Process | _Thread] = []
        self.waited_s = self.started_s = 0.0

    def __enter__(self) -> Feed:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for helper in self._helpers:
            helper.stop()
        self._helpers = []

    def _start(self) -> None:
        """Divide the sources among processes; what cannot leave this one goes to a thread."""
        open_lanes = [lane for lane in self._lanes if lane.notes is None]
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else None
        splits = bool(getattr(self.tokenizer, "split_special_tokens", False))
        fast: Json | None = {"text": text, "splits_special_tokens": splits} if text else None
        near: list[_Lane] = []
        far: list[_Lane] = []
        for lane in open_lanes:
            can_leave = lane.source.dataset is None and (fast is not None or lane.source.is_ids)
            (far if can_leave else near).append(lane)
        for lane in near:
            encode = fast_encoder(**fast) if fast else _slow_encoder(self.tokenizer)
            self._helpers.append(_Thread(lane, Server(encode, self.packing, self.vocabulary)))
        for first in range(min(self.n_workers, len(far))):
            lanes = far[first :: self.n_workers]
            process = _Process(lanes, self._threads_each)
            self._helpers.append(process)
            process.begin(
                {"tokenizer": fast, "packing": asdict(self.packing), "vocabulary": self.vocabulary}
            )
        for lane in open_lanes:
            for _ in range(AHEAD):
                lane.ask()

    def take(self, n: int) -> list[Window]:
        """The next `n` windows; fewer only at the end of all sources."""
        result: list[Window] = []
        lanes, n_ended = self._lanes, 0
        while len(result) < n and n_ended < len(lanes):
            lane = lanes[self._turn]
            if lane.taken >= len(lane.windows) and not self._load(lane):
                n_ended += 1
            else:
                window = lane.windows[lane.taken]
                result.append(window._replace(number=self.n_windows[window.group]))
                self.n_windows[window.group] += 1
                lane.taken += 1
                n_ended = 0
            self._turn = (self._turn + 1) % len(lanes)
        return result

    def _load(self, lane: _Lane) -> bool:
        """Put the next block into a lane; False at the end of its source."""
        while lane.notes is None:
            answer = self._wait(lane)
            if isinstance(answer, RelneuronError):
                lane.answers.put(answer)  # each later call says so again
                raise answer
            if not isinstance(answer, Block):
                lane.notes, lane.fraction = answer, 1.0
                lane.start, lane.taken, lane.windows = None, 0, []
                return False
            lane.ask()
            # The first block after a resume was begun before.
            lane.taken = 0 if lane.is_loaded else lane.taken
            lane.is_loaded, lane.start = True, answer.start
            lane.n_tokens, lane.fraction = answer.n_tokens, answer.fraction
            places = [self._place(name) for name in answer.groups]
            lane.windows = [Window(places[w.group], w.ids, w.first) for w in answer.windows]
            if lane.taken < len(lane.windows):
                return True
        return False

    def _wait(self, lane: _Lane) -> Answer:
        if not self._helpers:
            raise RuntimeError("a Feed is read inside of its `with`")
        if not lane.answers.empty():
            return lane.answers.get()
        begin = time.perf_counter()
        try:
            return lane.answers.get()
        finally:
            waited = time.perf_counter() - begin
            if lane.is_loaded:
                self.waited_s += waited
            else:
                self.started_s += waited

    def _place(self, group: str) -> int:
        if group not in self._places:
            self._places[group] = len(self.groups)
            self.groups.append(group)
            self.n_windows.append(0)
        return self._places[group]

    def state(self) -> Json:
        """Where to go on after the last window taken, as JSON; valid also after the `with`."""
        return {
            "groups": list(self.groups),
            "n_windows": list(self.n_windows),
            "turn": self._turn,
            "sources": [lane.state() for lane in self._lanes],
        }

    @property
    def expected_tokens(self) -> float | None:
        """How many tokens the sources have together, estimated by the bytes; None if unknown."""
        total = 0.0
        for lane in self._lanes:
            if lane.fraction is None or (lane.fraction == 0 and lane.notes is None):
                return None
            total += lane.n_tokens / lane.fraction if lane.fraction else 0.0
        return total

    @property
    def notes(self) -> Json:
        """Facts of the sources that have ended, for the manifest.

        dropped_tokens            of each group, in its last incomplete window
        empty_documents           without a token
        records_without_text      null, no string, or without the field: skipped
        records_of_other_groups   than those asked for
        """
        ended = [lane.notes for lane in self._lanes if lane.notes is not None]
        dropped: Json = {}
        for notes in ended:
            dropped |= notes["dropped_tokens"]
        sums = ("empty_documents", "records_without_text", "records_of_other_groups")
        return {
            "dropped_tokens": dropped,
            **{name: sum(notes[name] for notes in ended) for name in sums},
        }


def _check(sources: Sequence[Source], tokenizer: Any, packing: Packing) -> None:
    """Refuse sources that cannot be read together, before anything is started."""
    names = [source.group for source in sources if source.group is not None]
    if not sources or len(set(names)) < len(names):
        raise RelneuronError(f"the sources {names} are none or not distinct", "name each once", 2)
    for source in sources:
        if (source.group is None) == (source.group_column is None):
            raise RelneuronError(
                f"the source {source.name} needs a group or a group column", "give one of them", 2
            )
        if source.dataset is None and not source.files:
            raise RelneuronError(f"the source {source.name} has no file", "name one", 2)
        if tokenizer is None and not source.is_ids:
            raise RelneuronError(
                f"{source.name} is text, the model has no tokenizer", "give token ids", 2
            )
        has_ids = any(file.kind in ID_KINDS for file in source.files)
        if packing.bos == "window" and has_ids and not source.is_ids:
            raise RelneuronError(
                f"{source.name} holds text and token ids, BOS comes into windows of text only",
                "give them as two groups, or choose another --bos",
                2,
            )
        if packing.join is not None and has_ids:
            raise RelneuronError(
                f"--join is of texts, and {source.name} holds token ids", "leave out --join", 2
            )


def _named_groups(sources: Sequence[Source]) -> list[str]:
    found: dict[str, None] = {}
    for source in sources:
        names = source.groups or () if source.group is None else (source.group,)
        found |= dict.fromkeys(names)
    return list(found)


def _slow_encoder(tokenizer: Any) -> Encode:
    """A tokenizer that is written in Python."""

    def encode(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return found

    return encode


class _Thread:
    """Serves one source in this process: a Python dataset, or a tokenizer written in Python."""

    def __init__(self, lane: _Lane, server: Server) -> None:
        self._requests: SimpleQueue[bool] = SimpleQueue()
        self._lane, self._server, self._is_stopped = lane, server, False
        server.open(0, lane.source, lane.start)
        lane.ask = lambda: self._requests.put(True)
        self._thread = threading.Thread(target=self._run, name="corpus", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._requests.get() and not self._is_stopped:
            answer = self._server.next(0)
            self._lane.answers.put(answer)
            if not isinstance(answer, Block):
                return

    def stop(self) -> None:
        self._is_stopped = True
        self._requests.put(False)
        self._thread.join(1.0)


def usable_cores() -> int:
    """The cores that this process may use; where the system does not tell, those it has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 2


def _apart() -> dict[str, Any]:
    """A process group of its own: Ctrl-C in the terminal is for the parent alone."""
    on_windows = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", None)
    return {"process_group": 0} if on_windows is None else {"creationflags": on_windows}


class _Process:
    """A worker process and the thread that reads what it sends."""

    def __init__(self, lanes: Sequence[_Lane], n_threads: int) -> None:
        self._lanes, self._is_stopped = lanes, False
        environment = dict(os.environ)
        environment.setdefault("TOKENIZERS_PARALLELISM", "true")
        environment.setdefault("RAYON_NUM_THREADS", str(n_threads))
        environment.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            **_apart(),
        )
        self._reader = threading.Thread(target=self._read, name="corpus", daemon=True)
        self._reader.start()

    def begin(self, header: Json) -> None:
        self._send(header)
        for number, lane in enumerate(self._lanes):
            opened = {"source": source_header(lane.source), "state": lane.start}
            self._send(opened | {"number": number})
            lane.ask = lambda number=number: self._send({"number": number})

    def _send(self, header: Json) -> None:
        with suppress(OSError):  # a dead worker is told by the reader
            assert self._process.stdin is not None
            send(self._process.stdin, header)

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with suppress(OSError, ValueError):
            while (frame := receive(stream)) is not None:
                header, arrays = frame
                self._lanes[header.pop("number")].answers.put(read_answer(header, arrays))
        if self._is_stopped:
            return
        code = self._process.wait()
        names = ", ".join(lane.source.name for lane in self._lanes)
        error = RelneuronError(
            f"the process that reads {names} ended with exit code {code}",
            "was it killed for its memory? The same command goes on where it stopped",
        )
        for lane in self._lanes:
            lane.answers.put(error)

    def stop(self) -> None:
        self._is_stopped = True
        self._process.kill()
        self._process.wait()
        self._reader.join(1.0)
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                assert stream is not None
                stream.close()
