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
from tests.conftest import tiny_model

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


@pytest.mark.parametrize("limit", [7.0, 30.0])
def test_a_clamp_of_large_numbers_is_another_formula(limit: float) -> None:
    llama = tiny_model("llama", initializer_range=0.2)
    module = find_gated_mlps(llama)[1].module

    def clamped(x: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_proj(x).clamp(max=limit), module.up_proj(x).clamp(-limit, limit)
        return module.down_proj(torch.nn.functional.silu(gate) * up)

    module.forward = clamped  # type: ignore[operator]
    assert "is not down" in inspect_layers(llama)[1].reason


def test_a_vision_tower_is_not_taken_for_the_language_model() -> None:
    """It has as many layers, and more parameters."""
    import transformers

    text = _SMALL | {"num_key_value_heads": 2, "head_dim": 8}
    tower = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=tower, mm_tokens_per_image=4, image_token_id=9
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    towers, layers = (
        sum(p.numel() for p in part.parameters())
        for part in (model.model.vision_tower, model.model.language_model.layers)
    )
    assert towers > layers
    mlps = find_gated_mlps(model)
    assert [mlp.path for mlp in mlps] == [f"model.language_model.layers.{i}.mlp" for i in range(2)]


def test_numbers_past_the_range_of_a_dtype_are_no_other_formula() -> None:
    llama = tiny_model("llama", torch.float16, initializer_range=1.0)
    module = find_gated_mlps(llama)[0].module
    x = 100 * torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0)).half()
    assert not module(x).isfinite().all()


def test_train_mode_and_weights_that_cannot_be_called_are_refused(llama: Any) -> None:
    assert "train mode" in inspect_layers(llama.train())[0].reason
    llama.eval()
    gate = llama.model.layers[0].mlp.gate_proj
    weight = gate.weight
    gate.weight = nn.Parameter(weight.data.char(), requires_grad=False)
    with pytest.raises(RelneuronError, match="the quantised model cannot run one token"):
        inspect_layers(llama)
    gate.weight = weight
    llama.model.layers[1].mlp.to("meta")
    assert "not in memory (on the meta device)" in inspect_layers(llama)[1].reason


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
