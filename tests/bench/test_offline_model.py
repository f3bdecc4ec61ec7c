"""What `bench.offline` reads of loops, and what its model of the time makes of it.

Loops written by hand and works of one limit each, all computed by hand.
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

pytestmark = pytest.mark.skipif(
    "triton is not usable" in available_backends()["triton"].detail, reason="no triton"
)

# bench.offline sets how Triton is imported, so it has a process of its own.
PROGRAM = """
import json
from dataclasses import replace
from bench.offline.code import Waits, amd_waits, distance, waits
from bench.offline.model import GPUS, Part, Work, predict, unit_of

GATE = "LDG.E.128 R4, desc[UR8][R2.64]"
UP = "LDG.E.128 R8, desc[UR8][R2.64+0x10]"
IDS = "LDG.E R20, desc[UR8][R18.64]"
USE_GATE, USE_UP, USE_IDS = "FADD R30, R5, R30", "FADD R31, R11, R31", "IADD3 R2, R20, R2, RZ"
WORK = "FFMA R40, R41, R42, R43"
BACK = "BRA 0x100"
COPY, GROUP = "LDGSTS.E.BYPASS.128 [R50], desc[UR8][R2.64]", "LDGDEPBAR"
loops = {
    "together": [GATE, UP, WORK, USE_GATE, USE_UP, BACK],
    "apart": [GATE, WORK, USE_GATE, UP, WORK, USE_UP, BACK],
    # Both loads stand at the end, for the next turn.
    "rotated": [USE_GATE, USE_UP, WORK, GATE, UP, BACK],
    "after ids": [IDS, USE_IDS, GATE, UP, USE_GATE, USE_UP, BACK],
    "copies": ["DEPBAR.LE SB0, 0x2", WORK, COPY, COPY, GROUP, BACK],
    "copies of one turn": ["DEPBAR.LE SB0, 0x0", WORK, COPY, COPY, GROUP, BACK],
}
found = {name: [vars(waits(body)), distance(body)] for name, body in loops.items()}
LOAD = "global_load_dwordx4 v[0:3], v[8:9], off"
amd = {
    "together": [LOAD, LOAD, "s_waitcnt vmcnt(1)", "v_add_f32 v9, v1, v9", "s_waitcnt vmcnt(0)"],
    "apart": [LOAD, "s_waitcnt vmcnt(0)", LOAD, "s_waitcnt vmcnt(0)"],
    "store behind": [LOAD, "global_store_dwordx4 v[4:5], v[0:3], off", "s_waitcnt vmcnt(1)"],
}
found |= {f"amd {name}": [vars(amd_waits(body)), distance(body)] for name, body in amd.items()}

units = {text: unit_of(text) for text in (
    "@!P1 MUFU.EX2 R3, R4", "FFMA R1, R2, R3, R4", "IMAD R1, R2, R3, R4", "LOP3.LUT R1, R2, R3",
    "SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "STS.128 [R1], R4", "DADD R2, R4, R6", "UIADD3 UR4, UR5",
    "LDGDEPBAR", "F2FP.BF16.F32.PACK_AB R1, R2, R3", "HMMA.1688.F32.TF32 R4, R8, R12, R4",
    "HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24",
)}

h200 = GPUS["H200"]
loop = Part([WORK] * 100, 32.0, Waits(1, 32, 0), 32)
base = Work(132 * 8, 4, 64, 0, [loop], 0.0)

def times(work):
    p = predict(work, h200)
    return [round(p.us, 2), p.limiter, p.resident, p.in_flight]

predicted = {
    "issue": times(replace(base, parts=[replace(loop, waits=Waits(0, 0, 0))])),
    "latency": times(replace(base, registers=255, n_programs=132 * 2)),
    "copies": times(replace(base, registers=255, n_programs=132 * 2,
                            parts=[replace(loop, waits=Waits(1, 96, 0))])),
    "memory": times(replace(base, memory_bytes=4.3e9)),
    "MUFU": times(replace(base, parts=[replace(loop, body=["MUFU.EX2 R1, R2"] * 100)])),
    "waves": times(replace(base, n_programs=132)),
}
sizes = [h200.resident(*of) for of in ((32, 4, 0), (56, 4, 0), (255, 4, 0), (32, 1, 0),
                                       (32, 4, 100 << 10))]

from bench.offline.__main__ import all_launches
from bench.offline.rows import VERSION, faults_of_others, versions

known = list(all_launches())
others = {
    "versions": [VERSION, *versions()],
    "as they are": faults_of_others(known),
    "another kernel": faults_of_others([(key, "0") for key, _ in known[:1]]),
    "another case": faults_of_others([(("sm_90", "bf16", "new", "_new_kernel"), "0")]),
}
print(json.dumps([found, units, predicted, sizes, others]))
"""


@pytest.fixture(scope="module")
def said() -> list[dict[str, list[object]]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: list[dict[str, list[object]]] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(
    ("name", "n", "in_flight", "n_narrow", "distance"),
    [
        ("together", 1, 32, 0, 1),
        ("apart", 2, 16, 0, 3),
        ("rotated", 1, 32, 0, 1),
        ("after ids", 1, 32, 1, 1),
        # Three groups are under way when the first of them is awaited.
        ("copies", 1, 96, 0, 0),
        ("copies of one turn", 1, 32, 0, 0),
        ("amd together", 1, 32, 0, 1),
        ("amd apart", 2, 16, 0, 2),
        ("amd store behind", 1, 16, 0, 0),
    ],
)
def test_waits_of_a_loop(
    said: list[dict[str, list[object]]],
    name: str,
    n: int,
    in_flight: int,
    n_narrow: int,
    distance: int,
) -> None:
    assert said[0][name] == [{"n": n, "in_flight": in_flight, "n_narrow": n_narrow}, distance]


def test_units_of_instructions(said: list[dict[str, list[object]]]) -> None:
    """Lanes that a warp takes: 32, more of wide loads, and of products in tensor cores theirs."""
    assert list(said[1].values()) == [
        ["MUFU", 32],
        ["float32", 32],
        ["float32", 64],
        ["integer", 32],
        ["shuffle", 32],
        ["shuffle", 128],
        ["float64", 32],
        ["none", 32],
        ["none", 32],
        ["integer", 32],
        ["tensor", 1024],
        ["tensor", 8192],
    ]


def test_times(said: list[dict[str, list[object]]]) -> None:
    """Each work has one limit; clocks of an H200 at 1.83 GHz, and 2 us of launch."""
    expected = {
        # 8 programs x 4 warps x 100 instructions x 32 turns, four each clock.
        "issue": (8 * 4 * 100 * 32 / 4 / 1830, "issue", 8),
        # 700 ns and 200 clocks a turn.
        "latency": (32 * (0.7 + 200 / 1830), "latency", 2),
        # Two turns' time for the 700 ns.
        "copies": (32 * 0.35, "latency", 2),
        "memory": (1000, "memory", 8),
        "MUFU": (8 * 4 * 100 * 32 * 2 / 1830, "MUFU", 8),
        # One program where eight fit.
        "waves": (32 * (0.7 + 200 / 1830), "waves", 8),
    }
    for name, (us, limiter, resident) in expected.items():
        found = said[2][name]
        assert found[0] == pytest.approx(us + 2, abs=0.02), name
        assert found[1:3] == [limiter, resident], name
    assert said[2]["latency"][3] == 2 * 128 * 32


def test_programs_that_fit(said: list[dict[str, list[object]]]) -> None:
    """Limited by threads, by registers (twice), by the number of programs, by shared memory."""
    assert said[3] == [16, 9, 2, 32, 2]  # type: ignore[comparison-overlap]


def test_other_versions_of_triton_are_of_this_code(said: list[dict[str, list[object]]]) -> None:
    """The oldest that pyproject.toml allows has rows, which are of the kernels that are here."""
    here, *all_versions = said[4]["versions"]
    assert here in all_versions and "3.6" in all_versions
    assert said[4]["as they are"] == []
    n_others = len(all_versions) - 1
    for name in ("another kernel", "another case"):
        assert len(said[4][name]) == n_others
        assert all("not measured with Triton" in str(fault) for fault in said[4][name])
