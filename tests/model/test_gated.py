"""Which models are supported, and why others are not; what one is known by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.gated import find_gated_mlps, inspect_layers
from relneuron.model.load import describe_model
from relneuron.model.states import LayerState, mask_states

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("config", "extra", "reason"),
    [
        ("GPT2Config", {}, "no gated MLP"),
        ("GPTNeoXConfig", {}, "no gated MLP"),
        ("MixtralConfig", {"num_key_value_heads": 2, "num_local_experts": 2}, "mixture of experts"),
    ],
)
def test_unsupported_layers_say_why(config: str, extra: dict[str, int], reason: str) -> None:
    import transformers

    made = getattr(transformers, config)(**_SMALL, **extra)
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    assert [verdict.mlp for verdict in inspect_layers(model)] == [None, None]
    with pytest.raises(RelneuronError, match=reason) as caught:
        find_gated_mlps(model)
    assert "0 of 2 layers" in caught.value.cause


def test_an_mlp_with_another_formula_is_seen_by_the_self_check(llama: Any) -> None:
    module = find_gated_mlps(llama)[1].module
    module.forward = lambda x: 2 * type(module).forward(module, x)  # type: ignore[operator]
    verdicts = inspect_layers(llama)
    assert [verdict.mlp is None for verdict in verdicts] == [False, True, False]
    assert "is not down" in verdicts[1].reason


def test_train_mode_quantised_and_offloaded_are_refused(llama: Any) -> None:
    assert "train mode" in inspect_layers(llama.train())[0].reason
    llama.eval()
    weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    llama.model.layers[0].mlp.gate_proj.weight = weight
    assert "quantised" in inspect_layers(llama)[0].reason
    llama.model.layers[1].mlp.to("meta")
    assert "offloaded" in inspect_layers(llama)[1].reason


def test_states_without_neurons_have_no_masks(llama: Any) -> None:
    mlps = find_gated_mlps(llama)
    assert mask_states([[]], mlps) == [LayerState()] * 3


def test_another_weight_or_config_is_another_model(llama: Any) -> None:
    def digest() -> object:
        return describe_model("any name", llama, find_gated_mlps(llama), "auto")["digest"]

    before = digest()
    llama.config.name_or_path = "elsewhere"
    assert digest() == before
    llama.config.rms_norm_eps *= 10
    assert (other := digest()) != before
    with torch.no_grad():
        llama.model.norm.weight[0] += 1
    assert digest() not in (before, other)
