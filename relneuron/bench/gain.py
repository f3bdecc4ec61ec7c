"""Cases and contestants of logprob_gain: relneuron and the plain torch computation, twice.

bench/suite.py lists them; bench/attribution.py takes the peers from here. Peers are written as well
as we can: the vocabulary projection once for all sentences, then a sentence at a time, so that the
logits of all neurons stay as small as they can be. All get the neurons of one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from relneuron import ops
from relneuron.bench.case import Case, Contestant, near
from relneuron.bench.own import Own
from relneuron.ops.backends import choose_backend
from relneuron.testing import OPS

# T, F, G are the vocabulary, the neurons and the sentences; the layout is the hidden size.
_case = partial(Case, "logprob_gain", layout="D=256")
QUICK = [_case(T=500, F=64, G=4)]
USUAL = [_case(T=32000, F=512, G=32)]
FULL = [
    *(_case(T=32000, F=2048, G=e) for e in (1, 8, 32, 128)),
    *(_case(T=v, F=512, G=32, layout=f"D={d}") for v, d in ((50257, 1280), (128256, 256))),
    _case("bfloat16", 32000, 2048, 32),
]
TOP = 300
BLOCK = 128  # neurons: 16 MB of logits of 32,000 tokens; 64 to 256 take the same time


def plain(
    x: Tensor, values: Tensor, coefficients: Tensor, unembed: Tensor, scale: Tensor, targets: Tensor
) -> Tensor:
    """`ops.logprob_gain` as one writes it: logits of all neurons, log_softmax, sentence by
    sentence."""
    b = values @ unembed.T
    logits = scale[:, None] * (x @ unembed.T)
    t = scale[:, None] * coefficients
    gains = torch.empty_like(coefficients)
    for e, w in enumerate(targets.tolist()):
        before = logits[e].log_softmax(0)[w]
        gains[e] = (logits[e] + t[e][:, None] * b).log_softmax(1)[:, w] - before
    return gains


def plain_in_place(
    x: Tensor, values: Tensor, coefficients: Tensor, unembed: Tensor, scale: Tensor, targets: Tensor
) -> Tensor:
    """The same with one buffer, logsumexp and the target's logit only."""
    b = values @ unembed.T
    buffer = torch.empty_like(b)
    logits = scale[:, None] * (x @ unembed.T)
    t = scale[:, None] * coefficients
    gains = torch.empty_like(coefficients)
    for e, w in enumerate(targets.tolist()):
        before = logits[e, w] - logits[e].logsumexp(0)
        torch.mul(b, t[e][:, None], out=buffer).add_(logits[e])
        gains[e] = buffer[:, w] - buffer.logsumexp(1) - before
    return gains


def plain_in_blocks(
    x: Tensor, values: Tensor, coefficients: Tensor, unembed: Tensor, scale: Tensor, targets: Tensor
) -> Tensor:
    """The same for a few neurons at a time, whose logits stay in the caches."""
    parts = range(0, len(values), BLOCK)
    shared = (unembed, scale, targets)
    return torch.cat(
        [
            plain_in_place(x, values[i : i + BLOCK], coefficients[:, i : i + BLOCK], *shared)
            for i in parts
        ],
        1,
    )


PEERS = {
    "plain": plain,
    "plain, in place": plain_in_place,
    "plain, in blocks": plain_in_blocks,
}


def draw(case: Case, device: str) -> dict[str, Any]:
    """Random arguments of the op; logits are a few units, gains some tenths of a nat."""
    random = torch.Generator(device).manual_seed(0)
    n_tokens, n_neurons, n_sentences, hidden = case.T, case.F, case.G, int(case.layout[2:])
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    return {
        "x": normal(n_sentences, hidden) * 3 / hidden**0.5,
        "values": (normal(n_neurons, hidden) * 0.1 / hidden**0.5).to(dtype),
        "coefficients": normal(n_sentences, n_neurons),
        "unembed": normal(n_tokens, hidden).to(dtype),
        "scale": torch.ones(n_sentences, device=device),
        "targets": torch.arange(n_sentences, device=device) % n_tokens,
    }


def logprob_gain_contestants(
    case: Case, device: str, n_sets: int, compiled: bool, own: Own | None = None
) -> list[Contestant]:
    """Everybody who takes part in a case of logprob_gain; plain torch computes in float32."""
    given = draw(case, device)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    want = plain_in_place(**wide)
    top = min(TOP, case.F)
    best = want.topk(top, 1).values
    n_bytes = sum(t.numel() * t.element_size() for t in given.values()) + 4 * want.numel()
    is_kernel = choose_backend("logprob_gain", "auto", device) != "reference"
    note = "" if is_kernel else "the reference ran: no kernel works here"
    found = []
    own_name = None if own is None else own.name

    def add(
        variant: str, name: str, call: Callable[[], Tensor], right: Tensor, **more: Any
    ) -> None:
        allowed = 2e-5 + 2e-6 * right.abs()

        def check() -> None:
            if name == own_name and own is not None:
                own.verify(case, device)
            near(call(), right, allowed, "gains")

        run = lambda _: call()  # noqa: E731
        found.append(Contestant(name, variant, run, check, n_bytes, n_bytes, **more))

    def ours(mode: str) -> Tensor:
        return cast(Tensor, ops.logprob_gain(**given, mode=mode))

    def ours_top() -> Tensor:
        return cast(ops.TopGains, ops.logprob_gain(**given, mode="top", top=top)).gain

    add("exact", "relneuron", partial(ours, "exact"), want, is_base=True, note=note)
    for name, call in PEERS.items():
        add("exact", name, partial(call, **wide), want)
    if own is not None:
        inputs = [given[name] for name in OPS["logprob_gain"].inputs]
        add("exact", own.name, partial(own.function, *inputs), want)
    add("certified", "relneuron", partial(ours, "certified"), want, is_base=True, note=note)
    add(f"top {top}", "relneuron", ours_top, best, is_base=True, note=note)

    def plain_top() -> Tensor:
        return plain_in_place(**wide).topk(top, 1).values

    add(f"top {top}", "plain, in place", plain_top, best)
    return found
