"""Quantised models for tests: each method whose package runs on a CPU, and one without a package.

tests/model/test_quantised.py makes them of a small model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from relneuron.model.load import load_model

Quantise = Callable[[Path, Path], Any]


def by_config(make: Callable[[Any], Any], dtype: torch.dtype = torch.float32) -> Quantise:
    """A model that transformers quantises as it loads it."""

    def quantise(plain: Path, folder: Path) -> Any:
        import transformers as hf

        kind = hf.AutoModelForCausalLM
        return kind.from_pretrained(plain, quantization_config=make(hf), dtype=dtype).eval()

    return quantise


def torchao(name: str, **options: Any) -> Quantise:
    def make(hf: Any) -> Any:
        import torchao.quantization

        return hf.TorchAoConfig(getattr(torchao.quantization, name)(**options))

    return by_config(make, torch.bfloat16)


def compressed(plain: Path, folder: Path) -> Any:
    """A checkpoint of compressed-tensors: int8 weights, a scale for each output."""
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {"format": "int-quantized", "targets": ["Linear"], "weights": weights}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors |= {name: (tensors[name] / scale).round().char(), f"{name}_scale": scale}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return load_model(str(folder), device="cpu")


class Packed(nn.Module):
    """A linear map as GPTQ's packages have it: buffers only, and no weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        numbers = (linear.weight.detach() / scale).round().to(torch.int32) & 15
        self.register_buffer("qweight", sum(numbers[:, i::8] << 4 * i for i in range(8)))
        self.register_buffer("scales", scale)

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.stack([(self.qweight << 28 - 4 * i) >> 28 for i in range(8)], -1)
        return nn.functional.linear(x, numbers.flatten(1) * self.scales)


def by_hand(plain: Path, folder: Path) -> Any:
    """A model whose linear maps are replaced, so that its config says nothing of it."""
    model = load_model(str(plain), device="cpu")
    for layer in model.model.layers:
        for parent in (layer.mlp, layer.self_attn):
            for name, linear in [*parent.named_children()]:
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, Packed(linear))
    return model.eval()


# Of each method: its package, how it makes a model, and what a model says of it.
METHODS: dict[str, tuple[str, Quantise, dict[str, Any] | None]] = {
    "buffers only": ("torch", by_hand, None),
    "bitsandbytes 8": (
        "bitsandbytes",
        by_config(lambda hf: hf.BitsAndBytesConfig(load_in_8bit=True)),
        {"method": "bitsandbytes", "bits": 8},
    ),
    "bitsandbytes fp4": (
        "bitsandbytes",
        by_config(lambda hf: hf.BitsAndBytesConfig(load_in_4bit=True)),
        {"method": "bitsandbytes", "bits": 4},
    ),
    "bitsandbytes nf4, scales quantised, bfloat16": (
        "bitsandbytes",
        by_config(
            lambda hf: hf.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            ),
            torch.bfloat16,
        ),
        {"method": "bitsandbytes", "bits": 4},
    ),
    "torchao int8": (
        "torchao",
        torchao("Int8WeightOnlyConfig"),
        {"method": "torchao", "bits": 8},
    ),
    "torchao int8, inputs too": (
        "torchao",
        torchao("Int8DynamicActivationInt8WeightConfig"),
        {"method": "torchao", "bits": 8},
    ),
    "torchao float8": (
        "torchao",
        torchao("Float8WeightOnlyConfig"),
        {"method": "torchao", "bits": 8},
    ),
    "quanto int8": (
        "optimum",
        by_config(lambda hf: hf.QuantoConfig(weights="int8")),
        {"method": "quanto", "bits": 8},
    ),
    "quanto int4": (
        "optimum",
        by_config(lambda hf: hf.QuantoConfig(weights="int4")),
        {"method": "quanto", "bits": 4},
    ),
    "compressed-tensors int8": (
        "compressed_tensors",
        compressed,
        {"method": "compressed-tensors", "bits": 8},
    ),
}


def by_saving(make: Callable[[Any], Any]) -> Quantise:
    """A checkpoint that transformers wrote of a model that it quantised."""

    def quantise(plain: Path, folder: Path) -> Any:
        by_config(make)(plain, folder).save_pretrained(folder)
        return load_model(str(folder), device="cpu")

    return quantise


def saved_torchao(hf: Any) -> Any:
    import torchao.quantization

    return hf.TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig())


CHECKPOINTS: dict[str, Quantise] = {
    "bitsandbytes": by_saving(lambda hf: hf.BitsAndBytesConfig(load_in_8bit=True)),
    "torchao": by_saving(saved_torchao),
    "compressed_tensors": compressed,
}
