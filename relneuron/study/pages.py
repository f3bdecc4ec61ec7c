"""The kinds of study that have a page: `report` asks which of them a folder holds."""

from __future__ import annotations

from relneuron.analyses.study import PAGE
from relneuron.artifact.stage import load
from relneuron.methods import methods, rankings
from relneuron.report.page import PageKind

PAGES: tuple[PageKind, ...] = (PAGE, *(load(one.page) for one in methods() if one.page))


def titles() -> dict[str, str]:
    """What each ranking of neurons is, by its name."""
    return {name: ranking.title for name, ranking in rankings().items()}
