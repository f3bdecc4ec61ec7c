"""Every weight, buffer, option and token rule is in a digest; where and how they lie is not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import relneuron.model.identity
from relneuron.artifact.files import RelneuronError
from relneuron.model.identity import held, model_digest, other_weights, tokenizer_digest
from tests.conftest import tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_changed_bit_of_any_tensor_is_another_model(family: str, dtype: torch.dtype) -> None:
    model, rng = tiny_model(family, dtype), random.Random(0)
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    assert len(tensors) > len(model.state_dict())  # buffers that are not saved
    before = {model_digest(model)}
    for number, value in enumerate(tensors.values(), 1):
        flat = value.detach().reshape(-1).view(torch.uint8)
        flat[rng.randrange(len(flat))] ^= 1 << rng.randrange(8)
        before.add(model_digest(model))
        assert len(before) == number + 1


def test_a_column_between_samples_counts() -> None:
    """A sample of every so many numbers lines up with rows: of these it saw each 64th column."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 64, "intermediate_size": 4096, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_attention_heads=4, **size))
    before = model_digest(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 1] = 0
    assert model_digest(model) != before


def test_a_digest_is_that_of_values_and_not_of_how_they_lie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = model_digest(tiny_model("llama"))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert model_digest(tiny_model("llama")) == before
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.data.t().contiguous().t())
    assert not mlp.up_proj.weight.is_contiguous() and model_digest(model) == before
    with torch.no_grad():
        mlp.up_proj.weight.copy_(mlp.up_proj.weight.clone().reshape(32, 48).t())
    assert model_digest(model) != before


@pytest.mark.parametrize("chunk", [1, 1000])
def test_chunks_have_all_rows(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relneuron.model.identity, "CHUNK_BYTES", chunk)
    model = tiny_model("llama")
    before, found = model_digest(model), set()
    weight = model.model.layers[0].mlp.down_proj.weight
    for row in range(len(weight)):
        with torch.no_grad():
            weight[row, -1] += 1
        found.add(model_digest(model))
    assert len(found) == len(weight) and before not in found


def test_tied_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    true = relneuron.model.identity._hash_rows
    monkeypatch.setattr(
        relneuron.model.identity,
        "_hash_rows",
        lambda name, *rest: (read.append(name), true(name, *rest))[1],
    )
    model_digest(tiny_model("llama", tie_word_embeddings=True))
    assert "lm_head.weight" in read and "model.embed_tokens.weight" not in read


def test_what_decides_results_beside_the_weights() -> None:
    model = tiny_model("llama")
    seen = {model_digest(model)}
    changes: list[Callable[[], object]] = [
        lambda: setattr(model.config, "rms_norm_eps", 0.1),
        lambda: setattr(model.generation_config, "eos_token_id", 7),
        lambda: model.register_buffer("extra", torch.ones(0)),
        # As the layers of an adapter, of which some are on.
        lambda: vars(model.lm_head).update(active_adapters=["a"], scaling={"a": 2.0}),
        lambda: vars(model.lm_head).update(scaling={"a": 1.0}),
    ]
    for number, change in enumerate(changes, 2):
        change()
        seen.add(model_digest(model))
        assert len(seen) == number
    model.config.name_or_path = "elsewhere"
    assert model_digest(model) in seen


def test_weights_that_are_not_in_memory_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(RelneuronError, match=r"layers\.1\.mlp\..* not in memory"):
        model_digest(model)


def test_a_held_model_is_hashed_once() -> None:
    model = tiny_model("llama")
    with held(model, "known"):
        assert model_digest(model) == "known"
    assert model_digest(model) not in ("known", "")


def test_other_weights_are_named_with_their_dtype() -> None:
    ours = {"id": "m", "digest": "a", "dtype": "bfloat16"}
    assert other_weights("n", {}, ours) == other_weights("n", ours, ours) == []
    theirs = {"id": "base", "digest": "b", "dtype": "float32"}
    (notice,) = other_weights("n.json: neurons", theirs, ours)
    assert notice == (
        "n.json: neurons of other weights: found in base as float32, used in m as bfloat16"
    )


def tokenizer_changes() -> dict[str, Callable[[Any], object]]:
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    def merges(tokenizer: Any) -> None:
        vocabulary = tokenizer.backend_tokenizer.get_vocab()
        tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[])

    def backend(name: str, value: Any) -> Callable[[Any], object]:
        return lambda tokenizer: setattr(tokenizer.backend_tokenizer, name, value)

    return {
        "merges": merges,
        "normalizer": backend("normalizer", normalizers.NFC()),
        "pre_tokenizer": backend("pre_tokenizer", pre_tokenizers.Whitespace()),
        "post_processor": backend("post_processor", processors.ByteLevel()),
        "decoder": backend("decoder", decoders.WordPiece()),
        "an added token": lambda tokenizer: tokenizer.add_tokens(["Rome"]),
        "a special token": lambda tokenizer: setattr(tokenizer, "eos_token", "a"),
        "chat_template": lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        "clean_up": lambda tokenizer: setattr(
            tokenizer,
            "clean_up_tokenization_spaces",
            not tokenizer.clean_up_tokenization_spaces,
        ),
    }


@pytest.mark.parametrize("change", tokenizer_changes())
def test_every_rule_of_a_tokenizer_counts(model_folder: Path, change: str) -> None:
    from relneuron.model.load import load_tokenizer

    tokenizer = load_tokenizer(str(model_folder))
    before = tokenizer_digest(tokenizer)
    tokenizer_changes()[change](tokenizer)
    assert tokenizer_digest(tokenizer) != before


def test_how_a_tokenizer_was_used_last_does_not_count(model_folder: Path) -> None:
    from relneuron.model.load import load_tokenizer

    tokenizer = load_tokenizer(str(model_folder))
    before = tokenizer_digest(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    padded = tokenizer_digest(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == padded != before
    assert tokenizer_digest(None) is None
    slow = [SimpleNamespace(get_vocab=lambda n=n: {"a": n}) for n in (1, 2)]
    assert len({*map(tokenizer_digest, slow)}) == 2
