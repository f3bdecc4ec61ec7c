"""Scores of a sentence's units besides the gain: query scores, and the eight that are compared.

The `attribute` stage takes the query scores of the largest value neurons, which layers and FFN
neurons activate them (arXiv 2312.12141; methods B4). methods/gains/comparison.py chooses neurons by
each of the eight scores, and compares what their best neurons do to the answer (section 4; methods
B5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import Shape
from relneuron.model.stream.parts import QUERY_KEYS, ResidualModel
from relneuron.model.stream.trace import Trace
from relneuron.ops.logprob_gain.op import TopGains, logprob_gain

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
      In a parallel block the FFN reads h^l, and A^l is none.

    FFN neuron n of layer l' < l is the component m^l'_n W_down^l'[:, n], its coefficient taken at
    the unit's position; those of experts that the token there was not sent to are none. `units`
    are `ValueScores.attention_top` or `ffn_top`, of which the first `n_units` of a sentence count.

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
        reads_attention = above
        if kind == "ffn" and not layer.is_parallel:
            reads_attention = chosen.above(i - 1)
        add(2 * i + 1, trace.attention[i], reads_attention)
        add(2 * i + 2, trace.ffn[i], above)
        n_readers = above.sentence.bincount(minlength=n_sentences).clamp(min=1)[:, None]
        if not len(above.keys):
            continue
        step = max(1, _SCRATCH // max(len(above.keys), residual.hidden))
        for block in trace.blocks(layer, above.sentence, above.column):
            readers = above if block.rows is None else above.at(block.rows)
            n_of = n_readers[readers.sentence]
            for start in range(0, len(block.values), step):
                some = slice(start, min(start + step, len(block.values)))
                products = readers.keys @ block.values[some].double().T
                written = block.read(some).double()
                if block.scale is not None:
                    written *= block.scale[:, None]
                own = slice(block.start + some.start, block.start + some.stop)
                coefficients[:, i, own].index_add_(0, readers.sentence, written / n_of)
                products *= written
                neurons[:, i, own].index_add_(0, readers.sentence, products)
    dtype = residual.unembed.dtype
    return QueryScores(layers.to(dtype), neurons.to(dtype), coefficients.to(dtype))


def query_bytes(n_sentences: int, shape: Shape, n_units: int) -> int:
    """About what `query_scores` holds beside its trace: its float64 numbers, of 8 bytes each."""
    width, hidden, n = shape.widths["gate"], shape.widths["down"], n_sentences * n_units
    step = min(width, max(1, _SCRATCH // max(n, hidden)))  # neurons at a time
    tables = 2 * n_sentences * shape.layers * width
    return 8 * (n * hidden + step * hidden + 3 * n * step + tables)


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
    column, unit = torch.full_like(index, last), index
    if kind == "attention":
        width = residual.n_heads * residual.head_dim
        column, unit = index // width + trace.n_pad[sentence], index % width
    chosen = _Units(sentence, layer, column, gain.new_zeros(len(gain), residual.hidden))
    for number in sorted(set(layer.tolist())):
        rows = (layer == number).nonzero()[:, 0]
        of, read = residual.layers[number], unit[rows]
        keys = (
            of.attention_keys(read, center=center)
            if kind == "attention"
            else of.ffn_keys(key, read, center=center)
        )
        reads_h = kind == "attention" or of.is_parallel
        stream = (trace.h if reads_h else trace.r)[number]
        total = (chosen.at(rows).read(stream) * keys).sum(1)
        weight = torch.where(total == 0, 0.0, gain[rows] / total)
        chosen.keys[rows] = keys * weight[:, None]
    return chosen


# Eight scores of FFN neurons

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
        layers = [
            [target_ranks(values, residual.unembed, tokens) for values in layer.value_blocks()]
            for layer in residual.layers
        ]
        return cls(tokens, [ranks[0] if len(ranks) == 1 else torch.cat(ranks) for ranks in layers])

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
    cap: float | None = None,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """The scores (E, F) of one layer's FFN neurons by some of the METHODS.

    `x` (E, D) base points, `values` (F, D), `coefficients` (E, F) = m, `unembed` (V, D), `scale`
    (E,), `targets` (E,) int64, `offset` (V,), the `cap` of the logits. `gain` (E, F) and `ranks`
    (E, F) are taken where they are known. In `unembed`'s dtype: float32 with gains certified to
    1e-5, float64 exact.
    """
    wanted = unembed.dtype
    x, m = (t.to(unembed.device, wanted) for t in (x, coefficients))
    mode = "exact" if wanted == torch.float64 else "certified"

    def gain_from(base: Tensor) -> Tensor:
        found = logprob_gain(
            *(base, values.to(wanted), m, unembed, scale, targets),
            mode=mode,
            offset=offset,
            cap=cap,
            backend=backend,
        )
        return cast(Tensor, found)  # tops come of mode="top" alone

    def logprob_of(base: Tensor) -> Tensor:
        logits = scale.to(wanted)[:, None] * (base @ unembed.T) + (0 if offset is None else offset)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
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
    """The scores (E, F) of one layer's FFN neurons at the last position, by several methods.

    Those of experts that a sentence's last token was not sent to have none: -inf.
    """
    targets = targets.to(residual.unembed.device)
    part, x = residual.layers[layer], trace.r[layer][:, -1]
    places, values, coefficients, valid = trace.columns(part)
    known = None if ranks is None else ranks.get(layer, targets)
    gain = None if gain is None else gain[:, : part.n_neurons]
    if places is not None:
        known, gain = (None if one is None else one[:, places] for one in (known, gain))
    found = layer_scores(
        *(x, values, coefficients, residual.unembed, trace.scale, targets),
        methods=methods,
        gain=gain,
        ranks=known,
        offset=residual.offset if norm_bias else None,
        cap=residual.cap,
        backend=backend,
    )
    if places is None or valid is None:
        return found
    whole = {}
    for name, scores in found.items():
        whole[name] = scores.new_full((len(x), part.n_neurons), -torch.inf)
        whole[name][:, places] = scores.where(valid, -torch.inf)
    return whole
