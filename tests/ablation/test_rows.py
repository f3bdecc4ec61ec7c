"""Neurons off row by row: equal to weights at zero, put back exactly, batched equal to one by one.

Tiny Llama (grouped-query attention) and GPT-2 models from configs.
"""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import relneuron
from relneuron.ablation.rows import Off, head_places, intervene, off, row_states
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.model.batches import SENTENCES, Budget
from relneuron.model.patch import Patch
from relneuron.model.states import LayerState, Replacement, Tokens
from relneuron.model.stream.parts import ResidualModel
from relneuron.model.stream.read import read_residual_model
from tests.conftest import tiny_model

VOCABULARY, WIDTH, HEADS_WIDTH, N_LAYERS = 96, 48, 32, 3


def tiny_gpt2(dtype: torch.dtype = torch.float32) -> Any:
    """A random GPT-2 of the tiny models' sizes, its weights large enough to change answers."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_inner=WIDTH,
        n_layer=N_LAYERS,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make(family: str, dtype: torch.dtype = torch.float32) -> ResidualModel:
    if family == "gpt2":
        return read_residual_model(tiny_gpt2(dtype))
    return read_residual_model(tiny_model("llama", dtype, initializer_range=0.3))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def residual(request: pytest.FixtureRequest) -> ResidualModel:
    return make(request.param)


def sentences(n: int, seed: int = 0, longest: int = 9) -> tuple[list[list[int]], list[int]]:
    rng = random.Random(seed)
    ids = [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, longest))] for _ in range(n)]
    return ids, [rng.randrange(VOCABULARY) for _ in range(n)]


def random_offs(n: int, n_ffn: int, n_attention: int, seed: int = 0) -> list[Off]:
    rng = random.Random(seed)
    return [
        off(
            rng.sample(range(N_LAYERS * WIDTH), n_ffn),
            rng.sample(range(N_LAYERS * HEADS_WIDTH), n_attention),
        )
        for _ in range(n)
    ]


def without_columns(model: Any, one: Off) -> Any:
    """A copy whose weights have the neurons' columns at zero (GPT-2's Conv1D: rows)."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for width, places, attention in ((WIDTH, one.ffn, False), (HEADS_WIDTH, one.attention, 1)):
            for place in places.tolist():
                layer, index = divmod(place, width)
                if hasattr(model, "transformer"):
                    block = model.transformer.h[layer]
                    (block.attn if attention else block.mlp).c_proj.weight[index] = 0
                elif attention:
                    model.model.layers[layer].self_attn.o_proj.weight[:, index] = 0
                else:
                    model.model.layers[layer].mlp.down_proj.weight[:, index] = 0
    return model


def answer(model: Any, ids: list[int], target: int) -> tuple[int, float, float]:
    """Rank, probability and log-probability by the definition, one sentence without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double().numpy()
    rank = 1 + sum(float(value) > logits[target] for value in logits)
    logprob = logits[target] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    return rank, float(np.exp(logprob)), float(logprob)


def zeros_and_ones(offs: list[Off]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Masks (E, F) and (E, H * d_h) of int64, written place by place."""
    ffn = [torch.ones(len(offs), WIDTH, dtype=torch.int64) for _ in range(N_LAYERS)]
    attention = [torch.ones(len(offs), HEADS_WIDTH, dtype=torch.int64) for _ in range(N_LAYERS)]
    for row, one in enumerate(offs):
        for place in one.ffn.tolist():
            ffn[place // WIDTH][row, place % WIDTH] = 0
        for place in one.attention.tolist():
            attention[place // HEADS_WIDTH][row, place % HEADS_WIDTH] = 0
    return ffn, attention


Masks = list[torch.Tensor]


def masked(residual: ResidualModel, ffn: Masks, attention: Masks) -> Patch:
    """A patch in which each row of a batch has what its row of the masks does not keep at 0."""
    states = [
        LayerState(replace={"ffn": Replacement(~f.bool()), "attention": Replacement(~a.bool())})
        for f, a in zip(ffn, attention, strict=False)
    ]
    return patched(residual, states, len(ffn[0]))


def patched(residual: ResidualModel, states: list[LayerState], n_rows: int) -> Patch:
    patch = Patch(residual.parts(), states)
    patch.tokens = Tokens(conditions=torch.arange(n_rows))
    return patch


def without(residual: ResidualModel, one: Off) -> Patch:
    """A patch for one row."""
    return patched(residual, row_states(residual, [one]), 1)


# --- the patch -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_masked_row_is_the_model_with_the_weights_columns_at_zero(family: str) -> None:
    residual = make(family, torch.float64)
    offs = [off(), *random_offs(4, 10, 7)]
    ids = torch.randint(3, VOCABULARY, (5, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), masked(residual, *zeros_and_ones(offs)):
        ours = residual.model(ids).logits
    for row, one in enumerate(offs):
        with torch.no_grad():
            wanted = without_columns(residual.model, one)(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(ours[row], wanted, rtol=0, atol=1e-12)
    with torch.no_grad():
        clean = residual.model(ids).logits
    assert (ours[1:] - clean[1:]).abs().amax((1, 2)).min() > 1e-3


def test_rows_are_the_masks_place_by_place(residual: ResidualModel) -> None:
    offs = [*random_offs(3, 9, 8), off(range(WIDTH, WIDTH + 3))]
    ours = row_states(residual, offs)
    for site, masks in zip(("ffn", "attention"), zeros_and_ones(offs), strict=True):
        for mask, state in zip(masks, ours, strict=True):
            assert state.replace is not None
            assert torch.equal(~state.replace[site].chosen, mask.bool())
    first, *others = row_states(residual, [off([0]), off()])
    assert list(first.replace or {}) == ["ffn"]
    assert [state.replace for state in others] == [None] * (N_LAYERS - 1)


def test_what_was_there_comes_back_also_after_an_error(residual: ResidualModel) -> None:
    down, out = residual.layers[1].down, residual.layers[0].out
    before = [dict(layer.__dict__) for layer in (down, out)]
    ids = torch.tensor([[5, 6]])
    with pytest.raises(KeyError), masked(residual, *zeros_and_ones(random_offs(1, 2, 2))):
        assert "forward" in down.__dict__ and "forward" in out.__dict__
        raise KeyError
    assert [layer.__dict__ for layer in (down, out)] == before

    own = down.forward
    down.forward = lambda x: own(x) + 1  # type: ignore[method-assign]
    try:
        mine = down.__dict__["forward"]
        with torch.no_grad():
            clean = residual.model(ids).logits
            with without(residual, off([WIDTH])):
                off_and_more = residual.model(ids).logits
        assert down.__dict__["forward"] is mine
        with torch.no_grad():
            assert torch.equal(residual.model(ids).logits, clean)
        assert not torch.equal(off_and_more, clean)
    finally:
        del down.__dict__["forward"]
    assert [layer.__dict__ for layer in (down, out)] == before


def test_nested_masks_act_both_and_come_off_in_order(residual: ResidualModel) -> None:
    first, second = random_offs(1, 12, 4, seed=1)[0], random_offs(1, 12, 4, seed=2)[0]
    both = off([*first.ffn, *second.ffn], [*first.attention, *second.attention])
    ids = torch.tensor([[5, 6, 7]])
    model = residual.model
    with torch.no_grad():
        clean = model(ids).logits
        with without(residual, first):
            alone = model(ids).logits
            with without(residual, second):
                together = model(ids).logits
            assert torch.equal(model(ids).logits, alone)
        assert torch.equal(model(ids).logits, clean)
        with without(residual, both):
            assert torch.equal(model(ids).logits, together)


def test_a_row_of_a_model_that_is_ablated_has_both_off() -> None:
    """Patches of both kinds act in one another, and come off in any order."""
    residual = make("llama")
    one, ids, model = random_offs(1, 6, 4, seed=5)[0], torch.tensor([[5, 6, 7]]), residual.model
    both = off([*one.ffn, *range(4)], one.attention)
    with torch.no_grad(), without(residual, both):
        wanted = model(ids).logits
    neurons = [(0, "gate", index) for index in range(4)]
    for first, second in ((0, 1), (1, 0)):
        made = [relneuron.ablate(model, neurons), without(residual, one)]
        with torch.no_grad(), made[first], made[second]:
            torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-5)
    outer, inner = relneuron.ablate(model, neurons), without(residual, one)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(RelneuronError, match="last-in first-out"):
        outer.__exit__(None, None, None)
    with pytest.raises(RelneuronError, match="last-in first-out"):
        inner.__exit__(None, None, None)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_another_order_than_last_in_first_out_is_refused(residual: ResidualModel) -> None:
    def mask() -> Patch:
        return masked(residual, *zeros_and_ones(random_offs(1, 3, 3)))

    down = residual.layers[0].down
    first, second = mask().__enter__(), mask().__enter__()
    with pytest.raises(RelneuronError, match="last-in first-out"):
        first.__exit__(None, None, None)
    assert "forward" not in down.__dict__
    with pytest.raises(RelneuronError, match="last-in first-out"):
        second.__exit__(None, None, None)
    assert "forward" not in down.__dict__
    with mask() as active, pytest.raises(RelneuronError, match="active already"):
        active.__enter__()
    assert "forward" not in down.__dict__


def test_masks_that_do_not_fit_are_refused(residual: ResidualModel) -> None:
    ffn, attention = zeros_and_ones(random_offs(2, 3, 3))
    with pytest.raises(ValueError, match=r"3 states \(from the layers\) are expected, got 2"):
        masked(residual, ffn[:2], attention)
    with pytest.raises(ValueError, match=r"replaced at ffn must be \(C, 48\)"):
        masked(residual, [mask[:, :5] for mask in ffn], attention)
    with pytest.raises(ValueError, match=r"replaced at attention must be \(C, 32\)"):
        masked(residual, ffn, [mask[:, :5] for mask in attention])
    with (
        torch.no_grad(),
        masked(residual, ffn, attention),
        pytest.raises(ValueError, match="a batch of 2 rows"),
    ):
        residual.model(torch.tensor([[5], [6], [7]]))


def test_a_patched_layer_is_neither_copied_nor_pickled(residual: ResidualModel) -> None:
    with masked(residual, *zeros_and_ones(random_offs(1, 1, 1))):
        with pytest.raises(RelneuronError, match="cannot be copied"):
            copy.deepcopy(residual.layers[0].down)
        with pytest.raises(RelneuronError, match="cannot be pickled"):
            pickle.dumps(residual.layers[0].out)


def test_a_layer_that_the_model_does_not_call_is_seen(residual: ResidualModel) -> None:
    other = read_residual_model(copy.deepcopy(residual.model))
    with masked(other, *zeros_and_ones(random_offs(1, 1, 1))) as patch:
        with torch.no_grad():
            residual.model(torch.tensor([[5, 6]]))
        with pytest.raises(RelneuronError, match="does not call the layers"):
            patch.check_used()


# --- the measurement -------------------------------------------------------------------------


def test_rows_of_a_batch_are_those_of_the_weights_at_zero(residual: ResidualModel) -> None:
    ids, targets = sentences(7)
    heads = off((), head_places([0, 5, 11], 8))
    conditions = [[off()] * 7, random_offs(7, 10, 0), random_offs(7, 6, 9, seed=3), [heads] * 7]
    found = intervene(residual, ids, targets, conditions, batch_tokens=64)
    assert found.rank.dtype == np.int64 and found.rank.shape == (4, 7)
    for c, offs in enumerate(conditions):
        for s, one in enumerate(offs):
            wanted = answer(without_columns(residual.model, one), ids[s], targets[s])
            assert found.rank[c, s] == wanted[0]
            np.testing.assert_allclose(found.prob[c, s], wanted[1], rtol=1e-4, atol=1e-6)
            assert abs(found.logprob[c, s] - wanted[2]) < 1e-4


def test_two_hundred_sentences_in_batches_are_those_one_at_a_time(residual: ResidualModel) -> None:
    ids, targets = sentences(200)
    offs = random_offs(200, 10, 0, seed=4)
    together = intervene(residual, ids, targets, [offs], batch_tokens=512)
    for s in range(200):
        alone = intervene(residual, [ids[s]], [targets[s]], [[offs[s]]], batch_tokens=1)
        assert abs(together.logprob[0, s] - alone.logprob[0, 0]) < 1e-5
        assert together.rank[0, s] == alone.rank[0, 0]
    clean = intervene(residual, ids, targets, [[off()] * 200], batch_tokens=512)
    assert (np.abs(clean.logprob - together.logprob) > 1e-3).mean() > 0.9


def test_all_positions_of_a_head_are_off(residual: ResidualModel) -> None:
    """With every head and neuron off, only the last token's embedding is left."""
    everything = off(range(N_LAYERS * WIDTH), head_places(range(N_LAYERS * 4), 8))
    ids = [[7, 8, 9], [11, 12, 9]]
    found = intervene(residual, ids, [3, 3], [[everything] * 2], batch_tokens=99)
    assert found.logprob[0, 0] == pytest.approx(found.logprob[0, 1], abs=1e-6)


def test_equal_logits_share_the_better_rank() -> None:
    residual = make("llama")
    with torch.no_grad():
        residual.model.lm_head.weight[10] = residual.model.lm_head.weight[11]
    found = intervene(residual, [[5, 6]] * 2, [10, 11], [[off()] * 2], batch_tokens=99)
    assert found.rank[0, 0] == found.rank[0, 1] == answer(residual.model, [5, 6], 10)[0]


def test_a_journal_holds_finished_batches(residual: ResidualModel, tmp_path: Path) -> None:
    ids, targets = sentences(12)
    conditions = [[off()] * 12, random_offs(12, 10, 3)]
    seen: list[int] = []
    whole = intervene(residual, ids, targets, conditions, batch_tokens=30, advance=seen.append)
    assert sum(seen) == 24 and len(seen) > 3
    done: list[int] = []

    def stop(n: int) -> None:
        done.append(n)
        if len(done) == 2:
            raise KeyboardInterrupt

    path = tmp_path / "attribute.journal"
    with pytest.raises(KeyboardInterrupt), Journal(path, {}) as journal:
        intervene(
            residual, ids, targets, conditions, batch_tokens=30, journal=journal, advance=stop
        )
    journal = Journal(path, {})
    assert len(journal.done) == 2
    with torch.no_grad():
        again = intervene(residual, ids, targets, conditions, batch_tokens=30, journal=journal)
    for name in ("rank", "prob", "logprob"):
        assert np.array_equal(getattr(again, name), getattr(whole, name))
    # Nothing is asked a second time.
    broken = ResidualModel(**(vars(residual) | {"model": None}))
    last = intervene(broken, ids, targets, conditions, batch_tokens=30, journal=journal)
    assert np.array_equal(last.logprob, whole.logprob)


def test_places_of_another_model_are_refused(residual: ResidualModel) -> None:
    for one, cause in (
        (off([N_LAYERS * WIDTH]), "the FFN neuron 144 is not in a model with 144"),
        (off((), [-1]), "the attention neuron -1 is not in a model with 96"),
    ):
        with pytest.raises(RelneuronError, match=cause):
            intervene(residual, [[5]], [3], [[one]], batch_tokens=9)
    with pytest.raises(ValueError, match="one target and one set"):
        intervene(residual, [[5], [6]], [3, 3], [[off()]], batch_tokens=9)


def test_logits_that_are_not_finite_are_refused() -> None:
    residual = make("llama")
    with torch.no_grad():
        residual.model.lm_head.weight[50] = torch.inf
    with pytest.raises(RelneuronError, match="not finite"):
        intervene(residual, [[5, 6]], [3], [[off()]], batch_tokens=9)


def test_out_of_memory_names_smaller_batches(
    residual: ResidualModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(residual.model, "forward", full)
    asked: Any = (residual, [[5, 6]] * 4, [3] * 4, [[off()] * 4])
    with pytest.raises(RelneuronError, match="out of memory with 4 sentences") as error:
        intervene(*asked, batch_tokens=8, budget=Budget(8, "error", what=SENTENCES))
    assert error.value.fix == "use --batch-tokens 4, or --oom split"
    with (
        pytest.warns(UserWarning, match="out of memory with . sentences of together"),
        pytest.raises(RelneuronError, match="out of memory with 1 sentences of together 2"),
    ):
        intervene(*asked, batch_tokens=8)


@pytest.mark.filterwarnings("ignore:out of memory")
def test_out_of_memory_halves_the_batches_and_changes_no_answer(
    residual: ResidualModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, targets = sentences(12)
    conditions = [[off()] * 12, random_offs(12, 10, 3)]
    whole = intervene(residual, ids, targets, conditions, batch_tokens=64)
    true = residual.model.forward

    def small(*args: Any, **more: Any) -> Any:
        if more["input_ids"].numel() > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(*args, **more)

    monkeypatch.setattr(residual.model, "forward", small)
    budget = Budget(64, what=SENTENCES)
    halved = intervene(residual, ids, targets, conditions, batch_tokens=64, budget=budget)
    assert budget.tokens <= 20 and budget.notices
    assert np.array_equal(halved.rank, whole.rank)
    assert np.abs(halved.logprob - whole.logprob).max() < 1e-5
