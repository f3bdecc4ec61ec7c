"""The docs as a site: built without a warning, whole, in order, and read without a network."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from relneuron import ops
from relneuron.artifact.stage import load
from relneuron.cli.main import stages
from relneuron.methods import attributions, rankings
from relneuron.study import stages as study_stages
from relneuron.testing.contract import OPS
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md"))
TEXTS = {page: (DOCS / f"{page}.md").read_text(encoding="utf-8") for page in PAGES}
SHOWN = {
    name: page for page, text in TEXTS.items() for name in re.findall(r"^::: (.+)$", text, re.M)
}


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """docs/site.py, which mkdocs calls."""
    spec = importlib.util.spec_from_file_location("docs_site", DOCS / "site.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_page_shows_is_there_and_says_what_it_is(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert load(f"{module}:{attribute}").__doc__


def test_every_method_has_a_page_with_its_formula_and_its_paper() -> None:
    rows = re.findall(r"^\| \[(.+?)\]\(([^)#]+)", TEXTS["methods/index"], re.M)
    named = {name: target for names, target in rows for name in re.findall(r"`(\w+)`", names)}
    assert {*named} == {*rankings()}
    for name, target in named.items():
        page = (DOCS / "methods" / target).read_text(encoding="utf-8")
        formulas = re.findall(r"^```text\n(.*?)^```|^    (\S.*\n)", page, re.M | re.S)
        assert any("=" in "".join(formula) for formula in formulas), name
        assert re.search(r"arxiv\.org/abs/\d{4}\.\d{5}", page), name
    for name in attributions():
        assert f"attribute --method {name}" in TEXTS["methods/index"] or name == "gain", name


def test_every_op_has_a_page() -> None:
    """Its docstring, a formula, an example that runs (tests/test_docs.py), and its contract."""
    functions = [name for name in ops.__all__ if name[0].islower() and name != "available_backends"]
    pages = {name.rpartition(".")[2]: page for name, page in SHOWN.items()}
    for name in functions:
        page = pages[name]
        assert "```text" in TEXTS[page] and "```python" in TEXTS[page], name
        assert f"ops.{name}(" in TEXTS[page] or name in ("logprob_gain_top", "logprob_gain_vectors")
        assert f"({page.removeprefix('ops/')}.md)" in TEXTS["ops/index"], name
        assert name not in OPS or f'check_backend(mine, "{name}")' in TEXTS[page], name


def test_every_page_has_its_place(site: ModuleType) -> None:
    """Also one that nobody has put into a list."""
    found = site.order([*PAGES, "new", "howto/new", "methods/new", "ops/new", "api/new"])
    places = [page for section in found.values() for page in section]
    assert sorted(places) == sorted(
        [*PAGES, "new", "howto/new", "methods/new", "ops/new", "api/new"]
    )
    assert next(iter(found.items())) == ("Start", ["index", "installing", "python", "symptoms"])
    assert {"new", "howto/new"} <= {*found["How to"]} and "contrast" not in found["How to"]
    assert found["Methods"][0] == "methods/index" and "methods/new" in found["Methods"]
    assert "contrast" in found["Methods"] and found["Benchmarks"] == ["truth", "rankings", "zoo"]
    assert found["Ops"][0] == "ops/index" and "ops/new" in found["Ops"]


@pytest.mark.skipif(not importlib.util.find_spec("mkdocstrings"), reason="needs the extra docs")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert not done.returncode and "WARNING" not in done.stderr, done.stderr
    built = {page: (tmp_path / f"{page}.html").read_text(encoding="utf-8") for page in PAGES}
    for text in built.values():
        # Nothing that a page is made of comes from another host.
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", text):
            away = re.findall(r"""(?:src|href)=["']?((?:https?:)?//[^"'> ]+)""", tag)
            assert all(address.startswith("https://example.org/") for address in away), tag
    for name, page in SHOWN.items():
        module, _, attribute = name.rpartition(".")
        first = load(f"{module}:{attribute}").__doc__.split("\n")[0]
        plain = html.unescape(re.sub(r"<[^>]+>", "", built[page]))
        assert re.sub(r"[`*_]", "", first)[:60] in re.sub(r"[`*_]", "", plain)
        assert f'id="{name}"' in built[page]
    for stage in stages():
        assert f'id="{stage.name}"' in built["api/commands"]
    for name in filter(str.islower, study_stages.__all__):
        assert re.search(rf"<h2[^>]*>\s*(<[^>]+>\s*)*stages\.{name}\b", built["api/stages"]), name
    index = json.loads((tmp_path / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert {f"{page}.html" for page in PAGES} - {"index.html"} <= {
        entry["location"] for entry in index["docs"]
    }
    # A link out of docs/ is one into the repository.
    assert "https://example.org/relneuron/blob/main/README.md#speed" in built["ops/swiglu_stats"]
    assert "https://example.org/relneuron/blob/main/examples/hf_loop.py" in built["backend"]
