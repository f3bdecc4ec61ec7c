"""Models whose gradients are known: the MLP of the published test vectors, in a model of one layer.

The tests of gradients use it; `plain_ig` is the definition by hooks, apart from the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# Methods 2(h), E2, and 5.9, E5.
X = (1.0, -0.5)
GATE = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
UP = ((1.0, 1.0), (1.0, -1.0), (0.0, 2.0))
DOWN = ((1.0, 0.0, -1.0), (0.5, 1.0, 0.0))
UNEMBED = ((1.0, -1.0), (0.0, 1.0), (-1.0, 0.5))


def _linear(rows: Sequence[Sequence[float]]) -> nn.Linear:
    weight = torch.tensor(rows)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight)
    return made


class OneMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = _linear(GATE), _linear(UP), _linear(DOWN)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return out


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = OneMLP()

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        out: Tensor = x + self.mlp(x)
        return out


class Vectors(nn.Module):
    """logits = W_U (x + W_d m), x the same at every token."""

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace(num_hidden_layers=1, max_position_embeddings=64)
        self.config.get_text_config = lambda: self.config
        self.embed = nn.Embedding(3, 2)
        self.embed.weight = nn.Parameter(torch.tensor([X, X, X]))
        self.layers = nn.ModuleList([OneLayer()])
        self.head = _linear(UNEMBED)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))


# --- the definition, by hooks ----------------------------------------------------------------


def plain_ig(
    model: Any,
    downs: Sequence[nn.Module],
    ids: Sequence[int],
    target: int,
    points: Sequence[float],
    baseline: Tensor | None = None,
) -> tuple[Tensor, float, list[float]]:
    """(L, F), P and P at each layer's baseline, of one sentence: the inputs of `downs` are scaled.

    One whole forward and backward for each layer and point, with a hook of its own.
    """
    tokens = torch.tensor([list(ids)])

    def run(number: int | None, vector: Tensor | None) -> Tensor:
        def put(_: Any, args: Any) -> Any:
            x = args[0].clone()
            x[:, -1] = vector
            return (x,)

        handle = downs[number].register_forward_pre_hook(put) if number is not None else None
        out = model(input_ids=tokens).logits[0, -1].softmax(-1)[target]
        if handle is not None:
            handle.remove()
        return out

    values: list[Tensor] = []
    hooks = [
        down.register_forward_pre_hook(lambda _, args: values.append(args[0][0, -1].detach()))
        for down in downs
    ]
    p = float(run(None, None).detach())
    for hook in hooks:
        hook.remove()
    rows, at_baseline = [], []
    for number, m in enumerate(list(values)):
        b = torch.zeros_like(m) if baseline is None else baseline[number].to(m)
        total = torch.zeros_like(m)
        for a in points:
            leaf = (b + a * (m - b)).requires_grad_()
            total += torch.autograd.grad(run(number, leaf), leaf)[0]
        rows.append((m - b) * total / len(points))
        at_baseline.append(float(run(number, b).detach()))
    return torch.stack(rows), p, at_baseline
