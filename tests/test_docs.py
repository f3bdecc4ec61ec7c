"""Tests of README.md and docs/: every command is one, every block of Python runs, links lead on.

A block of Python that needs more than the page may stand word for word in a file of examples/.
"""

from __future__ import annotations

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
from tests.kit.fences import DOCS, LANGUAGES, PAGES, Shell, check_line, command_lines, fences
from tests.kit.given import GIVEN

# Their studies take longer than eight seconds.
SLOW = ("docs/facts.md",)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {name: {o for p in one.params for o in p.opts} for name, one in COMMANDS.items()}
# A command in a sentence or a table, and what is asked of it.
INLINE = re.compile(rf"`(?:relneuron )?({'|'.join(COMMANDS)})( [^`]*)?`")
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
        asked = fence.text
        if fence.language == "console":
            asked = "".join(re.findall(r"^\$ ((?:.*\\\n)*.*\n)", fence.text, re.M))
        if fence.language in ("bash", "console"):
            for words in command_lines(asked):
                try:
                    check_line(words, monkeypatch)
                except Exception as error:
                    said = f"{path}:{fence.line}: {' '.join(words)}: {error}"
                    raise AssertionError(said) from error
        else:
            assert not re.search(r"^(\$ )?relneuron [a-z]", fence.text, re.M), fence


@each_page
def test_commands_in_sentences_have_their_options(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for name, rest in INLINE.findall(text):
        assert {*FLAG.findall(rest)} <= OPTIONS[name], (name, rest)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] if name_of(path) in SLOW else [])
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
    assert path.parent == ROOT or DOCS in path.parents
