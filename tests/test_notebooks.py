"""The notebooks of examples/ run cell by cell, as they stand there, and hold no outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    data = json.loads(path.read_text(encoding="utf-8"))
    assert (data["nbformat"], data["nbformat_minor"]) == (4, 5)
    found: list[dict[str, Any]] = data["cells"]
    return found


def run(path: Path) -> dict[str, Any]:
    """The names that a notebook leaves, its last expressions evaluated as a notebook does."""
    found: dict[str, Any] = {}
    for cell in cells(path):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, {cell['id']}", "exec"), found)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_stripped(path: Path) -> None:
    for cell in cells(path):
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert len({cell["id"] for cell in cells(path)}) == len(cells(path))


@pytest.mark.slow
def test_the_relation_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(ROOT / "examples" / "relation_study.ipynb")
    own = found["own"].set_index("relation")["drop"]
    others = found["study"].drops.query("not own")["drop"]
    assert len(own) == 4 and own.mean() > 0.1 and own.mean() > 5 * others.mean()
    assert found["before"] != found["after"]
    assert found["study"]._repr_html_().count("missing") == 1  # no sentences were asked for
    assert (tmp_path / "relation_study" / "report.html").is_file()


@pytest.mark.slow
def test_the_corpus_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(ROOT / "examples" / "corpus_study.ipynb")
    found = run(ROOT / "examples" / "corpus_study.ipynb")  # once more, as one does
    rise = found["rise"]
    assert len(rise) == 5
    for group, costs in rise.iterrows():
        assert costs.idxmax() == group and costs[group] > 0.02
    assert "missing" not in found["study"]._repr_html_()
