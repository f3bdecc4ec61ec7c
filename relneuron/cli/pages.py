"""The kinds of study that have a page: `report` asks which of them a folder holds."""

from __future__ import annotations

from relneuron.analyses.study import PAGE
from relneuron.artifact.stage import load
from relneuron.methods import methods
from relneuron.report.page import PageKind

PAGES: tuple[PageKind, ...] = (PAGE, *(load(one.page) for one in methods() if one.page))
