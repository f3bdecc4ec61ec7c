"""Where Triton cannot launch, "auto" is plain torch, once said why; a forced backend raises it.

Each setting is a process of its own (broken.py) in which Triton fails for real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from relneuron.ops import available_backends, backends, swiglu_stats
from tests.conftest import ROOT
from tests.kit.interpreter import IS_INTERPRETED, needs_triton

pytestmark = needs_triton
DTYPES = ("float32", "bfloat16", "float16")

# Setting -> what is said of it.
REASONS = {
    "no C compiler": "Failed to find C compiler",
    "no such C compiler": "No such file or directory: '/nonexistent/cc'",
    "no cache folder": "Not a directory: '/dev/null/cache'",
    "no driver": "libcuda.so cannot found|active drivers",
    "an old GPU": "Value 'sm_35' is not defined for option 'gpu-name'",
    "bfloat16 on sm_75": "requires .target sm_80",
}


def run(setting: str, folder: Path) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)}
    environment.pop("CC", None)
    if setting == "no C compiler":
        environment["PATH"] = "/nonexistent"
    elif setting == "no such C compiler":
        environment["CC"] = "/nonexistent/cc"
    elif setting == "no cache folder":
        environment["TRITON_CACHE_DIR"] = "/dev/null/cache"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "tests/ops/broken.py", setting],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # One line: nothing of what Triton prints when it fails came through.
    [line] = done.stdout.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("setting", REASONS)
def test_auto_is_plain_torch_and_says_why_once(setting: str, tmp_path: Path) -> None:
    if setting == "no driver" and torch.cuda.is_available():
        pytest.skip("there is one")
    seen = run(setting, tmp_path)
    broken = ("bfloat16",) if "bfloat16" in setting else DTYPES
    said: list[str] = []
    for dtype in DTYPES:
        found = seen[dtype]
        assert found["same"]
        said += found["warnings"]
        if dtype not in broken:
            assert found["backend"] == "triton" and not found["raised"] + found["fallbacks"]
            continue
        [raised], [noted] = found["raised"], found["fallbacks"]
        assert found["backend"] == "reference"
        assert raised.startswith("swiglu_stats: backend='triton' cannot run here: a launch failed")
        reason = raised.split("cannot run here: ")[1]
        assert any(part in reason for part in REASONS[setting].split("|")), reason
        assert noted == f"backend reference in place of triton: {reason}"
        assert reason in seen["doctor"] and str(tmp_path) not in reason
    assert seen["doctor"].startswith("works" if len(broken) == 1 else "does not work")
    assert ("not for bfloat16" in seen["doctor"]) == (len(broken) == 1)
    if seen["model"] is not None:
        own = {name: seen["bfloat16"][name] for name in ("same", "backend", "fallbacks")}
        assert seen["model"] == own
    # A warning for each op that was called with what is broken: twice or more, in up to 3 dtypes.
    ops = ["swiglu_stats", "average_precision", *(["logprob_gain"] if len(broken) == 3 else [])]
    assert [text.split()[1] for text in said] == ops
    assert all("uses plain torch (backend='reference'), because a launch failed" in s for s in said)


def test_where_launches_work_nothing_is_said(tmp_path: Path) -> None:
    seen = run("none", tmp_path)
    assert seen.pop("doctor") == "works: kernels for a GPU" and seen.pop("model") is None
    for found in seen.values():
        assert found["same"] and found["backend"] == "triton"
        assert not found["warnings"] + found["raised"] + found["fallbacks"]


# --------------------------------------------------------------------------------------------------
# The probe itself


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """CPU tensors stand for a GPU's, and the launchers are taken for compiled ones."""
    if not IS_INTERPRETED:
        pytest.skip("the kernels are compiled: they take no CPU tensors")
    monkeypatch.setattr(backends, "_FAULTS", {})
    monkeypatch.setattr(backends, "MADE_FOR", {"cpu": "triton"})
    own = backends.triton_module

    def compiled(op: str) -> Any:
        return SimpleNamespace(**{**vars(own(op)), "IS_INTERPRETED": False})

    monkeypatch.setattr(backends, "triton_module", compiled)
    return torch.device("cpu")


def choose(device: torch.device, dtype: torch.dtype = torch.float16) -> str:
    return backends.choose_backend("swiglu_stats", "auto", device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_probe_passes_where_the_numbers_are_right(
    gpu: torch.device, dtype: torch.dtype
) -> None:
    assert choose(gpu, dtype) == "triton"
    assert list(backends._FAULTS.items()) == [((gpu, dtype), None)]


def test_wrong_numbers_are_a_fault(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = pytest.importorskip("relneuron.ops.probe")
    monkeypatch.setattr(probe, "swiglu_stats_triton", lambda call: call.out.fill_(1.0))
    with pytest.warns(RuntimeWarning, match="because a launch failed: RuntimeError: it gave wrong"):
        assert choose(gpu) == "reference"
    backends._notice.cache_clear()


def test_a_full_device_is_no_fault(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = pytest.importorskip("relneuron.ops.probe")

    def full(call: object) -> None:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(probe, "swiglu_stats_triton", full)
        with pytest.raises(torch.OutOfMemoryError):
            choose(gpu)
    assert choose(gpu) == "triton"


def test_a_probe_is_made_once_per_device_and_dtype(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[object] = []
    monkeypatch.setattr(backends, "_probe", lambda *key: probed.append(key))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        assert choose(gpu, dtype) == "triton"
    assert probed == [(gpu, torch.float32), (gpu, torch.bfloat16)]


def test_no_probe_is_made_within_a_graph(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(backends, "_probe", lambda *key: "not asked")
    assert backends.triton_fault(torch.device("cuda", 0), torch.float32) is None
    assert not backends._FAULTS


@pytest.mark.parametrize("op", ["swiglu_stats", "logprob_gain"])
def test_gfx90a_has_no_row_of_nvidia(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its capability is 9.0, as an H100's; on it inline PTX does not compile."""
    launcher: Any = backends.triton_module(op)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    launcher._launch_config.cache_clear()
    assert launcher._launch_config(device) is launcher.LAUNCH_TABLE[9, 0]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    launcher._launch_config.cache_clear()
    config = launcher._launch_config(device)
    launcher._launch_config.cache_clear()
    assert config is launcher.DEFAULT_HIP_LAUNCH
    assert not getattr(config, "is_nvidia", False)


def test_a_missing_dtype_is_said_with_what_works(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a T4")
    monkeypatch.setattr(backends, "_current_gpu", lambda: gpu)
    faults = {torch.bfloat16: "too old"}
    monkeypatch.setattr(backends, "_probe", lambda device, dtype: faults.get(dtype))
    status = available_backends()["triton"]
    assert status == (True, "kernels for a T4, but not for bfloat16: too old")
    assert available_backends(torch.bfloat16)["triton"] == (False, "too old")
    assert available_backends(torch.float16)["triton"] == (True, "kernels for a T4")
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run here: too old"):
        swiglu_stats(x, x, backend="triton")
