"""bench.host measures what it says, and the host's part of a call stays small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from relneuron.ops import available_backends
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    "triton is not usable" in available_backends()["triton"].detail, reason="no triton"
)

SERVE = """
from bench import host
host.TOKENS, host.SLICE_S = (16,), 2e-3
host.serve()
"""
TABLE = """
from bench import host
first = {(1, "plain"): {"call": 5e-6, "launch": 9.0, "plan": 9.0},
         (1, "op"): {"call": 2e-5, "launch": 3e-6, "plan": 2e-6}}
print(host.table([[first, first], [first, {key: {"call": 4e-5} for key in first}]] * 2))
"""


def run(code: str, text: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        input=text,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_call_costs_the_host_a_few_plain_launches() -> None:
    """2 to 5 of them were measured; a launch by Triton's own way, with its checks, is 5 more."""
    rounds: list[dict[str, Any]] = [
        {name: parts for _, name, parts in json.loads(line)}
        for line in run(SERVE, "\n" * 5).splitlines()
    ]
    assert len(rounds) == 5

    def ratio(name: str) -> float:
        return min(found[name]["call"] / found["plain"]["call"] for found in rounds)

    assert ratio("swiglu_stats") < 3
    assert ratio("swiglu_stats, count") < 4
    assert ratio("residual_stats, count") < 4
    assert ratio("swiglu_stats, moments") < 7
    for found in rounds:
        # Nothing is launched but by our launches, and a launch takes time.
        assert all(parts["launch"] > 0 for name, parts in found.items() if name != "plain")


def test_the_table_has_ratios_within_rounds() -> None:
    header, plain, op = run(TABLE).splitlines()
    assert " ".join(header.split()) == "T call launch plan rest / plain against ratio"
    assert plain.split()[2:] == ["5.0", "0.0", "0.0", "5.0", "1.00", "22.5", "0.56"]
    assert op.split()[2:] == ["20.0", "3.0", "2.0", "15.0", "4.00", "30.0", "0.75"]
