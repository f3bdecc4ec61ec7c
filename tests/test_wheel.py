"""The wheel and the source archive: what is in them, and the wheel at work outside of the checkout.

pip builds the wheel as a user's does, with the index that `make` installs from; what `make` has
compiled in build/ is not compiled again.
"""

from __future__ import annotations

import os
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
NAME = f"relneuron-{relneuron.__version__}"
# Calls the backend as a frontend does: pip has no word for a source archive.
HOOK = "import sys; from scikit_build_core import build; getattr(build, sys.argv[1])(*sys.argv[2:])"
BARE = HOOK.replace("(*sys.argv[2:])", "(sys.argv[2], {'wheel.cmake': 'false'})")


def run(*words: object, cwd: Path, path: Path | None = None) -> str:
    """A command's output; `path` is all of PYTHONPATH, so that our checkout is not on it."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)
    if "No matching distribution" in done.stderr:
        pytest.skip("no index that has what builds relneuron")
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def pip(*words: object, cwd: Path) -> str:
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words)
    return run(*command, cwd=cwd)


class Built(NamedTuple):
    wheel: Path
    sdist: Path
    backend: Path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    def make(folder: Path) -> None:
        pip("install", "--target", "backend", PYPROJECT["build-system"]["requires"][0], cwd=folder)
        command = (sys.executable, "-c", HOOK, "build_sdist", folder)
        run(*command, cwd=ROOT, path=folder / "backend")
        pip("wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)

    folder = shared_folder(tmp_path_factory, "built", make)
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Built(wheel, sdist, folder / "backend")


def sources() -> set[str]:
    """The files of the package, by their paths in the checkout, without what is made of them."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "relneuron").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".pyd")
    }


def test_a_wheel_holds_the_package_and_its_kernels(built: Built) -> None:
    about = f"{NAME}.dist-info"
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {*wheel.namelist()}
        meta = message_from_bytes(wheel.read(f"{about}/METADATA"))
        scripts = wheel.read(f"{about}/entry_points.txt").decode()
    [kernels] = {name for name in names if name.startswith("relneuron/_cpu.")}
    assert {name for name in names if not name.startswith(about)} == sources() | {kernels}
    assert "relneuron/py.typed" in names and f"{about}/licenses/LICENSE" in names
    assert meta["Version"] == relneuron.__version__ and meta["License-Expression"] == "MIT"
    assert "relneuron = relneuron.__main__:main" in scripts


def test_a_source_archive_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    """But for the kernels, whose sources and recipe are those of the checkout."""
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / NAME
    for file in ("CMakeLists.txt", "pyproject.toml", "Makefile", "constraints.txt", ".ci/run"):
        assert (root / file).read_bytes() == (ROOT / file).read_bytes()
    for room in ("csrc", "tests", "examples", "docs"):
        packed = {p.relative_to(root) for p in (root / room).rglob("*.*")}
        here = {
            p.relative_to(ROOT) for p in (ROOT / room).rglob("*.*") if "__pycache__" not in str(p)
        }
        assert packed == here
    command = (sys.executable, "-c", BARE, "build_wheel", tmp_path)
    run(*command, cwd=root, path=built.backend)
    [again] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(again) as wheel, zipfile.ZipFile(built.wheel) as first:
        for name in sources():
            assert wheel.read(name) == first.read(name) == (ROOT / name).read_bytes()


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
    said = dict(
        line.split(maxsplit=1) for line in run(command, "doctor", cwd=tmp_path).splitlines()
    )
    assert said["installed"].startswith(f"a wheel, by pip: {place}")
    assert said["relneuron"] == relneuron.__version__
    code = "from relneuron.ops import available_backends as a; print(a()['cpu'].works)"
    python = command.with_name("python")
    assert run(python, "-c", code, cwd=tmp_path) == "True\n"
    words = ("--analyses", "main", "--random-seeds", 1, "--top", 20, "--quiet")
    page = run(command, "demo", "-o", "study", *words, cwd=tmp_path).splitlines()[-1]
    assert "report.html" in page and (tmp_path / "study" / "report.html").stat().st_size > 100_000
