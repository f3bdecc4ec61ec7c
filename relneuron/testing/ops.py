"""What an implementation of each op can claim: the options of `check_backend`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from relneuron.ops import ACTIVATIONS, PAIR_SITES, SITES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What an implementation of swiglu_stats may leave out:
#   counts, moments  updates `stats` without and with moments=True
#   responses        adds to `responses`
#   masks            takes `keep` and `condition_ids`
#   ungated          takes None for up
#   out              writes into a given `out`
#   strides          takes rows that are not contiguous, in gate, up, out and responses
#   flush_to_zero    subnormal numbers count under torch.set_flush_denormal(True) (CPU only)
#   errors           refuses ids out of range by ValueError before anything is written
FEATURES = (
    "counts",
    "moments",
    "responses",
    "masks",
    "ungated",
    "out",
    "strides",
    "flush_to_zero",
    "errors",
)


class Op(NamedTuple):
    """What an implementation of an op can claim, and the arguments that it gets without names."""

    inputs: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    features: tuple[str, ...]
    activations: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    written: tuple[str, ...] = ()  # tensors that it updates, and then returns nothing


# Of average_precision and logprob_gain, features are options and what their names say: `double` is
# float64 compared as such, `positions` coefficients (E, P, K), `certified` and `top` are modes.
OPS = {
    "swiglu_stats": Op(("gate", "up"), DTYPES, FEATURES, ACTIVATIONS, SITES),
    "average_precision": Op(
        ("values", "labels"), (*DTYPES, torch.float64), ("weights", "strides", "errors")
    ),
    "logprob_gain": Op(
        ("x", "values", "coefficients", "unembed", "scale", "targets"),
        DTYPES,
        (
            *("positions", "offset", "scale_after", "cap", "certified", "top"),
            *("strides", "errors"),
        ),
    ),
    "pair_stats": Op(
        ("a", "b"), DTYPES, ("moments", "strides", "flush_to_zero", "errors"), (), PAIR_SITES
    ),
    "peaks": Op(
        ("gate", "up"),
        DTYPES,
        ("ungated", "strides", "flush_to_zero", "errors"),
        ACTIVATIONS,
        SITES,
        ("values", "positions"),
    ),
    "merge_peaks": Op(("values", "positions"), (torch.float32,), ("flush_to_zero", "errors")),
    "histogram": Op(
        ("gate", "up"), DTYPES, ("ungated", "strides", "errors"), ACTIVATIONS, SITES, ("counts",)
    ),
}
