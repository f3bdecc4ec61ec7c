"""The Triton kernels as a GPU would run them, compiled here without one: `bench.offline` is green.

Its checks must be able to fail: offline_faults.py seeds a spill, a narrow load, a load behind the
arithmetic, an exceeded budget and 32-bit offsets. Both run in their own process, because this one
may use the interpreter.
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


@pytest.mark.slow
def test_no_kernel_has_a_fault(tmp_path: Path) -> None:
    """What changed since the table of budgets was written is compiled, and `cover()`."""
    done = run("-m", "bench.offline", cache=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert f"\n{target} " in done.stdout


COVERED = """
import json
from bench.offline.cases import cases, cover, launches
from bench.offline.rows import label

def kernels(chosen):
    return [(case, label(l).split()[0]) for case in chosen for l in launches(*case)]

found = {}
for name, chosen in (("all", cases()), ("cover", sorted(cover()))):
    assert name == "all" or set(chosen) <= set(cases())
    found[name] = [[*case, kernel] for case, kernel in kernels(chosen)]
print(json.dumps(found))
"""


def test_the_cover_has_every_kernel(tmp_path: Path) -> None:
    """On sm_90; and on every target those that all calls of their op launch."""
    done = run("-c", COVERED, cache=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    everything, covered = ({(row[0], row[3]) for row in found[name]} for name in ("all", "cover"))
    targets = {target for target, _ in everything}
    assert {row for row in everything if row[0] == "sm_90"} <= covered
    assert {
        (t, name) for t in targets for name in ("_swiglu_stats_kernel", "_gain_kernel")
    } <= covered
    assert {row[1] for row in found["cover"]} == {row[1] for row in found["all"]}


ONES = """
import torch
from bench.offline.cases import TARGETS, compile_launch, example_call
from relneuron.ops import SITES
from relneuron.ops.swiglu_stats import triton_launch as launcher

for n_tokens, width in ((1, 11008), (8192, 1)):
    for sites in (("act",), SITES):
        given = {"sites": sites, "moments": len(sites) == 1, "conditions": True}
        given |= {"responses": ("gate", "up", "product")}
        call = example_call(torch.bfloat16, n_tokens=n_tokens, width=width, **given)
        for launch in launcher.plan(call, launcher.LAUNCH_TABLE[9, 0], is_nvidia=True):
            compile_launch(launch, TARGETS["sm_90"])
"""


@pytest.mark.slow
def test_a_size_of_one_compiles(tmp_path: Path) -> None:
    """Triton takes it for a constant, of which a kernel must ask nothing else than of a number."""
    done = run("-c", ONES, cache=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    done = run("tests/bench/offline_faults.py", cache=tmp_path_factory.mktemp("cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, list[str]]] = json.loads(done.stdout)
    return found


def test_the_gate_can_fail(seeded: dict[str, dict[str, list[str]]]) -> None:
    found = seeded["stats"]
    assert found["none"] == found["within budget"] == found["64-bit offset"] == []
    assert not any("waits" in fault for fault in found["none, plain"])
    assert any("waits 2 times" in fault for fault in found["up loaded late"])
    for name, words in (("apart", "apart"), ("under way", "under way"), ("limiter", "limited by")):
        assert len(found[name]) == 1 and words in found[name][0]
    assert any("spills" in fault for fault in found["spill"])
    for name in ("narrow load", "narrow order"):
        assert any("narrower than 16 bytes" in fault for fault in found[name])
    assert any("budget" in fault for fault in found["budget"])
    assert any("the same code" in fault for fault in found["same code"])
    assert any("no budget" in fault for fault in found["no budget"])
    assert any("limit 14.0" in fault for fault in found["limit"])
    assert len(found["32-bit offset"]) == 1 and len(found["widened too late"]) == 1
    assert len(found["32-bit column"]) == 1


def test_the_gate_sees_the_loops_of_logprob_gain(
    seeded: dict[str, dict[str, list[str]]],
) -> None:
    found = seeded["gains"]
    assert found["none"] == []
    assert any("spills" in fault for fault in found["spill"])
    assert any("narrower than 16 bytes" in fault for fault in found["narrow"])
    for loop in ("blocks", "rows"):
        assert len(found[loop]) == 1 and f"in loop {loop}, budget" in found[loop][0]
    assert "_gain_moments_kernel has loops" in found["no matrix product"][0]
