"""What a forward for answers does not compute, and that no bit of an answer changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from relneuron.ablation.evaluate import plan_rows
from relneuron.ablation.said import Row
from relneuron.model.instrument import Clock
from relneuron.model.mlps.find import find_mlps
from relneuron.model.patch import Patch
from relneuron.model.spared import LEAST_ROWS, Spared, find_spared, may_share
from relneuron.model.states import LayerState, Tokens, mask_states, replacements
from tests.conftest import FAMILIES, tiny_model
from tests.kit.experts import expert_model

PROMPT = [5, 9, 31, 7, 4, 18, 2]
N = 70  # rows, of three prompts
WHICH = [row * row % 3 for row in range(N)]
N_ASKED = 2


def forward(
    model: Any, spared: Spared | None, states: Sequence[LayerState] = (), padding: str = ""
) -> list[Tensor]:
    """The asked logits and the cache of rows of three prompts under two conditions."""
    mlps = find_mlps(model)
    tokens = torch.tensor([[*PROMPT[k:], *PROMPT[:k]] for k in WHICH])
    mask = torch.ones_like(tokens)
    for row, prompt in enumerate(WHICH):
        # Prompts of other lengths; of those padded on the right the last columns mean nothing.
        at = slice(prompt) if padding == "left" else slice(len(PROMPT) - prompt, None)
        mask[row, at] = 0 if padding else 1
    off = [(layer, "gate", i) for layer in range(mlps[0].n_layers) for i in range(0, 40, 3)]
    with torch.no_grad(), Patch(mlps, states or mask_states([[], off], mlps)) as patch:
        patch.tokens = Tokens(conditions=torch.arange(N, dtype=torch.int32) % 2, n_needed=N_ASKED)
        if spared is None:
            out = model(input_ids=tokens, attention_mask=mask, use_cache=True)
        else:
            with spared.of(WHICH, len(PROMPT), N_ASKED) as rows:
                out = model(input_ids=tokens[rows], attention_mask=mask[rows], use_cache=True)
    cache = getattr(out, "cache", None) or out.past_key_values
    states_of = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return [out.logits[:, -N_ASKED:], *states_of]


def other(family: str) -> Any:
    """A tiny model of a family whose blocks are of another kind than Llama's."""
    import transformers

    size = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    config = {
        "gpt2": lambda: transformers.GPT2Config(**size),
        "gptj": lambda: transformers.GPTJConfig(**size, rotary_dim=8),
    }[family]()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("padding", ["", "left", "right"])
@pytest.mark.parametrize("family", [*sorted(FAMILIES), "gpt2", "gptj"])
def test_what_is_spared_changes_no_bit(family: str, padding: str) -> None:
    model = tiny_model(family) if family in FAMILIES else other(family)
    mlps = find_mlps(model)
    found = find_spared(model, mlps, PROMPT)
    # GPT-2 gives its last layer's output the shape of its tokens.
    assert found is not None and (found.last is None) == (family == "gpt2")
    seen: dict[str, list[torch.Size]] = {}
    layers = found.layers
    linear = next(m for m in found.first.modules() if _is_linear(m))
    watched = {"first": linear, "middle": mlps[1].module, "last": mlps[-1].module}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen.setdefault(name, []).append(given[0].shape)
        )
        for name, module in watched.items()
    ]
    spared = forward(model, found, padding=padding)
    for hook in hooks:
        hook.remove()
    # As many rows as make 64 tokens, though there are but three prompts; then all of them.
    n, n_all = len(PROMPT), N_ASKED if found.last else len(PROMPT)
    assert seen["first"] == [torch.Size([10, n, 32])] or seen["first"] == [torch.Size([10 * n, 32])]
    assert seen["middle"] == [torch.Size([N, n, 32])]
    assert seen["last"] == [torch.Size([N, n_all, 32])]
    plain = forward(model, None, padding=padding)
    assert all(torch.equal(a, b) for a, b in zip(spared, plain, strict=True))
    # Under the two conditions a prompt's rows differ, and those of one condition do not.
    logits = plain[0][:, -1]
    assert torch.equal(logits[0], logits[6]) and not torch.equal(logits[0], logits[3])
    assert not any("forward" in m.__dict__ for m in (*layers, *layers[0].modules()))


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def _scaled(mlps: Any) -> list[LayerState]:
    """Under the second condition every third neuron times a half."""
    return _changed(mlps, 0.5, None)


def _steered(mlps: Any) -> list[LayerState]:
    return _changed(mlps, 0.0, np.linspace(-1, 1, 48, dtype=np.float32))


def _changed(mlps: Any, factor: float, value: Any) -> list[LayerState]:
    chosen = np.zeros((2, 48), bool)
    chosen[1, ::3] = True
    shifts = None if value is None else {"gate": np.stack([value, value])}
    return [LayerState(replace=replacements(m, {"gate": chosen}, factor, shifts)) for m in mlps]


def _down(mlps: Any) -> list[LayerState]:
    """Outputs of the last layer alone."""
    return mask_states([[], [(2, "down", i) for i in range(9)]], mlps)


@pytest.mark.parametrize("states", [_scaled, _steered, _down])
def test_neurons_that_become_another_value_are_spared_as_well(
    states: Callable[[Any], list[LayerState]],
) -> None:
    model = tiny_model("llama")
    mlps = find_mlps(model)
    found = find_spared(model, mlps, PROMPT)
    both = [forward(model, way, states(mlps)) for way in (found, None)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    assert not torch.equal(both[0][0][0], both[0][0][3])  # one prompt, two conditions


def test_a_model_of_one_layer_is_first_and_last() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    found = find_spared(model, find_mlps(model), PROMPT)
    assert found is not None and found.first is found.last
    both = [forward(model, way) for way in (found, None)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_nothing_is_spared_where_bits_may_differ() -> None:
    model = tiny_model("llama")
    attention = find_mlps(model, attention=True)
    assert not may_share(model, attention) and find_spared(model, attention, PROMPT) is None
    half = tiny_model("llama", torch.bfloat16)
    assert not may_share(half, find_mlps(half))
    assert find_spared(model, find_mlps(model), [5]) is None


def test_a_mixture_of_experts_is_computed_whole() -> None:
    model = expert_model("mixtral")
    assert find_spared(model, find_mlps(model), PROMPT) is None


def test_an_attention_behind_the_mlp_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0]
    own = layer.forward

    def turned(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        read = layer.post_attention_layernorm(hidden_states)
        # The MLP comes first, too.
        out: Tensor = own(hidden_states + layer.mlp(read), *args, **kwargs)
        return out

    monkeypatch.setattr(type(layer), "forward", lambda self, *a, **k: turned(*a, **k))
    assert find_spared(model, find_mlps(model), PROMPT) is None


def test_a_hook_sees_every_row_and_column() -> None:
    model = tiny_model("llama")
    hook = model.model.layers[-1].input_layernorm.register_forward_hook(lambda *_: None)
    found = find_spared(model, find_mlps(model), PROMPT)
    assert found is not None and found.last is None
    hook.remove()
    # Those of transformers itself look at nothing but what is asked for.
    model(input_ids=torch.tensor([PROMPT]), output_hidden_states=True)
    found = find_spared(model, find_mlps(model), PROMPT)
    assert found is not None and found.last is not None


def test_the_clock_of_a_study_leaves_all_spared() -> None:
    model = tiny_model("llama")
    with Clock(model):
        found = find_spared(model, find_mlps(model), PROMPT)
    assert found is not None and found.last is not None


def test_a_last_layer_that_looks_at_other_columns_is_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    layer = model.model.layers[-1]
    own = type(layer).forward

    def backwards(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = own(self, hidden_states, *args, **kwargs)
        return out + out.mean(1, keepdim=True) if self is layer else out

    monkeypatch.setattr(type(layer), "forward", backwards)
    found = find_spared(model, find_mlps(model), PROMPT)
    assert found is not None and found.last is None


def test_few_rows_and_tokens_are_computed_as_ever() -> None:
    model = tiny_model("llama")
    found = find_spared(model, find_mlps(model), PROMPT)
    assert found is not None and len(found.layers) == 3
    for prompts, n_tokens, n_asked, shorter in (
        ([0], 9, 2, []),  # a batch of one
        (list(range(80)), 9, 9, []),  # each its own, and every column asked
        (list(range(80)), 9, 2, [2]),
        ([0, 0, 1, 1, 1], 9, 2, []),  # too few to have the same bits
        ([0, 1] * 40, 9, 2, [0, 1, 2]),
        ([0, 0, 1] * 9, 20, 2, [0, 1, 2]),  # rows are spared, columns are too few
        ([0, 0, 1] * 9, 20, 20, [0, 1, 2]),
    ):
        with found.of(prompts, n_tokens, n_asked) as rows:
            assert [i for i, m in enumerate(found.layers) if "forward" in m.__dict__] == shorter
            assert (len(rows) < len(prompts)) == (shorter == [0, 1, 2])
            # Tokens and heads are no rows, nor are the axes of a picture.
            assert len(rows) == len(prompts) or len(rows) not in (n_tokens, 2, 3, 4)


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
