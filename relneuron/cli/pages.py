"""The kinds of study that have a page; `report` makes the page of the first that a folder is of."""

from __future__ import annotations

from relneuron import analyses
from relneuron.methods import counts, gains

PAGES = (analyses.PAGE, gains.PAGE, counts.PAGE)
