"""How a study folder looks in a notebook and at a prompt: what is there, and what makes the rest.

`folder.Study` calls it; whatever a study holds is shown as text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from relneuron.artifact.cards import FORMAT, read_cards
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.neurons import Neuron

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


def drawn(table: Any, card: Callable[[], Json]) -> Any:
    """A frame of examples that a notebook draws as a card; of a dict, without pandas, itself."""
    if isinstance(table, dict):
        return table
    found = _drawn_frame()(table)
    found.card = card
    return found


@cache
def _drawn_frame() -> Any:
    import pandas

    class Examples(pandas.DataFrame):  # type: ignore[misc]
        """Examples of a neuron; what is made of it, some rows, say, is a plain frame."""

        _metadata = ["card"]

        def _repr_html_(self) -> str:
            from relneuron.report.look import card_html

            return card_html(self.card())

    return Examples


def card_of(neuron: Neuron, name: str, examples: Any, histogram: Any | None) -> Json:
    """A card of what `count` wrote alone: of a text only the strongest token has a value."""
    rows = list(zip(*(examples[one] for one in _ROW), strict=True))
    layer, site, index = neuron
    return {
        "format": FORMAT,
        "neuron": f"{layer}.{site}.{index}",
        "name": name,
        **{"layer": layer, "site": site, "index": index, "sets": []},
        **{"value_of": "largest value in a window", "values_at": site},
        "examples": [
            {
                **{"id": f"{group}, window {window}", "group": group, "value": float(value)},
                **{"first": int(position), "tokens": [before, token, after]},
                **{"values": [0.0, float(value), 0.0], "peak": 1},
                **{"next": None, "p": None, "p_off": None},
            }
            for group, window, value, position, before, token, after in rows
        ],
        "histogram": None if histogram is None else _spread(histogram),
        **{"promotes": [], "suppresses": [], "nearest": []},
    }


_ROW = ("group", "window", "value", "position", "before", "token", "after")


def _spread(histogram: Any) -> Json:
    """A frame of `Study.histogram` as a card has it: the outer bins as wide as the others."""
    inner = [float(low) for low, bin in zip(histogram["low"], histogram["bin"], strict=True) if bin]
    groups: dict[str, list[int]] = {}
    for group, count in zip(histogram["group"], histogram["count"], strict=True):
        groups.setdefault(str(group), []).append(int(count))
    inner = inner[: len(next(iter(groups.values()))) - 1]
    step = inner[1] - inner[0]
    edges = [inner[0] - step, *inner, inner[-1] + step]
    return {"of": "value at a token", "edges": edges, "groups": groups}


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
