"""The patch in a model's experts: counters, masks, values and exact removal.

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
from relneuron.model.counting import counting_state
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.find import find_mlps
from relneuron.model.patch import Patch, StatisticsDone
from relneuron.model.states import LayerState, Replacement, Tokens, mask_states
from tests.kit.experts import (
    CASES,
    FAMILIES,
    LAYERS,
    PAD,
    WIDTH,
    ExpertCounts,
    expert_model,
    expert_state,
    experts_of,
    fold_replacement,
    ids,
    in_plain_torch,
    logits,
    mask_experts,
    neurons_of,
)

SITES = ("gate", "up", "act", "product")
# Of the tokens of PAD; padding and one token more belong nowhere.
GROUPS = torch.tensor([[0] * 7, [1] * 7, [0, 0, 0, 1, 1, 0, -1]]).masked_fill(PAD == 0, -1).int()
GATED = [family for family in FAMILIES if family not in ("jetmoe", "llama4")]


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


@pytest.mark.parametrize("threshold", [0.0, 0.03])
@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_counters_are_those_of_every_token_that_an_expert_sees(
    family: str, implementation: str, threshold: float
) -> None:
    model = expert_model(family, implementation=implementation)
    found = experts_of(model)
    seen: list[Any] = [{} for _ in found]
    with in_plain_torch(family, model, seen=seen):
        clean = padded(model)
    patch = counting(found, sites=SITES, threshold=threshold)
    with patch:
        torch.testing.assert_close(padded(model), clean)
        patch.check_used()
    for experts, state, sites_of in zip(found, patch.states, seen, strict=True):
        count = {site: torch.zeros(2, experts.width, dtype=torch.int64) for site in SITES}
        tokens = torch.zeros(experts.n_experts, 2, dtype=torch.int64)
        weight = torch.zeros(experts.n_experts, 2, dtype=torch.float64)
        for (e, token), (sites, share) in sites_of.items():
            group = int(GROUPS.flatten()[token])
            if group < 0:
                continue
            tokens[e, group] += 1
            weight[e, group] += share
            for site, values in sites.items():
                # No value is so near the threshold that rounding could decide.
                assert float((values - threshold).abs().min()) > 1e-7
                count[site][group, e * WIDTH : (e + 1) * WIDTH] += values > threshold
        ours = ExpertCounts.of(experts, state)
        assert torch.equal(ours.tokens, tokens) and int(tokens.sum()) > 0
        for site in SITES:
            assert torch.equal(ours.count[site], count[site]), site
        if family == "llama4":
            assert ours.weight is None
        else:
            assert ours.weight is not None
            torch.testing.assert_close(ours.weight, weight / tokens, equal_nan=True)


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_moments_and_responses_are_sums_over_the_tokens_of_an_expert(family: str) -> None:
    model = expert_model(family)
    found = experts_of(model)
    seen: list[Any] = [{} for _ in found]
    with in_plain_torch(family, model, seen=seen):
        logits(model)
    prompts = torch.tensor([[0] * 7, [2] * 7, [1, 1, 1, 0, 0, -1, -1]], dtype=torch.int32)
    patch = counting(found, 1, Tokens(prompt_ids=prompts), sites=SITES, moments=True)
    for experts, state in zip(found, patch.states, strict=True):
        shape = (experts.n_experts * 3, WIDTH)
        state.responses = {"gate": torch.zeros(shape), "up": torch.zeros(shape)}
    with patch:
        logits(model)
    for experts, state, sites_of in zip(found, patch.states, seen, strict=True):
        stats, responses = state.stats, state.responses
        assert stats is not None and responses is not None
        for site in SITES:
            values = torch.zeros(experts.n_experts, WIDTH, dtype=torch.float64)
            sums = torch.zeros(3, experts.width, dtype=torch.float64)
            for (e, token), (sites, _) in sites_of.items():
                values[e] += sites[site]
                if (prompt := int(prompts.flatten()[token])) >= 0:
                    sums[prompt, e * WIDTH : (e + 1) * WIDTH] += sites[site]
            torch.testing.assert_close(stats.sum[site], values, rtol=1e-5, atol=1e-5)
            if site in responses:
                ours = experts.unfold(responses[site]).double()
                torch.testing.assert_close(ours, sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_half_precision_gives_the_logits_and_the_tokens_of_the_model(
    family: str, implementation: str, dtype: torch.dtype
) -> None:
    model = expert_model(family, dtype, implementation)
    found = experts_of(model)
    clean = logits(model).float()
    patch = counting(found, 3, Tokens(group_ids=torch.arange(3).int().unsqueeze(1).expand(3, 7)))
    with patch:
        ours = logits(model).float()
    # A rounding may send a token of the second layer to another expert.
    near = 64 * torch.finfo(dtype).eps * float(clean.abs().max())
    far = (ours - clean).abs().amax(-1) > near
    assert int(far.sum()) <= 2
    _, _, _, k = FAMILIES[family]
    first = ExpertCounts.of(found[0], patch.states[0])
    assert first.tokens.sum(0).tolist() == [7 * k] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3", "deepseek", "granite"])
def test_half_precision_counts_what_the_model_has_computed(family: str, dtype: torch.dtype) -> None:
    """The rows that the first layer's own grouped product gives, each with its token's group."""
    model = expert_model(family, dtype, "grouped_mm")
    experts = experts_of(model)[0]
    module: Any = experts.module
    rows: list[Tensor] = []
    index: list[Tensor] = []
    own = module._apply_gate
    module._apply_gate = lambda both: (rows.append(both.clone()), own(both))[1]
    handle = module.register_forward_pre_hook(lambda _, given: index.append(given[1]))
    padded(model)
    handle.remove()
    del module._apply_gate
    k = index[0].shape[1]
    numbers, order = index[0].flatten().sort()
    group = GROUPS.flatten()[order // k]
    gate, up = rows[0].chunk(2, dim=1)
    act = nn.functional.silu(gate)
    patch = counting([experts], sites=SITES)
    with patch:
        padded(model)
    ours = ExpertCounts.of(experts, patch.states[0])
    for site, values in {"gate": gate, "up": up, "act": act, "product": act * up}.items():
        count = torch.zeros(2, experts.width, dtype=torch.int64)
        for e, g, row in zip(numbers.tolist(), group.tolist(), values, strict=True):
            if g >= 0:
                count[g, e * WIDTH : (e + 1) * WIDTH] += row > 0
        assert torch.equal(ours.count[site], count), site


def test_a_batch_has_the_counters_of_its_rows() -> None:
    """Each row alone, all groups in one: which expert a token goes to hangs on no other row."""
    model = expert_model("qwen3")
    found = experts_of(model)
    groups = torch.tensor([[0], [1], [0]], dtype=torch.int32).expand(3, 7)
    together = counting(found, tokens=Tokens(group_ids=groups))
    with together:
        logits(model)
    apart = counting(found)
    with apart:
        for row in range(3):
            apart.tokens = Tokens(group_ids=groups[row : row + 1])
            logits(model, ids()[row : row + 1])
    for one, other in zip(together.states, apart.states, strict=True):
        assert one.stats is not None and other.stats is not None
        assert torch.equal(one.stats.count["act"], other.stats.count["act"])
        assert torch.equal(one.stats.tokens, other.stats.tokens)


def test_tokens_are_counted_once_and_must_be_those_of_the_batch() -> None:
    model = expert_model("mixtral")
    found = experts_of(model)
    patch = counting(found)
    with patch:
        padded(model)
        before = [ExpertCounts.of(e, s) for e, s in zip(found, patch.states, strict=True)]
        with pytest.raises(RelneuronError, match="were counted already"):
            padded(model)
        patch.tokens = Tokens(group_ids=GROUPS, counted=set())
        with pytest.raises(ValueError, match="group_ids must be"):
            logits(model, ids()[:2])
    for experts, state, old in zip(found, patch.states, before, strict=True):
        new = ExpertCounts.of(experts, state)
        assert torch.equal(old.tokens, new.tokens) and torch.equal(
            old.count["act"], new.count["act"]
        )
        assert old.weight is not None and new.weight is not None
        assert torch.equal(old.weight, new.weight)


# --- neurons off -----------------------------------------------------------------------------


def zeroed(family: str, model: Any, neurons: list[tuple[int, str, int]]) -> Any:
    """A copy whose weights of these neurons are zero: columns of down_proj, or its rows."""
    edited = copy.deepcopy(model)
    for layer, site, index in neurons:
        module = experts_of(edited)[layer].module
        down: Any = module.output_linear.weight if family == "jetmoe" else module.down_proj
        # (E, D, F), whichever way it lies
        weight = (down.mT if family in ("gpt_oss", "llama4") else down).data
        if site == "down":
            weight[:, index] = 0
            if family == "gpt_oss":
                module.down_proj_bias.data[:, index] = 0  # type: ignore[operator, union-attr]
        else:
            weight[index // WIDTH, :, index % WIDTH] = 0
    return edited


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
    assert mask_experts(moved, [[(1, "gate", 10)]]).keep is not None
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


@pytest.mark.parametrize("family", ["deepseek", "qwen2", "llama4"])
def test_the_shared_expert_is_a_part_of_its_own(family: str) -> None:
    """Its input has lost the shape of the batch; both parts count every token once."""
    model = expert_model(family)
    parts = find_mlps(model)
    found, shared = parts[::2], parts[1::2]
    assert all(isinstance(part, Experts) for part in found)
    assert [part.offset for part in shared] == [part.width for part in found]
    clean = padded(model)

    def states() -> list[LayerState]:
        counted = []
        for experts, mlp in zip(found, shared, strict=True):
            counted += [counting_state(part, 2, ["act"]) for part in (experts, mlp)]
        return counted

    tables = []
    for only in (False, True):
        patch = Patch(parts, states(), only_statistics=only)
        patch.tokens = Tokens(group_ids=GROUPS, counted=set())
        with patch:
            torch.testing.assert_close(padded(model), clean)
        tables.append([(s.stats.tokens, s.stats.count["act"]) for s in patch.states if s.stats])
    for state, other in zip(*tables, strict=True):
        assert torch.equal(state[0], other[0]) and torch.equal(state[1], other[1])
    sizes = [int((group == GROUPS).sum()) for group in range(2)]
    for (tokens, count), part in zip(tables[0], parts, strict=True):
        if isinstance(part, Experts):
            total = tokens.view(part.n_experts, 2).sum(0).tolist()
            assert total == [FAMILIES[family][3] * size for size in sizes]
        else:
            assert tokens.tolist() == sizes and 0 < int(count.sum()) < sum(sizes) * part.width
    off = mask_states([[(0, "gate", shared[0].offset + 1)]], parts)
    assert [number for number, state in enumerate(off) if state.keep is not None] == [1]
    with Patch(parts, off):
        assert not torch.allclose(padded(model), clean)


def test_statistics_alone_end_the_forward_behind_the_last_experts() -> None:
    model = expert_model("qwen3")
    found = experts_of(model)
    whole = counting(found)
    with whole:
        padded(model)
    short = Patch(found, [expert_state(e, 2) for e in found], only_statistics=True)
    short.tokens = Tokens(group_ids=GROUPS, counted=set())
    with short, pytest.raises(StatisticsDone):
        padded(model)
    for one, other in zip(whole.states, short.states, strict=True):
        assert one.stats is not None and other.stats is not None
        assert torch.equal(one.stats.count["act"], other.stats.count["act"])
        assert one.routing is not None and other.routing is not None
        assert torch.equal(one.routing, other.routing)


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
