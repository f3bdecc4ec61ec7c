"""The source archive and the wheel of it: what is in them, and the wheel at work on its own.

pip builds the wheel as a user's does, with the index that `make` installs from. But the kernels are
compiled without optimisation and for one instruction set, in a sixth of the time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import relneuron
from tests.conftest import ROOT, shared_folder

pytestmark = pytest.mark.slow

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BACKEND = PYPROJECT["build-system"]["requires"][0]
NAME = f"relneuron-{relneuron.__version__}"
# Calls the backend as a frontend does: pip has no word for a source archive.
HOOK = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
QUICK = ("cmake.build-type=Debug", "cmake.define.RELNEURON_LEVELS=portable")


def run(*words: object, cwd: Path, path: Path | None = None) -> str:
    """A command's output; `path` is all of PYTHONPATH, so that our checkout is not on it."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)
    if "No matching distribution" in done.stderr:
        raise LookupError(done.stderr)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def pip(*words: object, cwd: Path) -> str:
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words)
    return run(*command, cwd=cwd)


class Built(NamedTuple):
    sdist: Path
    wheel: Path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    def make(folder: Path) -> None:
        quick = [word for setting in QUICK for word in ("--config-settings", setting)]
        try:
            pip("install", "--target", "backend", BACKEND, cwd=folder)
            run(sys.executable, "-c", HOOK, folder, cwd=ROOT, path=folder / "backend")
            pip("wheel", "--no-deps", *quick, f"{NAME}.tar.gz", cwd=folder)
        except LookupError as error:
            (folder / "lacking").write_text(str(error), encoding="utf-8")

    folder = shared_folder(tmp_path_factory, "built", make)
    if (folder / "lacking").exists():
        pytest.skip("no index that has what builds relneuron")
    [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Built(sdist, wheel)


def files_of(room: str) -> set[str]:
    """The files of a room of the checkout, without what is made of them."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".pyd")
    }


def test_a_source_archive_holds_what_builds_and_tests_it(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    for room in ("relneuron", "csrc", "tests", "examples", "docs", "bench"):
        assert {name for name in names if name.startswith(f"{room}/")} == files_of(room)
    others = {"CMakeLists.txt", "Makefile", "constraints.txt", ".ci/run", "LICENSE", "CITATION.cff"}
    assert others | {"pyproject.toml", "README.md", "CHANGELOG.md"} <= names


def test_a_wheel_holds_the_package_and_its_kernels(built: Built) -> None:
    about = f"{NAME}.dist-info"
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {*wheel.namelist()}
        meta = message_from_bytes(wheel.read(f"{about}/METADATA"))
        scripts = wheel.read(f"{about}/entry_points.txt").decode()
    [kernels] = {name for name in names if name.startswith("relneuron/_cpu.")}
    assert {n for n in names if not n.startswith(about)} == files_of("relneuron") | {kernels}
    assert "relneuron/py.typed" in names and f"{about}/licenses/LICENSE" in names
    assert meta["Version"] == relneuron.__version__ and meta["License-Expression"] == "MIT"
    assert "relneuron = relneuron.__main__:program" in scripts


@pytest.fixture(scope="session")
def place(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; what relneuron needs is lent by the one of the tests."""

    def make(folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        [library] = folder.rglob("site-packages")
        lent = Path(torch.__file__).parents[1]
        (library / "lent.pth").write_text(str(lent), encoding="utf-8")
        pip("--python", folder, "install", "--no-deps", "--no-index", built.wheel, cwd=folder)

    return shared_folder(tmp_path_factory, "place", make)


def test_the_wheel_works_outside_of_the_checkout(place: Path, tmp_path: Path) -> None:
    [command] = (*place.glob("bin/relneuron"), *place.glob("Scripts/relneuron.exe"))
    rows = [
        re.split(" {2,}", line, maxsplit=1)
        for line in run(command, "doctor", cwd=tmp_path).splitlines()
    ]
    said = dict(rows)
    assert said["installed"].startswith(f"a wheel, by pip: {place}")
    assert said["relneuron"] == relneuron.__version__
    assert said["backend cpu"] == "works: C++ kernels, using portable of ['portable']"
    words = ("--analyses", "main", "--random-seeds", 1, "--top", 20, "--quiet")
    page = run(command, "demo", "-o", "study", *words, cwd=tmp_path).splitlines()[-1]
    assert "report.html" in page and (tmp_path / "study" / "report.html").stat().st_size > 100_000
