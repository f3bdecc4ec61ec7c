"""Gains of softly capped logits (Gemma 2) against the definition with all logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from relneuron import ops
from relneuron.ops.logprob_gain.base import Base, exact_gains, make_head
from relneuron.ops.logprob_gain.engine import Engine

TOKENS, HIDDEN, NEURONS, SENTENCES = 700, 24, 150, 4


def problem(dtype: torch.dtype, size: float, *, tilted: bool, seed: int = 0) -> dict[str, Any]:
    """Logits of some tens, neurons that move them by about `size`; some write nothing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scale = 0.5 + torch.rand(SENTENCES, generator=generator, dtype=torch.float64)
    coefficients = normal(SENTENCES, NEURONS) * size / HIDDEN**0.5
    coefficients[:, ::10] = 0
    after = None
    if tilted:
        grown = 1 + 0.1 * normal(SENTENCES, NEURONS).tanh() * size
        after = scale[:, None] * torch.where(coefficients == 0, 1.0, grown.clamp(min=0.2))
    tensors = {
        "x": 2 * normal(SENTENCES, HIDDEN),
        "values": normal(NEURONS, HIDDEN),
        "coefficients": coefficients,
        "unembed": normal(TOKENS, HIDDEN),
        "offset": normal(TOKENS),
    }
    found: dict[str, Any] = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    targets = torch.randint(0, TOKENS, (SENTENCES,), generator=generator)
    return found | {"scale": scale, "targets": targets, "scale_after": after}


def definition(given: dict[str, Any], cap: float) -> Tensor:
    """(E, K) float64."""
    x, values, c, unembed, offset = (
        given[name].double() for name in ("x", "values", "coefficients", "unembed", "offset")
    )
    targets = given["targets"][:, None, None]
    scale = given["scale"][:, None, None]

    def log_p(y: Tensor, scale: Tensor) -> Tensor:
        logits = scale * (y @ unembed.T) + offset
        logp = (cap * torch.tanh(logits / cap)).log_softmax(-1)
        return logp.gather(2, targets.expand(-1, y.shape[1], 1))[..., 0]

    after = scale if given["scale_after"] is None else given["scale_after"][..., None]
    return log_p(x[:, None] + c[..., None] * values, after) - log_p(x[:, None], scale)


@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("cap", [2.0, 30.0])
@pytest.mark.parametrize("size", [1e-3, 0.3, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_mode_is_the_definition(
    dtype: torch.dtype, size: float, cap: float, tilted: bool
) -> None:
    given = problem(dtype, size, tilted=tilted)
    want = definition(given, cap)
    certified = ops.logprob_gain(**given, cap=cap, mode="certified", tolerance=1e-6)
    error = (certified.double() - want).abs()
    assert bool((error <= 1e-6 + 2.0**-24 * want.abs()).all())
    exact = ops.logprob_gain(**given, cap=cap)
    assert float((exact.double() - want).abs().max()) < 1e-5 * (1 + size)
    assert not exact[:, ::10].any()
    assert exact.dtype == (dtype if dtype == torch.float64 else torch.float32)
    best = ops.logprob_gain(**given, cap=cap, mode="top", top=12)
    assert torch.equal(best.index, want.sort(dim=1, descending=True).indices[:, :12])
    assert float((best.gain.double() - want.gather(1, best.index)).abs().max()) < 1e-5 * (1 + size)


@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("cap", [1.0, 6.0, 50.0])
def test_float32_is_within_its_bounds(cap: float, tilted: bool) -> None:
    for seed, size in enumerate((1e-2, 0.1, 1.0, 5.0, 30.0)):
        given = problem(torch.float32, size, tilted=tilted, seed=seed)
        head = make_head(given["unembed"], given["scale"], given["targets"], given["offset"], cap)
        after = None if given["scale_after"] is None else given["scale_after"][:, None]
        base = Base(head, given["x"], given["values"], given["coefficients"][:, None], after)
        generator = torch.Generator().manual_seed(seed)
        place = torch.randperm(SENTENCES * NEURONS, generator=generator)[:300]
        gains, errors = Engine("cpu").gains(base, place)
        want = exact_gains(base, place)
        assert bool(((gains - want).abs() <= errors + 1e-12).all())
        assert size > 1 or float(errors.max()) < 5e-4
        # No gain is larger than its tangent and the bend allow.
        reach = base.reach()
        bound = base.first_order() + base.rounding(reach) + head.bend * reach * reach
        every = exact_gains(base, torch.arange(SENTENCES * NEURONS)).reshape(reach.shape)
        assert bool((every <= bound).all())


def test_each_sentences_own_vectors_and_layers_have_the_cap() -> None:
    given = problem(torch.float32, 1.0, tilted=False)
    want = definition(given, 5.0)
    vectors = given["coefficients"][..., None] * given["values"]
    shared = [given[name] for name in ("unembed", "scale", "targets")]
    more = {"offset": given["offset"], "cap": 5.0}
    own = ops.logprob_gain_vectors(given["x"], vectors, *shared, **more)
    assert float((own.double() - want).abs().max()) < 1e-5
    layer = ops.GainLayer(given["x"], given["values"], given["coefficients"])
    best = ops.logprob_gain_top([layer, layer], *shared, top=6, **more)
    assert torch.equal(best.layer, torch.tensor([[1, 0] * 3] * SENTENCES))
    firsts = want.sort(dim=1, descending=True).indices[:, :3]
    assert torch.equal(best.index, firsts.repeat_interleave(2, 1))


def test_a_cap_far_above_the_logits_changes_nothing() -> None:
    given = problem(torch.float32, 0.3, tilted=False)
    capped, plain = (ops.logprob_gain(**given, cap=cap) for cap in (1e6, None))
    torch.testing.assert_close(capped, plain, rtol=0, atol=2e-5)
    for cap in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="cap must be positive and finite"):
            ops.logprob_gain(**given, cap=cap)
