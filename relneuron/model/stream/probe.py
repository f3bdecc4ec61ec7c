"""One forward with everything that a layer's modules read and gave, for find.py to look at.

Which module does what is told by equal numbers: what one gave is what another one read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from relneuron.model.layers import Unfound
from relneuron.model.mlps.experts import Experts
from relneuron.model.stream.linear import Read, Rows, size, without_head
from relneuron.model.stream.mixture import given_to
from relneuron.model.stream.norms import Norm, read_norm
from relneuron.model.stream.parts import unsupported

N_SENTENCES, N_TOKENS = 4, 6  # of the forward that is looked at


@dataclass(frozen=True, eq=False)
class Call:
    """What a module read first and gave: one row a token, (N, n) and (N, m)."""

    module: nn.Module
    x: Tensor
    y: Tensor
    weights: Tensor | None  # (B, H, T, T), if it gave such a tensor
    is_alone: bool  # called with one tensor, gave one
    given: tuple[Any, ...] = ()  # of experts: the arguments of the call

    @property
    def is_leaf(self) -> bool:
        return not any(True for _ in self.module.children())

    @property
    def is_linear(self) -> bool:
        """A linear map with a readable matrix, as far as shapes tell."""
        weight = getattr(self.module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            return False
        return size(self.module) == (self.y.shape[1], self.x.shape[1])


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors have the same numbers."""
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(ours, theirs)


class Calls(list[Call]):
    """The calls of one layer's modules, in the order in which they ended."""

    def linears(self) -> Iterator[Call]:
        return (call for call in self if call.is_linear)

    def norm_giving(self, y: Tensor) -> tuple[Norm, Call] | None:
        """The norm that gave y, and its call."""
        for call in self:
            if same(call.y, y) and call.x.shape == y.shape and not same(call.x, y):
                norm = as_norm(call)
                if norm is not None:
                    return norm, call
        return None

    def norm_reading(self, x: Tensor) -> tuple[Norm, Call] | None:
        """The norm that reads x, and its call."""
        for call in self:
            if same(call.x, x) and call.y.shape == x.shape and not same(call.y, x):
                norm = as_norm(call)
                if norm is not None:
                    return norm, call
        return None

    def made(self, x: Tensor, factor: Tensor | None = None) -> tuple[Rows, Call] | None:
        """The piece of a linear map's outputs that x (N, n) is.

        With `factor` (B,) x are the first tokens of the sentences, and pieces are multiplied by it.
        """
        for call in self.linears():
            y = call.y if factor is None else call.y[::N_TOKENS] * factor[:, None]
            if y.dtype != x.dtype or y.shape[1] < x.shape[1]:
                continue
            last = y.shape[1] - x.shape[1]
            begins = (y[:, : last + 1] == x[:, :1]).all(0).nonzero()[:, 0].tolist()
            for start in begins:
                if torch.equal(y[:, start : start + x.shape[1]], x):
                    return Rows(call.module, (start,), x.shape[1]), call
        return None

    def read(self, rows: Rows, x: Tensor, streams: dict[str, Tensor]) -> tuple[str, Read] | None:
        """Which of the streams the rows of a map that read x read, and behind which norms."""
        normed = None if any(same(x, stream) for stream in streams.values()) else True
        found = self.norm_giving(x) if normed else None
        norm, source = (None, x) if found is None else (found[0], found[1].x)
        for name, stream in streams.items():
            if same(source, stream):
                return name, Read(((norm, rows),))
        made = self.made(source)
        if made is None or made[1].module is rows.module:
            return None
        before = self.read(made[0], made[1].x, streams)
        return None if before is None else (before[0], Read((*before[1].steps, (norm, rows))))


def as_norm(call: Call) -> Norm | None:
    """The call's module as a norm, or None if it is none."""
    if call.is_linear or not call.is_leaf:
        return None
    try:
        return read_norm(call.module, call.x.shape[1], call.x)
    except (Unfound, RuntimeError, TypeError, ValueError):
        return None


class _Recorder:
    """Hooks on the modules inside of some others, whose calls it gives to a function at the end."""

    def __init__(self, model: Any, experts: Iterable[Experts] = ()) -> None:
        self.model, self.calls = model, Calls()
        self._experts = {id(one.module): one for one in experts}
        self._began: list[tuple[nn.Module, Tensor | None, bool, tuple[Any, ...]]] = []

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tensors = [v for v in (*args, *kwargs.values()) if v is not None]
        first = next((v for v in tensors if isinstance(v, Tensor) and v.is_floating_point()), None)
        # What is read may be changed in place later.
        x = None if first is None else _rows(first)
        given: tuple[Any, ...] = ()
        if (experts := self._experts.get(id(module))) is not None:
            given = tuple(v.clone() for v in given_to(module, args, kwargs))
            x = given[0].reshape(-1, experts.hidden)
        self._began.append((module, x, len(tensors) == 1, given))

    def end(self, module: nn.Module, _: Any, output: Any) -> None:
        began, x, is_alone, given = self._began.pop()
        assert began is module
        outputs = output if isinstance(output, (tuple, list)) else [output]
        tensors = [v for v in outputs if isinstance(v, Tensor) and v.is_floating_point()]
        if x is None or not tensors:
            return
        whole = tensors[0]
        if given and (experts := self._experts[id(module)]).call == "dense":
            whole = whole.reshape(experts.n_experts, -1, whole.shape[-1]).sum(0)
        y = _rows(whole)
        square = [v for v in tensors[1:] if v.dim() == 4 and v.shape[2] == v.shape[3] == N_TOKENS]
        weights = square[0].detach().clone() if square else None
        if y is not None:
            is_alone = is_alone and output is tensors[0]
            self.calls.append(Call(module, x, y, weights, is_alone, given))


def _rows(tensor: Tensor) -> Tensor | None:
    """One row a token, a copy; None for what has no such rows."""
    n = N_SENTENCES * N_TOKENS
    tensor = without_head(tensor)
    if tensor.dim() > 2 and tuple(tensor.shape[:2]) == (N_SENTENCES, N_TOKENS):
        return tensor.detach().reshape(n, -1).clone()
    return tensor.detach().clone() if tensor.dim() == 2 and len(tensor) == n else None


@contextmanager
def recorded(
    model: Any,
    layers: nn.ModuleList,
    look: Callable[[int, Call, Calls], None],
    experts: Iterable[Experts] = (),
) -> Iterator[Calls]:
    """Within it a forward calls `look` as soon as a layer is done.

    With the layer's number, its own call and those inside, of `experts` with all arguments. What it
    gives are the calls of the modules beside the layers, for the time afterwards.
    """
    places = {id(layer): number for number, layer in enumerate(layers)}
    inside = {id(module) for layer in layers for module in layer.modules()}
    outer, inner = _Recorder(model), _Recorder(model, experts)
    handles = []

    def begin_layer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inner.calls = Calls()
        inner.begin(module, args, kwargs)

    def end_layer(module: nn.Module, args: Any, output: Any) -> None:
        n_calls = len(inner.calls)
        inner.end(module, args, output)
        if len(inner.calls) == n_calls:
            why = "its layers do not read and give one state a token"
            raise unsupported(model, why)
        whole = inner.calls.pop()
        look(places[id(module)], whole, inner.calls)

    for module in model.modules():
        recorder = inner if id(module) in inside else outer
        is_layer = id(module) in places
        begin = begin_layer if is_layer else recorder.begin
        end = end_layer if is_layer else recorder.end
        handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(module.register_forward_hook(cast(Any, end)))
    try:
        yield outer.calls
    finally:
        for handle in handles:
            handle.remove()
