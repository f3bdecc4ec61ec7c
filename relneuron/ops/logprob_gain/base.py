"""What `logprob_gain` knows of a layer before it looks at single neurons: the base point.

ops/logprob_gain/op.py calls it: probabilities at the base point, first-order gains of all neurons
with a bound on what lies beyond them, and the gains of single neurons in float64, for what float32
leaves open.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

UNIT = 2.0**-24  # half an ulp of float32 at 1
# A float32 inner product whose partial sums are a random walk is off by up to 2.5 UNITs of |a| |b|,
# whatever its length; the rest is for the rounding of factors and of sums over the vocabulary.
DOT_UNITS = 8
# No scratch of the plain torch parts is larger than so many numbers.
_SCRATCH = 1 << 19


class Units(NamedTuple):
    """What an inner product of float32 sums over D is off by at most, in UNITs."""

    apart: float  # of |a| |b|
    coherent: float  # more, of itself: its terms may have one sign

    def bound(self, norms: Tensor, products: Tensor) -> Tensor:
        return UNIT * (self.apart * norms + self.coherent * products)


def product_units(backend: str, hidden: int) -> Units:
    """The bounds of a backend's inner products over `hidden` terms.

    The C++ kernel adds up short pieces. A GPU's matrix product may be one long chain of roundings,
    or of truncations: tensor cores cut off what does not fit, after every 8 terms or more of 16
    bits, always towards zero. Emulated for D to 16,384, random walks are then off by 2 to 15 UNITs,
    terms of one sign by 0.4 UNITs of the product a step (tests/ops/test_logprob_gain_bounds.py).
    """
    if backend != "triton":
        return Units(DOT_UNITS, 0.125 * hidden**0.5)
    return Units(DOT_UNITS + hidden / 512, 1.5 * hidden**0.5 + hidden / 8)


class Head(NamedTuple):
    """What all layers share: the way from the residual stream to the logits."""

    unembed: Tensor  # (V, D), the final norm's gain folded in
    scale: Tensor  # (E,) float64
    targets: Tensor  # (E,) int64
    offset: Tensor | None  # (V,)
    norm: float  # the largest norm of a row of `unembed`
    cap: float | None = None  # logits are cap * tanh(logits / cap), the offset included

    @property
    def bend(self) -> float:
        """The largest second derivative of a logit in what the cap is put on, 0 without one."""
        return 0.0 if self.cap is None else 4 / 27**0.5 / self.cap


class Pairs(NamedTuple):
    """Neurons and sentences to evaluate, by neuron: flat places in the coefficients (E, P, K)."""

    place: Tensor  # (n,) int64, sorted by neuron
    rows: Tensor  # (U,) int64: the neurons that occur, ascending
    row_start: Tensor  # (U + 1,) int64: the pairs of rows[u] are row_start[u] ... row_start[u + 1]
    sentence: Tensor  # (n,) int32
    order: Tensor  # (n,) int64: where each pair stood before it was sorted


def arithmetic(tensor: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def blocks(n: int, width: int) -> Iterator[slice]:
    """Slices of `n` rows of `width` numbers, each within the scratch."""
    step = max(1, _SCRATCH // max(1, width))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def make_head(
    unembed: Tensor,
    scale: Tensor,
    targets: Tensor,
    offset: Tensor | None,
    cap: float | None = None,
) -> Head:
    """The head, its longest row found."""
    return Head(unembed, scale.double(), targets, offset, _largest_norm(unembed), cap)


# The norm of the last unembed: (its storage, its place and version there, the norm). One object, so
# that no thread reads half of what another one writes.
_last: tuple[weakref.ref[object], tuple[object, ...], float] | None = None


def _largest_norm(unembed: Tensor) -> float:
    """The largest norm of a row; kept while the memory lives, as every layer has the same."""
    storage: object = unembed.untyped_storage()
    # A tensor made in inference mode does not say when it changes.
    version = None if unembed.is_inference() else unembed._version
    key = (unembed.data_ptr(), unembed.dtype, unembed.shape, unembed.stride(), version)
    global _last
    last = _last
    if last and version is not None and last[0]() is storage and last[1] == key:
        return last[2]
    kind = arithmetic(unembed)
    norms = [unembed[rows].to(kind).norm(dim=1).max() for rows in blocks(*unembed.shape)]
    norm = float(torch.stack(norms).max())
    _last = (weakref.ref(storage), key, norm) if version is not None else None
    return norm


class Base:
    """One layer's base points: logits(x) and everything that is linear in the value vectors.

    With b = unembed @ v of a neuron and the factors t = scale * c, tilt = scale_after / scale - 1
    (t = scale_after * c where the norm is recomputed), the logits at x + c v are those at x, plus
    t b + tilt z with z = scale * unembed @ x. `z` is kept relative to the target's, under a cap as
    it is. A cap is put on what that gives: all that is linear here is its tangent at x then.
    """

    def __init__(
        self,
        head: Head,
        x: Tensor,
        values: Tensor,
        coefficients: Tensor,
        scale_after: Tensor | None,
    ) -> None:
        kind = arithmetic(head.unembed)
        self.head, self.x, self.values = head, x, values
        self.coefficients, self.scale_after = coefficients, scale_after  # (E, P, K) each
        self.shape = coefficients.shape
        self.is_held = True
        t, tilt = self.factors()
        self.t, self.tilt = t.to(kind), None if tilt is None else tilt.to(kind)
        # In float64, which for E rows costs little: what is off here is off in every neuron's gain.
        self._total = logsumexp(head, x)
        mean = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        mean_z, span = self._read(mean)
        self.logp_span = -self.logp.amin(1)
        target = tangent = head.unembed[head.targets].double()
        if head.cap is not None:
            # What the cap is put on, at the target.
            z = target_logits(head, x)
            self.at_target = uncapped(head, z, head.targets[:, None])
            self.at_span = span / head.cap
            slope = slope_of(head, self.at_target)
            tangent, mean_z = target * slope, mean_z - (slope * z)[:, 0]
        if self.z is not None:
            self.z_span, self.mean_z = self.z.abs().amax(1), mean_z.to(kind)
        norm, dots = _dots(values, torch.cat([target, tangent - mean]))
        self.value_norm, dots = norm.to(kind), dots.to(kind)
        self.target_dot, self.direction_dot = dots[: len(x)], dots[len(x) :]  # (E, K) each

    def _read(self, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log p of all tokens (E, V), where the scale changes z less the target's, and into `mean`
        E_p of the unembedding's rows. Returns E_p of z (E,) float64, both times the slope, and the
        largest of what a cap is put on."""
        head, kind, shape = self.head, self.t.dtype, (len(self.x), len(self.head.unembed))
        self._logp: Tensor | None = torch.empty(shape, dtype=kind, device=self.x.device)
        self._z = torch.empty_like(self._logp) if self.tilt is not None else None
        target = target_logits(head, self.x)
        mean_z = torch.zeros_like(target[:, 0])
        span = torch.zeros_like(mean_z)
        for tokens, rows, z in base_logits(head, self.x):
            logp = finished(head, z, tokens) - self._total
            self._logp[:, tokens] = logp
            if head.cap is None:
                z = z - target
            if self._z is not None:
                self._z[:, tokens] = z
            if mean is not None:
                p = logp.exp()
                if head.cap is not None:
                    at = uncapped(head, z, tokens)
                    p, span = p * slope_of(head, at), torch.maximum(span, at.abs().amax(1))
                mean += p @ rows
                mean_z += (p * z).sum(1)
        return mean_z, span

    def rest(self) -> None:
        """Forget what has E x V numbers, until it is asked for again, unless it `is_held`."""
        if not self.is_held:
            self._logp = self._z = None

    @property
    def logp(self) -> Tensor:
        if self._logp is None:
            self._read()
        assert self._logp is not None
        return self._logp

    @property
    def z(self) -> Tensor | None:
        if self._logp is None:
            self._read()
        return self._z

    def p(self) -> Tensor:
        """Probabilities at the base points (E, V)."""
        return self.logp.exp()

    def factors(self, place: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """t and tilt in float64, of all coefficients or at flat places in them."""
        scale, c, after = self.head.scale[:, None, None], self.coefficients, self.scale_after
        if place is not None:
            scale = self.head.scale[place // (self.shape[1] * self.shape[2])]
            c = c.reshape(-1)[place]
            after = None if after is None else after.reshape(-1)[place]
        if after is None:
            return scale * c, None
        return after.double() * c, after.double() / scale - 1

    def reach(self) -> Tensor:
        """A bound on |change of any logit| (E, P, K), by Cauchy and Schwarz."""
        bound = self.t.abs() * (self.value_norm * self.head.norm)
        if self.tilt is not None:
            bound = bound + self.tilt.abs() * self.z_span[:, None, None]
        return bound

    def first_order(self) -> Tensor:
        """The gain's first-order part (E, P, K): no gain is larger, as log p(w) is concave.

        t (b_w - E_p b) + tilt (z_w - E_p z), z_w = 0; rounding aside, see `rounding`. Of a capped
        head b and z are times the slope of each logit at x, and a gain may be larger by `bend` *
        reach^2.
        """
        gain = self.t * self.direction_dot[:, None, :]
        if self.tilt is not None:
            gain = gain - self.tilt * self.mean_z[:, None, None]
        return gain

    def rounding(self, reach: Tensor) -> Tensor:
        """What float32 may have changed in a first-order gain, or in its bound, of that reach."""
        return DOT_UNITS * self.unit * reach

    def sum_rounding(self, reach: Tensor, moves: Tensor, sentence: Tensor, backend: str) -> Tensor:
        """What it may have changed in a gain from sums over the vocabulary.

        `moves`: how much the pair's logits do move. Probabilities are exponentials of rounded
        logarithms, which matters as far as they change.
        """
        changed = self.logp_span.to(reach.dtype)[sentence] * moves.clamp(max=1.0)
        units = product_units(backend, self.x.shape[1])
        return units.bound(reach, moves) + UNIT * changed

    @property
    def unit(self) -> float:
        return UNIT if self.t.dtype == torch.float32 else 2.0**-53


def base_logits(head: Head, x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of the vocabulary: (tokens, their rows (v, D), logits at x without the offset (E, v)).

    float64. What has E x V numbers of them is never held.
    """
    x = x.double() * head.scale[:, None]
    for tokens in blocks(len(head.unembed), max(len(x), head.unembed.shape[1])):
        rows = head.unembed[tokens].double()
        yield tokens, rows, x @ rows.T


def target_logits(head: Head, x: Tensor) -> Tensor:
    """The targets' logits at x without the offset, (E, 1) float64."""
    rows = head.unembed[head.targets].double()
    return (x.double() * head.scale[:, None] * rows).sum(1, keepdim=True)


def finished(head: Head, logits: Tensor, tokens: slice | Tensor) -> Tensor:
    """Logits with the offset of those tokens, and capped."""
    logits = uncapped(head, logits, tokens)
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


def uncapped(head: Head, logits: Tensor, tokens: slice | Tensor) -> Tensor:
    """Logits with the offset of those tokens: what a cap is put on."""
    return logits if head.offset is None else logits + head.offset[tokens].double()


def slope_of(head: Head, logits: Tensor) -> Tensor:
    """The derivative of capped logits in what the cap is put on, `logits` of it."""
    return torch.cosh(logits / cast(float, head.cap)).reciprocal().square()


def logsumexp(head: Head, x: Tensor) -> Tensor:
    """log of the sum of exp(logits at x, finished), (E, 1) float64."""
    total = torch.full((len(x), 1), -torch.inf, dtype=torch.float64, device=x.device)
    for tokens, _, z in base_logits(head, x):
        part = finished(head, z, tokens).logsumexp(1, keepdim=True)
        total = torch.logaddexp(total, part)
    return total


def _dots(values: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of the value vectors (K,), and their inner products with others (E, K)."""
    kind = others.dtype
    norm = torch.empty(len(values), dtype=kind, device=others.device)
    dots = torch.empty(len(others), len(values), dtype=kind, device=others.device)
    for rows in blocks(*values.shape):
        block = values[rows].to(kind)
        norm[rows] = block.norm(dim=1)
        dots[:, rows] = others @ block.T
    return norm, dots


def make_pairs(place: Tensor, shape: tuple[int, ...]) -> Pairs:
    """Places in the coefficients (E, P, K), sorted by neuron."""
    _, n_positions, n_neurons = shape
    neuron = place % n_neurons
    neuron, order = neuron.sort(stable=True)
    place = place[order]
    rows, counts = torch.unique_consecutive(neuron, return_counts=True)
    row_start = torch.zeros(len(rows) + 1, dtype=torch.int64, device=place.device)
    row_start[1:] = counts.cumsum(0)
    sentence = (place // (n_positions * n_neurons)).int()
    return Pairs(place, rows, row_start, sentence, order)


def exact_gains(base: Base, place: Tensor) -> Tensor:
    """The gains at some places of the coefficients, in float64: the reference, (n,) float64.

    Plain: logits at x + c v, log-sum-exp over blocks of the vocabulary, as the definition says.
    """
    head, wide = base.head, torch.float64
    result = torch.empty(len(place), dtype=wide, device=place.device)
    if not len(place):
        return result
    per_sentence = base.shape[1] * base.shape[2]
    used, own = torch.unique(place // per_sentence, return_inverse=True)
    few = head._replace(scale=head.scale[used], targets=head.targets[used])
    x = base.x[used]
    z_target = target_logits(few, x)
    at_target = finished(few, z_target, few.targets[:, None])
    before = (at_target - logsumexp(few, x))[:, 0]
    t, tilt = base.factors(place)
    neuron = place % base.shape[2]
    # By neuron, as pairs of one share its inner products.
    order = neuron.argsort(stable=True)
    step = _SCRATCH // 4096
    for start in range(0, len(place), step):
        chosen = order[start : start + step]
        rows, own_row = torch.unique(neuron[chosen], return_inverse=True)
        sentence, t_own = own[chosen], t[chosen, None]
        values = base.values[rows].to(wide)
        total = torch.full((len(chosen),), -torch.inf, dtype=wide, device=place.device)
        for tokens, vectors, z in base_logits(few, x):
            moved = (values @ vectors.T)[own_row] * t_own
            if head.cap is not None:
                grown = 1 if tilt is None else 1 + tilt[chosen, None]
                moved = finished(head, moved + grown * z[sentence], tokens)
            else:
                if tilt is not None:
                    moved += tilt[chosen, None] * (z - z_target)[sentence]
                moved += finished(few, z, tokens)[sentence]
            total = torch.logaddexp(total, moved.logsumexp(1))
        target = (values[own_row] * head.unembed[few.targets[sentence]].to(wide)).sum(1)
        moved_target = at_target[sentence, 0] + target * t[chosen]
        if head.cap is not None:
            grown = 1 if tilt is None else 1 + tilt[chosen]
            moved_target = target * t[chosen] + grown * z_target[sentence, 0]
            moved_target = finished(few, moved_target, few.targets[sentence])
        result[chosen] = moved_target - total - before[sentence]
    return result
