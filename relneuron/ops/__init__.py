"""The kernels: pure functions on tensors, each with one written spec and several backends.

The stages of relneuron call them, and any other project can: nothing here needs transformers, and
neither triton nor the C++ extension has to be there to import it.

Dimensions have the same letters in Python, Triton and C++:
    T tokens, F neurons per layer (intermediate size), D hidden size, G groups (relations),
    C conditions (ablation sets), N prompts, R relations to score, L layers, V vocabulary,
    M columns to score, E sentences, K value vectors or best peaks, P positions, S segments of
    the tokens, B bins.
"""

from relneuron.ops.average_precision.op import average_precision
from relneuron.ops.backends import BackendStatus, available_backends
from relneuron.ops.logprob_gain.op import (
    GainLayer,
    TopGains,
    logprob_gain,
    logprob_gain_top,
    logprob_gain_vectors,
)
from relneuron.ops.peaks.best import BestPeaks
from relneuron.ops.peaks.edges import histogram_edges
from relneuron.ops.peaks.op import histogram, merge_peaks, peaks, site_range
from relneuron.ops.swiglu_stats.groups import PAIR_SITES, SITES, GroupStats
from relneuron.ops.swiglu_stats.op import swiglu_stats, swiglu_stats_only
from relneuron.ops.swiglu_stats.pair_stats import pair_stats
from relneuron.ops.swiglu_stats.reference import ACTIVATIONS
from relneuron.ops.swiglu_stats.residual import residual_stats

__all__ = [
    "ACTIVATIONS",
    "PAIR_SITES",
    "SITES",
    "BackendStatus",
    "BestPeaks",
    "GainLayer",
    "GroupStats",
    "TopGains",
    "available_backends",
    "average_precision",
    "histogram",
    "histogram_edges",
    "logprob_gain",
    "logprob_gain_top",
    "logprob_gain_vectors",
    "merge_peaks",
    "pair_stats",
    "peaks",
    "residual_stats",
    "site_range",
    "swiglu_stats",
    "swiglu_stats_only",
]
