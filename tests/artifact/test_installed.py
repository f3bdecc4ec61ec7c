"""Installations that lack something: every command says so before it starts, and what to type.

A package is taken away by `sys.modules[name] = None`, which makes its import fail.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

import relneuron as relneuron_package
from relneuron.artifact import installed
from relneuron.artifact.installed import EXTRAS, PROJECTS, install_command, missing
from relneuron.cli.main import app, stages
from tests.conftest import ROOT
from tests.kit.corpus_commands import (
    COUNT,
    check_refused,
    make_study,
    sources,
    write_texts,
)

NEEDS = {stage.name: stage.needs for stage in stages()}

OF_EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def without(*packages: str, words: list[object]) -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own that cannot import `packages`."""
    code = f"""
import sys
for name in {packages!r}:
    sys.modules[name] = None
sys.argv = ["relneuron", *{list(map(str, words))!r}]
from relneuron.__main__ import main
main()
"""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )


# Torch is imported once for all of them; every command is a fork that can import no other package.
FORKS = """
import json, os, sys
import torch
for folder, packages, words in json.load(sys.stdin):
    pid = os.fork()
    if not pid:
        for number in (1, 2):
            os.dup2(os.open(f"{folder}/said.{number}", os.O_WRONLY | os.O_CREAT), number)
        for name in packages:
            sys.modules[name] = None
        sys.argv = ["relneuron", *words]
        from relneuron.__main__ import main
        main()
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_each_package_is_of_its_extra() -> None:
    for package, extra in EXTRAS.items():
        names = [re.split(r"[\[<>=;]", line)[0] for line in OF_EXTRAS[extra]]
        assert PROJECTS.get(package, package) in names, package
    assert {*NEEDS} == {command.name for command in app.registered_commands}
    assert {name for needed in NEEDS.values() for name in needed} <= {*EXTRAS}


@pytest.mark.parametrize("words", [[], ["--help"], ["demo"], ["doctor"]], ids=str)
def test_without_extras_there_is_no_command_line(words: list[object]) -> None:
    done = without(*EXTRAS, words=words)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "" and len(lines) == 2, done.stderr
    assert lines[0] == "error: the command line needs typer, rich, pydantic: not installed"
    assert lines[1] == f"fix:   {install_command('all')}"


def test_the_console_script_is_the_module() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"relneuron": "relneuron.__main__:program"}


# --- each command and what it needs ----------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def study(model_folder: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(model_folder, corpus, tmp_path_factory.mktemp("study") / "s")


@pytest.fixture(scope="module")
def command_of(
    model_folder: Path, fact_folder: Path, corpus: Path, study: Path
) -> Callable[[str, Path], list[object]]:
    """The words of a command that does its work, and writes into a folder."""

    def words(name: str, out: Path) -> list[object]:
        prompts, neurons = out / "prompts.jsonl", study / "neurons.json"
        run = ["--random-seeds", 1, "--top", 20, "--quiet"]
        found: dict[str, list[object]] = {
            "demo": ["-o", out / "d", *run, "--analyses", "main"],
            "run": [model_folder, "--facts", fact_folder, "-o", out / "r", "--eva", 8, *run],
            "prompts": [fact_folder, "-o", prompts, "--eva", 8],
            "record": [model_folder, prompts, "-o", out / "s"],
            "identify": [study, "-o", out / "n.json", "--method", "lape"],
            "ablate": [model_folder, neurons, prompts, "-o", out / "e.csv"],
            "attribute": [model_folder, prompts, "-o", out / "a"],
            "count": [model_folder, *sources(corpus), "-o", out / "c", *COUNT],
            "nll": [model_folder, neurons, *sources(corpus), "-o", out / "l", *COUNT],
            "merge": [study, study, "-o", out / "m"],
            "generate": [model_folder, corpus / "prompts.txt", "--neurons", neurons]
            + ["--off", "en", "--max-new-tokens", 2, "-o", out / "g.jsonl"],
            "contrast": [model_folder, model_folder, prompts, "-o", out / "c"],
            "probe": [model_folder, prompts, "-o", out / "p", "--apply", out / "a.safetensors"],
            "eval": [model_folder, "--neurons", neurons, "--tasks", "t", "-o", out / "v"],
            "effect": [out / "g.jsonl", "-o", out / "e.csv", "--cost", "c.csv:cost"],
            "import": [out / "a.pth", "--model", model_folder, "--names", "a", "-o", out / "i"],
            "export": [neurons, "-o", out / "n.pth"],
            "edit": [model_folder, neurons, prompts, "-o", out / "edited"],
            "look": [study, "-o", out / "l.html"],
            "report": [study, "-o", out / "r.html"],
            "doctor": [],
            "plan": ["record", model_folder, prompts, "-o", out / "r"],
        }
        return [name, *found[name]]

    return words


@pytest.mark.parametrize(
    ("name", "package"), [(name, package) for name, needed in NEEDS.items() for package in needed]
)
def test_what_a_command_needs_is_checked_before_it_starts(
    relneuron: Any,
    command_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    cause = f"relneuron {name} needs {package}, which is not installed"
    fix = check_refused(relneuron, tmp_path, cause, *command_of(name, tmp_path))
    assert fix == f"fix:   {install_command(EXTRAS[package])}"


@pytest.mark.slow
def test_a_command_needs_nothing_else(command_of: Any, tmp_path: Path) -> None:
    asked = []
    for name in ("prompts", "identify", "export", "count", "generate", "doctor"):
        needed = (*NEEDS.get(name, ()), "typer", "rich", "pydantic")
        folder = tmp_path / name
        folder.mkdir()
        words = [*map(str, command_of(name, folder))]
        asked.append((str(folder), [package for package in EXTRAS if package not in needed], words))
    command = [sys.executable, "-c", FORKS]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, cwd=ROOT, check=True
    )
    for (folder, *_), code in zip(asked, done.stdout.split(), strict=True):
        assert code == "0", (folder, (Path(folder) / "said.2").read_text())


def test_a_model_is_only_checked_with_its_library(
    relneuron: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, _ = relneuron("doctor")
    said = f"extra hf without transformers: {install_command('hf')}"
    assert code == 0 and said in [" ".join(line.split()) for line in out.splitlines()]
    lines = dict(re.findall(r"^(commands|without \S+|installed) +(.*)$", out, re.M))
    asking = {name for name, needed in NEEDS.items() if "transformers" in needed}
    assert {*lines["without transformers"].removeprefix("no ").split(", ")} == asking
    ready = lines["commands"].removesuffix(": all they need is there").split(", ")
    assert {*ready} == {*NEEDS} - asking and str(ROOT) in lines["installed"]
    code, out, err = relneuron("doctor", model_folder)
    assert code == 1 and "needs transformers" in err and "[hf]" in err


def test_tables_that_need_a_package(
    relneuron: Any, command_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["bench", "--quick", "-o", tmp_path / "b"]
    fix = check_refused(relneuron, tmp_path, "relneuron bench -o needs matplotlib", *words)
    assert "[plot]" in fix
    for package, text in (("pyarrow", "a.parquet"), ("datasets", "hf:x")):
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / "a.parquet").write_bytes(b"")
        place = text if ":" in text else tmp_path / text
        words = ["count", tmp_path / "no model", f"en={place}", "-o", tmp_path / "o"]
        assert "[data]" in check_refused(relneuron, tmp_path, f"needs {package}", *words)


# --- what to type ----------------------------------------------------------------------------


class Installed:
    """What importlib.metadata knows of an installation."""

    version = relneuron_package.__version__
    requires = ["torch>=2.10", "matplotlib>=3.10; extra == 'plot'", "scipy >=1.15 ; extra=='stats'"]

    def __init__(self, origin: object, installer: str = "pip") -> None:
        self.files = {"direct_url.json": origin and json.dumps(origin), "INSTALLER": installer}

    def read_text(self, name: str) -> Any:
        return self.files[name]


VCS = {"vcs": "git", "commit_id": "abc", "requested_revision": "main"}


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ({"url": "file://{}", "dir_info": {"editable": True}}, ["-e", "{}[plot,stats]"]),
        ({"url": "file://{}", "dir_info": {}}, ["{}[plot,stats]"]),
        ({"url": "file://{}/gone", "dir_info": {}}, ["scipy>=1.15", "matplotlib>=3.10"]),
        (
            {"url": "https://h.org/r.git", "vcs_info": VCS},
            ["relneuron[plot,stats] @ git+https://h.org/r.git@abc"],
        ),
        (
            {"url": "ssh://git@h.org/r", "vcs_info": VCS, "subdirectory": "py"},
            ["relneuron[plot,stats] @ git+ssh://git@h.org/r@abc#subdirectory=py"],
        ),
        (
            {"url": "https://h.org/r.whl", "archive_info": {}},
            ["relneuron[plot,stats] @ https://h.org/r.whl"],
        ),
        (
            {"url": "file://{}/r.whl", "archive_info": {}},
            ["relneuron[plot,stats] @ file://{}/r.whl"],
        ),
        ({"url": "file://{}/gone.whl", "archive_info": {}}, ["scipy>=1.15", "matplotlib>=3.10"]),
        (None, ["scipy>=1.15", "matplotlib>=3.10"]),
    ],
)
def test_the_command_fits_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: Any, command: list[str]
) -> None:
    place = tmp_path / "a folder"
    place.mkdir()
    (place / "r.whl").write_text("")
    if origin:
        origin = origin | {"url": origin["url"].replace("{}", place.as_uri()[len("file://") :])}
    # As in site-packages: no source beside the package.
    monkeypatch.setattr(installed, "__file__", str(tmp_path / "relneuron" / "installed.py"))
    monkeypatch.setattr(installed, "distribution", lambda name: Installed(origin))
    uri = place.as_uri()[len("file://") :]
    expected = [
        word.replace("file://{}", f"file://{uri}").replace("{}", str(place)) for word in command
    ]
    assert shlex.split(install_command("plot", "stats")) == ["pip", "install", *expected]
    monkeypatch.setattr(installed, "distribution", lambda name: Installed(origin, "uv"))
    assert install_command("plot").startswith("uv pip install ")


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (None, ""),
        ({"url": "file:///w/relneuron.whl", "archive_info": {}}, ", of file:///w/relneuron.whl"),
        ({"url": "file:///src", "dir_info": {}}, ", of file:///src"),
        ({"url": "https://h.org/r.git", "vcs_info": VCS}, ", of https://h.org/r.git, commit abc"),
    ],
)
def test_a_wheel_says_what_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: Any, said: str
) -> None:
    monkeypatch.setattr(installed, "__file__", str(tmp_path / "relneuron" / "artifact" / "i.py"))
    monkeypatch.setattr(installed, "distribution", lambda name: Installed(origin, "uv"))
    assert installed.how_installed() == f"a wheel, by uv: {tmp_path}{said}"
    monkeypatch.setattr(Installed, "version", "0.0.1")
    assert installed.how_installed().endswith(", but installed as 0.0.1: install it again")


def test_a_source_tree_says_whether_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "commit", lambda: "abc+dirty")
    about: dict[str, Any] = {"url": ROOT.as_uri(), "dir_info": {"editable": True}}
    monkeypatch.setattr(installed, "distribution", lambda name: Installed(about))
    assert installed.how_installed() == f"editable, by pip: {ROOT}, commit abc+dirty"
    about["url"] = ROOT.parent.as_uri()
    assert installed.how_installed().startswith(f"not installed, run where it lies: {ROOT}, comm")
    monkeypatch.setattr(installed, "commit", lambda: "-")
    monkeypatch.setattr(installed, "distribution", unknown)
    assert installed.how_installed() == f"not installed, run where it lies: {ROOT}"


def test_the_commit_is_that_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        set_up = ("-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path))
        return subprocess.run(
            ("git", *set_up, *words), check=True, capture_output=True, text=True
        ).stdout

    file = tmp_path / "relneuron" / "artifact" / "installed.py"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(installed, "__file__", str(file))
    assert installed.commit() == "-"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    name = git("rev-parse", "HEAD")[:12]
    assert installed.commit() == name
    file.write_text("changed", encoding="utf-8")
    assert installed.commit() == f"{name}+dirty"
    within = tmp_path / "relneuron" / "lib" / "relneuron" / "artifact" / "installed.py"
    monkeypatch.setattr(installed, "__file__", str(within))
    assert installed.commit() == "-"  # in site-packages within somebody's checkout


def unknown(name: str) -> None:
    raise PackageNotFoundError(name)


def test_the_command_of_a_source_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "distribution", unknown)
    assert shlex.split(install_command("hf")) == ["pip", "install", f"{ROOT}[hf]"]


def test_no_text_gives_a_command_of_an_index() -> None:
    for path in (ROOT / "relneuron").rglob("*.py"):
        assert "pip install 'relneuron" not in path.read_text(encoding="utf-8"), path


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing("typer", "rich") == []
    monkeypatch.setitem(sys.modules, "rich", None)
    assert missing("typer", "rich", "no_such_package") == ["rich", "no_such_package"]
