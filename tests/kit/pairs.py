"""Pairs of models for tests: adapters of peft with numbers in them, models that differ a little."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relneuron.model.load import load_model, load_tokenizer
from tests.conftest import tiny_model
from tests.kit.counted import VOCABULARY, Numbers

ADAPTERS = ("lora", "lora of all", "ia3", "ia3 of down")


def config_of(kind: str) -> Any:
    from peft import IA3Config, LoraConfig

    lora = {"r": 3, "lora_alpha": 8, "lora_dropout": 0.1}
    attention, mlp = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
    return {
        "lora": lambda: LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **lora),
        "dora": lambda: LoraConfig(
            target_modules=["q_proj", *mlp], use_dora=True, use_rslora=True, **lora
        ),
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


@contextmanager
def ignoring_peft() -> Iterator[None]:
    """peft 0.21 asks transformers 5.24 by a name that it gives up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def save_adapter(kind: str | Any, folder: Path, *, model: Any = None, seed: int = 5) -> Path:
    """The folder of an adapter over `tiny_model("llama")`, or a model; its numbers are drawn."""
    from peft import get_peft_model

    config = config_of(kind) if isinstance(kind, str) else kind
    with ignoring_peft():
        peft = get_peft_model(model or tiny_model("llama"), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn_like(weight) * 0.3 + (1.0 if "ia3" in name else 0.0))
    peft.save_pretrained(str(folder))
    return folder


def moved(model: Any, scale: float = 0.02, seed: int = 3, only: Sequence[str] = ()) -> Any:
    """A copy of a model, some of whose weights were changed: those with one of `only` in a name."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for name, weight in other.named_parameters():
        if not only or any(word in name for word in only):
            weight.data += scale * torch.randn(weight.shape, generator=generator)
    return other


def save_moved(model: Path, folder: Path, scale: float = 0.15, seed: int = 3) -> Path:
    """The folder of a model with other weights and the same tokenizer."""
    moved(load_model(str(model)), scale, seed).save_pretrained(folder)
    load_tokenizer(str(model)).save_pretrained(folder)
    return folder


def peft_model(folder: Path, **changes: Any) -> Any:
    """The model with the adapter of a folder, as peft itself runs it."""
    from peft import PeftModel

    with ignoring_peft():
        return PeftModel.from_pretrained(tiny_model("llama", **changes), folder).eval()


class Words(Numbers):
    """A tokenizer of texts such as "5 17 3", whose text ends with token 2."""

    eos_token_id = 2
    chat_template: str | None = None

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return list(map(str, ids))


def write_prompts(path: Path, n: int = 9, *, groups: str = "xyz", longest: int = 12) -> Path:
    """Prompts of different lengths, each of a group."""
    rng = random.Random(7)
    lines = [
        {"id": f"p{i}", "group": groups[i % len(groups)], "prompt": " ".join(map(str, drawn))}
        for i in range(n)
        for drawn in [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, longest))]]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_by(model: Any, maps: Sequence[str], ids: Sequence[int]) -> Tensor:
    """(T, L, F): what the modules of these paths read while a model reads tokens, by hooks."""
    seen: list[Tensor] = []
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
        for path in maps
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([list(ids)]))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen, 1)


def written_by(model: Any, ids: Sequence[int], n: int) -> list[int]:
    """What transformers' own generate() writes greedily, without the end of text."""
    start = torch.tensor([list(ids)])
    made = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=n, do_sample=False
    )[0, len(ids) :].tolist()
    return made[: made.index(2)] if 2 in made else made
