"""Routed experts read from values alone, recomputed by hooks token by token and expert by expert.

`oracle.py` uses it for modules that hold the weights of several experts. What is read is proved:
each expert's share of each token, computed here, must add up to what the module gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Zeroed = Mapping[str, Tensor]  # site -> indices that become zero


@dataclass(frozen=True)
class Experts:
    """E experts of F neurons in one module; neuron f of expert e is number e * F + f.

    `gate` and `up` are the columns (F,) of what the first weights give, `up` None without a gate.
    """

    layer: int
    path: str
    module: nn.Module
    n_experts: int
    expert_width: int
    hidden: int
    gate: Tensor
    up: Tensor | None
    rest: bool  # whether h is something where up is 0: then act is h at 0, otherwise at 1
    inputs: Callable[[int], Tensor]  # expert -> (D, columns)
    outputs: Callable[[int], Tensor]  # expert -> (F, D)

    def of(self, module: nn.Module) -> Experts:
        """The same experts in another module: a copy of the model in another dtype."""
        _, inputs, outputs = _weights(module, self.hidden)
        return replace(self, module=module, inputs=inputs, outputs=outputs)

    @property
    def width(self) -> int:
        return self.n_experts * self.expert_width

    def bias(self, name: str, expert: int) -> Tensor | float:
        bias = getattr(self.module, f"{name}_bias", None)
        return 0.0 if bias is None else bias[expert]

    def recompute(
        self, given: tuple[Tensor, ...], zeroed: Zeroed, seen: Callable[..., None] | None = None
    ) -> Tensor:
        """The module's output of its arguments, with outputs of gate and up at zero.

        `seen(expert, tokens, gate_up, h)` hears of every expert's rows.
        """
        x, *routing = given
        flat = x.reshape(-1, self.hidden)
        total = torch.zeros_like(flat)
        n_tokens = len(flat) // self.n_experts
        for expert in range(self.n_experts):
            if routing:
                token, place = (routing[0].reshape(len(flat), -1) == expert).nonzero(as_tuple=True)
                rows, weights = token, routing[1].reshape(len(flat), -1)[token, place]
            else:  # every expert's inputs are there, multiplied already, zero where it gets none
                mine = flat[expert * n_tokens : (expert + 1) * n_tokens]
                token = mine.any(1).nonzero().squeeze(1)
                rows, weights = token + expert * n_tokens, torch.ones(len(token))
            first = flat[rows] @ self.inputs(expert) + self.bias(_first(self.module), expert)
            for site, columns in (("gate", self.gate), ("up", self.up)):
                indices = zeroed.get(site)
                if indices is not None and columns is not None:
                    own = indices[indices // self.expert_width == expert] % self.expert_width
                    first[:, columns[own]] = 0
            h = own_h(self.module, first)
            if seen is not None:
                seen(expert, token, first, h)
            y = h @ self.outputs(expert) + self.bias("down_proj", expert)
            if getattr(self.module, "has_post_expert_norm", False):
                y = self.module.post_expert_norm(y)
            total.index_add_(0, rows, y * weights[:, None].to(y.dtype))
        if routing and hasattr(self.module, "identity_expert"):
            beyond = (routing[0] >= self.n_experts).to(flat.dtype) * routing[1]
            total += flat * beyond.sum(-1, keepdim=True)
        if "down" in zeroed:
            total[:, zeroed["down"]] = 0
        return total.view(x.shape)

    def site_values(self, first: Tensor, h: Tensor) -> dict[str, Tensor]:
        """(T, F) of the rows of one expert; act above 0 is what counts of it."""
        values = {"gate": first[:, self.gate]}
        if self.up is None:
            return values | {"act": h}
        neutral = first.clone()
        neutral[:, self.up] = 0.0 if self.rest else 1.0
        values |= {"up": first[:, self.up], "product": h, "act": own_h(self.module, neutral)}
        return values


def _first(module: nn.Module) -> str:
    return "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"


def own_h(module: Any, first: Tensor) -> Tensor:
    """h by the module's own function of what its first weights give."""
    gated = getattr(module, "has_gate", hasattr(module, "gate_up_proj"))
    if hasattr(module, "mlp"):  # the maps are in a module of their own
        gate, up = first.chunk(2, -1)
        return module.mlp.activation_fn(gate) * up
    if not gated:
        return module.act_fn(first)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(first)
    gate, up = first.chunk(2, -1)
    return module.act_fn(gate) * up


def read_experts(
    layer: int, path: str, module: Any, given: tuple[Tensor, ...], output: Tensor
) -> Experts | None:
    """The experts of a module whose output of `given` is known; None if they cannot be told."""
    x = given[0]
    hidden = x.shape[-1]
    weights = _weights(module, hidden)
    if weights is None or len(given) not in (1, 3):
        return None
    n_experts, inputs, outputs = weights
    width = len(outputs(0))
    found = _gate_and_up(module, inputs(0).shape[1], width)
    if found is None:
        return None
    experts = Experts(layer, path, module, n_experts, width, hidden, *found, inputs, outputs)
    ours = experts.recompute(given, {})
    near = 1e-5 * output.abs().max()
    return experts if bool(((ours - output.view(ours.shape)).abs() <= near).all()) else None


def _weights(
    module: Any, hidden: int
) -> tuple[int, Callable[[int], Tensor], Callable[[int], Tensor]] | None:
    """The number of experts, and the matrices of one by its number."""
    if hasattr(module, "mlp") and hasattr(module.mlp, "w1"):
        n = module.num_experts
        gate, up, down = (
            weight.view(n, -1, hidden) for weight in (module.mlp.w1, module.mlp.v1, module.mlp.w2)
        )
        return n, lambda e: torch.cat((gate[e], up[e])).T, lambda e: down[e]
    first, last = getattr(module, _first(module), None), getattr(module, "down_proj", None)
    if not isinstance(first, nn.Parameter) or not isinstance(last, nn.Parameter):
        return None
    if first.dim() != 3 or last.dim() != 3:
        return None

    def turned(weight: Tensor, dim: int) -> bool:
        """Whether dimension `dim` is not the hidden one; of a square matrix as the module says."""
        if weight.shape[1] == weight.shape[2]:
            return not getattr(module, "is_transposed", False)
        return weight.shape[dim] != hidden

    return (
        len(last),
        lambda e: first[e].T if turned(first, 1) else first[e],
        lambda e: last[e].T if turned(last, 2) else last[e],
    )


def _gate_and_up(
    module: Any, columns: int, width: int
) -> tuple[Tensor, Tensor | None, bool] | None:
    """Which columns are the gates and ups, by what changes in h when one column changes."""
    generator = torch.Generator().manual_seed(4)
    rows = 4 * torch.rand(4, columns, generator=generator) - 2
    base = own_h(module, rows)
    if base.shape != (4, width):
        return None
    gates, ups = torch.full((width,), -1), torch.full((width,), -1)
    for column in range(columns):
        by = torch.zeros(columns)
        by[column] = 0.25
        change, twice = own_h(module, rows + by) - base, own_h(module, rows + 2 * by) - base
        where = change.any(0).nonzero()
        if len(where) != 1:
            return None
        k = int(where)
        # In up h is a straight line or odd, at every point; in gate it is neither.
        bent = (twice[:, k] - 2 * change[:, k]).abs() > 1e-4 * twice[:, k].abs()
        turned = rows.clone()
        turned[:, column] *= -1
        skewed = (own_h(module, turned) + base)[:, k].abs() > 1e-4 * base[:, k].abs()
        is_gate = bool(bent.any() and skewed.any()) or columns == width
        (gates if is_gate else ups)[k] = column
    if bool((gates < 0).any()):
        return None
    if columns == width:
        return gates, None, False
    if bool((ups < 0).any()):
        return None
    without = rows.clone()
    without[:, ups] = 0
    return gates, ups, bool(own_h(module, without).any())
