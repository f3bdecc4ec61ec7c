"""One MLP of a layer, gated or not: its maps, its activation, and how its numbers are computed.

`find.py` makes it of what it has proved; `model/patch.py` acts on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from torch import Tensor, nn

from relneuron.model.layers import Projection
from relneuron.model.mlps.candidates import ACTIVATIONS

AnyArray = TypeVar("AnyArray", Tensor, np.ndarray[Any, Any])


@dataclass(frozen=True)
class MLP:
    """One MLP of a layer: down(h), where h = activation(gate) * up, or activation(gate).

    is_whole    its module computes this and nothing else: a patch puts the kernels in its place.
                The forward of another one stays as it is, and a patch acts on `sites`
    activation  by name; None where no known one fits, `act` gives its values then
    act         the module of the activation, None where the forward calls a function
    runs        whether a forward of text calls it
    """

    layer: int
    path: str
    module: nn.Module
    width: int  # F; of an MLP that several processes hold in parts, how many neurons are here
    hidden: int  # D
    gate: Projection
    up: Projection | None
    down_map: Projection
    product: Projection
    activation: str | None
    act: nn.Module | None
    n_layers: int = 0  # of the model
    is_whole: bool = False
    runs: bool = True
    offset: int = 0  # of its neurons among those of the layer
    first: int = 0  # of its neurons that is here
    whole: int = 0  # F, where processes hold it in parts
    modules: tuple[tuple[str, int], ...] = ()  # of the model, where several were asked for
    projections: tuple[Projection, ...] = ()  # of the layer's attention, where they were asked for

    n_experts = 1  # as if it were the only one

    @property
    def is_gated(self) -> bool:
        return self.up is not None

    @property
    def inside(self) -> slice:
        """Where the neurons that are here stand among those of the layer."""
        return slice(self.offset + self.first, self.offset + self.first + self.width)

    @property
    def n_neurons(self) -> int:
        """F, in all processes."""
        return self.whole or self.width

    def fold(self, table: AnyArray) -> AnyArray:
        """(C, F) as a patch takes it: experts have it otherwise."""
        return table

    unfold = fold

    @property
    def sites(self) -> tuple[Projection, ...]:
        """What a patch changes where the module is not whole, in the order of the forward.

        Where the activation is known, its module is left alone: layers may share it.
        """
        act = None
        if self.act is not None and self.activation is None:
            act = Projection("act", f"{self.path} (activation)", self.act, 0, self.width)
        parts = (self.gate, self.up, act, self.product, self.down_map)
        return tuple(part for part in parts if part)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """gate and up (T, F) of x (..., D); parts of one tensor where the weights are packed."""
        if hasattr(self.gate.module, "nx"):  # transformers' Conv1D, which takes a view of its input
            x = x.contiguous()
        out = _rows(self.gate.module(x))
        gate = _dense(self.gate.of(out))
        if self.up is None:
            return gate, None
        if self.up.module is not self.gate.module:
            out = _rows(self.up.module(x))
        return gate, _dense(self.up.of(out))

    def own_activation(self) -> Callable[[Tensor], Tensor]:
        """The module's own activation, as its own forward calls it."""
        if self.act is not None:
            return self.act
        assert self.activation is not None, "an MLP has its activation's module or name"
        return ACTIVATIONS[self.activation]

    def uncalled(self) -> list[tuple[str, nn.Module]]:
        """The modules inside that neither the projections nor the activation are made of."""
        maps = (self.gate, self.up, self.down_map)
        roots = [part.module for part in maps if part is not None]
        roots += [self.act] if self.act is not None else []
        called = {id(m) for root in roots for m in root.modules()}
        return [
            (name, m)
            for name, m in self.module.named_modules()
            if m is not self.module
            and id(m) not in called
            and not any(part is root for part in m.modules() for root in roots)
        ]

    def down(self, h: Tensor) -> Tensor:
        return cast(Tensor, self.down_map.module(h))

    def formula(self, x: Tensor) -> Tensor:
        """The MLP's output by the formula, in torch: what the self-check compares with."""
        gate, up = self.project(x)
        act = self.own_activation()(gate)
        h = act if up is None else act * up
        return self.down(h.reshape(*x.shape[:-1], self.width))


def _rows(y: Tensor) -> Tensor:
    return y.reshape(-1, y.shape[-1])


def _dense(part: Tensor) -> Tensor:
    """What the kernels take: neighbours in memory."""
    return part if part.stride(-1) == 1 else part.contiguous()
