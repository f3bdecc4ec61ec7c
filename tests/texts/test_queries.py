"""Facts in the JSON of other authors, and facts as multiple-choice questions."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.prompts import fact_name, read_prompts
from relneuron.texts.facts import read_relations
from relneuron.texts.knowledge import read_knowledge
from relneuron.texts.options import PromptsOptions
from relneuron.texts.prompts import write_prompts
from relneuron.texts.queries import are_queries, queries_bytes, read_queries

Run = Callable[..., tuple[int, str, str]]

PARAREL = {
    "u1": {
        "sentences": ["Bern is the capital of [MASK].", "Bern, capital of [MASK]", "[MASK]: Bern"],
        "obj_label": "Switzerland",
        "relation_name": "P1376",
    },
    "u2": {
        "sentences": ["Oslo is the capital of [MASK] ."],
        "obj_label": "Norway",
        "relation_name": "P1376",
    },
}
QRNCA = {
    "q1": {
        "sentences": ["1+1?\nA. 2\nB. 3\nAnswer:", "1+1?\nA. 3\nB. 2\nAnswer:"],
        "obj_label": ["A", "B"],
        "relation_name": "math",
    }
}


def write(folder: Path, value: Any) -> Path:
    path = folder / "facts.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_sentences_of_pararel_end_where_the_answer_begins(tmp_path: Path) -> None:
    path = write(tmp_path, PARAREL)
    with pytest.warns(UserWarning, match=r"1 sentences go on behind \[MASK\]"):
        prompts = read_queries(path)
    assert [(p.id, p.prompt, p.object) for p in prompts] == [
        ("u1.0", "Bern is the capital of", "Switzerland"),
        ("u1.1", "Bern, capital of", "Switzerland"),
        ("u2.0", "Oslo is the capital of", "Norway"),
    ]
    assert {p.relation for p in prompts} == {"P1376"} and not any(p.options for p in prompts)
    assert [fact_name(p) for p in prompts] == ["P1376/u1", "P1376/u1", "P1376/u2"]


def test_letters_are_options(tmp_path: Path) -> None:
    prompts = read_queries(write(tmp_path, QRNCA))
    assert [(p.object, p.options) for p in prompts] == [("A", ("A", "B")), ("B", ("A", "B"))]


def test_attribute_and_prompts_take_the_file(tmp_path: Path, relneuron: Run) -> None:
    path = write(tmp_path, QRNCA)
    assert read_knowledge(path) == read_queries(path)
    code, out, err = relneuron("prompts", path, "-o", tmp_path / "prompts.jsonl")
    assert code == 0 and "2 prompts" in out, err
    assert read_prompts(tmp_path / "prompts.jsonl") == read_queries(path)


def test_what_was_read_is_written_again(tmp_path: Path) -> None:
    for value in (QRNCA, {"u2": PARAREL["u2"] | {"sentences": ["Oslo is in"]}}):
        path = write(tmp_path, value)
        assert json.loads(queries_bytes(read_queries(path))) == value


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ({"sentences": []}, "sentences are no list"),
        ({"sentences": "Bern is"}, "sentences are no list"),
        ({"sentences": ["Bern", 3]}, "a sentence is no text"),
        ({"sentences": [" "]}, "a sentence is no text"),
        ({"sentences": ["a", "b"], "obj_label": ["A"]}, "1 answers for 2 sentences"),
        ({"obj_label": ""}, "obj_label is no text"),
        ({"obj_label": None}, "obj_label is no text"),
        ({"relation_name": ""}, "relation_name is no text"),
        ({"relation_name": 3}, "relation_name is no text"),
        ({"sentences": ["[MASK]."]}, "sentence 0 asks nothing"),
    ],
)
def test_a_fact_that_is_none_is_named(tmp_path: Path, fact: Any, said: str) -> None:
    good = {"sentences": ["Bern is in"], "obj_label": "A", "relation_name": "r"}
    path = write(tmp_path, {"u0": good, "u1": good | fact})
    with pytest.raises(RelneuronError, match=f"'u1': {said}"):
        read_queries(path)


def test_a_file_without_a_question_is_refused(tmp_path: Path) -> None:
    fact = {"sentences": ["[MASK] is Bern"], "obj_label": "A", "relation_name": "r"}
    with pytest.raises(RelneuronError, match="no sentence ends with"):
        read_queries(write(tmp_path, {"u": fact}))
    with pytest.raises(RelneuronError, match="is no object"):
        read_queries(write(tmp_path, {"u": fact, "v": 3}))
    with pytest.raises(RelneuronError, match="holds no fact"):
        read_queries(write(tmp_path, "{}"))
    with pytest.raises(RelneuronError, match="'u' stands twice"):
        text = json.dumps(fact)
        are_queries(write(tmp_path, f'{{"u": {text}, "u": {text}}}'))


def test_a_fact_file_is_no_such_file(fact_folder: Path, tmp_path: Path) -> None:
    assert not any(are_queries(path) for path in fact_folder.glob("*.json"))
    assert not are_queries(fact_folder) and not are_queries(tmp_path / "none.json")


# --- multiple choice ---------------------------------------------------------------------------


@pytest.fixture
def choosable(fact_folder: Path, tmp_path: Path) -> Path:
    """The facts without the relation whose objects are all one."""
    folder = tmp_path / "choosable"
    shutil.copytree(fact_folder, folder)
    (folder / "works_as.json").unlink()
    return folder


def test_each_fact_is_asked_in_several_orders(choosable: Path, tmp_path: Path) -> None:
    output = tmp_path / "prompts.jsonl"
    prompts = write_prompts(choosable, output, PromptsOptions(eva=8, choices=3, choose_from=3))
    assert read_prompts(output) == prompts
    relations = {r.name: r for r in read_relations(choosable, suffix="")}
    right = {(r.name, f.subject): f.object for r in relations.values() for f in r.facts}
    known = {r.name: {f.object for f in r.facts} for r in relations.values()}
    by_fact: dict[str, list[list[str]]] = {}
    for p in prompts:
        shown = dict(line.split(". ", 1) for line in p.prompt.split("\n") if line[1:3] == ". ")
        assert tuple(shown) == p.options == tuple("ABC")[: min(3, len(known[p.relation]))]
        assert shown[p.object] == right[p.relation, p.subject]
        assert {*shown.values()} <= known[p.relation] and len({*shown.values()}) == len(shown)
        question = relations[p.relation].templates.main[0].replace("{}", p.subject)
        assert question in p.prompt
        by_fact.setdefault(fact_name(p), []).append(list(shown.values()))
    assert len(by_fact) == 2 * 24 and all(len(v) == 3 for v in by_fact.values())
    # The same options in another order.
    assert all(len({frozenset(order) for order in orders}) == 1 for orders in by_fact.values())
    assert sum(len({*map(tuple, orders)}) > 1 for orders in by_fact.values()) > 30
    letters = Counter(p.object for p in prompts)
    assert max(letters.values()) < 2 * letters["B"]
    splits = Counter(p.split for p in prompts)
    assert splits == {"det": 2 * 16 * 3, "eva": 2 * 8 * 3}


def test_the_options_of_a_fact_are_its_own(choosable: Path, tmp_path: Path) -> None:
    asked = PromptsOptions(eva=8, choices=2)
    first = write_prompts(choosable, tmp_path / "a.jsonl", asked)
    alone = write_prompts(choosable / "lives_in.json", tmp_path / "b" / "p.jsonl", asked)
    assert alone == [p for p in first if p.relation == "lives_in"]
    other = PromptsOptions(eva=8, choices=2, seed=1)
    assert write_prompts(choosable, tmp_path / "c" / "p.jsonl", other) != first


def test_one_object_leaves_nothing_to_choose(tmp_path: Path, relneuron: Run) -> None:
    samples = [{"subject": s, "object": "Rome"} for s in "abc"]
    (tmp_path / "r.json").write_text(
        json.dumps({"prompt_templates": ["{} is in"], "samples": samples})
    )
    words = ["prompts", tmp_path, "-o", tmp_path / "p.jsonl", "--eva", 1]
    code, _, err = relneuron(*words, "--choices", 3)
    assert code == 1 and "there is no other answer than that of" in err
    assert not (tmp_path / "p.jsonl").exists()
    assert "only with --choices" in relneuron(*words, "--choose-from", 3)[2]
