"""Integrated gradients of every layer and step from one prefill and one backward.

`ig.py` asks for it; where it is not exact, `reference.py` serves. What is scaled at the last token
changes no earlier one of a decoder: their keys and values are those of the prefill, and one row a
layer and step stands for a whole sentence. Going up, the rows of layer l join those from below.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.batches import pad
from relneuron.model.gradients.prefill import Axes, Prefill, Rows, first, time_axes
from relneuron.model.gradients.reference import Integrated, empty, integrate_reference
from relneuron.model.gradients.sites import (
    Sites,
    acting,
    frozen,
    probability,
    sees_padding,
    sentences,
)
from relneuron.model.layers import Unfound, first_line

# Two batches of which no two sizes are alike, so that each axis of a tensor tells what it is.
_PROBES = ((5, 3), (8, 6, 4))


@dataclass(frozen=True)
class Staircase:
    """A model whose layers can be called on rows of the last token: `read_staircase` makes it.

    axes     of each layer's arguments, which of their axes are tokens
    pads     whether a sentence behind padding has the numbers that it has alone
    spreads  whether a layer that is called on one row gives s rows where it has the neurons of s:
             then nothing below its neurons is computed s times
    """

    sites: Sites
    axes: list[Axes]
    pads: bool = True
    spreads: bool = True

    def integrate(
        self,
        ids: Sequence[Sequence[int]],
        targets: Sequence[int],
        points: Sequence[float],
        *,
        baseline: Tensor | None = None,
        most_rows: int | None = None,
    ) -> Integrated:
        """What `integrate_reference` gives, in batches of sentences padded on the left.

        s L (L + 1) / 2 columns of layers go through the model each way, in place of (1 + s) L T L.
        At most `most_rows` rows climb at once, those of one layer at least.
        """
        lengths = [len(line) if not self.pads else 0 for line in ids]
        found = empty(len(ids), self.sites)
        for length in dict.fromkeys(lengths):
            rows = [row for row, own in enumerate(lengths) if own == length]
            tokens, mask = pad([ids[row] for row in rows], self.sites.device)
            goals = [targets[row] for row in rows]
            own = baseline[rows] if baseline is not None and baseline.dim() == 3 else baseline
            part = self.integrate_batch(
                tokens, mask, goals, points, baseline=own, most_rows=most_rows
            )
            for whole, some in zip(found, part, strict=True):
                whole[rows] = some
        return found

    def integrate_batch(
        self,
        tokens: Tensor,
        mask: Tensor,
        targets: Sequence[int],
        points: Sequence[float],
        *,
        baseline: Tensor | None = None,
        most_rows: int | None = None,
    ) -> Integrated:
        """The same of tokens (E, T) with their mask, padded on either side."""
        sites = self.sites
        found = empty(len(tokens), sites)
        with frozen(sites.model):
            prefill = Prefill(sites, tokens, mask)
            goal = torch.tensor(list(targets), device=tokens.device)
            with torch.no_grad():
                logits = self._top(prefill, prefill.top.unsqueeze(1))
                plain = probability(logits[:, 0], goal.to(logits.device))
            found.probability.copy_(plain)
            # Where no step is at the baseline a row more is there, without a weight.
            steps = [*points] if 0.0 in points else [*points, 0.0]
            n_at_once = max(1, (most_rows or 1 << 62) // (len(tokens) * len(steps)))
            numbers = sites.numbers
            for start in range(0, len(numbers), n_at_once):
                chunk = numbers[start : start + n_at_once]
                self._climb(prefill, goal, chunk, steps, len(points), baseline, found)
        return found

    def _climb(
        self,
        prefill: Prefill,
        goal: Tensor,
        chunk: Sequence[int],
        steps: Sequence[float],
        n_points: int,
        baseline: Tensor | None,
        found: Integrated,
    ) -> None:
        """The rows of some layers, up to the logits and back."""
        rows = Rows(prefill, self.axes, len(chunk) * len(steps))
        moved: dict[int, Tensor] = {}  # m - b
        leaves: dict[int, Tensor] = {}
        hidden: Tensor | None = None
        with torch.enable_grad():
            for number in range(chunk[0], len(self.sites.layers)):
                if number in chunk:
                    m = prefill.neurons[number]
                    b = _baseline(baseline, number, m)
                    moved[number] = m - b
                    a = torch.tensor(steps, dtype=m.dtype, device=m.device)[:, None]
                    leaf = (b.unsqueeze(1) + a * moved[number].unsqueeze(1)).requires_grad_()
                    leaves[number] = leaf
                below = None if hidden is None else self._layer(rows, number, hidden)
                if number in leaves:
                    h = prefill.h[number].unsqueeze(1)
                    own = self._first_rows(rows, number, h, leaves[number])
                    below = own if below is None else torch.cat([below, own], 1)
                hidden = below
            assert hidden is not None, "a model has layers"
            logits = self._top(prefill, hidden)
            p = probability(logits, goal.to(logits.device)[:, None].expand(logits.shape[:2]))
            del logits, hidden, rows
        slopes = torch.autograd.grad(p.sum(), list(leaves.values()))
        # Each layer's rows stand together, in the order of the steps.
        at_zero = p.detach()[:, list(steps).index(0.0) :: len(steps)]
        found.probability_at_baseline[:, list(chunk)] = at_zero.double().cpu()
        for (number, change), slope in zip(moved.items(), slopes, strict=True):
            total = slope[:, :n_points].double().sum(1)
            own = change.double() * total / n_points
            found.ig[:, number, : own.shape[1]] = own.cpu()

    def _layer(self, rows: Rows, number: int, hidden: Tensor) -> Tensor:
        """A layer's own forward on rows (E, n, D)."""
        args, kwargs = rows.call(number, hidden)
        return first(self.sites.layers[number](*args, **kwargs))

    def _first_rows(self, rows: Rows, number: int, h: Tensor, leaf: Tensor) -> Tensor:
        """What a layer gives for h (E, 1, D) with its neurons at each of `leaf` (E, s, F)."""
        part: Any = self.sites.parts[number]
        if not self.spreads:
            h = h.expand(-1, leaf.shape[1], -1)

        def replace(values: Tensor) -> Tensor:
            return leaf if self.spreads else leaf.reshape(values.shape)

        with acting(part, replace):
            found = self._layer(rows, number, h)
        if found.shape[:2] != leaf.shape[:2]:
            raise Unfound("a layer does not give a row for each of its neurons' rows")
        return found

    def _top(self, prefill: Prefill, hidden: Tensor) -> Tensor:
        """(E, n, V): the logits of what the last layer gave (E, n, D), by the model's own end.

        The model runs with layers that hand on what they are to give.
        """
        model, n = self.sites.model, hidden.shape[1]
        known = inspect.signature(model.forward).parameters
        more: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
        tokens = torch.zeros(len(hidden), n, dtype=torch.int64, device=self.sites.device)
        if "position_ids" in known:
            more["position_ids"] = tokens  # any of the context will do: nothing looks at it
        with _handing_on(self.sites.layers, hidden, prefill.is_tuple):
            logits: Tensor = model(input_ids=tokens, **more).logits
        return logits


@contextmanager
def _handing_on(
    layers: Sequence[nn.Module], hidden: Tensor, is_tuple: Sequence[bool]
) -> Iterator[None]:
    """Within it every layer gives `hidden`, whatever it reads."""
    absent = object()
    before = [layer.__dict__.get("forward", absent) for layer in layers]
    try:
        for layer, in_tuple in zip(layers, is_tuple, strict=True):
            given = (hidden,) if in_tuple else hidden
            layer.__dict__["forward"] = lambda *_, given=given, **__: given
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is absent:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = forward


def _baseline(baseline: Tensor | None, number: int, m: Tensor) -> Tensor:
    if baseline is None:
        return torch.zeros_like(m)
    own = baseline[number] if baseline.dim() == 2 else baseline[:, number]
    return own[..., : m.shape[1]].to(m).expand_as(m)


# --- the verdict -----------------------------------------------------------------------------


def read_staircase(sites: Sites) -> Staircase:
    """The staircase of a model, if it is exact: held to the reference on two short sentences.

    Raises Unfound with the reason otherwise: earlier tokens see the last one, a layer keeps its
    past in another form than keys and values, the recorded calls do not suffice for the layers.
    """
    try:
        prefills = [_probe(sites, lengths) for lengths in _PROBES]
        axes = time_axes(*prefills)
        plain = Staircase(sites, axes, not sees_padding(sites.model), spreads=False)
        spread = replace(plain, spreads=True)
        # As far as both may be apart by rounding; what is wrong is off by the numbers' size.
        dtype = prefills[0].top.dtype
        limit = torch.finfo(dtype).eps ** 0.5 if dtype.itemsize >= 4 else 0.25
        with suppress(Unfound, RuntimeError, ValueError):
            if _difference(spread) <= limit:
                return spread
        off = _difference(plain)
        if off <= limit:
            return plain
    except (Unfound, torch.OutOfMemoryError, MemoryError):
        raise
    except (RelneuronError, RuntimeError, TypeError, ValueError, AttributeError, LookupError) as e:
        why = f"its layers cannot be called on the last token alone: {first_line(e)}"
        if isinstance(e, LookupError):
            why = (
                f"a layer looks for its past in another form than keys and values: {first_line(e)}"
            )
        raise Unfound(why) from e
    raise Unfound(_why(sites, prefills[0], off))


def _probe(sites: Sites, lengths: Sequence[int]) -> Prefill:
    return Prefill(sites, *pad(sentences(sites.model, lengths), sites.device))


def _difference(staircase: Staircase) -> float:
    """How far it is from the reference, in parts of the largest number of a layer."""
    sites, points = staircase.sites, (0.5, 1.0)
    ids = sentences(sites.model, _PROBES[0])
    tokens, mask = pad(ids, sites.device)
    with torch.no_grad():
        prefill = Prefill(sites, tokens, mask)
        targets = staircase._top(prefill, prefill.top.unsqueeze(1))[:, 0].argmax(-1).tolist()
    numbers = sites.numbers
    layers = sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]})
    ours = staircase.integrate(ids, targets, points)
    theirs = integrate_reference(sites, ids, targets, points, layers=layers)
    pairs = [(ours.probability, theirs.probability)]
    for layer in layers:
        pairs.append((ours.ig[:, layer], theirs.ig[:, layer]))
        at = [one.probability_at_baseline[:, layer] for one in (ours, theirs)]
        pairs.append((at[0], at[1]))
    sizes = [float(wanted.abs().max()) for _, wanted in pairs]
    offs = [float((mine - wanted).abs().max()) for mine, wanted in pairs]
    ratios = [off / max(size, 1e-30) for off, size in zip(offs, sizes, strict=True)]
    return max(ratios, key=lambda ratio: ratio if ratio == ratio else float("inf"))


def _why(sites: Sites, prefill: Prefill, off: float) -> str:
    """What keeps a model's staircase from being exact."""
    if _sees_ahead(sites):
        return "earlier tokens see the last one (a bidirectional model)"
    without = [n for n in range(len(sites.layers)) if n not in prefill.kept.tensors]
    if without:
        return f"layer {without[0]} keeps no keys and values (a recurrent state, say)"
    return f"its layers need more than they were called with: gradients are off by {off:.1g}"


def _sees_ahead(sites: Sites) -> bool:
    """Whether the logits of a token depend on those behind it."""
    line = sentences(sites.model, _PROBES[0])[0]
    ids = torch.tensor([line, [*line[:-1], line[0]]], device=sites.device)
    with torch.no_grad():
        logits = sites.model(input_ids=ids, use_cache=False).logits
    return not torch.allclose(logits[0, -2], logits[1, -2], rtol=1e-3, atol=1e-6)
