"""What a model's residual stream is made of: what its layers read, and what they write.

`find.py` makes these of a model and `read.py` proves them by numbers; `trace.py` reads what they
name in a forward, and the scores in methods/gains/ are sums over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.layers import Parts, Projection
from relneuron.model.stream.norms import Norm

QUERY_KEYS = ("gate", "up", "down")


def unsupported(model: Any, reason: str) -> RelneuronError:
    """The error for a model whose residual stream is not a sum of what its layers write."""
    return RelneuronError(
        f"{type(model).__name__} cannot be attributed: {reason}",
        "give a dense decoder-only model on one device whose layers add what their attention and "
        "MLP write to the residual stream (Llama, Qwen, Gemma, OLMo 2, Cohere, GPT-2, ...)",
    )


def matrix(module: nn.Module) -> Tensor:
    """A linear map's matrix (out, in), a view of its weight; GPT-2's Conv1D stores (in, out)."""
    weight = cast(Tensor, module.weight).detach()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def bias_of(module: nn.Module) -> Tensor:
    """(out,) float64, zeros where the map has none."""
    bias = getattr(module, "bias", None)
    if bias is None:
        weight = matrix(module)
        return weight.new_zeros(len(weight), dtype=torch.float64)
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


@dataclass(frozen=True)
class Write:
    """What a part adds to the stream: factor * norm(linear(neurons)), of which any may be absent.

    `source` is the module whose output, times `factor`, is added. `linear` is None where that is
    no linear map of anything (then it is added, and nothing in it is told apart).
    """

    source: nn.Module
    linear: nn.Module | None
    norm: Norm | None
    factor: float

    def added(self, output: Tensor) -> Tensor:
        """What is added where the source gives `output`, in the model's own arithmetic."""
        return output if self.factor == 1 else output * self.factor

    def values(self, index: Tensor | int | None = None) -> Tensor:
        """(K, D): the value vector of each neuron, or of some (..., D), but for the `scale`.

        A column of the linear map, a view of its weight; behind a norm gain (.) column (centred
        under a LayerNorm), made anew in float32 at least.
        """
        columns = matrix(cast(nn.Module, self.linear)).T
        columns = columns if index is None else columns[index]
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

    def constant(self, scale: Tensor) -> Tensor:
        """(..., D) float64: what is written without any neuron, at places of that `scale` (...)."""
        bias = bias_of(cast(nn.Module, self.linear))
        if self.norm is not None:
            bias = self.norm.linear(bias)
        bias = bias * scale.unsqueeze(-1)
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

    r = h + attention write and h' = r + FFN write. The MLP reads r or, `is_parallel`, h.
    """

    layer: int
    path: str
    module: nn.Module
    attention: Write
    heads: Heads | None  # None: what the attention writes is not told apart
    ffn: Write
    gate: Read  # of an MLP without a gate: its first map, which is `up`, too
    up: Read
    mlp: nn.Module  # called with one tensor, whenever its neurons are
    is_parallel: bool
    order: int  # of adding in the model's arithmetic, an index of ORDERS

    @property
    def down(self) -> nn.Module:
        """From the neurons (.., F)."""
        return cast(nn.Module, self.ffn.linear)

    @property
    def out(self) -> nn.Module:
        """From what attends: the heads' outputs (.., H * d_h), where they are told apart."""
        return cast(nn.Module, self.attention.linear)

    def ffn_values(self) -> Tensor:
        """(F, D): the value vector of each FFN neuron; see `Write.values`."""
        return self.ffn.values()

    def attention_values(self) -> Tensor:
        """(H * d_h, D): the value vector of each head's coordinates; see `Write.values`."""
        return self.attention.values()

    def parts(self) -> Parts:
        """Its neurons as a patch zeroes them: `ffn`, inputs of `down`; `attention`, of `out`."""
        maps = {"ffn": self.ffn.linear, "attention": self.attention.linear if self.heads else None}
        return Parts(
            self.mlp,
            tuple(
                Projection(site, self.path, module, 0, matrix(module).shape[1], of_input=True)
                for site, module in maps.items()
                if module is not None
            ),
        )

    def ffn_keys(self, key: str, index: Tensor, *, center: bool = True) -> Tensor:
        """(n, D) float64: the key q (.) gain of FFN neurons `index` (n,) int64, in methods B4.

        `key` is `gate`, `up` or `down` (the notebook's: the value vector). Of an MLP without a
        gate both `gate` and `up` are the rows of its first map. `center`: as the norm does.
        """
        if key not in QUERY_KEYS:
            raise RelneuronError(f"unknown key {key!r}", f"use {', '.join(QUERY_KEYS)}", 2)
        if key != "down":
            return (self.gate if key == "gate" else self.up).keys(index, center)
        rows, norm = self.ffn.values(index), self.gate.steps[0][0]
        return rows.double() if norm is None else norm.keys(rows, center)

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
    width: int  # F
    hidden: int  # D
    vocabulary: int  # V
    is_gated: bool  # SwiGLU or a kin: the neuron is activation(gate) * up
    centred: bool  # LayerNorm
    eps: float
    unembed: Tensor  # (V, D) float32
    offset: Tensor | None  # (V,): what the final norm's bias and the lm_head's add to the logits
    cap: float | None = None  # logits are cap * tanh(logits / cap), the offset included
    pads: bool = True  # whether a sentence has the same numbers behind padding

    @property
    def shape(self) -> dict[str, int]:
        """layers, width (F) and hidden (D), as files name them."""
        return {"layers": len(self.layers), "width": self.width, "hidden": self.hidden}
