"""Perplexity of neutral sentences with a relation's neurons off: side effects on plain text.

`run_all` calls it; method A10.11 (arXiv 2502.17355, section 5.5).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from relneuron.analyses.outcomes import Row, with_q
from relneuron.analyses.uncertainty import NAN, ratio_bootstrap, signed_rank
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.reading import read_csv
from relneuron.report.tables import Array, Share, Table, spread

PERPLEXITY = (
    *("relation", "n_sentences", "before", "own", "random"),
    *("ratio", "ratio_low", "ratio_high", "p_value", "q_value"),
)


class SentenceRow(NamedTuple):
    """One row of perplexity.csv: a sentence under a condition."""

    condition: str  # clean, the relation itself (its set is off), or random.<seed>
    relation: str
    id: str
    n_tokens: int
    nll: float  # the summed negative log-probability of its tokens, in nats


def read_perplexity(path: Path) -> list[SentenceRow]:
    """The rows of a perplexity.csv, in the file's order."""
    rows = []
    for row in read_csv(path, SentenceRow._fields):
        name = row["condition"], row["relation"], row["id"]
        rows.append(SentenceRow(*name, row.whole("n_tokens", least=1), row.finite("nll")))
    clean = {(row.relation, row.id) for row in rows if row.condition == "clean"}
    if any((row.relation, row.id) not in clean for row in rows):
        raise RelneuronError(f"{path} has a sentence that clean lacks", "run ablate again")
    return rows


def perplexity(rows: Sequence[SentenceRow], random: Collection[str]) -> Table:
    """Perplexity before and after, per relation: the mean of its sentences' exp(nll / n_tokens).

    ratio = own / before, its interval by a bootstrap over sentences; random: the mean over the
    conditions named in `random`; p: Wilcoxon's signed-rank test of the nll per token, own against
    clean. A condition that lacks a sentence of the relation was not measured.
    """
    table: list[Row] = []
    for relation in dict.fromkeys(row.relation for row in rows):
        losses = _losses([row for row in rows if row.relation == relation])
        clean = losses.pop("clean")
        own = losses.get(relation, np.full(clean.shape, NAN))
        before, after = np.exp(clean), np.exp(own)
        drawn = [np.exp(values).mean() for name, values in losses.items() if name in random]
        ratio = after.mean() / before.mean(), *ratio_bootstrap(before, after)
        table.append(
            [
                *(relation, clean.size, float(before.mean()), float(after.mean())),
                *(spread(np.array(drawn)).mean, *map(Share, ratio), signed_rank(own - clean)[1]),
            ]
        )
    return Table("Perplexity of neutral sentences", PERPLEXITY, with_q(PERPLEXITY, table))


def _losses(rows: Sequence[SentenceRow]) -> dict[str, Array]:
    """nll per token by condition, over the sentences asked clean; NaN if one is missing."""
    places = {row.id: i for i, row in enumerate(r for r in rows if r.condition == "clean")}
    found = {"clean": np.full(len(places), NAN)}
    for row in rows:
        values = found.setdefault(row.condition, np.full(len(places), NAN))
        values[places[row.id]] = row.nll / row.n_tokens
    return found
