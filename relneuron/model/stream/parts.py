"""What a model's residual stream is made of: what its layers read, and what they write.

`find.py` makes these of a model and `read.py` proves them by numbers; `trace.py` reads what they
name in a forward, and the scores in methods/gains/ are sums over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.layers import Parts, Projection
from relneuron.model.mlps.shape import Part
from relneuron.model.stream.linear import Read, bias_of, matrix, size
from relneuron.model.stream.mixture import ExpertMember, Member
from relneuron.model.stream.norms import Norm

QUERY_KEYS = ("gate", "up", "down")


def unsupported(model: Any, reason: str) -> RelneuronError:
    """The error for a model whose residual stream is not a sum of what its layers write."""
    return RelneuronError(
        f"{type(model).__name__} cannot be attributed: {reason}",
        "give a decoder-only model on one device whose layers add what their attention and their "
        "MLP or experts write to the residual stream (Llama, Qwen, Gemma, Mixtral, GPT-2, ...)",
    )


@dataclass(frozen=True)
class Write:
    """What a part adds to the stream: factor * norm(linear(neurons)), of which any may be absent.

    `source` is the module whose output, with that of `also` if there is one, times `factor`, is
    added. `linear` is None where that is
    no linear map of anything: then nothing in it is told apart, or `ResidualLayer.mixture` does it.
    """

    source: nn.Module
    linear: nn.Module | None
    norm: Norm | None
    factor: float
    also: nn.Module | None = None

    def added(self, output: Tensor) -> Tensor:
        """What is added where the sources give `output`, in the model's own arithmetic."""
        return output if self.factor == 1 else output * self.factor

    def values(self, index: Tensor | int | None = None) -> Tensor:
        """(K, D): the value vector of each neuron, or of some (..., D), but for the `scale`.

        A column of the linear map, a view of its weight; behind a norm gain (.) column (centred
        under a LayerNorm), made anew in float32 at least.
        """
        columns = matrix(cast(nn.Module, self.linear)).T
        return self.behind(columns if index is None else columns[index])

    def behind(self, columns: Tensor) -> Tensor:
        """Columns (..., D) of a map to what the norm reads, as value vectors."""
        return columns if self.norm is None else self.norm.linear(columns)

    @property
    def is_scaled(self) -> bool:
        """Whether neurons are multiplied with more than their own number."""
        return self.norm is not None or self.factor != 1

    def scale(self, y: Tensor) -> Tensor:
        """(...) float64: what a neuron is multiplied with before its value vector is added.

        `y` (..., D) is the linear map's output: what the norm behind it reads, whose scale there
        is frozen, as the final norm's is.
        """
        if self.norm is None:
            return torch.full_like(y[..., 0], self.factor, dtype=torch.float64)
        return self.norm.scale(y) * self.factor

    def constant(self, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., D) float64: what is written without any neuron, at places of that `scale` (...).

        `bias` (D,) float64 is added to what the neurons give, by default that of `linear`.
        """
        bias = bias_of(cast(nn.Module, self.linear)) if bias is None else bias
        bias = self.behind(bias) * scale.unsqueeze(-1)
        own = None if self.norm is None else self.norm.bias
        return bias if own is None else bias + own.double() * self.factor


@dataclass(frozen=True)
class Heads:
    """An attention whose write is a sum over heads and positions of alpha * value @ W_O."""

    module: nn.Module  # gives the attention weights
    n: int
    value: Read  # the heads' values (H * d_h), those of grouped heads repeated


@dataclass(frozen=True)
class ResidualLayer:
    """What one decoder layer writes into the residual stream.

    r = h + attention write and h' = r + FFN write. The MLP reads r or, `is_parallel`, h. A layer
    with experts has no MLP of its own but the members of a `mixture`, by the numbers of neurons.
    """

    layer: int
    path: str
    module: nn.Module
    attention: Write
    heads: Heads | None  # None: what the attention writes is not told apart
    ffn: Write
    gate: Read | None  # of an MLP without a gate: its first map, which is `up`, too
    up: Read | None
    mlp: nn.Module | None  # called with one tensor, whenever its neurons are
    is_parallel: bool
    order: int  # of adding in the model's arithmetic, an index of ORDERS
    mixture: tuple[Member, ...] = ()

    @property
    def down(self) -> nn.Module:
        """From the neurons (.., F), without a mixture."""
        return cast(nn.Module, self.ffn.linear)

    @property
    def out(self) -> nn.Module:
        """From what attends: the heads' outputs (.., H * d_h), where they are told apart."""
        return cast(nn.Module, self.attention.linear)

    @property
    def n_neurons(self) -> int:
        """F, or those of all members of a mixture."""
        if self.mixture:
            return sum(member.n_neurons for member in self.mixture)
        return size(self.down)[1]

    @property
    def is_gated(self) -> bool:
        """Whether its neurons are activation(gate) * up."""
        if self.mixture:
            return all(member.is_gated for member in self.mixture)
        return cast(Read, self.gate).rows != cast(Read, self.up).rows

    @property
    def experts(self) -> ExpertMember | None:
        """The routed experts of a mixture, which come first."""
        first = self.mixture[0] if self.mixture else None
        return first if isinstance(first, ExpertMember) else None

    def ffn_values(self) -> Tensor:
        """(F, D): the value vector of each FFN neuron, without a mixture; see `Write.values`."""
        return self.ffn.values()

    def value_blocks(self) -> Iterator[Tensor]:
        """(K, D) the value vectors of all FFN neurons, in the order of their numbers."""
        if not self.mixture:
            yield self.ffn_values()
        for member in self.mixture:
            for expert in range(member.n_experts):
                yield self.ffn.behind(member.values(expert))

    def ffn_value(self, index: int) -> Tensor:
        """(D,): the value vector of one FFN neuron."""
        if not self.mixture:
            return self.ffn.values(index)
        member = next(m for m in reversed(self.mixture) if m.start <= index)
        expert, neuron = divmod(index - member.start, member.width)
        return self.ffn.behind(member.values(expert)[neuron])

    def attention_values(self) -> Tensor:
        """(H * d_h, D): the value vector of each head's coordinates; see `Write.values`."""
        return self.attention.values()

    def parts(self) -> list[Part | Parts]:
        """Its neurons as a patch zeroes them.

        Inputs of linear maps: `ffn` of `down`, `attention` of `out`; and the experts of a mixture.
        Of a mixture first the attention, then a part a member.
        """
        outer = self.out if self.mixture and self.heads else self.mlp
        maps = {"ffn": self.ffn.linear, "attention": self.attention.linear if self.heads else None}
        first = [Parts(outer, self._inputs(maps))] if outer is not None else []
        return [*first, *(member.part(self.path) for member in self.mixture)]

    def _inputs(self, maps: dict[str, nn.Module | None]) -> tuple[Projection, ...]:
        return tuple(
            Projection(site, self.path, module, 0, size(module)[1], of_input=True)
            for site, module in maps.items()
            if module is not None
        )

    def ffn_keys(self, key: str, index: Tensor, *, center: bool = True) -> Tensor:
        """(n, D) float64: the key q (.) gain of FFN neurons `index` (n,) int64, in methods B4.

        `key` is `gate`, `up` or `down` (the notebook's: the value vector). Of an MLP without a
        gate both `gate` and `up` are the rows of its first map. `center`: as the norm does.
        """
        if key not in QUERY_KEYS:
            raise RelneuronError(f"unknown key {key!r}", f"use {', '.join(QUERY_KEYS)}", 2)
        if self.mixture:
            return self._mixture_keys(key, index, center)
        gate, up = cast(Read, self.gate), cast(Read, self.up)
        if key != "down":
            return (gate if key == "gate" else up).keys(index, center)
        rows, norm = self.ffn.values(index), gate.steps[0][0]
        return rows.double() if norm is None else norm.keys(rows, center)

    def _mixture_keys(self, key: str, index: Tensor, center: bool) -> Tensor:
        keys = index.new_zeros(len(index), len(self.ffn_value(0)), dtype=torch.float64)
        for member in self.mixture:
            places = index - member.start
            here = (places >= 0) & (places < member.n_neurons)
            if key != "down":
                keys[here] = member.keys(key, places[here], center)
                continue
            for row in here.nonzero()[:, 0].tolist():
                value = self.ffn_value(int(index[row])).double()[None]
                own = value if member.norm is None else member.norm.keys(value, center)
                keys[row] = own[0]
        return keys

    def attention_keys(self, index: Tensor, *, center: bool = True) -> Tensor:
        """(n, D) float64: the key q (.) gain of head coordinates `index` (n,) int64 in H * d_h."""
        return cast(Heads, self.heads).value.keys(index, center)


# Sums of (h, attention write, FFN write) as models make them, one rounding after the other.
ORDERS = ((0, 1, 2), (1, 2, 0), (0, 2, 1))


def added_up(parts: tuple[Tensor, Tensor, Tensor], order: int) -> Tensor:
    """h + attention write + FFN write in the model's arithmetic."""
    one, two, three = (parts[place] for place in ORDERS[order])
    return (one + two) + three


@dataclass(frozen=True)
class ResidualModel:
    """A model whose residual stream is h^0 plus what its layers write, and what reads it.

    logits(y) = scale * y @ unembed.T (+ offset), with `scale` of the final norm. `unembed` has the
    norm's gain and the model's own factor of logits folded in and, under a LayerNorm, its rows
    centred; float64 for a float64 model.
    """

    model: Any
    layers: list[ResidualLayer]
    final_norm: Norm
    n_heads: int  # 0 where heads are not told apart
    head_dim: int
    no_heads: str | None  # why they are not
    width: int  # F, of the layer with the most neurons
    hidden: int  # D
    vocabulary: int  # V
    is_gated: bool  # SwiGLU or a kin: the neuron is activation(gate) * up
    centred: bool  # LayerNorm
    eps: float
    unembed: Tensor  # (V, D) float32
    offset: Tensor | None  # (V,): what the final norm's bias and the lm_head's add to the logits
    cap: float | None = None  # logits are cap * tanh(logits / cap), the offset included
    pads: bool = True  # whether a sentence has the same numbers behind padding
    uneven: tuple[int, ...] = ()  # F of each layer, where they differ

    @property
    def widths(self) -> list[int]:
        """How many FFN neurons each layer has."""
        return list(self.uneven or [self.width] * len(self.layers))

    @property
    def shape(self) -> dict[str, Any]:
        """layers, width (F) and hidden (D), as files name them.

        With experts also `widths` where they differ, `gated` where false, `experts` of each layer
        and `expert_width`, as `mlps.shape.model_shape` has them.
        """
        shape: dict[str, Any] = {
            "layers": len(self.layers),
            "width": self.width,
            "hidden": self.hidden,
        }
        experts = [layer.experts for layer in self.layers]
        sizes = {member.width for member in experts if member is not None}
        if not sizes:
            return shape
        if min(self.widths) < self.width:
            shape["widths"] = self.widths
        if not self.is_gated:
            shape["gated"] = False
        shape["experts"] = [0 if member is None else member.n_experts for member in experts]
        return shape | {"expert_width": sizes.pop()}

    def parts(self) -> list[Part | Parts]:
        """The neurons of all layers as a patch zeroes them; see `ResidualLayer.parts`."""
        return [part for layer in self.layers for part in layer.parts()]
