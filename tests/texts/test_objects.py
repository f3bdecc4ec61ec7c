"""Several right objects of one fact, in every stage and analysis after the fact files.

A fact counts once however often it is asked, and no right answer competes with another.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.analyses.answers import interference, resilience
from relneuron.artifact.effects import Condition, Grid, fact_numbers, own_languages, split_name
from relneuron.artifact.files import RelneuronError, fold
from relneuron.artifact.gains import Target, targets_bytes
from relneuron.artifact.prompts import Prompt, prompts_bytes, read_prompts
from relneuron.methods.gains.comparison import Row
from relneuron.methods.gains.drops import summary
from relneuron.methods.gains.targets import keep
from relneuron.methods.responses.significance import resamples
from relneuron.model.ask import Asker
from relneuron.model.questions import begins_with, encode, given_object, is_correct
from relneuron.model.targets import encode_targets
from relneuron.texts.knowledge import read_knowledge


def prompt(name: str, *objects: str, text: str = "abc", subject: str = "s", **more: Any) -> Prompt:
    base = {"relation": "r", "split": "eva", "language": "en", "template": "{}"} | more
    return Prompt(id=name, subject=subject, object=objects[0], prompt=text, objects=objects, **base)


# --- right answers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("\u0141o\u0301d", "\u0141\u00f3d\u017a", True),  # decomposed, composed
        ("\u0142\u00f3d", "\u0141o\u0301dz\u0301", True),
        ("\u0141o", "\u0141o\u0301dz\u0301", True),  # cut before a mark that the file writes
        ("\u0141o", "\u0141\u00f3d\u017a", False),
        ("STRASS", "Stra\u00dfe", True),
        ("Stra\u00dfe", "STRASSE", True),
        ("istan", "\u0130stanbul", False),  # a dotted capital is no i
        ("\u0130stan", "i\u0307stanbul", True),
        ("\u03c3\u03bf\u03c6\u03cc\u03c2", "\u03a3\u039f\u03a6\u038c\u03a3", True),
    ],
)
def test_answers_are_compared_composed_and_without_case(
    said: str, answer: str, right: bool
) -> None:
    assert is_correct(said, answer) == right
    if fold(said) == fold(answer):
        assert begins_with(f"{said}, of course", answer)


def test_any_object_is_right_and_the_first_that_fits_is_given() -> None:
    objects = ("guitar", "piano", "pianola")
    assert given_object("Pia", objects, is_correct) == "piano"
    assert given_object("drum", objects, is_correct) == ""
    assert given_object("Piano, mostly", objects, begins_with) == "piano"


def test_lines_of_one_question_have_the_answers_of_all(tmp_path: Path) -> None:
    lines = [
        {"id": "1", "object": "a"},
        {"id": "2", "objects": ["b", "A"]},
        {"id": "3", "object": ["c", "d"]},
        {"id": "4", "object": "e", "relation": "q"},
        {"id": "5", "object": "f", "prompt": "another"},
    ]
    base = {k: v for k, v in asdict(prompt("x", "y")).items() if k not in ("object", "objects")}
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(base | line) for line in lines), encoding="utf-8")
    found = read_prompts(path)
    assert [p.objects for p in found] == [
        ("a", "b", "c", "d"),
        ("b", "A", "c", "d"),
        ("c", "d", "a", "b"),
        ("e",),
        ("f",),
    ]
    assert [p.object for p in found] == ["a", "b", "c", "e", "f"]
    path.write_bytes(prompts_bytes(found))
    assert read_prompts(path) == found


@pytest.mark.parametrize("line", [{}, {"object": []}, {"objects": ["a", 1]}, {"object": None}])
def test_a_line_without_a_right_answer_is_refused(tmp_path: Path, line: dict[str, Any]) -> None:
    base = {k: v for k, v in asdict(prompt("x", "y")).items() if k not in ("object", "objects")}
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(base | line), encoding="utf-8")
    with pytest.raises(RelneuronError, match=r"line 1: not a prompt \(.*object"):
        read_prompts(path)


# --- asked -----------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token a letter."""

    eos_token_id = 2

    def __call__(self, texts: Any, add_special_tokens: bool = True) -> dict[str, Any]:
        return {"input_ids": [[ord(c) % 90 + 3 for c in t.replace(" ", "")] for t in texts]}

    def decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        return "".join(chr(token - 3 + 90) if token < 30 else "?" for token in tokens)


def test_logprob_is_of_the_most_probable_object(llama: Any) -> None:
    prompts = [prompt("0", "d", "e", "f"), prompt("1", "e"), prompt("2", "g", "gh", text="zzxy")]
    asked = encode(Letters(), llama, prompts)
    assert [len(starts) for starts in asked.starts] == [3, 1, 2]
    assert asked.answers == [starts[0][0] for starts in asked.starts]
    asker = Asker(llama, Letters())
    greedy, forced = asker.ask(asked, range(3)), asker.ask_forced(asked, range(3))
    for row in range(3):
        with torch.no_grad():
            logprobs = llama(torch.tensor([asked.ids[row]])).logits[0, -1].log_softmax(-1)
        values = logprobs[[start[0] for start in asked.starts[row]]].tolist()
        assert greedy.which[row] == forced.which[row] == values.index(max(values))
        assert greedy.logprobs[row] == pytest.approx(max(values), abs=1e-5)
        assert forced.logprobs[row] == pytest.approx(max(values), abs=1e-5)
    assert asker.most_probable(asked, 64) == greedy.which
    with pytest.raises(RelneuronError, match="prompt x: its object ' ' makes no token"):
        encode(Letters(), llama, [prompt("x", "a", " ")])


def test_prompts_with_the_same_answers_hold_them_once(llama: Any, tmp_path: Path) -> None:
    prompts = [prompt(str(n), *"de"[: 1 + n % 2], text=f"abc{n}") for n in range(6)]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(prompts_bytes(prompts))
    read = read_prompts(path)
    assert read == prompts
    starts = encode(Letters(), llama, read).starts
    assert starts == [encode(Letters(), llama, [one]).starts[0] for one in prompts]
    assert len({id(one.objects) for one in read}) == len({id(some) for some in starts}) == 2


def test_the_target_is_the_most_probable_right_answer(llama: Any) -> None:
    prompts = [prompt("0", "d", "efg", "f"), prompt("1", "e", text="xyz")]
    found = encode_targets(Letters(), llama, prompts)
    (which,) = Asker(llama, Letters()).ask(encode(Letters(), llama, prompts[:1]), [0]).which
    assert found.answers == [prompts[0].objects[which], "e"]
    assert found.targets[0] == found.rights[0][which]
    assert found.n_answer_tokens == [len(found.answers[0]), 1]
    # Lines of their own keep their targets, and know the others' as right.
    rows = encode_targets(Letters(), llama, [prompt("0", "d"), prompt("1", "e")])
    assert rows.rights == [[*rows.targets], [*rows.targets]]


def test_targets_name_their_answer_where_there_are_several() -> None:
    one = Target("0", "r", "d", 7, 1, 4, 1, 0.5, -0.5, True)
    assert targets_bytes([one]).decode().splitlines()[0].endswith(",kept")
    header, first, second = targets_bytes([one, replace(one, answer="efg")]).decode().splitlines()
    assert header.endswith(",kept,answer") and first.endswith(",1,") and second.endswith(",1,efg")


def test_a_right_answer_is_no_competitor() -> None:
    logits = torch.tensor([[5.0, 6.0, 7.0, 0.0]] * 2)
    targets, types = torch.tensor([0, 0]), ["a", "a"]
    tokens = {"a": torch.tensor([0, 1, 2])}
    assert keep(logits, targets, types, tokens).tolist() == [False, False]
    assert keep(logits, targets, types, tokens, [[0, 1, 2], [0, 1]]).tolist() == [True, False]


@pytest.mark.parametrize("name", ["answer", "answers", "object", "objects", "target"])
def test_a_table_may_list_right_answers(tmp_path: Path, name: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"prompt": "p", name: ["a", " b ", "A"], "type": "t"}))
    (found,) = read_knowledge(path)
    assert (found.object, found.objects) == ("a", ("a", "b"))
    path.write_text(json.dumps({"prompt": "p", name: ["a", None], "type": "t"}))
    with pytest.raises(RelneuronError, match=r"line 1: (answer|object|target) is empty"):
        read_knowledge(path)


# --- counted ---------------------------------------------------------------------------------


def test_a_fact_is_a_relation_and_a_subject() -> None:
    prompts = {
        p.id: p
        for p in [
            prompt("0", "a", subject="Malm\u00f6"),
            prompt("1", "b", subject="Malmo\u0308", text="other words"),
            prompt("2", "a", subject="Malm\u00f6", relation="q"),
            prompt("3", "a", subject=""),
            prompt("4", "b", subject=""),
            prompt("5", "b", subject="", text="other words"),
        ]
    }
    assert fact_numbers(prompts, prompts).tolist() == [0, 0, 1, 2, 2, 3]


def test_a_relations_own_language_has_no_name_in_splits() -> None:
    prompts = [
        prompt("0", "a", language="en"),
        prompt("1", "a", language="pl", split="det"),
        prompt("2", "a", language="de", relation="q"),
    ]
    own = own_languages(prompts)
    assert own == {"r": "pl", "q": "de"}
    assert [split_name(p, own) for p in prompts] == ["eva.en", "det", "eva"]


def grid(clean: str, off: str, facts: list[int], logprob: list[float]) -> Grid:
    ids = [str(i) for i in range(len(clean))]
    known = {"clean": Condition("clean", "clean"), "r": Condition("r", "set", "r", n_neurons=1)}
    known["q"] = Condition("q", "set", "q", n_neurons=1)
    found = Grid("eva", ids, np.array(["r"] * len(ids)), known, facts=np.array(facts))
    for name, marks in (("clean", clean), ("r", off), ("q", off)):
        found.correct[name] = np.array([int(m) for m in marks], np.int8)
        found.logprob[name] = np.array(logprob)
        found.prediction[name] = [f"{name} {i}" for i in ids]
    return found


def test_resilience_counts_facts() -> None:
    """Fact 0 keeps one of two prompts: sensitive. 1 and 2 keep all; of 3 none was right."""
    found = grid("11101100", "01101101", [0, 0, 1, 1, 2, 2, 3, 3], [-1, -3, -2, -9, -4, -6, -1, -1])
    frequency = {"0": 10.0, "2": 4.0, "4": 6.0, "5": 8.0, "6": 99.0}
    table = resilience(found, frequency)
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["n_resilient"], row["n_sensitive"]) == (2, 1)
    assert (row["logprob_resilient"], row["logprob_sensitive"]) == ((-2 - 5) / 2, -2)
    assert (row["frequency_resilient"], row["frequency_sensitive"]) == ((4 + 7) / 2, 10)


def test_interference_names_all_right_objects() -> None:
    found = grid("01", "11", [0, 1], [0, 0])
    prompts = {"0": prompt("0", "a", "b"), "1": prompt("1", "c")}
    (row,) = interference(found, prompts).rows
    assert row == ["r", "q", "0", "s", "a / b", "clean 0", "q 0"]


def test_intervals_of_the_comparison_are_over_facts() -> None:
    """Each fact twice: the same intervals as of each fact once, narrower without the facts."""
    rng = np.random.default_rng(0)
    once = [
        Row(name, f"s{i}", "t", 1, float(p), -1.0)
        for name in ("clean", "off")
        for i, p in enumerate(rng.random(12))
    ]
    twice = [row._replace(id=f"{row.id}.{k}") for row in once for k in (0, 1)]
    facts = {row.id: int(row.id[1:].split(".")[0]) for row in twice}
    (_, *_), wanted = summary(once), {s[:2]: s[3:] for s in summary(once)}
    for found in summary(twice, facts):
        np.testing.assert_allclose(found[3:], wanted[found[:2]], rtol=1e-12)
    width = {len(s): s.prob_drop_high - s.prob_drop_low for s in summary(twice, facts)[1:2]}
    apart = summary(twice)[1]
    assert [apart.prob_drop_high - apart.prob_drop_low] < list(width.values())


def test_prompts_of_a_fact_are_drawn_together() -> None:
    row = np.array([1, 1, 1, 0, 0, -1, 1], np.int8)
    facts = np.array([7, 3, 7, 5, 5, 5, 3])
    weights = resamples(row, 50, 0, facts)
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 1] == weights[:, 6]).all()
    assert (weights[:, 0].astype(int) + weights[:, 1] == 2).all()
    assert (weights[:, 3:5] == 1).all() and not weights[:, 5].any()
    alone = np.arange(7)[::-1].copy()
    assert (resamples(row, 50, 0, alone) == resamples(row, 50, 0)).all()
