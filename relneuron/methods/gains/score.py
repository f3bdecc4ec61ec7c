"""From sentences to relations: the mean log-probability gain of each neuron (arXiv 2312.12141).

`relneuron identify --method logprob_gain` calls it, one layer at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from relneuron.artifact.ranking import ScoredNeuron

Array = np.ndarray[Any, Any]


def mean_gains(gains: Array, group: Array, n_groups: int) -> Array:
    """The mean over each group's sentences: (G, F) float32, summed in float64.

    `gains` (N, F) nats, `group` (N,) int64 the group of each sentence, -1 for none. A group
    without sentences has NaN.
    """
    means = np.full((n_groups, gains.shape[1]), np.nan, np.float32)
    for number in range(n_groups):
        rows = gains[group == number]
        if len(rows):
            means[number] = rows.mean(0, dtype=np.float64)
    return means


def best_neurons(scores: Array, k: int) -> list[ScoredNeuron]:
    """The k neurons with the highest scores (L, F), best first; equal ones by layer, then index.

    Their site is `gate`: a neuron whose gate is zero writes zero, so it stands for the product.
    """
    flat = scores.reshape(-1)
    order = np.argsort(-flat, kind="stable")[:k]
    layers, indices = np.divmod(order, scores.shape[1])
    return [
        (layer, "gate", index, score)
        for layer, index, score in zip(
            layers.tolist(), indices.tolist(), flat[order].tolist(), strict=True
        )
    ]
