"""Integrated gradients against published vectors and plain hooks; verdicts; planted neurons."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from bench.zoo.build import build
from relneuron.artifact.files import RelneuronError
from relneuron.model.batches import pad
from relneuron.model.gradients.ig import Integrator, likeliest, replaced_neurons
from relneuron.model.gradients.reference import alphas, integrate_reference
from relneuron.model.gradients.sites import frozen, read_sites
from relneuron.model.gradients.staircase import Staircase, read_staircase
from relneuron.model.gradients.wide import in_float64
from relneuron.model.layers import Unfound
from tests.conftest import tiny_model
from tests.kit.attributed import attributed_model
from tests.kit.slopes import Vectors, plain_ig

# --- published vectors ---------------------------------------------------------------------------

# Methods 5.9: schedule, steps, site, attributions, their sum.
E5: list[tuple[str, int, str, tuple[float, ...], float]] = [
    ("inclusive", 4, "product", (0.01211708, 0.05138789, 0.03855851), 0.10206349),
    ("right", 4, "product", (0.00993367, 0.04600308, 0.03374010), 0.08967684),
    ("midpoint", 4, "product", (0.01164310, 0.05072244, 0.03778924), 0.10015478),
    ("inclusive", 20, "product", (0.01175207, 0.05087509, 0.03796591), 0.10059308),
    ("right", 20, "product", (0.01132062, 0.04980538, 0.03701066), 0.09813666),
    ("inclusive", 20, "gate", (0.01117603, 0.05274534, 0.03670718), 0.10062855),
]
PRINTED = 0.5e-8 + 1e-12  # the vectors are printed with eight digits


@pytest.mark.parametrize(("schedule", "steps", "site", "wanted", "total"), E5)
def test_the_published_vectors(
    schedule: str, steps: int, site: str, wanted: tuple[float, ...], total: float
) -> None:
    model = Vectors().eval()
    sites = read_sites(model, site)
    points = alphas(schedule, steps)
    with in_float64(model):
        found = read_staircase(sites).integrate([[1, 2], [0]], [0, 0], points)
        spec = integrate_reference(sites, [[1, 2], [0]], [0, 0], points)
    for one in (found, spec):
        for row in range(2):
            assert one.ig[row, 0].tolist() == pytest.approx(wanted, abs=PRINTED)
            assert float(one.ig[row].sum()) == pytest.approx(total, abs=PRINTED)
            assert float(one.probability[row]) == pytest.approx(0.93416143, abs=PRINTED)
            baseline = float(one.probability_at_baseline[row, 0])
            assert baseline == pytest.approx(0.83384535, abs=PRINTED)


def test_the_vectors_to_the_last_digit_against_plain_hooks() -> None:
    model = Vectors().eval()
    sites = read_sites(model)
    for schedule in ("inclusive", "right", "midpoint"):
        points = alphas(schedule, 7)
        with in_float64(model):
            downs = [model.layers[0].mlp.down]
            wanted, p, at_baseline = plain_ig(model, downs, [1, 2], 0, points)
            found = read_staircase(sites).integrate([[1, 2]], [0], points)
        assert wanted.dtype == torch.float64
        assert float((found.ig[0] - wanted).abs().max()) < 1e-15
        assert abs(float(found.probability[0]) - p) < 1e-15
        assert abs(float(found.probability_at_baseline[0, 0]) - at_baseline[0]) < 1e-15


@pytest.mark.parametrize("site", ["act", "up", "product"])
def test_act_up_and_product_are_one_site(site: str) -> None:
    """Scaling a factor scales the product: hooks on the factors give what `product` gives."""
    model = Vectors().eval().double()
    mlp, points = model.layers[0].mlp, alphas("midpoint", 5)
    wanted, *_ = plain_ig(model, [mlp.down], [1], 0, points)
    model.float()
    sites = read_sites(model, site)
    with in_float64(model):
        found = read_staircase(sites).integrate([[1]], [0], points)
    assert torch.allclose(found.ig[0], wanted, rtol=0, atol=1e-15)


def test_schedules() -> None:
    assert alphas("inclusive", 3) == [0.0, 0.5, 1.0]
    assert alphas("right", 4) == [0.25, 0.5, 0.75, 1.0]
    assert alphas("midpoint", 2) == [0.25, 0.75]


# --- the staircase against the definition ------------------------------------------------------

# Grouped heads; query and key norms; sliding windows; packed; ungated, learned positions; and types
# that nothing here was written for: side by side, scaled, with biases of position, post-norms.
FAMILIES = ("llama", "qwen3", "gemma3", "phi3", "gpt2")
UNNAMED = ("gpt_neox", "bloom", "cohere2")
# Whose rounding is about 1e-6 of the largest number, as their weights are large.
ROUGH = ("olmo2", "bart", "large gpt2")
LENGTHS = (9, 14, 1)


def model_of(family: str) -> Any:
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, **sizes)).eval()
    if family == "large gpt2":
        return attributed_model("gpt2")
    if family in (*UNNAMED, *ROUGH):
        return build("causal", family)
    changes = {"sliding_window": 5} if family == "gemma3" else {}
    return tiny_model(family, **changes)


def lines(lengths: Sequence[int] = LENGTHS, n_ids: int = 90) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, n_ids, (n,), generator=generator).tolist() for n in lengths]


TARGETS = [5, 17, 30]


def off(ours: Any, theirs: Any) -> float:
    """The largest difference, in parts of the largest number of each tensor."""
    return max(
        float((a - b).abs().nan_to_num(0.0).max() / b.abs().nan_to_num(0.0).max())
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("family", [*FAMILIES, *UNNAMED])
@pytest.mark.parametrize(("site", "schedule"), [("product", "inclusive"), ("gate", "midpoint")])
def test_the_staircase_is_the_definition(family: str, site: str, schedule: str) -> None:
    model = model_of(family)
    sites, points = read_sites(model, site), alphas(schedule, 3)
    found = read_staircase(sites).integrate(lines(), TARGETS, points)
    wanted = integrate_reference(sites, lines(), TARGETS, points)
    assert off(found[:1], wanted[:1]) < 1e-6
    assert off(found, wanted) < 4e-6  # a probability is a sum over the vocabulary
    with in_float64(model):
        found = read_staircase(sites).integrate(lines(), TARGETS, points)
        wanted = integrate_reference(sites, lines(), TARGETS, points)
        assert off(found, wanted) < 1e-12


@pytest.mark.parametrize("family", ROUGH)
def test_it_is_as_near_to_the_truth_as_the_definition_in_float32(family: str) -> None:
    model = model_of(family)
    sites, points = read_sites(model), alphas("right", 3)
    found = read_staircase(sites).integrate(lines(), TARGETS, points)
    plain = integrate_reference(sites, lines(), TARGETS, points)
    with in_float64(model):
        truth = integrate_reference(sites, lines(), TARGETS, points)
        assert off(read_staircase(sites).integrate(lines(), TARGETS, points), truth) < 1e-12
    assert off(found, truth) < 2 * off(plain, truth) + 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_definition_is_what_plain_hooks_give(family: str) -> None:
    model = attributed_model(family)
    layers = model.transformer.h if family == "gpt2" else model.model.layers
    downs = [getattr(layer.mlp, "c_proj", None) or layer.mlp.down_proj for layer in layers]
    sites, points = read_sites(model), alphas("inclusive", 4)
    model.double()
    (line,) = lines([8])
    generator = torch.Generator().manual_seed(1)
    for baseline in (None, torch.randn(len(downs), sites.width, generator=generator).double()):
        wanted, p, at = plain_ig(model, downs, line, 5, points, baseline)
        found = integrate_reference(sites, [line], [5], points, baseline=baseline)
        assert float((found.ig[0] - wanted).abs().max() / wanted.abs().max()) < 1e-12
        assert abs(float(found.probability[0]) - p) < 1e-12
        assert found.probability_at_baseline[0].tolist() == pytest.approx(at, abs=1e-12)


def test_a_batch_padding_on_either_side_and_few_rows_change_nothing() -> None:
    model = tiny_model("llama")
    sites, points = read_sites(model), alphas("right", 4)
    with in_float64(model):
        staircase = read_staircase(sites)
        whole = staircase.integrate(lines(), TARGETS, points)
        for row, line in enumerate(lines()):
            alone = staircase.integrate([line], [TARGETS[row]], points)
            assert off(alone, [one[row : row + 1] for one in whole]) < 1e-12
        longest = max(LENGTHS) + 3
        tokens = torch.zeros(len(LENGTHS), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, line in enumerate(lines()):
            tokens[row, : len(line)], mask[row, : len(line)] = torch.tensor(line), 1
        right = staircase.integrate_batch(tokens, mask, TARGETS, points)
        assert off(right, whole) < 1e-12
        # 3 sentences of 5 rows a layer: one layer at a time, and two.
        for most in (1, 15, 31):
            few = staircase.integrate(lines(), TARGETS, points, most_rows=most)
            assert off(few, whole) < 1e-12


def test_completeness_falls_with_the_steps() -> None:
    model = tiny_model("llama", initializer_range=0.3)
    sites = read_sites(model)
    with in_float64(model):
        staircase, gaps = read_staircase(sites), []
        for steps in (8, 16, 32):
            found = staircase.integrate(lines(), TARGETS, alphas("midpoint", steps))
            change = found.probability[:, None] - found.probability_at_baseline
            gaps.append(float((found.ig.sum(-1) - change).abs().max()))
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] > 0


def test_a_baseline_that_is_given() -> None:
    model = tiny_model("llama")
    sites, points = read_sites(model), alphas("inclusive", 3)
    with in_float64(model):
        staircase = read_staircase(sites)
        each = torch.stack([replaced_neurons(sites, line, 2, most_tokens=30) for line in lines()])
        for baseline in (each, each[0]):
            found = staircase.integrate(lines(), TARGETS, points, baseline=baseline)
            wanted = integrate_reference(sites, lines(), TARGETS, points, baseline=baseline)
            assert off(found, wanted) < 1e-12
        by_way = Integrator(sites, points, replaced=2)(lines(), TARGETS, 1000)
        assert off(by_way, staircase.integrate(lines(), TARGETS, points, baseline=each)) < 1e-12


def test_the_baseline_of_replaced_tokens_is_their_mean() -> None:
    model = tiny_model("llama")
    sites = read_sites(model)
    (line,) = lines([6])
    seen: list[Tensor] = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0, -1].detach().double())
    )
    with torch.no_grad():
        for k in range(6):
            model(torch.tensor([[*line[:k], 2, *line[k + 1 :]]]))
    hook.remove()
    found = replaced_neurons(sites, line, 2, most_tokens=13)
    assert torch.allclose(found[1], torch.stack(seen).mean(0), rtol=1e-5, atol=1e-7)


# --- verdicts, and what is left of a run ----------------------------------------------------


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("bert", "earlier tokens see the last one"),
        ("recurrent_gemma", "keeps no keys and values|takes no cache"),
        ("openai-gpt", "takes no cache"),
    ],
)
def test_where_it_is_not_exact_the_definition_serves(family: str, why: str) -> None:
    model = build("causal", family)
    sites, points = read_sites(model), alphas("right", 2)
    with pytest.raises(Unfound, match=why):
        read_staircase(sites)
    integrator = Integrator(sites, points)
    assert integrator.staircase is None and re.search(why, integrator.why_not)
    found = integrator(lines([5]), [7], 100)
    assert off(found, integrate_reference(sites, lines([5]), [7], points)) == 0


class Skipping(nn.Module):
    """A layer that adds something of an earlier token, behind its own back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        out: Tensor = self.inner(hidden_states, **kwargs)
        return out + 0.3 * out.cumsum(1)


def test_a_layer_that_is_not_what_it_was_called_with_is_found_out() -> None:
    model = tiny_model("llama", initializer_range=0.2)
    model.model.layers[1] = Skipping(model.model.layers[1]).eval()
    with pytest.raises(Unfound, match="gradients are off by"):
        read_staircase(read_sites(model))


def test_nothing_is_left_of_a_run() -> None:
    model = tiny_model("llama")
    sites = read_sites(model)
    tokens, mask = pad(lines(), sites.device)
    with torch.no_grad():
        before = model(tokens, attention_mask=mask).logits
    staircase = read_staircase(sites)
    staircase.integrate(lines(), TARGETS, [0.5])
    with pytest.raises(RuntimeError, match="out of bounds"):
        staircase.integrate(lines(), [999] * 3, [0.5])
    with in_float64(model), torch.no_grad():
        assert model(tokens, attention_mask=mask).logits.dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(model(tokens, attention_mask=mask).logits, before)
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_no_weight_has_a_gradient_meanwhile() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    with frozen(model):
        assert not any(weight.requires_grad for weight in model.parameters())
    assert not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad


def test_float64_leaves_no_narrower_float_on_the_way() -> None:
    model = tiny_model("gemma3", torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    dtypes = set()
    hooks = [
        module.register_forward_hook(
            lambda *a: dtypes.update(
                x.dtype for x in (a[2] if isinstance(a[2], tuple) else [a[2]]) if x is not None
            )
        )
        for name, module in model.named_modules()
        if "layers." in name or "norm" in name
    ]
    with in_float64(model), torch.no_grad():
        model(torch.tensor(lines([7])))
    for hook in hooks:
        hook.remove()
    assert dtypes == {torch.float64}
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_what_has_no_one_vector_a_layer_is_refused() -> None:
    with pytest.raises(RelneuronError, match="layer 0 has experts"):
        read_sites(build("causal", "mixtral"))
    with pytest.raises(RelneuronError, match="no site up"):
        read_sites(attributed_model("gpt2"), "up")


def test_the_likeliest_tokens_are_the_models_own() -> None:
    model = tiny_model("llama")
    sites = read_sites(model)
    with torch.no_grad():
        wanted = [int(model(torch.tensor([line])).logits[0, -1].argmax()) for line in lines()]
    assert likeliest(sites, lines(), True) == likeliest(sites, lines(), False) == wanted


# --- planted truth ---------------------------------------------------------------------------


def test_two_planted_neurons_come_first() -> None:
    """Two neurons, of two layers, that alone write what the answer's row of the head reads."""
    model = tiny_model("llama")
    sites = read_sites(model)
    (line,) = lines([10])
    planted, answer = [(0, 13), (2, 40)], 60
    with torch.no_grad():
        seen = integrate_reference(sites, [line], [answer], [1.0])
        assert seen.ig.abs().max() > 0
        for layer, neuron in planted:
            values: list[Tensor] = []
            down = model.model.layers[layer].mlp.down_proj
            hook = down.register_forward_pre_hook(lambda _, a, v=values: v.append(a[0][0, -1]))
            model(torch.tensor([line]))
            hook.remove()
            size = 0.5 / float(values[0][neuron])
            down.weight[:, neuron] = size * model.lm_head.weight[answer] / 0.02
    found = read_staircase(sites).integrate([line], [answer], alphas("inclusive", 20))
    order = found.ig[0].flatten().argsort(descending=True)[:2].tolist()
    assert sorted(divmod(place, sites.width) for place in order) == planted
    assert isinstance(read_staircase(sites), Staircase)
