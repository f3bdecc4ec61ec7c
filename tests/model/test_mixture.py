"""Layers with experts as residual streams: what is found in them, and what is refused with why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.stream.mixture import ExpertMember, MlpMember
from relneuron.model.stream.read import read_residual_model
from relneuron.model.stream.trace import trace
from tests.kit.experts import FAMILIES, HIDDEN, WIDTH, expert_model

CASES = [(family, "eager") for family in FAMILIES] + [
    (family, implementation)
    for family in ("qwen2", "deepseek", "gpt_oss")
    for implementation in ("batched_mm", "grouped_mm")
]


def why_refused(model: Any) -> str:
    with pytest.raises(RelneuronError, match="cannot be attributed") as caught:
        read_residual_model(model)
    return caught.value.cause


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_the_members_of_each_layer(family: str, implementation: str) -> None:
    model = expert_model(family, implementation=implementation)
    residual = read_residual_model(model)
    _, _, n_experts, _ = FAMILIES[family]
    for layer, block in zip(residual.layers, model.model.layers, strict=True):
        first, *others = layer.mixture
        assert isinstance(first, ExpertMember) and layer.experts is first
        assert (first.n_experts, first.width, first.start, first.factor) == (n_experts, WIDTH, 0, 1)
        assert first.norm is not None
        assert first.norm.module is block.post_attention_layernorm
        assert layer.n_neurons == n_experts * WIDTH + sum(m.n_neurons for m in others)
        assert len(others) == (family in ("qwen2", "deepseek", "llama4"))
        for member in others:
            assert isinstance(member, MlpMember) and member.start == n_experts * WIDTH
            weight = block.mlp.shared_expert_gate if family == "qwen2" else None
            assert member.weight is weight
    assert bool(residual.no_heads) == (family == "jetmoe")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_layer_may_add_up_its_experts_and_its_mlp_itself(dtype: torch.dtype) -> None:
    """Granite 4: no module gives the sum, which is multiplied before it is added."""
    transformers = pytest.importorskip("transformers")
    granite = expert_model("granite").config
    config = transformers.GraniteMoeSharedConfig(
        **{**granite.to_dict(), "shared_intermediate_size": 40, "residual_multiplier": 0.3}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.config._experts_implementation = "eager"
    residual = read_residual_model(model)
    layer, ids = residual.layers[1], [5, 6, 7, 8]
    block = model.model.layers[1]
    assert layer.ffn.factor == 0.3 and layer.ffn.also is block.shared_mlp.output_linear
    found = trace(residual, [ids])
    index = layer.mixture[1].start + 3
    written = found.ffn_coefficient(layer, 0, index) * layer.ffn_value(index).double()
    outputs: list[Tensor] = []

    def see(_module: Any, _args: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        outputs.append(state.view(4, -1)[-1].double())

    handle = block.register_forward_hook(see)
    model(torch.tensor([ids]))
    block.shared_mlp.output_linear.weight[:, 3] = 0
    model(torch.tensor([ids]))
    handle.remove()
    near = 4 * torch.finfo(dtype).eps * float(outputs[0].abs().max())
    torch.testing.assert_close(outputs[0] - outputs[1], written, rtol=0, atol=max(near, 1e-7))
    assert dtype == torch.bfloat16 or float(written.abs().max()) > 10 * near


@pytest.mark.parametrize("factor", [2.5, 0.125])
def test_what_experts_give_may_be_multiplied_with_what_the_model_says(factor: float) -> None:
    model = expert_model("qwen2", torch.float64, "eager")
    for layer in model.model.layers:
        own = layer.mlp.experts.forward
        layer.mlp.scaling = factor  # as Laguna's `routed_scaling_factor`
        scaled(layer.mlp, "experts", factor)
        assert layer.mlp.experts.inner.forward == own
    residual = read_residual_model(model)
    for layer in residual.layers:
        assert [member.factor for member in layer.mixture] == [factor, 1.0]
    for layer in model.model.layers:
        layer.mlp.scaling = 1.5
    assert "what its experts and its MLPs give is not added up" in why_refused(model)


def scaled(block: nn.Module, name: str, factor: float) -> None:
    """What a module in a block gives is multiplied behind it, by a module that has no number."""

    class Behind(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *given: Tensor) -> Tensor:
            y: Tensor = self.inner(*given)
            return y * factor

    setattr(block, name, Behind(getattr(block, name)).eval())


def break_down(model: Any) -> None:
    down = model.model.layers[1].mlp.shared_expert.down_proj
    own = down.forward
    down.forward = lambda x: own(x) * 1.01


def break_weight(model: Any) -> None:
    gate = model.model.layers[1].mlp.shared_expert_gate
    gate.forward = lambda x: 2 * nn.functional.linear(x, gate.weight)


def break_block(model: Any) -> None:
    block = model.model.layers[1].mlp
    own = block.forward
    block.forward = lambda x: own(x) * 1.01


def read_another_stream(model: Any) -> None:
    block = model.model.layers[1].mlp
    own = block.experts.forward
    other = nn.LayerNorm(HIDDEN, elementwise_affine=False)
    pre = lambda _, args: (other(args[0]) * args[0][:, :1], *args[1:])  # noqa: E731
    block.experts.register_forward_pre_hook(pre)
    assert own == block.experts.forward


def break_experts(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    own = experts.forward
    experts.forward = lambda *given: own(*given) * 1.01


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (break_down, "in layer 1 neurons @ value vectors + bias = FFN write does not hold"),
        (break_block, "layer 1: what its experts and its MLPs give is not added up by one module"),
        (break_experts, "layer 0: its experts are not down(h)"),
        (read_another_stream, "layer 1: its experts read neither the stream nor a norm of it"),
    ],
)
def test_a_part_with_another_formula_is_named(fault: Callable[[Any], None], reason: str) -> None:
    model = expert_model("qwen2", implementation="eager")
    fault(model)
    assert reason in why_refused(model)


def test_a_map_to_one_number_is_taken_as_it_answers() -> None:
    """What weighs an MLP is read of the map itself, so its own formula is not asked for."""
    model = expert_model("qwen2", torch.float64, "eager")
    break_weight(model)
    residual = read_residual_model(model)
    ids = [5, 6, 7, 8]
    outputs: list[Tensor] = []
    gate = model.model.layers[1].mlp.shared_expert_gate
    handle = gate.register_forward_hook(lambda _m, _a, output: outputs.append(output.detach()))
    found = trace(residual, [ids])
    handle.remove()
    want = outputs[0].view(1, 4, 1).sigmoid().double()
    torch.testing.assert_close(found.sent[1][1].scale, want)


def test_experts_that_cannot_be_read_are_refused() -> None:
    model = expert_model("mixtral", implementation="eager")
    experts = model.model.layers[1].mlp.experts
    experts.has_post_expert_norm = True
    experts.post_expert_norm = nn.Identity().eval()
    assert "layer 1: what each of its experts gives goes through a norm" in why_refused(model)
    del experts.has_post_expert_norm
    weight = experts.down_proj
    experts.down_proj = nn.Parameter(weight.data.to(torch.int8), requires_grad=False)
    assert "quantised (torch.int8)" in why_refused(model)
    experts.down_proj = nn.Parameter(weight.data.to("meta"))
    assert "offloaded" in why_refused(model)
    experts.down_proj = weight
    read_residual_model(model)
    assert "train mode" in why_refused(model.train())


def test_experts_that_are_called_twice_are_refused() -> None:
    model = expert_model("mixtral", implementation="eager")
    block = model.model.layers[1].mlp
    own = block.forward

    def forward(x: Tensor) -> Tensor:
        own(x)
        return own(x)  # type: ignore[no-any-return]

    block.forward = forward
    assert "layer 1: a forward calls its experts 2 times" in why_refused(model)


def test_a_router_that_passes_tokens_by_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "LongcatFlashConfig"):
        pytest.skip("this transformers has no LongCat")
    from bench.zoo import build

    model = build.build("causal", "longcat_flash")
    assert "its router may pass a token by the experts" in why_refused(model)


def test_files_name_the_routed_experts_where_others_of_their_kind_are_beside_them() -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "InklingTextConfig"):
        pytest.skip("this transformers has no Inkling")
    from bench.zoo import build

    shape = model_shape(find_mlps(build.build("causal", "inkling_text")))
    assert shape["experts"] == [4] * 4 and shape["width"] == 5 * shape["expert_width"]
