"""Single answers: those a foreign set mends, those the own set breaks, and what they become.

`run_all` calls these; methods A10.2, 12 and 13 (arXiv 2502.17355, section 5 and appendix E).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relneuron.analyses.outcomes import Row, asked, own_sets, relations, sets_off
from relneuron.analyses.uncertainty import NAN, rank_sum_p, signed_rank
from relneuron.artifact.effects import Grid
from relneuron.artifact.files import fold
from relneuron.artifact.prompts import Prompt
from relneuron.report.tables import Array, Share, Table

INTERFERENCE = ("relation", "off", "id", "subject", "object", "before", "after")
RESILIENCE = (
    *("relation", "n_resilient", "n_sensitive", "logprob_resilient", "logprob_sensitive"),
    *("p_value", "frequency_resilient", "frequency_sensitive", "frequency_difference"),
)
ERROR_KINDS = ("empty", "article", "repeats_prompt", "same_relation", "other_relation", "other")
ERRORS = ("relation", "n_lost", *ERROR_KINDS, "most_common", "n_most_common")

# An article with any punctuation about it, or nothing but punctuation.
ARTICLE = re.compile(r"[\W_]*(the|an?)?[\W_]*")


def interference(grid: Grid, prompts: Mapping[str, Prompt]) -> Table:
    """The answers that are wrong clean and right with another relation's set off."""
    rows: list[Row] = []
    sets = sets_off(grid)
    for relation in relations(grid):
        places = asked(grid, relation)
        wrong = places[grid.correct["clean"][places] == 0]
        for off, name in sets.items():
            if off == relation:
                continue
            for i in wrong[grid.correct[name][wrong] == 1].tolist():
                prompt = prompts[grid.ids[i]]
                answers = grid.prediction["clean"][i], grid.prediction[name][i]
                facts = prompt.id, prompt.subject, prompt.right
                rows.append([relation, off, *facts, *answers])
    return Table("Answers that a set of another relation mends", INTERFERENCE, rows)


def _places(grid: Grid, relation: str, off: str, after: int) -> list[int]:
    """The relation's prompts that are right clean and `after` (1, 0) with `off` off."""
    rows = asked(grid, relation)
    found = (grid.correct["clean"][rows] == 1) & (grid.correct[off][rows] == after)
    places: list[int] = rows[found].tolist()
    return places


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else NAN


def _by_fact(values: Array, facts: NDArray[np.int64]) -> Array:
    """(F,): the mean of each fact's values, of those that are known; NaN if none is."""
    known = np.isfinite(values)
    numbers, place = np.unique(facts, return_inverse=True)
    sums = np.bincount(place[known], values[known], len(numbers))
    n = np.bincount(place[known], minlength=len(numbers))
    result: Array = np.divide(sums, n, out=np.full(len(numbers), NAN), where=n > 0)
    return result


def relative_difference(resilient: float, sensitive: float) -> float:
    """(mean_b - mean_a) / mean_b, a resilient and b sensitive; NaN where mean_b is 0."""
    return (sensitive - resilient) / sensitive if sensitive else NAN


def resilience(grid: Grid, frequency: Mapping[str, float] | None = None) -> Table:
    """Facts that outlive their set and facts that do not (arXiv 2502.17355, appendix E).

    Sensitive: a prompt of it is right before and wrong after; resilient: one is right before, and
    all that are stay right. A fact's logprob is the mean clean log-probability of the object's
    first token, in nats, over its prompts that are right before; p is Mann and Whitney's.
    `frequency`: the number of documents that name a prompt's fact, by prompt id, of those where
    it is known; a fact's is the mean over its prompts.
    """
    documents = np.array([(frequency or {}).get(key, NAN) for key in grid.ids])
    rows: list[Row] = []
    for relation, off in own_sets(grid).items():
        kept, lost = (_places(grid, relation, off, after) for after in (1, 0))
        sensitive = set(grid.facts[lost].tolist())
        resilient = set(grid.facts[kept].tolist()) - sensitive
        right = np.array(sorted(kept + lost), np.int64)
        kinds = [right[np.isin(grid.facts[right], list(some))] for some in (resilient, sensitive)]
        logprobs, known = (
            [_by_fact(values[places], grid.facts[places]) for places in kinds]
            for values in (grid.logprob["clean"], documents)
        )
        means = [_mean(values[np.isfinite(values)]) for values in known]
        numbers = *map(_mean, logprobs), rank_sum_p(*logprobs), *means
        difference = Share(relative_difference(*means))
        rows.append([relation, len(resilient), len(sensitive), *numbers, difference])
    return Table("Resilient and sensitive facts", RESILIENCE, rows)


class ResilienceTest(NamedTuple):
    """Wilcoxon's signed-rank test over the n relations that have facts of both kinds."""

    statistic: float
    p_value: float
    n: int


def resilience_test(table: Table) -> ResilienceTest:
    """logprob_resilient against logprob_sensitive of `resilience`."""
    difference = np.array([float(row[3]) - float(row[4]) for row in table.rows])
    known = difference[~np.isnan(difference)]
    return ResilienceTest(*signed_rank(known), len(known))


def errors(grid: Grid, prompts: Mapping[str, Prompt]) -> Table:
    """What the own set turns right answers into, by kind; the first kind that fits counts.

    article: an article, or punctuation only; repeats_prompt: the answer's words stand in the
    prompt; same_relation, other_relation: the beginning of an object of the relation's, or of
    another's, in the prompt's language. most_common: the most frequent wrong answer, of equals the
    first in alphabetical order.
    """
    named: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for prompt in prompts.values():
        folded = [fold(one) for one in prompt.objects]
        for key in ((prompt.language, prompt.relation), (prompt.language,)):
            named[key].update(folded)
    objects = {key: sorted(some) for key, some in named.items()}
    rows: list[Row] = []
    for relation, off in own_sets(grid).items():
        places = _places(grid, relation, off, 0)
        given = [(grid.prediction[off][i], prompts[grid.ids[i]]) for i in places]
        kinds = Counter(
            kind_of_error(text, p, objects[p.language, p.relation], objects[p.language,])
            for text, p in given
        )
        common = Counter(text for text, _ in given)
        text, n = min(common.items(), key=lambda item: (-item[1], item[0]), default=("", 0))
        rows.append([relation, len(places), *(kinds[kind] for kind in ERROR_KINDS), text, n])
    return Table("What lost answers become", ERRORS, rows)


def kind_of_error(
    text: str, prompt: Prompt, objects: Sequence[str], all_objects: Sequence[str]
) -> str:
    """The kind of a wrong answer to `prompt`.

    `objects`, `all_objects`: the folded objects of its relation and of all of its language, sorted.
    """
    words = fold(text)
    if not words:
        return "empty"
    if ARTICLE.fullmatch(words):
        return "article"
    question = fold(prompt.prompt)
    if words in question and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", question):
        return "repeats_prompt"
    if _begins_one(words, objects):
        return "same_relation"
    return "other_relation" if _begins_one(words, all_objects) else "other"


def _begins_one(words: str, ordered: Sequence[str]) -> bool:
    """Whether one of some sorted texts begins with `words`: the first that is not before them."""
    place = bisect_left(ordered, words)
    return place < len(ordered) and ordered[place].startswith(words)
