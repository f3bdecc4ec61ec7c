"""Ends `relneuron count` at every step of every file that it writes, and lets it go on.

The tests of methods/counts run it; by hand, for as many kills as one likes:
    python -m tests.kit.count_crash FOLDER random --moments 30
One process imports torch and makes a model, and does the undisturbed run; every other run is a fork
of it. No parallel work is done before a fork, and one thread in it: threads do not survive a fork.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import tqdm
import typer

import relneuron.methods.counts.count  # before the forks, which need it
import relneuron.methods.counts.pictured
import relneuron.model.load
from relneuron.artifact.counts import Counts
from relneuron.cli import main as cli
from relneuron.methods.counts.counter import Counter
from relneuron.model.pictures import Processor, picture_run
from tests.conftest import tiny_model
from tests.kit.counted import Numbers, draw, write_corpus
from tests.kit.pictures import tiny, write_lines

tqdm.tqdm.monitor_interval = 0  # no thread
KILLED = 137
WHAT = ("kill", "full", "random", "ranks", "pictures", "pictures of ranks")
LEFT = {".lock", "counts.safetensors", "manifest.json"}
GROUPS = ("en", "zh", "fr")
EVERY = 3  # batches between two checkpoints
# What a count keeps beside its counters, and the files of it.
KEPT = ("--examples", "3", "--histogram", "16")
BESIDE = {"examples.safetensors", "histogram.safetensors"}


class Faults:
    """Does something at the k-th step of writing files: temp file, write, fsync, rename."""

    def __init__(self, at: int, act: Callable[[], None], *, kills: bool) -> None:
        self.at, self.act, self.kills, self.n = at, act, kills, 0
        self._patch()

    def step(self) -> None:
        self.n += 1
        if self.n == self.at:
            self.act()

    def _patch(self) -> None:
        mkstemp, fdopen, fsync, replace = tempfile.mkstemp, os.fdopen, os.fsync, Path.replace

        def make(*args: Any, **asked: Any) -> Any:
            if not self.kills:  # a full disk makes no file
                self.step()
            made = mkstemp(*args, **asked)
            if self.kills:
                self.step()
            return made

        @contextmanager
        def half(*args: Any) -> Iterator[Any]:
            with fdopen(*args) as file:
                write = file.write

                def cut(data: bytes) -> None:
                    write(data[: len(data) // 2])
                    file.flush()
                    self.step()
                    write(data[len(data) // 2 :])

                yield _File(file, cut)

        def sync(handle: int) -> None:
            self.step()
            fsync(handle)

        def rename(path: Path, target: Path) -> Path:
            self.step()
            moved = replace(path, target)
            if self.kills:
                self.step()
            return moved

        tempfile.mkstemp, os.fdopen, os.fsync = make, half, sync  # type: ignore[assignment]
        Path.replace = rename  # type: ignore[method-assign,assignment]


class _File:
    """An open file whose `write` is another one."""

    def __init__(self, file: Any, write: Callable[[bytes], None]) -> None:
        self.write, self.flush, self.fileno = write, file.flush, file.fileno


class Study:
    """A model and a corpus of numbers; runs of `relneuron count` over it, each a fork."""

    command: Sequence[str] = ("count", "m")
    counter: Any = Counter  # whose `count` counts a batch
    result = "counts.safetensors"

    def __init__(self, folder: Path, n_tokens: int, *words: str) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        sources = write_corpus(folder / "corpus", draw(GROUPS, n_tokens))
        texts = [f"{s.group}={s.files[0].path}" for s in sources]
        asked = ["--window", "16", "--batch-tokens", "64", "--quiet"]
        self.words = [*texts, *asked, "--checkpoint-batches", str(EVERY), *words]
        model = tiny_model("llama")
        relneuron.model.load.load = lambda *_, **__: (model, Numbers())  # type: ignore[assignment]
        self.log = folder / "batches"

    def start(self, output: Path, *words: str, before: Callable[[], object] = lambda: None) -> int:
        """Begin a run; the process id."""
        pid = os.fork()
        if pid:
            return pid
        try:
            self._run(output, words, before)
        except SystemExit as error:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(error.code or 0))
        finally:
            os._exit(99)

    def _run(self, output: Path, words: Sequence[str], before: Callable[[], object]) -> NoReturn:
        # Appended to: several processes say their lines in one file.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        said = os.open(self.folder / "said", flags)
        os.dup2(said, 1)
        os.dup2(said, 2)
        self.counter.count = self._noted()
        before()
        sys.argv = ["relneuron", *self.command, *self.words, *words, "-o", str(output)]
        cli.main()
        raise SystemExit(0)

    def _noted(self) -> Callable[..., None]:
        """What counts a batch, and notes that it did."""
        true, log = self.counter.count, os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def note(counter: Any, *batch: Any) -> None:
            true(counter, *batch)
            os.write(log, b".")

        return note

    def whole(self) -> Path:
        """The folder of an undisturbed run, which this process does."""
        output = self.folder / "whole"
        with mock.patch.object(self.counter, "count", self._noted()):
            words = [*self.command, *self.words, "-o", str(output)]
            assert run_here(words, self.folder / "said") == 0, self.said()
        return output

    def run(self, output: Path, *words: str, before: Callable[[], object] = lambda: None) -> int:
        """A whole run; its exit code, 128 + the signal's number if one ended it."""
        return code_of(self.start(output, *words, before=before))

    def batches(self) -> int:
        """How many were counted since the last call."""
        n = self.log.stat().st_size if self.log.exists() else 0
        self.log.unlink(missing_ok=True)
        return n

    def said(self) -> str:
        return (self.folder / "said").read_text()


class Pictures(Study):
    """The same over pictures, in all modules of a model that was found once for all forks."""

    def __init__(self, folder: Path, n: int, *words: str) -> None:
        torch.set_num_threads(1)
        self.folder, self.log = folder, folder / "batches"
        texts = [f"{g}={write_lines(folder / 'corpus', g, n, i * n)}" for i, g in enumerate("ab")]
        asked = ["--module", "all", "--checkpoint-batches", str(EVERY), "--quiet"]
        self.words = [*texts, *asked, *words]
        model, processor = tiny("instructblip")
        run = picture_run(model, Processor(processor))
        parts = relneuron.methods.counts.count.find_mlps(model, modules=("all",), run=run)
        relneuron.model.load.load = lambda *_, **__: (model, None)  # type: ignore[assignment]
        relneuron.methods.counts.pictured.load_processor = lambda *_, **__: processor
        relneuron.methods.counts.count.find_mlps = lambda *_, **__: parts


def code_of(pid: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


def run_here(words: Sequence[str], said: Path) -> int:
    """A command in this process; its exit code. What it says is in the file `said`.

    Its forks then have what is imported, found or made once: half of a short command's time.
    """
    with (
        said.open("w") as file,
        redirect_stdout(file),
        redirect_stderr(file),
        mock.patch.object(sys, "argv", ["relneuron", *words]),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
    assert threading.active_count() == 1
    return code


def files_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def check_checkpoint(output: Path) -> None:
    """If there is one, it is whole."""
    for path in output.glob("*.checkpoint"):
        digest, _, data = path.read_bytes().partition(b"\n")
        assert hashlib.sha256(data).hexdigest().encode() == digest, path


def check_goes_on(study: Study, output: Path, whole: dict[str, bytes], n_batches: int) -> None:
    """The next start ends with the bits of an undisturbed run, and leaves nothing else."""
    assert study.run(output) == 0, study.said()
    assert files_of(output) == whole, sorted(files_of(output))
    assert study.batches() <= n_batches + EVERY


def every_step(study: Study, *, kills: bool) -> int:
    """Fail at the first step, at the second one, ...; returns how many there are."""
    whole, n_batches = files_of(study.whole()), study.batches()
    beside = BESIDE if {*KEPT} <= {*study.words} else set()
    assert whole.keys() == {".lock", study.result, "manifest.json"} | beside

    def act() -> None:
        if kills:
            os._exit(KILLED)
        raise OSError(errno.ENOSPC, "No space left on device")

    at = 0
    while True:
        at += 1
        output = study.folder / f"{at}"
        code = study.run(output, before=lambda at=at: Faults(at, act, kills=kills))
        if code == 0:
            assert files_of(output) == whole
            return at - 1
        check_checkpoint(output)
        if kills:
            assert code == KILLED, study.said()
        else:
            lines = study.said().splitlines()
            assert code == 1 and len(lines) == 2, lines
            assert lines[0].startswith(f"error: No space left on device ({output}"), lines
            assert lines[1].startswith("fix:   free space on the disk")
            assert not list(output.glob(".*.tmp"))
        check_goes_on(study, output, whole, n_batches)


def random_moments(study: Study, n: int, seed: int) -> int:
    """SIGKILL `n` runs of one count at random moments; returns how many it hit at work."""
    rng = random.Random(seed)
    whole = files_of(study.whole())
    began = time.monotonic()
    assert study.run(study.folder / "again") == 0, study.said()
    took = time.monotonic() - began
    n_hit, folder = 0, 0
    output = study.folder / "0"
    for _ in range(n):
        pid = study.start(output)
        time.sleep(rng.uniform(0, took))
        os.kill(pid, signal.SIGKILL)
        code = code_of(pid)
        assert code in (0, 128 + signal.SIGKILL), study.said()
        n_hit += code != 0
        if output.exists():
            check_checkpoint(output)
        if code == 0:
            assert files_of(output) == whole
            folder += 1
            output = study.folder / str(folder)
    assert study.run(output) == 0, study.said()
    assert files_of(output) == whole
    return n_hit


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def join(rank: int, size: int, port: int) -> None:
    """What torchrun tells its processes."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def stop_after(counter: Any, n_batches: int) -> None:
    """As if Ctrl-C came while the n-th batch is counted by a class of counters."""
    true, seen = counter.count, 0

    def count(self: Any, *batch: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == n_batches:
            os.kill(os.getpid(), signal.SIGINT)
        true(self, *batch)

    counter.count = count


def run_ranks(
    study: Study,
    output: Path,
    size: int,
    *words: str,
    stop: int | None = None,
    act: Callable[[int], object] = lambda rank: None,
) -> list[int]:
    """One count by `size` processes; the exit codes. Each stops at its batch `stop`.

    `act` is called in each before it begins.
    """
    port, pids = free_port(), []
    for rank in range(size):

        def before(rank: int = rank) -> None:
            if size > 1:
                join(rank, size, port)
            if stop is not None:
                stop_after(study.counter, stop)
            act(rank)

        pids.append(study.start(output, *words, before=before))
    return [code_of(pid) for pid in pids]


def ranks(study: Study, stop: int = 20) -> list[str]:
    """Counts by several processes, also one after the other; returns what was done."""
    whole, done = files_of(study.whole()), list[str]()
    n_batches = study.batches()
    for sizes in ((2,), (3,), (1, 2), (2, 1), (3, 2)):
        output = study.folder / "-".join(map(str, sizes))
        for size in sizes[:-1]:
            assert run_ranks(study, output, size, stop=stop) == [130] * size, study.said()
            check_checkpoint(output)
            assert (output / "count.checkpoint").exists()
            assert not (output / "counts.safetensors").exists()
        assert run_ranks(study, output, sizes[-1]) == [0] * sizes[-1], study.said()
        assert files_of(output) == whole, output
        assert study.batches() == n_batches  # none twice: what was asked to stop saves
        done.append(output.name)
    return done


def check_refusal(study: Study) -> None:
    """What the first process refuses ends all of them at once, with one message."""
    output = study.folder / "mine"
    output.mkdir()
    (output / "counts.safetensors").write_text("mine")
    assert run_ranks(study, output, 2) == [2, 2], study.said()
    cause, fix = study.said().splitlines()
    assert cause.startswith("error: ") and cause.endswith("counts.safetensors exists"), cause
    assert fix.startswith("fix:   ")
    assert (output / "counts.safetensors").read_text() == "mine"
    assert study.batches() == 0


def check_moments(study: Study) -> None:
    """Two processes add up sums in another order; all else is exact."""
    outputs = [study.folder / f"of {size}" for size in (1, 2)]
    for size, output in enumerate(outputs, 1):
        assert run_ranks(study, output, size) == [0] * size, study.said()
    one, two = (Counts.read(output / "counts.safetensors") for output in outputs)
    assert one.groups == two.groups and one.tokens.tolist() == two.tokens.tolist()
    for name, array in one.arrays.items():
        if name.startswith("sum"):
            assert np.allclose(two.arrays[name], array, rtol=1e-9, atol=1e-9), name
        else:
            assert np.array_equal(two.arrays[name], array), name


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", nargs="+", choices=WHAT)
    parser.add_argument("--moments", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(words)
    cli.app = typer.main.get_command(cli.app)  # type: ignore[assignment]  # once for all runs
    found: dict[str, Any] = {}
    for what in asked.what:
        folder = asked.folder / what
        if what in ("kill", "full"):
            words = ("--moments", *(KEPT if what == "kill" else ()))
            found[what] = every_step(Study(folder, 130, *words), kills=what == "kill")
        elif what == "random":
            study = Study(folder, 2500, "--moments")
            found[what] = random_moments(study, asked.moments, asked.seed)
        elif what == "pictures":
            found[what] = every_step(Pictures(folder, 3, "--moments"), kills=True)
        elif what == "pictures of ranks":
            found[what] = ranks(Pictures(folder, 30), stop=8)
        else:
            study = Study(folder, 2000, *KEPT)
            found[what] = ranks(study)
            check_refusal(study)
            check_moments(Study(folder / "moments", 300, "--moments"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
