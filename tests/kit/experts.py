"""Tiny models with experts of many families, and their experts' forward in plain torch.

The tests of model/experts*.py hold the patch to `plain_forward`, which is written by what a family
says of its experts and shares no code with what it tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relneuron.model.counting import counting_state, tables
from relneuron.model.layers import decoder_layers
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.find_experts import find_experts
from relneuron.model.patch import Patch
from relneuron.model.states import LayerState, Replacement, Tokens, off_state

LAYERS, HIDDEN, WIDTH, VOCABULARY = 2, 32, 24, 96
_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_MOE = {"moe_intermediate_size": WIDTH, "num_experts_per_tok": 2, "head_dim": 8}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
# Family -> configuration class, what it needs beside the sizes, E, K, the name of its experts.
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "qwen3": ("Qwen3MoeConfig", {**_MOE, "num_experts": 8}, 8, 2),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 3}, 4, 3),
    "deepseek": (
        "DeepseekV3Config",
        {
            **_MOE,
            **_MLA,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 0,
        },
        8,
        2,
    ),
    "gpt_oss": ("GptOssConfig", {**_MOE, "num_local_experts": 4}, 4, 2),
    "llama4": (
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size_mlp": WIDTH,
            "interleave_moe_layer_step": 1,
        },
        4,
        2,
    ),
    "granite": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, 4, 2),
    "qwen2": (
        "Qwen2MoeConfig",
        {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 40},
        4,
        2,
    ),
    "jetmoe": (
        "JetMoeConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
        4,
        2,
    ),
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
# All of them for those that transformers' experts interface runs.
CASES = [
    (family, implementation)
    for family in FAMILIES
    for implementation in (IMPLEMENTATIONS if family not in ("llama4", "jetmoe") else ("eager",))
]
PAD = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 0, 1, 1]])


def expert_model(
    family: str, dtype: torch.dtype = torch.float32, implementation: str | None = None
) -> Any:
    """A random model of a family with 2 layers, F = 24, D = 32, biases included, in eval mode."""
    import transformers

    name, extra, _, _ = FAMILIES[family]
    config = getattr(transformers, name)(**_SIZE | extra)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if path.endswith("bias") or "experts" in path:
                weight.normal_(std=0.2)
    for module in model.modules():
        if hasattr(module, "limit"):
            module.limit = 1.5  # of gpt-oss: such that some are beyond it
    has_interface = any(hasattr(module, "is_transposed") for module in model.modules())
    if implementation is not None and has_interface:
        model.set_experts_implementation(implementation)
    return model


def ids(rows: int = 3, columns: int = 7) -> Tensor:
    return torch.randint(3, 90, (rows, columns), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, tokens: Tensor | None = None, **given: Any) -> Tensor:
    return model(ids() if tokens is None else tokens, use_cache=False, **given).logits


def experts_of(model: Any) -> list[Experts]:
    path, layers = decoder_layers(model)
    found = [find_experts(i, f"{path}.{i}", layer) for i, layer in enumerate(layers)]
    assert all(experts is not None for experts, _ in found), found
    return [experts for experts, _ in found if experts is not None]


# --- the experts' forward, expert by expert --------------------------------------------------

# (expert, token, values) of a site -> other values
Change = Callable[[str, int, Tensor, Tensor], Tensor]
Seen = dict[str, Tensor]


def routes_itself(module: Any) -> bool:
    """JetMoE, and GraniteMoe of the oldest transformers."""
    return hasattr(module, "input_linear")


def weights_of(family: str, module: Any, e: int) -> tuple[Tensor, ...]:
    """gate (F, D), up (F, D), down (D, F) and their biases (or zeros) of an expert."""
    if routes_itself(module):
        both, down = module.input_linear.weight[e], module.output_linear.weight[e]
    elif family in ("gpt_oss", "llama4"):
        both, down = module.gate_up_proj[e].T, module.down_proj[e].T
    else:
        both, down = module.gate_up_proj[e], module.down_proj[e]
    zeros = both.new_zeros(len(both)), down.new_zeros(len(down))
    bias, down_bias = zeros
    if family == "gpt_oss":
        bias, down_bias = module.gate_up_proj_bias[e], module.down_proj_bias[e]
        both = torch.cat((both[::2], both[1::2]))
        bias = torch.cat((bias[::2], bias[1::2]))
    width = len(both) // 2
    return both[:width], both[width:], down, bias[:width], bias[width:], down_bias


def act_and_factor(family: str, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """What h is the product of."""
    if family == "gpt_oss":
        gate, up = gate.clamp(max=1.5), up.clamp(-1.5, 1.5)
        return gate * torch.sigmoid(1.702 * gate), up + 1
    return F.silu(gate), up


def pairs_of(
    family: str, module: Any, given: Sequence[Tensor]
) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """The inputs (T, D), or (E, T, D), and of each expert its tokens and their weights."""
    x = given[0].reshape(-1, given[0].shape[-1])
    if routes_itself(module):
        _, token, weight, sizes, _ = module.router(x)
        parts = zip(token.split(sizes), weight.split(sizes), strict=True)
        return x, dict(enumerate(parts))
    if family == "llama4":
        n_experts = len(module.down_proj)
        inputs = x.view(n_experts, -1, x.shape[1])
        tokens = [(part != 0).any(1).nonzero().squeeze(1) for part in inputs]
        return inputs, {e: (t, torch.ones(len(t), dtype=x.dtype)) for e, t in enumerate(tokens)}
    index, weights = given[1], given[2]
    pairs = {}
    for e in range(len(module.down_proj)):
        token, k = (index == e).nonzero(as_tuple=True)
        pairs[e] = (token, weights[token, k])
    return x, pairs


def plain_forward(
    family: str,
    module: Any,
    given: Sequence[Tensor],
    *,
    change: Change | None = None,
    seen: dict[tuple[int, int], tuple[Seen, float]] | None = None,
) -> Tensor:
    """What the module returns, token by token; `seen` gets the sites of each (expert, token).

    In float64, rounded at the end.
    """
    x, pairs = pairs_of(family, module, given)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for e, (tokens, weights) in pairs.items():
        gate_w, up_w, down_w, gate_b, up_b, down_b = (
            w.double() for w in weights_of(family, module, e)
        )
        inputs = (x[e] if family == "llama4" else x)[tokens].double()
        gate, up = inputs @ gate_w.T + gate_b, inputs @ up_w.T + up_b
        if change is not None:
            gate, up = change("gate", e, tokens, gate), change("up", e, tokens, up)
        act, factor = act_and_factor(family, gate, up)
        if change is not None:
            act = change("act", e, tokens, act)
        h = act * factor
        if change is not None:
            h = change("product", e, tokens, h)
        if seen is not None:
            values = {"gate": gate, "up": up, "act": act, "product": h}
            for i, token in enumerate(tokens.tolist()):
                seen[e, token] = ({s: v[i] for s, v in values.items()}, float(weights[i]))
        y = (h @ down_w.T + down_b) * weights.double().unsqueeze(1)
        (out[e] if family == "llama4" else out).index_add_(0, tokens, y)
    if family == "jetmoe":
        out = out + module.bias.double()
    return out.to(given[0].dtype).view(given[0].shape)


@contextmanager
def in_plain_torch(
    family: str,
    model: Any,
    *,
    changes: Sequence[Change | None] = (None,) * LAYERS,
    seen: list[dict[tuple[int, int], tuple[Seen, float]]] | None = None,
) -> Iterator[None]:
    """Within it, `plain_forward` is the forward of the experts of every layer."""
    modules: list[nn.Module] = [experts.module for experts in experts_of(model)]
    for layer, module in enumerate(modules):

        def forward(*given: Tensor, module: Any = module, layer: int = layer) -> Tensor:
            into = None if seen is None else seen[layer]
            return plain_forward(family, module, given, change=changes[layer], seen=into)

        module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


# --- what the tests of the patch begin with --------------------------------------------------

SITES = ("gate", "up", "act", "product")
# Of the tokens of PAD; padding and one token more belong nowhere.
GROUPS = torch.tensor([[0] * 7, [1] * 7, [0, 0, 0, 1, 1, 0, -1]]).masked_fill(PAD == 0, -1).int()


def padded(model: Any) -> Tensor:
    """Logits of a left-padded batch."""
    return logits(model, attention_mask=PAD)


def counting(
    found: list[Experts], n_groups: int = 2, tokens: Tokens | None = None, **asked: Any
) -> Patch:
    states = [expert_state(experts, n_groups, **asked) for experts in found]
    patch = Patch(found, states)
    patch.tokens = tokens or Tokens(group_ids=GROUPS, counted=set())
    return patch


# --- counters --------------------------------------------------------------------------------


def zeroed(family: str, model: Any, neurons: list[tuple[int, str, int]]) -> Any:
    """A copy whose weights of these neurons are zero: columns of down_proj, or its rows."""
    edited = copy.deepcopy(model)
    for layer, site, index in neurons:
        module = experts_of(edited)[layer].module
        down: Any = module.output_linear.weight if routes_itself(module) else module.down_proj
        # (E, D, F), whichever way it lies
        weight = (down.mT if family in ("gpt_oss", "llama4") else down).data
        if site == "down":
            weight[:, index] = 0
            if family == "gpt_oss":
                module.down_proj_bias.data[:, index] = 0  # type: ignore[operator, union-attr]
        else:
            weight[index // WIDTH, :, index % WIDTH] = 0
    return edited


# --- what the package does with any part of a layer, of experts alone ------------------------


@dataclass(frozen=True)
class ExpertCounts:
    """The tables of a counting state: count (G, E * F), tokens and mean weight (E, G)."""

    count: dict[str, Tensor]
    tokens: Tensor
    weight: Tensor | None

    @classmethod
    def of(cls, experts: Experts, state: LayerState) -> ExpertCounts:
        found = tables(experts, state)
        tokens = found["tokens.expert"].T
        weight = found["weight.expert"].T / tokens if "weight.expert" in found else None
        kinds = {name: table for name, table in found.items() if name.startswith("count.")}
        count = {name.partition(".")[2]: table.clone() for name, table in kinds.items()}
        return cls(count, tokens.clone(), weight)


def expert_state(
    experts: Experts, groups: int, sites: Sequence[str] = ("act",), **asked: Any
) -> LayerState:
    return counting_state(experts, groups, sites, **asked)


def mask_experts(experts: Experts, conditions: Sequence[Sequence[Any]]) -> LayerState:
    """What switches off the neurons of these experts; others of the conditions are not theirs."""
    widths = {"gate": experts.offset + 2 * experts.width, "down": experts.hidden}
    off = {site: np.zeros((len(conditions), width), bool) for site, width in widths.items()}
    for number, neurons in enumerate(conditions):
        for layer, site, index in neurons:
            if layer == experts.layer and site in ("gate", "up", "down"):
                off["down" if site == "down" else "gate"][number, index] = True
    return off_state(experts, off)


def fold_replacement(experts: Experts, new: Replacement) -> Replacement:
    shift = None if new.shift is None else experts.fold(new.shift)
    return replace(new, chosen=experts.fold(new.chosen), shift=shift)


def neurons_of(experts: Experts, numbers: Iterable[int]) -> list[tuple[int, str, int]]:
    """All neurons of whole experts, by their numbers."""
    width, first = experts.expert_width, experts.offset
    return [
        (experts.layer, "gate", first + number * width + f)
        for number in numbers
        for f in range(width)
    ]
