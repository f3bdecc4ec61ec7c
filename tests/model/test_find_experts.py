"""Which experts are found, what is said of them, and why others are not taken.

The description is run against the modules of transformers, in every dtype and implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.find import inspect_layers
from relneuron.model.mlps.find_experts import find_experts
from tests.kit.experts import (
    CASES,
    FAMILIES,
    HIDDEN,
    WIDTH,
    expert_model,
    experts_of,
    in_plain_torch,
    logits,
    routes_itself,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reason(model: Any, layer: int = 0) -> str:
    experts, why = find_experts(layer, f"layers.{layer}", model.model.layers[layer])
    assert experts is None
    return why


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_found_in_every_layer(family: str) -> None:
    _, _, n_experts, _ = FAMILIES[family]
    found = experts_of(expert_model(family))
    for layer, experts in enumerate(found):
        sizes = (experts.layer, experts.n_experts, experts.expert_width, experts.hidden)
        assert sizes == (layer, n_experts, WIDTH, HIDDEN)
        assert experts.width == n_experts * WIDTH and experts.offset == 0
        assert experts.activation == (None if family == "gpt_oss" else "silu")
        call = "router" if routes_itself(experts.module) else "routed"
        assert experts.call == ("dense" if family == "llama4" else call)


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_the_oracle_of_these_tests_is_the_model(family: str, implementation: str) -> None:
    model = expert_model(family, implementation=implementation)
    clean = logits(model)
    with in_plain_torch(family, model):
        torch.testing.assert_close(logits(model), clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "implementation"), CASES)
@torch.no_grad()
def test_the_description_gives_what_the_module_gives(
    family: str, implementation: str, dtype: torch.dtype
) -> None:
    """For routing of many tokens, a few, and none."""
    model = expert_model(family, dtype, implementation)
    experts = experts_of(model)[1]
    _, _, n_experts, k = FAMILIES[family]
    for n_tokens in (40, 2, 0):
        given = arguments(experts, n_tokens, n_experts, k, dtype)
        ours, theirs = experts.formula(*given), cast(Tensor, experts.module(*given))
        assert ours.dtype == theirs.dtype == dtype and ours.shape == theirs.shape
        if n_tokens:
            bound = 16 * torch.finfo(dtype).eps * float(theirs.abs().max())
            assert float((ours.float() - theirs.float()).abs().max()) <= bound


def arguments(
    experts: Experts, n_tokens: int, n_experts: int, k: int, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n_tokens, HIDDEN, generator=generator)
    index = torch.rand(n_tokens, n_experts, generator=generator).argsort(1)[:, :k]
    weights = torch.rand(n_tokens, k, generator=generator)
    if experts.call == "router":
        return [x.unsqueeze(0).to(dtype)]
    if experts.call == "dense":
        table = torch.zeros(n_tokens, n_experts).scatter(1, index, weights)
        return [(table.T.unsqueeze(2) * x).reshape(-1, HIDDEN).to(dtype)]
    return [x.to(dtype), index, weights.to(dtype)]


@pytest.mark.parametrize(
    ("implementation", "total"), [("eager", 256.0), ("batched_mm", 258.0), ("grouped_mm", 258.0)]
)
@torch.no_grad()
def test_outputs_are_summed_in_the_order_and_the_dtype_of_the_module(
    implementation: str, total: float
) -> None:
    """256 + 1 is 256 in bfloat16, and 256 + 2 is 258: eager adds expert by expert."""
    model = expert_model("mixtral", torch.bfloat16, implementation)
    experts = experts_of(model)[0]
    module: Any = experts.module
    # h of every neuron is silu(32) * 1 / 24; the experts' outputs are 256, 1 and 1.
    module.gate_up_proj[:, :WIDTH] = 32 / HIDDEN
    module.gate_up_proj[:, WIDTH:] = 1 / HIDDEN
    for e, value in enumerate((256.0, 1.0, 1.0)):
        module.down_proj[e] = 0
        module.down_proj[e, :, 0] = value / 32
    x = torch.ones(1, HIDDEN, dtype=torch.bfloat16)
    index, weights = torch.tensor([[2, 0, 1]]), torch.ones(1, 3, dtype=torch.bfloat16)
    assert module(x, index, weights).tolist() == [[total] * HIDDEN]
    assert experts.formula(x, index, weights).tolist() == [[total] * HIDDEN]


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@torch.no_grad()
def test_a_norm_behind_every_expert_belongs_to_the_description(implementation: str) -> None:
    model = expert_model("qwen3", implementation=implementation)
    module = model.model.layers[0].mlp.experts
    module.has_post_expert_norm, module.post_expert_norm = True, nn.LayerNorm(HIDDEN).eval()
    experts = experts_of(model)[0]
    given = arguments(experts, 5, 8, 2, torch.float32)
    torch.testing.assert_close(experts.formula(*given), module(*given))
    assert experts.uncalled() == []


class FloatSums(nn.Module):
    """Experts whose eager sum is in float32, as those of some models."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = like.gate_up_proj, like.down_proj
        self.act_fn = like.act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states, dtype=torch.float32)
        for e in range(len(self.down_proj)):
            token, k = (top_k_index == e).nonzero(as_tuple=True)
            both = nn.functional.linear(hidden_states[token], self.gate_up_proj[e])
            gate, up = both.chunk(2, dim=-1)
            y = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[e])
            out.index_add_(0, token, (y * top_k_weights[token, k, None]).float())
        return out.to(hidden_states.dtype)


def test_an_eager_sum_in_float32_is_told_from_one_in_the_dtype_of_the_model() -> None:
    model = expert_model("mixtral", torch.bfloat16, "eager")
    assert experts_of(model)[0].sums_in is None
    for layer in model.model.layers:
        layer.mlp.experts = FloatSums(layer.mlp.experts).eval()
    assert experts_of(model)[0].sums_in == torch.float32


# --- gates of their own ----------------------------------------------------------------------


def gated(own: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """A Mixtral whose experts' h is `own(gate, up)`, in every implementation."""
    model = expert_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts._apply_gate = lambda both: own(*both.chunk(2, dim=-1))
    return model


@pytest.mark.parametrize("limit", [7.0, 40.0, 300.0])
def test_a_clamp_makes_a_gate_of_its_own(limit: float) -> None:
    silu = nn.functional.silu
    model = gated(lambda gate, up: silu(gate.clamp(max=limit)) * up.clamp(-limit, limit))
    experts = experts_of(model)[0]
    assert (experts.activation, experts.neutral) == (None, 1.0)
    # More rows than go through the function at a time.
    gate, up = torch.randn(3001, WIDTH) * 200, torch.randn(3001, WIDTH) * 200
    factor = up.clamp(-limit, limit)
    torch.testing.assert_close(experts.act(gate), silu(gate.clamp(max=limit)))
    torch.testing.assert_close(experts.factor(up), factor)
    torch.testing.assert_close(experts.own_h(gate, up), silu(gate.clamp(max=limit)) * factor)


def test_up_with_an_offset_makes_a_gate_of_its_own() -> None:
    experts = experts_of(expert_model("gpt_oss"))[0]
    assert (experts.activation, experts.neutral, experts.interleaved) == (None, 0.0, True)
    gate, up = torch.randn(3001, WIDTH), 5 * torch.randn(3001, WIDTH)
    near = gate.clamp(max=1.5)
    torch.testing.assert_close(experts.act(gate), near * torch.sigmoid(1.702 * near))
    torch.testing.assert_close(experts.factor(up), up.clamp(-1.5, 1.5) + 1)
    h = near * torch.sigmoid(1.702 * near) * (up.clamp(-1.5, 1.5) + 1)
    torch.testing.assert_close(experts.own_h(gate, up), h)


def test_an_h_that_is_no_product_is_refused() -> None:
    model = gated(lambda gate, up: torch.sigmoid(gate + up))
    assert "no product of an activation of gate and a factor of up" in reason(model)


@pytest.mark.parametrize(
    ("name", "module"),
    [("gelu", nn.GELU()), ("gelu_tanh", nn.GELU(approximate="tanh")), ("relu", nn.ReLU())],
)
def test_other_activations_are_told_apart(name: str, module: nn.Module) -> None:
    model = expert_model("qwen3", implementation="eager")
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = module.eval()
    assert [experts.activation for experts in experts_of(model)] == [name, name]


# --- why not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_another_forward_is_seen_by_the_self_check(layer: int) -> None:
    model = expert_model("qwen3")
    module = model.model.layers[layer].mlp.experts
    module.forward = lambda *given: 2 * type(module).forward(module, *given)
    assert "are not down(h)" in reason(model, layer)
    experts, _ = find_experts(1 - layer, "x", model.model.layers[1 - layer])
    assert experts is not None


def test_a_clamp_in_a_forward_of_its_own_is_seen_by_the_self_check() -> None:
    model = expert_model("mixtral", implementation="eager")
    module = model.model.layers[0].mlp.experts
    with torch.no_grad():
        module.gate_up_proj.mul_(5)
    assert find_experts(0, "x", model.model.layers[0])[0] is not None

    def clamped(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return type(module).forward(module, x.clamp(-20, 20), index, weights)

    module.forward = clamped
    assert "are not down(h)" in reason(model)


def test_what_cannot_be_read_or_run_is_refused() -> None:
    model = expert_model("qwen3", implementation="eager")
    assert "train mode" in reason(model.train())
    module = model.eval().model.layers[0].mlp.experts
    module._is_expert_parallel = True
    assert "spread over devices" in reason(model)
    module._is_expert_parallel = False
    # Attribution reads them in float64, too; what counts does not.
    module.double()
    assert find_experts(0, "layers.0", model.model.layers[0])[0] is not None
    assert "float64 weights" in inspect_layers(model.double())[0].reason
    module.float().gate_up_proj = nn.Parameter(
        torch.zeros(8, 2 * WIDTH, HIDDEN, dtype=torch.int8), requires_grad=False
    )
    assert "quantised (torch.int8)" in reason(model)
    module.to("meta")
    assert "offloaded" in reason(model)


def test_other_kinds_of_experts_are_named() -> None:
    model = expert_model("qwen3")
    mlp = model.model.layers[0].mlp
    mlp.more = expert_model("mixtral").model.layers[0].mlp.experts
    assert reason(model) == "2 sets of experts (mlp.experts, mlp.more), not one"
    del mlp.more
    own, mlp.experts = mlp.experts, nn.ModuleList([nn.Linear(2, 2)])
    assert reason(model) == "its experts are a list of modules (mlp.experts), not parameters of one"
    mlp.experts = nn.Linear(2, 2)
    assert reason(model) == "its experts (mlp.experts) have other weights"
    mlp.experts = own
    own.forward = lambda *given: 1 / 0
    assert reason(model) == "its experts cannot be run alone: division by zero"
    model.model.layers[0].mlp = nn.Linear(HIDDEN, HIDDEN)
    assert reason(model) == "no experts"
    model = expert_model("llama4")
    del model.model.layers[0].feed_forward.experts.act_fn
    assert reason(model) == "its experts have no activation of a known name"


@pytest.mark.parametrize(
    ("config", "extra", "activation", "call"),
    [
        (
            "DbrxConfig",
            {
                "d_model": 32,
                "n_heads": 4,
                "n_layers": 2,
                "max_seq_len": 64,
                "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
                "ffn_config": {
                    "ffn_hidden_size": WIDTH,
                    "hidden_size": 32,
                    "moe_num_experts": 4,
                    "moe_top_k": 2,
                },
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "silu",
            "routed",
        ),
        (
            "NemotronHConfig",
            {
                "hidden_size": 32,
                "layers_block_type": ["moe", "moe"],
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "n_routed_experts": 4,
                "moe_intermediate_size": WIDTH,
                "moe_latent_size": 16,
                "moe_shared_expert_intermediate_size": 24,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
            },
            "relu2",
            "routed",
        ),
        (
            "LongcatFlashConfig",
            {
                "hidden_size": 32,
                "ffn_hidden_size": 24,
                "num_layers": 2,
                "num_attention_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
                "n_routed_experts": 4,
                "zero_expert_num": 3,
                "expert_ffn_hidden_size": WIDTH,
                "moe_topk": 2,
            },
            "silu",
            "routed",
        ),
    ],
)
def test_flat_weights_experts_without_gate_and_identities_are_taken(
    config: str, extra: dict[str, Any], activation: str | None, call: str
) -> None:
    import transformers

    made = getattr(transformers, config)(**extra, vocab_size=96)
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    blocks = next(
        m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 2
    )
    found = [find_experts(i, f"layers.{i}", block) for i, block in enumerate(blocks)]
    for experts, why in found:
        assert experts is not None, why
        assert (experts.activation, experts.call) == (activation, call)
        assert (experts.n_experts, experts.expert_width) == (4, WIDTH)


# --- tables ----------------------------------------------------------------------------------


def test_a_table_by_neuron_and_one_by_expert_are_the_same() -> None:
    experts = experts_of(expert_model("mixtral"))[0]
    by_neuron = torch.arange(3 * experts.width).view(3, experts.width)
    by_expert = experts.fold(by_neuron)
    assert by_expert.shape == (experts.n_experts * 3, WIDTH)
    for condition, e, f in ((0, 0, 0), (2, 3, 5), (1, 2, WIDTH - 1)):
        assert by_expert[e * 3 + condition, f] == by_neuron[condition, e * WIDTH + f]
    assert torch.equal(experts.unfold(by_expert), by_neuron)
