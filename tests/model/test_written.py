"""The vectors nearest to a neuron's own: all neurons of all layers, of experts, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from relneuron.model.stream.read import read_residual_model
from relneuron.model.written import nearest, promoted, value_of
from tests.conftest import tiny_model
from tests.kit.experts import expert_model, experts_of, weights_of


def check(residual: Any, columns: list[torch.Tensor], neurons: list[tuple[int, str, int]]) -> None:
    """`columns` are the value vectors (F, D) of each layer."""
    every = [(layer, k) for layer, own in enumerate(columns) for k in range(len(own))]
    units = torch.cat(columns).double()
    units /= units.norm(dim=1, keepdim=True)
    values = [value_of(residual, neuron) for neuron in neurons]
    found = nearest(residual, values, neurons, 4)
    for (layer, site, index), near in zip(neurons, found, strict=True):
        own = units[every.index((layer, index))]
        if site in ("down", "o"):
            own = torch.eye(units.shape[1], dtype=torch.float64)[index]
        cosines = (units @ own).tolist()
        if site not in ("down", "o"):
            cosines[every.index((layer, index))] = -2
        best = sorted(cosines, reverse=True)[:4]
        assert [one.cosine for one in near] == pytest.approx(best, abs=2e-4)
        for one in near:
            place = every.index((one.layer, one.number))
            assert one.cosine == pytest.approx(cosines[place], abs=2e-4)


def test_a_dense_model() -> None:
    model = tiny_model("qwen3")
    residual = read_residual_model(model)
    columns = [layer.mlp.down_proj.weight.detach().T for layer in model.model.layers]
    check(residual, columns, [(0, "gate", 3), (1, "up", 47), (2, "down", 9), (1, "o", 5)])
    assert value_of(residual, (0, "q", 3)) is None
    assert nearest(residual, [], [], 4) == [] == promoted(residual, [], 4)


def test_experts() -> None:
    model = expert_model("mixtral")
    residual = read_residual_model(model)
    columns = []
    for experts in experts_of(model):
        downs = [weights_of("mixtral", experts.module, e)[2].detach().T for e in range(4)]
        columns.append(torch.cat(downs))
    check(residual, columns, [(0, "gate", 3), (1, "gate", 95), (1, "down", 9)])


def test_of_equal_ones_the_first_and_a_vector_of_zeros_is_near_to_none() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in (1, 2):
            model.model.layers[layer].mlp.down_proj.weight[:, 7] = model.model.layers[
                0
            ].mlp.down_proj.weight[:, 7]
        model.model.layers[0].mlp.down_proj.weight[:, 8] = 0
    residual = read_residual_model(model)
    neurons = [(1, "gate", 7), (0, "gate", 8)]
    same, zero = nearest(residual, [value_of(residual, n) for n in neurons], neurons, 3)
    assert [(one.layer, one.number, one.cosine) for one in same[:2]] == [(0, 7, 1.0), (2, 7, 1.0)]
    assert [one.cosine for one in zero] == [0.0] * 3
    assert [(one.layer, one.number) for one in zero] == [(0, 0), (0, 1), (0, 2)]


def test_promoted_tokens_are_at_the_ends_of_the_logits() -> None:
    model = tiny_model("llama")
    residual = read_residual_model(model)
    value = value_of(residual, (1, "gate", 3))
    (ends,) = promoted(residual, [value], 5)
    gain = model.model.norm.weight.detach()
    logits = (model.lm_head.weight.detach() * gain) @ model.model.layers[
        1
    ].mlp.down_proj.weight.detach()[:, 3]
    order = logits.argsort(descending=True).tolist()
    assert [token for token, _ in ends.largest] == order[:5]
    assert [token for token, _ in ends.least] == order[::-1][:5]
    assert [logit for _, logit in ends.largest] == pytest.approx(logits[order[:5]].tolist())
