"""The package's own files agree: versions, Pythons and systems stand in several of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import relneuron
from tests.conftest import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# The systems that relneuron has kernels for: GitHub's machines, and the word of the classifiers.
SYSTEMS = {"ubuntu": "Linux", "macos": "MacOS", "windows": "Windows"}


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_version_stands_in_one_place_and_is_repeated_right() -> None:
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    [provider] = PYPROJECT["tool"]["dynamic-metadata"]
    text = (ROOT / provider["input"]).read_text(encoding="utf-8")
    found = re.findall(r'^__version__ = "(.+)"$', text, re.M)
    assert found == [relneuron.__version__]
    assert read_yaml(ROOT / "CITATION.cff")["version"] == relneuron.__version__
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert relneuron.__version__ in changes[:2]  # above it what is of no version yet


def test_the_citation_has_what_its_format_asks_for() -> None:
    cited = read_yaml(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= {*cited}
    assert cited["license"] == PROJECT["license"] and cited["title"].startswith("relneuron")
    assert cited["repository-code"] == PROJECT["urls"]["Repository"]
    for reference in cited["references"]:
        assert {"type", "title", "authors"} <= {*reference}


def pythons() -> list[str]:
    prefix = "Programming Language :: Python :: 3."
    return [c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)]


def test_wheels_are_of_the_pythons_that_are_named() -> None:
    assert PROJECT["requires-python"] == f">=3.{pythons()[0]}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == f"3.{pythons()[0]}"
    built = PYPROJECT["tool"]["cibuildwheel"]
    assert built["build"] == [f"cp3{minor}-*" for minor in pythons()]
    assert {*built["test-extras"]} <= {*PROJECT["optional-dependencies"]}
    assert {"linux", "macos", "windows"} <= {*built}


def test_every_system_is_checked_and_has_wheels() -> None:
    for name in ("check", "wheels"):
        workflow = read_yaml(ROOT / ".github" / "workflows" / f"{name}.yml")
        machines = workflow["jobs"][name]["strategy"]["matrix"]["os"]
        assert {machine.split("-")[0] for machine in machines} == {*SYSTEMS}
    said = " ".join(PROJECT["classifiers"])
    assert all(word in said for word in SYSTEMS.values())


def test_every_python_is_checked() -> None:
    """The first on all systems, each other one on Linux."""
    check = read_yaml(ROOT / ".github" / "workflows" / "check.yml")["jobs"]["check"]
    matrix = check["strategy"]["matrix"]
    others = [one["python"] for one in matrix["include"] if one["os"].startswith("ubuntu")]
    assert [*matrix["python"], *others] == [f"3.{minor}" for minor in pythons()]
    [setup] = [step for step in check["steps"] if "setup-python" in step.get("uses", "")]
    assert setup["with"]["python-version"] == "${{ matrix.python }}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_there_is(path: Path) -> None:
    workflow = read_yaml(path)
    assert workflow["name"] == path.stem and workflow["permissions"] == {"contents": "read"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {*re.findall(r"^(\w+):", makefile, re.M)}
    for job in workflow["jobs"].values():
        assert "runs-on" in job
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert {*re.findall(r"\bmake (\w+)", step.get("run", ""))} <= targets


def test_the_gate_needs_no_workflow() -> None:
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "make test" in gate and "github" not in gate.lower()
