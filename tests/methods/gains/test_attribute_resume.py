"""An attribution that is killed, interrupted or run again ends with the same bytes.

The runs are those of kit/attribution_runs.py; test_attribute.py checks what is in the files.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import relneuron.artifact.journal
import relneuron.artifact.manifest
import relneuron.artifact.prompts
import relneuron.methods.gains.attribute
from relneuron.artifact.journal import Journal
from relneuron.artifact.manifest import Manifest
from relneuron.methods.gains.attribute import JOURNAL
from tests.kit.attribution_runs import OPTIONS, Attributed, files_of
from tests.kit.dying import Killed, Points
from tests.kit.forked import Forked

COMMIT = (Journal, "commit")
STEPS = (
    COMMIT,
    (Journal, "remove"),
    (Manifest, "save"),
    (relneuron.methods.gains.attribute, "atomic_write"),
    (relneuron.artifact.prompts, "atomic_write"),
    (relneuron.artifact.journal, "atomic_write"),
    (relneuron.artifact.manifest, "atomic_write"),
)

SMALL = replace(OPTIONS, top=5, random_seeds=0, batch_tokens=60)


def blocks_in(journal: Path) -> list[bytes]:
    """The lines of a journal that are no pieces of a block."""
    return [line for line in journal.read_bytes().splitlines() if b'", "piece": ' not in line]


@pytest.mark.slow
def test_killed_at_every_step_it_ends_with_the_same_bytes(
    llama: Attributed, tmp_path: Path
) -> None:
    llama.attribute(tmp_path / "whole", SMALL)
    whole = files_of(tmp_path / "whole")
    assert JOURNAL not in whole
    points = Points(0, STEPS)
    with points:
        llama.attribute(tmp_path / "counted", SMALL)
    assert files_of(tmp_path / "counted") == whole and points.n > 15
    for last in range(1, points.n + 1):
        output = tmp_path / str(last)
        with pytest.raises(Killed), Points(last, STEPS):
            llama.attribute(output, SMALL)
        llama.attribute(output, SMALL)
        assert files_of(output) == whole, last


def test_killed_again_and_again(llama: Attributed, tmp_path: Path) -> None:
    """Every run saves a batch or two more, and what was saved is not done again."""
    options = replace(SMALL, batch_tokens=25)
    llama.attribute(tmp_path / "whole", options)
    output, n_kills, done = tmp_path / "out", 0, 0
    while True:
        try:
            with Points(3, [COMMIT]):
                llama.attribute(output, options)
            break
        except Killed:
            n_kills += 1
            lines = len(blocks_in(output / JOURNAL))
            assert done < lines <= done + 3
            done = lines
    assert n_kills > 10
    assert files_of(output) == files_of(tmp_path / "whole")


def test_ctrl_c_saves_what_is_finished(llama: Attributed, tmp_path: Path) -> None:
    options = replace(SMALL, batch_tokens=20)
    llama.attribute(tmp_path / "whole", options)
    true, n = relneuron.methods.gains.attribute.Scorer.score, 0

    def score(self: Any, rows: list[int], keep: Any) -> Any:
        nonlocal n
        n += 1
        if n == 3:
            raise KeyboardInterrupt
        return true(self, rows, keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relneuron.methods.gains.attribute.Scorer, "score", score)
        with pytest.raises(KeyboardInterrupt):
            llama.attribute(tmp_path / "out", options)
        assert len(blocks_in(tmp_path / "out" / JOURNAL)) == 1 + 2  # with the head
        llama.attribute(tmp_path / "out", options)
    n_batches = Manifest(tmp_path / "out").data["stages"]["attribute"]["batch_plan"]["batches"]
    assert n == 1 + n_batches  # the interrupted batch, and every batch once
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def attribute_and_die(folder: Path, last: int) -> None:
    """An attribution that is killed behind its `last` commit, with half a line in its journal."""
    true, n = Journal.commit, 0

    def commit(self: Journal) -> None:
        nonlocal n
        n += 1
        true(self)
        if n == last:
            with self.path.open("ab") as file:
                file.write(b'{"key": "cut sh')
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.SAVE_EVERY_S = 0.0
    Journal.commit = commit  # type: ignore[method-assign]
    Attributed("llama", folder).attribute(folder / "out", SMALL)


def test_a_process_that_is_killed_goes_on(llama: Attributed, tmp_path: Path) -> None:
    llama.attribute(tmp_path / "whole", SMALL)
    assert Forked(attribute_and_die, tmp_path, 3).wait() == -signal.SIGKILL
    assert (tmp_path / "out" / JOURNAL).read_bytes().endswith(b'{"key": "cut sh')
    llama.attribute(tmp_path / "out", SMALL)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_gains_that_are_gone_are_scored_again(llama: Attributed, tmp_path: Path) -> None:
    llama.attribute(tmp_path / "whole", SMALL)
    with Points(4, STEPS), pytest.raises(Killed):
        llama.attribute(tmp_path / "out", SMALL)
    assert b'"key": "attribute ' in (tmp_path / "out" / JOURNAL).read_bytes()
    (tmp_path / "out" / "gains.safetensors").unlink()
    with pytest.warns(match="1 of 1 blocks are done again"):
        llama.attribute(tmp_path / "out", SMALL)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
