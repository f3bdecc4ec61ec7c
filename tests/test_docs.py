"""Tests of docs/: every block of Python runs, or stands word for word in a file of examples/."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

EXAMPLES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples").glob("*.py"))]


def lines(text: str) -> str:
    """The text without indentation, so that an excerpt can be found."""
    return "\n".join(line.strip() for line in textwrap.dedent(text).strip().splitlines())


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_python_in_docs_runs_or_is_an_excerpt(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some write a study, some read what is beside them
    for name in ("docs", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    namespace: dict[str, Any] = {}
    for block in blocks:
        if not any(lines(block) in lines(example) for example in EXAMPLES):
            exec(compile(block, str(path), "exec"), namespace)
    capsys.readouterr()


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
