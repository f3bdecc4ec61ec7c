"""Ways to find neurons, a folder each; `NAMES` is the only list of them.

A method may import all rooms but `cli` and `study`, and no other method. A folder's `__init__` says
in its METHOD what it brings: commands, rankings, attributions, a page of the report. To add one: a
folder and its name.
"""

from __future__ import annotations

from importlib import import_module

from relneuron.artifact.papers import Paper
from relneuron.artifact.stage import Attribution, Method, Ranking

NAMES = ("responses", "counts", "gains", "gradients", "contrast")


def methods() -> list[Method]:
    """What each method brings, in the order of `NAMES`."""
    return [import_module(f"relneuron.methods.{name}").METHOD for name in NAMES]


def rankings() -> dict[str, Ranking]:
    """Every ranking by its name: what `identify --method` takes."""
    return {ranking.name: ranking for method in methods() for ranking in method.rankings}


def formats() -> dict[str, Paper]:
    """Whose files `import --format` reads, by name: the paper that they belong to."""
    return {name: paper for method in methods() for name, paper in method.formats.items()}


def attributions() -> dict[str, Attribution]:
    """Every attribution by its name: what `attribute --method` takes, the first by default."""
    return {one.name: one for method in methods() for one in method.attributions}
