"""Gradient x activation against plain autograd; the conservative rules against their vectors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.batches import pad
from relneuron.model.gradients.relevance import relevance
from relneuron.model.gradients.rules import conservative
from relneuron.model.gradients.sites import read_sites, sees_padding
from relneuron.model.gradients.wide import in_float64
from tests.conftest import tiny_model
from tests.kit.attributed import attributed_model
from tests.kit.slopes import Vectors

PRINTED = 0.5e-8 + 1e-12  # the vectors are printed with eight digits


def lines(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 90, (n,), generator=generator).tolist() for n in lengths]


# --- published vectors: methods 5.9 and 2(h) ------------------------------------------------


@pytest.mark.parametrize(
    ("site", "wanted", "total"),
    [
        ("product", (0.00566425, 0.03307520, 0.02300008), 0.06173953),
        ("up", (0.00566425, 0.03307520, 0.02300008), 0.06173953),
        ("gate", (0.00718760, 0.02278122, 0.02734181), 0.05731063),
    ],
)
def test_the_published_vector_of_a_probability(
    site: str, wanted: tuple[float, ...], total: float
) -> None:
    model = Vectors().eval()
    sites = read_sites(model, site)
    with in_float64(model):
        found = relevance(sites, [[1], [1, 2]], [0, 0], of="probability")
    # Nothing but the last token's MLP reaches the answer: the model has no attention.
    for row in range(2):
        assert found.relevance[row, 0].tolist() == pytest.approx(wanted, abs=PRINTED)
        # These sums are of the numbers as printed: 0.0617395229 is printed as ...53.
        assert float(found.relevance[row].sum()) == pytest.approx(total, abs=3 * PRINTED)
        assert float(found.value[row]) == pytest.approx(0.93416143, abs=PRINTED)


def of_vectors(rules: bool) -> dict[str, Tensor]:
    """R at m, a, u and x of E2: y_0 - y_1 of the MLP alone, by plain autograd and hooks."""
    model = Vectors().eval()
    sites, mlp = read_sites(model), model.layers[0].mlp
    found: dict[str, Tensor] = {}
    with in_float64(model):
        x = torch.tensor([[1.0, -0.5]], dtype=torch.float64, requires_grad=True)

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: Any, _args: Any, out: Tensor) -> None:
                found[name] = out

            return hook

        hooks = [mlp.up.register_forward_hook(keep("u"))]
        with conservative(sites) if rules else nullcontext():
            hooks.append(mlp.act.register_forward_hook(keep("a")))
            hooks.append(
                mlp.down.register_forward_pre_hook(lambda _, args: found.update(m=args[0]))
            )
            _no_norm(model)
            y = mlp(x)
        for hook in hooks:
            hook.remove()
        found["x"] = x
        names = ("m", "a", "u", "x")
        slopes = torch.autograd.grad(y[0, 0] - y[0, 1], [found[name] for name in names])
    return {name: found[name].detach() * slope for name, slope in zip(names, slopes, strict=True)}


def _no_norm(model: nn.Module) -> None:
    """The vectors' model has no norm, which the rules would miss."""
    nn.functional.layer_norm(torch.ones(2), (2,))


def test_the_published_vector_of_the_rules() -> None:
    found = of_vectors(rules=True)
    at_product = [0.18276464, 0.28315550, 0.31122967]
    assert found["m"][0].tolist() == pytest.approx(at_product, abs=PRINTED)
    halves = [r / 2 for r in at_product]
    assert found["a"][0].tolist() == pytest.approx(halves, abs=PRINTED)
    assert found["u"][0].tolist() == pytest.approx(halves, abs=PRINTED)
    # Beside an activation's input stands 1e-10.
    assert found["x"][0].tolist() == pytest.approx([0.67976180, 0.09738801], abs=1e-8)
    assert float(found["x"].sum()) == pytest.approx(0.77714981, abs=1e-8)


def test_the_plain_gradient_is_the_same_at_three_sites() -> None:
    found = of_vectors(rules=False)
    assert torch.allclose(found["m"], found["a"], rtol=1e-12)
    assert torch.allclose(found["m"], found["u"], rtol=1e-12)


# --- plain autograd ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("of", ["logit", "probability"])
def test_plain_relevance_is_what_autograd_gives(family: str, of: str) -> None:
    model = attributed_model(family)
    sites = read_sites(model)
    layers = model.transformer.h if family == "gpt2" else model.model.layers
    downs = [getattr(layer.mlp, "c_proj", None) or layer.mlp.down_proj for layer in layers]
    with in_float64(model):
        found = relevance(sites, lines(7, 4, 9), [5, 6, 7], of=of)
        for row, line in enumerate(lines(7, 4, 9)):
            seen: list[Tensor] = []
            hooks = [
                d.register_forward_pre_hook(lambda _, a, to=seen: to.append(a[0])) for d in downs
            ]
            logits = model(torch.tensor([line])).logits[0, -1]
            for hook in hooks:
                hook.remove()
            value = (logits.softmax(0) if of == "probability" else logits)[5 + row]
            slopes = torch.autograd.grad(value, seen)
            wanted = torch.stack(
                [(m.detach() * g)[0].sum(0) for m, g in zip(seen, slopes, strict=True)]
            )
            assert torch.allclose(found.relevance[row], wanted, rtol=0, atol=1e-14)
            assert float(found.value[row]) == pytest.approx(float(value.detach()), abs=1e-14)


def test_it_is_the_last_slice_of_integrated_gradients_at_one_token() -> None:
    from relneuron.model.gradients.reference import integrate_reference

    model = tiny_model("phi3")
    sites = read_sites(model, "gate")
    with in_float64(model):
        found = relevance(sites, [[7]], [5], of="probability")
        slice_ = integrate_reference(sites, [[7]], [5], [1.0])
    assert torch.allclose(found.relevance, slice_.ig, rtol=0, atol=1e-16)


@pytest.mark.parametrize("rules", ["plain", "conservative"])
def test_padding_and_the_batch_change_nothing(rules: str) -> None:
    model = tiny_model("qwen3")
    sites = read_sites(model)
    assert not sees_padding(model)
    with in_float64(model):
        both = relevance(sites, lines(7, 4), [5, 6], rules=rules)
        apart = relevance(sites, lines(7, 4), [5, 6], rules=rules, pads=False)
    assert torch.allclose(both.relevance, apart.relevance, rtol=0, atol=1e-14)


# --- conservation -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "olmo2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_relevance_at_the_embeddings_adds_up_to_the_logit(family: str, attention: str) -> None:
    model = tiny_model(family, initializer_range=0.2)
    model.set_attn_implementation(attention)
    sites = read_sites(model)
    tokens, mask = pad(lines(7, 4), sites.device)
    with in_float64(model):
        inner: list[Tensor] = []

        def leaf(_module: Any, _args: Any, out: Tensor) -> Tensor:
            inner.append(out.detach().requires_grad_())
            return inner[-1]

        hook = model.get_input_embeddings().register_forward_hook(leaf)
        with conservative(sites):
            logits = model(tokens, attention_mask=mask).logits[:, -1]
        hook.remove()
        plain = model(tokens, attention_mask=mask).logits[:, -1]
        assert torch.allclose(logits, plain, rtol=1e-12, atol=1e-12)
        value = logits[:, 5]
        (slope,) = torch.autograd.grad(value.sum(), inner[0])
        total = (inner[0].detach() * slope).sum((1, 2))
    # 1e-10 beside each activation's input, and the eps of no norm: its scale is a constant.
    assert torch.allclose(total, value.detach(), rtol=1e-6)


def test_norms_that_the_rules_do_not_know_are_refused() -> None:
    model = Vectors().eval()
    with pytest.raises(RelneuronError, match="computes its norms in a way") as raised:
        relevance(read_sites(model), [[1]], [0], rules="conservative")
    assert raised.value.fix == "use --rules plain"


def test_nothing_is_left_of_the_rules() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        before = model(torch.tensor(lines(5))).logits
    relevance(read_sites(model), lines(5), [3], rules="conservative")
    with torch.no_grad():
        assert torch.equal(model(torch.tensor(lines(5))).logits, before)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
