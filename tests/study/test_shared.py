"""Stages that torchrun's processes share: the bytes of one process, whatever ends any of them.

All of it runs in forks of one process (kit/shared.py), as of one process of torchrun each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from relneuron.model.meeting import MEET
from tests.conftest import ROOT
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
@pytest.mark.parametrize(("what", "n", "hit"), [("stages", 3, 21), ("others", 2, 8), ("run", 2, 2)])
def test_any_of_them_is_killed(
    tmp_path: Path, model_folder: Path, fact_folder: Path, what: str, n: int, hit: int
) -> None:
    """All others end, and go on in another number; a kill that hits none at work is tried again."""
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


@pytest.mark.slow
@needs_gloo
def test_a_study_of_two_models_is_shared(
    tmp_path: Path, model_folder: Path, fact_folder: Path
) -> None:
    assert found(tmp_path, model_folder, fact_folder, "two") == 3


EARLY = """
import os, sys
from pathlib import Path

rank = os.environ["RANK"]
Path(f"{rank}.pid").write_text(str(os.getpid()))
if rank == "1":
    os.kill(os.getpid(), 9)
from relneuron.__main__ import main

sys.argv = ["relneuron", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
@needs_gloo
def test_one_dies_before_it_has_met_the_others(tmp_path: Path, model_folder: Path) -> None:
    """torchrun sees it and says so, once; nobody waits the minutes that a cluster may take."""
    (tmp_path / "early.py").write_text(EARLY)
    (tmp_path / "p.txt").write_text("Person1 eats\n")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "3", "early.py"]
    asked = ["generate", str(model_folder), "p.txt", "--neurons", "n.json", "-o", "said.jsonl"]
    result = subprocess.run(
        [sys.executable, *launcher, *asked],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=MEET.total_seconds() / 4,
    )
    assert result.returncode == 1 and "exitcode  : -9" in result.stderr, result.stderr
    assert "error: " not in result.stdout + result.stderr
    for path in tmp_path.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    assert not (tmp_path / "said.jsonl").exists()
