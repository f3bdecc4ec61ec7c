"""What happens to the neurons, and at which tokens: modes, positions, longer answers, perplexity.

Each against plain hooks on the trained model; and the last layer's MLP where it is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import relneuron
from relneuron.ablation.conditions import Ablation
from relneuron.ablation.evaluate import How, wave_states
from relneuron.ablation.how import mean_responses
from relneuron.artifact.effects import Condition
from relneuron.artifact.neurons import Shape, random_neurons
from relneuron.model.mlps.find import find_mlps
from relneuron.model.patch import Patch
from relneuron.model.states import LayerState, Tokens, mask_states
from relneuron.texts.neutral import Sentence, read_sentences, sentences_bytes
from tests.kit.files import read_rows
from tests.kit.hooked import INSIDE, RELATIONS, SHAPE, TOP, Change, Hooked, Study, plain_means


@pytest.fixture(scope="module")
def study(
    model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Study]:
    yield Study(model_folder, fact_folder, tmp_path_factory.mktemp("modes"))


def scaled(factor: float) -> Change:
    return lambda out, where, index: out * factor


def meant(means: dict[tuple[int, str], np.ndarray[Any, Any]]) -> Change:
    return lambda out, where, index: torch.from_numpy(means[where])[index].to(out.dtype)


def main_sets(study: Study) -> dict[str, Any]:
    return {"clean": [], **study.sets, "random.0": random_neurons(SHAPE, TOP, 0)}


def compare(
    study: Study,
    rows: dict[Any, Any],
    sets: dict[str, Any],
    changes: dict[str, Change],
    positions: str,
) -> int:
    """Rows against a KV-cached decoding with hooks; returns how many differ from clean."""
    hooked = Hooked(study)
    differ = 0
    for condition, neurons in sets.items():
        with hooked.changing(neurons, changes[condition], INSIDE[positions]):
            for (name, key), row in rows.items():
                if name == condition:
                    text, logprob = hooked.answer(study.prompts[key], cached=True)
                    assert row["prediction"] == text, (condition, key)
                    assert abs(float(row["logprob"]) - logprob) <= 1e-5, (condition, key)
                    differ += row["logprob"] != rows["clean", key]["logprob"]
    return differ


@pytest.mark.parametrize("positions", INSIDE)
@pytest.mark.parametrize("factor", [0.5, 0.0, -1.0, 2.0])
def test_scaled_outputs_are_those_of_plain_hooks(
    study: Study, tmp_path: Path, positions: str, factor: float
) -> None:
    rows = study.ablate(tmp_path, mode="scale", factor=factor, positions=positions)
    changes = dict.fromkeys(["clean", *RELATIONS, "random.0"], scaled(factor))
    assert compare(study, rows, main_sets(study), changes, positions) > len(rows) / 2


@pytest.mark.parametrize("positions", INSIDE)
@pytest.mark.parametrize("mean_of", ["all", "relation"])
def test_mean_outputs_are_those_of_plain_hooks(
    study: Study, tmp_path: Path, positions: str, mean_of: str
) -> None:
    rows = study.ablate(tmp_path, mode="mean", mean_of=mean_of, positions=positions)
    means = plain_means(study)
    changes = {
        name: meant(means[name if mean_of == "relation" and name in RELATIONS else ""])
        for name in ("clean", *RELATIONS, "random.0")
    }
    assert compare(study, rows, main_sets(study), changes, positions) > len(rows) / 2


@pytest.mark.parametrize("positions", INSIDE)
@pytest.mark.parametrize("generate", [None, 2])
def test_zeroed_outputs_are_those_of_plain_hooks(
    study: Study, tmp_path: Path, positions: str, generate: int | None
) -> None:
    rows = study.ablate(tmp_path, positions=positions, generate=generate)
    changes = dict.fromkeys(["clean", *RELATIONS, "random.0"], scaled(0.0))
    assert compare(study, rows, main_sets(study), changes, positions) > len(rows) / 2


@pytest.mark.parametrize("generate", [None, 2])
def test_positions_differ_in_what_they_answer(
    study: Study, tmp_path: Path, generate: int | None
) -> None:
    """Sets so large that also the second token of an answer depends on where they act."""
    sets = {"clean": [], **{f"s{seed}": random_neurons(SHAPE, 128, 50 + seed) for seed in range(8)}}
    path = study.write_sets(tmp_path / "neurons.json", {k: v for k, v in sets.items() if v})
    asked = {"any_set": True, "random_seeds": 0, "mode": "scale", "factor": -2.0}
    found = {}
    for positions in INSIDE:
        folder = tmp_path / positions
        found[positions] = study.ablate(
            folder, neurons=path, positions=positions, generate=generate, **asked
        )
        compare(study, found[positions], sets, dict.fromkeys(sets, scaled(-2.0)), positions)
    said = {p: [row["prediction"] for row in rows.values()] for p, rows in found.items()}
    assert said["all"] != said["prompt"]
    assert said["all"] != said["last"]
    assert said["prompt"] != said["last"]
    # The first token sees the same where all tokens and where the prompt's are changed.
    for key, row in found["all"].items():
        assert abs(float(row["logprob"]) - float(found["prompt"][key]["logprob"])) <= 1e-5


def test_equal_sets_of_two_relations_have_the_means_of_each(study: Study, tmp_path: Path) -> None:
    sets = dict.fromkeys(RELATIONS, study.sets["works_as"])
    path = study.write_sets(tmp_path / "n" / "neurons.json", sets)
    (path.parent / "responses.safetensors").write_bytes(
        (study.folder / "responses.safetensors").read_bytes()
    )
    rows = study.ablate(
        tmp_path / "out", neurons=path, mode="mean", mean_of="relation", random_seeds=0
    )
    means = plain_means(study)
    changes = {name: meant(means[name]) for name in ("", *RELATIONS)}
    compare(study, rows, {"clean": [], **sets}, changes | {"clean": changes[""]}, "all")
    said = [[r["logprob"] for (c, _), r in rows.items() if c == name] for name in RELATIONS]
    assert len(set(map(tuple, said))) == 3


def test_mean_responses_are_the_means_of_what_was_recorded(study: Study) -> None:
    prompts = list(study.prompts.values())
    found = mean_responses(study.folder / "responses.safetensors", prompts, SHAPE)
    wanted = plain_means(study)
    assert set(found) == set(wanted)
    order = [(layer, site) for layer in range(2) for site in ("gate", "up", "down")]
    for name, means in wanted.items():
        assert found[name].shape == (256,)
        np.testing.assert_allclose(
            found[name], np.concatenate([means[key] for key in order]), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("how", [How("scale", 1.0), How(), How("scale", 0.5)])
def test_what_changes_nothing_is_bit_equal_to_clean(study: Study, how: How, backend: str) -> None:
    """Scaled by 1, and an empty set, in a batch of rows that share its masks."""
    mlps = find_mlps(study.model)
    chosen = Shape.of(SHAPE).places(study.sets["works_as"])
    empty = chosen[:0]
    plan = [Ablation(Condition(str(i), "set"), p, []) for i, p in enumerate((chosen, empty))]
    tokens = torch.randint(3, 90, (6, 9), generator=torch.Generator().manual_seed(0))

    def logits(*conditions: int) -> Tensor:
        patch.tokens = Tokens(conditions=torch.tensor(conditions, dtype=torch.int32))
        return study.model(tokens).logits

    with (
        torch.no_grad(),
        Patch(mlps, wave_states(plan, range(2), mlps, how), backend=backend) as patch,
    ):
        clean = logits(0, 0, 0, 0, 0, 0)
        mixed = logits(0, 1, 2, 0, 1, 2)
    unchanged = [0, 2, 3, 5]
    assert torch.equal(mixed[unchanged], clean[unchanged])
    same = how == How("scale", 1.0)
    assert torch.equal(mixed[[1, 4]], clean[[1, 4]]) == same


# --- the last layer's MLP where it is not needed ---------------------------------------------


def needed(model: Any, patch: Patch, n: int | None, tokens: Tensor, mask: Tensor) -> Tensor:
    patch.tokens = Tokens(conditions=torch.tensor([1, 0, 2], dtype=torch.int32), n_needed=n)
    with torch.no_grad():
        logits: Tensor = model(tokens, attention_mask=mask).logits
    return logits


OFF = [
    [(layer, s, i) for layer in range(3) for i in range(k, 30, 3)]
    for k, s in enumerate(("gate", "up", "down"))
]


def test_needed_columns_are_those_of_the_whole_mlp(family_model: Any) -> None:
    mlps = find_mlps(family_model)
    tokens = torch.randint(3, 90, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(8) >= torch.tensor([[0], [3], [5]])).long()
    calls: list[int] = []
    last: Any = mlps[-1].module
    handle = last.down_proj.register_forward_hook(lambda _m, _i, out: calls.append(out.shape[-2]))
    with Patch(mlps, mask_states(OFF, mlps)) as patch:
        whole = needed(family_model, patch, None, tokens, mask)
        for n in (1, 2, 7, 8):
            calls.clear()
            found = needed(family_model, patch, n, tokens, mask)
            assert calls in ([n], [3 * n])
            torch.testing.assert_close(found[:, -n:], whole[:, -n:], rtol=0, atol=1e-6)
            assert (found[:, :-n] != whole[:, :-n]).any() or n == 8
    handle.remove()


@pytest.mark.parametrize("inside", [True, False])
def test_a_patch_that_needs_all_columns_gets_them(llama: Any, inside: bool) -> None:
    mlps = find_mlps(llama)
    tokens = torch.randint(3, 90, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    sums = {"gate": torch.zeros(1, 48), "up": torch.zeros(1, 48), "down": torch.zeros(1, 32)}
    plain = Patch(mlps, [LayerState(), LayerState(), LayerState(responses=sums)])
    plain.tokens = Tokens(prompt_ids=torch.zeros(3, 8, dtype=torch.int32))
    short = Patch(mlps, mask_states(OFF, mlps))
    with short:
        whole = needed(llama, short, None, tokens, mask)
    first, second = (short, plain) if inside else (plain, short)
    with first, second:
        found = needed(llama, short, 1, tokens, mask)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)
    assert all(values.abs().sum() > 0 for values in sums.values())


def test_the_larger_need_of_two_patches_counts(llama: Any) -> None:
    mlps = find_mlps(llama)
    tokens = torch.randint(3, 90, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    with Patch(mlps, mask_states(OFF, mlps)) as outer:
        whole = needed(llama, outer, None, tokens, mask)
        with Patch(mlps, [LayerState()] * 3) as inner:
            inner.tokens = Tokens(n_needed=3)
            found = needed(llama, outer, 1, tokens, mask)
    torch.testing.assert_close(found[:, -3:], whole[:, -3:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("per_token", [True, False])
def test_a_batch_of_one_row_has_its_condition(llama: Any, backend: str, per_token: bool) -> None:
    mlps = find_mlps(llama)
    tokens = torch.randint(3, 90, (1, 8), generator=torch.Generator().manual_seed(0))
    with relneuron.ablate(llama, OFF[1], backend=backend), torch.no_grad():
        wanted = llama(tokens).logits
    ids = torch.ones(1, 8) if per_token else torch.ones(1)
    with torch.no_grad(), Patch(mlps, mask_states(OFF, mlps), backend=backend) as patch:
        patch.tokens = Tokens(conditions=ids.int())
        torch.testing.assert_close(llama(tokens).logits, wanted, rtol=0, atol=1e-6)


# --- longer answers --------------------------------------------------------------------------


def generated(study: Study, prompt: str, n: int) -> str:
    tokens = study.tokenizer(prompt, return_tensors="pt")
    made = study.model.generate(**tokens, max_new_tokens=n, do_sample=False, pad_token_id=1)[0]
    new = made[tokens["input_ids"].shape[1] :]
    # The last token may end inside a character.
    return study.tokenizer.decode(new, skip_special_tokens=True).rstrip("\ufffd").strip()


@pytest.mark.filterwarnings("ignore:ablate. no neuron")
def test_longer_answers_are_those_of_generate(study: Study, tmp_path: Path) -> None:
    rows = study.ablate(tmp_path, generate=6)
    n_correct = 0
    for condition, neurons in main_sets(study).items():
        with relneuron.ablate(study.model, neurons):
            for (name, key), row in rows.items():
                if name != condition:
                    continue
                prompt = study.prompts[key]
                text = generated(study, prompt.prompt, 6)
                assert row["prediction"] == text
                assert int(row["correct"]) == text.lower().startswith(prompt.object.lower())
                n_correct += int(row["correct"])
    assert 0 < n_correct < len(rows)


def test_a_longer_answer_is_right_only_if_it_begins_with_the_object(
    study: Study, tmp_path: Path
) -> None:
    eva = [p for p in study.prompts.values() if p.split == "eva" and p.language == "en"]
    clean = study.ablate(tmp_path / "first", generate=1, random_seeds=0)
    changed = []
    for i, prompt in enumerate(eva):
        text = clean["clean", prompt.id]["prediction"]
        assert text
        objects = (text.upper(), f"{text}xyz", text[:1], f"x{text}")
        changed.append(replace(prompt, object=objects[i % 4]))
    path = study.write_prompts(tmp_path / "prompts.jsonl", changed)
    rows = study.ablate(tmp_path / "second", prompts=path, generate=1, random_seeds=0)
    right = [int(rows["clean", prompt.id]["correct"]) for prompt in changed]
    assert right == [1, 0, 1, 0] * 3


# --- perplexity ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [20, 4096])
@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_sentences_cost_what_they_cost_with_plain_hooks(
    study: Study, tmp_path: Path, batch_tokens: int, mode: str
) -> None:
    sentences = {s.id: s for s in read_sentences(study.folder / "sentences.jsonl")}
    for i, (key, s) in enumerate(sentences.items()):
        sentences[key] = replace(s, sentence=f"{'Person0 ' * (i % 4)}{s.sentence}")
    silent = Sentence("silent", "works_as", "{}", "", "")  # one token, BOS: nothing to predict
    prompts = study.write_prompts(tmp_path / "p" / "prompts.jsonl", study.prompts.values())
    data = sentences_bytes([*sentences.values(), silent])
    (prompts.parent / "sentences.jsonl").write_bytes(data)
    asked = {"analyses": ("perplexity",), "random_seeds": 2, "mode": mode, "prompts": prompts}
    study.ablate(tmp_path, batch_tokens=batch_tokens, **asked)
    drawn = {f"random.{seed}": random_neurons(SHAPE, 40, seed) for seed in range(2)}
    sets = {"clean": [], **study.sets, **drawn}
    hooked, means = Hooked(study), meant(plain_means(study)[""])
    rows = read_rows(tmp_path / "perplexity.csv")
    asked_of = {name: {row["id"] for row in rows if row["condition"] == name} for name in sets}
    for name, neurons in sets.items():
        own = {s.id for s in sentences.values() if s.relation == name}
        assert asked_of[name] == (own or set(sentences))
        with hooked.changing(neurons, means if mode == "mean" else scaled(0.0)):
            for row in [row for row in rows if row["condition"] == name]:
                n_tokens, nll = hooked.nll(sentences[row["id"]].sentence)
                assert row["relation"] == sentences[row["id"]].relation
                assert int(row["n_tokens"]) == n_tokens
                assert abs(float(row["nll"]) - nll) <= 1e-4 * nll
    assert len(rows) == 3 * len(sentences) + len(sentences)
