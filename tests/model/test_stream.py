"""Residual models: which families add up, their vectors and keys, and why others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.stream.norms import read_norm
from relneuron.model.stream.read import read_residual_model
from relneuron.model.stream.trace import trace
from tests.conftest import tiny_model
from tests.kit.attributed import (
    FAMILIES,
    HIDDEN,
    N_LAYERS,
    VOCABULARY,
    WIDTH,
    attributed_model,
    sentences,
    weights_of,
)

_SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def other_model(config: str, **changes: Any) -> Any:
    """A tiny model of another family, biases and gains not at their first values."""
    import transformers

    made = getattr(transformers, config)(**_SMALL | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.4, 1.4)
    return model


def why_refused(model: Any) -> str:
    with pytest.raises(RelneuronError, match="cannot be attributed") as caught:
        read_residual_model(model)
    assert "\n" not in caught.value.cause + caught.value.fix
    return caught.value.cause


def assert_logits_follow(model: Any) -> None:
    """scale * y @ unembed.T + offset gives the logits that the model itself gives."""
    residual = read_residual_model(model)
    ids = sentences([5, 5])
    found = trace(residual, ids)
    logits = found.scale[:, None] * (found.h[-1][:, -1].to(residual.unembed) @ residual.unembed.T)
    if residual.offset is not None:
        logits = logits + residual.offset
    if residual.cap is not None:
        logits = residual.cap * torch.tanh(logits / residual.cap)
    with torch.no_grad():
        own = model(torch.tensor(ids)).logits[:, -1].float()
    eps = torch.finfo(next(model.parameters()).dtype).eps
    torch.testing.assert_close(logits.float(), own, rtol=0, atol=32 * max(eps, 1e-7) * 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_kinds_of_models_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    model = attributed_model(family, dtype)
    assert_logits_follow(model)
    residual = read_residual_model(model)
    assert residual.shape == {"layers": N_LAYERS, "width": WIDTH, "hidden": HIDDEN}
    assert (residual.n_heads, residual.head_dim, residual.vocabulary) == (4, 8, VOCABULARY)
    heads = residual.layers[0].heads
    assert residual.no_heads is None and heads is not None
    assert len(set(heads.value.rows.starts)) == (2 if family == "llama" else 4)
    assert residual.is_gated == (family == "llama")
    assert residual.centred == (family == "gpt2") and residual.eps == 1e-5
    assert (residual.offset is not None) == (family == "gpt2")
    assert residual.unembed.dtype == (dtype if dtype == torch.float64 else torch.float32)


SANDWICHED = ("gemma2", "gemma3", "glm4", "olmo2")
BESIDE = ("mistral", "qwen2", "qwen3", "phi3", "granite")


@pytest.mark.parametrize("family", [*BESIDE, *SANDWICHED])
def test_gated_families_add_up(family: str) -> None:
    assert_logits_follow(tiny_model(family, initializer_range=0.2))


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("GemmaConfig", {"num_key_value_heads": 1, "head_dim": 16}),
        ("Starcoder2Config", {"num_key_value_heads": 2}),
        ("StableLmConfig", {"num_key_value_heads": 2}),
        ("GPTBigCodeConfig", {}),
        ("SmolLM3Config", {"num_key_value_heads": 2}),
        ("GPTBigCodeConfig", {"multi_query": False}),
        ("GPTNeoXConfig", {}),
        ("GPTNeoXConfig", {"use_parallel_residual": False}),
        ("CohereConfig", {"logit_scale": 0.0625}),
        ("OlmoConfig", {}),
        ("StableLmConfig", {"use_parallel_residual": True, "num_key_value_heads": 2}),
        ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("BloomConfig", {"n_layer": 2, "n_head": 4}),
        ("FalconConfig", {}),
        ("PhiConfig", {}),
        ("NemotronConfig", {"head_dim": 8, "num_key_value_heads": 2}),
    ],
)
def test_other_families_with_such_layers_add_up(config: str, changes: dict[str, Any]) -> None:
    model = other_model(config, **changes)
    assert_logits_follow(model)
    assert read_residual_model(model).no_heads is None


@pytest.mark.parametrize("family", FAMILIES)
def test_value_vectors_are_views_and_keys_carry_the_gain(family: str) -> None:
    model = attributed_model(family)
    residual = read_residual_model(model)
    generator = torch.Generator().manual_seed(0)
    for layer, weights in zip(residual.layers, weights_of(model), strict=True):
        assert torch.equal(layer.ffn_values().double(), weights.w_down)
        assert torch.equal(layer.attention_values().double(), weights.w_out)
        for view, module in (
            (layer.ffn_values(), layer.down),
            (layer.attention_values(), layer.out),
        ):
            assert view.data_ptr() == module.weight.data_ptr()
        index = torch.randint(0, HIDDEN, (40,), generator=generator)
        wanted = {
            "gate": (weights.gate, weights.ffn_gain),
            "up": (weights.up, weights.ffn_gain),
            "down": (weights.w_down, weights.ffn_gain),
            "attention": (weights.w_value, weights.attention_gain),
        }
        for key, (rows, gain) in wanted.items():
            ours = layer.attention_keys(index) if key == "attention" else layer.ffn_keys(key, index)
            want = rows[index] * gain
            if family == "gpt2":
                want = want - want.mean(1, keepdim=True)
            assert ours.dtype == torch.float64
            torch.testing.assert_close(ours, want, rtol=0, atol=1e-12)


def test_tied_embeddings_work() -> None:
    model = tiny_model("llama", tie_word_embeddings=True, initializer_range=0.2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_logits_follow(model)


def test_a_gain_of_one_plus_weight_is_told_by_numbers() -> None:
    model = other_model("GemmaConfig", num_key_value_heads=2, head_dim=8)
    residual = read_residual_model(model)
    assert torch.equal(residual.final_norm.gain, 1 + model.model.norm.weight)
    want = model.lm_head.weight.double() * (1 + model.model.norm.weight.double())
    torch.testing.assert_close(residual.unembed.double(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gains_do_not_hide_the_one_that_is_added(dtype: torch.dtype) -> None:
    for config, added in (("GemmaConfig", 1), ("LlamaConfig", 0)):
        model = other_model(config, num_key_value_heads=2, head_dim=8).to(dtype)
        with torch.no_grad():
            model.model.norm.weight.uniform_(4, 60)
        gain = read_residual_model(model).final_norm.gain
        assert torch.equal(gain.float(), model.model.norm.weight.float() + added)


def test_the_eps_is_the_models_own() -> None:
    model = other_model("LlamaConfig", rms_norm_eps=0.03)
    assert read_residual_model(model).eps == 0.03
    model.model.norm.forward = type(model.model.norm).forward.__get__(model.model.norm)
    model.model.norm.eps, model.model.norm.variance_epsilon = 0.03, 0.2
    assert read_residual_model(model).eps == 0.2
    del model.model.norm.forward
    own = model.model.norm.forward
    model.model.norm.forward = lambda x: own(3 * x)  # as if its eps were a ninth of what it says
    assert "neither an RMSNorm nor a LayerNorm" in why_refused(model)


# --- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        ("BertConfig", {"is_decoder": True}, "layer 0: a norm at its end scales the whole stream"),
        ("MambaConfig", {}, "layer 0: no MLP down(activation"),
        ("GPTNeoXJapaneseConfig", {}, "layer 1: what is added before its MLP is not what one"),
        ("RobertaPreLayerNormConfig", {"is_decoder": True}, "its logits are not"),
    ],
)
def test_other_architectures(config: str, changes: dict[str, Any], reason: str) -> None:
    assert reason in why_refused(other_model(config, **changes))


def test_a_model_that_is_another_one_with_eager_attention() -> None:
    """PaliGemma's mask of text is causal with sdpa, and is not with eager attention."""
    from bench.zoo import build

    assert "with eager attention, which gives the weights" in why_refused(
        build.build("image-text", "paligemma")
    )


class Hidden:
    """A factor that no config and no module names."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __rmul__(self, x: Tensor) -> Tensor:
        return x * self.factor

    def __rtruediv__(self, x: Tensor) -> Tensor:
        return x / self.factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_are_scaled_by_what_the_model_says(dtype: torch.dtype) -> None:
    """The stream is large beside what its layers write, so it hides a factor near 1."""
    for factor in (1.0, 0.8, 0.22):
        sizes = {"residual_multiplier": factor, "logits_scaling": 4.0}
        model = tiny_model("granite", dtype, **sizes)
        residual = read_residual_model(model)
        writes = [w for layer in residual.layers for w in (layer.attention, layer.ffn)]
        assert [write.factor for write in writes] == [factor] * 6
        want = model.lm_head.weight.float() * model.model.norm.weight.float() / 4
        assert torch.equal(residual.unembed, want)
        for layer in model.model.layers:
            layer.residual_multiplier = Hidden(factor)
        model.config.residual_multiplier = 1
        if factor < 1:
            assert "layer 0: the attention's write is scaled by 0." in why_refused(model)
            assert "and the MLP's write is scaled by 0." in why_refused(model)
        else:
            assert read_residual_model(model).layers[0].ffn.factor == 1


def test_a_stream_that_is_scaled_itself_is_named() -> None:
    model = attributed_model("llama")
    layer = model.model.layers[1]
    own = layer.forward
    layer.forward = lambda h, *args, **kwargs: own(h, *args, **kwargs) - 0.25 * h
    assert "layer 1: it scales the stream by 0.75 before it adds to it" in why_refused(model)


def explains(part: str) -> Any:
    """(how to break a Llama's layer 1 or head, the reason that is given)."""
    return {
        "mlp": ("layers.1.mlp", "layer 1: the MLP's write is scaled by 1.01 before it is added"),
        "down": ("layers.1.mlp.down_proj", "in layer 1 neurons @ value vectors + bias"),
        "attention": ("layers.1.self_attn.o_proj", "in layer 1 the sum of attention weight"),
        "value": ("layers.1.self_attn.v_proj", "in layer 1 value map @ norm(input)"),
        "gate": ("layers.1.mlp.gate_proj", "layer 1: what its MLP reads is not a linear map"),
    }[part]


@pytest.mark.parametrize("part", ["mlp", "down", "gate", "attention", "value"])
def test_a_part_with_another_formula_is_named(part: str) -> None:
    model = attributed_model("llama")
    path, reason = explains(part)
    module = model.model.get_submodule(path)
    own = module.forward
    module.forward = lambda x: own(x) * 1.01
    if part in ("attention", "value"):
        residual = read_residual_model(model)
        assert reason in str(residual.no_heads) and residual.n_heads == 0
        assert all(layer.heads is None for layer in residual.layers)
    else:
        assert reason in why_refused(model)


def test_changed_logits_are_refused() -> None:
    model = attributed_model("llama")
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: 2.0 * torch.tanh(own(x) / 2.0)
    assert "its logits are not" in why_refused(model)
    model = tiny_model("granite")
    model.config.__dict__["logits_scaling"] = Hidden(1.6)
    assert "its logits are its lm_head's times 0.625, a number that it" in why_refused(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_soft_cap_is_seen_however_small_the_logits_are(dtype: torch.dtype) -> None:
    for cap in (30.0, 7.5, None):
        model = tiny_model("gemma2", dtype, final_logit_softcapping=cap)
        with torch.no_grad():
            model.lm_head.weight.mul_(1e-2)
        assert read_residual_model(model).cap == cap


class DTensor(Tensor):
    """Has the name of torch's sharded tensors."""


class OnGpu(Tensor):
    """Says that it is elsewhere."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 1)


def test_weights_that_cannot_be_read() -> None:
    model = attributed_model("llama")
    weight = model.model.embed_tokens.weight
    for other, reason in (
        (nn.Parameter(weight.data.as_subclass(DTensor)), "embed_tokens.weight is sharded"),
        (nn.Parameter(weight.data.as_subclass(OnGpu)), "several devices (cpu, cuda:1)"),
        (nn.Parameter(weight.data.to("meta")), "embed_tokens.weight is offloaded"),
        (nn.Parameter(weight.data.to(torch.int8), requires_grad=False), "quantised (torch.int8)"),
    ):
        model.model.embed_tokens.weight = other
        assert reason in why_refused(model)
    model.model.embed_tokens.weight = weight
    read_residual_model(model)
    assert "train mode" in why_refused(model.train())


def test_a_model_without_its_parts() -> None:
    model = attributed_model("llama")
    model.model.layers = nn.Sequential(*model.model.layers).eval()
    assert "no list of 3 decoder layers" in why_refused(model)
    model = attributed_model("llama")
    down = model.model.layers[2].mlp.down_proj
    model.model.layers[2].mlp.down_proj = nn.Identity().eval()
    assert "a forward of 24 tokens fails: The size of tensor" in why_refused(model)
    model.model.layers[2].mlp.down_proj = down
    model.model.norm = nn.Identity().eval()
    assert "its final norm: Identity is neither" in why_refused(model)


@pytest.mark.parametrize("width", [32, 128, 768, 1024, 2048])
def test_a_layer_norm_of_any_width_is_read(width: int) -> None:
    """Numbers much smaller than the others are rounded by the others' mean."""
    norm = nn.LayerNorm(width)
    found = read_norm(norm, width, torch.ones(1))
    assert (found.centred, found.eps) == (True, 1e-5)
    rms = nn.RMSNorm(width, eps=1e-6)
    other = read_norm(rms, width, torch.ones(1))
    assert (other.centred, other.eps) == (False, 1e-6)
