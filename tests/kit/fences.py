"""The fenced blocks of the pages that users read, and the commands in them, checked or run.

A block says its language. Of `bash` every line is a command: of relneuron, whose words the command
line itself takes or refuses, or one of the few others that `check_other` knows. A page that sets a
variable (M=relneuron/demo/checkpoint) is run from there on: its commands, its Python, and its
`console` blocks, which show what a command prints.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer

from relneuron.artifact.planned import Planned
from relneuron.artifact.stage import load
from relneuron.cli.flags import Command, command
from relneuron.cli.main import OWN_WORDS, stages
from tests.conftest import ROOT
from tests.kit.corpus_commands import Result

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LANGUAGES = ("python", "json", "bash", "console", "text")
# What stands in a command for something of the reader's own: MODEL, DIR/neurons.json.
_PLACEHOLDER = re.compile(r"(?<![\w$.])[A-Z][A-Z_]+(?![\w.])")
_ASSIGNS = re.compile(r"([A-Za-z_]+)=(.*)")


class Fence(NamedTuple):
    """A block between lines of three backticks."""

    language: str
    text: str
    line: int


def fences(path: Path) -> list[Fence]:
    """The blocks of a page in their order; a command stands in one of them, or within a line."""
    found: list[Fence] = []
    inside: list[str] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if inside is None and re.match(r"\s+```|\s*~~~|\s+(\$ )?relneuron [a-z]+ ", line):
            raise AssertionError(f"{path}:{number}: a block of another kind: {line}")
        if line.startswith("```"):
            if inside is None:
                inside, language, first = [], line[3:], number
            else:
                found.append(Fence(language, "\n".join(inside) + "\n", first))
                inside = None
        elif inside is not None:
            inside.append(line)
    assert inside is None, f"{path}: a block that begins in line {first} does not end"
    return found


def command_lines(text: str) -> list[list[str]]:
    """The words of every command, without comments; one that goes on in the next line is one."""
    lines = re.sub(r"\\\n\s*", "", text).replace(" && ", "\n").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# --- commands that are only checked ------------------------------------------------------------


@functools.cache
def command_line() -> Any:
    """The command line, whose commands take their words as ever, and then do nothing."""
    app = typer.Typer()
    app.callback()(lambda: None)
    for stage in stages():
        function = load(stage.run)
        # These two say themselves which options a method takes; what they run is put out of action.
        asks = function if stage.name in ("identify", "attribute") else _idle(function)
        words = OWN_WORDS if stage.name == "plan" else None
        plan = f"{__name__}:no_plan" if stage.plan else ""
        made = app.command(stage.name, cls=Command, context_settings=words)
        made(command(asks, lambda item: None, plan))
    return typer.main.get_command(app)


def no_plan(**_: object) -> list[Planned]:
    """What a planner gives that is put out of action."""
    return [Planned("nothing", {}, layers=1)]


def _idle(function: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(function)
    def nothing(**_: object) -> None:
        return None

    return nothing


def check_words(words: list[str], monkeypatch: Any) -> None:
    """What the command line says of a command of relneuron; nothing is read or written."""
    monkeypatch.setattr("relneuron.cli.commands.load", lambda name: lambda *_, **__: ())
    command_line()(words, standalone_mode=False)


def check_other(words: list[str]) -> None:
    """A command of another program: of those that pages may show, and with what there is."""
    program = words[0]
    if program == "make":
        phony = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)[0].split()
        assert {*words[1:]} <= {*phony}, words
    elif program in ("python", "python3"):
        assert words[1] == "-m", words
        check_script(words[2], [word for word in words[3:] if word.startswith("--")])
    elif program in ("pip", "uv", "conda"):
        extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for names in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            for name in names.split(","):
                assert re.search(rf"^{name} = \[", extras, re.M), name
    else:
        assert program in ("git", "cd", "pytest", "apt", "dnf"), f"no command is known as {words}"


def check_script(module: str, options: list[str]) -> None:
    """A module of the repository that has a command line, and takes these options."""
    place = ROOT / module.replace(".", "/")
    files = [place / "__main__.py"] if place.is_dir() else [place.with_suffix(".py")]
    if not module.startswith(("bench", "relneuron", "tests")):
        assert module in ("build", "pip", "pytest"), module
        return
    text = files[0].read_text(encoding="utf-8")
    assert "__main__" in text or files[0].name == "__main__.py", module
    if place.is_dir():  # a folder's options may stand beside its __main__
        text = "".join(path.read_text(encoding="utf-8") for path in place.glob("*.py"))
    for option in options:
        assert f'"{option.partition("=")[0]}"' in text, (module, option)


def check_line(words: list[str], monkeypatch: Any) -> None:
    """Any command of a page: raises what is wrong with it."""
    while words and _ASSIGNS.fullmatch(words[0]):
        words = words[1:]
    if not words:
        return
    if words[0] == "torchrun":
        words = words[words.index("relneuron") :]
    if words[0] == "relneuron":
        check_words(words[1:], monkeypatch)
    else:
        check_other(words)


# --- pages that are run ------------------------------------------------------------------------

Keep = Callable[[str, Callable[[Path], object]], Path]


class Shell:
    """The commands of one page, one after the other in the working directory."""

    def __init__(self, call: Callable[..., Result], keep: Keep) -> None:
        self.call = call
        self.keep = keep  # makes a folder of the session once, by its name
        self.known: dict[str, str] = {}

    def runs(self, words: list[str]) -> bool:
        """Whether a command is meant as it stands."""
        text = " ".join(words)
        return bool(self.known) and not _PLACEHOLDER.search(text) and words[0] == "relneuron"

    def bash(self, text: str) -> None:
        """Run a block; each command must end well."""
        for words in command_lines(text):
            if assigned := _ASSIGNS.fullmatch(words[0]):
                self.known[assigned[1]] = assigned[2]
            elif self.runs(words):
                self.begin(words)
                code, out, err = self.run(words)
                assert code == 0, (words, out, err)

    def begin(self, words: list[str]) -> None:
        """Put a whole study where it is asked for, if another page has made it, to go on with."""
        place = Path(words[words.index("-o") + 1]) if "-o" in words else Path()
        if words[1] != "run" or place.exists():
            return

        def make(folder: Path) -> None:
            self.run(words)
            shutil.move(place, folder / place.name)

        digest = hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]
        shutil.copytree(self.keep(f"study-{digest}", make) / place.name, place)

    def run(self, words: list[str]) -> Result:
        """Run a command of relneuron, with what is known put in for its variables."""
        return self.call(*(self._known(word) for word in words[1:]))

    def _known(self, word: str) -> str:
        return re.sub(r"\$([A-Za-z_]+)", lambda found: self.known[found[1]], word)

    def console(self, text: str) -> None:
        """Run what stands behind each $, and compare what it prints; ... is any text."""
        for asked, shown in shown_by(text):
            [words] = command_lines(asked)
            _, out, err = self.run(words)
            pattern = re.escape(shown.strip()).replace(r"\.\.\.", ".*")
            assert re.fullmatch(pattern, (out + err).strip()), (asked, out + err)


def shown_by(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, and what each prints."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        asked, shown = re.fullmatch(r"((?:.*\\\n)*.*)\n((?:.|\n)*)", part).groups()  # type: ignore[union-attr]
        yield asked, shown
