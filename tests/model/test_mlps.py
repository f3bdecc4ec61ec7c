"""MLPs of every shape are found, and what is counted and switched off in them is right.

The oracle is the module itself: each says in plain torch what its gate, up, activation and product
are, and can zero its own outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import relneuron
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import Shape
from relneuron.model.load import describe_model
from relneuron.model.mlps import candidates
from relneuron.model.mlps.find import find_mlps, inspect_layers
from relneuron.model.mlps.shape import model_shape
from relneuron.model.states import LayerState, mask_states
from tests.conftest import tiny_model

D, WIDTH, LAYERS = 32, 48, 3  # of tiny_model("llama")
_SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


class Odd(nn.Module):
    """An MLP; `off` has outputs that are zero, (site, index), as its own forward makes them."""

    gated = True

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.one = nn.Linear(D, width, bias=False)
        self.two = nn.Linear(D, width, bias=False)
        self.three = nn.Linear(width, D, bias=False)
        self.act_fn: Any = nn.SiLU()
        self.off: list[tuple[str, int]] = []
        self.seen: dict[str, Tensor] = {}

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.one(x), self.two(x)

    def activate(self, gate: Tensor) -> Tensor:
        return self.act_fn(gate)

    def write(self, product: Tensor) -> Tensor:
        return self.three(product)

    def _zeroed(self, x: Tensor, site: str) -> Tensor:
        found = [index for name, index in self.off if name == site]
        return x.index_fill(-1, torch.tensor(found, dtype=torch.int64), 0.0) if found else x

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x)
        gate = self._zeroed(gate, "gate")
        act = self.activate(gate)
        self.seen = {"gate": gate, "act": act}
        if up is not None:
            up = self._zeroed(up, "up")
            self.seen |= {"up": up, "product": act * up}
        return self._zeroed(self.write(act if up is None else act * up), "down")


class Functional(Odd):
    def activate(self, gate: Tensor) -> Tensor:
        return F.gelu(gate)


class Packed(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(D, 2 * WIDTH)
        del self.two

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        gate, up = self.one(x).chunk(2, dim=-1)
        return gate, up


class UpFirst(Packed):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        up, gate = self.one(x).chunk(2, dim=-1)
        return gate, up


class Interleaved(Packed):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        both = self.one(x)
        return both[..., ::2], both[..., 1::2]


class Ungated(Odd):
    gated = False

    def __init__(self) -> None:
        super().__init__()
        self.two, self.act_fn = nn.Identity(), nn.GELU(approximate="tanh")

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.one(x), None


class Leaky(Ungated):
    """An activation that no kernel has."""

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.LeakyReLU()


class Scaled(Odd):
    """Multipliers on the way, as in Falcon-H1."""

    def activate(self, gate: Tensor) -> Tensor:
        return self.act_fn(gate * 0.7)

    def write(self, product: Tensor) -> Tensor:
        return self.three(product) * 1.3


class Clamped(Odd):
    """A clamp of large numbers, as in DeepSeek-V4."""

    def activate(self, gate: Tensor) -> Tensor:
        return self.act_fn(gate.clamp(max=2.0))


class Normed(Odd):
    """A norm before down, as in BitNet."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)

    def write(self, product: Tensor) -> Tensor:
        return self.three(self.norm(product))


class Sparse(Odd):
    """Only the largest gates of a token pass, as in Gemma 3n."""

    def activate(self, gate: Tensor) -> Tensor:
        least = gate.mean(-1, keepdim=True) + 0.3 * gate.std(-1, keepdim=True)
        return self.act_fn(F.relu(gate - least))


class Doubled(Odd):
    """The formula, and then twice what it gives."""

    def write(self, product: Tensor) -> Tensor:
        return 2 * self.three(product)


SHAPES: dict[type[Odd], tuple[str | None, bool]] = {
    Odd: ("silu", True),
    Functional: ("gelu", True),
    Packed: ("silu", True),
    UpFirst: ("silu", True),
    Interleaved: ("silu", True),
    Ungated: ("gelu_tanh", True),
    Leaky: (None, False),
    Scaled: (None, False),
    Clamped: (None, False),
    Normed: ("silu", False),
    Sparse: (None, False),
    Doubled: ("silu", False),
}


def model_of(make: Callable[[], Odd], dtype: torch.dtype = torch.float32) -> Any:
    """A tiny Llama with other MLPs."""
    model = tiny_model("llama")
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = make()
        for parameter in layer.mlp.parameters():
            nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 1.0, 0.2)
    return model.to(dtype).eval()


def batch() -> tuple[Tensor, Tensor]:
    """Ids and a mask, the first row with padding on the left."""
    ids = torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


@pytest.mark.parametrize("make", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_shape_is_found_counted_and_switched_off(make: type[Odd], dtype: torch.dtype) -> None:
    model = model_of(make, dtype)
    activation, is_whole = SHAPES[make]
    if make is Normed:
        activation = None  # its product is what the norm reads
    mlps = find_mlps(model)
    assert [mlp.layer for mlp in mlps] == [0, 1, 2]
    assert {(mlp.activation, mlp.is_whole, mlp.is_gated) for mlp in mlps} == {
        (activation, is_whole, make.gated)
    }
    ids, mask = batch()
    with torch.no_grad():
        clean = model(ids, attention_mask=mask).logits
    sites = ("gate", "up", "act", "product") if make.gated else ("gate", "act")
    with torch.no_grad(), relneuron.instrument(model, 2, sites=sites) as probe:
        probe.batch(mask, [0, 1])
        model(ids, attention_mask=mask)
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for layer, stats in zip(model.model.layers, probe.stats, strict=True):
        assert stats.tokens.tolist() == [4, 7]
        for site in sites:
            active = (layer.mlp.seen[site].float() > 0) & mask.bool().unsqueeze(-1)
            assert torch.equal(stats.count[site], active.sum(1)), site

    off = [(0, "gate", 0), (0, "down", 5), (1, "gate", WIDTH - 1), (2, "gate", 7), (2, "gate", 8)]
    off += [(1, "up", 3), (2, "up", 7)] if make.gated else []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.off = [(site, index) for where, site, index in off if where == number]
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
    for layer in model.model.layers:
        layer.mlp.off = []
    with torch.no_grad(), relneuron.ablate(model, off):
        found = model(ids, attention_mask=mask).logits
    assert not torch.equal(wanted, clean)
    bound = 16 * torch.finfo(dtype).eps * float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= (bound if is_whole else 0)
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, clean)
    assert not any("forward" in module.__dict__ for module in model.modules())


class Wild(Odd):
    """A clamp inside of a function: nobody sees its activation."""

    def activate(self, gate: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=1.0))


def test_what_cannot_be_proved_is_refused_by_name() -> None:
    model = model_of(Odd)
    model.model.layers[1].mlp = Wild()
    model.eval()
    verdicts = inspect_layers(model)
    assert [bool(verdict.mlps) for verdict in verdicts] == [True, False, True]
    assert verdicts[1].reason == (
        "model.layers.1.mlp is not down(activation(gate(x)) * up(x)), and calls no module for its "
        "activation"
    )
    with pytest.raises(RelneuronError, match="layers 1: model.layers.1.mlp is not down") as caught:
        find_mlps(model)
    assert "2 of 3 layers have a supported MLP" in caught.value.cause


def test_what_was_found_is_looked_at_again_only_where_it_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, watched = model_of(Odd), []
    watch = candidates.watch
    monkeypatch.setattr(candidates, "watch", lambda *given: watched.append(1) or watch(*given))
    mlps = find_mlps(model)
    assert find_mlps(model) == mlps and len(watched) == 1
    model.model.layers[1].mlp.activate = F.relu  # no module of the model is another one
    assert [mlp.activation for mlp in find_mlps(model)] == ["silu", "relu", "silu"]
    model.model.layers[2].mlp = Packed().eval()
    assert find_mlps(model)[2].gate.module is model.model.layers[2].mlp.one
    assert "float64 weights" in inspect_layers(model.double())[0].reason
    assert len(watched) == 4


class NormOnly(Ungated):
    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.RMSNorm(WIDTH)


def test_a_norm_is_no_activation() -> None:
    verdicts = inspect_layers(model_of(NormOnly))
    assert not any(verdict.mlps or verdict.passed for verdict in verdicts)


class GatedNorm(nn.Module):
    """A norm that is multiplied by what a small MLP makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D)
        self.one, self.two = nn.Linear(D, 8), nn.Linear(8, D)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x * torch.sigmoid(self.two(self.act_fn(self.one(x))))


def test_what_does_not_write_into_the_stream_is_no_mlp() -> None:
    model = model_of(Odd)
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = GatedNorm(), GatedNorm()
    paths = [mlp.path for mlp in find_mlps(model.eval())]
    assert paths == [f"model.layers.{i}.mlp" for i in range(LAYERS)]


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def uneven() -> Any:
    """Layers of different width, one without an MLP."""
    model = model_of(Odd)
    model.model.layers[0].mlp = Odd(40)
    model.model.layers[1].mlp = Nothing()
    return model.eval()


def test_layers_may_differ_in_width_or_have_no_mlp() -> None:
    model = uneven()
    verdicts = inspect_layers(model)
    assert [verdict.passed for verdict in verdicts] == [False, True, False]
    assert "no MLP (linear maps: self_attn.q_proj" in verdicts[1].reason
    mlps = find_mlps(model)
    assert [(mlp.layer, mlp.width) for mlp in mlps] == [(0, 40), (2, WIDTH)]
    shape = model_shape(mlps)
    assert shape == {"layers": 3, "width": WIDTH, "hidden": D, "widths": [40, 0, WIDTH]}
    with pytest.raises(RelneuronError, match="width 48, hidden 32, 40 of them in this layer"):
        mask_states([[(0, "gate", 40)]], mlps)
    with pytest.raises(RelneuronError, match="0 of them in this layer"):
        mask_states([[(1, "down", 0)]], mlps)


def test_experts_come_before_the_other_mlps_of_a_layer() -> None:
    import transformers

    made = transformers.Qwen2MoeConfig(
        **_SMALL,
        num_key_value_heads=2,
        num_experts=4,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=12,
        mlp_only_layers=[0],
    )
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    mlps = find_mlps(model)
    assert [(mlp.layer, mlp.offset, mlp.width) for mlp in mlps] == [
        (0, 0, 24),
        (1, 0, 32),
        (1, 32, 12),
    ]
    shape = model_shape(mlps)
    assert shape == {
        "layers": 2,
        "width": 44,
        "hidden": 16,
        "widths": [24, 44],
        "experts": [0, 4],
        "expert_width": 8,
    }
    order = Shape.of(shape)
    names = [order.name(*neuron) for neuron in ((0, "up", 9), (1, "up", 9), (1, "gate", 33))]
    assert names == ["L0.up.9", "L1 expert 1 up 1", "L1 shared gate 1"]


def test_a_layer_that_text_does_not_run_never_ran() -> None:
    import transformers
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 1}
    made = MllamaTextConfig(
        **_SMALL | {"num_hidden_layers": 3} | tokens, cross_attention_layers=[1]
    )
    model = transformers.MllamaForCausalLM(made).eval()
    mlps = find_mlps(model)
    assert [mlp.runs for mlp in mlps] == [True, False, True]
    assert model_shape(mlps)["widths"] == [24, 0, 24]
    ids = torch.arange(1, 5)[None]
    with torch.no_grad(), relneuron.instrument(model, 1) as probe:
        probe.batch(torch.ones_like(ids))
        model(ids)
    assert [stats.tokens.tolist() for stats in probe.stats] == [[4], [0], [4]]


def test_a_vision_tower_is_not_taken_for_the_language_model() -> None:
    """It has as many layers, and more parameters."""
    import transformers

    text = _SMALL | {"num_key_value_heads": 2, "head_dim": 8}
    tower = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=tower, mm_tokens_per_image=4, image_token_id=9
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    towers, layers = (
        sum(p.numel() for p in part.parameters())
        for part in (model.model.vision_tower, model.model.language_model.layers)
    )
    assert towers > layers
    mlps = find_mlps(model)
    assert [mlp.path for mlp in mlps] == [f"model.language_model.layers.{i}.mlp" for i in range(2)]


def test_numbers_past_the_range_of_a_dtype_are_no_other_formula() -> None:
    llama = tiny_model("llama", torch.float16, initializer_range=1.0)
    mlp = find_mlps(llama)[0]
    x = 100 * torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0)).half()
    assert mlp.is_whole and not mlp.module(x).isfinite().all()


def test_train_mode_and_weights_that_cannot_be_called_are_refused(llama: Any) -> None:
    assert "train mode" in inspect_layers(llama.train())[0].reason
    llama.eval()
    gate = llama.model.layers[0].mlp.gate_proj
    weight = gate.weight
    gate.weight = nn.Parameter(weight.data.char(), requires_grad=False)
    with pytest.raises(RelneuronError, match="the quantised model cannot run one token"):
        inspect_layers(llama)
    gate.weight = weight
    llama.model.layers[1].mlp.to("meta")
    assert "not in memory (on the meta device)" in inspect_layers(llama)[1].reason


def test_states_without_neurons_have_no_masks(llama: Any) -> None:
    mlps = find_mlps(llama)
    assert mask_states([[]], mlps) == [LayerState()] * 3


def test_another_weight_or_config_is_another_model(llama: Any) -> None:
    def digest() -> object:
        return describe_model("any name", llama, find_mlps(llama), "auto")["digest"]

    before = digest()
    llama.config.name_or_path = "elsewhere"
    assert digest() == before
    llama.config.rms_norm_eps *= 10
    assert (other := digest()) != before
    with torch.no_grad():
        llama.model.norm.weight[0] += 1
    assert digest() not in (before, other)
