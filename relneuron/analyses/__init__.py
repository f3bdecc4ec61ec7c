"""Every analysis of the method (A10; arXiv 2502.17355, sections 4 and 5) from one evaluation.

Beside them the comparison with neurons found by log-probability gain (B3; arXiv 2312.12141).

`run_all` makes the tables of a study of relations; `study.PAGE` is its page. Each analysis is a
pure function from what was measured to a tidy table: one row a case, shares as fractions, NaN for
what is not defined.

| key | one row for | method |
|---|---|---|
| accuracy | a split and relation: its own set, the others', random sets | A10.1, 7, 8 |
| drop | a relation and the set that is off | A10.2 |
| overlap | two sets | A10.4 |
| versatility | a number of sets that a neuron is in | A10.4 |
| interference | an answer that a foreign set mends | A10.2 |
| sizes | a relation and a number of neurons | A10.5 |
| cumulativity | a relation and a range of ranks | A10.6 |
| cumulativity_summary | a range of ranks | A10.6 |
| sites | a relation and a type of neuron | A10.9 |
| modules | a relation and a set of modules of a model that reads pictures | MMNeuron |
| concepts | a relation and a kind of subject | A10.10 |
| gain | a relation and a way to find its neurons | B3, B6 |
| gain_overlap | a relation's two sets | B3 |
| perplexity | a relation's neutral sentences | A10.11 |
| resilience | a relation's facts that outlive its set, and that do not | A10.12 |
| errors | a relation's lost answers | A10.13 |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from relneuron.analyses.answers import (
    ResilienceTest,
    errors,
    interference,
    resilience,
    resilience_test,
)
from relneuron.analyses.beside import NO_GAINS, Gains, gain, gain_overlap
from relneuron.analyses.drops import accuracy, drop_table, modules, sites
from relneuron.analyses.overlap import OverlapEffect, concepts, overlap, overlap_effect, versatility
from relneuron.analyses.perplexity import SentenceRow, perplexity, read_perplexity
from relneuron.analyses.sizes import cumulativity, cumulativity_summary, macro_micro, sizes
from relneuron.artifact.effects import Grid, main_split
from relneuron.artifact.neurons import Neuron
from relneuron.artifact.prompts import Prompt
from relneuron.report.tables import Table

__all__ = [
    "NO_GAINS",
    "Gains",
    "OverlapEffect",
    "ResilienceTest",
    "SentenceRow",
    "accuracy",
    "concepts",
    "cumulativity",
    "cumulativity_summary",
    "drop_table",
    "errors",
    "gain",
    "gain_overlap",
    "interference",
    "macro_micro",
    "modules",
    "overlap",
    "overlap_effect",
    "perplexity",
    "read_perplexity",
    "resilience",
    "resilience_test",
    "run_all",
    "sites",
    "sizes",
    "versatility",
]


# Sets that are each compared with all others, whoever they are of. Of more sets only those of the
# relations that were asked are: nothing says what the others do to their own.
MOST_SETS = 200


def compared(sets: Mapping[str, Sequence[Neuron]], grid: Grid) -> Collection[str] | None:
    """The sets that `overlap` compares with all others; None: all of them."""
    return None if len(sets) <= MOST_SETS else {*grid.relations}


def run_all(
    grids: Mapping[str, Grid],
    sets: Mapping[str, Sequence[Neuron]],
    prompts: Mapping[str, Prompt],
    n_neurons: int,
    *,
    concept_sets: Mapping[str, Sequence[Neuron]] | None = None,
    gains: Gains = NO_GAINS,
    sentences: Sequence[SentenceRow] = (),
    frequency: Mapping[str, float] | None = None,
) -> dict[str, Table]:
    """The tables that have a row, by key. All but accuracy are of `main_split`.

    `sets`: each relation's neurons, each once; `prompts` by id, all of the study; `n_neurons` the
    model has; `frequency`: the number of documents that name a prompt's fact, by prompt id.
    """
    grid = grids[main_split(grids)]
    ranges = cumulativity(grid)
    tables = {
        "accuracy": accuracy(grids),
        "drop": drop_table(grid),
        "overlap": overlap(sets, n_neurons, compared(sets, grid)),
        "versatility": versatility(sets),
        "interference": interference(grid, prompts),
        "sizes": sizes(grid),
        "cumulativity": ranges,
        "cumulativity_summary": cumulativity_summary(ranges),
        "sites": sites(grid),
        "modules": modules(grid),
        "concepts": concepts(sets, concept_sets or {}, grid, n_neurons),
        "gain": gain(grid, sets, gains),
        "gain_overlap": gain_overlap(sets, gains),
        "perplexity": perplexity(sentences, {c.name for c in grid.of_kind("random")}),
        "resilience": resilience(grid, frequency),
        "errors": errors(grid, prompts),
    }
    return {key: table for key, table in tables.items() if table.rows}
