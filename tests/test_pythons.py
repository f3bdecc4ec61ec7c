"""What Python 3.12 to 3.14 changed, looked for in the source, as the tests run with one Python.

.github/workflows/check.yml runs all of them with each.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

FILES = [
    path
    for room in ("relneuron", "tests", "bench", "docs", "examples")
    for path in sorted((ROOT / room).rglob("*.py"))
]
# Removed by 3.14, or a DeprecationWarning until they are: tests end at a warning.
GONE = {
    "ast": {"Num", "Str", "Bytes", "NameConstant", "Ellipsis"},
    "asyncio": {"get_event_loop_policy", "set_event_loop_policy", "iscoroutinefunction"},
    "codecs": {"open"},
    "collections.abc": {"ByteString"},
    "datetime": {"utcnow", "utcfromtimestamp"},
    "importlib.abc": {"Traversable", "ResourceReader", "TraversableResources"},
    "importlib.resources": {"contents", "is_resource", "open_binary", "open_text", "read_text"},
    "locale": {"getdefaultlocale"},
    "os": {"popen"},
    "pkgutil": {"find_loader", "get_loader", "ImpImporter"},
    "pty": {"master_open", "slave_open"},
    "typing": {"ByteString", "no_type_check_decorator"},
}
MODULES = {
    "asynchat",
    "asyncore",
    "cgi",
    "crypt",
    "distutils",
    "imp",
    "lib2to3",
    "pipes",
    "telnetlib",
}
ENDS = (ast.Return, ast.Break, ast.Continue)


def name_of(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def leaving(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What leaves a block from within: a SyntaxWarning in `finally` from 3.14 on."""
    for node in body:
        if isinstance(node, ENDS):
            yield node
        inner = isinstance(node, ast.For | ast.While | ast.FunctionDef | ast.ClassDef)
        for name in () if inner else ("body", "orelse", "handlers", "finalbody"):
            parts = getattr(node, name, [])
            yield from leaving([s for part in parts for s in getattr(part, "body", [part])])


def wrong(tree: ast.AST) -> Iterator[str]:
    """What another Python would refuse or do in another way."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = name_of(node.value)
            if node.attr in GONE.get(owner, GONE.get(owner.partition(".")[0], ())):
                yield f"{owner}.{node.attr} is gone"
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            yield from (
                f"{node.module}.{n} is gone" for n in names & GONE.get(node.module or "", set())
            )
            if (node.module or "").partition(".")[0] in MODULES:
                yield f"{node.module} is gone"
        elif isinstance(node, ast.Import):
            yield from (
                f"{a.name} is gone" for a in node.names if a.name.partition(".")[0] in MODULES
            )
        elif isinstance(node, ast.Try) and any(leaving(node.finalbody)):
            yield "finally is left by return, break or continue"
        elif isinstance(node, ast.Call):
            called, given = name_of(node.func), {k.arg for k in node.keywords}
            if called.endswith(("multiprocessing.Process", "multiprocessing.Pool")):
                yield "processes begin as forkserver says from 3.14 on: name a context"
            if called.endswith("ProcessPoolExecutor") and not given & {"mp_context", "initializer"}:
                yield "a pool's processes have the environment of another time from 3.14 on"
            if called.endswith("rmtree") and "onerror" in given:
                yield "rmtree has no onerror"
            if called.endswith((".extractall", ".extract")) and "filter" not in given:
                yield "an archive is extracted without a filter"


def test_no_file_needs_what_a_newer_python_lacks() -> None:
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "\\d" without r is a SyntaxWarning from 3.12 on
        for path in FILES:
            text = path.read_text(encoding="utf-8")
            found[path.name] = [*wrong(compile(text, str(path), "exec", ast.PyCF_ONLY_AST))]
    assert {name: what for name, what in found.items() if what} == {}
    assert len(FILES) > 500


@pytest.mark.parametrize(
    "text",
    [
        "import ast\nast.Num(3)",
        "from pkgutil import find_loader",
        "import distutils.core",
        "import datetime\ndatetime.datetime.utcnow()",
        "def f():\n try:\n  g()\n finally:\n  if h:\n   return 3",
        "for x in y:\n try:\n  g()\n finally:\n  with h:\n   continue",
        "import multiprocessing\nmultiprocessing.Process(target=f)",
        "from concurrent.futures import ProcessPoolExecutor\nProcessPoolExecutor()",
        "archive.extractall(folder)",
        "import shutil\nshutil.rmtree(folder, onerror=f)",
    ],
)
def test_what_is_wrong_is_seen(text: str) -> None:
    assert [*wrong(ast.parse(text))]


def test_what_is_right_is_not() -> None:
    text = "try:\n f()\nfinally:\n for x in y:\n  break\nimport datetime\ndatetime.datetime.now()"
    assert [*wrong(ast.parse(text))] == []
