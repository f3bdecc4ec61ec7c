"""Eight scores of FFN neurons that are compared by what their best neurons do to the answer.

methods/gains/comparison.py chooses neurons by each of them (arXiv 2312.12141, section 4; methods
B5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.model.stream_layers import ResidualModel
from relneuron.model.trace import Trace
from relneuron.ops.logprob_gain.op import logprob_gain

# a to h of the method's comparison; the score of neuron (m, v) at the base point x for target w
METHODS = (
    "log_prob_gain",  # log p(w | x + m v) - log p(w | x)
    "log_prob",  # log p(w | m v)
    "prob_gain",  # p(w | x + m v) - p(w | x)
    "norm",  # |v|
    "coefficient",  # |m|
    "reciprocal_rank",  # 1 / rank of w among the logits of v
    "coefficient_norm",  # |m| |v|
    "coefficient_rank",  # |m| / rank of w among the logits of v
)
_OF_GAIN, _OF_RANK = ("log_prob_gain", "prob_gain"), ("reciprocal_rank", "coefficient_rank")
BLOCK = 2**22  # (neuron, token) logits that are held at once


def target_ranks(values: Tensor, unembed: Tensor, tokens: Tensor) -> Tensor:
    """(F, U) int32: 1 + the number of tokens with a larger logit of v than token u has.

    `values` (F, D), `unembed` (V, D), `tokens` (U,) int64. The logits are unembed @ v, without
    scale and offset; at most BLOCK of them are held, or those of one neuron.
    """
    n_tokens, step = len(unembed), max(1, BLOCK // len(unembed))
    found = []
    for start in range(0, len(values), step):
        logits = values[start : start + step].to(unembed.dtype) @ unembed.T
        own = logits[:, tokens]
        if logits.is_cpu:
            logits.numpy().sort(axis=1)  # with vector instructions, 25 times as fast as torch's
        else:
            logits = logits.sort(dim=1).values
        found.append((1 + n_tokens - torch.searchsorted(logits, own, right=True)).int())
    return torch.cat(found)


@dataclass(frozen=True)
class TargetRanks:
    """The ranks of U tokens among the logits of every value vector, shared by all sentences."""

    tokens: Tensor  # (U,) int64, ascending
    layers: list[Tensor]  # (F, U) int32

    @classmethod
    def of(cls, residual: ResidualModel, targets: Tensor) -> TargetRanks:
        """Of the distinct tokens of `targets` (N,) in every layer: 4 L F U bytes."""
        tokens = torch.unique(targets).to(residual.unembed.device)
        values = (layer.ffn_values() for layer in residual.layers)
        return cls(tokens, [target_ranks(v, residual.unembed, tokens) for v in values])

    def get(self, layer: int, targets: Tensor) -> Tensor:
        """(E, F) of the sentences' targets (E,), which must be among the tokens."""
        places = torch.searchsorted(self.tokens, targets.contiguous())
        if not torch.equal(self.tokens[places.clamp(max=len(self.tokens) - 1)], targets):
            raise ValueError("TargetRanks: the ranks of a target are not known; make them of all")
        return self.layers[layer][:, places].T


def layer_scores(
    x: Tensor,
    values: Tensor,
    coefficients: Tensor,
    unembed: Tensor,
    scale: Tensor,
    targets: Tensor,
    *,
    methods: Sequence[str] = METHODS,
    gain: Tensor | None = None,
    ranks: Tensor | None = None,
    offset: Tensor | None = None,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """The scores (E, F) of one layer's FFN neurons by some of the METHODS.

    `x` (E, D) base points, `values` (F, D), `coefficients` (E, F) = m, `unembed` (V, D), `scale`
    (E,), `targets` (E,) int64, `offset` (V,). `gain` (E, F) and `ranks` (E, F) are taken where
    they are known. In `unembed`'s dtype: float32 with gains certified to 1e-5, float64 exact.
    """
    wanted = unembed.dtype
    x, m = (t.to(unembed.device, wanted) for t in (x, coefficients))
    mode = "exact" if wanted == torch.float64 else "certified"

    def gain_from(base: Tensor) -> Tensor:
        found = logprob_gain(
            *(base, values.to(wanted), m, unembed, scale, targets),
            mode=mode,
            offset=offset,
            backend=backend,
        )
        return cast(Tensor, found)  # tops come of mode="top" alone

    def logprob_of(base: Tensor) -> Tensor:
        logits = scale.to(wanted)[:, None] * (base @ unembed.T) + (0 if offset is None else offset)
        return logits.log_softmax(-1).gather(1, targets[:, None])

    if gain is None and any(method in _OF_GAIN for method in methods):
        gain = gain_from(x)
    if ranks is None and any(method in _OF_RANK for method in methods):
        tokens, places = torch.unique(targets, return_inverse=True)
        ranks = target_ranks(values, unembed, tokens)[:, places].T
    norm = values.to(wanted).norm(dim=1).expand_as(m)
    zero = torch.zeros_like(x)
    by_method: dict[str, Callable[[], Tensor]] = {
        "log_prob_gain": lambda: cast(Tensor, gain),
        "log_prob": lambda: gain_from(zero) + logprob_of(zero),
        "prob_gain": lambda: logprob_of(x).exp() * cast(Tensor, gain).expm1(),
        "norm": lambda: norm,
        "coefficient": m.abs,
        "reciprocal_rank": lambda: 1 / cast(Tensor, ranks).to(wanted),
        "coefficient_norm": lambda: m.abs() * norm,
        "coefficient_rank": lambda: m.abs() / cast(Tensor, ranks).to(wanted),
    }
    return {method: by_method[method]() for method in methods}


def method_scores(
    residual: ResidualModel,
    trace: Trace,
    targets: Tensor,
    method: str,
    *,
    ranks: TargetRanks | None = None,
    norm_bias: bool = False,
    backend: str = "auto",
) -> list[Tensor]:
    """The scores (E, F) of every layer's FFN neurons at the last position by one of METHODS."""
    if method not in METHODS:
        raise RelneuronError(f"unknown method {method!r}", f"use {', '.join(METHODS)}", 2)
    return [
        traced_scores(
            *(residual, trace, targets, layer),
            methods=(method,),
            ranks=ranks,
            norm_bias=norm_bias,
            backend=backend,
        )[method]
        for layer in range(len(residual.layers))
    ]


def traced_scores(
    residual: ResidualModel,
    trace: Trace,
    targets: Tensor,
    layer: int,
    *,
    methods: Sequence[str] = METHODS,
    gain: Tensor | None = None,
    ranks: TargetRanks | None = None,
    norm_bias: bool = False,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """The scores (E, F) of one layer's FFN neurons at the last position, by several methods."""
    targets = targets.to(residual.unembed.device)
    return layer_scores(
        trace.r[layer][:, -1],
        residual.layers[layer].ffn_values(),
        trace.neurons[layer][:, -1],
        *(residual.unembed, trace.scale, targets),
        methods=methods,
        gain=gain,
        ranks=None if ranks is None else ranks.get(layer, targets),
        offset=residual.offset if norm_bias else None,
        backend=backend,
    )
