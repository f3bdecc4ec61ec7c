"""The Triton kernels as a GPU would run them, compiled here without one: `bench.offline` is green.

Its checks must be able to fail: offline_faults.py seeds a spill, a narrow load, an exceeded budget
and 32-bit offsets. Both run in their own process, because this one may use the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from relneuron.ops import available_backends

ROOT = Path(__file__).resolve().parents[2]

# The same for the kernels of logprob_gain, whose loops are told by what is in them.
GAIN_FAULTS = """
import json
from dataclasses import replace
from bench import offline

case, moments = ("sm_90", "any", "gain"), ("sm_90", "any", "moments")
launch, product = offline.launches(*case)[0], offline.launches(*moments)[0]
row = offline.measure(*case, launch)
found = {"none": offline.faults(row, row)}
few_registers = replace(launch, options={"maxnreg": 64})
found["spill"] = offline.faults(offline.measure(*case, few_registers), row)
# Rows that begin anywhere are loaded one by one.
unaligned = replace(launch, args={**launch.args, "WIDTH": 32001})
found["narrow"] = offline.faults(offline.measure(*case, unaligned), row)
for loop in ("blocks", "rows"):
    less = replace(row, **{loop: getattr(row, loop) / 1.2})
    found[loop] = offline.faults(row, less)
try:
    plain = replace(product, constants={**product.constants, "PRECISION": "ieee"})
    offline.measure(*moments, plain)
except AssertionError as error:
    found["no matrix product"] = str(error)
print(json.dumps(found))
"""

pytestmark = pytest.mark.skipif(
    "triton is not usable" in available_backends()["triton"].detail, reason="no triton"
)


def run(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    environment["TRITON_INTERPRET"] = "0"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )


def test_no_kernel_has_a_fault(tmp_path: Path) -> None:
    done = run("-m", "bench.offline", cache=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert f"\n{target} " in done.stdout


def test_the_gate_can_fail(tmp_path: Path) -> None:
    done = run("tests/bench/offline_faults.py", cache=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["none"] == found["within budget"] == found["64-bit offset"] == []
    assert any("spills" in fault for fault in found["spill"])
    for name in ("narrow load", "narrow order"):
        assert any("narrower than 16 bytes" in fault for fault in found[name])
    assert any("budget" in fault for fault in found["budget"])
    assert any("no budget" in fault for fault in found["no budget"])
    assert any("limit 14.0" in fault for fault in found["limit"])
    assert len(found["32-bit offset"]) == 1 and len(found["widened too late"]) == 1
    assert len(found["32-bit column"]) == 1


def test_the_gate_sees_the_loops_of_logprob_gain(tmp_path: Path) -> None:
    done = run("-c", GAIN_FAULTS, cache=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["none"] == []
    assert any("spills" in fault for fault in found["spill"])
    assert any("narrower than 16 bytes" in fault for fault in found["narrow"])
    for loop in ("blocks", "rows"):
        assert len(found[loop]) == 1 and f"in loop {loop}, budget" in found[loop][0]
    assert "_gain_moments_kernel has loops" in found["no matrix product"]
