"""Correctness rules, batches, pooling and rankings, each against its specification.

The vectors are those of the method's specification where the folder with it is there.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import Shape, random_neurons, top_k
from relneuron.artifact.prompts import Prompt
from relneuron.methods.responses.fill import pooled_tokens
from relneuron.methods.responses.labels import sample_labels
from relneuron.model.ask import Answers, Asker
from relneuron.model.batches import largest, plan_batches, positions_of
from relneuron.model.converse import Step
from relneuron.model.load import load_model
from relneuron.model.mlps.find import find_mlps
from relneuron.model.patch import Patch
from relneuron.model.questions import Questions, encode, is_correct
from relneuron.model.states import LayerState, Tokens, mask_states
from tests.conftest import SHARED, tiny_model


@pytest.mark.parametrize(
    ("prediction", "answer", "strict", "relaxed"),
    [
        ("\nQuarter", "quarterback", 1, 1),
        ("Quarterback", "quarterback", 1, 1),
        ("Pan", "Kazuhiro Tsuga", 0, 0),
        ("", "London", 0, 0),
        ("\n", "London", 0, 0),
        ("The", "London", 0, 0),
        ("A.", "quarterback", 0, 0),
        ("Japan.", "Japan", 0, 1),
        ("soccer", "soccer", 1, 1),
        ("Kaz", "Kazuhiro Tsuga", 1, 1),
        ("New", "New York City", 1, 1),
        ("New Y", "New York City", 1, 1),
        ("York", "New York City", 0, 0),
    ],
)
def test_both_correctness_rules(prediction: str, answer: str, strict: int, relaxed: int) -> None:
    assert is_correct(prediction, answer) == strict
    assert is_correct(prediction, answer, accept_object_prefix=True) == relaxed


def test_the_largest_is_that_of_argmax() -> None:
    torch.manual_seed(0)
    logits = torch.randint(0, 5, (50, 2, 300)).float()  # many equal ones
    logits[0, 0, 7], logits[1], logits[2, 1, 3:5] = float("nan"), float("-inf"), float("nan")
    logits[3], logits[3, 0, 9] = -0.0, 0.0
    assert torch.equal(largest(logits), logits.argmax(-1))
    assert torch.equal(largest(logits[:, -1]), logits[:, -1].argmax(-1))
    assert torch.equal(largest(logits.double()), logits.argmax(-1))


def test_rows_with_the_same_positions_share_them() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 1]])
    assert positions_of(mask).tolist() == [[0, 1, 2]]
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert positions_of(mask).tolist() == [[0, 0, 1], [0, 1, 2]]
    mask = torch.tensor([[0, 1, 1], [0, 1, 1]])
    assert positions_of(mask).tolist() == [[0, 0, 1]]


def questions(lengths: list[int], splits: list[str]) -> Questions:
    prompts = [
        Prompt(str(i), "r", split, "en", "{}", "s", "o", "s") for i, split in enumerate(splits)
    ]
    return Questions(prompts, [[3] * n for n in lengths], [0] * len(lengths))


def test_batches_hold_one_split_and_the_token_budget() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 30, 200).tolist()
    splits = generator.choice(["det", "eva"], 200).tolist()
    asked = questions(lengths, splits)
    batches = plan_batches(asked, 64)
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    for batch in batches:
        assert len({splits[row] for row in batch}) == 1
        assert len(batch) * max(lengths[row] for row in batch) <= 64
    # A prompt longer than the budget is asked alone; a split's batches do not depend on others.
    assert plan_batches(questions([99, 1], ["eva", "eva"]), 64) == [[1], [0]]
    only = [row for row in range(200) if splits[row] == "eva"]
    alone = plan_batches(questions([lengths[r] for r in only], ["eva"] * len(only)), 64)
    assert [[only[row] for row in batch] for batch in alone] == [
        batch for batch in batches if splits[batch[0]] == "eva"
    ]


def test_pooling_takes_effective_tokens_on_either_side() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    mean = pooled_tokens(mask, pooling="mean", exclude_bos=False)
    assert mean.tolist() == mask.bool().tolist()
    rest = pooled_tokens(mask, pooling="mean", exclude_bos=True)
    assert rest.long().tolist() == [[0, 0, 0, 1], [0, 1, 1, 0]]
    last = pooled_tokens(mask, pooling="last", exclude_bos=False)
    assert last[0].long().tolist() == [0, 0, 0, 1]
    assert last[1].long().tolist()[2] == 1


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_pooled_sums_are_those_of_plain_hooks(llama: Any, backend: str) -> None:
    tokens = torch.randint(3, 90, (3, 6), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[-1, -1, 0, 0, 0, 0], [2, 2, 2, 2, 2, -1], [-1, 1, -1, 1, 1, 1]]).int()
    mlps = find_mlps(llama)
    widths = {"gate": 48, "up": 48, "down": 32}
    states = [
        LayerState(responses={site: torch.zeros(3, w) for site, w in widths.items()}) for _ in mlps
    ]
    seen: dict[tuple[int, str], torch.Tensor] = {}
    handles = [
        getattr(mlp.module, f"{site}_proj").register_forward_hook(
            lambda _m, _i, out, key=(mlp.layer, site): seen.update({key: out})
        )
        for mlp in mlps
        for site in widths
    ]
    with torch.no_grad(), Patch(mlps, states, backend=backend) as patch:
        patch.tokens.prompt_ids = ids
        llama(tokens)
    for handle in handles:
        handle.remove()
    for (layer, site), values in seen.items():
        wanted = torch.stack([values[ids == prompt].double().sum(0) for prompt in range(3)])
        ours = (states[layer].responses or {})[site]
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)


class Letters:
    """A tokenizer of one token per letter, without special tokens."""

    eos_token_id = 2

    def __call__(self, texts: Any, **_: Any) -> dict[str, Any]:
        return {"input_ids": [[ord(c) % 90 + 3 for c in text] for text in texts]}

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def prompt(text: str) -> Prompt:
    return Prompt(text, "r", "eva", "en", "{}", "s", "o", text)


def test_batched_answers_with_cache_and_padding_are_those_of_one_by_one(llama: Any) -> None:
    asked = encode(Letters(), llama, [prompt("a" * n + "bcd") for n in range(1, 12)])
    asker = Asker(llama, Letters())
    together = asker.ask(asked, range(11))
    for row in range(11):
        alone = asker.ask(asked, [row])
        assert together.predictions[row] == alone.predictions[0]
        assert abs(together.logprobs[row] - alone.logprobs[0]) < 1e-5


# --- the object's first token put in ---------------------------------------------------------


def random_questions(lengths: list[int], vocabulary: int, seed: int) -> Questions:
    """Prompts of random tokens, each with a random first token of the answer."""
    generator = np.random.default_rng(seed)
    ids = [generator.integers(3, vocabulary, n).tolist() for n in lengths]
    answers = generator.integers(3, vocabulary, len(ids)).tolist()
    return Questions([prompt(str(i)) for i in range(len(ids))], ids, answers)


def forced_is_greedy(model: Any, vocabulary: int, lengths: list[int], seed: int = 0) -> None:
    """With random neurons off in every row; rows of all kinds are among the prompts."""
    mlps = find_mlps(model)
    shape = {"layers": len(mlps), "width": mlps[0].width, "hidden": mlps[0].hidden}
    off = [random_neurons(shape, Shape.of(shape).total // 2, seed) for seed in range(3)]
    asked = random_questions(lengths, vocabulary, seed)
    asker, rows = Asker(model, Letters()), range(len(lengths))
    ids = torch.tensor([row % 4 for row in rows], dtype=torch.int32)
    with Patch(mlps, mask_states([[], *off], mlps)) as patch:

        def mark(step: Step) -> None:
            needed = step.n_needed if step.n_needed < step.mask.shape[1] else None
            patch.tokens = Tokens(conditions=ids[step.rows], n_needed=needed)

        asker._ends = set()
        firsts = [int(text.split()[0]) for text in asker.ask(asked, rows, mark).predictions]
        # Every third row is forced to take what it takes anyway; both kinds may end at once.
        for row in rows:
            if row % 3 == 0:
                asked.answers[row] = firsts[row]
            elif asked.answers[row] == firsts[row]:
                asked.answers[row] = 3 + (firsts[row] - 2) % (vocabulary - 3)
        asker._ends = {firsts[0], firsts[1]}
        greedy, forced = asker.ask(asked, rows, mark), asker.ask_forced(asked, rows, mark)
    kinds = {(firsts[r] == asked.answers[r], firsts[r] in asker._ends) for r in rows}
    assert kinds == {(same, ends) for same in (True, False) for ends in (True, False)}
    assert forced.predictions == greedy.predictions
    assert greedy.predictions.count("") >= 2
    np.testing.assert_allclose(forced.logprobs, greedy.logprobs, rtol=0, atol=1e-5)
    assert forced.predictions != asker.ask(asked, rows).predictions


def test_the_forced_token_changes_no_answer(family_model: Any) -> None:
    lengths = np.random.default_rng(0).permutation([*range(1, 21), *range(1, 21)]).tolist()
    forced_is_greedy(family_model, 96, lengths)


def test_the_forced_token_changes_no_answer_of_a_trained_model(model_folder: Any) -> None:
    model = load_model(str(model_folder))
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, 21, 40).tolist()
        forced_is_greedy(model, model.config.vocab_size, lengths, seed)


def test_one_row_or_none_that_differs(llama: Any) -> None:
    """The second step may have all rows, one row, or not run at all."""
    asked = random_questions([4, 1, 7], 96, 0)
    asker = Asker(llama, Letters())
    asker._ends = set()
    firsts = [int(text.split()[0]) for text in asker.ask(asked, range(3)).predictions]
    for differ in ([], [1], [0, 1, 2]):
        asked.answers[:] = [3 + (f - 2) % 93 if i in differ else f for i, f in enumerate(firsts)]
        steps: list[Step] = []
        forced = asker.ask_forced(asked, range(3), steps.append)
        assert forced.predictions == asker.ask(asked, range(3)).predictions
        assert [step.rows.tolist() for step in steps] == [[0, 1, 2], differ][: 1 + bool(differ)]
        assert asker.ask_forced(asked, [2]).predictions == [forced.predictions[2]]
    asker._ends = {firsts[1]}
    steps = []
    asker.ask_forced(asked, range(3), steps.append)
    assert steps[1].rows.tolist() == [row for row in range(3) if firsts[row] != firsts[1]]


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_a_prompt_that_reaches_the_sliding_window_is_not_forced(family: str) -> None:
    model = tiny_model(family, sliding_window=8)
    asker = Asker(model, Letters())
    inside, outside = random_questions([1, 3, 5], 96, 0), random_questions([1, 3, 6], 96, 0)
    assert asker.forces_exactly(inside)
    together = asker.ask_forced(inside, range(3))
    assert together.predictions == asker.ask(inside, range(3)).predictions
    assert not asker.forces_exactly(outside)


@pytest.mark.parametrize("error", [NotImplementedError, AttributeError, TypeError])
@pytest.mark.parametrize("known", [True, False])
def test_a_cache_that_cannot_be_cut_is_not_forced(
    llama: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception], known: bool
) -> None:
    """Also where the clean model knows every answer, and only an ablated one needs the cut."""
    from transformers import DynamicCache

    asked = random_questions([5, 2, 9], 96, 0)
    asker = Asker(llama, Letters())
    if known:
        predictions = asker.ask(asked, range(3)).predictions
        asked.answers[:] = [int(text.split()[0]) for text in predictions]
    assert asker.forces_exactly(asked)

    def refuse(*_: Any) -> None:
        raise error("this cache has fixed rows")

    monkeypatch.setattr(DynamicCache, "batch_select_indices", refuse)
    assert not asker.forces_exactly(asked)


def test_wrongly_forced_answers_are_noticed(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = random_questions(list(range(1, 21)), 96, 0)
    asker = Asker(llama, Letters())
    assert asker.forces_exactly(asked)
    forced = Asker.ask_forced

    def wrong(self: Asker, *rest: Any) -> Answers:
        answers = forced(self, *rest)
        return Answers([*answers.predictions[:-1], "wrong"], answers.logprobs)

    monkeypatch.setattr(Asker, "ask_forced", wrong)
    assert not asker.forces_exactly(asked)


def test_an_end_token_ends_the_answer(llama: Any) -> None:
    asked = encode(Letters(), llama, [prompt("abc")])
    asker = Asker(llama, Letters())
    first, second = map(int, asker.ask(asked, [0]).predictions[0].split())
    assert first != second
    asker._ends = {second}
    assert asker.ask(asked, [0]).predictions == [str(first)]
    asker._ends = {first}
    assert asker.ask(asked, [0]).predictions == [""]


def test_prompts_that_do_not_fit_are_refused() -> None:
    model = tiny_model("llama")
    for text, cause in (("", "no token"), ("a" * 63, "context of 64")):
        with pytest.raises(RelneuronError, match=cause):
            encode(Letters(), model, [prompt("fits"), prompt(text)])
    model.resize_token_embeddings(8)
    with pytest.raises(RelneuronError, match="the model has 8 tokens"):
        encode(Letters(), model, [prompt("abc")])


def test_labels_are_positives_and_four_times_as_many_negatives() -> None:
    relation_of = ["a"] * 10 + ["b"] * 30 + ["c"] * 60
    valid = [True] * 10 + [False] * 10 + [True] * 80
    labels = sample_labels(["a", "b", "c"], relation_of, valid)
    counts = [Counter(row.tolist()) for row in labels]
    assert [(c[1], c[0]) for c in counts] == [(10, 40), (20, 70), (60, 30)]
    for number, row in enumerate(labels):
        assert all(valid[i] for i in np.flatnonzero(row >= 0))
        assert {relation_of[i] for i in np.flatnonzero(row == 1)} == {"abc"[number]}
        assert "abc"[number] not in {relation_of[i] for i in np.flatnonzero(row == 0)}
    assert (labels == sample_labels(["a", "b", "c"], relation_of, valid)).all()
    assert (labels != sample_labels(["a", "b", "c"], relation_of, valid, seed=1)).any()


def test_top_k_breaks_ties_by_layer_site_and_index() -> None:
    scores = {
        "gate": np.array([[0.5, 0.9, 0.5], [0.5, 0.1, 1.0]]),
        "up": np.array([[0.5, 0.2, 0.2], [1.0, 0.1, 0.1]]),
        "down": np.array([[0.5, 0.5], [0.9, 0.5]]),
    }
    chosen = top_k(scores, 6)
    assert [neuron[:3] for neuron in chosen.neurons] == [
        (1, "gate", 2),
        (1, "up", 0),
        (0, "gate", 1),
        (1, "down", 0),
        (0, "gate", 0),
        (0, "gate", 2),
    ]
    assert chosen.places.tolist() == [10, 11, 1, 14, 0, 2]
    assert chosen[2:] == (0.5, 7, 2, 2)
    assert len(top_k(scores, 999).neurons) == 16
    # Scores that are equal as float32 are ties, whatever their float64 says.
    scores["gate"][0, 2] += 1e-12
    assert top_k(scores, 6).neurons == chosen.neurons


def test_random_neurons_cover_every_site() -> None:
    shape = {"layers": 3, "width": 20, "hidden": 10}
    everything = random_neurons(shape, Shape.of(shape).total, 0)
    assert len(everything) == len(set(everything)) == 150
    sites = Counter(site for _, site, _ in random_neurons(shape, 60, 1))
    assert set(sites) == {"gate", "up", "down"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the test vectors are not beside the project")
def test_token_mean_vector() -> None:
    vector = json.loads((SHARED / "methods" / "vectors.json").read_text())["token_mean"]
    outputs = torch.tensor(vector["outputs"]).float()
    mask = torch.tensor(vector["attention_mask"])
    chosen = pooled_tokens(mask, pooling="mean", exclude_bos=False)
    means = (outputs * chosen[:, :, None]).sum(1) / chosen.sum(1, keepdim=True)
    assert means.tolist() == vector["mean_effective"]
