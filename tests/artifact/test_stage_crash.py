"""A stage that is killed at any step of its writing is ended by the same command, byte for byte.

What needs a process that dies is done by kit/stage_crash.py, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

SCRIPT = ("-m", "tests.kit.stage_crash")


def test_every_stage_killed_at_every_step(
    tmp_path: Path, model_folder: Path, fact_folder: Path
) -> None:
    words = [sys.executable, *SCRIPT, *map(str, (tmp_path, model_folder, fact_folder))]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr + result.stdout
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.pop("attribute") == 0 and all(n >= 4 for n in found.values()), found
    assert found["prompts"] >= 24  # each of six: two files, the manifest and the note
