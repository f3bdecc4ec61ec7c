"""How a study folder looks in a notebook and at a prompt: what is there, and what makes the rest.

`folder.Study` calls it; whatever a study holds is shown as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from relneuron.artifact.cards import read_cards
from relneuron.artifact.files import Json, RelneuronError

_LEFT = "<td style='text-align:left'>"


class State(NamedTuple):
    """A table: how it is asked for, what it is, its file, and the command if that is not there."""

    call: str
    words: str
    state: str
    command: str


def as_text(kind: str, folder: Path, states: Sequence[State]) -> str:
    """A line for each table."""
    lines = [f"{kind} in {folder}"]
    for one in states:
        lines.append(f"  .{one.call:<24} {one.state}" + (f": {one.command}" if one.command else ""))
    return "\n".join(lines)


def as_html(kind: str, folder: Path, model: object, states: Sequence[State]) -> str:
    """A table of tables."""
    head = f"<b>{escape(kind)}</b> in <code>{escape(str(folder))}</code>"
    head += f", model {escape(str(model))}" if model else ""
    rows = (
        f"<tr>{_LEFT}<code>.{escape(one.call)}</code></td>{_LEFT}{escape(one.words)}</td>"
        f"{_LEFT}{escape(one.state)}"
        + (f": <code>{escape(one.command)}</code>" if one.command else "")
        + "</td></tr>"
        for one in states
    )
    return f"<div>{head}</div><table>{''.join(rows)}</table>"


def file_of(path: Path) -> str:
    """effects.csv, 12.3 MB."""
    size, unit = float(path.stat().st_size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return (
        f"{path.name}, {size:.0f} bytes" if unit == "bytes" else f"{path.name}, {size:.1f} {unit}"
    )


@dataclass(frozen=True, repr=False)
class Card:
    """A neuron's card (artifact.cards.SCHEMA) in `data`; a notebook draws it as the page does."""

    data: Json

    def __repr__(self) -> str:
        """The name, the sets, and a line for each example."""
        sets = ", ".join(f"{one['set']} no. {one['rank']}" for one in self.data["sets"])
        lines = [self.data["name"] + (f" in {sets}" if sets else "")]
        for one in self.data["examples"]:
            lines.append(f"  {one['value']:<10.4g} {''.join(one['tokens'])!r}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from relneuron.report.look import card_html

        return card_html(self.data)


def find_card(path: Path, neuron: str | Sequence[Any]) -> Card:
    """The card of a neuron, by its name, or as (layer, site, index)."""
    name = neuron if isinstance(neuron, str) else ".".join(map(str, neuron))
    cards = read_cards(path)
    for card in cards:
        if name in (card["neuron"], card["name"]):
            return Card(card)
    some = ", ".join(card["neuron"] for card in cards[:3])
    raise RelneuronError(
        f"{path} has no card of {name}, but of {some}, ..." if some else f"{path} has no card",
        f"make it with: relneuron look DIR --neurons {name} -o PAGE --force",
        2,
    )
