"""Edited models: exactly the columns asked for, and what the edit did, by plain torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import Prompt, fact_name
from relneuron.artifact.reading import read_csv
from relneuron.methods.gradients.edit import EDIT, EDIT_COLUMNS, edit_model
from relneuron.methods.gradients.options import EditOptions
from relneuron.model.load import load_model, load_tokenizer
from relneuron.texts.neutral import read_sentences
from tests.kit.files import read_rows
from tests.kit.hooked import Hooked, Study

Run = Callable[..., tuple[int, str, str]]
NEURONS = [(0, "gate", 3), (1, "up", 5), (1, "gate", 40)]


@pytest.fixture(scope="module")
def study(
    model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Study]:
    yield Study(model_folder, fact_folder, tmp_path_factory.mktemp("edit"))


@pytest.fixture(scope="module")
def fact(study: Study) -> Prompt:
    """The first prompt of a fact that has several wordings and that the model knows."""
    hooked = Hooked(study)
    by_fact: dict[str, list[Prompt]] = {}
    for prompt in study.prompts.values():
        if prompt.relation == "lives_in" and prompt.language == "en":
            by_fact.setdefault(fact_name(prompt), []).append(prompt)
    several = [own for own in by_fact.values() if len(own) > 1]
    return next(own[0] for own in several if hooked.answer(own[0])[0] == own[0].object)


def edit(study: Study, folder: Path, output: Path, of: Any, **asked: Any) -> list[dict[str, str]]:
    """Edits a fresh copy of the model; the rows of edit.csv."""
    path = study.write_sets(folder / "n.json", of)
    model = load_model(str(study.model.name_or_path))
    options = EditOptions(**asked)
    prompts = study.folder / "prompts.jsonl"
    edit_model("m", model, study.tokenizer, path, prompts, output, options, quiet=True)
    return [dict(row) for row in read_csv(output / EDIT, EDIT_COLUMNS)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def other_columns(
    model_folder: Path, output: Path, neurons: list[tuple[int, str, int]]
) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """Each neuron's column before and after; all other weights are the same bytes."""
    before, after = weights(model_folder), weights(output)
    assert before.keys() == after.keys()
    found = {}
    for layer, _, index in neurons:
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        found[layer, index] = before[name][:, index].clone(), after[name][:, index].clone()
        before[name][:, index] = after[name][:, index] = 0
    assert all(torch.equal(before[name], after[name]) for name in before)
    return found


def test_erased_vectors_are_zero_and_nothing_else_changes(
    study: Study, fact: Prompt, model_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "edited"
    edit(study, tmp_path, output, {fact_name(fact): NEURONS})
    for before, after in other_columns(model_folder, output, NEURONS).values():
        assert before.any() and not after.any()
    # An ordinary folder: configuration, weights, tokenizer.
    assert {"config.json", "model.safetensors", "tokenizer.json", EDIT} <= {
        path.name for path in output.iterdir()
    }
    assert (
        load_tokenizer(str(output))(fact.prompt)["input_ids"]
        == (study.tokenizer(fact.prompt)["input_ids"])
    )
    described = Manifest(output).data
    assert described["stages"]["edit"]["value_vectors"] == 3
    assert described["model"]["digest"] != described["stages"]["edit"]["edited_model"]["digest"]


@pytest.mark.parametrize("embedding", ["output", "input"])
def test_moved_vectors_take_the_old_answer_off_and_add_the_new_one(
    study: Study, fact: Prompt, model_folder: Path, tmp_path: Path, embedding: str
) -> None:
    new = next(name for name in ("Rome", "Oslo") if name != fact.object)
    sets = {fact_name(fact): NEURONS}
    asked = {"to": new, "old_factor": 0.5, "new_factor": 3.0, "embedding": embedding}
    edit(study, tmp_path, tmp_path / "edited", sets, **asked)
    matrix = (
        study.model.lm_head if embedding == "output" else study.model.model.embed_tokens
    ).weight.detach()
    assert not torch.equal(study.model.lm_head.weight, study.model.model.embed_tokens.weight)
    n = len(study.tokenizer(fact.prompt)["input_ids"])
    old_token, new_token = (
        study.tokenizer(f"{fact.prompt} {name}")["input_ids"][n] for name in (fact.object, new)
    )
    moved = 3 * matrix[new_token] - 0.5 * matrix[old_token]
    for before, after in other_columns(model_folder, tmp_path / "edited", NEURONS).values():
        assert torch.allclose(after, before + moved, atol=1e-6)


@pytest.mark.parametrize("to", [None, "Rome"])
def test_the_table_is_what_plain_decoding_says(
    study: Study, fact: Prompt, tmp_path: Path, to: str | None
) -> None:
    to = "Oslo" if to == fact.object else to
    neurons = [(1, "gate", i) for i in range(0, 48, 4)]
    output = tmp_path / "edited"
    rows = {
        row["measure"]: row
        for row in edit(study, tmp_path, output, {fact_name(fact): neurons}, to=to)
    }
    edited = Study.__new__(Study)
    edited.model, edited.tokenizer = load_model(str(output)), study.tokenizer
    both = [Hooked(study), Hooked(edited)]
    said = {key: [one.answer(prompt) for one in both] for key, prompt in study.prompts.items()}
    own = [p for p in study.prompts.values() if fact_name(p) == fact_name(fact)]
    others = [p for p in study.prompts.values() if fact_name(p) != fact_name(fact)]

    def is_done(prompt: Prompt, text: str) -> bool:
        wanted = prompt.object if to is None else to
        is_prefix = bool(text) and wanted.lower().startswith(text.lower())
        return is_prefix != (to is None)

    def mean(values: list[Any]) -> float:
        return float(sum(map(float, values)) / len(values))

    for end, name in enumerate(("before", "after")):
        first, *rest = own
        done = float(is_done(first, said[first.id][end][0]))
        assert float(rows["reliability"][name]) == done
        wanted = mean([is_done(p, said[p.id][end][0]) for p in rest])
        assert float(rows["generalization"][name]) == pytest.approx(wanted)
        for measure, some in (("prob_old", own), ("prob_others", others)):
            probs = [2.718281828459045 ** said[p.id][end][1] for p in some]
            assert float(rows[measure][name]) == pytest.approx(mean(probs), rel=1e-4, abs=1e-7)
        texts = read_sentences(study.folder / "sentences.jsonl")
        pairs = [both[end].nll(text.sentence) for text in texts]
        total = sum(nll for _, nll in pairs) / sum(n for n, _ in pairs)
        assert float(rows["perplexity"][name]) == pytest.approx(2.718281828459045**total, rel=1e-4)
    same = mean([said[p.id][0][0] == said[p.id][1][0] for p in others])
    assert float(rows["locality"]["before"]) == 1
    assert float(rows["locality"]["after"]) == pytest.approx(same)
    low, high = (float(rows["locality"][f"after_{end}"]) for end in ("low", "high"))
    assert low <= same <= high and rows["reliability"]["n"] == "1"
    assert ("prob_new" in rows) == (to is not None)
    if to is not None:
        asked = [replace(p, object=to, objects=(to,)) for p in own]
        probs = [2.718281828459045 ** both[1].answer(p)[1] for p in asked]
        assert float(rows["prob_new"]["after"]) == pytest.approx(mean(probs), rel=1e-4, abs=1e-9)


def test_never_in_place_and_never_over_something(
    study: Study, fact: Prompt, model_folder: Path, tmp_path: Path, relneuron: Run
) -> None:
    path = study.write_sets(tmp_path / "n.json", {fact_name(fact): NEURONS})
    prompts = study.folder / "prompts.jsonl"
    before = weights(model_folder)["model.layers.0.mlp.down_proj.weight"]
    words = ["edit", model_folder, path, prompts, "--quiet", "-o"]
    code, _, err = relneuron(*words, model_folder, "--force")
    assert code == 2 and "is the model's own folder" in err
    assert torch.equal(weights(model_folder)["model.layers.0.mlp.down_proj.weight"], before)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    code, _, err = relneuron(*words, tmp_path / "full")
    assert code == 2 and "mine.txt exists" in err
    code, out, err = relneuron(*words, tmp_path / "out")
    assert code == 0 and "3 value vectors erased" in out and "locality" in out, err
    assert relneuron(*words, tmp_path / "out")[0] == 2
    code, out, err = relneuron(*words, tmp_path / "out", "--to", "Rome", "--force")
    assert code == 0 and "3 value vectors moved" in out and "prob_new" in out, err
    assert "only with --to" in relneuron(*words, tmp_path / "o2", "--new-factor", 2)[2]


def test_what_cannot_be_edited_is_refused(study: Study, fact: Prompt, tmp_path: Path) -> None:
    name = fact_name(fact)

    def refused(of: Any, said: str, **asked: Any) -> None:
        with pytest.raises(RelneuronError, match=said):
            edit(study, tmp_path, tmp_path / "out", of, **asked)
        assert not (tmp_path / "out").exists()

    refused({"lives_in": NEURONS}, "lives_in has several answers", to="Rome")
    refused({name: NEURONS}, "has no set 'x'", sets=("x",))
    refused({"Nobody": NEURONS}, "a set for Nobody, which no prompt is about")
    refused({name: []}, "the sets have no neuron to edit")
    refused({name: [(0, "down", 3)]}, "at the site down have no vector")
    refused({name: NEURONS}, "--to names no answer", to=" ")
    model = load_model(str(study.model.name_or_path))
    model.config.quantization_config = {"quant_method": "awq", "bits": 4}
    path = study.write_sets(tmp_path / "n.json", {name: NEURONS})
    with pytest.raises(RelneuronError, match=r"the model is quantised \(awq\)"):
        prompts = study.folder / "prompts.jsonl"
        edit_model("m", model, study.tokenizer, path, prompts, tmp_path / "out", quiet=True)


def test_a_neuron_of_two_facts_is_moved_for_both(
    study: Study, fact: Prompt, model_folder: Path, tmp_path: Path
) -> None:
    other = next(
        p
        for p in study.prompts.values()
        if p.relation == "lives_in" and p.language == "en" and p.subject != fact.subject
    )
    sets = {fact_name(fact): NEURONS[:1], fact_name(other): NEURONS[:1], "works_as": NEURONS[1:]}
    chosen = (fact_name(fact), fact_name(other))
    asked = {"to": "Bern", "old_factor": 0.0, "new_factor": 1.0, "sets": chosen}
    edit(study, tmp_path, tmp_path / "out", sets, **asked)
    ((before, after),) = other_columns(model_folder, tmp_path / "out", NEURONS[:1]).values()
    n = len(study.tokenizer(fact.prompt)["input_ids"])
    token = study.tokenizer(f"{fact.prompt} Bern")["input_ids"][n]
    assert torch.allclose(after, before + 2 * study.model.lm_head.weight[token], atol=1e-6)


def test_the_edited_folder_is_a_model_to_all_commands(
    study: Study, fact: Prompt, tmp_path: Path, relneuron: Run
) -> None:
    output = tmp_path / "edited"
    edit(study, tmp_path, output, {fact_name(fact): NEURONS})
    path = study.write_sets(tmp_path / "n.json", {"lives_in": NEURONS})
    words = ["ablate", output, path, study.folder / "prompts.jsonl", "-o", tmp_path / "e.csv"]
    with pytest.warns(UserWarning, match="other weights"):
        code, _, err = relneuron(*words, "--random-seeds", 0, "--quiet")
    assert code == 0, err
    rows = {(row["condition"], row["id"]): row["logprob"] for row in read_rows(tmp_path / "e.csv")}
    # The neurons are gone already: switching them off does nothing more.
    assert all(rows["clean", key] == value for (_, key), value in rows.items())
    assert json.loads((output / "config.json").read_text())["model_type"] == "llama"
    assert NeuronFile.read(path).sets["lives_in"]
