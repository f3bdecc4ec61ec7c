"""A trace against the model's own hidden states and attentions, its batch, and what it leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.stream.read import read_residual_model
from relneuron.model.stream.trace import Trace, eager_attention, trace
from tests.conftest import tiny_model
from tests.kit.attributed import FAMILIES, HEAD_DIM, N_HEADS, attributed_model, scale_of, sentences

PARTS = ("h", "r", "attention", "ffn", "neurons", "values")


def layers_of(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def parts_of(layer: Any) -> tuple[Any, Any, Any, Any]:
    """norm, attention, norm, MLP of a decoder layer."""
    if hasattr(layer, "ln_1"):
        return layer.ln_1, layer.attn, layer.ln_2, layer.mlp
    return layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_holds_what_the_model_computed(family: str) -> None:
    model = attributed_model(family)
    ids = sentences([6])
    found = trace(read_residual_model(model), ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        own = model(
            torch.tensor(ids), output_hidden_states=True, output_attentions=True, use_cache=False
        )
        for i, layer in enumerate(layers_of(model)):
            norm_1, attention, norm_2, mlp = parts_of(layer)
            assert torch.equal(found.h[i], own.hidden_states[i])
            assert torch.equal(found.weights[i], own.attentions[i][:, :, -1])
            x = norm_1(found.h[i])
            if family == "gpt2":
                values = attention.c_attn(x).chunk(3, -1)[2].reshape(1, 6, N_HEADS, HEAD_DIM)
                neurons = mlp.act(mlp.c_fc(norm_2(found.r[i])))
            else:
                values = attention.v_proj(x).reshape(1, 6, N_HEADS // 2, HEAD_DIM)
                values = values.repeat_interleave(2, dim=2)
                x = norm_2(found.r[i])
                neurons = nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
            torch.testing.assert_close(found.values[i], values)
            torch.testing.assert_close(found.neurons[i], neurons)
            torch.testing.assert_close(found.ffn[i], mlp(norm_2(found.r[i])))
            torch.testing.assert_close(found.attention[i], found.r[i] - found.h[i])
            heads = torch.einsum("ejp,epjk->ejk", own.attentions[i][:, :, -1], values)
            summed = found.coefficients(i).sum(1)
            torch.testing.assert_close(summed, heads.flatten(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logits, own.logits[:, -1])
    torch.testing.assert_close(found.scale.double(), scale_of(model, found.h[-1][:, -1]))
    assert len(found.h) == len(own.hidden_states)
    assert found.n_pad.tolist() == [0] and bool(found.mask.all())


def unpadded(found: Trace, name: str, layer: int, row: int) -> Tensor:
    n_pad = int(found.n_pad[row])
    part = getattr(found, name)[layer][row]
    return part[:, n_pad:] if name == "weights" else part[n_pad:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sentence_does_not_depend_on_its_batch(family: str, dtype: torch.dtype) -> None:
    residual = read_residual_model(attributed_model(family, dtype))
    lines = sentences([5, 9, 1, 5, 3])
    together = trace(residual, lines)
    assert together.n_pad.tolist() == [4, 0, 8, 4, 6]
    assert together.mask.sum(1).tolist() == [5, 9, 1, 5, 3] and bool(together.mask[:, -1].all())
    atol = 1e-5 if dtype == torch.float32 else 1e-6  # norms and softmax round to float32 in both
    for row, line in enumerate(lines):
        alone = trace(residual, [line])
        for name in (*PARTS, "weights"):
            assert len(getattr(together, name)) == len(getattr(alone, name))
            for layer, part in enumerate(getattr(alone, name)):
                ours = unpadded(together, name, layer, row)
                assert ours.dtype == part.dtype == dtype
                torch.testing.assert_close(ours, part[0], rtol=0, atol=atol * 10)
        for i in range(3):
            padding = together.weights[i][row, :, : int(together.n_pad[row])]
            assert not padding.any()
            sums = together.weights[i][row].sum(1)
            torch.testing.assert_close(sums, torch.ones_like(sums))
        torch.testing.assert_close(together.logits[row], alone.logits[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(together.scale[row], alone.scale[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tensors_are_taken_as_they_are(family: str, dtype: torch.dtype) -> None:
    residual = read_residual_model(attributed_model(family, dtype))
    found = trace(residual, sentences())
    for name in (*PARTS, "weights"):
        assert {part.dtype for part in getattr(found, name)} == {dtype}
    assert found.logits.dtype == residual.unembed.dtype == torch.float32
    assert found.scale.dtype == torch.float64
    want = found.weights[0].double().transpose(1, 2).unsqueeze(-1) * found.values[0].double()
    product = found.coefficients(0)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product.double(), want.flatten(2), rtol=1e-6, atol=1e-12)


def state_of(model: Any) -> list[object]:
    """What a trace could leave behind: hooks, an own forward, the attention implementation."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
        for m in model.modules()
    ]
    return [model.config._attn_implementation, *hooks]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_stays_in_the_model(family: str, implementation: str) -> None:
    model = attributed_model(family)
    model.set_attn_implementation(implementation)
    before = state_of(model)
    assert before[0] == implementation
    residual = read_residual_model(model)
    trace(residual, sentences())
    assert state_of(model) == before

    def explode(*_: object) -> None:
        raise KeyboardInterrupt

    handle = residual.layers[1].down.register_forward_pre_hook(explode)
    with pytest.raises(KeyboardInterrupt):
        trace(residual, sentences())
    handle.remove()
    assert state_of(model) == before


def test_every_config_of_the_model_gets_its_own_implementation_back() -> None:
    model = attributed_model("llama")
    other = attributed_model("llama")
    other.set_attn_implementation("eager")
    model.side = other  # a second sub-model with a config of its own
    with pytest.raises(RuntimeError), eager_attention(model):
        assert model.config._attn_implementation == other.config._attn_implementation == "eager"
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"
    assert other.config._attn_implementation == "eager"


def test_sliding_windows_stay_in_force() -> None:
    model = tiny_model("mistral", sliding_window=4)
    found = trace(read_residual_model(model), sentences([9, 3]))
    assert not found.weights[0][0, :, :5].any()
    assert bool((found.weights[0][0, :, 5:] > 0).all())


@pytest.mark.parametrize("ids", [[], [[3, 4], []]])
def test_sentences_without_tokens_are_refused(ids: list[list[int]]) -> None:
    residual = read_residual_model(attributed_model("llama"))
    with pytest.raises(RelneuronError, match="without a token"):
        trace(residual, ids)


def test_attention_without_weights_is_refused() -> None:
    model = attributed_model("llama")
    residual = read_residual_model(model)
    module = model.model.layers[1].self_attn
    own = module.forward
    module.forward = lambda *args, **kwargs: (own(*args, **kwargs)[0], None)
    assert read_residual_model(model).no_heads == "layer 1: its attention gives no weights"
    with pytest.raises(RelneuronError, match="no attention weights"):
        trace(residual, sentences())
