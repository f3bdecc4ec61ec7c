"""bench.gpu: a machine that is lent for minutes gets the most from them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import FIRST_TESTS
from bench.gpu_run import Run
from relneuron.bench.timing import Row
from relneuron.ops import available_backends
from tests.conftest import ROOT

# A plugin of pytest: notes each kernel that is launched.
NOTE = """
import atexit, json
from relneuron.ops import launches

names, run = set(), launches.Launch.run

def note(launch):
    names.add(launch.kernel.__name__)
    run(launch)

launches.Launch.run = note
atexit.register(lambda: print(json.dumps(sorted(names))))
"""


@pytest.mark.slow
@pytest.mark.skipif(not available_backends()["triton"].works, reason="no GPU and no interpreter")
def test_the_first_tests_launch_every_kernel(tmp_path: Path) -> None:
    (tmp_path / "note.py").write_text(NOTE)
    words = ["-m", "pytest", "-q", "-p", "note", "-p", "no:xdist", *FIRST_TESTS]
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{len(FIRST_TESTS)} passed" in done.stdout
    sources = (ROOT / "relneuron" / "ops").rglob("triton_*.py")
    lines = [line for path in sources for line in path.read_text().splitlines()]
    kernels = {line[4:].partition("(")[0] for line in lines if line.startswith("def _")}
    kernels = {name for name in kernels if name.endswith("_kernel")}
    assert set(json.loads(done.stdout.splitlines()[-1])) == kernels and len(kernels) >= 9


def row(contestant: str) -> Row:
    values: dict[str, Any] = {field.name: 1 for field in fields(Row)}
    return Row(**values | {"contestant": contestant, "rounds_ms": (1.0,), "note": ""})


def test_a_run_that_is_cut_off_keeps_its_rows_and_goals(tmp_path: Path) -> None:
    run = Run(tmp_path, "cpu", 1.0, dry=True)
    run.add([row("relneuron")])
    run.reached("P1", 5.0)
    run.add([row("eager")])  # no end of a section, nothing is saved at an end
    with (tmp_path / "gpu.csv").open(newline="") as file:
        assert [line["contestant"] for line in csv.DictReader(file)] == ["relneuron", "eager"]
    goals = json.loads((tmp_path / "gpu.json").read_text())["goals"]
    assert goals["P1"]["measured"] == 5.0 and goals["P2"]["measured"] is None
