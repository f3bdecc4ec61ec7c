"""A study of facts that are not English, some with two right objects, from files to tables.

The model has read them; what it answers is counted here again, from the fact files themselves.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch

from relneuron.analyses.page import page
from relneuron.analyses.study import read_study
from relneuron.artifact.prompts import read_prompts
from relneuron.methods.responses.preview import warn_of_unknown
from relneuron.model.load import load_model, load_tokenizer
from relneuron.report.page import Page
from relneuron.study.run import run_study
from relneuron.study.settings import RunOptions
from tests.kit.files import read_rows
from tests.kit.polish import RELATIONS, SUFFIX, nfc, right_answers, train, write_facts
from tests.kit.studies import write_study

OPTIONS = RunOptions(eva=12, top=60, random_seeds=2, permutations=0, bootstrap=20, noise=200)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_facts(tmp_path_factory.mktemp("polish") / "facts")


@pytest.fixture(scope="module")
def model(facts: Path) -> Path:
    return train(facts, facts.parent / "model")


@pytest.fixture(scope="module")
def study(facts: Path, model: Path) -> Path:
    folder, said = facts.parent / "study", list[str]()
    with pytest.warns(UserWarning, match="neutral sentences left out of gra_na, lubi_owoc"):
        run_study(str(model), facts, folder, OPTIONS, quiet=True, say=said.append)
    # One prompt and the model's answer a relation, before anything else is said.
    assert [line.split(": ")[0] for line in said[:6]] == sorted(RELATIONS)
    assert all(f"{SUFFIX}' -> '" in line and "(right: " in line for line in said[:6])
    return folder


@torch.no_grad()
def answers(model: Path, prompts: list[str]) -> list[str]:
    """The two greedy tokens after each prompt, one at a time and without a cache."""
    network, tokenizer = load_model(str(model)), load_tokenizer(str(model))
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        n = ids.shape[1]
        for _ in range(2):
            ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(-1)], 1)
        made = ids[0, n:].tolist()
        made = made[: made.index(1)] if 1 in made else made
        found.append(tokenizer.decode(made).strip())
    return found


def is_listed(said: str, right: set[str]) -> bool:
    text = nfc(said).casefold()
    return bool(text) and any(name.startswith(text) for name in right)


def test_clean_accuracy_is_an_independent_count_of_every_listed_object(
    study: Path, model: Path, facts: Path
) -> None:
    listed = right_answers(facts)
    eva = [p for p in read_prompts(study / "prompts.jsonl") if p.split == "eva"]
    assert Counter(p.relation for p in eva) == dict.fromkeys(RELATIONS, 12)
    assert len({(p.relation, p.prompt) for p in eva}) == len(eva)
    counted, first = Counter[str](), Counter[str]()
    for p, said in zip(eva, answers(model, [p.prompt for p in eva]), strict=True):
        right = listed[p.relation, nfc(p.subject)]
        assert {nfc(name).casefold() for name in p.objects} == right
        counted[p.relation] += is_listed(said, right)
        first[p.relation] += is_listed(said, {nfc(p.object).casefold()})
    clean = {
        row["relation"]: int(row["n_correct"])
        for row in read_rows(study / "accuracy.csv")
        if (row["condition"], row["split"]) == ("clean", "eva")
    }
    assert clean == {name: counted[name] for name in RELATIONS}
    # It matters: with the first object alone fewer are right.
    assert first.total() < counted.total() > 30


def test_no_true_object_in_place_of_a_true_one_is_an_improvement(study: Path, facts: Path) -> None:
    listed = right_answers(facts)
    prompts = {p.id: p for p in read_prompts(study / "prompts.jsonl")}
    for row in read_rows(study / "analyses" / "interference.csv"):
        right = listed[row["relation"], nfc(row["subject"])]
        assert is_listed(row["after"], right) and not is_listed(row["before"], right)
    effects = read_rows(study / "effects.csv")
    clean = {row["id"]: row for row in effects if row["condition"] == "clean"}
    replaced = 0
    for row in effects:
        objects = prompts[row["id"]].objects
        right = listed[row["relation"], nfc(prompts[row["id"]].subject)]
        assert row["correct"] == str(int(is_listed(row["prediction"], right)))
        assert (row["given"] in objects) == (row["correct"] == "1")
        assert row["logprob_of"] in objects
        both = row["correct"] == clean[row["id"]]["correct"] == "1"
        replaced += both and row["given"] != clean[row["id"]]["given"]
    assert replaced  # a true object in place of another one: neither lost nor gained


def test_splits_and_ids_are_those_of_the_files_own_language(study: Path) -> None:
    prompts = read_prompts(study / "prompts.jsonl")
    assert {p.language for p in prompts} == {"pl"}
    assert all(p.id.startswith(f"{p.relation}.{p.split}.pl.") for p in prompts)
    assert all(p.prompt.endswith(SUFFIX) and "Answer" not in p.prompt for p in prompts)
    assert {row["split"] for row in read_rows(study / "effects.csv")} == {"eva", "eva2"}
    assert not (study / "sentences.jsonl").exists()
    det, eva = ({nfc(p.subject) for p in prompts if p.split == s and p.relation == "zbiera"} for s
                in ("det", "eva"))  # fmt: skip
    assert not det & eva and len(det | eva) == 30


def test_logprob_is_of_the_most_probable_right_object(study: Path, model: Path) -> None:
    network, tokenizer = load_model(str(model)), load_tokenizer(str(model))
    prompts = {p.id: p for p in read_prompts(study / "prompts.jsonl")}
    asked = [row for row in read_rows(study / "effects.csv") if row["condition"] == "clean"]
    several = [row for row in asked if len(prompts[row["id"]].objects) > 1][:20]
    assert several
    for row in several:
        p = prompts[row["id"]]
        ids = tokenizer(p.prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logprobs = network(ids).logits[0, -1].log_softmax(-1)
        firsts = [tokenizer(f"{p.prompt} {o}")["input_ids"][ids.shape[1]] for o in p.objects]
        best = max(logprobs[token].item() for token in firsts)
        assert float(row["logprob"]) == pytest.approx(best, abs=1e-4)
        assert logprobs[firsts[p.objects.index(row["logprob_of"])]].item() == best


def left_out(shown: Page) -> int:
    """How many relations the page leaves out of its means."""
    return shown.note.partition("to mean anything: ")[2].count(",") + 1


def test_a_drop_of_what_is_hardly_known_is_no_finding(facts: Path, tmp_path: Path) -> None:
    """Three of 20 facts right: losing or gaining some is chance."""
    few = {name: {relation: 3 for relation in RELATIONS} for name in ("clean", "random.0")}
    few |= {name: {relation: 4 for relation in RELATIONS} for name in RELATIONS}
    sets = {name: [[0, "gate", 1, 0.9]] for name in RELATIONS}
    folder = write_study(
        tmp_path / "s", relations=(*RELATIONS,), right=few, sets=sets, n_prompts=20
    )
    shown = page(read_study(folder), {})
    assert shown.answer == (
        "Nothing can be said: the model as it is answers 15.0\xa0% of the prompts right, at most "
        "15.0\xa0% of a relation's, too few for a drop or a rise to mean anything."
    )
    assert left_out(shown) == 6 and shown.tiles[0].value == "–"
    # One that is known is what the answer is of.
    few["clean"]["zbiera"] = 6
    folder = write_study(
        tmp_path / "t", relations=(*RELATIONS,), right=few, sets=sets, n_prompts=20
    )
    shown = page(read_study(folder), {})
    assert "falls by 33.3\xa0% on average" in shown.answer and left_out(shown) == 5


def test_run_warns_of_what_the_model_hardly_knows(study: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes((study / "prompts.jsonl").read_bytes())
    answered = read_rows(study / "validated.csv")
    right = {row["id"] for row in answered if row["correct"] == "1"}
    kept = {key for key in right if not key.startswith("gra_na.eva") or key[-6:-2] < "0003"}
    lines = ["id,correct", *(f"{row['id']},{int(row['id'] in kept)}" for row in answered)]
    (tmp_path / "validated.csv").write_text("\n".join(lines), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"\(gra_na \d+\.\d%\): drops mean nothing there"):
        warn_of_unknown(tmp_path)


def test_neutral_and_concept_sentences_are_the_files_own_or_left_out(
    facts: Path, model: Path, tmp_path: Path
) -> None:
    """Of two kinds of subjects, asked in Polish; and of files that say only English ones."""
    for path in facts.glob("*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        data["properties"] = {"domain_name": "osoba"}
        data["neutral_templates"] = ["Na tablicy było słowo {}."]
        data["concept_templates"] = ["{} może", "{} ma"]
        if path.stem in ("zbiera", "gra_na"):
            data["properties"] = {"domain_name": "firma"}
            for sample in data["samples"]:
                sample["subject"] += " SA"
        (tmp_path / path.name).write_text(json.dumps(data), encoding="utf-8")
    options = RunOptions(
        **{**OPTIONS.__dict__, "analyses": ("concepts", "perplexity"), "random_seeds": 1}
    )
    run_study(str(model), tmp_path, tmp_path / "s", options, quiet=True)
    concepts = read_prompts(tmp_path / "s" / "concepts" / "prompts.jsonl")
    assert {p.template for p in concepts} == {"{} może", "{} ma"}
    assert {p.language for p in concepts} == {"pl"}
    tables = {path.stem for path in (tmp_path / "s" / "analyses").glob("*.csv")}
    assert {"concepts", "perplexity"} <= tables
    assert "The " not in (tmp_path / "s" / "sentences.jsonl").read_text(encoding="utf-8")


def test_a_chat_template_is_asked_with_one_bos(facts: Path, model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}bot:{% endif %}"
    )
    folder = tmp_path / "model"
    load_model(str(model)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = RunOptions(**{**OPTIONS.__dict__, "chat_template": True, "random_seeds": 0})
    with pytest.warns(UserWarning):  # the model knows no such prompts
        run_study(str(folder), facts, tmp_path / "s", options, quiet=True)
    prompts = read_prompts(tmp_path / "s" / "prompts.jsonl")
    question = prompts[0].template.replace("{}", prompts[0].subject)
    assert prompts[0].prompt == f"user: {question}</s>bot:"
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    ids = manifest["tokens"]["first_prompt_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert len(manifest["stages"]["prompts"]["inputs"]["chat_template"]) == 64


def test_what_is_written_decomposed_is_one_subject(facts: Path) -> None:
    raw = json.loads((facts / "zbiera.json").read_text(encoding="utf-8"))["samples"]
    assert len({s["subject"] for s in raw}) > len({nfc(s["subject"]) for s in raw}) == 30
    assert any(unicodedata.is_normalized("NFC", s["subject"]) for s in raw)
