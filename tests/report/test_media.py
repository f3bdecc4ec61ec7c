"""A page on a phone and on paper, and its drawings where they are copied to.

The studies are those of test_pages.py.
"""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest

from relneuron.report import kit
from relneuron.report.page import make_page, render
from relneuron.study.pages import PAGES
from tests.report.test_pages import CASES


@pytest.fixture(scope="module", params=CASES)
def html(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    study = CASES[request.param].write(tmp_path_factory.mktemp("media") / "study")
    return render(make_page(study, PAGES))


def test_a_drawing_works_where_it_is_copied_to(html: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    style = html[html.index("<style>") : html.index("</style>")]
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("font-family")
        assert not re.search(r"var\(|currentColor|class=", drawing)
        found = {node.get("id") for node in root.iter()}
        assert set(re.findall(r'(?:href="|url\()#([\w-]+)', drawing)) <= found
    # The page's own style sheet gives each colour of the theme that of its mode, but on paper.
    on_screen = style[style.index("@media screen {") :].partition("\n}")[0]
    for name, colour in kit.THEME.items():
        for part in ("fill", "stroke"):
            assert f'[{part}="{colour}"] {{ {part}: var(--{name}); }}' in on_screen
            # In a style attribute it would beat the style sheet.
            assert not any(f"{part}: {colour}" in drawing for drawing in drawings)


def test_what_is_wide_scrolls_in_a_box_of_its_own_and_says_so(html: str) -> None:
    """As far as the page's source says it; test_on_a_phone asks a browser."""
    body = html[html.index("<main>") :]
    boxes = re.split(r'(?=<div class="scroll)', body)[1:]
    for tag in ("svg", 'table class="data', 'table class="answers"'):
        assert body.count(f"<{tag}") == sum(box.count(f"<{tag}") for box in boxes)
        assert all(box.count(f"<{tag}") <= 1 for box in boxes)
    assert all('tabindex="0" role="region" aria-label="' in box[:80] for box in boxes)
    style = html[html.index("<style>") : html.index("</style>")]
    assert re.search(
        r"\.scroll \{ overflow-x: auto;[^}]*scroll-timeline: --sideways inline;", style
    )
    assert re.search(r'\.scroll::before \{ content: "[^"]*scroll sideways"[^}]*hidden', style)


def test_print_folds_nothing_away(html: str) -> None:
    style = html[html.index("<style>") : html.index("</style>")]
    printed = style[style.index("@media print {") :].partition("\n}")[0]
    hidden = re.search(r"([^}]*)\{ display: none; \}", printed)
    assert hidden and hidden[1].split() == [".download,", "nav,", ".manifest"]
    assert "details::details-content { content-visibility: visible;" in printed
    assert "thead { display: table-header-group; }" in printed
    assert re.search(r"[ ,]tr \{ break-inside: avoid; \}", printed)
    assert "break-before" not in style  # a section begins where the one before ends


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.mark.skipif(
    not (CHROMIUM and find_spec("playwright")), reason="needs playwright and chromium"
)
def test_on_a_phone(html: str, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    hint = "getComputedStyle(box, '::before').visibility === 'visible'"
    wide = "box.scrollWidth > box.clientWidth"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 420, "height": 900})
        page.goto((tmp_path / "page.html").as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
        all_boxes = "[...document.querySelectorAll('.scroll')]"
        # A scroll timeline begins with a frame that is painted after the layout.
        page.wait_for_function(f"{all_boxes}.every(box => ({wide}) === ({hint}))")
        boxes = page.evaluate(f"{all_boxes}.map(box => [{wide}, {hint}])")
        browser.close()
    assert any(is_wide for is_wide, _ in boxes)
    assert all(is_wide == says_so for is_wide, says_so in boxes)
