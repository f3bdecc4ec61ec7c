"""The eight scores of FFN neurons, against two neurons by hand and all logits in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from relneuron.artifact.files import RelneuronError
from relneuron.methods.gains import scores as scores_module
from relneuron.methods.gains.comparison import METHODS, TargetRanks, method_scores
from relneuron.methods.gains.scores import layer_scores, target_ranks
from relneuron.model.stream.parts import ResidualModel
from relneuron.model.stream.read import read_residual_model
from relneuron.model.stream.trace import Trace, trace
from tests.kit.attributed import (
    FAMILIES,
    N_LAYERS,
    VOCABULARY,
    WIDTH,
    attributed_model,
    log_p,
    scale_of,
    sentences,
    targets_of,
    weights_of,
)

Traced = tuple[ResidualModel, Trace, torch.Tensor]


@pytest.fixture(scope="module", params=FAMILIES)
def traced(request: pytest.FixtureRequest) -> Traced:
    residual = read_residual_model(attributed_model(request.param))
    found = trace(residual, sentences())
    return residual, found, targets_of(found)


# Two neurons by hand (D = 3, V = 4, target 0), to nine places.
BY_HAND = {
    "log_prob_gain": (0.7461940721384765, -0.1258698692804492),
    "log_prob": (-0.4273868316835772, -1.5016112572377622),
    "prob_gain": (0.3711080959290579, -0.0395786886872018),
    "norm": (1.118033988749895, 2.29128784747792),
    "coefficient": (2.0, 0.5),
    "reciprocal_rank": (1.0, 0.5),
    "coefficient_norm": (2.23606797749979, 1.14564392373896),
    "coefficient_rank": (2.0, 0.25),
}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_two_neurons_by_hand(dtype: torch.dtype, limit: float) -> None:
    rows = [[1, 0, 0.5], [0, 1, -0.5], [-1, 0.5, 0], [0.5, -1, 0.25]]
    unembed = torch.tensor(rows, dtype=dtype) * torch.tensor([1, 0.5, 2], dtype=dtype)
    x = torch.tensor([[0.2, -0.1, 0.4]], dtype=dtype)
    values = torch.tensor([[1, 0, 0.5], [-0.5, 2, 1]], dtype=dtype)
    m = torch.tensor([[2, -0.5]], dtype=dtype)
    y = x + m @ values
    scale = 1 / (y.square().mean(1) + 1e-6).sqrt()
    found = layer_scores(x, values, m, unembed, scale, torch.tensor([0]))
    assert tuple(found) == METHODS == tuple(BY_HAND)
    for method, wanted in BY_HAND.items():
        assert found[method].dtype == dtype
        np.testing.assert_allclose(found[method][0], wanted, rtol=0, atol=limit)


def naive_scores(
    model: Any, found: Trace, targets: torch.Tensor, norm_bias: bool
) -> dict[str, np.ndarray]:
    """Each method's (E, L, F) from the definitions, all logits materialised in float64."""
    shape = (len(targets), N_LAYERS, WIDTH)
    result = {method: np.zeros(shape) for method in METHODS}
    for layer, weights in enumerate(weights_of(model)):
        zero = torch.zeros(1, len(weights.w_down[0]), dtype=torch.float64)
        # Column w: log p(w | v) up to a constant, so its order is that of the logits.
        every = [
            log_p(model, weights.w_down, torch.tensor(1.0), w, False) for w in range(VOCABULARY)
        ]
        logits = torch.stack(every, 1)
        for e, target in enumerate(targets.tolist()):
            x = found.r[layer][e : e + 1, -1].double()
            m = found.neurons[layer][e, -1].double()
            scale = scale_of(model, found.h[-1][e, -1])
            before = log_p(model, x, scale, target, norm_bias)
            after = log_p(model, x + m[:, None] * weights.w_down, scale, target, norm_bias)
            alone = log_p(model, zero + m[:, None] * weights.w_down, scale, target, norm_bias)
            norm = weights.w_down.square().sum(1).sqrt()
            rank = 1 + (logits > logits[:, target : target + 1]).sum(1)
            for method, values in {
                "log_prob_gain": after - before,
                "log_prob": alone,
                "prob_gain": after.exp() - before.exp(),
                "norm": norm,
                "coefficient": m.abs(),
                "reciprocal_rank": 1 / rank,
                "coefficient_norm": m.abs() * norm,
                "coefficient_rank": m.abs() / rank,
            }.items():
                result[method][e, layer] = values
    return result


@pytest.mark.parametrize("norm_bias", [False, True])
def test_scores_of_a_model_are_those_of_all_logits(traced: Traced, norm_bias: bool) -> None:
    residual, found, targets = traced
    wanted = naive_scores(residual.model, found, targets, norm_bias)
    ranks = TargetRanks.of(residual, targets)
    for method in METHODS:
        ours = method_scores(residual, found, targets, method, norm_bias=norm_bias)
        assert len(ours) == N_LAYERS and ours[0].shape == (len(targets), WIDTH)
        np.testing.assert_allclose(torch.stack(ours, 1), wanted[method], rtol=1e-5, atol=2e-5)
        known = method_scores(residual, found, targets, method, ranks=ranks, norm_bias=norm_bias)
        assert all(torch.equal(a, b) for a, b in zip(ours, known, strict=True))


def test_ranks_of_other_targets_are_refused(traced: Traced) -> None:
    residual, found, targets = traced
    ranks = TargetRanks.of(residual, targets)
    assert ranks.tokens.tolist() == sorted(set(targets.tolist()))
    for other in (max(targets.tolist()) + 1, min(targets.tolist()) - 1):
        with pytest.raises(ValueError, match="not known"):
            method_scores(residual, found, torch.full_like(targets, other), METHODS[5], ranks=ranks)


def test_an_unknown_method_is_refused(traced: Traced) -> None:
    with pytest.raises(RelneuronError, match="unknown method 'logit'") as error:
        method_scores(*traced, "logit")
    assert error.value.exit_code == 2


@pytest.mark.parametrize("block", [1, 31 * 7, 2**22])
def test_ranks_count_larger_logits(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(scores_module, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    # Small integers: products are exact and many are equal.
    values = torch.randint(-3, 4, (40, 5), generator=generator).float()
    unembed = torch.randint(-3, 4, (31, 5), generator=generator).float()
    tokens = torch.tensor([30, 0, 7, 7])
    logits = values @ unembed.T
    wanted = [[1 + sum(x > row[t] for x in row).item() for t in tokens] for row in logits]
    assert target_ranks(values, unembed, tokens).tolist() == wanted


def test_a_token_is_never_behind_itself() -> None:
    """Its logit is rounded otherwise in another product; it is still the largest."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 257, generator=generator)
    unembed = torch.randn(1000, 257, generator=generator)
    tokens = (values @ unembed.T).argmax(1).unique()
    ranks = target_ranks(values, unembed, tokens)
    assert (ranks == 1).sum(1).eq(1).all()
