"""What a layer with experts writes, as a sum over neurons: of its experts, and of MLPs beside them.

`find_mixture.py` makes the members of a layer, `trace.py` keeps what its tokens were sent through,
and the scores in methods/gains/ take the neurons block by block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from relneuron.model.layers import Parts, Projection
from relneuron.model.mlps.experts import Experts
from relneuron.model.stream.linear import Read, bias_of, matrix, size
from relneuron.model.stream.norms import Norm


@dataclass
class Sent:
    """What the tokens of E sentences were sent through in one member; an MLP is one expert.

    A token goes to K experts; where it goes to fewer, `expert` is -1 and the rest is zero.
    """

    expert: Tensor  # (E, T, K) int64
    scale: Tensor  # (E, T, K) float64: what the neurons are multiplied with behind their maps
    neurons: Tensor  # (E, T, K, F): inputs of `down`, in the model's dtype

    def put(self, part: Sent, rows: list[int]) -> Sent:
        """With shorter sentences copied into some rows, behind what stands for their padding."""
        n_tokens, n_sent = part.expert.shape[1:]
        whole, missing = self, n_sent - self.expert.shape[2]
        if missing > 0:
            whole = Sent(
                pad(self.expert, (0, missing), value=-1),
                pad(self.scale, (0, missing)),
                pad(self.neurons, (0, 0, 0, missing)),
            )
        for name in ("expert", "scale", "neurons"):
            ours, theirs = getattr(whole, name), getattr(part, name)
            ours[:, -n_tokens:, :n_sent][rows] = theirs
        return whole

    def like(self, n_sentences: int, n_tokens: int) -> Sent:
        """Of so many sentences and tokens that were sent nowhere."""
        shape = (n_sentences, n_tokens)
        return Sent(
            self.expert.new_full((*shape, *self.expert.shape[2:]), -1),
            self.scale.new_zeros(*shape, *self.scale.shape[2:]),
            self.neurons.new_zeros(*shape, *self.neurons.shape[2:]),
        )


class Block(NamedTuple):
    """Neurons that some of n places share: all those of a dense layer, or those of one expert.

    A place is a token of a sentence. `read` gives some of the neurons (m, k) at the m places.
    """

    rows: Tensor | None  # (m,) int64: which of the places were sent here; None: all, in order
    start: int  # the number of the first neuron in its layer
    values: Tensor  # (K, D), see `Write.values`
    bias: Tensor | None  # (D,) like a value vector of a neuron that is 1
    scale: Tensor | None  # (m,) float64: what the neurons are multiplied with; None: 1
    read: Callable[[slice], Tensor]

    @property
    def span(self) -> slice:
        """Its neurons among those of the layer."""
        return slice(self.start, self.start + len(self.values))

    def coefficients(self) -> Tensor:
        """(m, K): the factors of the value vectors; in float32 of scaled ones of 16 bits."""
        neurons = self.read(slice(None))
        if self.scale is None:
            return neurons
        wide = torch.promote_types(neurons.dtype, torch.float32)
        return neurons.to(wide) * self.scale[:, None].to(wide)


class Columns(NamedTuple):
    """A layer's neurons that wrote at the last token of any of E sentences, side by side."""

    places: Tensor | None  # (K,) int64, ascending: their numbers in the layer; None: all, in order
    values: Tensor  # (K, D)
    coefficients: Tensor  # (E, K), 0 of experts that a sentence's token was not sent to
    valid: Tensor | None  # (E, K) bool: those that it was sent to; None: all


def side_by_side(blocks: Iterable[Block], n_sentences: int, device: torch.device) -> Columns:
    """The columns of blocks at the last token of each sentence."""
    parts = sorted(blocks, key=lambda block: block.start)
    numbers = [torch.arange(*block.span.indices(block.span.stop), device=device) for block in parts]
    values = torch.cat([block.values for block in parts])
    found = [block.coefficients() for block in parts]
    coefficients = found[0].new_zeros(n_sentences, len(values))
    valid = torch.zeros(n_sentences, len(values), dtype=torch.bool, device=device)
    start = 0
    for block, own in zip(parts, found, strict=True):
        some = slice(start, start + len(block.values))
        coefficients[block.rows, some] = own.to(coefficients.dtype)
        valid[block.rows, some] = True
        start = some.stop
    return Columns(torch.cat(numbers), values, coefficients, valid)


@dataclass(frozen=True)
class ExpertMember:
    """The experts of a layer: neuron i of expert e is number start + e * F + i.

    They write factor * sum over e of w_e * down_e(h_e), with the weight w_e that they are given.
    Where a model multiplies their inputs by it, h_e has it already, and w_e is 1.
    """

    experts: Experts
    start: int
    factor: float
    norm: Norm | None  # what they read is this norm of the stream

    @property
    def n_experts(self) -> int:
        return self.experts.n_experts

    @property
    def width(self) -> int:
        """F."""
        return self.experts.expert_width

    @property
    def n_neurons(self) -> int:
        return self.experts.width

    @property
    def is_gated(self) -> bool:
        return self.experts.gated

    def part(self, path: str) -> Experts:
        """As a patch takes it."""
        return self.experts

    def sent(self, shape: torch.Size, given: tuple[Tensor, ...]) -> Sent:
        """What a forward of (E, T) tokens sends through them, of their module's arguments."""
        experts, n_places = self.experts, shape.numel()
        x, rows = experts.begin(*given)
        h = experts.own_h(*experts.project(x, rows.bounds))
        scale = torch.ones_like(h[:, 0]) if rows.weight is None else rows.weight
        # The slot of a row: how many rows of lower experts its token has.
        order = rows.token.argsort(stable=True)
        sizes = rows.token.bincount(minlength=n_places)
        begins = (sizes.cumsum(0) - sizes)[rows.token[order]]
        slot = torch.empty_like(order)
        slot[order] = torch.arange(len(order), device=order.device) - begins
        place = (rows.token, slot)
        k = max(1, int(sizes.max())) if n_places else 1
        expert = torch.full((n_places, k), -1, device=h.device)
        expert[place] = rows.expert.to(expert.dtype)
        scales = torch.zeros(n_places, k, dtype=torch.float64, device=h.device)
        scales[place] = scale.double() * self.factor
        neurons = h.new_zeros(n_places, k, self.width)
        neurons[place] = h
        return Sent(*(part.reshape(*shape, *part.shape[1:]) for part in (expert, scales, neurons)))

    def values(self, expert: int) -> Tensor:
        """(F, D): columns of an expert's `down`, a view."""
        weights = self.experts.output.weights(self.experts.module, self.n_experts)
        return weights[expert].detach()

    def bias(self, expert: int) -> Tensor | None:
        """(D,): the bias of an expert's `down`."""
        name = self.experts.output.bias
        if name is None:
            return None
        return cast(Tensor, getattr(self.experts.module, name))[expert].detach()

    def constant(self) -> Tensor | None:
        """(D,): what is added to the sum of the experts."""
        own = getattr(self.experts.module, "bias", None) if self.experts.call == "router" else None
        return None if own is None else cast(Tensor, own).detach()

    def keys(self, key: str, index: Tensor, center: bool) -> Tensor:
        """(n, D) float64: gate or up rows of its neurons (n,), times the gain of the norm."""
        experts = self.experts
        expert, neuron = index // self.width, index % self.width
        maps = experts.inputs[-1 if key == "up" else 0]
        if experts.gated and len(experts.inputs) == 1:
            is_up = int(key == "up")
            neuron = 2 * neuron + is_up if experts.interleaved else neuron + is_up * self.width
        weights = maps.weights(experts.module, self.n_experts).detach()
        rows = weights.transpose(1, 2)[expert, neuron]
        return rows.double() if self.norm is None else self.norm.keys(rows, center)


@dataclass(frozen=True)
class MlpMember:
    """An MLP beside the experts, which every token goes through: factor * w * down(h).

    w is the sigmoid of what the map `weight` gives for the token, or 1 without one.
    """

    down: nn.Module
    gate: Read
    up: Read
    module: nn.Module  # called with one tensor, whenever its neurons are
    weight: nn.Module | None  # a linear map to one number
    start: int
    factor: float

    n_experts = 1

    @property
    def width(self) -> int:
        return size(self.down)[1]

    @property
    def n_neurons(self) -> int:
        return self.width

    @property
    def is_gated(self) -> bool:
        return self.gate.rows != self.up.rows

    @property
    def norm(self) -> Norm | None:
        return self.gate.steps[0][0]

    def part(self, path: str) -> Parts:
        """As a patch takes it."""
        own = Projection("ffn", path, self.down, 0, self.width, of_input=True)
        return Parts(self.module, (own,))

    def sent(self, neurons: Tensor, weight: Tensor | None) -> Sent:
        """Of the neurons (E, T, F) and the outputs (E, T, 1) of the map `weight`."""
        scale = torch.full_like(neurons[..., :1], self.factor, dtype=torch.float64)
        if weight is not None:
            scale = scale * weight.sigmoid().double()
        return Sent(torch.zeros_like(scale, dtype=torch.int64), scale, neurons.unsqueeze(2))

    def values(self, expert: int = 0) -> Tensor:
        return matrix(self.down).T

    def bias(self, expert: int = 0) -> Tensor | None:
        return None if getattr(self.down, "bias", None) is None else bias_of(self.down)

    def constant(self) -> Tensor | None:
        return None

    def keys(self, key: str, index: Tensor, center: bool) -> Tensor:
        return (self.up if key == "up" else self.gate).keys(index, center)


Member = ExpertMember | MlpMember


def given_to(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call of a module of experts, in the order of its forward."""
    if kwargs:
        args = inspect.signature(type(module).forward).bind(module, *args, **kwargs).args[1:]
    return args


def blocks_of(
    mixture: Sequence[Member],
    sent: Sequence[Sent],
    place: tuple[Tensor, Tensor],
    scale: Tensor | None,
    behind: Callable[[Tensor], Tensor],
) -> Iterator[Block]:
    """A block for each expert that any of n places was sent to, the higher numbers first.

    `place` are the sentences and tokens (n,) int64, `scale` (n,) float64 that of the layer's write
    there, and `behind` what its norm makes of columns.
    """
    for member, own in reversed(list(zip(mixture, sent, strict=True))):
        experts = own.expert[place]
        for expert in sorted({*experts.flatten().tolist()} - {-1}, reverse=True):
            rows, slot = (experts == expert).nonzero(as_tuple=True)
            here = (place[0][rows], place[1][rows], slot)
            factor = own.scale[here] if scale is None else own.scale[here] * scale[rows]
            bias = member.bias(expert)
            yield Block(
                rows,
                member.start + expert * member.width,
                behind(member.values(expert)),
                None if bias is None else behind(bias),
                factor,
                partial(_some, own.neurons, here),
            )


def _some(neurons: Tensor, place: tuple[Tensor, ...], some: slice) -> Tensor:
    return neurons[..., some][place]
