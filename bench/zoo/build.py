"""A small random model of any type of transformers, from its configuration alone.

`bench.zoo` builds what it checks with it. Fields that say a size get a small one by their name, in
sub-configurations too; EXCEPTIONS has what a type needs beside that.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

VOCABULARY = 256
TEXT_IDS = range(3, 160)  # of prompts: no special token is among them
LAYERS, HIDDEN, WIDTH, EXPERT_WIDTH = 4, 64, 80, 24
KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
}

# Name of a field (a regular expression, whole) -> its value. The first that fits is taken.
_SIZES: list[tuple[str, int]] = [
    (r"vocab_size|.*_vocab_size|unpadded_vocab_size", VOCABULARY),
    (r"vocab_size_per_layer_input", VOCABULARY),
    (r"hidden_size|d_model|n_embd|embed_dim|emb_dim|dim_model|text_hidden_size", HIDDEN),
    (r"embedding_size|word_embed_proj_dim|lru_width|encoder_hidden_size|out_hidden_size", HIDDEN),
    (r"decoder_hidden_size|attention_hidden_size|embedding_dim|backbone_hidden_size", HIDDEN),
    (r"(moe|shared_experts?)(_\w+)?_intermediate_size", EXPERT_WIDTH),
    (r"expert_ffn_hidden_size|moe_hidden_size|share_expert_dim", EXPERT_WIDTH),
    (r"(\w+_)?intermediate_size(_mlp)?|\w*ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|n_inner", WIDTH),
    (r"feed_forward_size|d_inner|mlp_dim", WIDTH),
    (r"\w*(period|interval|sliding_window_pattern)|layer_group_size|cross_attention_frequency", 2),
    (r"num_kv_shared_layers", 2),
    (r"\w*layer_offset|insert_layer_id|loop_layer_index_start", 1),
    (r"loop_layer_index_end", 3),
    (r"n_(in|out)put_layers", 1),
    (r"(\w+_)?num_attention_heads|(en|de)coder_attention_heads|n_heads?|num_heads", 4),
    (r"num_(en|de)coder_attention_heads|attention_heads", 4),
    (r"(\w+_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups", 2),
    (r"qk_nope_head_dim|qk_rope_head_dim|rotary_dim", 8),
    (r"(\w+_)?head_dim|d_head|d_kv|dim_head|attention_head_size|kv_channels|v_head_dim", 16),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|projection_dim", 32),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length", 128),
    (r"max_(source|target)_positions|model_max_length", 128),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts", 4),
    (r"zero_expert_num", 2),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts", 1),
    (r"moe_num_shared_experts|first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"moe_layer_end_index", LAYERS - 1),
    (r"(mamba_)?chunk_size|index_topk|index_block_size", 8),
    (r"mamba_d_state|state_size|ssm_state_size|mamba_d_head", 16),
    (r"(n_mamba|mamba_n|mamba_num)_heads", 8),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"linear_num_(key_|value_)?heads", 4),
    (r"index_n_heads", 2),
    (r"rel_extent", 32),
    (r"sliding_window|sliding_window_size|attention_window_size|local_attention", 8),
    (r"image_size|max_image_size|min_image_size|crop_size", 32),
]
_LAYERS = r"num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|depth|layers"
# Special tokens behind those of prompts; BOS, EOS and padding where most models have them.
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def types(kind: str) -> list[str]:
    """The model types of a mapping of transformers, as it lists them."""
    return list(getattr(modeling_auto, f"{KINDS[kind]}_NAMES"))


def small_config(model_type: str) -> Any:
    """The type's default configuration with small sizes."""
    make = transformers.CONFIG_MAPPING[model_type]
    changes = EXCEPTIONS.get(model_type, {})
    default = make(**changes.get("default", {})).to_dict()
    return make(**_merge(_shrink(default), {k: v for k, v in changes.items() if k != "default"}))


def _merge(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` win, inside of sub-configurations, too."""
    new = dict(fields)
    for name, value in changes.items():
        inside = isinstance(value, dict) and isinstance(new.get(name), dict)
        new[name] = _merge(new[name], value) if inside else value
    return new


def _shrink(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration (and of those inside) that get another value."""
    new: dict[str, Any] = {}
    special = iter(range(TEXT_IDS.stop, VOCABULARY))
    layers = next((n for name, n in config.items() if re.fullmatch(_LAYERS, name)), None)
    for name, value in config.items():
        if isinstance(value, dict) and (name.endswith("config") or "model_type" in value):
            new[name] = _shrink(value) | {k: value[k] for k in ("model_type",) if k in value}
        elif name in _SPECIAL:
            new[name] = _SPECIAL[name]
        elif re.fullmatch(_LAYERS, name) and value:
            new[name] = LAYERS
        elif isinstance(value, int) and re.search(r"token_(id|index)$|im_\w+_id$", name):
            new[name] = next(special)
        elif isinstance(value, int) and not isinstance(value, bool):
            if value > (small := _small(name, value)):
                new[name] = small
        elif isinstance(value, list) and layers and len(value) == layers:
            new[name] = _sample(name, value)
    # Latent attention has one key and value a head.
    if "kv_lora_rank" in config and "num_key_value_heads" in config:
        new["num_key_value_heads"] = 4
        if config.get("head_dim") == config.get("qk_rope_head_dim", 0):
            new["head_dim"] = new.get("qk_rope_head_dim", config["head_dim"])
    return new


def _small(name: str, value: int) -> int:
    return next((n for pattern, n in _SIZES if re.fullmatch(pattern, name)), value)


def _sample(name: str, values: list[Any]) -> list[Any]:
    """A list with an entry a layer for fewer layers: every kind that there is, in order."""
    if values == list(range(len(values))):
        return values[:LAYERS]
    kinds = list(dict.fromkeys(values))
    if all(isinstance(value, int) for value in values):
        kinds = [_small(name.removesuffix("_per_layer"), value) for value in kinds]
    return [kinds[i % len(kinds)] for i in range(LAYERS)]


def build(kind: str, model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small model of a type in eval mode, with seeded random weights of the size of 1."""
    config = small_config(model_type)
    model_class = getattr(transformers, KINDS[kind])[type(config)]
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if not isinstance(config, model_class.config_class):
        inside = [c for c in vars(config).values() if isinstance(c, model_class.config_class)]
        config = inside[0] if inside else config
    torch.manual_seed(0)
    model = model_class(config).to(dtype).eval()
    seed_weights(model)
    return model


def seed_weights(model: nn.Module) -> None:
    """Random matrices that neither shrink nor grow what they map, so that every part matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                is_map = weight.dim() == 2 and name == "weight" or weight.dim() == 3
                if is_map and not isinstance(module, nn.Embedding | nn.Conv1d):
                    noise = torch.randn(weight.shape, generator=generator)
                    weight.copy_(noise * weight.shape[-1] ** -0.5)
                elif name.endswith("bias") and weight.dim() <= 2:
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))


_HEADS = {"head_dim": 16}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2}
_QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 1,
    "ple_embed_dim": 64,
}


def _rope(*sections: int) -> dict[str, Any]:
    """Rotary positions in three parts, of half of the (small) head."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*sections]}


_MROPE = {"text_config": {"rope_parameters": _rope(2, 3, 3)}}
_COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {"sliding_attention": _rope(2, 3, 3), "full_attention": None},
}
_LOOP = {"n_layers_per_attn_res_block": 1}
_NO_PLE = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_SWA = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 16,
}
# Model type -> what its configuration needs beside small sizes; `default` is what even its default
# one needs.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "cosmos3_edge": _MROPE,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {**_ROUTED, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": _SWA,
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "dots3_note_text": _SWA,
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _rope(3, 3, 2)}},
    "gemma4_assistant": {
        "default": {"text_config": _NO_PLE},
        "text_config": {**_NO_PLE, "num_kv_shared_layers": LAYERS},
    },
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "glm4v_moe": {"text_config": {"rope_parameters": _rope(1, 1, 2)}},
    "glm5_next": {"text_config": {"index_topk": 16}},
    "glm_ocr": _MROPE,
    "glmga": _MROPE,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "hunyuan_vl": {"text_config": {**_HEADS, "rope_parameters": _rope(2, 2, 2, 2)}},
    "hy_v4_vl": {"text_config": {"rope_parameters": _rope(1, 1, 2)}},
    "inkling2_loop": {"text_config": _LOOP},
    "inkling2_loop_text": _LOOP,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": _HEADS,
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 2]}},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "nemotron": {**_HEADS, "num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": _MROPE,
    "paligemma": {"text_config": {"num_key_value_heads": 2}},
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen2_5_omni_thinker": {**_MROPE, "vision_start_token_id": 250, "vision_end_token_id": 251},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 250, "vision_end_token_id": 251},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
        "num_buckets": 4,
    },
    "step3p7": {"text_config": {"sliding_window": 8}},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
}
