"""A count that is killed, interrupted or out of disk goes on with the same bits.

What needs a process that dies is done by kit/count_crash.py, in processes of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relneuron.artifact.manifest import Manifest
from relneuron.cli import main as cli
from relneuron.methods.counts.count import CHECKPOINT
from relneuron.methods.counts.counter import Counter
from tests.kit import count_crash
from tests.kit.count_crash import GROUPS, LEFT, check_checkpoint, files_of
from tests.kit.counted import draw, note_batches, run, stopping, write_corpus
from tests.kit.forked import Forked


@pytest.fixture(scope="module")
def documents() -> dict[str, list[list[int]]]:
    return draw(GROUPS, 150)


# --- processes that die ------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_out_of_disk_at_every_step_and_killed_at_random_moments(tmp_path: Path) -> None:
    """Every step of every write: of two checkpoints, the counters and the manifest 6 each.

    Where it is killed it also keeps examples and a histogram, 6 each.

    The script checks that the next run ends with the bits of an undisturbed one, loses no more
    than one interval and leaves no other file; a full disk is one line of cause and one of fix.
    """
    words = [str(tmp_path), "kill", "full", "random", "--moments", "5"]
    process = Forked(count_crash.main, words)
    assert process.wait(600) == 0, process.said()
    found = json.loads(process.said()[0])
    assert (found["kill"], found["full"]) == (36, 20) and found["random"] >= 1


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_the_command_itself_interrupted_killed_and_finished(
    model_folder: Path, tmp_path: Path
) -> None:
    """Ctrl-C says how to go on; SIGKILL leaves no worker; the end is an undisturbed run's."""
    texts = [f"{s.group}={s.files[0].path}" for s in write_corpus(tmp_path, draw(GROUPS, 1800))]
    asked = ["--window", "16", "--batch-tokens", "16", "--checkpoint-batches", "5", "--quiet"]
    output, whole = tmp_path / "o", tmp_path / "whole"
    words = ["count", str(model_folder), *texts, *asked, "-o"]
    for number in (signal.SIGINT, signal.SIGKILL):
        code, said = signalled([*words, str(output)], output / CHECKPOINT, number)
        if number == signal.SIGINT:
            told = f"error: interrupted\nfix:   go on with: relneuron {' '.join(words)} {output}\n"
            assert (code, said) == (130, told)
        else:
            assert code == -signal.SIGKILL
        check_checkpoint(output)
        assert not (output / "counts.safetensors").exists()
    for folder in (output, whole):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["relneuron", *words, str(folder)])
            with pytest.raises(SystemExit) as end:
                cli.main()
        assert not end.value.code
    assert files_of(output) == files_of(whole) and files_of(output).keys() == LEFT


def signalled(words: list[str], checkpoint: Path, number: int) -> tuple[int, str]:
    """Start the command, send a signal behind its first checkpoint; its exit code and errors."""
    seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    process = subprocess.Popen(
        [sys.executable, "-m", "relneuron", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_until(lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns != seen)
    workers = children_of(process.pid)
    assert workers and all(map(is_alive, workers))
    process.send_signal(number)
    out, said = process.communicate()
    assert out == ""
    wait_until(lambda: not any(map(is_alive, workers)), 10)
    return process.returncode, said


# --- Ctrl-C ------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 2, 7])
@pytest.mark.parametrize(
    "asked",
    [
        {"window": 16, "batch_tokens": 32, "moments": True, "sites": ("act", "up", "down")},
        {"window": 20, "batch_tokens": 60, "mode": "documents", "checkpoint_batches": 3},
        {"window": 16, "batch_tokens": 16, "bos": "window", "checkpoint_batches": 1},
        {"window": 32, "batch_tokens": 32, "boundaries": "position", "max_tokens": 130},
        {"window": 16, "batch_tokens": 32, "shard": (2, 3), "checkpoint_seconds": 0.0},
    ],
)
def test_stopped_again_and_again(
    model: Any,
    documents: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: Any,
    after: int,
) -> None:
    run(model, documents, tmp_path / "whole", **asked)
    seen = note_batches(monkeypatch)
    run(model, documents, tmp_path / "again", **asked)
    planned, stops = len(seen), 0
    seen.clear()
    stopping(monkeypatch, after)
    while True:
        try:
            run(model, documents, tmp_path / "o", **asked)
            break
        except KeyboardInterrupt:
            stops += 1
            assert stops <= 4 * planned  # each run gets ahead
            assert not (tmp_path / "o" / "counts.safetensors").exists()
    whole = files_of(tmp_path / "whole")
    assert files_of(tmp_path / "o") == whole == files_of(tmp_path / "again")
    assert stops >= 1 and len(seen) == planned


def test_a_count_that_was_stopped_is_no_count(model: Any, documents: Any, tmp_path: Path) -> None:
    """A second Ctrl-C ends a run at once; signals are as they were after it."""
    before = signal.getsignal(signal.SIGINT)
    true = Counter.count

    def twice(self: Counter, batch: Any) -> None:
        true(self, batch)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Counter, "count", twice)
        run(model, documents, tmp_path / "o", window=16)
    assert signal.getsignal(signal.SIGINT) is before
    assert {path.name for path in (tmp_path / "o").iterdir()} == {".lock"}
    assert not Manifest(tmp_path / "o").data["stages"]
