"""Gains of experts' neurons against the model itself, each of them removed by plain hooks.

The other side (tests/kit/experts.py) computes the experts of a family by what it says of them.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from relneuron.ablation.rows import intervene, off
from relneuron.artifact.files import RelneuronError
from relneuron.methods.gains.comparison import METHODS, Sizes, choose, plan
from relneuron.methods.gains.scores import TargetRanks, query_scores, traced_scores
from relneuron.methods.gains.values import ValueScores, value_scores
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.stream.parts import ResidualModel
from relneuron.model.stream.read import read_residual_model
from relneuron.model.stream.trace import Trace, trace
from tests.kit.darkened import log_p
from tests.kit.experts import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    WIDTH,
    expert_model,
    in_plain_torch,
    routes_itself,
    weights_of,
)

IDS = [7, 20, 33, 41, 50, 11]
# Family -> the last map of the MLP that stands beside its experts.
BESIDE = {
    "qwen2": "mlp.shared_expert.down_proj",  # times the sigmoid of a map to one number
    "deepseek": "mlp.shared_experts.down_proj",
    "llama4": "feed_forward.shared_expert.down_proj",
}
OF_GAINS = ("qwen2", "deepseek", "llama4", "gpt_oss", "mixtral", "jetmoe", "granite")


class Scored(NamedTuple):
    family: str
    residual: ResidualModel
    found: Trace
    target: Tensor
    ours: ValueScores

    @property
    def blocks(self) -> Any:
        return self.residual.model.model.layers

    def beside(self, layer: int) -> Any:
        """The last map of the layer's MLP beside the experts, or None."""
        path = BESIDE.get(self.family)
        return None if path is None else self.blocks[layer].get_submodule(path)

    @property
    def n_routed(self) -> int:
        return FAMILIES[self.family][2] * WIDTH

    def sent(self, layer: int) -> Tensor:
        """(F,) bool: the neurons that the last token went through, by the model's own router."""
        experts: list[tuple[Any, ...]] = []
        member = self.residual.layers[layer].experts
        assert member is not None
        module: Any = member.experts.module
        handle = module.register_forward_pre_hook(lambda _, args: experts.append(args))
        with torch.no_grad():
            self.residual.model(torch.tensor([IDS]))
        handle.remove()
        n_experts, last = self.n_routed // WIDTH, len(IDS) - 1
        is_sent = torch.zeros(n_experts, dtype=torch.bool)
        if self.family == "llama4":
            is_sent[:] = experts[0][0].view(n_experts, len(IDS), -1)[:, last].any(1)
        elif routes_itself(module):
            _, token, _, sizes, _ = module.router(experts[0][0].reshape(len(IDS), -1))
            for e, tokens in enumerate(token.split(sizes)):
                is_sent[e] = last in tokens.tolist()
        else:
            is_sent[experts[0][1].view(len(IDS), -1)[last]] = True
        own = is_sent.repeat_interleave(WIDTH)
        n_beside = self.residual.layers[layer].n_neurons - self.n_routed
        return torch.cat([own, torch.ones(n_beside, dtype=torch.bool)])


def of_family(family: str, dtype: torch.dtype = torch.float64) -> Any:
    return expert_model(family, dtype, "eager")


@pytest.fixture(scope="module", params=OF_GAINS)
def scored(request: pytest.FixtureRequest) -> Scored:
    residual = read_residual_model(of_family(request.param))
    found = trace(residual, [IDS])
    target = found.logits.argsort(1, descending=True)[:, 2]
    ours = value_scores(residual, found, target, ffn="exact", attention=None, top=60)
    return Scored(request.param, residual, found, target, ours)


@torch.no_grad()
def states(scored: Scored, layer: int) -> tuple[Tensor, Tensor]:
    """The last token's state before the experts (D,), and behind the layer (N + 1, D).

    Row n without neuron n of the layer, the last row with all of them.
    """
    n_neurons, n_routed = scored.residual.layers[layer].n_neurons, scored.n_routed
    n_tokens, seen = len(IDS), {}

    def change(site: str, e: int, tokens: Tensor, values: Tensor) -> Tensor:
        if site != "product":
            return values
        neuron = tokens // n_tokens - e * WIDTH
        here = (neuron >= 0) & (neuron < WIDTH)
        values = values.clone()
        values[here.nonzero()[:, 0], neuron[here]] = 0
        return values

    def without(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        h = args[0].clone()
        rows = h.view(n_neurons + 1, n_tokens, -1)
        numbers = torch.arange(n_neurons - n_routed)
        rows[n_routed + numbers, :, numbers] = 0
        return (h,)

    def before(_: Any, args: tuple[Tensor]) -> None:
        seen["r"] = args[0][-1, -1]

    def behind(_: Any, _args: Any, output: Any) -> None:
        seen["after"] = (output[0] if isinstance(output, tuple) else output)[:, -1]

    block = scored.blocks[layer]
    with ExitStack() as stack:
        changes = [change if i == layer else None for i in range(LAYERS)]
        stack.enter_context(in_plain_torch(scored.family, scored.residual.model, changes=changes))
        handles = [
            block.post_attention_layernorm.register_forward_pre_hook(before),
            block.register_forward_hook(behind),
        ]
        if scored.beside(layer) is not None:
            handles.append(scored.beside(layer).register_forward_pre_hook(without))
        for handle in handles:
            stack.callback(handle.remove)
        scored.residual.model(torch.tensor([IDS] * (n_neurons + 1)), use_cache=False)
    return seen["r"], seen["after"]


def test_every_neuron_has_the_gain_of_what_the_model_adds_with_it(scored: Scored) -> None:
    end, own, target = scored.found.h[-1][0, -1], scored.found.logits[0], int(scored.target)
    for layer in scored.residual.layers:
        r, after = states(scored, layer.layer)
        lost = after[-1] - after[:-1]
        gain, base = (log_p(scored.residual, y, end, own, target) for y in (r + lost, r[None]))
        assert scored.ours.ffn_neuron is not None
        ours = scored.ours.ffn_neuron[0, layer.layer]
        assert float((ours - (gain - base)).abs().max()) < 1e-6
        assert float((gain - base).abs().max()) > 1e-2
        sent = scored.sent(layer.layer)
        assert sent.sum() < len(sent) and not ours[~sent].any()
        for index in [0, *sent.nonzero()[::29, 0].tolist(), len(sent) - 1]:
            factor = scored.found.ffn_coefficient(layer, 0, index)
            assert (factor != 0) == bool(sent[index])
            torch.testing.assert_close(
                factor * layer.ffn_value(index), lost[index], rtol=0, atol=1e-6
            )


def test_the_largest_are_those_of_the_experts_that_the_token_was_sent_to(scored: Scored) -> None:
    assert scored.ours.ffn_neuron is not None and scored.ours.ffn_top is not None
    gains = scored.ours.ffn_neuron[0].clone()
    for layer in range(LAYERS):
        gains[layer, ~scored.sent(layer)] = -torch.inf
    want = gains.flatten().sort(descending=True).values[:60]
    top = scored.ours.ffn_top
    torch.testing.assert_close(top.gain[0], want, rtol=0, atol=1e-12)
    places = top.layer[0] * gains.shape[1] + top.index[0]
    torch.testing.assert_close(gains.flatten()[places], want, rtol=0, atol=1e-12)
    assert len(set(places.tolist())) == 60 and float(want[-1]) != 0
    every = value_scores(
        scored.residual, scored.found, scored.target, ffn="top", attention=None, top=2000
    ).ffn_top
    assert every is not None
    assert int((every.layer >= 0).sum()) == int((gains > -torch.inf).sum())


def test_an_own_norm_is_of_each_vector(scored: Scored) -> None:
    """The scale of the final norm at x + v, by its own formula."""
    residual, found, target = scored.residual, scored.found, scored.target
    asked: dict[str, Any] = {"ffn": "exact", "attention": None, "own_norm": True, "top": 30}
    ours = value_scores(residual, found, target, **asked)
    assert ours.ffn_neuron is not None and ours.ffn_top is not None
    for layer in residual.layers:
        sent, x = scored.sent(layer.layer), found.r[layer.layer][0, -1]
        values = torch.cat(list(layer.value_blocks())).double()
        factors = [found.ffn_coefficient(layer, 0, k) for k in range(layer.n_neurons)]
        states = torch.cat(
            [x[None], x + torch.tensor(factors, dtype=torch.float64)[:, None] * values]
        )
        scale = (states.square().mean(1) + residual.eps).rsqrt()
        logits = scale[:, None] * (states @ residual.unembed.T)
        logprob = logits.log_softmax(1)[:, target[0]]
        want = logprob[1:] - logprob[0]
        torch.testing.assert_close(ours.ffn_neuron[0, layer.layer], want, rtol=0, atol=1e-9)
        assert not ours.ffn_neuron[0, layer.layer, ~sent].any()
    best = ours.ffn_neuron[0].flatten().max()
    assert float(ours.ffn_top.gain[0, 0]) == pytest.approx(float(best), abs=1e-12)


def test_keys_are_the_rows_of_each_expert_behind_the_norm(scored: Scored) -> None:
    for layer in scored.residual.layers:
        gain = scored.blocks[layer.layer].post_attention_layernorm.weight.detach().double()
        member = layer.experts
        assert member is not None
        index = torch.arange(scored.n_routed)
        parts = [
            weights_of(scored.family, member.experts.module, e)
            for e in range(scored.n_routed // WIDTH)
        ]
        for place, key in enumerate(("gate", "up", "down")):
            rows = torch.cat([own[place] if key != "down" else own[2].T for own in parts])
            torch.testing.assert_close(layer.ffn_keys(key, index), rows.detach() * gain)
        if scored.beside(layer.layer) is not None:
            mlp: Any = scored.beside(layer.layer)
            beside = index[: mlp.weight.shape[1]] + scored.n_routed
            rows = mlp.weight.T.detach() * gain
            torch.testing.assert_close(layer.ffn_keys("down", beside[:5]), rows[:5])
    with pytest.raises(RelneuronError, match="unknown key"):
        scored.residual.layers[0].ffn_keys("q", torch.tensor([0]))


def test_units_read_all_of_the_stream(scored: Scored) -> None:
    asked: dict[str, Any] = {"ffn": None, "attention": "top", "top": 40}
    kinds = {"ffn": scored.ours.ffn_top}
    if not scored.residual.no_heads:
        values = value_scores(scored.residual, scored.found, scored.target, **asked)
        kinds["attention"] = values.attention_top
    for kind, units in kinds.items():
        assert units is not None
        shares = query_scores(scored.residual, scored.found, units, kind=kind, n_units=40)
        total = units.gain[:, :40].sum()
        assert abs(float(shares.layer.sum() - total)) < 1e-6
        assert bool(shares.ffn_neuron.any())
        if scored.family not in ("gpt_oss", "jetmoe"):  # what they write has biases
            left = shares.ffn_neuron.sum(2) - shares.layer[:, 2::2]
            assert float(left.abs().max()) < 1e-6


def test_eight_scores_are_of_the_experts_that_the_token_was_sent_to(scored: Scored) -> None:
    residual, found, target = scored.residual, scored.found, scored.target
    ranks = TargetRanks.of(residual, target)
    known = scored.ours.ffn_neuron
    assert known is not None
    for layer in residual.layers:
        i, sent = layer.layer, scored.sent(layer.layer)
        ours = traced_scores(residual, found, target, i, ranks=ranks, gain=known[:, i])
        values = torch.cat(list(layer.value_blocks())).double()
        assert values.shape == (layer.n_neurons, HIDDEN)
        for method in METHODS:
            assert bool((ours[method][0, ~sent] == -torch.inf).all()), method
            assert bool(ours[method][0, sent].isfinite().all()), method
        torch.testing.assert_close(ours["norm"][0, sent], values.norm(dim=1)[sent])
        logits = values @ residual.unembed.T
        rank = 1 + (logits > logits[:, target]).sum(1)
        torch.testing.assert_close(ours["reciprocal_rank"][0, sent], 1 / rank[sent].double())


def test_interventions_are_those_of_a_model_without_the_value_vectors(scored: Scored) -> None:
    residual, target = scored.residual, int(scored.target)
    top = scored.ours.ffn_top
    assert top is not None
    places = (top.layer[0] * residual.width + top.index[0])[:12].tolist()
    places += [layer.layer * residual.width + layer.n_neurons - 1 for layer in residual.layers]
    edited = copy.deepcopy(residual.model)
    for place in places:
        layer, index = divmod(place, residual.width)
        if index >= scored.n_routed:
            last = edited.model.layers[layer].get_submodule(BESIDE[scored.family])
            last.weight.data[:, index - scored.n_routed] = 0
            continue
        member = residual.layers[layer].experts
        assert member is not None
        names = {id(module): name for name, module in residual.model.named_modules()}
        module: Any = edited.get_submodule(names[id(member.experts.module)])
        weights = member.experts.output.weights(module, member.n_experts)  # (E, F, D), a view
        weights.data[index // WIDTH, index % WIDTH] = 0
    heads = [] if residual.no_heads else [3, 20, HIDDEN + 7]
    for place in heads:
        block = edited.model.layers[place // HIDDEN]
        block.self_attn.o_proj.weight.data[:, place % HIDDEN] = 0
    with torch.no_grad():
        want = edited(torch.tensor([IDS])).logits[0, -1].double()
    offs = [[off()], [off(places, heads)]]
    found = intervene(residual, [IDS], [target], offs, batch_tokens=100)
    logprob = want.log_softmax(0)[target]
    assert found.logprob[1, 0] == pytest.approx(float(logprob), abs=1e-6)
    assert found.rank[1, 0] == 1 + int((want > want[target]).sum())
    assert found.logprob[0, 0] == pytest.approx(
        float(scored.found.logits[0].log_softmax(0)[target]), abs=1e-6
    )
    assert abs(found.logprob[0, 0] - found.logprob[1, 0]) > 1e-3


def test_only_neurons_that_the_token_went_through_are_chosen(scored: Scored) -> None:
    residual, found = scored.residual, scored.found
    top = scored.ours.ffn_top
    assert top is not None
    query = query_scores(residual, found, top, kind="ffn", n_units=10)
    heads = None if residual.no_heads else "top"
    values = value_scores(residual, found, scored.target, attention=heads, top=60)
    sizes = Sizes(9, 5, 20, 15, 1)
    (chosen,) = choose(residual, found, scored.target, values, query, sizes)
    sent = set()
    for layer in range(LAYERS):
        sent |= {layer * residual.width + k for k in scored.sent(layer).nonzero()[:, 0].tolist()}
    for name in (*METHODS, "value_ffn", "query"):
        assert chosen[name] and set(chosen[name]) <= sent, name
    spans = np.array(chosen["sent"]).reshape(-1, 2)
    assert {k for start, stop in spans.tolist() for k in range(start, stop)} == sent
    of_heads = np.zeros((1, LAYERS, residual.n_heads))
    conditions = plan(residual, ["a"], ["t"], [chosen], of_heads, sizes, n_seeds=4)
    drawn = [c.offs[0].ffn.tolist() for c in conditions if c.name.startswith("random.")]
    assert all(len(set(one)) == 9 and set(one) <= sent for one in drawn)
    assert len({tuple(one) for one in drawn}) == 4


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "gpt_oss", "llama4"])
def test_padding_and_company_change_no_number(family: str) -> None:
    residual = read_residual_model(of_family(family, torch.float32))
    assert residual.pads
    asked: dict[str, Any] = {"ffn": "exact", "attention": None, "top": 50}
    lines = [IDS[:3], IDS, [9, 70, 71, 72]]
    together = trace(residual, lines)
    target = together.logits.argmax(1)
    both = value_scores(residual, together, target, **asked)
    for e, line in enumerate(lines):
        alone = value_scores(residual, trace(residual, [line]), target[e : e + 1], **asked)
        torch.testing.assert_close(both.ffn_neuron[e], alone.ffn_neuron[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(both.ffn_top.gain[e], alone.ffn_top.gain[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen2", "llama4"])
def test_sentences_of_several_lengths_are_put_together(family: str) -> None:
    """In float64 each length is a forward of its own."""
    residual = read_residual_model(of_family(family))
    lines = [IDS[:3], IDS, IDS[:2], IDS[2:5]]
    together = trace(residual, lines)
    for layer in residual.layers:
        for e, line in enumerate(lines):
            alone = trace(residual, [line])
            for p in range(len(line)):
                at = torch.tensor([e]), torch.tensor([len(IDS) - len(line) + p])
                ours = list(together.blocks(layer, *at))
                theirs = list(alone.blocks(layer, torch.tensor([0]), torch.tensor([p])))
                assert [b.start for b in ours] == [b.start for b in theirs]
                for one, other in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(one.coefficients(), other.coefficients())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2", "deepseek", "gpt_oss", "mixtral"])
def test_half_precision_is_proved_as_well(family: str, dtype: torch.dtype) -> None:
    model = of_family(family, dtype)
    residual = read_residual_model(model)
    found = trace(residual, [IDS])
    wide = read_residual_model(copy.deepcopy(model).double())
    asked: dict[str, Any] = {"ffn": "exact", "attention": None}
    target = found.logits.argmax(1)
    ours = value_scores(residual, found, target, **asked).ffn_neuron
    want = value_scores(wide, trace(wide, [IDS]), target, **asked).ffn_neuron
    assert ours is not None and want is not None
    same = (ours != 0) & (want != 0)  # a router may choose another expert in few bits
    assert same.sum() > 0.7 * (want != 0).sum()
    error = (ours.double() - want)[same].abs().max()
    assert float(error) < 60 * torch.finfo(dtype).eps * float(want.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_files_call_the_model_as_all_stages_do(family: str) -> None:
    model = of_family(family, torch.float32)
    residual = read_residual_model(model)
    assert residual.shape == model_shape(find_mlps(model))
    mlps = find_mlps(model)
    for layer in residual.layers:
        parts = [mlp.inside for mlp in mlps if mlp.layer == layer.layer]
        ours = [slice(m.start, m.start + m.n_neurons) for m in layer.mixture]
        assert ours == parts


def test_a_neuron_that_a_layer_does_not_have_is_refused() -> None:
    residual = read_residual_model(uneven_model())
    assert residual.widths == [2 * WIDTH, 9 * WIDTH]
    assert residual.shape == model_shape(find_mlps(residual.model))
    with pytest.raises(RelneuronError, match="layer 0 has no FFN neuron 48: it has 48"):
        intervene(residual, [IDS], [3], [[off([2 * WIDTH])]], batch_tokens=100)


def uneven_model() -> Any:
    """A DeepSeek whose first layer has no experts."""
    import transformers

    model = expert_model("deepseek")
    config = copy.deepcopy(model.config)
    config.first_k_dense_replace = 1
    config.mlp_layer_types = ["dense", "sparse"]
    config.n_shared_experts, config.intermediate_size = 1, 2 * WIDTH
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()
