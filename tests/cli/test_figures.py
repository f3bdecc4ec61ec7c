"""`report --figures`: beside a page or alone, and what it refuses before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.kit.corpus_commands import check_refused
from tests.kit.files import contents
from tests.kit.gradient_studies import write_fact_study

KEYS = ("changes", "sizes", "layers", "consistency", "completeness")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_fact_study(tmp_path / "study")


def test_figures_beside_the_page_and_alone(relneuron: Any, study: Path) -> None:
    out = study.parent / "figures"
    code, said, err = relneuron("report", study, "--figures", out, "--format", "svg")
    assert code == 0, err
    assert said == f"figures: 16 files in {out}\n" and not (study / "report.html").exists()
    names = {f"{key}.{kind}" for key in KEYS for kind in ("svg", "csv", "txt")}
    assert {*contents(out)} == names | {"references.bib"}
    alone, page = contents(out), study / "report.html"
    words = ["report", study, "--figures", out, "--format", "svg", "-o", page]
    fix = check_refused(relneuron, study.parent, "exists", *words)
    assert "--force" in fix
    code, said, err = relneuron(*words, "--force")
    assert code == 0 and said.splitlines()[-1] == f"report: {page}", err
    assert contents(out) == alone and page.exists()


def test_a_page_that_is_there_stops_the_figures_too(relneuron: Any, study: Path) -> None:
    (study.parent / "page.html").write_text("mine")
    words = ["report", study, "-o", study.parent / "page.html", "--figures", study.parent / "out"]
    check_refused(relneuron, study.parent, "page.html exists", *words)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ([], "report writes nothing"),
        (["--figures", "out", "--width", "3.3"], "--width '3.3' is no width"),
        (["--figures", "out", "--width", "1cm"], "--width 1cm is 0.394in"),
        (["--figures", "out", "--format", "jpg"], "unknown --format 'jpg'"),
        (["--figures", "study"], "study has files of a study in it"),
        (["--figures", "study/neurons.json"], "is a file"),
        (["--figures", "study/neurons.json/x"], "is a file"),
    ],
)
def test_what_is_refused(
    relneuron: Any, study: Path, words: list[str], cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study.parent)
    check_refused(relneuron, study.parent, cause, "report", study, *words, "--force")
