"""Pairs of models for tests: adapters of peft with numbers in them, models that differ a little."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from tests.conftest import tiny_model

ADAPTERS = ("lora", "lora of all", "ia3", "ia3 of down")


def config_of(kind: str) -> Any:
    from peft import IA3Config, LoraConfig

    lora = {"r": 3, "lora_alpha": 8, "lora_dropout": 0.1}
    attention, mlp = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
    return {
        "lora": lambda: LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **lora),
        "lora of all": lambda: LoraConfig(target_modules=[*attention, *mlp], **lora),
        "ia3": lambda: IA3Config(
            target_modules=["k_proj", "v_proj", "up_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
        # As the models of arXiv 2406.14144 are trained.
        "ia3 of down": lambda: IA3Config(
            target_modules=["down_proj"], feedforward_modules=["down_proj"]
        ),
    }[kind]()


def save_adapter(kind: str | Any, folder: Path, *, model: Any = None, seed: int = 5) -> Path:
    """The folder of an adapter over `tiny_model("llama")`, or a model; its numbers are drawn."""
    from peft import get_peft_model

    config = config_of(kind) if isinstance(kind, str) else kind
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.24 by a name that it gives up.
        warnings.simplefilter("ignore", FutureWarning)
        peft = get_peft_model(model or tiny_model("llama"), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn_like(weight) * 0.3 + (1.0 if "ia3" in name else 0.0))
    peft.save_pretrained(str(folder))
    return folder


def peft_model(folder: Path, **changes: Any) -> Any:
    """The model with the adapter of a folder, as peft itself runs it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(tiny_model("llama", **changes), folder).eval()
