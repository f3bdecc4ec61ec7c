"""What a fault of the pipeline is, and where it is put."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Mutant(NamedTuple):
    """A text that stands once in its module, what is put there, the cheapest test to find it."""

    old: str
    new: str
    test: str


def module_of(name: str) -> Path:
    """Where the module of a fault stands, from the package on."""
    return Path("relneuron", *name.partition(":")[0].split(".")).with_suffix(".py")
