"""Linear maps in a residual stream: their matrices, pieces of what they give, and what they read.

`probe.py` finds them by equal numbers; `parts.py` and `mixture.py` are made of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from relneuron.model.stream.norms import Norm


def matrix(module: nn.Module) -> Tensor:
    """A linear map's matrix (out, in), a view of its weight; GPT-2's Conv1D stores (in, out).

    With the active LoRA adapters of peft that are not merged it is a new tensor, of the weight's
    dtype as one would be that they are merged into.
    """
    weight = cast(Tensor, module.weight).detach()
    for delta in _added(module):
        weight = (weight + delta).to(weight.dtype)
    return weight.T if _is_transposed(module) else weight


def size(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear map."""
    rows, columns = cast(Tensor, module.weight).shape
    return (columns, rows) if _is_transposed(module) else (rows, columns)


def _is_transposed(module: nn.Module) -> bool:
    return type(getattr(module, "base_layer", module)).__name__ == "Conv1D"


def _added(module: Any) -> Iterator[Tensor]:
    """What each active adapter adds to a map's weight; nothing of what is more than a sum.

    Whether that is all that the module does is for find.py to prove.
    """
    adapters = getattr(module, "lora_A", None)
    if adapters is None or module.merged or module.disable_adapters:
        return
    for name in module.active_adapters:
        if name in adapters:
            yield module.get_delta_weight(name).detach()


def bias_of(module: nn.Module) -> Tensor:
    """(out,) float64, zeros where the map has none."""
    bias = getattr(module, "bias", None)
    if bias is None:
        weight = cast(Tensor, module.weight)
        return weight.new_zeros(size(module)[0], dtype=torch.float64)
    return cast(Tensor, bias).detach().double()


def without_head(tensor: Tensor) -> Tensor:
    """(B, T, n) of (B, 1, T, n): latent attention reads its latents as one head."""
    return tensor[:, 0] if tensor.dim() == 4 and tensor.shape[1] == 1 else tensor


@dataclass(frozen=True)
class Rows:
    """Outputs of a linear map: `size` of them from each of `starts` on, in this order.

    The values within packed q, k and v, say; of grouped heads one start a query head.
    """

    module: nn.Module
    starts: tuple[int, ...]
    size: int

    @property
    def n(self) -> int:
        return len(self.starts) * self.size

    def of(self, output: Tensor) -> Tensor:
        """The part (..., n) of the map's output, a view where it is one piece."""
        first, last = self.starts[0], self.starts[-1] + self.size
        if self.starts == tuple(range(first, last, self.size)):
            return output[..., first:last]
        start = torch.tensor(self.starts, device=output.device)[:, None]
        places = start + torch.arange(self.size, device=output.device)
        return output[..., places.flatten()]

    def matrix(self) -> Tensor:
        """(n, in)."""
        return self.of(matrix(self.module).T).T

    def bias(self) -> Tensor:
        """(n,) float64."""
        return self.of(bias_of(self.module))


@dataclass(frozen=True)
class Read:
    """Numbers that are linear in the stream but for the scales of norms: rows @ norm(x) + bias.

    Of one step, or of more through narrower states (latent attention): each step is a norm, or
    none, and the rows of a linear map that reads what it gives; the first one reads the stream.
    """

    steps: tuple[tuple[Norm | None, Rows], ...]

    @property
    def rows(self) -> Rows:
        """The last step's, whose outputs these numbers are."""
        return self.steps[-1][1]

    def apply(self, x: Tensor) -> Tensor:
        """(..., n) float64 of x (..., D)."""
        x = x.double()
        for norm, rows in self.steps:
            x = norm.apply(x) if norm is not None else x
            x = x @ rows.matrix().double().T + rows.bias()
        return x

    def keys(self, index: Tensor, center: bool = True) -> Tensor:
        """(n, D) float64: the keys q (.) gain of numbers `index` (n,) int64, in methods B4.

        Up to the scales of norms, which a share does not depend on. `center`: as the first norm
        does, where it is a LayerNorm; those behind it always centre.
        """
        keys = self.rows.matrix()[index].double()
        for place in range(len(self.steps) - 1, -1, -1):
            norm, _ = self.steps[place]
            if norm is not None:
                keys = norm.keys(keys, center or place > 0)
            if place:
                keys = keys @ self.steps[place - 1][1].matrix().double()
        return keys
