"""bench.patching: its contestants say the same tokens, and one that does not ends the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bench.patching
from bench.patching import main
from tests.kit.files import read_rows

SMALL = ["--layers", "1", "--width", "96", "--hidden", "64", "--prompts", "4", "--longest", "9"]
SMALL += ["--tokens", "3", "--rounds", "1", "--share", "0.5"]


def test_three_contestants_and_their_ratios(tmp_path: Path) -> None:
    assert main([*SMALL, "-o", str(tmp_path / "rows.csv")]) == 0
    rows = read_rows(tmp_path / "rows.csv")
    assert [row["contestant"] for row in rows] == ["relneuron", "loop, batched", "loop, batch 1"]
    assert rows[0]["ratio"] == "1.0" and {row["patched"] for row in rows} == {"48"}


def test_a_loop_that_does_not_patch_is_no_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    true = bench.patching.patched_loop

    def unpatched(a: Any, b: Any, downs: Any, chosen: Any, *others: Any) -> Any:
        return true(a, b, downs, {}, *others)

    monkeypatch.setattr(bench.patching, "patched_loop", unpatched)
    with pytest.raises(AssertionError, match="says otherwise"):
        main(SMALL)
