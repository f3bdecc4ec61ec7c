"""From scores to neuron sets: the best k with one rule for ties, and random sets to compare with.

The `identify` stage chooses with it; the `ablate` stage draws its random baseline from it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from relneuron.artifact.neurons import ATTENTION, SITES, Neuron, Shape

Array = np.ndarray[Any, Any]
ScoredNeuron = tuple[int, str, int, float]  # (layer, site, index, score)


class Selection(NamedTuple):
    """The chosen neurons, best first, and what a reader should know of the cut."""

    neurons: list[ScoredNeuron]
    places: Array  # of the chosen neurons in `all_scores`
    score_at_cut: float
    ties_at_cut: int  # neurons with just that score, chosen or not
    ties_chosen: int
    n_perfect: int  # neurons with the score 1


def all_scores(scores: Mapping[str, Array]) -> Array:
    """The scores of all neurons (M,) float32, in the order (layer, site, index).

    The sites are gate < up < down < q < k < v < o, those that `scores` has.
    """
    blocks = [np.asarray(scores[s], np.float32) for s in (*SITES, *ATTENTION) if s in scores]
    return np.concatenate(blocks, axis=1).reshape(-1)


def top_k(
    scores: Mapping[str, Array], k: int, *, lowest: bool = False, without: Array | None = None
) -> Selection:
    """The k neurons with the highest scores of `{gate: (L, F), up: (L, F), down: (L, D)}`.

    Scores are compared as float32; equal ones are ordered by layer, then gate < up < down, then
    index (methods A8). With `lowest` those with the lowest scores, the lowest first; `without`
    these places.
    """
    flat = all_scores(scores)
    keys = flat.copy() if lowest else -flat
    if without is not None:
        keys[without] = np.inf
    k = min(k, flat.size - (0 if without is None else len(without)))
    order = np.argsort(keys, kind="stable")[:k]
    widths = {s: scores[s].shape[1] for s in (*SITES, *ATTENTION) if s in scores}
    names = Shape(len(next(iter(scores.values()))), widths).neurons(order)
    chosen = [(*name, float(flat[i])) for name, i in zip(names, order, strict=True)]
    cut = float(flat[order[-1]]) if k else float("nan")
    return Selection(
        chosen,
        order,
        cut,
        int((flat == cut).sum()),
        int((flat[order] == cut).sum()),
        int((flat == 1).sum()),
    )


def random_neurons(shape: Mapping[str, int], k: int, seed: int) -> list[Neuron]:
    """k neurons drawn without replacement from all outputs of the sites that `shape` has."""
    order = Shape.of(shape)
    everything = range(order.total)
    drawn = random.Random(f"relneuron.random.{seed}").sample(everything, min(k, len(everything)))
    return order.neurons(np.array(sorted(drawn), np.int64))


PAPER_TOP = 3000  # arXiv 2502.17355, section 3.2
DEFAULT_SHARE = 0.1  # without --top, never more than this share of a small model's neurons


def default_top(shape: Mapping[str, int]) -> int:
    """3,000 neurons as in the paper, but at most a tenth of a small model's."""
    return min(PAPER_TOP, int(DEFAULT_SHARE * Shape.of(shape).total))
