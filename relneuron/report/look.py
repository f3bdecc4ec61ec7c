"""The page of cards that `look` writes, and one card in a notebook.

The page is laid out as a report is; its one script, cards.js, finds, sorts and filters the cards.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relneuron.artifact.files import Json
from relneuron.artifact.installed import need
from relneuron.report.cards import view
from relneuron.report.page import Page, Script, Tile, environment
from relneuron.report.tables import n_of, one_decimal, percent


def page_of(cards: Sequence[Json], manifest: Json) -> Page:
    """The page of cards: what they are of, what switching the neurons off does, and they."""
    need("a page of cards", "jinja2")
    model = (manifest.get("model") or {}).get("id", "a model")
    sets = dict.fromkeys(one["set"] for card in cards for one in card["sets"])
    n = n_of(len(cards), "neuron")
    text = (Path(__file__).parent / "cards.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).digest()
    return Page(
        title="Neurons to look at",
        facts=f"{model}: {n}" + (f" of {n_of(len(sets), 'set')}" if sets else ""),
        question="Which texts make these neurons fire, what do they write, and what is lost "
        "without them?",
        answer=_answer(cards),
        tiles=_tiles(cards, len(sets)),
        sections=[],
        tables={},
        manifest=manifest,
        cards=[view(card) for card in cards],
        script=Script(text, "sha256-" + base64.b64encode(digest).decode()),
    )


def _lost(card: Json) -> list[float]:
    """By how much the neuron lowers the next token's probability, off, in each example."""
    return [one["p"] - one["p_off"] for one in card["examples"] if one["p"] is not None]


def _most(cards: Sequence[Json]) -> tuple[Json, Json] | None:
    """The card and the example where the neuron matters the most."""
    every = [(card, one) for card in cards for one in card["examples"] if one["p"] is not None]
    return max(every, key=lambda both: both[1]["p"] - both[1]["p_off"], default=None)


def _answer(cards: Sequence[Json]) -> str:
    found = _most(cards)
    if found is None:
        return "Of no text of theirs is it known what follows: nothing is said of what is lost."
    card, one = found
    every = [lost for card in cards for lost in _lost(card)]
    return (
        f"Without one of these neurons the next token of its strongest texts loses "
        f"{one_decimal(100 * sum(every) / len(every))} points of probability on average; the most "
        f"without {card['name']}, in one text: from {percent(one['p'])} to "
        f"{percent(one['p_off'])}."
    )


def _tiles(cards: Sequence[Json], n_sets: int) -> list[Tile]:
    layers = {card["layer"] for card in cards}
    examples = sum(len(card["examples"]) for card in cards)
    return [
        Tile("neurons", f"{len(cards):,}", f"of {n_of(len(layers), 'layer')}", True),
        Tile("sets", f"{n_sets:,}", "that they are in"),
        Tile("examples", f"{examples:,}", "the strongest of each neuron"),
    ]


def card_html(card: Json) -> str:
    """One card as HTML with its style, for a notebook."""
    need("a card", "jinja2")
    template: Any = environment().get_template("cards.html.j2")
    return str(template.module.alone(view(card)))
