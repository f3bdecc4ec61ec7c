"""RelSpec by average precision (arXiv 2502.17355, section 3.2): who is compared with whom.

`sample_labels` draws each relation's negatives; `ops.average_precision` scores neurons with them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np


def sample_labels(
    relations: Sequence[str],
    relation_of: Sequence[str],
    valid: Sequence[bool],
    *,
    negatives: int = 4,
    own_negatives: Sequence[Sequence[str]] = (),
    seed: int = 0,
) -> np.ndarray[tuple[int, int], np.dtype[np.int8]]:
    """Labels (R, N) int8 of N prompts: 1 positive, 0 negative, -1 not in the relation's set.

    Positives are the valid prompts of the relation. Negatives are drawn without replacement from
    the valid prompts of all other relations together, `negatives` for each positive, or all of
    them if there are fewer. The generator is seeded with `seed` and the relation's name. A relation
    that `own_negatives` (N lists of names) gives negatives of its own is compared with all of
    these, and no others. A prompt of the relation "" is only such a negative.
    """
    labels = np.full((len(relations), len(relation_of)), -1, np.int8)
    # The prompts of each name, ascending: of many relations none looks at all prompts in Python.
    is_valid = np.array(valid, bool)
    asked, given = _by_name([[name] for name in relation_of]), _by_name(own_negatives)
    is_other = is_valid.copy()
    is_other[asked.get("", [])] = False
    for row, relation in enumerate(relations):
        positive, own = (
            np.array([i for i in some.get(relation, ()) if is_valid[i]], np.int64)
            for some in (asked, given)
        )
        labels[row, positive] = 1
        if own.size:
            labels[row, own] = 0
            continue
        is_foreign = is_other.copy()
        is_foreign[positive] = False
        others = np.flatnonzero(is_foreign)
        generator = random.Random(f"relneuron.negatives.{seed}.{relation}")
        n = min(others.size, negatives * positive.size)
        # Which places are drawn does not depend on what stands there.
        labels[row, others[generator.sample(range(others.size), n)]] = 0
    return labels


def _by_name(names: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """The places that have a name among theirs, ascending."""
    found: dict[str, list[int]] = {}
    for place, some in enumerate(names):
        for name in dict.fromkeys(some):
            found.setdefault(name, []).append(place)
    return found


def why_unranked(row: np.ndarray[tuple[int], np.dtype[np.int8]]) -> str | None:
    """Why no neuron can be ranked with a relation's labels (N,), or None if it can."""
    if not (row == 1).any():
        return "no correct det prompt"
    if not (row == 0).any():
        return "no negatives: no other relation has a correct det prompt"
    return None
