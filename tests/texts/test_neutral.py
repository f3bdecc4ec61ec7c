"""Neutral sentences: which objects they name, where their templates come from, their file.

Bad lines of sentences.jsonl must be refused with the file and the line.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relneuron.artifact.files import RelneuronError
from relneuron.demo import FACTS
from relneuron.texts.facts import Fact, Relation, Templates, read_relations, split_facts
from relneuron.texts.neutral import GENERAL, NEUTRAL, Sentence, read_sentences, sentences_bytes
from relneuron.texts.prompts import make_sentences

LRE_STEMS = {
    "company_ceo",
    "company_hq",
    "landmark_in_country",
    "landmark_on_continent",
    "person_father",
    "person_mother",
    "person_occupation",
    "person_plays_instrument",
    "person_plays_position_in_sport",
    "person_plays_pro_sport",
    "product_by_company",
    "star_constellation",
}
PAPER_STEMS = {
    "landmark_country": "landmark_in_country",
    "landmark_continent": "landmark_on_continent",
    "person_sport_position": "person_plays_position_in_sport",
    "person_pro_sport": "person_plays_pro_sport",
    "product_company": "product_by_company",
}


def relation_of(n_objects: int, name: str = "r", neutral: tuple[str, ...] = ()) -> Relation:
    """Three facts for each object, the objects in an order that is not the alphabet's."""
    facts = tuple(Fact(f"s{i}", f"o{i * 7 % n_objects}") for i in range(3 * n_objects))
    return Relation(name, Templates(("{}?",), ()), facts, {}, neutral)


def test_each_distinct_object_of_det_once_in_order_of_appearance() -> None:
    relation = relation_of(20)
    det, _ = split_facts(relation, 30, 5)
    made = make_sentences(relation, n_eva=30, seed=5)
    objects = [sentence.object for sentence in made]
    assert len(set(objects)) == len(objects)
    assert set(objects) == {fact.object for fact in det}
    firsts = [next(i for i, fact in enumerate(det) if fact.object == name) for name in objects]
    assert firsts == sorted(firsts)
    assert make_sentences(relation, n_eva=30, seed=5) == made
    assert make_sentences(relation, n_eva=30, seed=6) != made


def test_objects_of_eva_facts_alone_have_no_sentence() -> None:
    facts = tuple(Fact(f"s{i}", f"o{i}") for i in range(10))
    relation = Relation("r", Templates(("{}?",), ()), facts, {})
    det, eva = split_facts(relation, 4, 0)
    made = {sentence.object for sentence in make_sentences(relation, n_eva=4, seed=0)}
    assert made == {fact.object for fact in det}
    assert not made & {fact.object for fact in eva}


def test_at_most_fifty() -> None:
    # 7 and 66 have no common divisor, so all 66 objects occur.
    relation = relation_of(66)
    det, _ = split_facts(relation, 10, 0)
    made = make_sentences(relation, n_eva=10, seed=0)
    assert [sentence.object for sentence in made] == list(dict.fromkeys(f.object for f in det))[:50]
    assert len({sentence.id for sentence in made}) == len(made) == 50


def test_the_files_first_template_goes_before_the_default() -> None:
    own = ("The map shows {}.", "The book names {}.")
    made = make_sentences(relation_of(8, "company_hq", own), n_eva=4, seed=0)
    assert {sentence.template for sentence in made} == {own[0]}
    assert made[0].sentence == f"The map shows {made[0].object}."
    made = make_sentences(relation_of(8, "company_hq"), n_eva=4, seed=0)
    assert {sentence.template for sentence in made} == {NEUTRAL["company_hq"]}
    made = make_sentences(relation_of(8, "capital"), n_eva=4, seed=0)
    assert {sentence.template for sentence in made} == {GENERAL}


def test_the_papers_relations_have_templates_under_both_names() -> None:
    assert set(NEUTRAL) == LRE_STEMS | set(PAPER_STEMS)
    assert all(NEUTRAL[paper] == NEUTRAL[lre] for paper, lre in PAPER_STEMS.items())
    assert len(set(NEUTRAL.values())) == len(LRE_STEMS)


@pytest.mark.parametrize("template", [GENERAL, *sorted(set(NEUTRAL.values()))])
def test_a_default_template_ends_with_the_object_and_a_full_stop(template: str) -> None:
    assert template.count("{}") == 1
    assert template.endswith(" {}.")


def test_the_demos_sentences_are_in_words_of_its_templates() -> None:
    relations = read_relations(FACTS)
    known = {
        word
        for relation in relations
        for template in (*relation.templates.main, *relation.templates.alternative)
        for word in template.replace("?", " ").replace(",", " ").split()
    }
    for relation in relations:
        made = make_sentences(relation, n_eva=50, seed=0)
        assert made[0].template == relation.neutral_templates[0]
        assert made[0].template.endswith(" {}.")
        assert set(made[0].template.removesuffix(" {}.").split()) <= known
        assert made[0].template.removesuffix(" {}.") not in {
            template.split(" {}")[0] for template in relation.templates.main
        }


def test_objects_with_braces_are_not_formatted() -> None:
    facts = (Fact("a", "x{}y"), Fact("b", "x{}y"))
    relation = Relation("r", Templates(("{}?",), ()), facts, {}, ("It is {}.",))
    assert make_sentences(relation, n_eva=1, seed=0)[0].sentence == "It is x{}y."


def test_sentences_survive_their_file(tmp_path: Path) -> None:
    made = make_sentences(relation_of(9, neutral=("Über {}.",)), n_eva=4, seed=0)
    path = tmp_path / "sentences.jsonl"
    path.write_bytes(sentences_bytes(made))
    assert read_sentences(path) == made
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert list(first) == ["id", "relation", "template", "object", "sentence"]


GOOD = Sentence("r.neutral.0000", "r", "It is {}.", "x", "It is x.")
LINE = sentences_bytes([GOOD]).decode()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "holds no sentence"),
        (LINE + "{no json\n", "line 2: not JSON"),
        (LINE.replace('"object"', '"objekt"'), "line 1: not a sentence ('object' is not in it)"),
        (LINE.replace('"x"', "7"), "line 1: not a sentence (a field is not a string)"),
        ("[]\n", "line 1: not a sentence"),
        (LINE + LINE, "line 2: a second sentence with the id"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, cause: str) -> None:
    path = tmp_path / "sentences.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RelneuronError) as caught:
        read_sentences(path)
    assert str(path) in caught.value.cause
    assert cause in caught.value.cause


def test_a_missing_file_names_the_stage_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(RelneuronError, match="does not exist") as caught:
        read_sentences(tmp_path / "sentences.jsonl")
    assert "relneuron prompts" in caught.value.fix
