"""Tiny models that read pictures, their processors in a folder, and pictures with questions.

Shaped as LLaVA (a CLIP tower, a projector), Qwen2-VL (patches in rows, a merger) and InstructBLIP
(a Q-Former that reads the question, too); random weights, made in a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
QWEN_SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_CHAT = (
    "{% for message in messages %}[{{ message['role'] }}]{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}[end]{% endfor %}"
)
KINDS = ("llava", "qwen2_vl", "instructblip")
# Of each kind, how many layers its modules have.
MODULES = {
    "llava": {"language": 2, "vision": 3, "projector": 1},
    "qwen2_vl": {"language": 2, "vision": 2, "projector": 1},
    "instructblip": {"language": 2, "vision": 2, "qformer_query": 2, "qformer_text": 2},
}
# The maps whose input is what `act` gives, or whose output is gate, by their names in transformers.
_MLP, _GATE = r"layers\.(\d+)\.mlp\.fc2$", r"language_model\..*layers\.(\d+)\.mlp\.gate_proj$"
_PLACES = {
    "llava": {
        "language": _GATE,
        "vision": rf"vision_tower\..*{_MLP}",
        "projector": r"multi_modal_projector\.(linear_2)$",
    },
    "qwen2_vl": {
        "language": _GATE,
        "vision": r"visual\.blocks\.(\d+)\.mlp\.fc2$",
        "projector": r"visual\.(merger)\.mlp\.2$",
    },
    "instructblip": {
        "language": _GATE,
        "vision": rf"vision_model\..*{_MLP}",
        "qformer_query": r"qformer\..*layer\.(\d+)\.output_query\.dense$",
        "qformer_text": r"qformer\..*layer\.(\d+)\.output\.dense$",
    },
}
QUESTIONS = ("what is it?", "which colour has it?", "how many are there?", "is it red?", "where?")


class PicturesOnly(Qwen2VLProcessor):  # type: ignore[misc]
    """Qwen2-VL's processor without the one of videos, which needs torchvision."""

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        self.image_token, self.video_token = QWEN_SPECIAL[2:]
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def tokenizer(special: tuple[str, ...] = SPECIAL) -> PreTrainedTokenizerFast:
    """Bytes, and special tokens before them: id 0 pads, 1 begins, 2 ends."""
    words = (*special, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.add_special_tokens({"additional_special_tokens": list(special[3:])})
    return made


def _pil(name: str) -> Any:
    """The image processor of a name that needs no torchvision."""
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def _llama(hidden: int, words: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": words,
        "hidden_size": hidden,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def make_llava() -> tuple[Any, Any]:
    words = tokenizer()
    sizes = _pil("CLIPImageProcessor")(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    processor = transformers.LlavaProcessor(
        sizes,
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}USER: {% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
            "{% endfor %} ASSISTANT:{% endfor %}"
        ),
    )
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "projection_dim": 24,
        "hidden_act": "quick_gelu",
    }
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=_llama(32, len(words)),
        image_token_id=3,
        image_token_index=3,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def make_qwen2_vl() -> tuple[Any, Any]:
    words = tokenizer((*SPECIAL[:3], *QWEN_SPECIAL))
    sizes = _pil("Qwen2VLImageProcessor")(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024
    )
    processor = PicturesOnly(sizes, words, chat_template=QWEN_CHAT)
    text = _llama(32, len(words)) | {"model_type": "qwen2_vl_text"}
    text["rope_parameters"] = {
        "rope_type": "default",
        "mrope_section": [1, 1, 2],
        "rope_theta": 10000.0,
    }
    vision = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_ratio": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=6,
        tie_word_embeddings=False,
    )
    return transformers.Qwen2VLForConditionalGeneration(config), processor


def make_instructblip() -> tuple[Any, Any]:
    words = tokenizer()
    sizes = _pil("BlipImageProcessor")(size={"height": 16, "width": 16})
    processor = transformers.InstructBlipProcessor(
        sizes, words, tokenizer(SPECIAL[:3]), num_query_tokens=4
    )
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "hidden_act": "gelu",
    }
    qformer = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "encoder_hidden_size": 24,
        "cross_attention_frequency": 2,
    }
    config = transformers.InstructBlipConfig(
        vision_config=vision,
        qformer_config=qformer,
        text_config=_llama(32, len(words)),
        num_query_tokens=4,
        image_token_index=3,
    )
    return transformers.InstructBlipForConditionalGeneration(config), processor


_MAKE: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": make_llava,
    "qwen2_vl": make_qwen2_vl,
    "instructblip": make_instructblip,
}


def tiny(kind: str) -> tuple[Any, Any]:
    """A random model of a kind, in eval mode, and its processor.

    Weights of the size of 1, so that every neuron is active at some places and not at others.
    """
    torch.manual_seed(0)
    model, processor = _MAKE[kind]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                size = weight[0].numel() ** -0.5
                weight.copy_(size * torch.randn(weight.shape, generator=generator))
            else:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.eval(), processor


def save(kind: str, folder: Path) -> Path:
    """The model and the processor of a kind as a folder that the command line reads."""
    model, processor = tiny(kind)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def register() -> None:
    """What a folder of the Qwen2-VL kind needs to be read here."""
    config = transformers.Qwen2VLConfig
    transformers.AutoProcessor.register(config, PicturesOnly, exist_ok=True)


def picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    """A picture of random colours, in large patches."""
    rows = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(rows).resize((width, height), Image.Resampling.NEAREST)


def write_lines(folder: Path, group: str, n: int, first: int = 0) -> Path:
    """`n` pictures and the JSONL file of a group whose lines name them, and ask."""
    (folder / "pictures").mkdir(exist_ok=True, parents=True)
    lines = []
    for number in range(first, first + n):
        name = f"pictures/{group}{number}.png"
        picture(number, 16 + 8 * (number % 2)).save(folder / name)
        lines.append(json.dumps({"image": name, "text": QUESTIONS[number % len(QUESTIONS)]}))
    path = folder / f"{group}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def places(model: Any, kind: str, module: str) -> list[torch.nn.Module]:
    """The map of each layer of a module where `plain_counts` looks."""
    pattern = re.compile(_PLACES[kind][module])
    return [part for name, part in model.named_modules() if pattern.search(name)]


def plain_counts(
    model: Any, kind: str, examples: Sequence[tuple[Mapping[str, torch.Tensor], int]], groups: int
) -> dict[str, tuple[Any, Any]]:
    """By plain hooks: of each module how often act is > 0 (G, L, F), and the tokens (G, L).

    `examples` are what the model takes, with the group that all of its tokens count in.
    """
    found: dict[str, tuple[Any, Any]] = {}
    group, handles = [0], []

    def add(module: str, layer: int, act: torch.Tensor) -> None:
        count, tokens = found[module]
        flat = act.reshape(-1, act.shape[-1])
        count[group[0], layer] += (flat > 0).sum(0).numpy()
        tokens[group[0], layer] += len(flat)

    for module in MODULES[kind]:
        own = places(model, kind, module)
        is_gate = module == "language"
        width = own[0].out_features if is_gate else own[0].in_features
        shape = (groups, len(own), width)
        found[module] = np.zeros(shape, np.int64), np.zeros(shape[:2], np.int64)
        for layer, part in enumerate(own):

            def look(_: Any, args: Any, output: Any, m: str = module, i: int = layer) -> None:
                silu = torch.nn.functional.silu
                add(m, i, silu(output) if m == "language" else args[0])

            handles.append(part.register_forward_hook(look))
    with torch.no_grad():
        for inputs, group[0] in examples:
            model(**inputs)
    for handle in handles:
        handle.remove()
    return found
