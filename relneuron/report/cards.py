"""Cards of neurons as cards.html.j2 lays them out: in a report, on the page of `look`, alone.

What a card says is artifact/cards.py's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from relneuron.artifact.cards import NAME, read_cards
from relneuron.artifact.files import Json
from relneuron.artifact.manifest import checked
from relneuron.report.tables import n_of, percent, significant

GROUPS = 6  # of a histogram that are shown each; the others as one
IN_REPORT = 24  # cards of a report


class Token(NamedTuple):
    """A token, its value, and how dark its shade is, from 0 to 1."""

    text: str
    value: str
    shade: float
    is_negative: bool


class Shown(NamedTuple):
    """An example: its tokens, and what the neuron does to the token that follows."""

    group: str
    value: str
    is_cut: bool  # whether the text begins before
    tokens: Sequence[Token]
    follows: str | None
    before: str
    after: str


class Bars(NamedTuple):
    """A histogram of a group as the `d` of a path, BINS wide and 10 high."""

    group: str
    path: str
    n: int
    n_bins: int
    is_own: bool


class View(NamedTuple):
    """A card as cards.html.j2 lays it out: `card` as it is in the file, and what is drawn of it."""

    card: Json
    examples: Sequence[Shown]
    bars: Sequence[Bars]
    score: float | None  # the largest of its sets
    strongest: float | None


def view(card: Json) -> View:
    """What is shown of a card."""
    every = [value for one in card["examples"] for value in one["values"]]
    most = max((value for value in every if value > 0), default=0.0)
    least = max((abs(value) for value in every), default=0.0)
    scores = [one["score"] for one in card["sets"]]
    return View(
        card,
        [_shown(one, most, least) for one in card["examples"]],
        _bars(card),
        max(scores, default=None),
        card["examples"][0]["value"] if card["examples"] else None,
    )


def _shown(one: Json, most: float, least: float) -> Shown:
    tokens = [
        Token(
            text,
            significant(value),
            round(abs(value) / (most if value > 0 else least), 3),
            value < 0,
        )
        if value
        else Token(text, "0", 0.0, False)
        for text, value in zip(one["tokens"], one["values"], strict=True)
    ]
    before, after = (math.nan if one[key] is None else one[key] for key in ("p", "p_off"))
    return Shown(
        one["group"],
        significant(one["value"]),
        one["first"] > 0,
        tokens,
        one["next"],
        percent(before),
        percent(after),
    )


def _bars(card: Json) -> list[Bars]:
    """The groups of the neuron's sets, then those with the largest means; the others as one."""
    spread = card["histogram"]
    if not spread:
        return []
    own = {one["set"] for one in card["sets"]}
    groups: Mapping[str, list[int]] = spread["groups"]

    def mean(name: str) -> float:
        counts = groups[name]
        return sum(k * n for k, n in enumerate(counts)) / max(1, sum(counts))

    order = sorted(groups, key=lambda name: (name not in own, -mean(name)))
    rest = order[GROUPS:] if len(order) > GROUPS + 1 else []
    shown = [(name, groups[name]) for name in order if name not in rest]
    if rest:
        summed = [sum(column) for column in zip(*(groups[name] for name in rest), strict=True)]
        shown.append((n_of(len(rest), "other"), summed))
    return [
        Bars(name, _path(counts), sum(counts), len(counts), name in own) for name, counts in shown
    ]


def _path(counts: Sequence[int]) -> str:
    """Bars side by side, the highest 10 high."""
    most = max(1, *counts)
    return "M0 10" + "".join(f"V{10 - 10 * n / most:.3g}h1" for n in counts) + "V10z"


def cards_of(folder: Path, manifest: Json) -> list[View]:
    """The first cards of a folder, if a `look` that still holds has made some, for its report."""
    if NAME not in manifest.get("files", {}):
        return []
    return [view(card) for card in read_cards(checked(folder / NAME))[:IN_REPORT]]
