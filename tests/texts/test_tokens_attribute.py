"""Tokens that an attribution scores: the answer's first, a given one, what the model chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.methods.gains.attribute import attribute
from relneuron.methods.gains.options import AttributeOptions
from tests.kit.files import read_rows
from tests.kit.speakers import byte_level, characters, save, sentence_piece, tiny_llama
from tests.texts.test_tokens_study import QUICK


def table(path: Path, *rows: str, header: str = "prompt,answer,type") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("tokenizer", "rows", "targets"),
    [
        (byte_level([], digits=True), ["Ada is,37,a", "Ada is,19,a"], ["3", "1"]),
        (sentence_piece(), ["ada is,37,a", "ada is,19,a"], ["3", "1"]),
        (byte_level(["北京", "東"]), ["甲国是,北京,a", "甲国是,東,a"], ["北京", "東"]),
        (sentence_piece(["北京"]), ["甲国是,北京,a", "甲国是,南,a"], ["北京", "<0xE5>"]),
        (characters(["เมืองคือกรุงดี"]), ["เมืองคือ,กรุง,a", "เมืองคือ,ดี,a"], ["ก", "ด"]),
        (byte_level([" 37", " 19"]), ["Ada is,37,a", "Ada is,19,a"], [" 37", " 19"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*makes a token of the space")
def test_no_neuron_is_ranked_for_a_space(
    tokenizer: Any, rows: list[str], targets: list[str], tmp_path: Path
) -> None:
    model = tiny_llama(tokenizer)
    path = table(tmp_path / "f.csv", *rows)
    attribute("m", model, tokenizer, path, tmp_path / "out", QUICK, quiet=True)
    found = read_rows(tmp_path / "out" / "targets.csv")
    assert [row["target"] for row in found] == targets
    for row, line in zip(found, rows, strict=True):
        prompt, answer, _ = line.split(",")
        token = int(row["target_id"])
        spaced = prompt + (" " if prompt.isascii() else "") + answer
        whole = [1, *tokenizer(spaced, add_special_tokens=False)["input_ids"]]
        place = int(row["n_tokens"])
        assert whole[place] == token
        with torch.no_grad():
            logits = model(torch.tensor([whole[:place]])).logits[0, -1]
        assert abs(float(row["logprob"]) - float(logits.log_softmax(-1)[token])) < 1e-4


@pytest.mark.filterwarnings("ignore:.*makes a token of the space")
def test_a_target_can_be_given(tmp_path: Path) -> None:
    tokenizer = byte_level([" Paris", " 37", "Log", " Rome"])
    model, number = tiny_llama(tokenizer), tokenizer.convert_tokens_to_ids

    def found(path: Path, **more: Any) -> list[tuple[str, int]]:
        out = tmp_path / f"out.{path.name}"
        attribute("m", model, tokenizer, path, out, QUICK, quiet=True, **more)
        rows = read_rows(out / "targets.csv")
        manifest = Manifest(out).data["stages"]["attribute"]["tokens"]
        assert "given for" in manifest["target"]
        return [(row["target"], int(row["target_id"])) for row in rows]

    wanted = [(" Paris", number("ĠParis")), ("Log", number("Log")), (" 37", number("Ġ37"))]
    lines = ["A is,big town,a,Paris", "B is,Logic,a,Log", "C is,370,a, 37", "D is,Rome,a,"]
    header = "prompt,answer,type,target"
    wanted.append((" Rome", number("ĠRome")))
    assert found(table(tmp_path / "f.csv", *lines, header=header)) == wanted
    tabs = [line.replace(",", "\t") for line in lines]
    assert found(table(tmp_path / "f.tsv", *tabs, header=header.replace(",", "\t"))) == wanted
    again = found(tmp_path / "out.f.csv" / "prompts.jsonl")  # what the stage wrote keeps them
    assert again == wanted

    ids = [{"prompt": "A is", "answer": "x", "type": "a", "target": number("ĠParis")}]
    ids += [{"prompt": "B is", "type": "a", "target": number("Log")}]
    ids += [{"prompt": "C is", "type": "a", "target": "Ġ37"}]
    path = tmp_path / "ids.jsonl"
    path.write_text("\n".join(map(json.dumps, ids)))
    assert found(path) == wanted[:3]
    rows = [f"A is,x,a,{number('ĠParis')}", f"B is,x,a,{number('Log')}"]
    for column in ("target_id", "target"):
        path = table(tmp_path / f"{column}.csv", *rows, header=f"prompt,answer,type,{column}")
        assert found(path) == wanted[:2]


@pytest.mark.parametrize(
    ("line", "header", "cause"),
    [
        ("A is,x,a,Lyon", "prompt,answer,type,target", "its target 'Lyon' is no token"),
        ("A is,x,a,99999", "prompt,answer,type,target_id", "its target is the token 99999"),
        ("A is,x,a,seven", "prompt,answer,type,target_id", "line 2: target_id 'seven' is no"),
    ],
)
def test_a_target_that_is_no_token(line: str, header: str, cause: str, tmp_path: Path) -> None:
    tokenizer = byte_level([" Paris"])
    path = table(tmp_path / "f.csv", line, header=header)
    with pytest.raises(RelneuronError, match=cause):
        attribute("m", tiny_llama(tokenizer), tokenizer, path, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_the_models_own_choice_as_target(tmp_path: Path) -> None:
    tokenizer = byte_level([" Paris", " 37"])
    model = tiny_llama(tokenizer)
    options = AttributeOptions(kinds=("ffn_neuron",), top=5, target="prediction")
    prompts = ["Ada was born in", "Bob is", "C"]
    rows = [{"prompt": text, "type": "a"} for text in prompts]  # no answer is needed
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    attribute("m", model, tokenizer, path, tmp_path / "out", options, quiet=True)
    found = read_rows(tmp_path / "out" / "targets.csv")
    for row, text in zip(found, prompts, strict=True):
        ids = [1, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        assert int(row["target_id"]) == int(logits.argmax()) and row["rank"] == "1"
        assert abs(float(row["logprob"]) - float(logits.log_softmax(-1).max())) < 1e-4
    before = (tmp_path / "out" / "targets.csv").stat().st_mtime_ns
    attribute("m", model, tokenizer, path, tmp_path / "out", options, quiet=True)
    assert (tmp_path / "out" / "targets.csv").stat().st_mtime_ns == before
    with pytest.raises(RelneuronError, match="unknown --target 'guess'"):
        AttributeOptions(target="guess")


def test_types_with_one_target_are_named(tmp_path: Path) -> None:
    tokenizer = byte_level([" 1", " 4"])
    path = table(tmp_path / "f.csv", "A is,12,year", "B is,19,year", "C is,41,age", "D is,19,age")
    with pytest.warns(
        UserWarning, match="year: all 2 prompts ask for one and the same token, ' 1'"
    ):
        attribute("m", tiny_llama(tokenizer), tokenizer, path, tmp_path / "out", QUICK, quiet=True)
    (notice,) = Manifest(tmp_path / "out").data["stages"]["attribute"]["fallbacks"][-1:]
    assert notice.startswith("year: ")


def test_the_commands_say_which_tokens(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from relneuron.cli.main import app

    tokenizer = byte_level([" Paris", " Rome"], "both")
    folder = save(tmp_path / "model", tiny_llama(tokenizer), tokenizer)
    runner = CliRunner()
    said = runner.invoke(app, ["doctor", str(folder)])
    assert "<s> before a prompt; </s>, which it appends, is taken off" in " ".join(
        said.output.split()
    )
    path = table(tmp_path / "f.csv", "A is,Paris,city", "B is,Rome,city", "C is,Paris,city")
    words = ["attribute", str(folder), str(path), "-o", str(tmp_path / "out"), "--no-compare"]
    said = runner.invoke(app, words)
    shown = " ".join(said.output.split())
    paris, rome = (tokenizer.convert_tokens_to_ids(name) for name in ("ĠParis", "ĠRome"))
    assert f"city: asked for ' Paris' ({paris}) 2 times, ' Rome' ({rome}) 1 times" in shown
    assert said.exit_code == 0
