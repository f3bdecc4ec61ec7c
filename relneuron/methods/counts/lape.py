"""LAPE, the activation probability entropy of neurons over groups, and what it is compared with.

The `identify` stage calls these on counts; they read no file and need no model. The method is that
of arXiv 2402.16438 with the constants of its authors; the baselines need the same counts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from relneuron.artifact.files import RelneuronError
from relneuron.methods.counts.options import BAR_RATIO, FILTER_RATE, PRECISIONS, TOP_RATE

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Lape:
    """What LAPE chose; a flat index is l * F + i.

    entropy     (L, F) in nats, of all neurons: before the filter. The dtype of the probabilities
    chosen      (K,) int64 flat indices by ascending entropy; equal ones by ascending flat index
    members     of each of the G groups, the chosen neurons that belong to it: int64 flat indices,
                ascending, maybe none; a neuron may belong to several groups
    threshold   a neuron passes the filter if some group's probability is above it; -inf: all pass
    bar         a chosen neuron belongs to the groups with a probability above it; -inf: to all
    candidates  how many neurons pass the filter
    wanted      how many were to be chosen: more than K if there are not so many candidates
    """

    entropy: Array
    chosen: Array
    members: list[Array]
    threshold: float
    bar: float
    candidates: int
    wanted: int


def activation_probability(count: Array, tokens: Array, *, precision: str = "float32") -> Array:
    """count / tokens (G, L, F) in `precision`: the share of a group's tokens a neuron is active at.

    `count` (G, L, F) and `tokens` (G,) int64, 0 <= count <= tokens. "float32" rounds both to
    float32 before the division, as the authors' code does (counts above 2^24 lose digits);
    "float64" is exact up to 2^53 tokens. Where neurons saw different tokens, `tokens` is (G, L, F).
    A group without tokens, a negative count and one above the group's tokens raise.
    """
    if precision not in PRECISIONS:
        raise RelneuronError(
            f"unknown --precision {precision!r}", f"use {' or '.join(PRECISIONS)}", 2
        )
    each = tokens.reshape(len(tokens), -1)
    for group, (rows, own) in enumerate(zip(count, each, strict=True)):
        n = int(own.min())
        if n < 1:
            raise RelneuronError(f"group {group} has {n} tokens", "leave the group out")
        is_within = rows.size == 0 or (rows.min() >= 0 and (rows.reshape(-1) <= own).all())
        if not is_within:
            raise RelneuronError(
                f"group {group} has {n} tokens, but counts from {rows.min()} to {rows.max()}",
                "count again: the counts are damaged, or an integer overflowed",
            )
    dtype = np.dtype(precision)
    result: Array = count.astype(dtype)
    result /= _by_group(tokens.astype(dtype))
    return result


def _by_group(tokens: Array) -> Array:
    """(G,) as (G, 1, 1), of which each group's neurons have the same."""
    return tokens[:, None, None] if tokens.ndim == 1 else tokens


def entropies(probability: Array) -> Array:
    """-sum_g q_g ln q_g with q = p / sum_g p, in nats: (L, F) float64 of (G, L, F).

    0 ln 0 is 0; a neuron that is active in no group has the entropy 0. The range is [0, ln G].
    """
    total = probability.sum(axis=0, dtype=np.float64)
    total[total == 0] = 1
    entropy = np.zeros_like(total)
    for p in probability:
        q = p / total
        log = np.zeros_like(q)
        np.log(q, out=log, where=q > 0)
        entropy -= q * log
    # Rounding may leave it just below 0; adding 0 takes the sign off a zero.
    result: Array = np.maximum(entropy, 0) + entropy.dtype.type(0)
    return result


def lape(
    probability: Array,
    *,
    top_rate: float = TOP_RATE,
    filter_rate: float = FILTER_RATE,
    bar_ratio: float = BAR_RATIO,
    top: int | None = None,
) -> Lape:
    """The neurons with the lowest entropy among those that are active enough somewhere.

    With N = L F neurons and all N G probabilities in one list: the threshold is its k-th smallest
    value, counted from 1, k = round(N G filter_rate), half to even; the bar the same with
    `bar_ratio`. k = 0 gives -inf: nothing is filtered. A candidate is a neuron with p > threshold
    in some group. The K = round(N top_rate) candidates of the lowest entropy (`top` gives K
    itself; all, if there are fewer) are chosen over all layers; a chosen one belongs to every
    group with p > bar. Both comparisons are strict.

    `probability` (G, L, F) float64 or float32 of at least two groups, finite.
    """
    rates = {"--top-rate": top_rate, "--filter-rate": filter_rate, "--bar-ratio": bar_ratio}
    for option, rate in rates.items():
        check_rate(option, rate)
    if len(probability) < 2:
        raise RelneuronError(
            f"an entropy over {len(probability)} groups says nothing",
            "give at least two groups, or use --method probability",
        )
    _check_finite(probability, "probabilities")
    n_neurons = probability[0].size
    flat = probability.reshape(len(probability), n_neurons)
    threshold = _kth_smallest(flat, round(flat.size * filter_rate))
    # As a rule the two are one.
    bar = threshold
    if bar_ratio != filter_rate:
        bar = _kth_smallest(flat, round(flat.size * bar_ratio))
    entropy = entropies(probability)
    candidates = np.flatnonzero((flat > threshold).any(axis=0))
    wanted = round(n_neurons * top_rate) if top is None else top
    order = np.argsort(entropy.reshape(-1)[candidates], kind="stable")[:wanted]
    chosen = candidates[order]
    members = [np.sort(chosen[p[chosen] > bar]) for p in flat]
    return Lape(entropy, chosen, members, threshold, bar, candidates.size, wanted)


def check_rate(option: str, rate: float) -> None:
    """Refuse a share that is not between 0 and 1; `option` is how the user gives it."""
    if not 0 <= rate <= 1:
        raise RelneuronError(
            f"{option} must be from 0 to 1, got {rate}", "choose a share such as 0.95", 2
        )


def _kth_smallest(values: Array, k: int) -> float:
    """The k-th smallest value, counted from 1; -inf for k = 0."""
    if k == 0:
        return -np.inf
    return float(np.partition(values, k - 1, axis=None)[k - 1])


def _check_finite(values: Array, what: str) -> None:
    if not np.isfinite(values).all():
        raise RelneuronError(f"the {what} are not all finite", "count again, with a wider --dtype")


# --- baselines -------------------------------------------------------------------------------

Ranked = tuple[Array, Array]  # flat indices (K,) int64, best first, and their scores (K,) float64


def highest_probability(probability: Array, top: int) -> list[Ranked]:
    """LAP: of each group, the `top` neurons with the highest activation probability (G, L, F)."""
    _check_finite(probability, "probabilities")
    return _highest(probability, top)


def highest_mean(total: Array, tokens: Array, top: int) -> list[Ranked]:
    """LAVE: of each group, the `top` neurons with the highest mean activation, total / tokens.

    `total` (G, L, F) float64, the sum of the values over the group's tokens (G,) int64, or
    (G, L, F) where neurons saw different ones.
    """
    _check_finite(total, "sums")
    if (tokens < 1).any():
        raise RelneuronError("a group without tokens has no mean", "leave the group out")
    return _highest(total / _by_group(tokens), top)


def random_choice(groups: Sequence[str], n_neurons: int, top: int, seed: int) -> list[Ranked]:
    """Of each group, `top` of the neurons drawn without replacement, ascending, with the score 0.

    A group's draw depends on the seed and its name, not on the other groups.
    """
    result = []
    for name in groups:
        generator = random.Random(f"relneuron.identify.random.{seed}.{name}")
        drawn = sorted(generator.sample(range(n_neurons), min(top, n_neurons)))
        result.append((np.array(drawn, np.int64), np.zeros(len(drawn))))
    return result


def _highest(values: Array, top: int) -> list[Ranked]:
    """Of each of the G rows, the `top` highest values; equal ones by ascending flat index."""
    result = []
    for row in values.reshape(len(values), -1):
        order = np.argsort(-row, kind="stable")[:top]
        result.append((order, row[order].astype(np.float64)))
    return result
