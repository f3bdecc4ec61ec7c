"""The vectors that neurons write: views of the weights; one erased is a neuron switched off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import relneuron
from relneuron.artifact.files import RelneuronError
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.values import token_vector, value_vector
from tests.conftest import tiny_model
from tests.kit.attributed import attributed_model
from tests.kit.experts import WIDTH, expert_model, zeroed

IDS = torch.tensor([[5, 17, 3, 60, 22, 41], [9, 9, 4, 31, 8, 2]])
DENSE = ("llama", "gemma2", "phi3", "olmo2", "gpt2")
MOE = ("qwen3", "mixtral", "deepseek", "gpt_oss", "llama4")


def make(family: str) -> Any:
    if family == "gpt2":
        return attributed_model("gpt2")
    moe = family.removesuffix("-moe")
    return tiny_model(family) if moe == family else expert_model(moe)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(IDS).logits)


@pytest.mark.parametrize("family", [*DENSE, *(f"{name}-moe" for name in MOE)])
def test_an_erased_vector_is_a_neuron_switched_off(family: str) -> None:
    model = make(family)
    mlps = find_mlps(model)
    width = model_shape(mlps)["width"]
    neurons = [(0, "gate", i) for i in range(0, width, 3)]
    neurons += [(1, "gate", i) for i in range(1, width, 5)]
    clean = logits(model)
    with relneuron.ablate(model, neurons):
        off = logits(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for layer, _, index in neurons:
            value_vector(mlps, layer, index).zero_()
    assert (logits(model) - off).abs().max() <= 1e-5 < (off - clean).abs().max()
    # As many numbers are zero as the vectors have, and no other changed.
    changed = sum(int((p != before[name]).sum()) for name, p in model.named_parameters())
    hidden = model_shape(mlps)["hidden"]
    assert 0.99 * len(neurons) * hidden <= changed <= len(neurons) * hidden


def test_a_vector_is_a_column_by_the_familys_own_name() -> None:
    llama, gpt2 = tiny_model("llama"), attributed_model("gpt2")
    own = llama.model.layers[1].mlp.down_proj.weight
    assert torch.equal(value_vector(find_mlps(llama), 1, 7), own[:, 7])
    assert torch.equal(
        value_vector(find_mlps(gpt2), 2, 9), gpt2.transformer.h[2].mlp.c_proj.weight[9]
    )


@pytest.mark.parametrize("family", MOE)
def test_a_vector_of_an_expert_is_its_column(family: str) -> None:
    model = expert_model(family)
    mlps = find_mlps(model)
    neurons = [(0, "gate", 5), (1, "gate", 2 * WIDTH + 7)]
    wanted = dict(zeroed(family, model, neurons).named_parameters())
    with torch.no_grad():
        for layer, _, index in neurons:
            value_vector(mlps, layer, index).zero_()
    assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())


def test_what_is_no_column_is_refused() -> None:
    model = tiny_model("llama")
    mlps: list[Part] = find_mlps(model)
    with pytest.raises(RelneuronError, match="layer 1 has no neuron 48"):
        value_vector(mlps, 1, 48)
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_hook(lambda _m, args, out: out + args[0][..., :32])
    with pytest.raises(RelneuronError, match="down is more than its weight"):
        value_vector(mlps, 1, 7)
    handle.remove()
    value_vector(mlps, 1, 7)
    model.model.layers[0].mlp.down_proj.weight = down.weight
    with pytest.raises(RelneuronError, match="shares its down with"):
        value_vector(mlps, 1, 7)
    model.model.layers[0].mlp.down_proj.weight = nn.Parameter(down.weight.clone())
    down.weight = nn.Parameter(down.weight.to("meta"))
    with pytest.raises(RelneuronError, match="offloaded"):
        value_vector(mlps, 1, 7)


def test_embeddings_of_both_ends() -> None:
    model = tiny_model("llama")
    assert torch.equal(token_vector(model, 5, "output"), model.lm_head.weight[5])
    assert torch.equal(token_vector(model, 5, "input"), model.model.embed_tokens.weight[5])
    model.lm_head = nn.Identity()
    with pytest.raises(RelneuronError, match="no output embedding whose rows can be read"):
        token_vector(model, 5, "output")
