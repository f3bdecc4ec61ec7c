"""How sure a score is: p-values against noise and shuffled labels, q-values, bootstrap intervals.

The `identify` stage calls these; every AP in them is one of `ops.average_precision`, so a score
and what it is compared with are exact and equal on every backend.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron import ops
from relneuron.artifact.neurons import ScoredNeuron

Array = np.ndarray[Any, Any]

BLOCK_BYTES = 1 << 26  # of one block of noise, or of the APs of one call: 64 MB
WAITING_BYTES = 1 << 24  # of a relation's responses that wait to be measured in one go: 16 MB


def seed_of(purpose: str, seed: int, relation: str = "") -> int:
    """A generator's seed: the study's, what it is drawn for, and the relation's name.

    So what is drawn for a relation depends neither on the other relations nor on their order.
    """
    text = f"relneuron.{purpose}.{seed}.{relation}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def blocks(n: int, item_bytes: int) -> Iterator[slice]:
    """Slices of n items that hold at most BLOCK_BYTES each, but at least one item."""
    step = max(1, BLOCK_BYTES // max(1, item_bytes))
    return (slice(start, min(n, start + step)) for start in range(0, n, step))


# --- p-values and false discoveries ----------------------------------------------------------


def noise_ap(
    labels: Array, n_columns: int, seed: int, advance: Callable[[], object] = lambda: None
) -> Array:
    """AP of columns of noise: the null distribution of a neuron that carries nothing.

    AP depends on the order of the values only. If they are exchangeable over the prompts and have
    no ties, each order is as likely as another, whatever the values' distribution: uniform noise
    has exactly the APs that such a neuron has. (Ties lower an AP: the p-value of a neuron with
    many equal values is approximate; that of `permutation_p` is valid for it, too.)

    `labels` (R, N) int8 as `ops.average_precision` takes them. Returns (R, n_columns) float32,
    each row sorted; the same columns serve every relation. A column is N consecutive draws of
    float64 (53 random bits: ties are too rare to matter), so the split into blocks changes
    nothing. `advance` is called after each block.
    """
    rng = np.random.default_rng(seed)
    # A prompt of no relation's set takes no part.
    kept = torch.from_numpy(labels[:, (labels >= 0).any(0)])
    null = np.empty((len(labels), n_columns), np.float32)
    for columns in blocks(n_columns, 8 * labels.shape[1]):
        noise = torch.from_numpy(rng.random((columns.stop - columns.start, kept.shape[1])))
        null[:, columns] = ops.average_precision(noise.T, kept).numpy()
        advance()
    null.sort(axis=1)
    return null


def p_values(ap: Array, null: Array, *, lowest: bool = False) -> Array:
    """(1 + #{null >= AP}) / (1 + n) for `ap` of any shape and a sorted null (n,), float64.

    The AP itself is counted as one of the null's, so no p is 0 and P(p <= a) <= a under the null.
    With `lowest` it is the null's APs <= AP that count.
    """
    wanted = np.asarray(ap, np.float32)
    n_reached = np.searchsorted(null, wanted, side="right")
    if not lowest:
        n_reached = null.size - np.searchsorted(null, wanted, side="left")
    result: Array = (1 + n_reached) / (1 + null.size)
    return result


def fdr_resolution(n_neurons: int, n_columns: int, fdr: float) -> int:
    """The least number of neurons that can be chosen at `fdr`, with that many columns of noise.

    No p is below 1 / (1 + n), and the r-th best neuron of M needs p <= r fdr / M.
    """
    return max(1, math.ceil(n_neurons / (1 + n_columns) / fdr))


def shuffled_labels(row: Array, n: int, seed: int) -> Array:
    """(n, N) int8: the 1s and 0s of a relation's labels (N,) permuted; -1 stays where it was."""
    shuffled = np.repeat(row[None], n, axis=0)
    members = row >= 0
    shuffled[:, members] = np.random.default_rng(seed).permuted(shuffled[:, members], axis=1)
    return shuffled


def permutation_p(values: Tensor, shuffled: Array, ap: Array, lowest: Array | None = None) -> Array:
    """(1 + #{AP with shuffled labels >= AP}) / (1 + n) of each neuron: (K,) float64.

    Exact for any values, ties included, if the prompts are exchangeable under the null.

    `values` (N, K) responses of neurons, `shuffled` (n, N) int8 from `shuffled_labels` (with all
    arrangements in place of random ones, #/n is the p-value of the exact test), `ap` (K,) float32
    the neurons' scores. All neurons see the same shuffles. It is a p-value of a neuron that was
    fixed beforehand; that it was chosen among many is what q is for. `lowest` (K,) bool: for these
    the shuffles' APs <= AP count.
    """
    labels = torch.from_numpy(shuffled)
    n, k = len(shuffled), values.shape[1]
    n_reached = np.empty(k, np.int64)
    for columns in blocks(k, 4 * n):
        null = ops.average_precision(values[:, columns], labels).cpu().numpy()
        n_reached[columns] = (null >= ap[columns]).sum(0)
        if lowest is not None:
            low = lowest[columns]
            n_reached[columns][low] = (null[:, low] <= ap[columns][low]).sum(0)
    result: Array = (1 + n_reached) / (1 + n)
    return result


# --- intervals -------------------------------------------------------------------------------


def resamples(row: Array, n: int, seed: int, facts: Array | None = None) -> Array:
    """(n, N) uint8: how often each prompt is drawn when a relation's labels (N,) are resampled.

    With replacement, positives and negatives apart, as many as there are: their ratio is by
    design. Prompts of one fact, `facts` (N,) int64, are drawn together, as they are no independent
    cases; by default each prompt asks a fact of its own. (That one is drawn more than 255 times
    has a probability below 1e-500.)
    """
    rng = np.random.default_rng(seed)
    weights = np.zeros((n, row.size), np.uint8)
    for label in (1, 0):
        own = np.flatnonzero(row == label)
        # Facts in the order of their first prompts, so that their numbers do not matter.
        _, first, place = np.unique(
            own if facts is None else facts[own], return_index=True, return_inverse=True
        )
        place = np.argsort(np.argsort(first))[place]
        drawn = rng.multinomial(first.size, np.full(first.size, 1 / first.size), n)
        weights[:, own] = drawn.astype(np.uint8)[:, place]
    return weights


def bootstrap_interval(values: Tensor, row: Array, weights: Array, level: float = 0.95) -> Array:
    """Percentile interval of AP: (2, K) float32, low and high (Efron and Tibshirani 1993, 13.3).

    `values` (N, K), `row` (N,) int8 the labels, `weights` (n, N) uint8 from `resamples`, the same
    for all neurons. The ends are quantiles of the n APs, interpolated linearly (numpy's default,
    as scipy.stats.bootstrap takes them). An AP of 1 has the interval [1, 1]: every resample of a
    perfect ranking is perfect.
    """
    labels = torch.from_numpy(row).expand(len(weights), -1)
    drawn = torch.from_numpy(weights)
    interval = np.empty((2, values.shape[1]), np.float32)
    for columns in blocks(values.shape[1], 4 * len(weights)):
        ap = ops.average_precision(values[:, columns], labels, weights=drawn).cpu().numpy()
        interval[:, columns] = np.quantile(
            ap, [(1 - level) / 2, (1 + level) / 2], axis=0, method="linear", overwrite_input=True
        )
    return interval


# --- a relation's neurons --------------------------------------------------------------------


class Significance:
    """p (K,), q (K,) and interval (2, K) of a relation's neurons; NaN for what is not asked for.

    `facts` (N,): the fact that each prompt asks, for the interval. The neurons lie in many blocks
    of responses; `measure` takes one block at a time, in any order. Shuffles and resamples are
    drawn when they are needed, the same ones each time: many relations hold none of them.
    """

    def __init__(
        self,
        relation: str,
        labels: Array,
        neurons: Sequence[ScoredNeuron],
        q: Array | None,
        permutations: int,
        bootstrap: int,
        seed: int,
        facts: Array | None = None,
        n_lowest: int = 0,
    ) -> None:
        """The last `n_lowest` neurons were chosen for their low scores."""
        k = len(neurons)
        self.lowest = np.arange(k) >= k - n_lowest
        self.neurons = neurons
        self.ap = np.array([score for *_, score in neurons], np.float32)
        self.p, self.interval = np.full(k, np.nan), np.full((2, k), np.nan)
        self.q = np.full(k, np.nan) if q is None else q
        self.places: dict[tuple[int, str], list[int]] = defaultdict(list)
        for place, (layer, site, _, _) in enumerate(neurons):
            self.places[layer, site].append(place)
        # Only the prompts of the relation's set are sorted and drawn from.
        self.members = np.flatnonzero(labels >= 0)
        self.labels = labels[self.members]
        key = seed_of("permutations", seed, relation)
        self._shuffled = partial(shuffled_labels, self.labels, permutations, key)
        key = seed_of("bootstrap", seed, relation)
        asked = None if facts is None else facts[self.members]
        self._weights = partial(resamples, self.labels, bootstrap, key, asked)
        self.permutations, self.bootstrap = permutations, bootstrap
        self._waiting: list[tuple[list[int], Tensor]] = []

    def measure(self, layer: int, site: str, values: Tensor, rows: Array | None = None) -> None:
        """Take p-values and intervals of the neurons in the block `values` (N, F) or (N, D).

        `rows` (N,) int64: the row of each prompt (default: in their order).
        Few neurons of a relation lie in one block: they wait until there are many, or `finish`.
        """
        places = self.places[layer, site]
        if not places:
            return
        columns = torch.tensor([self.neurons[place][2] for place in places], device="cpu")
        own = self.members if rows is None else rows[self.members]
        members = torch.from_numpy(own)[:, None].to(values.device)
        self._waiting.append((places, values[members, columns.to(values.device)]))
        if sum(waiting.nbytes for _, waiting in self._waiting) >= WAITING_BYTES:
            self.finish()

    def finish(self) -> None:
        """Take those of the neurons that still wait."""
        if not self._waiting:
            return
        places = [place for some, _ in self._waiting for place in some]
        values = torch.cat([values for _, values in self._waiting], dim=1)
        self._waiting.clear()
        if self.permutations:
            own = self.ap[places], self.lowest[places]
            self.p[places] = permutation_p(values, self._shuffled(), *own)
        if self.bootstrap:
            self.interval[:, places] = bootstrap_interval(values, self.labels, self._weights())
