"""Which calls are made: those of `make test`, by name, and random ones.

All of it runs within `Stand.installed`; a call that is wrong raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from relneuron.ops import ACTIVATIONS, PAIR_SITES, SITES
from tests.ptx.calls import (
    bins,
    certified,
    gain,
    moments,
    pair,
    peaks,
    ranking,
    residual,
    swiglu,
)

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
# What Triton compiles a kernel for: sizes that 16 divides, and others.
TOKENS, WIDTHS = (144, 48), (512, 272)
Draw = Callable[..., Any]

# By name, what `make test` runs: every kernel, and each of its flags that a user can ask for. The
# two shapes of a call are of one specialisation, so it is compiled once.
_STATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "count": {"sites": ("act",)},
    "all at act, conditions": {"sites": ("act",), "moments": True, "conditions": 3},
    "one mask": {"mask": True},
    "all at two sites": {
        "sites": ("up", "product"),
        "moments": True,
        "conditions": 2,
        "order": "mixed",
    },
    "threshold -0.1": {"sites": ("act",), "threshold": -0.1},
    "ragged width": {"sites": ("act",), "conditions": 2, "order": "mixed"},
    "many groups": {"sites": ("act",), "moments": True, "groups": 20, "order": "mixed"},
    "responses": {"responses": ("gate", "up", "product")},
    "gelu": {"sites": ("act",), "activation": "gelu"},
    "gelu_tanh": {"sites": ("act",), "activation": "gelu_tanh"},
    "relu": {"sites": ("act",), "activation": "relu", "moments": True, "bad": True},
    "ungated": {"gated": False, "sites": ("act",), "conditions": 3, "order": "mixed"},
    "ungated, all": {"gated": False, "sites": ("act",), "moments": True, "groups": 20},
    "ungated, responses": {"gated": False, "responses": ("gate", "act"), "mask": True},
    "relu2": {"gated": False, "sites": ("act",), "activation": "relu2"},
    "quick_gelu": {"gated": False, "sites": ("act",), "activation": "quick_gelu"},
    "tanh": {"gated": False, "sites": ("act",), "activation": "tanh"},
}


_GAINS = (16, 600, 16, 12), (19, 90, 13, 5)


def _twice(call: Draw, *shapes: tuple[int, ...], **given: Any) -> None:
    for seed, shape in enumerate(shapes):
        call(shape=shape, seed=10 * seed, **given)


def _stats(name: str, dtype: torch.dtype) -> Callable[[], None]:
    width = 272 if name == "ragged width" else 512
    shapes = [(n, width) for n in TOKENS]
    return lambda: _twice(swiglu, *shapes, dtype=dtype, **_STATS[name])


def quick(capability: int) -> dict[str, Callable[[], None]]:
    """The calls of `make test` on one GPU; on sm_80 what differs there."""
    found = {name: _stats(name, torch.bfloat16) for name in _STATS}
    if capability == 80:
        found = {"all at act, conditions": found["all at act, conditions"]}
    else:
        found["all at act, conditions, fp32"] = _stats("all at act, conditions", torch.float32)
        found["many groups, fp16"] = _stats("many groups", torch.float16)
        found["tanh, fp32"] = _stats("tanh", torch.float32)
    found["residual"] = lambda: _twice(residual, (144, 512), (48, 512), moments=True)
    found["pair"] = lambda: _twice(pair, (144, 512), (48, 512))
    found["peaks"] = lambda: _twice(peaks, (144, 512), (45, 269), bad=True)
    found["histogram"] = lambda: _twice(bins, (144, 512), (45, 269), bad=True)
    found["moments"] = lambda: _twice(moments, (20, 600, 9, 6), (70, 1100, 40, 6))
    found["gain"] = lambda: _twice(gain, *_GAINS)
    if capability == 80:
        return found
    for dtype in (torch.float32, torch.bfloat16):
        found[f"rank, {dtype}"] = lambda dtype=dtype: _twice(  # type: ignore[misc]
            ranking, (300, 3), (500, 4), dtype=dtype
        )
    found["rank with weights"] = lambda: _twice(ranking, (300, 3), (500, 4), most=3)
    found["rank for 1 relation"] = lambda: _twice(ranking, (300, 3), (500, 4), relations=1)
    found["rank, wide counts"] = lambda: _twice(ranking, (300, 3), (500, 4), most=255)
    found["gain with tilt"] = lambda: _twice(gain, *_GAINS, is_tilted=True)
    found["gain of a list"] = lambda: _twice(gain, *_GAINS, is_listed=True)
    found["gain of a list, tilt"] = lambda: _twice(gain, *_GAINS, is_listed=True, is_tilted=True)
    return found


def random_call(op: str, seed: int) -> Callable[[], None]:
    """A call of an op, drawn from a seed; sizes are from a few, so that Triton compiles few."""
    generator = torch.Generator().manual_seed(seed)

    def one(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    return {
        "swiglu_stats": _random_swiglu,
        "residual_stats": _random_residual,
        "pair_stats": _random_pair,
        "peaks": _random_peaks,
        "histogram": _random_histogram,
        "average_precision": _random_ranking,
        "logprob_gain": _random_gain,
    }[op](one, below, seed)


OPS = (
    *("swiglu_stats", "residual_stats", "pair_stats", "peaks", "histogram"),
    *("average_precision", "logprob_gain"),
)


def _random_swiglu(one: Draw, below: Draw, seed: int) -> Callable[[], None]:
    given = dict(one(*_STATS.values()))
    if "sites" in given:
        every = SITES if given.get("gated", True) else ("gate", "act")
        given["sites"] = one(given["sites"], given["sites"], every, ("gate",))
        given |= {"order": one("sorted", "mixed", "one"), "bad": one(False, False, True)}
        if given.get("groups", 3) == 3:
            given["groups"] = 2 + below(6)
    if given.get("conditions"):
        given["conditions"] = 1 + below(4)
    given.setdefault("activation", one("silu", "silu", *ACTIVATIONS))
    if not {"up", "product"} & {*given.get("sites", ()), *given.get("responses", ())}:
        given["gated"] = one(True, given.get("gated", True))
    dtype, shape = one(*DTYPES), _shape(one, below)
    return lambda: swiglu(dtype, shape, seed=seed, **given)


def _shape(one: Draw, below: Draw) -> tuple[int, int]:
    """16 divides both sizes, or neither."""
    even = 16 * (1 + below(17)), 16 * (1 + below(40))
    return one(even, (1 + 2 * below(150), 3 + 2 * below(300)))  # type: ignore[no-any-return]


def _random_residual(one: Draw, below: Draw, seed: int) -> Callable[[], None]:
    given = {"moments": one(False, True), "order": one("sorted", "mixed"), "conditions": below(4)}
    dtype, shape = one(*DTYPES), _shape(one, below)
    return lambda: residual(dtype, shape, seed=seed, **given)


def _random_pair(one: Draw, below: Draw, seed: int) -> Callable[[], None]:
    given = {
        "sites": one(PAIR_SITES, PAIR_SITES, ("difference",), ("difference", "b")),
        "moments": one(True, True, False),
        "groups": one(2 + below(6), 17),
        "order": one("sorted", "mixed"),
        "bad": one(False, False, True),
    }
    dtype, shape = one(*DTYPES), _shape(one, below)
    return lambda: pair(dtype, shape, seed=seed, **given)


def _random_peaks(one: Draw, below: Draw, seed: int) -> Callable[[], None]:
    given = {
        "site": one("act", *SITES),
        "segments": one(1, 5, 1 + below(20)),
        "k": one(1, 4, 16),
        "order": one("sorted", "mixed", "one"),
        "bad": one(False, True),
        "activation": one("silu", "silu", *ACTIVATIONS),
    }
    dtype, shape = one(*DTYPES), _shape(one, below)
    return lambda: peaks(dtype, shape, seed=seed, **given)


def _random_histogram(one: Draw, below: Draw, seed: int) -> Callable[[], None]:
    given = {
        "site": one("act", *SITES),
        "groups": one(1, 3, 1 + below(20)),
        "n_bins": one(8, 16, 64),
        "order": one("sorted", "mixed", "one"),
        "bad": one(False, True),
    }
    dtype, shape = one(*DTYPES), _shape(one, below)
    return lambda: bins(dtype, shape, seed=seed, **given)


def _random_ranking(one: Draw, below: Draw, seed: int) -> Callable[[], None]:
    n = one(3 + below(40), 100 + below(400), 500 + below(500))
    given = {"relations": one(1, 2, 4, 1 + below(20)), "most": one(0, 0, 3, 255)}
    dtype, m = one(*DTYPES), 2 + below(5)
    return lambda: ranking(dtype, (n, m), seed=seed, **given)


def _random_gain(one: Draw, below: Draw, seed: int) -> Callable[[], None]:
    kind, size = one("sums", "sums", "moments", "certified"), one(1e-3, 0.03, 0.3, 1.0)
    sentences, neurons, tokens = 1 + below(20), 2 + below(40), 2 + below(900)
    if kind == "moments":
        return lambda: moments((neurons, tokens, sentences, 6), seed=seed)
    if kind == "certified":
        shape = (1 + below(4), 1 + below(3), 2 + below(20), 8, 20 + below(300))
        return lambda: certified(shape, size=size, seed=seed)
    given = {"is_tilted": one(False, True), "is_listed": one(False, True), "size": size}
    dtype = one(torch.float32, *HALF)
    return lambda: gain((neurons, tokens, sentences, 1 + below(30)), dtype, seed=seed, **given)
