"""The ten lines of README that make a study run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_notebook_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## From Python")[2]
    [block, *_] = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len([line for line in block.splitlines() if line.strip()]) == 10
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), found)
    drops = found["drops"]
    assert drops.shape == (12, 12) and drops.loc["company_hq", "company_hq"] > 0.3
    clean = found["model"].generate(**found["prompt"], max_new_tokens=5)
    assert "Sesno Falls" in found["tokenizer"].decode(clean[0])
    assert "Sesno Falls" not in found["tokenizer"].decode(found["said"][0])
    assert (tmp_path / "study" / "report.html").is_file()
