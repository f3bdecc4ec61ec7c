"""Counts active neurons per language in a plain Hugging Face loop, with `relneuron.ops` alone.

To copy: it needs a model whose MLPs have gate_proj, up_proj, down_proj (Llama, Mistral, Qwen, ...).
tests/test_integrations.py runs it; docs/backend.md shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from relneuron import ops


def count_active(
    model: Any, batches: Iterable[tuple[Mapping[str, Tensor], int]], n_languages: int
) -> list[ops.GroupStats]:
    """Run the batches, (inputs of the model, language); returns the counts of every layer.

    `counts[layer].count["act"]` is (n_languages, F): how often act(gate) was above zero, of
    `counts[layer].tokens` (n_languages,). Padding is not counted.
    """
    mlps = [layer.mlp for layer in model.model.layers]
    counts = [
        ops.GroupStats(
            groups=n_languages, width=mlp.gate_proj.out_features, device=mlp.gate_proj.weight.device
        )
        for mlp in mlps
    ]
    languages: Tensor | None = None  # (B * T,) int32: the language of each token, -1 = padding

    def counting(mlp: Any, stats: ops.GroupStats) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            gate, up = mlp.gate_proj(x).flatten(0, -2), mlp.up_proj(x).flatten(0, -2)
            h = ops.swiglu_stats(gate, up, activation="silu", stats=stats, group_ids=languages)
            return mlp.down_proj(h.view(*x.shape[:-1], -1))

        return forward

    for mlp, stats in zip(mlps, counts, strict=True):
        mlp.forward = counting(mlp, stats)  # on the instance: the class stays as it is
    try:
        for inputs, language in batches:
            mask = inputs["attention_mask"].flatten()
            languages = torch.where(mask == 0, -1, language).int()
            with torch.no_grad():
                model(**inputs)
    finally:
        for mlp in mlps:
            del mlp.forward
    return counts
