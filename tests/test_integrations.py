"""Tests of examples/: the op in a Hugging Face loop, in TransformerLens and in nnsight.

Counts must be equal to those of plain forward hooks and torch. The two libraries are not needed
to develop relneuron: their tests run where the extra `integrations` is installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from relneuron import ops
from relneuron.testing import assert_same_bits
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"
# Warnings of other libraries are theirs.
pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS, F, G = 2, 70, 3


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=F,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def tokens() -> Tensor:
    return torch.randint(3, 96, (4, 11), generator=torch.Generator().manual_seed(1))


def groups() -> Tensor:
    return torch.randint(-1, G, (4, 11), generator=torch.Generator().manual_seed(2)).int()


class Hooks:
    """The gates that an MLP computes, by a plain forward hook."""

    def __init__(self, mlps: list[Any]) -> None:
        self.gates: list[list[Tensor]] = [[] for _ in mlps]
        for layer, mlp in enumerate(mlps):
            mlp.gate_proj.register_forward_hook(
                lambda module, args, output, at=layer: self.gates[at].append(output.detach())
            )

    def counts(self, layer: int, batch: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Active neurons (G, F) and tokens (G,) by torch alone."""
        active = (nnf.silu(self.gates[layer][batch]) > 0).flatten(0, -2)
        flat = ids.flatten()
        count = torch.stack([active[flat == group].sum(0) for group in range(G)])
        return count, torch.stack([(flat == group).sum() for group in range(G)])


def drop(*neurons: int) -> Tensor:
    """A mask of `keep` with these neurons off."""
    on = torch.ones((F + 31) // 32 * 32, dtype=torch.int64)
    on[list(neurons)] = 0
    return (on.view(-1, 32) << torch.arange(32)).sum(1).to(torch.int32).view(1, -1)


DROPPED = [0, 31, 32, 69]  # of layer 0


def with_zeros(llama: Any) -> Tensor:
    """The logits when a hook sets the dropped inputs of down_proj to zero."""

    def zero(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        h = args[0].clone()
        h[..., DROPPED] = 0
        return (h,)

    handle = llama.model.layers[0].mlp.down_proj.register_forward_pre_hook(zero)
    with torch.no_grad():
        logits: Tensor = llama(tokens()).logits
    handle.remove()
    return logits


def check(run: Any, model: Any, mlps: list[Any], plain: Tensor, dark: Tensor) -> None:
    """Counts are those of hooks, logits those of the model without and with neurons at zero."""
    hooks = Hooks(mlps)
    stats = [ops.GroupStats(groups=G, width=F) for _ in range(LAYERS)]
    for number, (keep, expected) in enumerate(((None, plain), ([drop(*DROPPED), None], dark))):
        before = [s.to("cpu") for s in stats]
        torch.testing.assert_close(
            run(model, tokens(), stats, groups().flatten(), keep), expected, rtol=1e-4, atol=1e-6
        )
        for layer in range(LAYERS):
            count, n_tokens = hooks.counts(layer, number, groups())
            assert_same_bits(stats[layer].count["act"], before[layer].count["act"] + count)
            assert_same_bits(stats[layer].tokens, before[layer].tokens + n_tokens)
            assert count.sum() > 0
    assert float((plain - dark).abs().max()) > 1e-3


def test_hugging_face_loop(llama: Any) -> None:
    plain = llama(tokens()).logits
    mlps = [layer.mlp for layer in llama.model.layers]
    attention_mask = torch.ones(4, 11, dtype=torch.int64)
    attention_mask[1, 7:] = attention_mask[3, :2] = 0
    batches = [
        ({"input_ids": (tokens() + shift) % 96, "attention_mask": attention_mask}, language)
        for shift, language in ((0, 0), (5, 2), (9, 0))
    ]
    hooks = Hooks(mlps)
    counts = example("hf_loop").count_active(llama, batches, G)
    for layer, stats in enumerate(counts):
        expected, expected_tokens = torch.zeros(G, F, dtype=torch.int64), torch.zeros(G).long()
        for batch, (_, language) in enumerate(batches):
            ids = torch.where(attention_mask == 0, -1, language)
            count, n_tokens = hooks.counts(layer, batch, ids)
            expected += count
            expected_tokens += n_tokens
        assert_same_bits(stats.count["act"], expected)
        assert_same_bits(stats.tokens, expected_tokens)
        assert expected.sum() > 0
    assert_same_bits(llama(tokens()).logits, plain, "logits after the loop")
    assert not any("forward" in mlp.__dict__ for mlp in mlps)


def test_transformer_lens(llama: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformer_lens")
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    # A bridge wants a tokenizer; one made here spares a download.
    words = Tokenizer(models.WordLevel({str(i): i for i in range(96)}, unk_token="0"))
    special = {"unk_token": "0", "bos_token": "1", "eos_token": "2", "pad_token": "0"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, name_or_path=str(tmp_path), **special
    )
    tokenizer.save_pretrained(tmp_path)  # the bridge loads it once more from there
    with torch.no_grad():
        plain = llama(tokens()).logits
    dark = with_zeros(llama)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), hf_model=llama, tokenizer=tokenizer)
    mlps = [block.mlp._original_component for block in bridge.blocks]
    run = example("transformer_lens_hooks").run_with_neurons
    check(run, bridge, mlps, plain, dark)


def test_nnsight(llama: Any) -> None:
    nnsight = pytest.importorskip("nnsight")
    with torch.no_grad():
        plain = llama(tokens()).logits
    dark = with_zeros(llama)
    mlps = [layer.mlp for layer in llama.model.layers]
    check(example("nnsight_trace").run_with_neurons, nnsight.NNsight(llama), mlps, plain, dark)
