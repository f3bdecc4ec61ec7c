"""Plans of models without weights: the bytes and places of the same models when they are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.memory import peak_bytes
from relneuron.model.counting import counting_state, tables
from relneuron.model.mlps.find import find_mlps
from relneuron.model.plan import memory_here, plan, read_memory
from relneuron.model.states import mask_states
from tests.conftest import tiny_model
from tests.kit import experts
from tests.kit.forked import Forked

GB = 10**9


def with_pictures() -> Any:
    import transformers as hf

    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    seen = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    seen |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = hf.Gemma3Config(text_config=text, vision_config=seen)
    return hf.AutoModelForImageTextToText.from_config(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_model("llama"),
    "half": lambda: tiny_model("llama", torch.bfloat16),
    "tied": lambda: tiny_model("llama", tie_word_embeddings=True),
    "packed": lambda: tiny_model("phi3"),
    "gemma2": lambda: tiny_model("gemma2"),
    "experts": lambda: experts.expert_model("qwen3"),
    "shared experts": lambda: experts.expert_model("deepseek"),
    "pictures": with_pictures,
}


def n_bytes(model: Any) -> int:
    """Of the storages of all weights and buffers, each once."""
    every = chain(model.parameters(), model.buffers())
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in every}.values())


@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_are_those_of_the_model_in_memory(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.config.save_pretrained(tmp_path)
    dtype = str(model.dtype).removeprefix("torch.")
    found = plan(str(tmp_path), memory={"cpu": GB}, dtype=dtype)
    (place,) = found.places
    assert place.weights == n_bytes(model) and found.dtype == model.dtype
    assert found.n_parameters == sum(p.numel() for p in model.parameters())
    mlps = find_mlps(model)
    widths = [0] * mlps[0].n_layers
    for mlp in mlps:
        widths[mlp.layer] = max(widths[mlp.layer], mlp.inside.stop)
    assert found.widths == widths and place.layers == list(range(len(widths)))
    counters = [tables(mlp, counting_state(mlp, 1, ("act",)))["count.act"] for mlp in mlps]
    assert place.counters == sum(t.numel() * t.element_size() for t in counters)
    if transformers.__version__.startswith("5.0."):  # its autocast knows no meta device
        assert place.cache == 0 and "autocast" in str(found.no_cache)
        return
    assert found.no_cache is None
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    kept = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert place.cache == sum(t.numel() * t.element_size() for t in kept) > 0


def test_the_masks_are_those_of_a_condition(tmp_path: Path) -> None:
    model = tiny_model("llama", intermediate_size=50)
    model.config.save_pretrained(tmp_path)
    (place,) = plan(str(tmp_path), memory={"cpu": GB}).places
    mlps = find_mlps(model)
    states = mask_states([[(layer, "gate", 1) for layer in range(3)]], mlps)
    keep = [state.keep for state in states if state.keep is not None]
    assert place.masks == sum(t.numel() * t.element_size() for t in keep) == 3 * 8


@pytest.mark.parametrize("way", ["auto", "sequential"])
def test_what_is_loaded_lies_where_the_plan_says(way: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole = tiny_model("llama")
    whole.save_pretrained(tmp_path)
    size = n_bytes(whole)
    places = set()
    for share in (0.9, 0.6, 0.4):
        memory = {"cpu": int(share * size)}
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=way, max_memory=dict(memory), offload_folder=tmp_path / "o"
        )
        ours = {
            place.device: place
            for place in plan(str(tmp_path), memory=memory, device_map=way).places
        }
        there = dict(loaded.hf_device_map)
        together = there.pop("model.layers", None)
        for number in range(3):
            device = there.pop(f"model.layers.{number}", together)
            assert number in ours[device].layers
        assert {name: d for d, place in ours.items() for name in place.others} == there
        assert sum(place.weights for place in ours.values()) == size
        assert ours["cpu"].weights <= memory["cpu"] and "disk" in ours
        places.add(ours["cpu"].weights)
    assert len(places) > 1


def test_devices_that_are_not_here(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    size = n_bytes(model)
    own = {n: (n_bytes(model.model.layers[n])) for n in range(3)}
    memory = read_memory([f"0={size}B", f"1={size}B", "cpu=1GB"])
    both = plan(str(tmp_path), memory=memory, device_map="balanced").places
    assert [place.device for place in both] == [0, 1, "cpu"]
    assert both[0].layers + both[1].layers == [0, 1, 2] and both[0].layers and both[1].layers
    assert not both[2].weights and not any(place.missing for place in both)
    assert [place.counters for place in both[:2]] == [8 * 48 * len(p.layers) for p in both[:2]]
    # A map of a file; what the host keeps runs on the first GPU, which its counters are on.
    where = {"model.embed_tokens": "cuda:1", "model.layers.0": 0, "model.layers.1": "cpu"}
    where |= {"model.layers.2": "1", "model.norm": 1, "model.rotary_emb": 1, "lm_head": 1}
    told = plan(str(tmp_path), memory={0: own[0] - 1, 1: GB}, device_map=where).places
    assert [(place.device, place.layers) for place in told] == [(0, [0]), (1, [2]), ("cpu", [1])]
    assert told[0].missing == 1 and told[2].weights == own[1]
    assert [place.counters for place in told] == [8 * 48 * 2, 8 * 48, 0]
    assert told[1].weights == size - own[0] - own[1]


def large() -> None:
    """A plan of a model of 70 billion parameters, in a process of its own."""
    import tempfile

    import transformers as hf

    with tempfile.TemporaryDirectory() as folder:
        hf.LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
            dtype="bfloat16",
        ).save_pretrained(folder)
        memory = read_memory(["0=80GiB", "1=80GiB", "cpu=200GiB"])
        found = plan(folder, memory=memory, device_map="auto")
        parts = plan(folder, memory={}, n_parts=8)
    print(json.dumps([found.n_parameters, [p.layers for p in found.places], peak_bytes()]))
    assert sum(place.weights for place in found.places) > 141 * GB
    assert [place.weights for place in parts.places] == [parts.places[0].weights] * 8
    assert abs(8 * parts.places[0].weights / (141.1 * GB) - 1) < 0.001
    # 8 heads of 128 keys and values of two bytes, in 80 layers.
    assert sum(place.cache for place in found.places) == 80 * 2 * 8 * 128 * 2
    assert parts.places[3].cache == 80 * 2 * 128 * 2
    assert parts.places[3].counters == 80 * 28672 // 8 * 8


@pytest.mark.slow
def test_70_billion_parameters_take_little_memory() -> None:
    process = Forked(large)
    assert process.wait() == 0, process.said()
    n_parameters, layers, peak = json.loads(process.said()[0])
    assert n_parameters == 70_553_706_496
    assert layers == [list(range(40)), list(range(40, 80)), []]
    assert peak < 2 << 30


def test_memory_is_read() -> None:
    assert read_memory(["0=80GiB", "1=1.5 gb", "cpu=200GB", "disk=3b"]) == {
        0: 80 << 30,
        1: 1_500_000_000,
        "cpu": 200 * GB,
        "disk": 3,
    }
    for text in ("80GiB", "0=", "gpu=3GB", "0=3", "0=-1GB", "0=3XB", "0=nanGB", f"0={9**999}GB"):
        with pytest.raises(RelneuronError, match="unknown --memory"):
            read_memory([text])
    with pytest.raises(RelneuronError, match="names 0 twice"):
        read_memory(["0=1GB", "0=2GB"])
    assert memory_here()["cpu"] > 0


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    def refused(why: str, **asked: Any) -> None:
        with pytest.raises(RelneuronError, match=why):
            plan(str(tmp_path), **{"memory": {"cpu": GB}, **asked})

    refused("no model folder")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": -1}')
    refused("no model by its config alone|decoder layers")
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    refused("says nothing of lm_head", device_map={"model": 0})
    refused("no device 'gpu'", device_map={"": "gpu"})
    model.config.base_model_tp_plan = {}
    about = json.loads((tmp_path / "config.json").read_text())
    quantised = about | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    refused("is quantised")
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(gpt2))
    (place,) = plan(str(tmp_path), memory={"cpu": GB}).places
    assert place.counters == 2 * 8 * 128
    refused("no tensor parallel plan", n_parts=2)


def test_the_command(relneuron: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    size = n_bytes(model)
    words = ("doctor", tmp_path, "--dry-run")
    code, said, _ = relneuron(*words)
    assert code == 0 and "0-2" in said and f"{size / 1000:.3g} KB" in said
    assert "48 (layers 0-2)" in said and "float32" in said
    code, said, _ = relneuron(*words, "--memory", "0=20KB", "--dtype", "bfloat16")
    assert code == 1 and f"{size / 2000 - 20:.3g} KB of weights more than its memory" in said
    code, said, _ = relneuron(*words, "--memory", "0=40KB", "--device-map", "auto")
    assert code == 1 and "they lie on the disk" in said and "brought to a GPU" in said
    code, said, _ = relneuron(*words, "--tensor-parallel-size", "2", "--memory", "0=1GB,1=1GB")
    assert code == 0 and "in all processes" in said
    for more, cause in (
        (("--tensor-parallel-size", 2, "--device-map", "auto"), "both say where"),
        (("--memory", "0"), "unknown --memory"),
        (("--device-map", "nowhere"), "is no file"),
        (("--dtype", "int8"), "--dtype"),
    ):
        code, _, said = relneuron(*words, *more)
        assert code == 2 and cause in said
    assert relneuron("doctor", tmp_path, "--memory", "0=1GB")[0] == 2
    assert relneuron("doctor", "--dry-run")[0] == 2
