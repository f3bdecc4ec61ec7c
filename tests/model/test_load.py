"""Models from folders: which class loads them, and what is missing where none does."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from relneuron.artifact.files import RelneuronError
from relneuron.model.load import load_model
from relneuron.model.mlps.find import find_mlps

TEXT = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def save_llava(folder: Path) -> Any:
    import transformers

    config = transformers.LlavaConfig(text_config=TEXT, vision_config=TOWER, image_token_index=60)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_model_with_pictures_reads_text(tmp_path: Path) -> None:
    saved, loaded = save_llava(tmp_path), load_model(str(tmp_path), device="cpu")
    assert type(loaded) is type(saved)
    paths = [mlp.path for mlp in find_mlps(loaded)]
    assert paths == [f"model.language_model.layers.{i}.mlp" for i in range(2)]
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, saved(ids).logits)


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is here")
def test_a_package_that_a_model_needs_is_named(tmp_path: Path) -> None:
    save_llava(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"] = {"model_type": "timm_wrapper", "architecture": "resnet18"}
    path.write_text(json.dumps(config))
    with pytest.raises(RelneuronError, match="needs a package that is not here") as caught:
        load_model(str(tmp_path), device="cpu")
    assert caught.value.fix == "pip install timm"
