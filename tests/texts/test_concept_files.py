"""Sentences for concepts: selfcond's files through `prompts`, `record` and `identify`.

Each AP must be scikit-learn's on the file's own positives and negatives, of responses that plain
hooks see.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.prompts import prompts_bytes, read_prompts
from relneuron.methods.responses.labels import sample_labels
from relneuron.model.load import load_model, load_tokenizer
from relneuron.texts.concept_files import Concept, concept_prompts, find_concepts, read_concept

FEW = ["--top", 20, "--permutations", 0, "--bootstrap", 0, "--noise", 0, "--quiet"]
# As in lang_neuron, what is positive of one concept is negative of the others; some stand twice.
CITY = ["Person1 lives in Rome", "Person2 lives in Oslo", "Person2 lives in Oslo", "Rome"]
FRUIT = ["Person1 eats apple", "Person3 eats plum", " Person3 eats pear "]
WORK = ["Person4 works as a baker", "Everybody knows that Person5 works as a pilot"]
ODD = ["nothing of that", "Person9", "Person9"]
SENTENCES = {
    "city": (CITY, FRUIT + WORK + ODD),
    "fruit": (FRUIT, CITY + ODD[:1] + ODD[1:2]),
    "work": (WORK, CITY + FRUIT),
}


def write_concept(path: Path, name: str, group: str = "sense", **changes: Any) -> Path:
    positive, negative = SENTENCES[name]
    data = {"concept": name, "group": group, "source": "test"}
    path.parent.mkdir(parents=True, exist_ok=True)
    sentences = {"positive": positive, "negative": negative}
    path.write_text(json.dumps(data | {"sentences": sentences} | changes), encoding="utf-8")
    return path


@pytest.fixture
def concepts(tmp_path: Path) -> Path:
    for name in SENTENCES:
        write_concept(tmp_path / "in" / "sense" / f"{name}.json", name)
    return tmp_path / "in"


def plain_responses(model_folder: Path, texts: Iterable[str]) -> dict[str, Any]:
    """Token means of the outputs of every projection of the MLPs, by plain hooks, of each text."""
    model, tokenizer = load_model(str(model_folder)), load_tokenizer(str(model_folder))
    found: dict[str, Any] = {}
    for layer, block in enumerate(model.model.layers):
        for site in ("gate", "up", "down"):

            def keep(_m: Any, _i: Any, out: torch.Tensor, key: str = f"{site}.{layer}") -> None:
                found[key] = out[0].mean(0).numpy()

            getattr(block.mlp, f"{site}_proj").register_forward_hook(keep)
    result = {}
    for text in texts:
        with torch.no_grad():
            model(torch.tensor([tokenizer(text)["input_ids"]]))
        result[text] = dict(found)
    return result


def test_every_ap_is_of_the_files_own_sentences(
    relneuron: Any, model_folder: Path, concepts: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    code, out, err = relneuron("record", model_folder, concepts, "-o", study, "--quiet")
    assert code == 0 and "sentences read, nothing asked" in out and err == ""
    code, out, err = relneuron("identify", study, "-o", study / "neurons.json", *FEW)
    assert code == 0, err
    prompts = read_prompts(study / "prompts.jsonl")
    # 12 texts that differ, two of them twice: all three concepts share one pass.
    assert len(prompts) == len(CITY + FRUIT + WORK + ODD)
    plain = plain_responses(model_folder, dict.fromkeys(CITY + FRUIT + WORK + ODD))
    recorded = load_file(study / "responses.safetensors")
    for row, prompt in enumerate(prompts):
        for key, values in plain[prompt.prompt].items():
            np.testing.assert_allclose(recorded[key][row], values, rtol=0, atol=2e-6)
    scores = load_file(study / "scores.safetensors")
    chosen = json.loads((study / "neurons.json").read_text())
    for place, (name, (positive, negative)) in enumerate(SENTENCES.items()):
        of = {text: row for row, text in enumerate(p.prompt for p in prompts)}
        rows = [of[text] for text in positive + negative]
        labels = [1] * len(positive) + [0] * len(negative)
        for layer in range(2):
            for site in ("gate", "up", "down"):
                values = recorded[f"{site}.{layer}"][rows]
                ap = [average_precision_score(labels, column) for column in values.T]
                ours = scores[f"ap.{site}"][place, layer]
                np.testing.assert_allclose(ours, np.float32(ap), rtol=2e-7)
        about = chosen["selection"][name]
        assert (about["positives"], about["negatives"]) == (len(positive), len(negative))
        assert len(chosen["sets"][name]) == 20
    # Made of a prompts.jsonl it is the same study, and the same command is done already.
    made = tmp_path / "made" / "prompts.jsonl"
    assert relneuron("prompts", concepts, "-o", made)[0] == 0
    assert made.read_bytes() == (study / "prompts.jsonl").read_bytes()
    assert not made.with_name("sentences.jsonl").exists()
    assert relneuron("record", model_folder, made, "-o", tmp_path / "again", "--quiet")[0] == 0
    again = (tmp_path / "again" / "responses.safetensors").read_bytes()
    assert again == (study / "responses.safetensors").read_bytes()


def test_which_files_a_place_stands_for(concepts: Path, tmp_path: Path) -> None:
    files = [concepts / "sense" / f"{name}.json" for name in SENTENCES]
    assert find_concepts(concepts) == find_concepts(concepts / "sense") == files
    assert find_concepts(files[0]) == files[:1]
    listed = concepts / "concept_list.csv"
    listed.write_text("group,concept\nsense,work\nsense,city\n")
    assert find_concepts(concepts) == find_concepts(listed) == [files[2], files[0]]
    for text in (
        '[{"group": "sense", "concept": "work"}, {"concept": "city", "group": "sense"}]',
        '["sense/work", "sense/city"]',
        '{"sense": ["work", "city"]}',
    ):
        other = concepts / "list.json"
        other.write_text(text)
        assert find_concepts(other) == [files[2], files[0]]
    listed.write_text("group,concept\nsense,missing\n")
    with pytest.raises(RelneuronError, match="names the concept 'missing': there is no"):
        find_concepts(concepts)


def test_facts_are_no_concepts(
    relneuron: Any, fact_folder: Path, concepts: Path, model_folder: Path, tmp_path: Path
) -> None:
    assert find_concepts(fact_folder) == find_concepts(tmp_path / "none") == []
    (concepts / "sense" / "fact.json").write_text((fact_folder / "lives_in.json").read_text())
    with pytest.raises(RelneuronError, match="holds a concept's sentences, .*fact.json does not"):
        find_concepts(concepts / "sense")
    code, _, err = relneuron("record", model_folder, fact_folder, "-o", tmp_path / "o")
    assert code == 2 and "is no prompts.jsonl" in err and not (tmp_path / "o").exists()
    (concepts / "sense" / "fact.json").unlink()
    words = ["run", model_folder, "--facts", concepts, "-o", tmp_path / "o"]
    code, _, err = relneuron(*words)
    assert code == 2 and "holds sentences for concepts" in err and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sentences": {"positive": []}}, "has no positive sentence"),
        ({"sentences": {"positive": ["a"], "negative": [3]}}, "negative sentence 1 is no text"),
        ({"sentences": {"positive": ["a", ""]}}, "positive sentence 2 is no text"),
        ({"sentences": {"positive": ["a"], "other": ["b"]}}, "sentences are 'other'"),
        ({"sentences": ["a"]}, "has no sentences"),
        ({"concept": 5}, "concept is no text"),
    ],
)
def test_what_is_no_concept_file(tmp_path: Path, changes: Any, words: str) -> None:
    path = write_concept(tmp_path / "x.json", "work", **changes)
    with pytest.raises(RelneuronError, match=words) as caught:
        read_concept(path)
    assert "x.json" in caught.value.cause and "sentences" in caught.value.fix


def test_a_file_without_a_name_has_its_own(tmp_path: Path) -> None:
    path = write_concept(tmp_path / "x.json", "work", concept=None, group="")
    assert read_concept(path) == Concept("x", "", tuple(WORK), tuple(CITY + FRUIT))
    twins = [Concept("x", "a", ("b",), ()), Concept("x", "c", ("d",), ())]
    with pytest.raises(RelneuronError, match="two concepts are called 'x'"):
        concept_prompts(twins)


def test_prompts_keep_what_they_say_of_concepts(tmp_path: Path) -> None:
    made = concept_prompts(
        [
            Concept("a", "g", ("one", "two", "both"), ("three", "both", "three")),
            Concept("b", "", ("three",), ("one", "three")),
        ]
    )
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(prompts_bytes(made))
    assert read_prompts(path) == made
    said = [(p.prompt, p.relation, p.split, p.negative_of, p.group) for p in made]
    assert said == [
        ("one", "a", "det", ("b",), "g"),
        ("two", "a", "det", (), "g"),
        ("both", "a", "det", (), "g"),
        ("three", "b", "det", ("a",), ""),
        ("both", "a", "neg", ("a",), "g"),
        ("three", "a", "neg", ("a", "b"), "g"),
    ]
    assert len({p.id for p in made}) == 6
    for bad in ('"a"', "[3]", "3"):
        line = path.read_text().splitlines()[0].replace('["b"]', bad)
        path.write_text(line + "\n")
        with pytest.raises(RelneuronError, match="line 1: not a prompt"):
            read_prompts(path)
        path.write_bytes(prompts_bytes(made))


def test_own_negatives_are_all_and_only_what_a_relation_is_compared_with() -> None:
    relation_of = ["a", "a", "b", "b", "", ""]
    own = [(), (), ("a",), (), ("a",), ("c",)]
    labels = sample_labels(("a", "b"), relation_of, [True] * 6, negatives=1, own_negatives=own)
    assert labels[0].tolist() == [1, 1, 0, -1, 0, -1]
    # Those of the other relation, drawn from real prompts only.
    assert labels[1, 2:4].tolist() == [1, 1] and (labels[1] == 0).sum() == 2
    assert labels[1, 4:].tolist() == [-1, -1]
