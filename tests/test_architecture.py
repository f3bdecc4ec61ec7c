"""The shape of the code base, read from its syntax trees: who imports whom, how files open.

cli -> study -> methods -> {ablation, analyses} -> {model, texts, report} -> {ops, artifact}, never
back.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import relneuron
from relneuron.methods import NAMES
from tests.conftest import ROOT

PACKAGE = ROOT / "relneuron"
# The rooms, and which of the others each may import. The rooms of the kernels and the files need
# none; a method needs no other method.
_STUDY = {"artifact", "model", "texts", "report", "ablation", "analyses", "ops"}
_METHODS = [f"methods.{name}" for name in NAMES]
ROOMS = {
    "ops": {"_cpu"},
    "testing": {"ops"},
    "artifact": set(),
    "texts": {"artifact"},
    "model": {"ops", "artifact", "texts"},
    "report": {"artifact"},
    "ablation": {"artifact", "model", "texts"},
    "analyses": {"artifact", "report"},
    "methods": {"artifact"},
    **dict.fromkeys(_METHODS, _STUDY),
    "bench": {"ops", "testing", "artifact"},
    "demo": {"artifact", "texts", "model"},
    "study": _STUDY | {"methods", *_METHODS},
    "cli": _STUDY | {"methods", *_METHODS, "bench", "demo", "study"},
}


def room_of(name: str) -> str:
    """The room of `relneuron.a.b.c`: the folder, in `methods` the folder in it."""
    parts = name.split(".")[1:]
    return ".".join(parts[: 2 if ".".join(parts[:2]) in ROOMS else 1])


def imports_of(path: Path) -> set[str]:
    """The rooms of everything that a file imports of ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {room_of(name) for name in found if name.startswith("relneuron.")}


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    own = room_of(".".join(("relneuron", *path.relative_to(PACKAGE).parts)).removesuffix(".py"))
    assert imports_of(path) <= ROOMS[own.removesuffix(".__init__")] | {own}


def floor(room: str) -> int:
    """How many rooms are below a room, one upon the other; a circle would not end."""
    return 1 + max((floor(below) for below in ROOMS.get(room, ())), default=0)


def test_the_rooms_stand_on_at_most_seven_floors() -> None:
    assert max(map(floor, ROOMS)) <= 7


def test_the_corridor_is_short() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.suffix in ("", ".py")]) <= 16


def test_only_the_command_line_prints() -> None:
    for path in SOURCES:
        if path.parent.name in ("cli", "demo"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            assert not (called and node.func.id == "print"), path  # type: ignore[union-attr]


NO_EXTRAS = """
import sys
for name in ("transformers", "pydantic", "typer", "rich", "triton", "matplotlib", "jinja2",
             "tqdm", "filelock", "scipy", "tokenizers", "accelerate"):
    sys.modules[name] = None
import torch, numpy
"""


def test_the_package_needs_only_its_core_dependencies() -> None:
    """torch, numpy and safetensors: everything else is needed by the command line or a stage."""
    code = """
import relneuron
assert callable(relneuron.ablate) and callable(relneuron.instrument)
assert relneuron.find_gated_mlps is relneuron.find_mlps
from relneuron import *
assert NeuronFile is relneuron.NeuronFile and set(relneuron.__all__) <= set(dir(relneuron))
"""
    subprocess.run([sys.executable, "-c", NO_EXTRAS + code], check=True, cwd=ROOT)


def test_the_ops_and_their_contract_need_only_torch_and_numpy() -> None:
    code = """
sys.modules["safetensors"] = sys.modules["pytest"] = None
import relneuron.ops
import relneuron.testing
stats = relneuron.ops.GroupStats(groups=1, width=5)
x = torch.ones(3, 5)
relneuron.ops.swiglu_stats(x, x, stats=stats)
assert stats.count["act"].tolist() == [[3] * 5]
relneuron.testing.check_backend(relneuron.ops.swiglu_stats, max_elements=0)
ours = {name for name in set(sys.modules) if name.startswith("relneuron.")}
allowed = ("relneuron.ops", "relneuron.testing", "relneuron._cpu")
assert all(name.startswith(allowed) for name in ours), ours
"""
    subprocess.run([sys.executable, "-c", NO_EXTRAS + code], check=True, cwd=ROOT)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'relneuron' has no attribute 'instument'"):
        relneuron.instument  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    code = "import relneuron, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for pattern in (
            "relneuron/**/*.py",
            "tests/**/*.py",
            "examples/*.py",
            "bench/**/*.py",
            "csrc/*",
            "*.toml",
            "*.txt",
        )
        for path in ROOT.glob(pattern)
    )
    + [ROOT / "Makefile"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_file_opens_with_what_it_is_for(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    opening = {".py": '"""', ".cpp": "//", ".h": "//", ".j2": "{#"}.get(path.suffix, "#")
    assert first.startswith(opening)
    assert len(first) > 30
