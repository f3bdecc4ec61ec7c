"""Concept neurons: who the concepts' subjects are, how they are recorded, the whole study.

A recording without answers must have the bits of one with answers.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import prompts_bytes, read_prompts
from relneuron.demo import FACTS
from relneuron.methods.responses.concepts import concept_study, make_concept_prompts
from relneuron.methods.responses.options import RecordOptions
from relneuron.methods.responses.places import Store
from relneuron.methods.responses.record import record
from relneuron.model.ask import Asker
from relneuron.model.load import load_model, load_tokenizer
from relneuron.texts.facts import Fact, Relation, Templates, read_relations, split_facts
from relneuron.texts.options import PromptsOptions
from relneuron.texts.prompts import write_prompts


def relation_of(name: str, domain: str, subjects: list[str]) -> Relation:
    facts = tuple(Fact(subject, f"o{i % 3}") for i, subject in enumerate(subjects))
    return Relation(name, Templates(("{}?",), ()), facts, {}, (), domain)


def names(letter: str, n: int, start: int = 0) -> list[str]:
    return [f"{letter}{i}" for i in range(start, start + n)]


def subjects_of(relations: list[Relation], n_eva: int = 2, seed: int = 0) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for prompt in make_concept_prompts(relations, n_eva=n_eva, seed=seed):
        found.setdefault(prompt.relation, []).append(prompt.subject)
    return {concept: list(dict.fromkeys(subjects)) for concept, subjects in found.items()}


def test_each_subject_is_asked_both_templates() -> None:
    relations = [relation_of("a", "person", names("p", 9)), relation_of("b", "star", names("s", 9))]
    prompts = make_concept_prompts(relations, n_eva=2, seed=0)
    assert {(p.split, p.language, p.object) for p in prompts} == {("det", "en", "")}
    assert {p.template for p in prompts} == {"{} can", "{} has a"}
    assert all(p.prompt == p.template.replace("{}", p.subject) for p in prompts)
    assert set(Counter((p.relation, p.subject) for p in prompts).values()) == {2}
    assert len({p.id for p in prompts}) == len(prompts) == 2 * 2 * 7


def test_subjects_are_those_of_det_facts_in_any_relation_of_the_concept() -> None:
    relations = [
        relation_of("a", "person", names("p", 9)),
        relation_of("b", "person", names("p", 9, 4)),
        relation_of("c", "star", names("s", 9)),
    ]
    det = {
        relation.name: {fact.subject for fact in split_facts(relation, 2, 0)[0]}
        for relation in relations
    }
    found = subjects_of(relations)
    assert set(found["person"]) == det["a"] | det["b"]
    assert set(found["star"]) == det["c"]


def test_concepts_with_the_same_subjects_are_one() -> None:
    relations = [
        relation_of("a", "star", names("t", 20)),
        relation_of("b", "company", names("t", 20)),
        relation_of("c", "person", names("p", 20)),
    ]
    found = subjects_of(relations, n_eva=8)
    assert set(found) == {"company/star", "person"}
    # The two relations' det facts differ; the concept has both.
    assert len(found["company/star"]) > 12


def test_a_subject_of_two_concepts_is_in_neither() -> None:
    relations = [
        relation_of("a", "person", [*names("p", 9), "Both"]),
        relation_of("b", "company", [*names("c", 9), "Both"]),
    ]
    for seed in range(10):
        found = subjects_of(relations, seed=seed)
        assert "Both" not in found["person"] + found["company"]
        assert len(found["person"]) >= 7


def test_fewer_than_two_concepts_make_no_prompt() -> None:
    person = relation_of("a", "person", names("p", 9))
    unknown = relation_of("b", "", names("x", 9))
    assert make_concept_prompts([person, unknown], n_eva=2, seed=0) == []
    # All subjects of the second are the first's too: only one concept is left.
    part = relation_of("c", "athlete", names("p", 5))
    assert make_concept_prompts([person, part], n_eva=2, seed=0) == []


def test_at_most_a_hundred_subjects_drawn_with_the_seed() -> None:
    relations = [
        relation_of("a", "person", names("p", 400)),
        relation_of("b", "star", names("s", 30)),
    ]
    found = subjects_of(relations)
    assert len(set(found["person"])) == 100
    assert len(found["star"]) == 28
    assert subjects_of(relations) == found
    assert subjects_of(relations, seed=1)["person"] != found["person"]
    # The order of a file, and which others there are, change nothing.
    turned = [replace(relation, facts=relation.facts[::-1]) for relation in relations[::-1]]
    more = [*turned, relation_of("c", "river", names("r", 9))]
    assert subjects_of(more)["person"] == found["person"]


def test_the_demos_concepts() -> None:
    found = subjects_of(read_relations(FACTS), n_eva=50)
    assert {concept: len(subjects) for concept, subjects in found.items()} == {
        "company/landmark/product/star": 100,
        "person": 100,
    }


# --- recording -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[Any, Any]:
    return load_model(str(model_folder)), load_tokenizer(str(model_folder))


def test_a_recording_without_answers_has_the_same_bits(
    loaded: tuple[Any, Any], fact_folder: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    write_prompts(fact_folder, prompts, PromptsOptions(eva=8))
    recorded = {}
    for validate in (True, False):
        folder = tmp_path / str(validate)
        accuracy = record(
            "m",
            *loaded,
            prompts,
            folder,
            RecordOptions(validate=validate, batch_tokens=200),
            quiet=True,
        )
        assert accuracy is None or validate
        recorded[validate] = (folder / "responses.safetensors").read_bytes()
        inputs = json.loads((folder / "manifest.json").read_text())["stages"]["record"]["inputs"]
        assert inputs["validate"] is validate
    assert recorded[True] == recorded[False]
    with (tmp_path / "False" / "validated.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["prediction"], row["correct"]) for row in rows} == {("", "1")}
    assert [row["id"] for row in rows] == [prompt.id for prompt in read_prompts(prompts)]


def test_without_answers_the_model_runs_once_a_batch_and_objects_are_not_read(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    relations = [relation_of("a", "person", names("p", 9)), relation_of("b", "star", names("s", 9))]
    prompts = make_concept_prompts(relations, n_eva=2, seed=0)
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(prompts_bytes(prompts))
    texts: list[str] = []
    shapes: list[tuple[int, ...]] = []
    model_inputs = model.register_forward_pre_hook(
        lambda _m, _a, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True
    )

    class Reading:
        """Notes what it is asked, but for the letters by which its policy is found."""

        def __call__(self, lines: list[str], **options: Any) -> Any:
            texts.extend(line for line in lines if len(line) > 1)
            return tokenizer(lines, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    record(
        "m", model, Reading(), path, tmp_path / "read", RecordOptions(validate=False), quiet=True
    )
    model_inputs.remove()
    assert texts == [prompt.prompt for prompt in prompts]
    assert [rows for rows, _ in shapes] == [len(prompts)]


def test_responses_that_are_gone_are_recorded_again(
    loaded: tuple[Any, Any], fact_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run's journal counts on rows of responses.safetensors."""
    prompts = tmp_path / "prompts.jsonl"
    write_prompts(fact_folder, prompts, PromptsOptions(eva=8))
    record("m", *loaded, prompts, tmp_path / "whole", RecordOptions(batch_tokens=200), quiet=True)
    ask, asked = Asker.ask, []

    def failing(self: Asker, *args: Any) -> Any:
        asked.append(1)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return ask(self, *args)

    folder = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Asker, "ask", failing)
        record("m", *loaded, prompts, folder, RecordOptions(batch_tokens=200), quiet=True)
    assert (folder / "record.journal").read_bytes().count(b"key") == 4
    (folder / "responses.safetensors").unlink()
    with pytest.warns(match="3 of 4 blocks are done again"):  # one asked no det prompt
        record("m", *loaded, prompts, folder, RecordOptions(batch_tokens=200), quiet=True)
    name = "responses.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- the whole small study -------------------------------------------------------------------


@pytest.fixture(scope="module")
def concepts() -> list[Relation]:
    return [
        relation_of("a", "person", [f"Person{i}" for i in range(24)]),
        relation_of("b", "city", [f"{name}{i}" for i in range(9) for name in ("Rome", "Oslo")]),
        relation_of("c", "fruit", [f"plum{i}" for i in range(10)]),
    ]


def study(
    loaded: tuple[Any, Any], concepts: list[Relation], folder: Path, **changes: Any
) -> NeuronFile | None:
    asked = {"n_eva": 4, "seed": 0, "top": 12, "quiet": True} | changes
    options = RecordOptions(batch_tokens=200)
    return concept_study("m", *loaded, concepts, folder, options=options, **asked)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_each_concept_has_its_best_neurons(
    loaded: tuple[Any, Any], concepts: list[Relation], tmp_path: Path
) -> None:
    from sklearn.metrics import average_precision_score

    found = study(loaded, concepts, tmp_path / "c")
    assert found is not None
    assert {concept: len(chosen) for concept, chosen in found.sets.items()} == {
        "city": 12,
        "fruit": 12,
        "person": 12,
    }
    for concept, n_subjects in (("city", 14), ("fruit", 6), ("person", 20)):
        n_others = 2 * (14 + 6 + 20 - n_subjects)
        facts = found.selection[concept]
        assert facts["positives"] == 2 * n_subjects
        assert facts["negatives"] == min(facts["positives"], n_others)
    responses = load_file(tmp_path / "c" / "responses.safetensors")
    ids = [prompt.id for prompt in read_prompts(tmp_path / "c" / "prompts.jsonl")]
    with (tmp_path / "c" / "labels.csv").open(newline="") as file:
        labels = {
            row["id"]: row["label"] for row in csv.DictReader(file) if row["relation"] == "city"
        }
    members = [i for i, name in enumerate(ids) if name in labels]
    wanted = np.array([int(labels[ids[i]]) for i in members])
    assert sorted(i for i, name in enumerate(ids) if name.startswith("city.")) == [
        i for i, label in zip(members, wanted, strict=True) if label
    ]
    aps = {
        (layer, site, index): average_precision_score(wanted, column)
        for layer in range(2)
        for site in ("gate", "up", "down")
        for index, column in enumerate(responses[f"{site}.{layer}"][members].T)
    }
    best = sorted(aps.values(), reverse=True)[:12]
    assert [score for *_, score in found.sets["city"]] == pytest.approx(best, abs=1e-6)
    for layer, site, index, score in found.sets["city"]:
        assert score == pytest.approx(aps[layer, site, index], abs=1e-6)


def test_again_is_the_same_and_does_nothing(
    loaded: tuple[Any, Any],
    concepts: list[Relation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = study(loaded, concepts, tmp_path / "one")
    study(loaded, concepts, tmp_path / "two")
    before = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == before

    def unexpected(*args: Any, **options: Any) -> None:
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr("relneuron.methods.responses.at_once.record", unexpected)
    # Without the scores' file only the ranking is made again, from the responses.
    (tmp_path / "two" / "scores.safetensors").unlink()
    study(loaded, concepts, tmp_path / "two")
    assert contents(tmp_path / "two") == before
    monkeypatch.setattr("relneuron.methods.responses.at_once.identify", unexpected)
    assert study(loaded, concepts, tmp_path / "one") == found
    assert contents(tmp_path / "one") == before


def test_other_options_are_refused_or_forced(
    loaded: tuple[Any, Any], concepts: list[Relation], tmp_path: Path
) -> None:
    study(loaded, concepts, tmp_path / "old")
    before = contents(tmp_path / "old")
    with pytest.raises(RelneuronError, match="top: 12 -> 5"):
        study(loaded, concepts, tmp_path / "old", top=5)
    with pytest.raises(RelneuronError, match="prompts was made from other inputs"):
        study(loaded, concepts, tmp_path / "old", seed=1)
    assert contents(tmp_path / "old") == before
    forced = study(loaded, concepts, tmp_path / "old", seed=1, top=5, force=True)
    assert forced is not None
    assert {len(chosen) for chosen in forced.sets.values()} == {5}
    study(loaded, concepts, tmp_path / "new", seed=1, top=5)
    assert contents(tmp_path / "new") == contents(tmp_path / "old")


def test_an_interrupted_study_goes_on_with_the_same_bits(
    loaded: tuple[Any, Any],
    concepts: list[Relation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import relneuron.model.ask

    study(loaded, concepts, tmp_path / "whole")
    read, calls = relneuron.model.ask.Asker.read, []

    def failing(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        read(self, *args)

    monkeypatch.setattr(relneuron.model.ask.Asker, "read", failing)
    with pytest.raises(KeyboardInterrupt):
        study(loaded, concepts, tmp_path / "cut")
    study(loaded, concepts, tmp_path / "cut")
    assert len(calls) > 3
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_responses_can_be_dropped(
    loaded: tuple[Any, Any], concepts: list[Relation], tmp_path: Path
) -> None:
    found = study(loaded, concepts, tmp_path, store=Store())
    assert not (tmp_path / "responses.safetensors").exists()
    before = contents(tmp_path)
    assert study(loaded, concepts, tmp_path, store=Store()) == found
    assert contents(tmp_path) == before


def test_one_concept_alone_is_no_study(
    loaded: tuple[Any, Any], concepts: list[Relation], tmp_path: Path
) -> None:
    assert study(loaded, concepts[:1], tmp_path / "c") is None
    assert not (tmp_path / "c").exists()
