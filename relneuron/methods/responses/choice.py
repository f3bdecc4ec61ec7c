"""Which neurons of a ranking are a relation's: its best, its lowest, or all that pass a rate.

The `identify` stage calls it, with a relation's scores and those of noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from relneuron.analyses.uncertainty import q_values
from relneuron.artifact.neurons import ScoredNeuron, Selection, Shape, all_scores, top_k
from relneuron.methods.responses import significance

Array = np.ndarray[Any, Any]


def choose(
    scores: Mapping[str, Array],
    null: Array,
    k: int,
    fdr: float | None,
    n_lowest: int = 0,
    order: Shape | None = None,
) -> tuple[list[ScoredNeuron], Array | None, dict[str, Any]]:
    """A relation's k neurons, their q-values (k,), and what neurons.json says of the cut.

    With `fdr` all with q <= fdr in place of k. `n_lowest` of the k are those with the lowest
    scores, the lowest first; they come after the best ones, and q asks for them how often noise
    is as low. No neuron is chosen twice. `order` is of layers that differ in width.
    """
    facts: dict[str, Any] = {}
    q = None
    flat = all_scores(scores, order)
    if null.size and n_lowest < k:
        q = q_values(significance.p_values(flat, null))
    if fdr is not None:
        assert q is not None, "check_options refuses --fdr without noise"
        facts["fdr"] = fdr
        facts["fdr_resolution"] = significance.fdr_resolution(q.size, null.size, fdr)
        # q never rises with the score: these are the k best, with all that are tied at the cut.
        k = int((q <= fdr).sum())
        if not k:
            facts["reason"] = f"none has q <= {fdr}, the lowest is {q.min():.3g}"
            return [], None, facts
    best = top_k(scores, k - n_lowest, order=order)
    own = None if q is None else q[best.places]
    if not n_lowest:
        return best.neurons, own, facts | _cut(best, own)
    lowest = top_k(scores, n_lowest, lowest=True, without=best.places, order=order)
    below = None
    if null.size:
        p = significance.p_values(flat, null, lowest=True)
        below = q_values(p)[lowest.places]
    if n_lowest == k:
        return lowest.neurons, below, facts | {"ends": "bottom"} | _cut(lowest, below)
    facts |= {"ends": "both"} | _cut(best, own)
    facts["lowest"] = {"neurons": n_lowest} | _cut(lowest, below)
    q = None if own is None or below is None else np.concatenate([own, below])
    return best.neurons + lowest.neurons, q, facts


def _cut(chosen: Selection, q: Array | None) -> dict[str, Any]:
    """What neurons.json says of where a ranking was cut; `q` of the chosen neurons."""
    facts: dict[str, Any] = {
        "score_at_cut": chosen.score_at_cut,
        "ties_at_cut": chosen.ties_at_cut,
        "ties_chosen": chosen.ties_chosen,
        "perfect": chosen.n_perfect,
    }
    if q is not None:
        facts["q_at_cut"] = float(q[-1])
    return facts
