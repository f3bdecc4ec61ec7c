"""Text under masks and steering: what plain hooks and transformers' own `generate` give.

The reference takes one prompt at a time, without padding; ours mixes masks and prompts in batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import relneuron.ablation.continuer
from relneuron.ablation.continuer import Continuer, next_tokens
from relneuron.ablation.options import GenerateOptions
from relneuron.ablation.steer import mean_activations, steering_states
from relneuron.artifact.counts import NAME, Counts
from relneuron.artifact.files import RelneuronError
from relneuron.model.load import load_tokenizer
from relneuron.model.mlps.find import find_mlps
from relneuron.model.patch import Patch
from relneuron.model.questions import Questions
from tests.conftest import tiny_model
from tests.kit.continued import (
    LAYERS,
    NEW,
    OFF,
    PROMPTS,
    SHAPE,
    WIDTH,
    Sets,
    load_talkative,
    make_sets,
    ours,
    write_study,
)

# One of the sets is empty, which is said in each run that switches it off.
pytestmark = pytest.mark.filterwarnings("ignore:empty. its set has no neuron")


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Any, Any]:
    return load_talkative(model_folder)


@pytest.fixture(scope="module")
def sets() -> Sets:
    return make_sets()


@pytest.fixture
def study(tmp_path: Path, sets: Sets) -> Path:
    return write_study(tmp_path, sets)


SITES = ("gate", "up", "down")


def zero(out: Tensor, indices: Sequence[int]) -> Tensor:
    new = out.clone()
    new[..., indices] = 0
    return new


@contextmanager
def hooked(
    model: Any, off: Sequence[Any], on: Sequence[Any] = (), means: Any = None
) -> Iterator[None]:
    """Plain hooks: activations and outputs of `off` are 0, activations of `on` are their means.

    A neuron of both is set: its up output stays.
    """
    with ExitStack() as stack:
        for layer, block in enumerate(model.model.layers):
            chosen = [index for at, _, index, *_ in on if at == layer]
            dark = {site: [n[2] for n in off if n[:2] == (layer, site)] for site in SITES}
            dark["up"] = [index for index in dark["up"] if index not in chosen]

            def act(
                _m: Any,
                _i: Any,
                out: Tensor,
                dark: Any = dark["gate"],
                chosen: Any = chosen,
                layer: int = layer,
            ) -> Tensor:
                new = zero(out, dark)
                if chosen:
                    new[..., chosen] = torch.tensor(means[layer, chosen], dtype=out.dtype)
                return new

            stack.callback(block.mlp.act_fn.register_forward_hook(act).remove)
            for site in ("up", "down"):

                def off_hook(_m: Any, _i: Any, out: Tensor, dark: Any = dark[site]) -> Tensor:
                    return zero(out, dark)

                module = getattr(block.mlp, f"{site}_proj")
                stack.callback(module.register_forward_hook(off_hook).remove)
        yield


def reference(
    loaded: tuple[Any, Any], prompt: str, *, penalty: float, stop: Sequence[str], new: int = NEW
) -> tuple[str, int, str]:
    """transformers' own greedy generation of one prompt, then cut by hand."""
    model, tokenizer = loaded
    tokens = tokenizer(prompt, return_tensors="pt")
    made = model.generate(
        tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        max_new_tokens=new,
        do_sample=False,
        repetition_penalty=penalty,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )[0, tokens["input_ids"].shape[1] :].tolist()
    for n in range(1, len(made) + 1):
        text = tokenizer.decode(made[:n], skip_special_tokens=True)
        cuts = [text.index(s) for s in stop if s in text]
        if made[n - 1] == tokenizer.eos_token_id:
            return tokenizer.decode(made[: n - 1], skip_special_tokens=True), n - 1, "eos"
        if cuts:
            return text[: min(cuts)], n, "stop string"
    text = tokenizer.decode(made, skip_special_tokens=True)
    return text.rstrip("\ufffd"), len(made), "length"


@pytest.mark.parametrize("penalty", [1.0, 1.1, 1.7])
@pytest.mark.parametrize("stop", [(), ("in", "ear")])
def test_every_mask_and_prompt_at_once_is_one_prompt_at_a_time(
    loaded: Any, study: Path, sets: Any, penalty: float, stop: tuple[str, ...]
) -> None:
    made = ours(loaded, study, off=OFF, repetition_penalty=penalty, stop=stop)
    assert [(g.mask, g.id) for g in made] == [(m, str(i + 1)) for m in OFF for i in range(5)]
    for g in made:
        with hooked(loaded[0], sets.get(g.mask, []) and [n[:3] for n in sets[g.mask]]):
            wanted = reference(loaded, g.prompt, penalty=penalty, stop=stop)
        assert (g.output, g.n_tokens, g.stopped) == wanted, g
        assert g.prompt == PROMPTS[int(g.id) - 1] and g.set == ""
    texts = [tuple(g.output for g in made if g.mask == mask) for mask in OFF]
    assert len(set(texts)) == 4
    assert {g.stopped for g in made} >= ({"stop string", "length"} if stop else {"length"})


def test_the_ends_of_rows_are_found_each_for_itself(loaded: Any, study: Path, sets: Any) -> None:
    """EOS too: it is made the token that some rows choose in the middle of their text."""
    model, tokenizer = loaded
    plain = ours(loaded, study, "a.jsonl", off=OFF)
    tokens = [tokenizer(g.output, add_special_tokens=False)["input_ids"] for g in plain]
    end = max({t for line in tokens for t in line}, key=lambda t: sum(t in line for line in tokens))
    before = tokenizer.eos_token_id
    tokenizer.eos_token_id = end
    try:
        made = ours(loaded, study, "b.jsonl", off=OFF, stop=("e",))
        for g in made:
            with hooked(model, [n[:3] for n in sets.get(g.mask, [])]):
                assert g[4:7] == reference(loaded, g.prompt, penalty=1.1, stop=("e",))
    finally:
        tokenizer.eos_token_id = before
    assert {g.stopped for g in made} >= {"eos", "stop string"}


@pytest.mark.parametrize("to", ["en", "zh"])
def test_steering_is_hooks_that_set_activations(
    loaded: Any, study: Path, sets: Any, to: str
) -> None:
    counts = Counts.read(study / NAME)
    row = counts.groups.index(to)
    means = counts.arrays["sum.act"][row] / [1000, 500][row]
    made = ours(loaded, study, off=("", "en", "fr"), set_to=to, repetition_penalty=1.2)
    assert [g.mask for g in made][::5] == ["clean", "en", "fr"]
    for g in made:
        with hooked(loaded[0], [n[:3] for n in sets.get(g.mask, [])], sets[to], means):
            wanted = reference(loaded, g.prompt, penalty=1.2, stop=())
        assert (g.set, g.output, g.n_tokens, g.stopped) == (to, *wanted)
    unsteered = ours(loaded, study, "u.jsonl", off=("", "en", "fr"), repetition_penalty=1.2)
    assert [g.output for g in made] != [g.output for g in unsteered]


def test_a_neuron_that_is_off_and_set_is_set(loaded: Any, study: Path, sets: Any) -> None:
    alone = ours(loaded, study, "a.jsonl", off=("empty",), set_to="en")
    both = ours(loaded, study, "b.jsonl", off=("en",), set_to="en")
    assert [g.output for g in alone] == [g.output for g in both]


def test_states_for_steering_have_a_row_per_condition(loaded: Any, sets: Any) -> None:
    model, _ = loaded
    mlps = find_mlps(model)
    means = np.random.default_rng(3).normal(size=(LAYERS, WIDTH)).astype(np.float32)
    off = [[], sets["fr"], sets["en"]]
    tokens = torch.randint(5, 60, (3, 6), generator=torch.Generator().manual_seed(0))
    with Patch(mlps, steering_states(mlps, off, sets["zh"], means)) as patch, torch.no_grad():
        patch.tokens.conditions = torch.tensor([2, 0, 1], dtype=torch.int32)
        together = model(tokens).logits
    for row, condition in enumerate([2, 0, 1]):
        zeros = [n[:3] for n in off[condition]]
        with hooked(model, zeros, sets["zh"], means), torch.no_grad():
            assert torch.allclose(together[row], model(tokens[row : row + 1]).logits[0], atol=1e-4)
    assert all(state.replace is None for state in steering_states(mlps, off, [], means))
    with pytest.raises(RelneuronError, match="at site down"):
        steering_states(mlps, off, sets["fr"], means)
    with pytest.raises(RelneuronError, match=r"not \(layers, width\)"):
        steering_states(mlps, off, sets["zh"], means[:1])
    with pytest.raises(RelneuronError, match="is not in a model"):
        steering_states(mlps, off, [(9, "gate", 0)], means)


def test_mean_activations_are_sums_by_tokens(study: Path) -> None:
    counts = Counts.read(study / NAME)
    for row, (name, tokens) in enumerate([("en", 1000), ("zh", 500)]):
        found = mean_activations(study, name, SHAPE)
        assert found.dtype == np.float32
        for layer in range(LAYERS):
            for i in range(0, WIDTH, 7):
                wanted = np.float32(float(counts.arrays["sum.act"][row, layer, i]) / tokens)
                assert found[layer, i] == wanted


def test_masks_may_share_no_cache_rows_with_a_cache_of_another_kind(
    loaded: Any, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are done stay in the batch, and their text is not longer for it."""
    from transformers import DynamicCache

    wanted = ours(loaded, study, "a.jsonl", off=OFF, stop=("in", "ear"))
    selected = []
    true = DynamicCache.batch_select_indices
    with monkeypatch.context() as patch:
        patch.setattr(
            DynamicCache,
            "batch_select_indices",
            lambda self, rows: (selected.append(len(rows)), true(self, rows))[1],
        )
        assert ours(loaded, study, "b.jsonl", off=OFF, stop=("in", "ear")) == wanted
    assert selected == sorted(selected, reverse=True) and len(selected) > 1
    owner = next(c for c in DynamicCache.__mro__ if "batch_select_indices" in vars(c))
    monkeypatch.delattr(owner, "batch_select_indices")
    assert ours(loaded, study, "c.jsonl", off=OFF, stop=("in", "ear")) == wanted


def model_of(family: str, **changes: Any) -> Any:
    """A random model of a family with another vocabulary than conftest's."""
    import transformers

    config = tiny_model(family).config
    for name, value in {"initializer_range": 0.3, "pad_token_id": 0, **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["gemma2", "phi3", "qwen3", "mistral"])
def test_other_families_with_their_caches(model_folder: Path, study: Path, family: str) -> None:
    tokenizer = load_tokenizer(str(model_folder))
    extra = {"sliding_window": 6} if family in ("gemma2", "mistral") else {}
    model = model_of(family, vocab_size=len(tokenizer), eos_token_id=1, **extra)
    data = json.loads((study / "neurons.json").read_text())
    data["model"]["layers"] = 3
    (study / "neurons.json").write_text(json.dumps(data))
    made = ours((model, tokenizer), study, off=("clean", "en"), stop=("e",), backend="reference")
    for g in made[:5]:
        wanted = reference((model, tokenizer), g.prompt, penalty=1.1, stop=("e",))
        assert (g.output, g.n_tokens, g.stopped) == wanted
    assert [g.output for g in made[:5]] != [g.output for g in made[5:]]


def test_padding_is_not_penalised(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large penalty: one of the pad token 0 (BOS here) in short rows would show in the logits."""
    model, tokenizer = loaded
    asker = Continuer(
        model, tokenizer, GenerateOptions(max_new_tokens=1, repetition_penalty=3.0, stop=())
    )
    seen: list[Tensor] = []

    def choose(logits: Tensor, known: Tensor, *_: Any) -> Tensor:
        seen.append(known.clone())
        return logits.argmax(-1)

    monkeypatch.setattr(relneuron.ablation.continuer, "next_tokens", choose)
    questions = Questions([], [[5, 6, 7, 5], [9], [0, 8]], [])
    asker.go_on(questions, [0, 1, 2], lambda step: None)
    assert [row.nonzero()[:, 0].tolist() for row in seen[0]] == [[5, 6, 7], [9], [0, 8]]


def test_a_penalty_lowers_logits_of_either_sign() -> None:
    options = GenerateOptions(repetition_penalty=2.0)
    logits = torch.tensor([[-3.0, -2.0, -5.0], [3.0, 2.0, -5.0], [-1.0, -1.5, -5.0]])
    seen = torch.tensor([[False, True, False], [True, False, False], [False, False, False]])
    assert next_tokens(logits, seen, options, []).tolist() == [0, 1, 0]
