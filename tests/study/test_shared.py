"""Stages that torchrun's processes share: the bytes of one process, whatever ends any of them.

All of it runs in forks of one process (kit/shared.py), as of one process of torchrun each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kit import shared
from tests.kit.forked import Forked
from tests.methods.counts.test_ranks import needs_gloo


def found(folder: Path, model: Path, facts: Path, what: str, n: int = 0) -> Any:
    process = Forked(shared.main, *map(str, (folder, model, facts, what, n)))
    assert process.wait(600) == 0, process.said()
    return json.loads(process.said()[0].splitlines()[-1])


@needs_gloo
def test_two_processes_share_the_work_and_end_together(
    tmp_path: Path, model_folder: Path, fact_folder: Path
) -> None:
    """A slow one does not hold the other; a refusal, or the failure of one, is said once."""
    quick, slow = found(tmp_path, model_folder, fact_folder, "quick")
    assert quick > slow >= 1


GROUPS = {"stages": shared.STAGES, "others": shared.OTHERS, "run": ("run",)}


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("what", GROUPS)
def test_any_number_of_processes_leaves_the_bytes_of_one(
    tmp_path: Path, model_folder: Path, fact_folder: Path, what: str
) -> None:
    done = found(tmp_path, model_folder, fact_folder, what)
    assert done == {stage: shared.is_shared(stage, what) * 3 for stage in GROUPS[what]}


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("n", [0, 4])
def test_responses_come_together_in_the_memory_of_the_first_process(
    tmp_path: Path, model_folder: Path, fact_folder: Path, n: int
) -> None:
    """Of any number of processes, killed at random, too: what is ranked has the same bytes."""
    done = found(tmp_path, model_folder, fact_folder, "kept", n)
    assert done["once"] + done["dropped"] >= (4 if n else 6)


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize(("what", "n", "hit"), [("stages", 3, 10), ("others", 2, 4), ("run", 2, 1)])
def test_any_of_them_is_killed(
    tmp_path: Path, model_folder: Path, fact_folder: Path, what: str, n: int, hit: int
) -> None:
    """All others end, and go on in another number; some kills hit none at work."""
    done = found(tmp_path, model_folder, fact_folder, what, n)
    assert sum(done.values()) >= hit, done


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("what", ["shards", "other shards"])
def test_two_machines_that_share_nothing(
    tmp_path: Path, model_folder: Path, fact_folder: Path, what: str
) -> None:
    """A part each, put together by merge: no batch is done twice."""
    done = found(tmp_path, model_folder, fact_folder, what)
    assert all((n >= 4) == shared.is_shared(stage, what) for stage, n in done.items()), done
