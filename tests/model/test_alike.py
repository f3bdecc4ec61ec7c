"""What rows of the same prompt share until the first neuron is off, and that no bit changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from relneuron.ablation.evaluate import plan_rows
from relneuron.ablation.said import Row
from relneuron.model.alike import LEAST_ROWS, Alike, find_alike, may_share
from relneuron.model.mlps.find import find_mlps
from relneuron.model.patch import Patch
from relneuron.model.states import Tokens, mask_states
from tests.conftest import tiny_model

PROMPT = [5, 9, 31, 7, 4, 18, 2]
N = 70  # rows, of three prompts


def forward(model: Any, alike: Alike | None, calls: list[int]) -> list[Tensor]:
    """The logits and the cache of rows of three prompts under two conditions."""
    mlps = find_mlps(model)
    which = [row * row % 3 for row in range(N)]
    tokens = torch.tensor([[*PROMPT[k:], *PROMPT[:k]] for k in which])
    off = [(layer, "gate", i) for layer in range(mlps[0].n_layers) for i in range(0, 40, 3)]
    with torch.no_grad(), Patch(mlps, mask_states([[], off], mlps)) as patch:
        patch.tokens = Tokens(conditions=torch.arange(N, dtype=torch.int32) % 2)
        if alike is None:
            out = model(input_ids=tokens, use_cache=True)
        else:
            attention = alike.attention
            hook = attention.register_forward_pre_hook(lambda *_: calls.append(1))
            plain = attention.forward
            with alike.of(which, len(PROMPT)):
                assert attention.forward is not plain
                out = model(input_ids=tokens, use_cache=True)
            hook.remove()
    cache = getattr(out, "cache", None) or out.past_key_values
    return [out.logits, *(x for layer in cache.layers for x in (layer.keys, layer.values))]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_rows_of_one_prompt_share_the_first_attention_bit_for_bit(family: str) -> None:
    model = tiny_model(family)
    found = find_alike(model, find_mlps(model), PROMPT)
    assert found is not None
    seen: list[int] = []
    inputs: list[int] = []
    linear = next(m for m in found.attention.modules() if isinstance(m, torch.nn.Linear))
    hook = linear.register_forward_pre_hook(lambda _, given: inputs.append(len(given[0])))
    shared = forward(model, found, seen)
    hook.remove()
    assert seen == [1] and inputs == [10]  # of 64 tokens and more
    plain = forward(model, None, [])
    assert all(torch.equal(a, b) for a, b in zip(shared, plain, strict=True))
    # Under the two conditions a prompt's rows differ, and those of one condition do not.
    logits = plain[0][:, -1]
    assert torch.equal(logits[0], logits[6]) and not torch.equal(logits[0], logits[3])
    assert "forward" not in found.attention.__dict__


def test_nothing_is_shared_where_rows_may_differ() -> None:
    model = tiny_model("llama")
    attention = find_mlps(model, attention=True)
    assert not may_share(model, attention) and find_alike(model, attention, PROMPT) is None
    half = tiny_model("llama", torch.bfloat16)
    assert not may_share(half, find_mlps(half))
    assert find_alike(model, find_mlps(model), [5]) is None


def test_an_attention_behind_the_mlp_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0]
    own = layer.forward

    def turned(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        read = layer.post_attention_layernorm(hidden_states)
        # The MLP comes first, too.
        out: Tensor = own(hidden_states + layer.mlp(read), *args, **kwargs)
        return out

    monkeypatch.setattr(layer, "forward", turned)
    assert find_alike(model, find_mlps(model), PROMPT) is None


def test_numbers_of_rows_that_are_those_of_tokens_or_heads_are_not_shared() -> None:
    model = tiny_model("llama")
    found = find_alike(model, find_mlps(model), PROMPT)
    assert found is not None
    for prompts, n_tokens in (
        ([0, 1] * 40, 80),  # as many tokens as rows
        (list(range(80)), 9),  # each its own
        ([0, 0, 1, 1, 1], 9),  # too few to have the same bits
        ([0, 0, 1, 1], 50),  # as many rows as heads
    ):
        with found.of(prompts, n_tokens):
            assert "forward" not in found.attention.__dict__


EVERY = [(condition, prompt) for condition in range(31) for prompt in range(9)]


# A batch of two lengths between those of one, and a small one at the end.
@example(EVERY, [2, 2, 2, 3, 3, 3, 3, 4, 4], 150, 40)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), unique=True, max_size=400),
    st.lists(st.integers(1, 4), min_size=9, max_size=9),
    st.integers(1, 300),
    st.integers(1, 40),
)
def test_rows_by_prompt_are_the_same_rows_with_the_same_padding(
    pairs: list[tuple[int, int]], lengths: list[int], budget: int, n_conditions: int
) -> None:
    def planned(by_prompt: bool) -> list[tuple[range, list[Row]]]:
        rows = [Row(*pair) for pair in pairs]
        batches = plan_rows(rows, lengths, budget, n_conditions, by_prompt=by_prompt)
        return [(wave, [*batch]) for wave, batch in batches]

    def padding(batches: list[tuple[range, list[Row]]]) -> dict[Row, tuple[range, int, bool, bool]]:
        """Of each row its wave, its columns, and whether the batch is masked; small ones whole."""
        found: dict[Row, tuple[range, int, bool, bool]] = {}
        for wave, batch in batches:
            own = {lengths[row.prompt] for row in batch}
            found |= {row: (wave, max(own), len(own) > 1, len(batch) < LEAST_ROWS) for row in batch}
        return found

    as_ever, by_prompt = planned(False), planned(True)
    assert padding(by_prompt) == padding(as_ever)
    assert len(by_prompt) == len(as_ever)
    for _, batch in by_prompt:
        assert batch == sorted(batch)
        assert len(batch) == 1 or len(batch) * max(lengths[r.prompt] for r in batch) <= budget


def test_rows_of_a_prompt_stand_together() -> None:
    rows = [Row(condition, prompt) for condition in range(100) for prompt in range(20)]
    batches = [batch for _, batch in plan_rows(rows, [5] * 20, 1000, 100, by_prompt=True)]
    assert [len({row.prompt for row in batch}) for batch in batches] == [2] * 10
