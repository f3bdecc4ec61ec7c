"""What the patch counts in a model's experts, beside the counters of plain torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relneuron
from relneuron.artifact.files import RelneuronError
from relneuron.model.counting import counting_state
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.find_experts import find_experts
from relneuron.model.patch import Patch, StatisticsDone
from relneuron.model.states import LayerState, Tokens, mask_states
from tests.kit.experts import (
    CASES,
    FAMILIES,
    GROUPS,
    SITES,
    WIDTH,
    ExpertCounts,
    counting,
    expert_model,
    expert_state,
    experts_of,
    ids,
    in_plain_torch,
    logits,
    mask_experts,
    padded,
)


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
            # The router's weights are float32 numbers of two forwards, which round apart.
            wanted = (weight / tokens).float()
            torch.testing.assert_close(ours.weight.float(), wanted, equal_nan=True)


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


# --- shared experts, and statistics alone ----------------------------------------------------


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_shared_experts_in_one_module_see_every_token(dtype: torch.dtype) -> None:
    """Inkling's: h times the weight of the expert, then down, all experts summed."""
    from transformers.models.inkling.modeling_inkling import InklingSharedExperts

    config = SimpleNamespace(
        n_shared_experts=2, moe_intermediate_size=WIDTH, hidden_size=32, hidden_act="silu"
    )
    torch.manual_seed(0)
    module = InklingSharedExperts(config).eval()
    for weight in module.parameters():
        weight.normal_(std=0.2)
    module.to(dtype)
    layer = nn.ModuleDict({"shared": module})
    assert find_experts(1, "layers.1", layer) == (None, "no experts")
    experts, why = find_experts(1, "layers.1", layer, shared=True)
    assert experts is not None and experts.path == "layers.1.shared", why
    x, shares = torch.randn(3, 7, 32).to(dtype), torch.rand(3, 7, 2).to(dtype)
    want = module(x, shares)
    patch = counting([experts], sites=SITES)
    with patch:
        ours = module(x, shares)
    near = 16 * torch.finfo(dtype).eps * float(want.abs().max())
    assert ours.dtype == dtype and float((ours - want).abs().max()) <= near
    found = ExpertCounts.of(experts, patch.states[0])
    sizes = [int((group == GROUPS).sum()) for group in range(2)]
    assert found.tokens.tolist() == [sizes, sizes] and found.weight is not None
    for e in range(2):
        gate, up = x @ module.gate_proj[e].T, x @ module.up_proj[e].T
        for group in range(2):
            rows, own = group == GROUPS, slice(e * WIDTH, (e + 1) * WIDTH)
            # The sign of silu(gate) is that of gate.
            for site, values in (("gate", gate), ("up", up), ("product", gate * up)):
                active = (values[rows] > 0).sum(0)
                assert torch.equal(found.count[site][group, own], active)
            mean = shares[..., e][rows].double().mean()
            torch.testing.assert_close(found.weight[e, group], mean)
    neurons = [(1, "gate", 3), (1, "up", WIDTH + 5)]
    with Patch([experts], [mask_experts(experts, [neurons])]):
        ours = module(x, shares)
    for _, _, index in neurons:
        module.down_proj[index // WIDTH, :, index % WIDTH] = 0
    assert float((ours - module(x, shares)).abs().max()) <= near
    assert float((ours - want).abs().max()) > near


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


def test_instrument_shows_what_the_router_did() -> None:
    model = expert_model("qwen2")
    routing: list[tuple[Tensor, Tensor]] = []
    module = experts_of(model)[1].module
    handle = module.register_forward_pre_hook(lambda _, given: routing.append(given[1:3]))
    padded(model)
    handle.remove()
    with relneuron.instrument(model, 2) as probe:
        probe.batch(torch.ones_like(GROUPS), GROUPS)
        padded(model)
    stats, ((index, weights),) = probe.stats[1], routing
    sizes = [int((group == GROUPS).sum()) for group in range(2)]
    assert stats.tokens.tolist() == sizes
    for group in range(2):
        inside = (group == GROUPS).flatten()
        for e in range(stats.expert_tokens.shape[1]):
            sent = (index == e) & inside[:, None]
            assert int(stats.expert_tokens[group, e]) == int(sent.sum())
            mean = weights[sent].double().mean()
            torch.testing.assert_close(stats.expert_weight[group, e], mean, equal_nan=True)
