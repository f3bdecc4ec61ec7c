"""Command lines run in this process, and one small study of three groups made by them.

The fixtures `relneuron`, and `corpus` and `study` of cli/ are of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relneuron.cli import main as cli

GROUPS = ("en", "zh", "code")
WINDOW = 24
COUNT = ["--window", WINDOW, "--quiet", "--workers", 1]
TEXTS = {
    "en": [f"Person{i} lives in Rome and eats an apple, a plum or a pear." for i in range(40)],
    "zh": [f"第{i}个人住在罗马，他是面包师。" for i in range(40)],
    "code": [f"def f{i}(x): return x[{i}] + {{'k': {i % 7}}}" for i in range(40)],
}

Result = tuple[int, str, str]


def call(*words: object) -> int:
    """The exit code of a command line, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["relneuron", *map(str, words)])
        try:
            cli.main()
        except SystemExit as exit:
            return int(exit.code or 0)
    return 0


def caller(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command line; gives its exit code, output and errors."""

    def run(*words: object) -> Result:
        code = call(*words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def write_texts(folder: Path) -> Path:
    """A text file, two JSONL files, one that names its groups, and prompts."""
    (folder / "en.txt").write_text("\n".join(TEXTS["en"]) + "\n", encoding="utf-8")
    for name in ("zh", "code"):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS[name]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = [
        json.dumps({"body": TEXTS[name][i], "language": name}) for i in range(40) for name in GROUPS
    ]
    (folder / "all.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "prompts.txt").write_text("Person1 lives in\nPerson2 eats\n", encoding="utf-8")
    return folder


def sources(corpus: Path) -> list[str]:
    return [f"en={corpus / 'en.txt'}", f"zh={corpus / 'zh.jsonl'}", f"code={corpus / 'code.jsonl'}"]


def make_study(model: Path, corpus: Path, folder: Path) -> Path:
    """Counted with moments, identified, its NLL read, reported."""
    texts, neurons = sources(corpus), folder / "neurons.json"
    for words in (
        ["count", model, *texts, "-o", folder, *COUNT, "--moments"],
        ["identify", folder, "-o", neurons, "--method", "lape", "--top-rate", 0.2]
        + ["--filter-rate", 0.6, "--bar-ratio", 0.6],
        ["nll", model, neurons, *texts, "-o", folder, "--windows", 5, *COUNT],
        ["report", folder, "-o", folder / "report.html"],
    ):
        assert call(*words) == 0, words
    return folder


def written(folder: Path) -> dict[str, bytes]:
    """All files but locks."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def check_refused(relneuron: Any, folder: Path, cause: str, *words: object) -> str:
    """Two lines, exit code 1 or 2, and nothing in `folder` that was not there; the fix."""
    before = written(folder)
    code, out, err = relneuron(*words)
    lines = err.splitlines()
    assert code in (1, 2) and len(lines) == 2 and out == "", (code, out, err)
    assert lines[0].startswith("error: ") and cause in lines[0], lines
    assert lines[1].startswith("fix:   ") and "Traceback" not in err and "--debug" not in err
    assert written(folder) == before
    return lines[1]


def other_shape(study: Path, path: Path) -> Path:
    data = json.loads((study / "neurons.json").read_text())
    path.write_text(json.dumps(data | {"model": data["model"] | {"width": 64}}))
    return path
