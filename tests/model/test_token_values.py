"""Values of listed neurons at every token, against plain hooks: dense models and experts."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from relneuron.model.batches import Budget
from relneuron.model.mlps.find import find_mlps
from relneuron.model.token_values import token_values
from tests.kit.experts import act_and_factor, expert_model, experts_of, pairs_of, weights_of

TOKENIZER = SimpleNamespace(eos_token_id=None)
TEXTS = [[1, 5, 9, 30], [1, 7], [1, 50, 51, 52, 53, 54, 55], [1, 5, 9, 31]]


def drawn(widths: dict[str, int], layers: int, n: int, seed: int) -> list[tuple[int, str, int]]:
    rng = random.Random(seed)
    sites = list(widths)
    places = [(rng.randrange(layers), sites[k % len(sites)]) for k in range(n)]
    return [(layer, site, rng.randrange(widths[site])) for layer, site in places]


def hooked(model: Any, mlps: Any, text: list[int]) -> dict[tuple[int, str], torch.Tensor]:
    """(T, width) outputs of the maps, and what the down map reads, of one text alone."""
    seen: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for mlp in mlps:
        for part in (mlp.gate, mlp.up, mlp.down_map, *mlp.projections):

            def hook(_m: Any, _x: Any, y: Any, mlp: Any = mlp, part: Any = part) -> None:
                seen[mlp.layer, part.site] = part.of(y)[0]

            handles.append(part.module.register_forward_hook(hook))

        def read(_m: Any, given: Any, mlp: Any = mlp) -> None:
            seen[mlp.layer, "product"] = mlp.product.of(given[0])[0]

        handles.append(mlp.product.module.register_forward_pre_hook(read))
    with torch.no_grad():
        model(torch.tensor([text]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_values_are_those_of_hooks(family_model: Any) -> None:
    """Also in batches of several texts with padding, each with neurons of its own."""
    mlps = find_mlps(family_model, attention=True)
    widths = {part.site: part.width for part in mlps[0].projections}
    widths |= {"gate": 48, "up": 48, "product": 48, "down": 32}
    neurons = [drawn(widths, 3, 16, seed) for seed in range(len(TEXTS))]
    whole = token_values(family_model, TOKENIZER, mlps, TEXTS, neurons, Budget(4096))
    small = token_values(family_model, TOKENIZER, mlps, TEXTS, neurons, Budget(8))
    for text, own, one, other in zip(TEXTS, neurons, whole, small, strict=True):
        seen = hooked(family_model, mlps, text)
        for (layer, site, index), values, again in zip(own, one, other, strict=True):
            wanted = seen[layer, site][:, index].numpy()
            assert values == pytest.approx(wanted, rel=1e-4, abs=1e-5), (layer, site, index)
            assert again == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_act_is_the_models_own_activation(llama: Any) -> None:
    mlps = find_mlps(llama)
    (values,) = token_values(
        *(llama, TOKENIZER, mlps, TEXTS[:1], [[(1, "act", 3), (1, "gate", 3)]], Budget(64))
    )
    assert values[0] == pytest.approx(
        torch.nn.functional.silu(torch.from_numpy(values[1])).numpy(), rel=1e-6
    )


def test_without_up_the_product_is_the_activation() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    seen: list[torch.Tensor] = []
    model.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda _m, x: seen.append(x[0][0]))
    mlps, neurons = find_mlps(model), [(1, "product", 7), (1, "act", 7), (1, "gate", 7)]
    (values,) = token_values(model, TOKENIZER, mlps, TEXTS[:1], [neurons], Budget(64))
    seen.clear()
    with torch.no_grad():
        model(torch.tensor(TEXTS[:1]))
    wanted = seen[0][:, 7].numpy()
    assert values[0] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert values[1] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4", "granite", "jetmoe"])
def test_experts_give_0_at_tokens_that_they_do_not_get(family: str) -> None:
    """Expert by expert in plain torch, of what the module was called with."""
    model = expert_model(family)
    mlps, (experts, *_) = find_mlps(model), experts_of(model)
    width, text = experts.expert_width, TEXTS[2]
    neurons = [(0, site, e * width + 5) for e in range(4) for site in ("gate", "act", "product")]
    (values,) = token_values(model, TOKENIZER, mlps, [text], [neurons], Budget(64))
    given: list[Any] = []
    handle = experts.module.register_forward_pre_hook(lambda _m, x: given.append(x))
    with torch.no_grad():
        model(torch.tensor([text]), use_cache=False)
        handle.remove()
        x, pairs = pairs_of(family, experts.module, given[0])
        wanted = torch.zeros(len(neurons), len(text))
        for e in range(4):
            gate_weight, up_weight, _, gate_bias, up_bias, _ = weights_of(family, experts.module, e)
            tokens = pairs[e][0]
            inputs = x[e] if x.dim() == 3 else x
            gate = inputs[tokens] @ gate_weight[5] + gate_bias[5]
            up = inputs[tokens] @ up_weight[5] + up_bias[5]
            act, factor = act_and_factor(family, gate, up)
            for row, own in enumerate((gate, act, act * factor)):
                wanted[3 * e + row, tokens] = own
    assert (wanted == 0).any() and (wanted != 0).any()
    for row, own in enumerate(values):
        assert own == pytest.approx(wanted[row].numpy(), rel=1e-4, abs=1e-6), neurons[row]
