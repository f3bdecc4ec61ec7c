"""One tiny call of a Triton kernel: `ops/backends.py` asks by it whether launches work at all."""

from __future__ import annotations

import torch

from relneuron.ops.swiglu_stats.reference import Call
from relneuron.ops.swiglu_stats.triton_launch import swiglu_stats_triton


def try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Raise what Triton raises, or RuntimeError if the numbers are wrong; waits for the device."""
    width = 32
    # silu of these is exact in every dtype, also by the approximate instructions.
    gate = torch.tensor([[0.0, 64.0, -1024.0, 64.0] * (width // 4)], dtype=dtype, device=device)
    up = torch.full((1, width), 2.0, dtype=dtype, device=device)
    h = torch.empty_like(gate)
    count = torch.zeros(1, 1, width, dtype=torch.int64, device=device)
    tokens = torch.zeros(1, dtype=torch.int64, device=device)
    call = Call(
        gate=gate,
        up=up,
        out=h,
        activation="silu",
        sites=("act",),
        threshold_bits=0,
        count=count,
        tokens=tokens,
        sum=None,
        sum_sq=None,
        max=None,
        n_nonfinite=None,
        group_ids=None,
        responses={},
        prompt_ids=None,
        # The last neuron of every four is off.
        keep=torch.tensor([[0x77777777]], dtype=torch.int32, device=device),
        condition_ids=None,
    )
    swiglu_stats_triton(call)
    found = h.tolist(), count.flatten().tolist(), tokens.tolist()
    expected = [[0.0, 128.0, 0.0, 0.0] * (width // 4)], [0, 1, 0, 1] * (width // 4), [1]
    if found != expected:
        raise RuntimeError("it gave wrong numbers")
