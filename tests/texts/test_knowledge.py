"""Sentences with an answer: their files in every format, first answer tokens, which are kept.

Bad files must be refused with the line, bad answers with the prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.prompts import Prompt, prompts_bytes
from relneuron.methods.gains.targets import keep, type_tokens
from relneuron.model.targets import encode_targets
from relneuron.texts.facts import read_relations
from relneuron.texts.knowledge import read_knowledge
from tests.conftest import tiny_model

TYPES = ("language", "capital", "country", "color", "number", "month")
CSV = "prompt,answer,type\n"


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def prompt(name: str, text: str, answer: str, kind: str = "r") -> Prompt:
    return Prompt(name, kind, "eva", "en", "", "", answer, text)


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "CSV"])
def test_the_same_table_in_every_format(tmp_path: Path, form: str) -> None:
    rows = [(f'He said "{kind}", and the word is', f" answer {i} ", kind) for i, kind in
            enumerate([*TYPES, "month"])]  # fmt: skip
    if form == "jsonl":
        lines = [json.dumps({"sentence": p, "target": a, "relation": t}) for p, a, t in rows]
        text = "\n".join(lines) + "\n\n"
    else:
        mark = "\t" if form == "tsv" else ","
        lines = [mark.join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in r) for r in rows]
        text = mark.join(["Prompt", " answer", "type"]) + "\r\n" + "\r\n".join(lines) + "\r\n"
    found = read_knowledge(write(tmp_path, f"facts.{form}", "\ufeff" + text))
    assert [(p.prompt, p.object, p.relation) for p in found] == [
        (p, a.strip(), t) for p, a, t in rows
    ]
    assert [p.id for p in found] == [*(f"{t}.0000" for t in TYPES), "month.0001"]
    assert {(p.split, p.language, p.subject, p.template) for p in found} == {("eva", "en", "", "")}


def test_what_a_table_may_say_beside(tmp_path: Path) -> None:
    text = (
        "id,sentence,object,relation,subject,language,template,note\n"
        "x,A B,C,cap,A,de,{} B,n\n"
        'y,"two\nlines",D,cap,,,,\n\nz,E,F,cap,,,,\n'
    )
    first, second, third = read_knowledge(write(tmp_path, "f.csv", text))
    assert first == Prompt("x", "cap", "eva", "de", "{} B", "A", "C", "A B")
    assert second == Prompt("y", "cap", "eva", "en", "", "", "D", "two\nlines")
    assert third.id == "z"


def test_numbers_of_a_jsonl_are_texts(tmp_path: Path) -> None:
    line = {"id": 7, "prompt": "two and two is", "answer": 4, "type": "number"}
    (found,) = read_knowledge(write(tmp_path, "f.jsonl", json.dumps(line)))
    assert (found.id, found.object) == ("7", "4")


def test_a_prompts_file_is_read_as_it_is(tmp_path: Path) -> None:
    prompts = [
        Prompt("b", "r", "det", "en", "{} x", "s", "o", " s x "),
        Prompt("a", "q", "eva2", "de", "", "", "o", "t"),
    ]
    assert read_knowledge(write(tmp_path, "prompts.jsonl", prompts_bytes(prompts))) == prompts
    bad = [prompts[0], Prompt("a", "q", "eva", "de", "", "", " ", "t")]
    with pytest.raises(RelneuronError, match="line 2: object is empty"):
        read_knowledge(write(tmp_path, "prompts.jsonl", prompts_bytes(bad)))


def test_fact_files_give_every_fact_in_every_main_template(fact_folder: Path) -> None:
    relations = read_relations(fact_folder)
    found = read_knowledge(fact_folder)
    wanted = [
        (relation.name, template.replace("{}", fact.subject), fact.object)
        for relation in relations
        for fact in relation.facts
        for template in relation.templates.main
    ]
    assert [(p.relation, p.prompt, p.object) for p in found] == wanted
    assert len({p.id for p in found}) == len(found) == 72
    assert {p.split for p in found} == {"eva"}
    one = read_knowledge(fact_folder / "lives_in.json")
    assert one == [p for p in found if p.relation == "lives_in"]


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("f.csv", "", "holds no sentence"),
        ("f.csv", CSV, "holds no sentence"),
        ("f.csv", "\n\n", "holds no sentence"),
        ("f.csv", CSV + "a,b,c\na,,c\n", "line 3: answer is empty"),
        ("f.csv", CSV + '"a\nb",b,c\n  ,b,c\n', "line 4: prompt is empty"),
        ("f.csv", CSV + "a,b, \n", "line 2: type is empty"),
        ("f.csv", "prompt,type\na,b\n", "line 2: no column answer or object or target"),
        ("f.csv", "text,answer,type\na,b,c\n", "line 2: no column prompt or sentence"),
        ("f.tsv", CSV + "a,b,c\n", "line 2: no column prompt or sentence"),
        ("f.csv", "prompt,answer,object,type\na,b,c,d\n", "columns answer and object mean"),
        ("f.csv", "prompt,answer,type,type\na,b,c,d\n", "the column 'type' is there twice"),
        ("f.csv", CSV + "a,b\n", "line 2: 2 cells, the first line has 3"),
        ("f.csv", CSV + 'a,b,c\na,"b,c\n', "line 3: unexpected end of data"),
        ("f.csv", "id," + CSV + "x,a,b,c\ny,a,b,c\nx,a,b,c\n", "line 4: the id 'x' is that of li"),
        ("f.csv", "id," + CSV + ",a,b,c\n", "line 2: id is empty"),
        ("f.csv", CSV.encode() + b"a,b,c\na,\xe9,c\n", "line 3: not UTF-8"),
        ("f.jsonl", "", "holds no sentence"),
        ("f.jsonl", "[1]\n", "line 1: no object"),
        ("f.jsonl", '{"prompt": "a", "answer": "b", "type": "c"}\n{\n', "line 2: not JSON"),
        ("f.jsonl", '{"prompt": "a", "answer": null, "type": "c"}\n', "line 1: answer is empty"),
        (
            "f.jsonl",
            '{"prompt": "a", "answer": "\\ud800", "type": "c"}\n',
            "line 1: it holds half",
        ),
        ("f.jsonl", '{"prompt": "a", "answer": "b"}\n', "line 1: no column type or relation"),
        ("f.txt", CSV + "a,b,c\n", "is no file of facts or prompts"),
        ("f.json", "{}", "prompt_templates"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, text: str | bytes, cause: str) -> None:
    with pytest.raises(RelneuronError) as error:
        read_knowledge(write(tmp_path, name, text))
    assert cause in error.value.cause and str(tmp_path / name) in error.value.cause
    assert "\n" not in error.value.cause + error.value.fix


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    for name in ("f.csv", "f.json", "folder"):
        with pytest.raises(RelneuronError, match="does not exist"):
            read_knowledge(tmp_path / name)
    with pytest.raises(RelneuronError, match="no fact files"):
        read_knowledge(tmp_path)


# --- targets ---------------------------------------------------------------------------------


class Words:
    """A tokenizer of one token per word, each word by its number, with a first token 1."""

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, Any]:
        first = [1] * add_special_tokens
        words = [text.replace("a", "2").split() for text in texts]
        return {"input_ids": [first + list(map(int, line)) for line in words]}

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


def test_targets_are_first_answer_tokens(model_folder: Path) -> None:
    from relneuron.model.load import load_model, load_tokenizer

    model, tokenizer = load_model(str(model_folder)), load_tokenizer(str(model_folder))
    prompts = [prompt("a", "Person1 lives in", "Rome"), prompt("b", "Person2 eats", "plum jam")]
    found = encode_targets(tokenizer, model, prompts)
    for row, one in enumerate(prompts):
        rest = tokenizer(" " + one.object, add_special_tokens=False)["input_ids"]
        assert found.ids[row] == tokenizer(one.prompt)["input_ids"]
        assert found.targets[row] == rest[0] and found.n_answer_tokens[row] == len(rest)
    assert found.n_answer_tokens[1] > 1
    assert found.n_several == sum(n > 1 for n in found.n_answer_tokens)


def test_a_strict_answer_has_one_token() -> None:
    model = tiny_model("llama")
    good, several = prompt("a", "5 6", "7"), prompt("b", "5", "8 9")
    found = encode_targets(Words(), model, [good, several])
    assert (found.ids, found.targets) == ([[1, 5, 6], [1, 5]], [7, 8])
    assert (found.n_answer_tokens, found.n_several) == ([1, 2], 1)
    assert encode_targets(Words(), model, [good], strict=True).n_several == 0
    with pytest.raises(RelneuronError, match="prompt b: its answer '8 9' has 2 tokens") as error:
        encode_targets(Words(), model, [good, several], strict=True)
    assert "--strict" in error.value.fix


def test_sentences_and_answers_that_do_not_fit_the_model() -> None:
    model = tiny_model("llama")  # 96 tokens, a context of 64
    longest = prompt("long", "5 " * 63, "7")
    assert len(encode_targets(Words(), model, [longest]).ids[0]) == 64
    for bad, cause in (
        (prompt("x", "5 " * 64, "7"), "prompt x has 65 tokens, the model's context 64"),
        (prompt("x", "5", "96"), "the token 96, the model has 96 tokens"),
        (prompt("x", "5", " "), "its object ' ' makes no token"),
    ):
        with pytest.raises(RelneuronError, match=cause):
            encode_targets(Words(), model, [longest, bad])
    with pytest.raises(RelneuronError, match="no sentence"):
        encode_targets(Words(), model, [])
    # An unembedding that is smaller than the embedding.
    model.lm_head = torch.nn.Linear(32, 90, bias=False)
    with pytest.raises(RelneuronError, match="prompt x: its answer '90' begins with the token 90"):
        encode_targets(Words(), model, [longest, prompt("x", "5", "90")])


# --- the rule to keep a sentence -------------------------------------------------------------


def test_kept_sentences_by_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 30, generator=generator).round(decimals=1)  # with ties
    targets = torch.randint(0, 12, (400,), generator=generator)
    logits[torch.arange(400), targets] += 1.5
    types = [("color", "month", "number")[int(target) % 3] for target in targets]
    tokens = type_tokens(targets.tolist(), types)
    kept = keep(logits, targets, types, tokens)
    assert kept.dtype == torch.bool and 50 < kept.sum() < 350
    for row, kind in enumerate(types):
        own = float(logits[row, targets[row]])
        others = {int(t) for t, k in zip(targets, types, strict=True) if k == kind}
        others -= {int(targets[row])}
        among = sum(float(value) > own for value in logits[row]) <= 9
        assert kept[row] == (among and all(own > float(logits[row, t]) for t in others))


def test_a_type_of_one_token_asks_for_the_ten_most_probable_alone() -> None:
    logits = torch.arange(20.0).flip(0).repeat(3, 1)
    targets = torch.tensor([9, 10, 0])
    types = ["a", "b", "c"]
    assert keep(logits, targets, types, type_tokens([9, 10, 0], types)).tolist() == [1, 0, 1]
    # Token 0 is above token 9 of the same type; equal is not above.
    both = keep(logits, targets, ["a", "b", "a"], type_tokens([9, 10, 0], ["a", "b", "a"]))
    assert both.tolist() == [0, 0, 1]
    logits[2, 1] = logits[2, 0]
    tie = keep(
        logits, targets, ["a", "b", "a"], {"a": torch.tensor([0, 1]), "b": torch.tensor([10])}
    )
    assert tie.tolist() == [0, 0, 0]


def test_a_target_without_a_finite_logit_is_not_kept() -> None:
    logits = torch.zeros(2, 3)
    logits[0, 1] = torch.nan
    tokens = {"a": torch.tensor([1])}
    assert keep(logits, torch.tensor([1, 1]), ["a", "a"], tokens).tolist() == [0, 1]


def test_tokens_of_a_type_once_each() -> None:
    found = type_tokens([5, 3, 5, 4], ["a", "a", "a", "b"])
    assert {kind: tokens.tolist() for kind, tokens in found.items()} == {"a": [3, 5], "b": [4]}
