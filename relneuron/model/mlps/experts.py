"""The routed experts of a mixture of experts: what they are, and how their output comes about.

`find_experts.py` describes those of a layer and proves the description by numbers; the
patched forward of `model/patch_experts.py` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from relneuron.model.layers import Projection, device_of
from relneuron.model.mlps.candidates import ACTIVATIONS
from relneuron.model.mlps.mlp import AnyArray
from relneuron.ops.tensors import is_plain

# Values that a gate of its own is given at a time on a CPU.
_PART = 1 << 15
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True)
class Maps:
    """E linear maps in one parameter (E, out, in), or (E, in, out) where `transposed`.

    Of a parameter with two dimensions each map has its block of rows, one below the other.
    """

    weight: str
    bias: str | None  # (E, out)
    transposed: bool

    def weights(self, module: nn.Module, n_experts: int) -> Tensor:
        """(E, in, out), a view of the parameter."""
        weight = cast(Tensor, attrgetter(self.weight)(module))
        if weight.dim() == 2:
            weight = weight.view(n_experts, -1, weight.shape[1])
        return weight if self.transposed else weight.transpose(1, 2)

    def apply(
        self, module: nn.Module, x: Tensor, bounds: Sequence[int], is_grouped: bool
    ) -> Tensor:
        """(R, out) of x (R, in), of which expert e has the rows bounds[e] to bounds[e + 1].

        By one grouped product where the module makes one, otherwise by one product an expert.
        """
        weights = self.weights(module, len(bounds) - 1)
        bias = None if self.bias is None else cast(Tensor, attrgetter(self.bias)(module))
        spans = [(e, slice(*span)) for e, span in enumerate(pairwise(bounds)) if span[0] < span[1]]
        if is_grouped and spans and weights.data_ptr() % 16 == 0:
            ends = torch.tensor(bounds[1:], dtype=torch.int32, device=x.device)
            out = grouped_mm(x.to(weights.dtype), weights, offs=ends)
            for e, rows in spans if bias is not None else ():
                out[rows] += cast(Tensor, bias)[e]
            return out
        has_grad = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
        is_cast = torch.is_autocast_enabled(x.device.type) or x.dtype != weights.dtype
        if has_grad or is_cast or not (is_plain(x) and is_plain(weights)) or not spans:
            parts = [x[rows] @ weights[e] for e, rows in spans]
            if bias is not None:
                parts = [y + bias[e] for y, (e, _) in zip(parts, spans, strict=True)]
            return torch.cat(parts) if parts else x.new_zeros(0, weights.shape[2])
        out = x.new_empty(len(x), weights.shape[2])
        for e, rows in spans:
            torch.mm(x[rows], weights[e], out=out[rows])
            if bias is not None:
                out[rows] += bias[e]
        return out


@dataclass(frozen=True)
class Rows:
    """The (token, expert) pairs of a forward, R in all, by expert, and for each by token.

    token, expert  (R,) int64
    place          (R,) int64: where the pair stands among the module's arguments
    bounds         expert e has the rows bounds[e] to bounds[e + 1]
    weight         (R,): the router's; None where the inputs are multiplied by it already
    beyond         the tokens, places and weights of pairs whose number is no expert's
    """

    token: Tensor
    expert: Tensor
    place: Tensor
    bounds: list[int]
    weight: Tensor | None
    beyond: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Experts:
    """One layer's E experts of F neurons; neuron f of expert e has the index e * F + f.

    Expert e computes down_e(activation(gate_e(x)) * up_e(x)). `call` is how its module is called:

    routed  forward(x (..., D), index (T, K), weights (T, K)): of each of T tokens the sum of what
            its K experts give, times their weights. In eager mode expert by expert, otherwise token
            by token (transformers' config._experts_implementation)
    dense   forward(x (E * T, D)): every expert's inputs one below the other, times its weights,
            zero at the tokens that it does not get; gives all their outputs (Llama 4)
    router  forward(x (B, T, D)): routes by itself (JetMoE, and GraniteMoe of transformers 5.0)
    shared  forward(x (..., D), weights (T, E)): every token goes to every expert, whose h is
            multiplied by its weight before down; summed in float32 (Inkling's shared experts)

    Experts that are not `gated` compute down_e(activation(up_e(x))): up_e(x) is their gate, and
    their up is 1. Without an `activation` h is what the module's own function makes of gate and up,
    a product act(gate) * b(up) (with clamps, say): act is h where up is `neutral`.
    """

    layer: int
    path: str
    module: nn.Module
    activation: str | None
    n_experts: int  # E
    expert_width: int  # F
    hidden: int  # D
    call: str
    inputs: tuple[Maps, ...]  # gate and up in one, or each its own, or up alone
    output: Maps
    gated: bool = True
    interleaved: bool = False  # gate and up in one: by turns, not side by side
    neutral: float = 1.0
    sums_in: torch.dtype | None = None  # of the eager sum; None: the inputs'
    n_layers: int = 0  # of the model
    runs: bool = True  # whether a forward of text calls them
    offset: int = 0  # where the neurons begin among those of the layer
    modules: tuple[tuple[str, int], ...] = ()  # of the model, where several were asked for
    projections: tuple[Projection, ...] = ()

    @property
    def width(self) -> int:
        """E * F."""
        return self.n_experts * self.expert_width

    n_neurons = width
    whole = 0  # processes hold none of them in parts

    @property
    def inside(self) -> slice:
        """Where the neurons stand among those of the layer."""
        return slice(self.offset, self.offset + self.width)

    @property
    def is_gated(self) -> bool:
        return self.gated

    def fold(self, table: AnyArray) -> AnyArray:
        """(C, E * F) by neuron -> (E * C, F), of expert e and row c in the row e * C + c."""
        rows = table.reshape(-1, self.n_experts, self.expert_width).swapaxes(0, 1)
        return rows.reshape(-1, self.expert_width)

    def unfold(self, table: AnyArray) -> AnyArray:
        """(E * C, F) -> (C, E * F), the reverse of `fold`."""
        rows = table.reshape(self.n_experts, -1, self.expert_width).swapaxes(0, 1)
        return rows.reshape(-1, self.width)

    # --- gate, up and h ---------------------------------------------------------------------

    def activation_module(self) -> Any:
        """What the module calls on gate, or None if it has nothing of the kind."""
        for module in self.module.modules():
            for name in _ACTIVATION_NAMES:
                if callable(getattr(module, name, None)):
                    return getattr(module, name)
        return None

    def project(self, x: Tensor, bounds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """gate and up (R, F) of x (R, D); views of one tensor where the weights are packed."""
        first, *rest = (
            maps.apply(self.module, x, bounds, self.is_grouped()) for maps in self.inputs
        )
        if rest:
            return first, rest[0]
        if not self.gated:
            return first, first.new_ones(1, self.expert_width).expand_as(first)
        if self.interleaved:
            return first[:, ::2], first[:, 1::2]
        return first[:, : self.expert_width], first[:, self.expert_width :]

    def own_h(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """h (R, F) by the module's own function; act where up is left out."""
        n_rows, step = len(gate), max(_PART // max(self.expert_width, 1), 1)
        needs_grad = gate.requires_grad or (up is not None and up.requires_grad)
        has_grad = torch.is_grad_enabled() and needs_grad
        if n_rows <= step or gate.is_cuda or has_grad or not is_plain(gate):
            return self._own_h(gate, up)
        # In parts that stay in the cache: the function goes over its input many times.
        h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        for start in range(0, n_rows, step):
            rows = slice(start, start + step)
            h[rows] = self._own_h(gate[rows], None if up is None else up[rows])
        return h

    def _own_h(self, gate: Tensor, up: Tensor | None) -> Tensor:
        if up is None:
            up = torch.full_like(gate, self.neutral)
        own = getattr(self.module, "_apply_gate", None) if self.gated else None
        if own is None:
            return cast(Tensor, self.activation_module()(gate)) * up
        parts = (gate, up)
        packed = torch.stack(parts, 2).flatten(1) if self.interleaved else torch.cat(parts, 1)
        return cast(Tensor, own(packed))

    def act(self, gate: Tensor) -> Tensor:
        """act (R, F) by the module's own function."""
        own = self.activation_module()
        is_own = self.activation is None or own is None
        return self.own_h(gate) if is_own else cast(Tensor, own(gate))

    def factor(self, up: Tensor) -> Tensor:
        """b(up) (R, F): what act is multiplied by."""
        if self.activation is not None or not self.gated:
            return up
        ones = torch.ones_like(up)
        return self.own_h(ones, up) / self.act(ones)

    # --- the forward ------------------------------------------------------------------------

    def begin(self, x: Tensor, *routing: Tensor) -> tuple[Tensor, Rows]:
        """The inputs (R, D) of the pairs, and the pairs, from the module's arguments."""
        flat = x.reshape(-1, self.hidden)
        weight = beyond = None
        if self.call == "router":
            _, token, weight, sizes, _ = cast(Any, self.module).router(flat)
            numbers = torch.arange(self.n_experts, device=flat.device)
            expert = numbers.repeat_interleave(torch.tensor(sizes, device=flat.device))
            return flat.index_select(0, token), Rows(
                token, expert, token, [0, *accumulate(sizes)], weight
            )
        if self.call == "shared":
            n, numbers = len(flat), torch.arange(len(flat) * self.n_experts, device=flat.device)
            token, expert = numbers % max(n, 1), numbers // max(n, 1)
            weight = routing[0].reshape(n, self.n_experts).T.reshape(-1)
            bounds = [e * n for e in range(self.n_experts + 1)]
            return flat.index_select(0, token), Rows(token, expert, numbers, bounds, weight)
        if self.call == "dense":
            place = (flat != 0).any(1).nonzero().squeeze(1)
            expert = place // max(len(flat) // self.n_experts, 1)
            token = place % max(len(flat) // self.n_experts, 1)
        else:
            index, weights = routing
            expert, place = index.reshape(-1).sort(stable=True)
            token, weight = place // max(index.shape[-1], 1), weights.reshape(-1)[place]
        sizes = torch.bincount(expert, minlength=self.n_experts)[: self.n_experts].tolist()
        bounds = [0, *accumulate(sizes)]
        n = bounds[-1]
        if n < len(place) and weight is not None:
            beyond = (token[n:], place[n:], weight[n:])
            token, expert, place, weight = token[:n], expert[:n], place[:n], weight[:n]
        inputs = flat.index_select(0, place if self.call == "dense" else token)
        return inputs, Rows(token, expert, place, bounds, weight, beyond)

    def end(self, h: Tensor, rows: Rows, x: Tensor, *routing: Tensor) -> Tensor:
        """What the module returns, of h (R, F), its pairs and the module's arguments."""
        if self.call == "shared":
            h = h * cast(Tensor, rows.weight).unsqueeze(1)
        y = self.output.apply(self.module, h, rows.bounds, self.is_grouped())
        module = cast(Any, self.module)
        flat = x.reshape(-1, self.hidden)
        if rows.weight is None:
            return torch.zeros_like(flat).index_copy_(0, rows.place, y.to(flat.dtype))
        if self.call == "shared":
            each = y.float().view(self.n_experts, *flat.shape)
            return each.sum(0).to(x.dtype).view(x.shape)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        has_grad = y.requires_grad or rows.weight.requires_grad
        if has_grad or y.dtype != rows.weight.dtype:
            y = y * rows.weight.unsqueeze(1)
        else:
            y *= rows.weight.unsqueeze(1)  # large memory that is new costs more than the product
        if self.call == "router":
            total = torch.zeros_like(flat, dtype=y.dtype).index_add(0, rows.token, y)
            bias = getattr(module, "bias", None)
            return total.view(x.shape) if bias is None else total.view(x.shape) + bias
        others = None
        if rows.beyond is not None and self.n_numbers() > self.n_experts:
            others = flat[rows.beyond[0]] * rows.beyond[2].unsqueeze(1)
        if self.implementation() != "eager":
            k = routing[0].shape[-1]
            places = y.new_zeros if rows.beyond is not None else y.new_empty
            each = places(len(flat) * k, y.shape[1]).index_copy_(0, rows.place, y)
            if others is not None:
                each[cast(Any, rows.beyond)[1]] = others.to(each.dtype)
            total = each.view(len(flat), k, y.shape[1]).sum(1)
        else:
            total = torch.zeros_like(flat, dtype=self.sums_in or flat.dtype)
            y = y.to(total.dtype)
            for start, stop in pairwise(rows.bounds):
                if start < stop:
                    total.index_add_(0, rows.token[start:stop], y[start:stop])
            if others is not None:
                total.index_add_(0, cast(Any, rows.beyond)[0], others.to(total.dtype))
        return total.to(x.dtype).view(x.shape)

    def formula(self, *given: Tensor) -> Tensor:
        """The module's output by the description, in torch: what the self-check compares with."""
        x, rows = self.begin(*given)
        gate, up = self.project(x, rows.bounds)
        plain = ACTIVATIONS.get(self.activation or "")
        h = self.own_h(gate, up) if plain is None else plain(gate) * up
        return self.end(h, rows, *given)

    def implementation(self) -> str:
        """How transformers' experts interface runs the module now; without it, eager."""
        name = getattr(getattr(self.module, "config", None), "_experts_implementation", None)
        return name if hasattr(self.module, "is_transposed") and name is not None else "eager"

    def is_grouped(self) -> bool:
        """Whether the module makes grouped products, as torch does on this device."""
        device = device_of(self.module)
        can = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
        return self.implementation() == "grouped_mm" and can and not torch.compiler.is_compiling()

    def n_numbers(self) -> int:
        """How many numbers a router may give; those from E on mean the token itself (LongCat)."""
        weight = cast(Tensor, attrgetter(self.inputs[0].weight)(self.module))
        return len(weight) if weight.dim() == 3 else self.n_experts

    def uncalled(self) -> list[tuple[str, nn.Module]]:
        """The modules inside that this forward does not call."""
        own = cast(Any, self.module)
        names = ("post_expert_norm", "router")
        roots = [self.activation_module(), *(getattr(own, name, None) for name in names)]
        called = {id(m) for root in roots if isinstance(root, nn.Module) for m in root.modules()}
        return [(n, m) for n, m in own.named_modules() if m is not own and id(m) not in called]
