"""cards.jsonl: what one looks at of a neuron, a line each, as `look` found it.

`look` writes it; the pages, notebooks and neuron viewers of others read it, without a model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from relneuron.artifact.files import Json, RelneuronError, require
from relneuron.artifact.reading import parse_json, read_lines

NAME = "cards.jsonl"
SETS = "sets.csv"
MADE_BY = "look DIR -o DIR/look.html"
FORMAT = "relneuron.card/1"

# What a line holds, by the type of each value: a dict is an object with these keys, [x] a list of
# x, {str: x} an object of any names, (x, y) either. docs/look.md says what each of them means.
_TOKEN = {"token": str, "id": int, "logit": float}
SCHEMA: dict[Any, Any] = {
    "format": str,
    "neuron": str,
    "name": str,
    "layer": int,
    "site": str,
    "index": int,
    "sets": [
        {
            **{"set": str, "rank": int, "score": float},
            **{"p": (float, None), "q": (float, None), "low": (float, None), "high": (float, None)},
        }
    ],
    "value_of": str,
    "values_at": str,
    "examples": [
        {
            **{"id": str, "group": str, "value": float, "first": int, "tokens": [str]},
            **{"values": [float], "peak": int, "next": (str, None)},
            **{"p": (float, None), "p_off": (float, None)},
        }
    ],
    "histogram": ({"of": str, "edges": [float], "groups": {str: [int]}}, None),
    "promotes": [_TOKEN],
    "suppresses": [_TOKEN],
    "nearest": [{"neuron": str, "name": str, "cosine": float}],
}


def cards_bytes(cards: Iterable[Json]) -> bytes:
    """cards.jsonl: one JSON object a line, its keys in the order of `SCHEMA`."""
    lines = (
        json.dumps({key: card[key] for key in SCHEMA}, ensure_ascii=False, allow_nan=False)
        for card in cards
    )
    # A half of a surrogate pair is no UTF-8: it stays an escape.
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")


def read_cards(path: Path) -> list[Json]:
    """The cards of a file, or an error that says what is wrong in which line."""
    cards = []
    for number, line in read_lines(require(path, MADE_BY)):
        where = f"{path}, line {number}"
        card = parse_json(line, where, "make it again with: relneuron look")
        if isinstance(card, dict) and card.get("format") != FORMAT:
            raise _wrong(where, f"format is {card.get('format')!r}, not {FORMAT!r}")
        check_card(card, where)
        cards.append(card)
    return cards


def check_card(card: Any, where: str = "a card") -> None:
    """Raise RelneuronError unless a value is a card: all of `SCHEMA`, and what fits together."""
    if what := _unlike(card, SCHEMA, "it"):
        raise _wrong(where, what)
    for example in card["examples"]:
        n = len(example["tokens"])
        if len(example["values"]) != n or not 0 <= example["peak"] < n:
            raise _wrong(where, "an example has not a value for each token")
    histogram = card["histogram"]
    for name, counts in histogram["groups"].items() if histogram else ():
        if len(counts) != len(histogram["edges"]) - 1 or min(counts, default=0) < 0:
            raise _wrong(where, f"the histogram of {name!r} has not a count for each bin")


def _wrong(where: str, what: str) -> RelneuronError:
    return RelneuronError(f"{where}: {what}", f"make it again with: relneuron {MADE_BY} --force")


def _unlike(value: Any, form: Any, where: str) -> str:
    """What is not as `form` says it, or nothing."""
    if isinstance(form, tuple):
        found = [_unlike(value, one, where) for one in form]
        return "" if "" in found else found[0]
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        return next(
            (w for k, v in enumerate(value) if (w := _unlike(v, form[0], f"{where}.{k}"))), ""
        )
    if isinstance(form, Mapping):
        if not isinstance(value, dict):
            return f"{where} is no object"
        named = {key: form[str] for key in value} if str in form else form
        if missing := [key for key in named if key not in value]:
            return f"{where} lacks {missing[0]}"
        return next(
            (w for k, f in named.items() if (w := _unlike(value[k], f, f"{where}.{k}"))), ""
        )
    return "" if _is(value, form) else f"{where} is not {_WORDS[form]}"


_WORDS = {str: "a text", int: "a whole number", float: "a number", None: "null"}


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is (NoneType if kind is None else kind)
