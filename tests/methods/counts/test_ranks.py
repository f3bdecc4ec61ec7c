"""`count` by several processes under torchrun: the counters of one process, to the last bit.

Most of it runs in forks of one process (kit/count_crash.py); one test starts torchrun itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.artifact.counts import Counts
from relneuron.cli import main as cli
from relneuron.model.ranks import Ranks, joined, local_device
from tests.kit import count_crash
from tests.kit.count_crash import GROUPS, LEFT, files_of
from tests.kit.counted import draw
from tests.kit.forked import Forked

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch.distributed with gloo is not built in",
)


@pytest.mark.slow
@needs_gloo
def test_any_number_of_processes_counts_the_same_also_one_after_the_other(tmp_path: Path) -> None:
    """Two, three, and a count that was stopped and goes on with another number of processes."""
    process = Forked(count_crash.main, [str(tmp_path), "ranks"])
    assert process.wait(600) == 0, process.said()
    assert json.loads(process.said()[0])["ranks"] == ["2", "3", "1-2", "2-1", "3-2"]


@pytest.mark.slow
@needs_gloo
def test_torchrun(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, lines in draw(GROUPS, 300).items():
        text = "".join(" ".join(map(str, line)) + "\n" for line in lines)
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    texts = [f"{name}={tmp_path / name}.txt" for name in GROUPS]
    asked = [*texts, "--window", "16", "--batch-tokens", "64", "--quiet", "--workers", "1"]
    command = ["count", str(model_folder), *asked, "-o"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "relneuron"]
    result = subprocess.run(
        [sys.executable, *launcher, *command, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"-> {tmp_path / 'two'}") == 1  # one process speaks
    monkeypatch.setattr(sys, "argv", ["relneuron", *command, str(tmp_path / "one")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert files_of(tmp_path / "one").keys() == LEFT


def test_alone_nothing_is_sent(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    counts = Counts(["en"], np.array([3], np.int64), {"count.act": np.ones((1, 2, 2), np.int64)})
    with joined(model) as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
        assert ranks.add(counts) is counts
        assert (ranks.largest(2), ranks.total(7)) == (2, 7)
    assert (Ranks().rank, Ranks().size) == (0, 1)


@needs_gloo
def test_a_program_that_has_joined_its_processes_works_alone(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with joined(model) as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)


@pytest.mark.parametrize(
    ("local", "has_gpu", "asked", "device"),
    [
        (None, True, None, None),
        (None, True, "cuda", "cuda"),
        ("1", True, None, "cuda:1"),
        ("1", True, "cuda", "cuda:1"),
        ("1", True, "cpu", "cpu"),
        ("1", True, "cuda:0", "cuda:0"),
        ("1", False, None, None),
    ],
)
def test_processes_of_one_machine_take_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch,
    local: str | None,
    has_gpu: bool,
    asked: str | None,
    device: str | None,
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert local_device(asked) == device
