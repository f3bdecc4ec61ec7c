"""Every kernel's PTX, run without a GPU: two calls for each of its flags, against the reference.

They run in a process of their own, as most tests have Triton's interpreter. By hand, for longer:
    python -m tests.ptx --long
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT


@functools.cache
def asked(*words: str) -> dict[str, Any]:
    """What `python -m tests.ptx` says as JSON."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ptx", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("capability", ["90", "80"])
def test_every_kernel_and_flag(capability: str) -> None:
    found = asked("--quick", capability)
    found.pop("forms")
    assert len(found) >= (7 if capability == "80" else 25)
    wrong = {name: said for name, said in found.items() if isinstance(said, str)}
    assert not wrong
