"""Tests of ops.residual_stats: every backend against torch and against a count of its own."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from relneuron.ops import GroupStats, available_backends, residual_stats
from relneuron.testing import assert_same_bits
from tests.kit.interpreter import IS_INTERPRETED, quiet

op = sys.modules["relneuron.ops.swiglu_stats.op"]
BACKENDS = [name for name, status in available_backends().items() if status.works]

pytestmark = quiet


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and not IS_INTERPRETED else "cpu"


def random_call(n_tokens: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n_tokens * width)

    def ids(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).int()

    return {
        "x": torch.randn(n_tokens, width, generator=generator).to(dtype),
        "residual": torch.randn(n_tokens, width, generator=generator).to(dtype),
        "group_ids": ids(-1, 3, n_tokens),
        "prompt_ids": ids(-1, 4, n_tokens).sort().values,
        "keep": ids(-(2**31), 2**31 - 1, 2, (width + 31) // 32),
        "condition_ids": ids(0, 2, n_tokens),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n_tokens", "width"), [(37, 200), (1, 1), (5, 64), (0, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_counts_masks_and_responses(
    backend: str, n_tokens: int, width: int, dtype: torch.dtype
) -> None:
    device = device_of(backend)
    call = random_call(n_tokens, width, dtype)
    stats = GroupStats(
        groups=3, width=width, sites=("down",), threshold=0.1, moments=True, device=device
    )
    responses = torch.zeros(4, width, device=device)
    tensors = {name: tensor.to(device) for name, tensor in call.items()}
    x, residual = tensors.pop("x"), tensors.pop("residual")
    y = residual_stats(
        x, residual, stats=stats, responses={"down": responses}, backend=backend, **tensors
    )

    bits = (call["keep"].unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
    keep = bits.reshape(2, -1)[call["condition_ids"].long(), :width].bool()
    expected = torch.where(keep, call["residual"] + call["x"], call["residual"])
    assert_same_bits(y.cpu(), expected)
    for group in range(3):
        rows = call["x"][call["group_ids"] == group].double()
        assert int(stats.tokens[group]) == len(rows)
        assert_same_bits(stats.count["down"][group].cpu(), (rows > 0.1).sum(0))
        torch.testing.assert_close(
            stats.sum["down"][group].cpu(), rows.sum(0), rtol=1e-6, atol=1e-6
        )
    for prompt in range(4):
        rows = call["x"][call["prompt_ids"] == prompt].float()
        torch.testing.assert_close(responses[prompt].cpu(), rows.sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropped_neuron_leaves_the_residual_whatever_its_value(backend: str) -> None:
    x = torch.tensor([[torch.nan, torch.inf, 1.0]], device=device_of(backend))
    residual = torch.tensor([[-0.0, 2.0, 3.0]], device=x.device)
    keep = torch.zeros(1, 1, dtype=torch.int32, device=x.device)
    assert_same_bits(residual_stats(x, residual, keep=keep, backend=backend), residual)


def test_errors_name_this_op_and_its_arguments() -> None:
    x = torch.zeros(2, 3)
    stats = GroupStats(groups=2, width=3, sites=("down",))
    with pytest.raises(ValueError, match="^residual_stats: residual must be .*T=2, F=3 .from x."):
        residual_stats(x, x[:1])
    with pytest.raises(ValueError, match="^residual_stats: stats must have sites among .*down"):
        residual_stats(x, x, stats=GroupStats(groups=1, width=3))
    with pytest.raises(ValueError, match="^residual_stats: group_ids must be in"):
        residual_stats(x, x, stats=stats, group_ids=torch.tensor([0, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="^residual_stats: out must not share memory with x"):
        residual_stats(x, x.clone(), out=x)
