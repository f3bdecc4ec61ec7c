"""Counts neurons and switches them off at the hook points of TransformerLens (TransformerBridge).

To copy: `bridge = TransformerBridge.boot_transformers(name)` of a model with gated MLPs.
tests/test_integrations.py runs it; docs/backend.md shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from relneuron import ops


def run_with_neurons(
    bridge: Any,
    tokens: Tensor,
    stats: Sequence[ops.GroupStats],
    group_ids: Tensor | None = None,
    keep: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """The logits of `tokens` (B, T), while `stats[layer]` counts the MLP of each layer.

    group_ids (B * T,) int32 says where each token is counted, -1 = nowhere. keep[layer] is a mask
    (1, ceil(F/32)) int32: bit f % 32 of word f // 32 clear = neuron f is off.
    """
    hooks: list[tuple[str, Callable[..., Tensor | None]]] = []
    for layer in range(bridge.cfg.n_layers):
        seen: dict[str, Tensor] = {}

        def see_gate(value: Tensor, hook: Any, seen: dict[str, Tensor] = seen) -> None:
            seen["gate"] = value.flatten(0, -2)

        def see_up(value: Tensor, hook: Any, seen: dict[str, Tensor] = seen) -> None:
            seen["up"] = value.flatten(0, -2)

        def replace_h(
            value: Tensor, hook: Any, seen: dict[str, Tensor] = seen, layer: int = layer
        ) -> Tensor:
            h = ops.swiglu_stats(
                seen.pop("gate"),
                seen.pop("up"),
                activation="silu",
                stats=stats[layer],
                group_ids=group_ids,
                keep=None if keep is None else keep[layer],
            )
            return h.view_as(value)

        hooks += [
            (f"blocks.{layer}.mlp.hook_pre", see_gate),  # the output of gate_proj
            (f"blocks.{layer}.mlp.hook_pre_linear", see_up),  # the output of up_proj
            (f"blocks.{layer}.mlp.hook_post", replace_h),  # the input of down_proj
        ]
    with torch.no_grad():
        logits: Tensor = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    return logits
