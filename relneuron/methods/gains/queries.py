"""Query scores: which layers and FFN neurons activate the value neurons of a sentence.

The `attribute` stage calls it with the largest value neurons (arXiv 2312.12141; methods B4);
`promoted_tokens` says for the report which tokens a value vector raises most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from relneuron.model.stream_layers import QUERY_KEYS, ResidualModel
from relneuron.model.trace import Trace
from relneuron.ops.logprob_gain.op import TopGains

UNIT_KINDS = ("attention", "ffn")
_SCRATCH = 1 << 22  # float64 numbers of neurons at a time: 32 MB


@dataclass
class QueryScores:
    """Value score times share in what the value units read, summed over a sentence's units.

    Components of `layer` in order: h^0, A^0, F^0, A^1, F^1, ...; those that no unit reads are 0.
    """

    layer: Tensor  # (E, 2 L + 1)
    ffn_neuron: Tensor  # (E, L, F)
    coefficient: Tensor  # (E, L, F): m^l_n where the units read it, mean over them; 0 without one


@dataclass(frozen=True)
class _Units:
    """The value units of all sentences, one a row of n."""

    sentence: Tensor  # (n,)
    layer: Tensor  # (n,)
    column: Tensor  # (n,): the position that the unit reads, padding counted
    keys: Tensor  # (n, D) float64: q (.) gain * Imp / <h, q (.) gain>

    def above(self, layer: int) -> _Units:
        """Those that read what `layer` writes: the units of the layers after it."""
        return self.at(self.layer > layer)

    def at(self, rows: Tensor) -> _Units:
        return _Units(self.sentence[rows], self.layer[rows], self.column[rows], self.keys[rows])

    def read(self, component: Tensor) -> Tensor:
        """(n, ...) float64: a component (E, T, ...) at each unit's sentence and position."""
        return component[self.sentence, self.column].double()


def query_scores(
    residual: ResidualModel,
    trace: Trace,
    units: TopGains,
    *,
    kind: str = "attention",
    n_units: int = 30,
    key: str = "gate",
    center_keys: bool = True,
) -> QueryScores:
    """Q[c] = sum over value units of Imp(unit) * <c, q (.) g> / <h, q (.) g>, no absolute values.

    Each unit reads the residual h at its own position with the key q behind a norm of gain g:

    - kind `attention`: unit (l, j, k, p), q = row k of head j's W_V, h = h^l at position p; the
      components are h^0 and A^l', F^l' of the layers l' < l;
    - kind `ffn`: unit (l, k), q = `key` of neuron k (gate | up row, or down: the value vector, as
      the authors' Llama notebook has it), h = r^l at the last position; A^l is a component, too.

    FFN neuron n of layer l' < l is the component m^l'_n W_down^l'[:, n], its coefficient taken at
    the unit's position. `units` are `ValueScores.attention_top` or `ffn_top`, of which the first
    `n_units` of a sentence count.

    Under a LayerNorm what a unit reads is <h - mean(h), q (.) g>, so keys are centred: the shares
    of what it really reads. The published GPT-2 notebook does not (methods B4 has no centring, and
    its golden numbers come from that formula); `center_keys` False does as it does. Under an
    RMSNorm both are the same.

    Returns float32 (float64 for a float64 model); the sums are float64. A unit that reads exactly
    nothing, <h, q (.) g> = 0, has no shares and counts as 0. Raises ValueError for another kind.
    """
    if kind not in UNIT_KINDS or key not in QUERY_KEYS:
        raise ValueError(
            f"query_scores: kind {kind!r} of {UNIT_KINDS}, key {key!r} of {QUERY_KEYS}"
        )
    chosen = _read_units(residual, trace, units, kind, n_units, key, center_keys)
    n_sentences, n_layers = len(trace.mask), len(residual.layers)
    layers = chosen.keys.new_zeros(n_sentences, 2 * n_layers + 1)
    neurons = chosen.keys.new_zeros(n_sentences, n_layers, residual.width)
    coefficients = torch.zeros_like(neurons)

    def add(place: int, component: Tensor, readers: _Units) -> None:
        shares = (readers.read(component) * readers.keys).sum(1)
        layers[:, place].index_add_(0, readers.sentence, shares)

    add(0, trace.h[0], chosen)
    for layer in residual.layers:
        i = layer.layer
        above = chosen.above(i)
        reads_attention = chosen.above(i - 1) if kind == "ffn" else above
        add(2 * i + 1, trace.attention[i], reads_attention)
        add(2 * i + 2, trace.ffn[i], above)
        n_readers = above.sentence.bincount(minlength=n_sentences).clamp(min=1)[:, None]
        values, step = layer.ffn_values(), max(1, _SCRATCH // max(len(above.keys), residual.hidden))
        for start in range(0, residual.width if len(above.keys) else 0, step):
            some = slice(start, start + step)
            products = above.keys @ values[some].double().T
            written = above.read(trace.neurons[i][..., some])
            coefficients[:, i, some].index_add_(
                0, above.sentence, written / n_readers[above.sentence]
            )
            products *= written
            neurons[:, i, some].index_add_(0, above.sentence, products)
    dtype = residual.unembed.dtype
    return QueryScores(layers.to(dtype), neurons.to(dtype), coefficients.to(dtype))


def _read_units(
    residual: ResidualModel,
    trace: Trace,
    units: TopGains,
    kind: str,
    n_units: int,
    key: str,
    center: bool,
) -> _Units:
    """The first `n_units` of each sentence with their keys, weighted by Imp / <h, key>."""
    gain, layer, index = (part[:, :n_units] for part in units)
    sentence, _ = (layer >= 0).nonzero(as_tuple=True)
    gain, layer, index = (part[layer >= 0] for part in (gain.double(), layer, index))
    last = trace.mask.shape[1] - 1
    column = torch.full_like(index, last)
    unit, residuals = index, trace.r
    if kind == "attention":
        width = residual.n_heads * residual.head_dim
        column, unit = index // width + trace.n_pad[sentence], index % width
        residuals = trace.h
    chosen = _Units(sentence, layer, column, gain.new_zeros(len(gain), residual.hidden))
    for number in sorted(set(layer.tolist())):
        rows = (layer == number).nonzero()[:, 0]
        of, read = residual.layers[number], unit[rows]
        keys = (
            of.attention_keys(read, center=center)
            if kind == "attention"
            else of.ffn_keys(key, read, center=center)
        )
        total = (chosen.at(rows).read(residuals[number]) * keys).sum(1)
        weight = torch.where(total == 0, 0.0, gain[rows] / total)
        chosen.keys[rows] = keys * weight[:, None]
    return chosen


def promoted_tokens(
    residual: ResidualModel, kind: str, layer: int, index: int, n: int = 10, *, sign: int = 1
) -> list[tuple[int, float]]:
    """The `n` largest of unembed @ v for a neuron's value vector v, as (token id, logit).

    With `sign` -1 the `n` least, which the neuron raises where its coefficient is negative.

    `kind` is `ffn_neuron` or `attention_neuron`; `index` of an attention neuron is the coordinate
    j d_h + k, or its flat index, position * H * d_h + coordinate. Of equal logits the lower token
    comes first. The logits are without the norm's scale.
    """
    if kind not in ("ffn_neuron", "attention_neuron"):
        raise ValueError(f"promoted_tokens: {kind!r} is no kind of neuron")
    part = residual.layers[layer]
    values = part.ffn_values() if kind == "ffn_neuron" else part.attention_values()
    place = index if kind == "ffn_neuron" else index % len(values)
    logits = residual.unembed @ values[place].to(residual.unembed.dtype)
    order = (sign * logits).argsort(descending=True, stable=True)[:n]
    return list(zip(order.tolist(), logits[order].tolist(), strict=True))
