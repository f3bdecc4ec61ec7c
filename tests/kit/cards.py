"""Cards of neurons that were made up, and a page of them in a headless browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relneuron.artifact.cards import FORMAT

SITES = ("gate", "up", "down")
SETS = ("alpha", "beta", "gamma")


def make_card(number: int, **more: Any) -> dict[str, Any]:
    """A card of random numbers, always the same; its words end in its number."""
    rng = np.random.default_rng(number)
    layer, site = number % 4, SITES[number % 3]
    examples = [
        {
            "id": f"p{k}",
            "group": SETS[k % 3],
            "value": round(9.0 - k + number / 1000, 3),
            "first": k,
            "tokens": ["The", f" word{number}", " is", "\n", f" x{k}"],
            "values": [round(float(value), 3) for value in rng.normal(size=5)],
            "peak": 1,
            "next": f" next{k}",
            "p": 0.75,
            "p_off": 0.25,
        }
        for k in range(3)
    ]
    tested = {"p": 0.001, "q": 0.01, "low": 0.8, "high": 0.95}
    token = [{"token": f" up{number}", "id": 3, "logit": 1.5}]
    card = {
        "format": FORMAT,
        "neuron": f"{layer}.{site}.{number}",
        "name": f"L{layer}.{site}.{number}",
        "layer": layer,
        "site": site,
        "index": number,
        "sets": [{"set": SETS[number % 3], "rank": 1, "score": round(number / 200, 3), **tested}],
        "value_of": "mean output over the prompt",
        "values_at": site,
        "examples": examples,
        "histogram": {
            "of": "mean output over the prompt",
            "edges": [0.0, 0.5, 1.0, 1.5],
            "groups": {name: [k, 5 - k, 2] for k, name in enumerate(SETS)},
        },
        "promotes": token,
        "suppresses": token,
        "nearest": [{"neuron": "0.gate.0", "name": "L0.gate.0", "cosine": 0.5}],
    }
    return card | more


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser, one at a time."""
    place = shutil.which("chromium") or shutil.which("google-chrome")
    if place is None:
        pytest.skip("there is no Chromium to open the page")
    playwright = pytest.importorskip("playwright.sync_api", reason="there is no playwright")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=place, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, page: Path, **how: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page in the browser, and what it complained of or asked for beside itself."""
    tab = browser.new_page(**how)
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda asked: said.append(asked.url))
    tab.goto(page.as_uri())
    said.remove(page.as_uri())
    try:
        yield tab, said
    finally:
        tab.close()
