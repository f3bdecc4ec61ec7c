"""The page of cards: what it shows, that it finds, sorts and filters, and that text stays text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relneuron.artifact.cards import read_cards
from relneuron.report.cards import GROUPS, view
from relneuron.report.look import card_html, page_of
from relneuron.report.page import render
from tests.kit.cards import SETS, chromium, make_card, opened
from tests.kit.corpus_commands import call
from tests.kit.pages import PAYLOADS, Page

MANIFEST = {"model": {"id": "a/model"}, "stages": {}, "files": {}}
CARDS = [make_card(number) for number in range(200)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("page") / "look.html"
    path.write_text(render(page_of(CARDS, MANIFEST)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def wide(browser: Any, page: Path) -> Iterator[Any]:
    with opened(browser, page, viewport={"width": 1200, "height": 900}) as both:
        yield both


@pytest.fixture
def tab(wide: Any) -> Any:
    """The page as it was opened."""
    found, said = wide
    found.evaluate("document.querySelector('.controls').reset()")
    found.dispatch_event(".controls", "input")
    found.evaluate("document.activeElement.blur()")
    yield found
    assert said == []


def names(tab: Any) -> list[str]:
    """The neurons that are seen, in their order."""
    found: list[str] = tab.eval_on_selector_all(
        ".card:not([hidden])", "cards => cards.map(card => card.dataset.neuron)"
    )
    return found


def find(tab: Any, text: str) -> list[str]:
    tab.fill("[name=find]", text)
    return names(tab)


def test_it_has_every_card_with_its_tokens(tab: Any) -> None:
    assert names(tab) == [card["neuron"] for card in CARDS]
    lines = tab.eval_on_selector_all(
        ".card .text",
        "all => all.map(line => [...line.querySelectorAll('.t')].map(one => one.textContent))",
    )
    wanted = [one["tokens"] for card in CARDS for one in card["examples"]]
    assert lines == [[text.replace("\n", "\\n") for text in tokens] for tokens in wanted]


def test_shades_are_in_the_order_of_the_values(tab: Any) -> None:
    """As they are painted, above 0 and below it in a colour each."""
    painted = tab.eval_on_selector_all(
        ".card",
        """cards => cards.map(card => [...card.querySelectorAll('.t')].map(one =>
             getComputedStyle(one).backgroundColor.match(/[\\d.]+/g).map(Number)))""",
    )
    fires: set[tuple[float, ...]] = set()
    calms: set[tuple[float, ...]] = set()
    for card, colours in zip(CARDS, painted, strict=True):
        values = [value for one in card["examples"] for value in one["values"]]
        alpha = [colour[3] if len(colour) == 4 else 1.0 for colour in colours]
        most, size = max(values), max(map(abs, values))
        for value, shade in zip(values, alpha, strict=True):
            # A screen has 256 shades.
            wanted = value / most if value > 0 else 0.6 * -value / size
            assert shade == pytest.approx(wanted, abs=0.005), (value, shade)
        fires |= {tuple(c[:3]) for v, c in zip(values, colours, strict=True) if v > 0}
        calms |= {tuple(c[:3]) for v, c in zip(values, colours, strict=True) if v < 0}
    assert len(fires) == len(calms) == 1 and fires != calms


def test_it_finds_tokens_neurons_and_sets(tab: Any) -> None:
    assert find(tab, "word17 ") == ["1.down.17", *(c["neuron"] for c in CARDS[170:180])]
    assert find(tab, "2.up.34") == ["2.up.34"]
    assert find(tab, "L2.UP.34") == ["2.up.34"]
    assert len(find(tab, "alpha")) == 200  # as a group of examples
    assert find(tab, "nothing like it") == []
    assert tab.inner_text("output") == "0 of 200 neurons."


def test_it_filters(tab: Any) -> None:
    tab.select_option("[name=set]", "beta")
    assert names(tab) == [c["neuron"] for c in CARDS if c["sets"][0]["set"] == "beta"]
    tab.select_option("[name=layer]", "3")
    tab.select_option("[name=site]", "up")
    wanted = [c for c in CARDS if c["sets"][0]["set"] == "beta" and c["layer"] == 3]
    assert names(tab) == [c["neuron"] for c in wanted if c["site"] == "up"] != []
    options = tab.eval_on_selector_all("[name=set] option", "all => all.map(one => one.value)")
    assert options == ["", *SETS]


@pytest.mark.parametrize(
    "by,key",
    [
        ("score", lambda c: -c["sets"][0]["score"]),
        ("value", lambda c: -c["examples"][0]["value"]),
        ("layer", lambda c: (c["layer"], -c["sets"][0]["score"])),
        ("name", lambda c: (c["layer"], c["site"], c["index"])),
    ],
)
def test_it_sorts(tab: Any, by: str, key: Any) -> None:
    tab.select_option("[name=sort]", by)
    assert names(tab) == [card["neuron"] for card in sorted(CARDS, key=key)]


def test_keys_go_from_card_to_card(tab: Any) -> None:
    def at() -> str | None:
        here: str | None = tab.evaluate("document.activeElement.dataset.neuron")
        return here

    tab.keyboard.press("j")
    assert at() == "0.gate.0"
    tab.keyboard.press("j")
    tab.keyboard.press("ArrowDown")
    assert at() == "2.down.2"
    tab.keyboard.press("k")
    assert at() == "1.up.1"
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.name") == "find"
    tab.keyboard.type("word5 ")
    assert tab.input_value("[name=find]") == "word5 "  # j and k are letters there
    tab.keyboard.press("Escape")
    assert len(names(tab)) == 200
    assert tab.eval_on_selector_all("[tabindex='0'].card", "all => all.length") == 1


def test_a_neuron_that_is_near_and_has_a_card_is_a_link(tab: Any) -> None:
    find(tab, "word5 ")
    tab.click(".card:not([hidden]) .near a")
    assert len(names(tab)) == 200 and tab.evaluate("location.hash") == "#n0.gate.0"


@pytest.mark.parametrize("width", [1200, 420])
def test_nothing_is_wider_than_the_screen(browser: Any, page: Path, width: int) -> None:
    with opened(browser, page, viewport={"width": width, "height": 900}) as (tab, said):
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert said == []


def test_without_scripts_all_cards_are_there(browser: Any, page: Path) -> None:
    with opened(browser, page, java_script_enabled=False) as (tab, _):
        assert tab.locator(".card").count() == 200
        assert not tab.locator(".controls").is_visible()


def test_it_is_small_and_the_same_each_time(page: Path) -> None:
    """200 neurons with examples as long as a card has them."""
    assert render(page_of(CARDS, MANIFEST)).encode() == page.read_bytes()
    long = {"tokens": [" token"] * 33, "values": [1.234] * 33}
    many = [
        make_card(n, examples=[one | long for one in make_card(n)["examples"] * 8][:8])
        for n in range(200)
    ]
    assert len(render(page_of(many, MANIFEST)).encode()) < 5e6


@pytest.mark.slow
def test_the_page_of_the_demo(browser: Any, tmp_path: Path) -> None:
    """200 cards of the real thing: their tokens, and shades in the order of the values."""
    quick = ("--permutations", 0, "--bootstrap", 0, "--noise", 0, "--random-seeds", 0, "--quiet")
    assert call("demo", "-o", tmp_path, "--analyses", "main", *quick) == 0
    cards = read_cards(tmp_path / "cards.jsonl")
    with opened(browser, tmp_path / "look.html", viewport={"width": 420, "height": 900}) as both:
        tab, said = both
        assert names(tab) == [card["neuron"] for card in cards] and len(cards) == 200
        assert tab.evaluate("document.documentElement.scrollWidth") <= 420
        found = tab.eval_on_selector_all(
            ".card",
            """cards => cards.map(card => [...card.querySelectorAll('.t')].map(one =>
                 [one.textContent, Number(one.style.getPropertyValue('--s'))]))""",
        )
        assert said == []
    for card, tokens in zip(cards, found, strict=True):
        every = [one for example in card["examples"] for one in example["tokens"]]
        assert [text for text, _ in tokens] == every
        values = [value for example in card["examples"] for value in example["values"]]
        shades = sorted((v, s) for v, (_, s) in zip(values, tokens, strict=True) if v > 0)
        assert [s for _, s in shades] == sorted(s for _, s in shades)
        assert max(values) <= 0 or shades[-1][1] == 1
    assert (tmp_path / "look.html").stat().st_size < 5e6


def test_text_stays_text() -> None:
    """In a page, and alone in a notebook."""
    for text in PAYLOADS:
        hostile = make_card(0, value_of=text, values_at=text)
        hostile["sets"] = [hostile["sets"][0] | {"set": text}]
        hostile["examples"] = [
            one | {"tokens": [text] * 5, "next": text, "group": text, "id": text}
            for one in hostile["examples"]
        ]
        hostile["histogram"] = {"of": text, "edges": [0.0, 1.0], "groups": {text: [3]}}
        for key in ("promotes", "suppresses"):
            hostile[key] = [{"token": text, "id": 1, "logit": 0.5}]
        hostile["nearest"] = [{"neuron": "1.up.2", "name": text, "cosine": 0.5}]
        plain = [Page(made) for made in (render(page_of([make_card(0)], MANIFEST)),)]
        for html, other in (
            (render(page_of([hostile], MANIFEST)), plain[0]),
            (card_html(hostile), Page(card_html(make_card(0)))),
        ):
            found = Page(html)
            assert {*found.tags} <= {*other.tags}
            assert found.tags.count("script") == other.tags.count("script")
            names_of = {name for name, _ in other.attributes}
            assert {name for name, _ in found.attributes} <= names_of
            assert not re.search("[\u202e\x07\x1b\x00]", html)


def test_a_histogram_shows_the_sets_groups_and_the_rest_as_one() -> None:
    groups = {f"g{k}": [k, 0, 20 - k] for k in range(12)}
    spread = {"of": "x", "edges": [0.0, 1.0, 2.0, 3.0], "groups": groups}
    card = make_card(1, histogram=spread)
    card["sets"] = [card["sets"][0] | {"set": "g11"}]
    bars = view(card).bars
    assert [one.group for one in bars] == ["g11", "g0", "g1", "g2", "g3", "g4", "6 others"]
    assert len(bars) == GROUPS + 1 and [one.is_own for one in bars] == [True, *[False] * 6]
    assert bars[-1].n == sum(sum(groups[f"g{k}"]) for k in range(5, 11))
    # 11 of 11 high, nothing, 9 of 11.
    assert bars[0].path == "M0 10V0h1V10h1V1.82h1V10z"
