"""Workers of the feed: what becomes of them when they, the feed or its process end; memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.memory import resident_bytes, status_bytes
from relneuron.texts.feed import Feed
from relneuron.texts.sources import parse_sources
from relneuron.texts.windows import Packing
from relneuron.texts.worker import fast_encoder


def word_tokenizer() -> Any:
    """Splits at spaces; fast, so that much text can be read."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"?": 0}, "?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def test_a_worker_neither_truncates_nor_pads_nor_adds_tokens() -> None:
    from tokenizers import AddedToken, processors

    raw = word_tokenizer().backend_tokenizer
    raw.add_special_tokens([AddedToken("<s>", special=True)])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.enable_truncation(3)
    raw.enable_padding(length=9)
    assert len(raw.encode("a b c d").ids) == 9
    assert fast_encoder(raw.to_str(), False)(["a b c d", "", "<s>"]) == [[0] * 4, [], [1]]
    assert fast_encoder(raw.to_str(), True)(["<s>"]) == [[0]]


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits to be collected by its parent."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return status.rsplit(")", 1)[1].split()[0] == "Z"


def pids(feed: Feed) -> list[int]:
    return [helper._process.pid for helper in feed._helpers]  # type: ignore[union-attr]


def wait_for(pid: int) -> None:
    end = time.monotonic() + 10
    while not has_ended(pid):
        assert time.monotonic() < end, f"{pid} is still there"
        time.sleep(0.02)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_a_killed_worker_is_an_error_that_names_the_source(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.zeros(3_000_000, np.int32))
    with Feed(
        parse_sources([f"en={tmp_path / 'ids.npy'}"]), None, Packing(8), vocabulary=1
    ) as feed:
        assert len(feed.take(1)) == 1
        os.kill(pids(feed)[0], signal.SIGKILL)
        with pytest.raises(RelneuronError, match="reads en ended with exit code -9"):
            feed.take(400_000)


@linux
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_workers_end_with_the_feed(tmp_path: Path, error: Any) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3_000_000, np.int32))
    np.save(tmp_path / "b.npy", np.zeros(9, np.int32))
    sources = parse_sources([f"en={tmp_path / 'a.npy'}", f"zh={tmp_path / 'b.npy'}"])
    found: list[int] = []
    try:
        with Feed(sources, word_tokenizer(), Packing(16), n_workers=2) as feed:
            feed.take(1)
            found = pids(feed)
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert len(found) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)  # collected, no zombie


PARENT = """
import os, signal, sys, time
from relneuron.texts.sources import parse_sources
from relneuron.texts.feed import Feed
from relneuron.texts.windows import Packing
signal.signal(signal.SIGINT, signal.default_int_handler)  # also in a shell that ignores it
feed = Feed(parse_sources([f"en={sys.argv[1]}"]), None, Packing(8), vocabulary=1)
with feed:
    feed.take(1)
    print(feed._helpers[0]._process.pid, flush=True)
    time.sleep(60)
"""


@linux
@pytest.mark.parametrize(
    ("how", "n_tokens"),
    [(signal.SIGKILL, 30), (signal.SIGKILL, 3_000_000), (signal.SIGINT, 30)],
    ids=["killed, worker idle", "killed, worker busy", "interrupted"],
)
def test_no_worker_outlives_its_parent(tmp_path: Path, how: signal.Signals, n_tokens: int) -> None:
    np.save(tmp_path / "ids.npy", np.zeros(n_tokens, np.int32))
    command = [sys.executable, "-c", PARENT, str(tmp_path / "ids.npy")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, process_group=0) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        pid = int(parent.stdout.readline())
        assert not has_ended(pid)
        os.killpg(parent.pid, how)  # as Ctrl-C in a terminal does
        parent.wait()
        wait_for(pid)
        messages = parent.stderr.read()
    assert "corpus_worker" not in messages and messages.count("Traceback") <= 1


@linux
def test_a_worker_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words of text")
    sources = parse_sources([f"en={tmp_path / 'a.txt'}"])
    with Feed(sources, word_tokenizer(), Packing(4)) as feed:
        assert len(feed.take(1)) == 1
        maps = Path(f"/proc/{pids(feed)[0]}/maps").read_text()
        assert "tokenizers" in maps and "libtorch" not in maps


@linux
def test_memory_stays_bounded_in_a_large_file_of_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    mib = (b"x" * 1023 + b" ") * 1024
    with path.open("wb") as file:
        for _ in range(300):
            file.write(mib)
    try:
        before, most, n_tokens = resident_bytes(), 0, 0
        with Feed(parse_sources([f"en={path}"]), word_tokenizer(), Packing(512)) as feed:
            feed.take(1)
            n_tokens += 512
            while windows := feed.take(20):
                n_tokens += sum(len(window.ids) for window in windows)
                most = max(most, resident_bytes())
                time.sleep(0.0001)
            worker = status_bytes("VmHWM", pids(feed)[0]) or 0
        assert worker
        assert n_tokens > 300_000
        assert most - before + worker < 300 << 20
    finally:
        path.unlink()
