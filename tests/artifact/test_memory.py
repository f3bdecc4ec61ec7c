"""What a process holds in memory, as the system tells it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from relneuron.artifact.memory import peak_bytes, resident_bytes, status_bytes
from tests.conftest import ROOT
from tests.kit.forked import Forked

MIB = 1 << 20


def hold_and_give_back() -> None:
    before = resident_bytes()
    much = np.ones(64 * MIB // 8)
    held = resident_bytes()
    del much
    print(json.dumps([before, held, resident_bytes(), peak_bytes()]))


@pytest.mark.skipif(status_bytes("VmHWM") is None, reason="only the peak is told")
def test_a_peak_is_remembered() -> None:
    said, _ = Forked(hold_and_give_back).said()
    before, held, after, peak = json.loads(said)
    assert held - before > 60 * MIB and held - after > 60 * MIB
    assert abs(peak - held) < 4 * MIB
    assert status_bytes("VmRSS", os.getpid()) and status_bytes("VmNone") is None


def test_where_the_system_tells_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("relneuron.artifact.memory.PROCESSES", tmp_path)
    assert status_bytes("VmRSS") is None
    peak = peak_bytes()
    assert peak is None or (peak > MIB and resident_bytes() >= peak)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_bytes() is None and resident_bytes() == 0


KEPT = """
import sys
from relneuron.artifact.memory import keep_freed, resident_bytes
if sys.argv[1] == "kept":
    keep_freed()
large = bytearray(1 << 26)
large = None
print(resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's malloc")
def test_what_is_freed_stays_with_the_process() -> None:
    kept, plain = (
        int(subprocess.check_output([sys.executable, "-c", KEPT, way], text=True, cwd=ROOT))
        for way in ("kept", "plain")
    )
    assert kept - plain == pytest.approx(1 << 26, rel=0.1)
