"""The docs as a site: built without a warning, and its pages of docstrings say what there is."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from relneuron.artifact.stage import load
from tests.conftest import ROOT

API = sorted((ROOT / "docs" / "api").glob("*.md"))
SHOWN = {
    name: path
    for path in API
    for name in re.findall(r"^::: (.+)$", path.read_text(encoding="utf-8"), re.M)
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_page_shows_is_there_and_says_what_it_is(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert load(f"{module}:{attribute}").__doc__


@pytest.mark.skipif(not find_spec("mkdocstrings"), reason="needs the extra docs")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert not done.returncode and "WARNING" not in done.stderr, done.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        built = tmp_path / ("" if name.name == "index" else name) / "index.html"
        text = built.read_text(encoding="utf-8")
        assert not re.search(r"""(src|href)=.?(https?:)?//(?!example\.org)[^>]*\.(css|js)""", text)
    for name, page in SHOWN.items():
        text = (tmp_path / "api" / page.stem / "index.html").read_text(encoding="utf-8")
        module, _, attribute = name.rpartition(".")
        first = load(f"{module}:{attribute}").__doc__.split("\n")[0]
        plain = html.unescape(re.sub(r"<[^>]+>", "", text))
        assert re.sub(r"[`*_]", "", first)[:60] in re.sub(r"[`*_]", "", plain)
        assert f'id="{name}"' in text
