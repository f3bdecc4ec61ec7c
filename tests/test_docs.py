"""Tests of README.md and docs/: every command is one, every block of Python runs, links lead on.

A block of Python that needs more than the page may stand word for word in a file of examples/.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer

from relneuron.cli.main import app
from tests.conftest import ROOT, shared_folder
from tests.kit.corpus_commands import Result
from tests.kit.fences import (
    LANGUAGES,
    PAGES,
    Shell,
    check_line,
    command_lines,
    fences,
    shown_by,
)
from tests.kit.given import GIVEN

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {name: {o for p in one.params for o in p.opts} for name, one in COMMANDS.items()}
# A command in a sentence or a table, and what is asked of it.
INLINE = re.compile(rf"`(?:relneuron )?(?:plan )?({'|'.join(COMMANDS)})( [^`]*)?`")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def lines(text: str) -> str:
    """The text without indentation, so that an excerpt can be found."""
    return "\n".join(line.strip() for line in textwrap.dedent(text).strip().splitlines())


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


EXAMPLES = [lines(path.read_text(encoding="utf-8")) for path in (ROOT / "examples").glob("*.py")]
each_page = pytest.mark.parametrize("path", PAGES, ids=name_of)


def stands_elsewhere(block: str) -> bool:
    """Whether the block is an excerpt of an example, or the notebook of tests/study/test_readme."""
    return 'output="study", top=220' in block or any(lines(block) in one for one in EXAMPLES)


@each_page
def test_every_command_of_a_page_is_one(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what they would write to is looked at
    (tmp_path / "CLASSIFIER").mkdir()
    for fence in fences(path):
        assert fence.language in LANGUAGES, f"{path}:{fence.line}: {fence.language!r}"
        if fence.language == "bash":
            for words in command_lines(fence.text):
                try:
                    check_line(words, monkeypatch)
                except Exception as error:
                    said = f"{path}:{fence.line}: {' '.join(words)}: {error}"
                    raise AssertionError(said) from error
        elif fence.language == "console":  # what is not taken is shown, and is run below
            assert {
                words[0] for asked, _ in shown_by(fence.text) for words in command_lines(asked)
            } == {"relneuron"}
        else:
            assert not re.search(r"^(\$ )?relneuron [a-z]+ ", fence.text, re.M), fence


@pytest.mark.parametrize(
    "line",
    [
        "relneuron count MODEL en=en.txt",
        "relneuron record MODEL prompts.jsonl -o DIR --sites act",
        "relneuron identify DIR -o n.json --method lape --fdr 0.05",
        "relneuron ablate MODEL n.json p.jsonl -o e.csv --mode sometimes",
        "relneuron frobnicate MODEL",
        "torchrun --nproc-per-node 2 -m relneuron count MODEL",
        "make everything",
        "pip install 'relneuron[everything]'",
        "PYTHONPATH=. python -m bench.truth --strength 3",
        "curl example.org",
    ],
)
def test_a_command_that_is_none_is_found(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [words] = command_lines(line)
    with pytest.raises(Exception, match=r"\w"):
        check_line(words, monkeypatch)


def test_what_a_console_block_shows_is_compared(
    relneuron: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shell = Shell(relneuron, lambda name, make: tmp_path)
    fix = "fix:   make it with: relneuron run MODEL --facts DIR -o DIR\n"
    shown = f"$ relneuron report no \\\n    -o r.html\nerror: ... does not exist\n{fix}"
    shell.console(shown)
    for wrong in (shown.replace("exist", "matter"), f"{shown}and more", "$ relneuron --version\n"):
        with pytest.raises(AssertionError):
            shell.console(wrong)


@pytest.mark.parametrize(
    "text", ["```bash\nx", "- a\n  ```bash\n  x\n  ```", "    relneuron run MODEL", "~~~\nx\n~~~"]
)
def test_no_block_is_left_out(text: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(AssertionError):
        fences(tmp_path / "page.md")


@each_page
def test_commands_in_sentences_have_their_options(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for name, rest in INLINE.findall(text):
        assert {*FLAG.findall(rest)} <= OPTIONS[name], (name, rest)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] if "\nM=" in path.read_text() else [])
        for path in PAGES
    ],
    ids=name_of,
)
def test_what_a_page_shows_runs(
    path: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    relneuron: Callable[..., Result],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python, commands and what they print, in the order of the page."""
    monkeypatch.chdir(tmp_path)  # some write a study, some read what is beside them
    for name in ("docs", "bench", "relneuron", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    namespace: dict[str, Any] = GIVEN[name_of(path)]() if name_of(path) in GIVEN else {}
    shell = Shell(relneuron, partial(shared_folder, tmp_path_factory))
    for fence in fences(path):
        if fence.language == "bash":
            shell.bash(fence.text)
        elif fence.language == "console":
            shell.console(fence.text)
        elif fence.language == "python" and not stands_elsewhere(fence.text):
            exec(compile("\n" * fence.line + fence.text, str(path), "exec"), namespace)
    capsys.readouterr()


@each_page
def test_links_between_files_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def said() -> list[tuple[str, re.Pattern[str]]]:
    """Every text of the package: what of it is fixed, and a pattern of what it may become."""
    found = []
    for path in (ROOT / "relneuron").rglob("*.py"):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if node in docstrings or not isinstance(node, ast.JoinedStr | ast.Constant):
                continue
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [str(p.value) if isinstance(p, ast.Constant) else None for p in parts]
            fixed = "".join(text or "" for text in texts)
            if len(fixed) > 8:
                pattern = "".join(".+" if text is None else re.escape(text) for text in texts)
                found.append((fixed, re.compile(pattern)))
    return found


def is_said(text: str, texts: list[tuple[str, re.Pattern[str]]]) -> bool:
    """Whether one text of the package becomes this one; or two, the second behind a colon."""
    own = 0.6 * len(text.replace("...", ""))  # a pattern that is little but gaps says nothing
    if any(len(fixed) > own and pattern.fullmatch(text) for fixed, pattern in texts):
        return True
    places = [match.end() for match in re.finditer(": ", text)]
    return any(
        not text[place:].startswith("...")
        and is_said(f"{text[:place]}...", texts)
        and is_said(text[place:], texts)
        for place in places
    )


def test_every_symptom_in_a_table_is_said_somewhere() -> None:
    """As a whole: what stands for `...` is put in by the package, all else is its text."""
    table = re.compile(r"^\| symptom \|.*\n\|[-|]+\n((?:\|.*\n)+)", re.M)
    found = [rows for path in PAGES for rows in table.findall(path.read_text(encoding="utf-8"))]
    symptoms = [text for rows in found for text in re.findall(r"^\| `([^`]+)` \|", rows, re.M)]
    assert len(symptoms) > 30 and len(symptoms) == sum(rows.count("\n") for rows in found)
    texts = said()
    assert [text for text in symptoms if not is_said(text, texts)] == []
    assert not is_said("the model is in a bad mood", texts)
