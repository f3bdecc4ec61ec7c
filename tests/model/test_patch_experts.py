"""The patch in a model's experts: neurons off or at another value, exact removal, what runs inside.

Everything is held to `plain_forward` of tests/kit/experts.py, or to the model with its own weights
set to zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.mlps.experts import Experts
from relneuron.model.patch import Patch
from relneuron.model.states import LayerState, Replacement, Tokens
from tests.kit.experts import (
    CASES,
    FAMILIES,
    GROUPS,
    LAYERS,
    PAD,
    WIDTH,
    ExpertCounts,
    counting,
    expert_model,
    experts_of,
    fold_replacement,
    ids,
    in_plain_torch,
    logits,
    mask_experts,
    neurons_of,
    zeroed,
)


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_neurons_are_off_as_if_their_weights_were_zero(family: str, implementation: str) -> None:
    model = expert_model(family, implementation=implementation)
    found = experts_of(model)
    clean = logits(model)
    neurons = [(0, "gate", 3), (0, "up", WIDTH + 7), (1, "gate", 3 * WIDTH), (1, "up", 2 * WIDTH)]
    neurons += [(0, "gate", f) for f in range(2 * WIDTH, 3 * WIDTH)]
    if family != "jetmoe":  # which adds a bias behind its sum
        neurons += [(1, "down", 5), (0, "down", 31)]
    want = logits(zeroed(family, model, neurons))
    states = [mask_experts(experts, [neurons]) for experts in found]
    with Patch(found, states):
        ours = logits(model)
    torch.testing.assert_close(ours, want)
    assert not torch.allclose(ours, clean)
    torch.testing.assert_close(logits(model), clean, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "llama4", "jetmoe"])
def test_whole_experts_are_off_under_their_conditions(family: str) -> None:
    """Rows of a batch, and tokens of a row, each with other experts and neurons off."""
    model = expert_model(family)
    found = experts_of(model)
    sets = [
        [],
        neurons_of(found[0], [0, 2]),
        [*neurons_of(found[1], [1]), (0, "gate", 3 * WIDTH + 1)],
    ]
    assert len(sets[1]) == 2 * WIDTH
    states = [mask_experts(experts, sets) for experts in found]
    alone = [logits(zeroed(family, model, chosen)) for chosen in sets]
    patch = Patch(found, states)
    with patch:
        patch.tokens = Tokens(conditions=torch.tensor([2, 0, 1], dtype=torch.int32))
        ours = logits(model)
        for row, condition in enumerate((2, 0, 1)):
            torch.testing.assert_close(ours[row], alone[condition][row])
        # The tokens before a condition begins do not see it.
        rows = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 3, dtype=torch.int32)
        patch.tokens = Tokens(conditions=rows)
        ours = logits(model)
        torch.testing.assert_close(ours[:, :3], alone[0][:, :3])
        assert not torch.allclose(ours[:, 3:], alone[0][:, 3:])


def test_neurons_of_other_layers_and_parts_are_left_out() -> None:
    experts = experts_of(expert_model("mixtral"))[1]
    assert mask_experts(experts, [[(0, "gate", 1), (1, "q", 2)]]) == LayerState()
    moved = Experts(**{**vars(experts), "offset": 10})
    state = mask_experts(moved, [[(1, "gate", 9), (1, "up", 10 + experts.width)]])
    assert state == LayerState()
    ours = mask_experts(moved, [[(1, "gate", 10 + WIDTH)]]).keep
    same = mask_experts(experts, [[(1, "gate", WIDTH)]]).keep
    assert ours is not None and same is not None and torch.equal(ours, same)
    assert neurons_of(moved, [1])[0] == (1, "gate", 10 + WIDTH)


@pytest.mark.parametrize("site", ["gate", "up", "act", "down"])
@pytest.mark.parametrize("mode", ["scale", "mean"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_neurons_take_another_value(family: str, mode: str, site: str) -> None:
    model = expert_model(family)
    found = experts_of(model)
    chosen = torch.zeros(LAYERS, 1, found[0].hidden if site == "down" else found[0].width)
    chosen[0, 0, [1, 5]] = chosen[1, 0, [0, 23]] = 1
    if site != "down":
        chosen[1, 0, 2 * WIDTH + 4] = 1
    value, factor = (None, -1.5) if mode == "scale" else (0.75, 0.0)

    def changed(layer: int) -> Callable[[str, int, Tensor, Tensor], Tensor]:
        def change(where: str, e: int, tokens: Tensor, values: Tensor) -> Tensor:
            if where != site:
                return values
            own = chosen[layer, 0, e * WIDTH : (e + 1) * WIDTH].bool()
            new = values * factor if value is None else torch.full_like(values, value)
            return torch.where(own, new, values)

        return change

    states = []
    for layer, experts in enumerate(found):
        shift = None if value is None else value * chosen[layer]
        new = Replacement(chosen[layer].bool(), factor, shift)
        if site != "down":
            new = fold_replacement(experts, new)
        states.append(LayerState(replace={site: new}))
    with Patch(found, states):
        ours = logits(model)
    if site == "down":
        want = with_down(family, model, chosen[:, 0].bool(), value, factor)
    else:
        with in_plain_torch(family, model, changes=[changed(layer) for layer in range(LAYERS)]):
            want = logits(model)
    torch.testing.assert_close(ours, want)
    assert not torch.allclose(ours, logits(model))


def with_down(
    family: str, model: Any, chosen: Tensor, value: float | None, factor: float
) -> Tensor:
    """Logits where a hook changes what the experts have together written."""
    handles = []
    for layer, experts in enumerate(experts_of(model)):

        def change(_m: Any, _i: Any, out: Tensor, layer: int = layer) -> Tensor:
            parts = out.view(-1, 21, out.shape[-1])  # of each expert (llama4), or of all
            total = parts.sum(0)
            new = total * factor if value is None else torch.full_like(total, value)
            rest = torch.zeros_like(parts)
            rest[0] = torch.where(chosen[layer], new, total)
            return rest.view(out.shape)

        handles.append(experts.module.register_forward_hook(change))
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


# --- on and off ------------------------------------------------------------------------------


def attributes(model: nn.Module) -> list[dict[str, object]]:
    """Every module's `__dict__`, its dictionaries by their content."""
    return [
        {key: dict(value) if isinstance(value, dict) else value for key, value in vars(m).items()}
        for m in model.modules()
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_patch_comes_off_exactly_and_both_of_two_act(family: str) -> None:
    model = expert_model(family)
    found, before = experts_of(model), attributes(model)
    first, second = [(0, "gate", 1), (1, "up", 30)], neurons_of(found[0], [1])
    both = logits(zeroed(family, model, first + second))
    outer = Patch(found, [mask_experts(experts, [first]) for experts in found])
    inner = Patch(found, [mask_experts(experts, [second]) for experts in found])
    with pytest.raises(KeyError), outer:
        changed = [m for m in model.modules() if "forward" in m.__dict__]
        # Neither the router nor anything else is touched.
        assert changed == [experts.module for experts in found]
        assert experts_of(model) == found
        with inner:
            torch.testing.assert_close(logits(model), both)
        with pytest.raises(RelneuronError, match="cannot be copied"):
            copy.deepcopy(model)
        raise KeyError
    after = attributes(model)
    assert before == after


@pytest.mark.parametrize("family", FAMILIES)
def test_canary(family: str) -> None:
    """Each layer's experts matter; an expert that no token is sent to does not."""
    model = expert_model(family)
    found, clean = experts_of(model), logits(model)
    for experts in found:
        everything = neurons_of(experts, range(experts.n_experts))
        with Patch([experts], [mask_experts(experts, [everything])]):
            assert not torch.allclose(logits(model), clean)
    patch = counting(found[:1], 1, Tokens(group_ids=torch.zeros(1, 1, dtype=torch.int32)))
    with patch:
        alone = logits(model, ids()[:1, :1])
    tokens = ExpertCounts.of(found[0], patch.states[0]).tokens[:, 0]
    unused, used = (tokens == 0).nonzero().flatten(), tokens.nonzero().flatten()
    assert len(used) == FAMILIES[family][3] and len(unused)
    for numbers, is_same in ((unused, True), (used[:1], False)):
        off = mask_experts(found[0], [neurons_of(found[0], numbers.tolist())])
        with Patch(found[:1], [off]):
            assert torch.allclose(logits(model, ids()[:1, :1]), alone) is is_same


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_is_that_of_the_model_without_the_neurons(family: str) -> None:
    model = expert_model(family)
    found = experts_of(model)
    sets = [[], neurons_of(found[0], [0, 1]) + neurons_of(found[1], [2])]
    given = {"attention_mask": PAD, "max_new_tokens": 6, "do_sample": False}
    alone = [zeroed(family, model, chosen).generate(ids(), **given) for chosen in sets]
    patch = Patch(found, [mask_experts(experts, sets) for experts in found])
    conditions = (1, 0, 1)
    patch.tokens = Tokens(conditions=torch.tensor(conditions, dtype=torch.int32))
    with patch:
        ours = model.generate(ids(), **given)
    assert ours.shape == (3, 13)
    for row, condition in enumerate(conditions):
        assert torch.equal(ours[row], alone[condition][row])
    assert any(not torch.equal(alone[0][row], alone[1][row]) for row in (0, 2))


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "llama4"])
def test_gradients_are_those_of_the_model(family: str) -> None:
    model = expert_model(family)
    found = experts_of(model)
    names = [name for name, _ in model.named_parameters()]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids(), use_cache=False).logits.square().sum().backward()
        return [w.grad.clone() for _, w in model.named_parameters() if w.grad is not None]

    wanted = gradients()
    patch = counting(found, tokens=Tokens(group_ids=GROUPS))
    with patch:
        ours = gradients()
    assert len(ours) == len(wanted) > len(names) // 2
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert int(ExpertCounts.of(found[0], patch.states[0]).tokens.sum()) > 0


def test_hooks_on_the_activation_run_and_others_are_refused() -> None:
    model = expert_model("granite")
    found, clean = experts_of(model), logits(model)
    heard: list[int] = []
    module: Any = found[0].module
    handle = module.act_fn.register_forward_hook(lambda m, i, out: heard.append(len(out)))
    patch = counting(found, tokens=Tokens(group_ids=GROUPS))
    with patch:
        torch.testing.assert_close(logits(model), clean)
    assert heard == [3 * 7 * 2]
    handle.remove()
    module.inside = nn.Linear(2, 2)
    module.inside.register_forward_hook(lambda *_: None)
    with counting(found), pytest.raises(RelneuronError, match="inside has a hook, and is not call"):
        logits(model)


def test_arguments_may_be_named() -> None:
    experts = experts_of(expert_model("gpt_oss", implementation="eager"))[0]
    x, index = torch.randn(3, 32), torch.tensor([[0, 1], [2, 3], [1, 0]])
    given = {"routing_weights": torch.rand(3, 2), "router_indices": index}
    with torch.no_grad():
        want = experts.module(x, **given)
        with Patch([experts], [LayerState()]):
            torch.testing.assert_close(experts.module(x, **given), want)


def test_a_compiled_block_runs_the_patch() -> None:
    model = expert_model("qwen3", implementation="eager")
    found = experts_of(model)
    block = model.model.layers[0].mlp
    compiled = torch.compile(block, backend="eager")
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean = compiled(x)
        torch.testing.assert_close(clean, block(x))
        neurons = neurons_of(found[0], [0, 3])
        want = zeroed("qwen3", model, neurons).model.layers[0].mlp(x)
        with Patch(found[:1], [mask_experts(found[0], [neurons])]):
            torch.testing.assert_close(compiled(x), want)
        assert not torch.allclose(want, clean)
        torch.testing.assert_close(compiled(x), clean)
