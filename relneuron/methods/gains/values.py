"""Value scores: by how much each write into the residual stream raises log p of the answer.

The `attribute` stage calls it for every batch (arXiv 2312.12141; methods B2 and B3). The units are
layers, heads, positions within heads, FFN neurons and attention neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from relneuron.model.stream.norms import Norm
from relneuron.model.stream.parts import ResidualLayer, ResidualModel
from relneuron.model.stream.trace import Trace
from relneuron.ops.logprob_gain.op import (
    GainLayer,
    TopGains,
    logprob_gain,
    logprob_gain_top,
    logprob_gain_vectors,
)

KINDS = ("ffn_layer", "attention_layer", "head", "position", "ffn_neuron", "attention_neuron")
FULL_MODES = ("certified", "exact")
_VECTORS = 1 << 25  # numbers of position vectors made at a time: 128 MB


@dataclass
class ValueScores:
    """Log-probability increases in nats of E sentences, float32 (float64 from a float64 model).

    Of a mixture of experts only the neurons of experts that the last token was sent to wrote
    anything: the others have the gain 0 in `ffn_neuron`, and are not in `ffn_top`. Layers with
    fewer than F neurons end with zeros.

    `attention_top.index` is position * H * d_h + coordinate, the position counted from the first
    token of the sentence, without padding; in `ffn_top.index` stands the neuron. Both are best
    first, of equal gains the later (layer, index) first, -1 where a sentence has fewer.
    """

    ffn_layer: Tensor | None  # (E, L)
    attention_layer: Tensor | None  # (E, L)
    head: Tensor | None  # (E, L, H)
    position: Tensor | None  # (E, L, H, T), NaN at padding
    ffn_neuron: Tensor | None  # (E, L, F)
    attention_neuron: Tensor | None  # (E, L, T, H * d_h), NaN at padding
    ffn_top: TopGains | None  # (E, top) each
    attention_top: TopGains | None


class _Setting(NamedTuple):
    """What all scores of a batch share."""

    unembed: Tensor
    frozen: Tensor  # (E,) float64: scale of the final norm at the last layer's output
    targets: Tensor
    own_norm: Norm | None  # recompute the scale with it; None: `frozen` everywhere
    shared: dict[str, Any]  # offset, cap and backend

    def scale(self, x: Tensor) -> Tensor:
        """(E,): the scale at the base points x (E, D)."""
        return self.frozen if self.own_norm is None else self.own_norm.scale(x)


class _Neurons(NamedTuple):
    """Neurons of a layer: those of the numbers `places` (K,) int64; None: all, in order."""

    places: Tensor | None
    layer: GainLayer


_Layer = Callable[[], _Neurons]


def value_scores(
    residual: ResidualModel,
    trace: Trace,
    targets: Tensor,
    *,
    writes: bool = True,
    ffn: str | None = "certified",
    attention: str | None = "top",
    top: int = 300,
    tolerance: float = 1e-5,
    own_norm: bool = False,
    norm_bias: bool = False,
    backend: str = "auto",
) -> ValueScores:
    """Imp(v | x) = log p(w | x + v) - log p(w | x) of everything that was written at position T.

    | unit                     | v                                             | x   |
    | attention layer l        | A^l (out's bias included)                     | h^l |
    | FFN layer l              | F^l (down's bias included)                    | r^l |
    | head (l, j)              | sum_p alpha_{T,p} val_p^j @ W_O^j              | h^l |
    | position (l, j, p)       | alpha_{T,p} val_p^j @ W_O^j                    | h^l |
    | FFN neuron (l, k)        | m_k W_down[:, k]                              | r^l |
    | of expert e (l, e F + k) | w_e m_{e,k} W_down^e[:, k]                    | r^l |
    | attention neuron (l, j, k, p) | alpha_{T,p} val_{p,k}^j W_O[:, j d_h + k] | h^l |

    r^l = h^l + A^l, of a parallel block (whose FFN reads h^l), too, so that the layers' gains add
    up from h^0 to h^L. w_e is the weight that the router gives expert e, or 1 where its input was
    multiplied by it; experts that every token goes to have what they are multiplied with, if
    anything, and stand behind the others.

    Where a norm stands behind W_O or W_down, v is what this norm makes of the column with its scale
    frozen at position T: s g (.) W_down[:, k] (columns centred under a LayerNorm), so the neurons
    of a layer add up to its write. A constant that writes are multiplied with is part of v, one of
    the logits of `residual.unembed`; a soft cap is put on the logits.

    log p(w | y) = log_softmax(s * y @ unembed.T)[w] with the scale s of the final norm frozen at
    the last layer's output; `own_norm` recomputes it at x and at x + v. `norm_bias` adds what the
    final norm's bias and the lm_head's give to the logits, which the method drops.

    Arguments
        targets    (E,) int64: the answer's token w
        writes     score layers, heads and positions, too; False leaves them None
        ffn        certified | exact: all FFN neurons and the `top` largest; top: only these; None
        attention  the same for attention neurons, of which there are L * T * H * d_h a sentence
        top        how many a sentence; these sets are exact in every mode
        tolerance  of `certified`, in nats, with the unembedding as it is folded, in float32
        backend    of the op `logprob_gain`

    Raises ValueError for another mode, and what `logprob_gain` raises.
    """
    for mode in (ffn, attention):
        if mode not in (None, "top", *FULL_MODES):
            raise ValueError(
                f"value_scores: mode must be top, certified, exact or None, got {mode}"
            )
    setting = _Setting(
        unembed=residual.unembed,
        frozen=trace.scale,
        targets=targets.to(residual.unembed.device),
        own_norm=residual.final_norm if own_norm else None,
        shared={
            "offset": residual.offset if norm_bias else None,
            "cap": residual.cap,
            "backend": backend,
        },
    )
    scores = ValueScores(*[None] * 8)
    if writes:
        found = [_writes(residual, trace, layer, setting) for layer in residual.layers]
        stacked = list(map(_stack, zip(*found, strict=True)))
        scores.ffn_layer, scores.attention_layer = stacked[:2]
        if not residual.no_heads:
            scores.head, scores.position = stacked[2:]
    if ffn is not None:
        layers = [partial(_ffn_neurons, trace, layer, setting) for layer in residual.layers]
        is_made = any(x.ffn.norm or x.mixture for x in residual.layers)
        scores.ffn_top = _top(layers, setting, top, is_made)
        scores.ffn_neuron = _all(layers, setting, ffn, tolerance, residual.width)
    if attention is not None:
        if residual.no_heads:
            raise ValueError(f"value_scores: attention neurons of {residual.no_heads}")
        layers = [partial(_attention_neurons, trace, layer, setting) for layer in residual.layers]
        is_made = any(x.attention.norm for x in residual.layers)
        scores.attention_top = _without_padding(
            _top(layers, setting, top, is_made), trace.n_pad, residual.n_heads * residual.head_dim
        )
        full = _all(layers, setting, attention, tolerance, residual.n_heads * residual.head_dim)
        if full is not None:
            full.masked_fill_(~trace.mask[:, None, :, None], torch.nan)
        scores.attention_neuron = full
    return scores


def _stack(layers: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(layers), 1)


# --- layers, heads, positions ----------------------------------------------------------------


def _vector_gains(x: Tensor, vectors: Tensor, setting: _Setting, rows: slice) -> Tensor:
    """(e, M) gains of vectors (e, M, D) that the sentences `rows` wrote at x (e, D)."""
    after = None
    if setting.own_norm is not None:
        after = setting.own_norm.scale(x.double()[:, None] + vectors)
    scale = setting.frozen[rows] if after is None else setting.scale(x)
    targets = setting.targets[rows]
    return logprob_gain_vectors(
        x, vectors, setting.unembed, scale, targets, scale_after=after, **setting.shared
    )


def _writes(
    residual: ResidualModel, trace: Trace, layer: ResidualLayer, setting: _Setting
) -> tuple[Tensor, ...]:
    """Gains of one layer's FFN write (E,), attention write (E,), heads (E, H), positions (E, H, T).

    Without the last two where heads are not told apart. Sentences go in blocks, for all vectors of
    positions are as many as H * T * D numbers each.
    """
    i, dtype = layer.layer, setting.unembed.dtype
    n_sentences, n_tokens = trace.mask.shape
    n_heads, head_dim = residual.n_heads, residual.head_dim
    if n_heads:
        values = layer.attention_values().to(dtype).reshape(n_heads, head_dim, -1)
    size = max(1, _VECTORS // (n_tokens * max(1, n_heads) * residual.hidden))
    found = []
    for start in range(0, n_sentences, size):
        rows = slice(start, start + size)
        h, r = trace.h[i][rows, -1].to(dtype), trace.r[i][rows, -1].to(dtype)
        vectors = trace.attention[i][rows, -1:].to(dtype)
        if n_heads:
            coefficients = trace.coefficients(i)[rows].to(dtype)
            coefficients = coefficients.reshape(-1, n_tokens, n_heads, head_dim)
            positions = torch.einsum("epjk,jkd->ejpd", coefficients, values)
            vectors = torch.cat([vectors, positions.sum(2), positions.flatten(1, 2)], 1)
        gains = _vector_gains(h, vectors, setting, rows)
        ffn = _vector_gains(r, trace.ffn[i][rows, -1:].to(dtype), setting, rows)
        found.append(torch.cat([ffn, gains], 1))
    gains = torch.cat(found)
    if not n_heads:
        return gains[:, 0], gains[:, 1]
    position = gains[:, 2 + n_heads :].reshape(n_sentences, n_heads, n_tokens)
    position = position.masked_fill(~trace.mask[:, None], torch.nan)
    return gains[:, 0], gains[:, 1], gains[:, 2 : 2 + n_heads], position


def write_bytes(n_sentences: int, n_tokens: int, n_heads: int, hidden: int) -> int:
    """What the scores of writes hold at most: float32 vectors of all positions, and a copy."""
    numbers = n_tokens * n_heads * hidden
    return 2 * 4 * min(n_sentences, max(1, _VECTORS // max(1, numbers))) * numbers


# --- neurons ---------------------------------------------------------------------------------


def _ffn_neurons(trace: Trace, layer: ResidualLayer, setting: _Setting) -> _Neurons:
    places, values, coefficients, valid = trace.columns(layer)
    x, valid = trace.r[layer.layer][:, -1], None if valid is None else valid[:, None]
    return _Neurons(places, _gain_layer(x, values, coefficients, setting, valid))


def _attention_neurons(trace: Trace, layer: ResidualLayer, setting: _Setting) -> _Neurons:
    x, coefficients = trace.h[layer.layer][:, -1], trace.coefficients(layer.layer)
    own = _gain_layer(x, layer.attention_values(), coefficients, setting, trace.mask)
    return _Neurons(None, own)


def _gain_layer(
    x: Tensor, values: Tensor, coefficients: Tensor, setting: _Setting, valid: Tensor | None
) -> GainLayer:
    after = None
    if setting.own_norm is not None:
        after = scale_after(setting.own_norm, x, values, coefficients)
    return GainLayer(x, values, coefficients, after, valid)


def scale_after(norm: Norm, x: Tensor, values: Tensor, coefficients: Tensor) -> Tensor:
    """1 / sqrt(mean square of x + c v, + eps), float64 like `coefficients` (E, K) or (E, P, K).

    |x + c v|^2 = |x|^2 + 2 c <x, v> + c^2 |v|^2, in float64 as the terms may cancel; x (E, D) and
    values (K, D) centred first where the norm centres.
    """
    x, values, c = x.double(), values.double(), coefficients.double()
    if norm.centred:
        x = x - x.mean(1, keepdim=True)
        values = values - values.mean(1, keepdim=True)
    xx, xv = x.square().mean(1, keepdim=True), x @ values.T / x.shape[1]
    if c.dim() == 3:
        xx, xv = xx[:, None], xv[:, None]
    # A neuron that writes nothing has the bits of `Norm.scale`, so that its gain is exactly 0.
    square = xx + 2 * c * xv + c.square() * values.square().mean(1)
    return (square.clamp(min=0) + norm.eps).rsqrt()


def _all(
    layers: Sequence[_Layer], setting: _Setting, mode: str, tolerance: float, width: int
) -> Tensor | None:
    """Gains of all neurons like their coefficients, layers in dimension 1; None for mode `top`.

    (E, L, `width`) of mixtures, with zeros where a sentence does not have the neurons.
    """
    if mode not in FULL_MODES:
        return None
    found = []
    for places, layer in (make() for make in layers):
        gains = logprob_gain(
            layer.x,
            layer.values,
            layer.coefficients,
            setting.unembed,
            setting.scale(layer.x),
            setting.targets,
            mode=mode,
            tolerance=tolerance,
            scale_after=layer.scale_after,
            **setting.shared,
        )
        gains = cast(Tensor, gains)
        if places is None and gains.shape[-1] == width:
            found.append(gains)
            continue
        whole = gains.new_zeros(len(gains), width)
        if places is None:
            whole[:, : gains.shape[1]] = gains
        else:
            whole[:, places] = gains
        found.append(whole)
    return _stack(found)


def _top(layers: Sequence[_Layer], setting: _Setting, top: int, is_made: bool) -> TopGains:
    """The largest gains over all layers.

    Merged from each layer's largest where it has its own scale, or where its value vectors
    (`is_made`) are not its weight but made of it, so that those of one layer are held at a time.
    """
    if setting.own_norm is None and not is_made:
        return logprob_gain_top(
            *([make().layer for make in layers], setting.unembed, setting.frozen, setting.targets),
            top=top,
            **setting.shared,
        )
    found = []
    for number, (places, layer) in enumerate(make() for make in layers):
        scale = setting.scale(layer.x)
        best = logprob_gain_top(
            [layer], setting.unembed, scale, setting.targets, top=top, **setting.shared
        )
        index = best.index if places is None else places[best.index.clamp(min=0)]
        is_none = best.index < 0
        layer_of = torch.where(is_none, -1, number)
        found.append(best._replace(layer=layer_of, index=torch.where(is_none, -1, index)))
    # Later layers first, and a stable sort: of equal gains the later (layer, index) stays first.
    gain, layer_of, index = (torch.cat(parts, 1) for parts in zip(*reversed(found), strict=True))
    order = gain.argsort(dim=1, descending=True, stable=True)[:, :top]
    return TopGains(gain.gather(1, order), layer_of.gather(1, order), index.gather(1, order))


def _without_padding(found: TopGains, n_pad: Tensor, width: int) -> TopGains:
    """Positions counted from each sentence's first token; `width` coordinates a position."""
    shifted = found.index - n_pad[:, None] * width
    return found._replace(index=torch.where(found.index < 0, -1, shifted))
