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
    for row, relation in enumerate(relations):
        positive = [i for i, r in enumerate(relation_of) if r == relation and valid[i]]
        own = [i for i, names in enumerate(own_negatives) if relation in names and valid[i]]
        labels[row, positive] = 1
        if own:
            labels[row, own] = 0
            continue
        others = [i for i, r in enumerate(relation_of) if r not in ("", relation) and valid[i]]
        generator = random.Random(f"relneuron.negatives.{seed}.{relation}")
        labels[row, generator.sample(others, min(len(others), negatives * len(positive)))] = 0
    return labels


def why_unranked(row: np.ndarray[tuple[int], np.dtype[np.int8]]) -> str | None:
    """Why no neuron can be ranked with a relation's labels (N,), or None if it can."""
    if not (row == 1).any():
        return "no correct det prompt"
    if not (row == 0).any():
        return "no negatives: no other relation has a correct det prompt"
    return None
