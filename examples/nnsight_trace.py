"""Counts neurons and switches them off inside a trace of nnsight.

To copy: `model` is an nnsight `LanguageModel` (or `NNsight(hf_model)`) with gated MLPs.
tests/test_integrations.py runs it; docs/backend.md shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from relneuron import ops


def run_with_neurons(
    model: Any,
    tokens: Tensor,
    stats: Sequence[ops.GroupStats],
    group_ids: Tensor | None = None,
    keep: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """The logits of `tokens` (B, T), while `stats[layer]` counts the MLP of each layer.

    group_ids (B * T,) int32 says where each token is counted, -1 = nowhere. keep[layer] is a mask
    (1, ceil(F/32)) int32: bit f % 32 of word f // 32 clear = neuron f is off.
    """
    with torch.no_grad(), model.trace(tokens):
        for layer, block in enumerate(model.model.layers):
            gate, up = block.mlp.gate_proj.output, block.mlp.up_proj.output
            h = ops.swiglu_stats(
                gate.flatten(0, -2),
                up.flatten(0, -2),
                activation="silu",
                stats=stats[layer],
                group_ids=group_ids,
                keep=None if keep is None else keep[layer],
            )
            block.mlp.down_proj.input = h.view_as(gate)
        logits: Tensor = model.output.logits.save()
    return logits  # noqa: RET504  it is there only when the trace is left
