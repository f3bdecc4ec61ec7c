"""Options chosen by their likelihood: against a plain loop under hooks, as lm-eval defines it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import random_neurons
from relneuron.artifact.prompts import Prompt
from relneuron.model.choose import choose, right_places
from relneuron.model.pair import pair_of
from tests.kit.hooked import INSIDE, SHAPE, Hooked, Study

OPTIONS = ("Rome", "in Oslo, where apple and pear grow", "Bern", "Lima or Rome", "Oslo")


@pytest.fixture(scope="module")
def study(
    model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Study]:
    yield Study(model_folder, fact_folder, tmp_path_factory.mktemp("choose"))


def asked_of(study: Study, path: Path, options: Sequence[str] = OPTIONS) -> list[Prompt]:
    """The prompts of lives_in with options, written to a file."""
    some = [p for p in study.prompts.values() if p.relation == "lives_in" and p.language == "en"]
    made = [replace(p, options=tuple(options)) for p in some if p.split == "eva"]
    study.write_prompts(path, made)
    return made


@torch.no_grad()
def likelihood(study: Study, hooked: Hooked, prompt: str, option: str) -> float:
    """As lm-eval does: the whole text tokenised, what is behind the prompt's tokens scored."""
    context, whole = (study.tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {option}"))
    continuation = whole[len(context) :]
    read = torch.tensor([(context + continuation)[:-1]])
    hooked._columns, hooked._n_prompt = range(read.shape[1]), len(context)
    logprobs = study.model(read).logits[0].double().log_softmax(-1)[-len(continuation) :]
    return float(sum(row[token] for row, token in zip(logprobs, continuation, strict=True)))


@pytest.mark.parametrize("name", ["acc", "acc_norm"])
@pytest.mark.parametrize("positions", ["all", "prompt", "last"])
def test_choices_are_those_of_a_plain_loop(
    study: Study, tmp_path: Path, name: str, positions: str
) -> None:
    prompts = asked_of(study, tmp_path / "p.jsonl")
    off = random_neurons(SHAPE, 100, 3)
    rows = study.ablate(
        tmp_path,
        neurons=study.write_sets(tmp_path / "n.json", {"lives_in": off}),
        prompts=tmp_path / "p.jsonl",
        random_seeds=0,
        mode="scale",
        factor=-2.0,
        positions=positions,
        choose=name,
        batch_tokens=90,
    )
    hooked, chosen = Hooked(study), []
    for condition, neurons in (("clean", []), ("lives_in", off)):
        with hooked.changing(neurons, lambda out, *_: -2 * out, INSIDE[positions]):
            for prompt in prompts:
                found = [likelihood(study, hooked, prompt.prompt, x) for x in OPTIONS]
                scores = {
                    x: score / (len(x) if name == "acc_norm" else 1)
                    for x, score in zip(OPTIONS, found, strict=True)
                }
                best, row = max(OPTIONS, key=scores.__getitem__), rows[condition, prompt.id]
                assert row["prediction"] == row["choice"] == best
                assert row["correct"] == str(int(best == prompt.object))
                assert row["given"] == (best if best == prompt.object else "")
                own = found[OPTIONS.index(prompt.object)]
                assert float(row["logprob"]) == pytest.approx(own, abs=1e-5)
                chosen.append(best)
    assert len({*chosen}) > 1
    answering = Manifest(tmp_path).data["stages"]["ablate"]["answering"]
    assert answering.endswith(" a character") == (name == "acc_norm")


def test_characters_and_right_options() -> None:
    # The longer one has more to lose, and less of it a character.
    assert choose([-2.0, -3.0], ["ab", "abcdef"], normalised=False) == 0
    assert choose([-2.0, -3.0], ["ab", "abcdef"], normalised=True) == 1
    assert choose([-2.0, -3.0], ["ab", " abc "], normalised=True) == 0  # -1 both: the first
    assert right_places(["rome", "Oslo", "Bern"], ["Bern", "Rome"]) == [0, 2]


def test_of_several_right_options_the_most_probable_counts(study: Study, tmp_path: Path) -> None:
    (first, *_) = asked_of(study, tmp_path / "p.jsonl")
    several = replace(first, objects=(first.object, "bern", "Lima or Rome"))
    study.write_prompts(tmp_path / "p.jsonl", [several])
    asked: dict[str, Any] = {"prompts": tmp_path / "p.jsonl", "random_seeds": 0, "any_set": True}
    row = study.ablate(tmp_path, choose="acc", **asked)["clean", first.id]
    hooked = Hooked(study)
    found = {x: likelihood(study, hooked, first.prompt, x) for x in OPTIONS}
    best = max((first.object, "Bern", "Lima or Rome"), key=found.__getitem__)
    assert row["logprob_of"].lower() == best.lower()
    assert float(row["logprob"]) == pytest.approx(found[best], abs=1e-5)


def test_what_cannot_be_chosen(study: Study, tmp_path: Path) -> None:
    own = asked_of(study, tmp_path / "p.jsonl")[0]
    for changed, cause in (
        ({"options": ()}, "has no options to choose from"),
        ({"options": ("Rome",)}, "has no options to choose from"),
        ({"object": "Cairo", "objects": ("Cairo",)}, "has no option 'Cairo'"),
        ({"options": (*OPTIONS, " ")}, "with its option ' ' it has"),
        ({"options": (*OPTIONS, "pear " * 80)}, "tokens of the option|of the option; the model"),
    ):
        study.write_prompts(tmp_path / "p.jsonl", [replace(own, **changed)])
        with pytest.raises(RelneuronError, match=cause):
            study.ablate(tmp_path, prompts=tmp_path / "p.jsonl", choose="acc", any_set=True)
    assert not (tmp_path / "effects.csv").exists()


def test_options_may_begin_alike(study: Study, tmp_path: Path) -> None:
    """Whole options differ, which their first tokens need not."""
    prompts = asked_of(study, tmp_path / "p.jsonl", ("Rome", "Rome too", "Oslo", "Bern", "Lima"))
    asked: dict[str, Any] = {"prompts": tmp_path / "p.jsonl", "random_seeds": 0, "any_set": True}
    assert len(study.ablate(tmp_path, choose="acc", **asked)) == len(prompts) * 4
    with pytest.raises(RelneuronError, match="begin with the same token"):
        study.ablate(tmp_path / "b", **asked)


def test_options_are_read_with_another_models_values(study: Study, tmp_path: Path) -> None:
    """`--mode patch`: A reads each option with B's products of the same tokens at some neurons."""
    prompts = asked_of(study, tmp_path / "p.jsonl")
    a, b = study.model, copy.deepcopy(study.model)
    generator = torch.Generator().manual_seed(4)
    for weight in b.parameters():
        weight.data += 0.15 * torch.randn(weight.shape, generator=generator)
    off = [(layer, "gate", i) for layer in (0, 1) for i in range(layer, 48, 2)]
    rows = study.ablate(
        tmp_path / "o",
        neurons=study.write_sets(tmp_path / "n.json", {"lives_in": off}),
        prompts=tmp_path / "p.jsonl",
        random_seeds=0,
        mode="patch",
        donor="b",
        pair=pair_of(a, b, study.tokenizer, names=("m", "b")),
        choose="acc",
        batch_tokens=90,
    )
    kept: dict[int, torch.Tensor] = {}
    index = {layer: [i for at, _, i in off if at == layer] for layer in (0, 1)}

    def keep(layer: int) -> Any:
        return lambda _, inputs: kept.update({layer: inputs[0].clone()})

    def put(layer: int) -> Any:
        def patched(_: Any, inputs: Any) -> Any:
            new = inputs[0].clone()
            new[..., index[layer]] = kept[layer][..., index[layer]]
            return (new,)

        return patched

    changed = 0
    with ExitStack() as stack:
        for make, model in ((keep, b), (put, a)):
            for layer, block in enumerate(model.model.layers):
                hook = block.mlp.down_proj.register_forward_pre_hook(make(layer))
                stack.callback(hook.remove)
        for prompt in prompts:
            found = []
            for option in OPTIONS:
                both = (prompt.prompt, f"{prompt.prompt} {option}")
                context, whole = (study.tokenizer(text)["input_ids"] for text in both)
                read = torch.tensor([whole[:-1]])
                with torch.no_grad():
                    b(read)
                    logprobs = a(read).logits[0].double().log_softmax(-1)
                spoken = range(len(context), len(whole))
                found.append(float(sum(logprobs[i - 1, whole[i]] for i in spoken)))
            row = rows["lives_in", prompt.id]
            assert row["prediction"] == OPTIONS[found.index(max(found))]
            own = found[OPTIONS.index(prompt.object)]
            assert float(row["logprob"]) == pytest.approx(own, abs=1e-4)
            changed += abs(own - float(rows["clean", prompt.id]["logprob"])) > 1e-2
    assert changed > len(prompts) / 2
