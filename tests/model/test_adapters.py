"""An adapter's rows and the model's own share one forward, and are those of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.model.adapters import is_adapter, load_adapter
from relneuron.model.ask import cache_of
from relneuron.testing import assert_accurate
from tests.conftest import tiny_model
from tests.kit.pairs import ADAPTERS, peft_model, save_adapter

IDS = torch.randint(3, 96, (4, 11), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.fixture(scope="module", params=(*ADAPTERS, "dora"))
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with an adapter of ours, and the same two as peft has them."""
    folder = tmp_path_factory.mktemp(request.param)
    save_adapter(request.param, folder)
    model = tiny_model("llama")
    adapter = load_adapter(model, str(folder))
    return model, adapter, peft_model(folder)


@pytest.mark.parametrize(
    "own", [[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
)
def test_rows_of_one_forward_are_those_of_two(adapted: Any, own: list[int]) -> None:
    """Of the same number of rows: A's bit for bit, B's within the rounding of peft's own forward.

    The products of the model's weights are those of as many rows in all three.
    """
    model, adapter, peft = adapted
    mask = torch.tensor(own, dtype=torch.bool)
    with adapter.rows(mask):
        both = logits(model)
    plain, changed = logits(tiny_model("llama")), logits(peft)
    assert torch.equal(both[~mask], plain[~mask])
    assert (changed - plain).abs().max() > 1e-3
    assert_accurate(both[mask], exact(peft)[mask], changed[mask])


def exact(peft: Any) -> Tensor:
    """The logits of peft's model in float64."""
    from copy import deepcopy

    return logits(deepcopy(peft).double())


def test_all_rows_and_none_are_the_models_themselves(adapted: Any) -> None:
    model, adapter, peft = adapted
    plain = logits(tiny_model("llama"))
    assert torch.equal(logits(model), plain)  # off outside of a context
    with adapter.rows(True):
        assert torch.equal(logits(model), logits(peft))
        with adapter.rows(False):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), logits(peft))
    with pytest.raises(KeyError), adapter.rows(True):
        raise KeyError
    assert torch.equal(logits(model), plain)


def test_weights_are_read_once_for_both(adapted: Any) -> None:
    """The layer beneath an adapter runs once in a forward, over all rows."""
    model, adapter, _ = adapted
    layers = [m for m in model.modules() if hasattr(m, "base_layer")]
    seen: list[tuple[int, int]] = []
    for number, layer in enumerate(layers):
        plain = type(layer.base_layer).forward

        def count(x: Tensor, number: int = number, plain: Any = plain) -> Any:
            seen.append((number, len(x)))
            return plain(layers[number].base_layer, x)

        layer.base_layer.__dict__["forward"] = count
    try:
        with adapter.rows(torch.tensor([False, True, True, False])):
            logits(model)
    finally:
        for layer in layers:
            del layer.base_layer.__dict__["forward"]
    assert sorted(seen) == [(number, 4) for number in range(len(layers))]


def test_a_cache_keeps_the_rows_apart(adapted: Any) -> None:
    """Greedy steps with keys and values: each row as its model alone writes it."""
    model, adapter, peft = adapted

    def write(model: Any, ids: Tensor) -> Tensor:
        cache: dict[str, Any] = {}
        for _ in range(6):
            with torch.no_grad():
                out = model(input_ids=ids[:, -1:] if cache else ids, use_cache=True, **cache)
            cache, ids = cache_of(out), torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
        return ids

    with adapter.rows(torch.tensor([False, True, False, True])):
        both = write(model, IDS)
    assert torch.equal(both[::2], write(tiny_model("llama"), IDS[::2]))
    assert torch.equal(both[1::2], write(peft, IDS[1::2]))


def test_a_batch_of_other_rows_is_refused(adapted: Any) -> None:
    model, adapter, _ = adapted
    with (
        adapter.rows(torch.tensor([True, False])),
        pytest.raises(RelneuronError, match="reads 4 rows of a batch of 2"),
    ):
        logits(model)
    assert torch.equal(logits(model), logits(tiny_model("llama")))


# --- what is more than an adapter of layers --------------------------------------------------


def refused(folder: Path) -> str:
    with pytest.raises(RelneuronError) as error:
        load_adapter(tiny_model("llama"), str(folder))
    assert "give FOLDER" in error.value.fix or "trained on" in error.value.fix
    return error.value.cause.replace(str(folder), "F")


def test_what_changes_the_model_itself_is_refused(tmp_path: Path) -> None:
    """Then A's rows would not be A."""
    from peft import LoraConfig, PromptTuningConfig

    lora = {"target_modules": ["q_proj"], "r": 2}
    whole = LoraConfig(**lora, modules_to_save=["lm_head"])
    assert "also replaces lm_head" in refused(save_adapter(whole, tmp_path / "whole"))
    pissa = LoraConfig(**lora, init_lora_weights="pissa")
    said = refused(save_adapter(pissa, tmp_path / "pissa"))
    assert said == "F also changes the model's own weights"
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    said = refused(save_adapter(virtual, tmp_path / "virtual"))
    assert said == "F is an adapter of the kind PROMPT_TUNING, not LoRA or (IA)3"


def test_trained_biases_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(target_modules=["q_proj"], r=2, bias="all")
    model = tiny_model("qwen2")
    save_adapter(config, tmp_path, model=model)
    with pytest.raises(RelneuronError, match="also changes the model's own weights"):
        load_adapter(tiny_model("qwen2"), str(tmp_path))


def test_an_adapter_of_another_model_and_a_damaged_one(tmp_path: Path) -> None:
    save_adapter("lora", tmp_path)
    with pytest.raises(RelneuronError, match="could not be put into the model: ") as error:
        load_adapter(tiny_model("llama", hidden_size=64), str(tmp_path))
    assert error.value.fix.startswith("give the model that it was trained on")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert "F could not be put into the model" in refused(tmp_path)


def test_which_folders_are_adapters(tmp_path: Path) -> None:
    assert not is_adapter("no-such/model")
    save_adapter("ia3", tmp_path)
    assert is_adapter(str(tmp_path))
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["peft_type"] == "IA3"
    (tmp_path / "config.json").write_text("{}")  # a model that also holds an adapter
    assert not is_adapter(str(tmp_path))
