"""Facts and prompts: reading LRE files, the paper's templates, the split, other languages.

Also the bad fact files: each must be refused with a cause that names the file and the field.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.prompts import prompts_bytes, read_prompts
from relneuron.texts.facts import (
    Fact,
    Relation,
    Templates,
    read_relation,
    read_relations,
    split_facts,
)
from relneuron.texts.neutral import read_sentences
from relneuron.texts.options import PromptsOptions
from relneuron.texts.prompts import chat_wrap, make_prompts, make_sentences, write_prompts
from tests.conftest import SHARED

LRE = SHARED / "lre"
needs_lre = pytest.mark.skipif(not LRE.is_dir(), reason="the LRE facts are not beside the project")


def write(folder: Path, data: Any, name: str = "capital.json") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def good(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_templates": ["The capital of {} is"],
        "prompt_templates_zs": ["{} has the capital", "The capital of {} is"],
        "samples": [{"subject": "Ruritania", "object": "Strelsau"}],
    } | changes


def test_templates_get_the_suffix_and_alternatives_are_the_others(tmp_path: Path) -> None:
    relation = read_relation(write(tmp_path, good()))
    assert relation.name == "capital"
    assert relation.templates.main == ("The capital of {} is? Answer:",)
    assert relation.templates.alternative == ("{} has the capital? Answer:",)
    assert read_relation(write(tmp_path, good()), suffix="").templates.main[0][-2:] == "is"


def test_exact_duplicates_count_once_and_text_is_stripped(tmp_path: Path) -> None:
    pair = {"subject": "Ruritania ", "object": " Strelsau"}
    relation = read_relation(write(tmp_path, good(samples=[pair, *good()["samples"]])))
    assert relation.facts == (Fact("Ruritania", "Strelsau"),)


def test_the_kind_of_subjects_and_neutral_templates_are_optional(tmp_path: Path) -> None:
    relation = read_relation(write(tmp_path, good()))
    assert (relation.neutral_templates, relation.domain) == ((), "")
    more = good(neutral_templates=[" The map shows {}. "], properties={"domain_name": "country"})
    relation = read_relation(write(tmp_path, more))
    assert (relation.neutral_templates, relation.domain) == (("The map shows {}.",), "country")


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        ("{no json", "JSON"),
        ("[1, 2]", "object"),
        ({"prompt_templates": ["{} is"]}, "samples"),
        (good(samples=[]), "samples"),
        (good(samples=[{"subject": " ", "object": "x"}]), "samples.0.subject"),
        (good(samples=[{"subject": "x"}]), "samples.0.object"),
        (good(prompt_templates=["The capital is"]), "prompt_templates.0"),
        (good(prompt_templates=["{} and {}"]), "exactly one"),
        (good(prompt_templates_zs=["no slot"]), "prompt_templates_zs.0"),
        (good(prompt_templates=[]), "prompt_templates"),
        (good(neutral_templates=["The map shows {}.", "It was {} and {}."]), "neutral_templates.1"),
        (good(properties={"domain_name": 7}), "properties.domain_name"),
        (good(languages={"de": {"prompt_templates": ["leer"]}}), "languages.de"),
    ],
)
def test_bad_fact_files_name_file_and_field(tmp_path: Path, data: Any, cause: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(RelneuronError) as caught:
        read_relation(path)
    assert str(path) in caught.value.cause
    assert cause in caught.value.cause
    assert "\n" not in caught.value.cause


def test_a_folder_without_fact_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RelneuronError, match="no fact files"):
        read_relations(tmp_path)


@pytest.mark.parametrize(
    "samples",
    [
        [{"subject": "Rose", "object": ["red", "white"]}],
        [{"subject": "Rose", "objects": ["red", "white"]}],
        [{"subject": "Rose", "object": "red", "objects": ["Red ", "white", "WHITE"]}],
        [{"subject": "Rose", "object": "red"}, {"subject": "Rose ", "object": "white"}],
        [{"subject": "Rose", "object": "red"}, {"subject": "Rose", "objects": ["RED", "white"]}],
    ],
)
def test_a_fact_is_a_subject_with_all_of_its_objects(tmp_path: Path, samples: Any) -> None:
    relation = read_relation(write(tmp_path, good(samples=[*samples, *good()["samples"]])))
    assert relation.facts == (Fact("Rose", "red", ("white",)), Fact("Ruritania", "Strelsau"))
    assert relation.facts[0].objects == ("red", "white")
    # Asked once a template, in det or in eva; each object has its sentence.
    prompts = list(make_prompts(relation, n_eva=1, seed=0))
    asked = [p for p in prompts if p.subject == "Rose"]
    assert len({p.prompt for p in asked}) == len(asked) > 0
    assert {p.objects for p in asked} == {("red", "white")}
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(prompts_bytes(prompts))
    assert read_prompts(path) == prompts
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"objects" in line for line in lines if line["subject"] != "Rose"} == {False}
    for seed in range(9):
        named = {s.object for s in make_sentences(relation, n_eva=1, seed=seed)}
        assert named in ({"red", "white"}, {"Strelsau"})


def test_names_are_compared_composed_objects_without_case(tmp_path: Path) -> None:
    nfd, nfc = "Malmo\u0308", "Malm\u00f6"
    samples = [
        {"subject": nfd, "object": "Stra\u00dfe"},
        {"subject": nfc, "object": ["STRASSE", nfd]},
        {"subject": nfc.upper(), "object": nfc},
    ]
    relation = read_relation(write(tmp_path, good(samples=samples)))
    # Case tells subjects apart: the model reads another prompt.
    assert relation.facts == (Fact(nfd, "Stra\u00dfe", (nfd,)), Fact(nfc.upper(), nfc))
    german = {"prompt_templates": ["{} ist"], "entities": {nfc: "Malmen", "strasse": "Weg"}}
    relation = read_relation(write(tmp_path, good(samples=samples, languages={"de": german})))
    assert relation.languages["de"].translate(relation.facts)[0] == Fact(
        "Malmen", "Weg", ("Malmen",)
    )


def test_one_name_for_two_subjects_elsewhere_is_asked_once_there(tmp_path: Path) -> None:
    samples = [{"subject": "Rome", "object": "a"}, {"subject": "Roma", "object": "b"}]
    german = {
        "prompt_templates": ["{} ist"],
        "suffix": "? Antwort:",
        "entities": {"Rome": "Rom", "Roma": "Rom"},
    }
    data = good(samples=[*samples, {"subject": "c", "object": "d"}], languages={"de": german})
    prompts = []
    for seed in range(9):
        made = make_prompts(read_relation(write(tmp_path, data)), n_eva=2, seed=seed)
        prompts.append([p for p in made if p.language == "de"])
    (both,) = next(some for some in prompts if len(some) == 1)
    assert (both.prompt, both.objects) == ("Rom ist? Antwort:", ("a", "b"))


POLISH = {"language": "pl", "suffix": " Odpowied\u017a:"}


def test_a_file_in_another_language_has_nothing_english(tmp_path: Path) -> None:
    path = write(tmp_path, good(**POLISH))
    relation = read_relation(path)
    assert (relation.language, relation.suffix) == ("pl", POLISH["suffix"])
    assert relation.templates.main == ("The capital of {} is" + POLISH["suffix"],)
    assert read_relation(path, suffix="?").templates.main == ("The capital of {} is?",)
    assert read_relation(write(tmp_path, good(language="pl"))).templates.main[0][-3:] == " is"
    assert make_sentences(relation, n_eva=0, seed=0) == []
    own = read_relation(write(tmp_path, good(**POLISH, neutral_templates=["Mapa {}."])))
    assert [s.sentence for s in make_sentences(own, n_eva=0, seed=0)] == ["Mapa Strelsau."]
    assert [p.id for p in make_prompts(relation, n_eva=0, seed=0)] == ["capital.det.pl.0000.0"]


def test_sentences_left_out_are_said_and_leave_no_empty_file(tmp_path: Path) -> None:
    samples = [{"subject": f"s{i}", "object": "o"} for i in range(4)]
    write(tmp_path, good(**POLISH, samples=samples))
    output = tmp_path / "out" / "prompts.jsonl"
    with pytest.warns(UserWarning, match="neutral sentences left out of capital: .*not in English"):
        write_prompts(tmp_path, output, PromptsOptions(eva=1))
    assert not output.with_name("sentences.jsonl").exists()
    stage = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]["prompts"]
    assert stage["files"] == ["prompts.jsonl"]


def test_unknown_keys_are_named_with_the_file(tmp_path: Path) -> None:
    data = good(
        name="n",
        prompt_template=["{} x"],
        properties={"relation_type": "factual", "domain": "city"},
        samples=[{"subject": "a", "object": "b", "aliases": []}] * 2,
        languages={"de": {"prompt_templates": ["{} ist"], "entitys": {}}},
    )
    with pytest.warns(UserWarning) as caught:
        read_relation(write(tmp_path, data))
    assert [str(w.message) for w in caught] == [
        f"{tmp_path / 'capital.json'}: unknown, not read: prompt_template, properties.domain, "
        "languages.de.entitys, samples.aliases"
    ]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            json.dumps(good(languages={"en": {"prompt_templates": ["{} is"]}})),
            "languages.en is the",
        ),
        (
            json.dumps(good(**POLISH, languages={"PL": {"prompt_templates": ["{}"]}})),
            "languages.PL",
        ),
        (
            json.dumps(
                good(languages={c: {"prompt_templates": ["{}"]} for c in ("pt-BR", "pt_br")})
            ),
            "languages.pt_br is the pt-BR language",
        ),
        ('{"languages": {"de": {"a": 1}, "de": {}}}', "the key 'de' stands twice"),
        ('{"samples": [], "samples": []}', "the key 'samples' stands twice"),
        (json.dumps(good(language="polski jezyk")), "language: Value error, a language is a code"),
        (json.dumps(good(samples=[{"subject": "x", "object": []}])), "samples.0.object"),
        (json.dumps(good(samples=[{"subject": "x", "objects": ["a", " "]}])), "samples.0.object.1"),
        (json.dumps(good(samples=[{"subject": "x", "object": 7}])), "samples.0.object.0"),
        (json.dumps(good(suffix="\ud800")), "half a surrogate pair"),
        ("[" * 99_999, "recursion"),
    ],
)
def test_languages_and_objects_that_cannot_be_meant(tmp_path: Path, text: str, cause: str) -> None:
    with pytest.raises(RelneuronError) as caught:
        read_relation(write(tmp_path, text))
    assert cause in caught.value.cause and "capital.json" in caught.value.cause
    assert "\n" not in caught.value.cause


class Chat:
    """A tokenizer of one token a letter that adds BOS, and whose template may write it, too."""

    bos_token, bos_token_id = "^", 0

    def __init__(self, template: str, adds: bool) -> None:
        self.chat_template, self.adds = template, adds

    def __call__(self, text: str) -> dict[str, list[int]]:
        ids = [0 if c == "^" else ord(c) for c in text]
        return {"input_ids": [0] * self.adds + ids}

    def apply_chat_template(self, messages: Any, *, tokenize: bool, **asked: bool) -> str:
        assert asked == {"add_generation_prompt": True} and not tokenize
        ((role, text),) = [(m["role"], m["content"]) for m in messages]
        return self.chat_template.format(role=role, text=text)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("begin", ["^", ""])
def test_a_chat_template_gives_no_second_bos(adds: bool, begin: str) -> None:
    tokenizer = Chat(begin + "<{role}>{text}<bot>", adds)
    wrapped = chat_wrap(tokenizer)("Why?")
    assert wrapped.removeprefix("^") == "<user>Why?<bot>"
    assert tokenizer(wrapped)["input_ids"].count(0) == (1 if adds or begin else 0)
    with pytest.raises(RelneuronError, match="no chat template"):
        chat_wrap(Chat("", adds))


def test_prompts_in_a_chat_template(tmp_path: Path) -> None:
    samples = [{"subject": f"s{i}", "object": "o"} for i in range(4)]
    write(tmp_path, good(samples=samples))
    output = tmp_path / "out" / "prompts.jsonl"
    made = write_prompts(
        tmp_path, output, PromptsOptions(eva=1), chat=Chat("^<{role}>{text}<bot>", True)
    )
    assert all(p.prompt == f"<user>{p.template.replace('{}', p.subject)}<bot>" for p in made)
    inputs = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]["prompts"]
    assert len(inputs["inputs"]["chat_template"]) == 64


def relation_of(pairs: list[tuple[str, str]], name: str = "r") -> Relation:
    facts = tuple(Fact(*pair) for pair in pairs)
    return Relation(name, Templates(("{}?",), ()), facts, {})


def test_split_shares_no_subject_and_is_exact() -> None:
    pairs = [(f"s{i // 3}", f"o{i}") for i in range(60)] + [(f"t{i}", "o") for i in range(9)]
    for seed in range(20):
        det, eva = split_facts(relation_of(pairs), 10, seed)
        assert len(eva) == 10
        assert len(det) + len(eva) == 29  # a subject is a fact
        assert not {f.subject for f in det} & {f.subject for f in eva}


def test_split_depends_on_seed_and_relation_only() -> None:
    pairs = [(f"s{i}", "o") for i in range(100)]
    one = split_facts(relation_of(pairs), 50, 0)
    assert one == split_facts(relation_of(pairs), 50, 0)
    # The order of the file changes the order of the lists, not who is in them.
    back = split_facts(relation_of(pairs[::-1]), 50, 0)
    assert set(one[1]) == set(back[1])
    assert set(one[1]) != set(split_facts(relation_of(pairs), 50, 1)[1])
    assert set(one[1]) != set(split_facts(relation_of(pairs, "q"), 50, 0)[1])


def test_too_few_facts_for_the_split() -> None:
    with pytest.raises(RelneuronError, match="too few"):
        split_facts(relation_of([(f"s{i}", "o") for i in range(50)]), 50, 0)
    # One subject with all facts cannot be divided.
    with pytest.raises(RelneuronError, match="too few"):
        split_facts(relation_of([("s", f"o{i}") for i in range(99)]), 50, 0)


def test_prompts_of_other_languages_ask_the_same_eva_facts(fact_folder: Path) -> None:
    relation = read_relation(fact_folder / "lives_in.json")
    prompts = list(make_prompts(relation, n_eva=8, seed=0))
    kinds = Counter((p.split, p.language) for p in prompts)
    assert kinds == {("det", "en"): 16, ("eva", "en"): 8, ("eva2", "en"): 8, ("eva", "de"): 8}
    german = [p for p in prompts if p.language == "de"]
    assert german[0].prompt == f"{german[0].subject} wohnt in"
    english = [p for p in prompts if (p.split, p.language) == ("eva", "en")]
    assert [p.subject for p in german] == [p.subject for p in english]
    assert {p.object for p in german} <= {"Rom", "Oslo", "Bern", "Lima"}


def test_write_prompts_round_trip_and_refusal(tmp_path: Path, fact_folder: Path) -> None:
    output = tmp_path / "prompts.jsonl"
    beside = tmp_path / "sentences.jsonl"
    made = write_prompts(fact_folder, output, PromptsOptions(eva=8))
    assert read_prompts(output) == made
    assert len({prompt.id for prompt in made}) == len(made)
    before = {path: path.read_bytes() for path in (output, beside)}
    for path in (output, beside):
        with pytest.raises(RelneuronError, match=rf"{path.name} exists"):
            write_prompts(fact_folder, output, PromptsOptions(eva=8))
        path.unlink()
    write_prompts(fact_folder, output, PromptsOptions(eva=8), force=True)
    assert {path: path.read_bytes() for path in (output, beside)} == before


def test_sentences_are_those_of_each_relation_and_stand_in_the_manifest(
    tmp_path: Path, fact_folder: Path
) -> None:
    write_prompts(fact_folder, tmp_path / "prompts.jsonl", PromptsOptions(eva=8, seed=3))
    relations = read_relations(fact_folder)
    wanted = [s for r in relations for s in make_sentences(r, n_eva=8, seed=3)]
    assert read_sentences(tmp_path / "sentences.jsonl") == wanted
    assert {sentence.relation for sentence in wanted} == {r.name for r in relations}
    stage = json.loads((tmp_path / "manifest.json").read_text())["stages"]["prompts"]
    assert stage["files"] == ["prompts.jsonl", "sentences.jsonl"]


def test_subjects_with_braces_are_not_formatted(tmp_path: Path) -> None:
    data = good(samples=[{"subject": "a{}b", "object": "x"}, {"subject": "c", "object": "y"}])
    prompts = make_prompts(read_relation(write(tmp_path, data)), n_eva=1, seed=0)
    assert "The capital of a{}b is? Answer:" in {prompt.prompt for prompt in prompts}


@needs_lre
def test_the_papers_relations_have_its_templates_and_sizes() -> None:
    relations = {relation.name: relation for relation in read_relations(LRE)}
    assert len(relations) == 12
    two = {"company_ceo", "company_hq", "person_occupation", "product_by_company"}
    two |= {"person_plays_position_in_sport"}
    assert {name for name, r in relations.items() if len(r.templates.main) == 2} == two
    main = {name: r.templates.main for name, r in relations.items()}
    assert main["person_plays_instrument"] == ("{} plays the instrument of? Answer:",)
    assert main["product_by_company"][0] == "{} was created by which company? Answer:"
    alternative = {name: r.templates.alternative for name, r in relations.items()}
    assert alternative["person_plays_pro_sport"] == ("What sport does {} play? They play? Answer:",)
    assert len(alternative["star_constellation"]) == 1
    assert alternative["person_occupation"] == ("{} works professionally as a? Answer:",)
    assert len(relations["product_by_company"].facts) == 494
    several = [f for r in relations.values() for f in r.facts if len(f.objects) > 1]
    assert len(several) == 16
    assert Counter(len(fact.objects) for fact in several) == {2: 15, 4: 1}
    # 50 facts of each relation, twice where there are two templates (methods A3).
    prompts = [p for r in relations.values() for p in make_prompts(r, n_eva=50, seed=0)]
    assert sum(prompt.split == "eva" for prompt in prompts) == 850


@needs_lre
def test_a_file_of_the_same_name_with_other_templates_keeps_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, good(), "person_plays_instrument.json")
    assert read_relation(path).templates.main == ("The capital of {} is? Answer:",)
