"""The op `logprob_gain`: by how much each neuron raises the log-probability of a token.

`attribute` calls it for every neuron, head and layer. Here are the public functions and their spec;
ops/logprob_gain/base.py has the base points and the float64 reference, ops/logprob_gain/engine.py
evaluates neurons, ops/logprob_gain/search.py finds the largest. The C++ kernel is
csrc/logprob_gain*, the Triton kernels are ops/logprob_gain/triton_launch.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from relneuron.ops.backends import check_backend_name, choose_backend
from relneuron.ops.logprob_gain.base import Base, Head, make_head
from relneuron.ops.logprob_gain.engine import Engine
from relneuron.ops.logprob_gain.search import Search
from relneuron.ops.tensors import check_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODES = ("exact", "certified", "top")


class GainLayer(NamedTuple):
    """One layer's neurons for `logprob_gain_top`."""

    x: Tensor  # (E, D)
    values: Tensor  # (K, D)
    coefficients: Tensor  # (E, K) or (E, P, K)
    scale_after: Tensor | None = None  # like coefficients
    valid: Tensor | None = None  # (E, P) or (E, P, K) bool; others are never chosen


class TopGains(NamedTuple):
    """The largest gains of each sentence, best first, (E, top) each.

    `index` is flat, p * K + k. Among equal gains the later (layer, index) comes first. Where there
    are fewer than `top` valid ones, gain is -inf, layer and index are -1.
    """

    gain: Tensor
    layer: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


def logprob_gain(
    x: Tensor,
    values: Tensor,
    coefficients: Tensor,
    unembed: Tensor,
    scale: Tensor,
    targets: Tensor,
    *,
    mode: str = "exact",
    tolerance: float = 1e-5,
    top: int | None = None,
    offset: Tensor | None = None,
    scale_after: Tensor | None = None,
    cap: float | None = None,
    backend: str = "auto",
) -> Tensor | TopGains:
    """Log-probability increase of every neuron (arXiv 2312.12141, equation of Imp; nats).

        gain = log p(w | x + c v) - log p(w | x),  p(. | y) = softmax(scale * unembed @ y + offset)

    for each sentence's target token w, coefficient c and each neuron's value vector v.

    Arguments
        x             (E, D) the residual state of each sentence
        values        (K, D) value vectors, any strides (a transposed weight is read as it lies)
        coefficients  (E, K), or (E, P, K) where a neuron has P coefficients on the same x and v
                      (attention neurons: one a position)
        unembed       (V, D) unembedding with the final norm's gain folded in
        scale         (E,) the final norm's scale, frozen at its value in the unchanged model
        targets       (E,) int64 in [0, V)
        mode          exact: the definition in float32; certified: every value within `tolerance`
                      of the definition's, and half an ulp of its own; top: only the `top` largest
                      of each sentence
        offset        (V,) added to the logits: a norm's bias through the unembedding
        scale_after   like coefficients: the scale at x + c v, where the norm is recomputed there
        cap           logits are cap * tanh(logits / cap), the offset included (Gemma 2)
        backend       auto | reference | cpu | triton; one that cannot run here raises

    x, values, unembed and coefficients are float32|bfloat16|float16 in any mix, or all float64,
    which the reference computes (backend auto or reference).

    How. Logits at x + c v are those at x plus scale c b, b = unembed @ v, so

        gain = t b_w - log(sum over tokens v of p_v exp(t b_v)),  t = scale * c

    b is made in tiles that all sentences and positions share; no tensor of (neurons, V) exists.
    With M_n = E_p b^n, log(1 + S), S = t M_1 + t^2 M_2 / 2 + t^3 M_3 / 6 has a remainder of S of at
    most x^2 y e^x / 24, x = |t| max |b|, y = t^2 M_2; a pair whose bound is above the tolerance is
    evaluated exactly, and in float64 where float32 could be off by more than it. (On a CPU moments
    serve neurons of three coefficients or more: for fewer, the exact sums cost no more.) `top`
    visits neurons by their first-order gain t (b_w - M_1), which no gain exceeds as log p(w) is
    concave along v, until it proves the rest smaller; gains at the edge of the list are told apart
    in float64, so the set is that of the definition.

    With a `cap` S is a sum over tokens of p_v (exp(move_v) - 1), in plain torch for every backend,
    and costs several times as much; the tangent is that of the capped logits, whose second
    derivative adds 0.77 / cap (t max |b|)^2 to the bounds.

    Base points are in float64. Rounding bounds are no worst case but twice what the worst inputs
    show: inner products off by 8 units of 2^-24 times the product of norms, and more where all
    their terms have one sign or tensor cores cut off what does not fit (`product_units` in
    ops/logprob_gain/base.py). A GPU's products are compared with float64 in a sample; where they
    are off by more, float64 takes over.

    Returns gains like `coefficients`, float32 (float64 for float64 inputs); with mode="top"
    `TopGains`. The sums over the vocabulary have the same bits for every number of threads.

    Raises ValueError for shapes, dtypes or devices that do not fit, a target outside the
    vocabulary, values that are not finite, and options that do not go together. There is no
    gradient: with grad mode on, tensors that require it are refused.
    """
    layer = GainLayer(x, values, coefficients, scale_after)
    if mode not in MODES:
        raise ValueError(f"logprob_gain: mode must be one of {MODES}, got {mode!r}")
    if (top is not None) != (mode == "top"):
        raise ValueError("logprob_gain: top is given with mode='top', and only with it")
    if not tolerance > 0:
        raise ValueError(f"logprob_gain: tolerance must be positive, got {tolerance}")
    if mode == "top":
        return logprob_gain_top(
            *([layer], unembed, scale, targets),
            top=cast(int, top),
            offset=offset,
            cap=cap,
            backend=backend,
        )
    engine, head = _prepare([layer], unembed, scale, targets, offset, cap, backend)
    base = _base(head, layer)
    gains = engine.all_gains(base) if mode == "exact" else engine.certified(base, tolerance)
    return gains.reshape(coefficients.shape)


def logprob_gain_vectors(
    x: Tensor,
    vectors: Tensor,
    unembed: Tensor,
    scale: Tensor,
    targets: Tensor,
    *,
    offset: Tensor | None = None,
    scale_after: Tensor | None = None,
    cap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`logprob_gain` of each sentence's own vectors (E, M, D), with coefficients of one: (E, M).

    What heads, positions and whole layers write, which no two sentences share.
    """
    given = {"x": x, "vectors": vectors, "scale_after": scale_after}
    _check_plain(given)
    _check_vectors(x, vectors, scale_after)
    n_sentences, n_vectors, hidden = vectors.shape
    values = vectors.reshape(n_sentences * n_vectors, hidden)
    after = None
    if scale_after is not None:
        after = scale_after.reshape(1, -1).expand(n_sentences, -1)[:, None]
    # One coefficient a vector; a broadcast view, of which only each sentence's own are evaluated.
    ones = torch.ones(1, 1, dtype=values.dtype, device=x.device).expand(n_sentences, len(values))
    layer = GainLayer(x, values, ones)
    engine, head = _prepare([layer], unembed, scale, targets, offset, cap, backend)
    base = Base(head, x, values, ones[:, None], after)
    own = torch.arange(n_sentences * n_vectors, device=x.device)
    gains, _ = engine.gains(base, own + own // max(1, n_vectors) * len(values))
    return gains.to(base.t.dtype).reshape(n_sentences, n_vectors)


def logprob_gain_top(
    layers: Sequence[GainLayer],
    unembed: Tensor,
    scale: Tensor,
    targets: Tensor,
    *,
    top: int,
    offset: Tensor | None = None,
    cap: float | None = None,
    backend: str = "auto",
) -> TopGains:
    """The `top` largest gains of each sentence over all neurons of several layers, exact.

    Arguments and arithmetic are those of `logprob_gain`; see there. First-order gains of all
    neurons are held at once, E * P * K numbers a layer.
    """
    if top < 1:
        raise ValueError(f"logprob_gain: top must be positive, got {top}")
    if not layers:
        raise ValueError("logprob_gain: there must be a layer, got none")
    engine, head = _prepare(layers, unembed, scale, targets, offset, cap, backend)
    bases, n_held = [], 0
    for layer in layers:
        bases.append(_base(head, layer))
        n_held += len(layer.x) * len(unembed)
        bases[-1].is_held = n_held <= unembed.numel() // 4
        bases[-1].rest()
    return TopGains(*Search(engine, bases, [layer.valid for layer in layers], top).run())


def _base(head: Head, layer: GainLayer) -> Base:
    """The base of a layer, its coefficients as (E, P, K)."""
    c, after = layer.coefficients, layer.scale_after
    if c.dim() == 2:
        c, after = c[:, None], None if after is None else after[:, None]
    return Base(head, layer.x, layer.values, c, after)


# --------------------------------------------------------------------------------------------------
# Checks


def _prepare(
    layers: Sequence[GainLayer],
    unembed: Tensor,
    scale: Tensor,
    targets: Tensor,
    offset: Tensor | None,
    cap: float | None,
    backend: str,
) -> tuple[Engine, Head]:
    """Check everything before anything is computed; the engine and the head."""
    check_backend_name("logprob_gain", backend)
    given = {"unembed": unembed, "scale": scale, "targets": targets, "offset": offset}
    for number, layer in enumerate(layers):
        own = layer._asdict()
        given |= {f"{n} of layer {number}" if len(layers) > 1 else n: t for n, t in own.items()}
    _check_plain(given)
    if not isinstance(unembed, Tensor) or unembed.dim() != 2 or not unembed.numel():
        raise _error("unembed", "(V, D)", unembed)
    chosen = choose_backend("logprob_gain", backend, unembed.device)
    n_tokens, hidden = unembed.shape
    x = layers[0].x
    n_sentences = len(x) if isinstance(x, Tensor) and x.dim() else 0
    for layer in layers:
        _check_layer(layer, n_sentences, hidden)
    tensors = {"unembed": unembed, "scale": scale, "targets": targets, "offset": offset}
    _check_shape("scale", scale, f"(E,) with E={n_sentences} (from x)", (n_sentences,))
    _check_shape("targets", targets, f"(E,) with E={n_sentences} (from x)", (n_sentences,))
    if targets.dtype != torch.int64:
        raise _error("targets", "int64", targets)
    if offset is not None:
        _check_shape("offset", offset, f"(V,) with V={n_tokens} (from unembed)", (n_tokens,))
    floats = {"unembed": unembed, "scale": scale}
    if offset is not None:
        floats["offset"] = offset
    for number, layer in enumerate(layers):
        own = {"x": layer.x, "values": layer.values, "coefficients": layer.coefficients}
        if layer.scale_after is not None:
            own["scale_after"] = layer.scale_after
        tensors |= {f"{name} of layer {number}": tensor for name, tensor in own.items()}
        floats |= own
        _check_dtypes(unembed, own)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != unembed.device:
            raise ValueError(
                f"logprob_gain: {name} must be on {unembed.device} (from unembed), "
                f"got {tensor.device}"
            )
    if n_sentences and not 0 <= int(targets.min()) <= int(targets.max()) < n_tokens:
        outside = targets[(targets < 0) | (targets >= n_tokens)][0]
        raise ValueError(
            f"logprob_gain: targets must be in [0, {n_tokens}) (V from unembed), got {int(outside)}"
        )
    if not bool((scale > 0).all()):
        raise ValueError("logprob_gain: scale must be positive")
    if unembed.dtype == torch.float64:
        if backend not in ("auto", "reference"):
            raise ValueError(
                f"logprob_gain: backend={backend!r} must have float32, bfloat16 or float16, "
                "got float64; the reference takes it"
            )
        chosen = "reference"
    if cap is not None and not 0 < cap < torch.inf:
        raise ValueError(f"logprob_gain: cap must be positive and finite, got {cap}")
    engine = Engine(chosen)
    head = make_head(unembed, scale, targets, offset, cap)
    for name, tensor in floats.items():
        finite = head.norm < torch.inf if name == "unembed" else _is_finite(tensor)
        if not finite:
            raise ValueError(f"logprob_gain: {name} must be finite, got nan or inf")
    return engine, head


def _check_plain(given: Mapping[str, object]) -> None:
    """What is no tensor is refused by the checks of shapes."""
    tensors = {name: each for name, each in given.items() if isinstance(each, Tensor)}
    check_tensors("logprob_gain", tensors)


def _check_layer(layer: GainLayer, n_sentences: int, hidden: int) -> None:
    for name, tensor in (("x", layer.x), ("values", layer.values)):
        wanted = f"(-, D) with D={hidden} (from unembed)"
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or tensor.shape[1] != hidden:
            raise _error(name, wanted, tensor)
    c = layer.coefficients
    wanted = f"(E, K) or (E, P, K) with E={n_sentences} (from x), K={len(layer.values)} (values)"
    if not isinstance(c, Tensor) or c.dim() not in (2, 3):
        raise _error("coefficients", wanted, c)
    if len(layer.x) != n_sentences:
        raise _error("x", f"(E, D) with E={n_sentences} (from the first layer)", layer.x)
    if len(c) != n_sentences or c.shape[-1] != len(layer.values):
        raise _error("coefficients", wanted, c)
    if layer.scale_after is not None:
        shape = tuple(c.shape)
        _check_shape("scale_after", layer.scale_after, f"{shape} (coefficients)", shape)
        if not bool((layer.scale_after > 0).all()):
            raise ValueError("logprob_gain: scale_after must be positive")
    if layer.valid is not None:
        shape = (n_sentences, c.shape[1] if c.dim() == 3 else 1)
        if isinstance(layer.valid, Tensor) and layer.valid.dim() == 3:
            shape = (*shape, c.shape[-1])
        _check_shape("valid", layer.valid, f"{shape} bool", shape)
        if layer.valid.dtype != torch.bool:
            raise _error("valid", f"{shape} bool", layer.valid)


def _check_dtypes(unembed: Tensor, own: dict[str, Tensor]) -> None:
    for name in ("x", "values", "coefficients"):
        dtype = own[name].dtype
        if dtype not in DTYPES or (dtype == torch.float64) != (unembed.dtype == torch.float64):
            raise ValueError(
                f"logprob_gain: {name} must be float32|bfloat16|float16, or float64 with all the "
                f"others, got {dtype} (unembed {unembed.dtype})"
            )


def _check_vectors(x: Tensor, vectors: Tensor, scale_after: Tensor | None) -> None:
    n_sentences = len(x) if isinstance(x, Tensor) and x.dim() else 0
    wanted = f"(E, M, D) with E={n_sentences} (from x)"
    if not isinstance(vectors, Tensor) or vectors.dim() != 3 or len(vectors) != n_sentences:
        raise _error("vectors", wanted, vectors)
    if scale_after is not None:
        shape = tuple(vectors.shape[:2])
        _check_shape("scale_after", scale_after, f"{shape} (from vectors)", shape)


def _check_shape(name: str, tensor: object, wanted: str, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
        raise _error(name, wanted, tensor)


def _error(name: str, wanted: str, got: object) -> ValueError:
    what = f"{tuple(got.shape)} {got.dtype}" if isinstance(got, Tensor) else type(got).__name__
    return ValueError(f"logprob_gain: {name} must be {wanted}, got {what}")


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, without a copy of the tensor."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() & high.isfinite())
