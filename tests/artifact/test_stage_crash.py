"""A stage that is killed at any step of its writing is ended by the same command, byte for byte.

What needs a process that dies is done by kit/stage_crash.py, in a process of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kit import stage_crash
from tests.kit.forked import Forked


@pytest.mark.slow
def test_every_stage_killed_at_every_step(
    tmp_path: Path, model_folder: Path, fact_folder: Path
) -> None:
    process = Forked(stage_crash.main, *map(str, (tmp_path, model_folder, fact_folder)))
    assert process.wait(600) == 0, process.said()
    found = json.loads(process.said()[0].splitlines()[-1])
    assert found.pop("attribute") == found.pop("ig") == 0
    assert all(n >= 4 for n in found.values()), found
    assert found["prompts"] >= 24  # each of six: two files, the manifest and the note
