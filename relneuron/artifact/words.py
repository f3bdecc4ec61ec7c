"""Texts of a command line: escapes, several values in one, numbers; `options` reads by them."""

from __future__ import annotations

import re


def escaped(text: str) -> str:
    """A text as one line: line ends as \\n, backslashes doubled."""
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def unescaped(text: str) -> str:
    r"""A text of the command line: \n is a line end, \\ a backslash; others stay as they are."""
    return re.sub(r"\\([n\\])", lambda found: "\n" if found[1] == "n" else "\\", text)


def split(text: str) -> tuple[str, ...]:
    r"""The parts between commas, without the spaces around them; \, is no such comma."""
    parts = (part.strip().replace("\\,", ",") for part in re.split(r"(?<!\\),", text))
    return tuple(part for part in parts if part)


def pair(flag: str, text: str) -> list[str]:
    """A flag and its value; one that would look like a flag is joined to it."""
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def whole_number(text: str) -> int | None:
    """The number of at most 15 decimal digits; None for another text ("²" is a digit, too)."""
    return int(text) if text.isdecimal() and len(text) <= 15 else None
