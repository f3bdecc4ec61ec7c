"""Neurons by the share that a group has in their relevance: a reconstruction.

`rank.py` calls it. arXiv 2601.04664 says that neurons are found by layer-wise relevance and masked;
its equations could not be read. What is chosen here, by group shares, is our own rule.
"""

from __future__ import annotations

import numpy as np

from relneuron.methods.gradients.facts import Array


def group_shares(relevance: Array) -> Array:
    """s_g = R_g / sum_h R_h of each neuron: (G, N) float64 of means (G, N) that are not below 0.

    NaN where no group has any.
    """
    values = np.asarray(relevance, np.float64)
    total = values.sum(0)
    with np.errstate(invalid="ignore"):
        shares: Array = np.where(total > 0, values / total, np.nan)
    return shares


def specific(relevance: Array, top: int, share: float) -> list[list[tuple[int, float]]]:
    """Each group's `top` neurons by R_g among those with s_g >= share and R_g > 0: (place, R_g).

    Best first; of equal ones the lower place.
    """
    values = np.asarray(relevance, np.float64)
    found = []
    for mean, own in zip(values, group_shares(values), strict=True):
        able = np.flatnonzero((own >= share) & (mean > 0))
        best = able[np.argsort(-mean[able], kind="stable")][:top]
        found.append(list(zip(best.tolist(), mean[best].tolist(), strict=True)))
    return found
