"""The stages on models whose tokenizers are unlike the usual: what is read must be what they know.

Each model knows its facts by heart, and a plain loop over single tokens says what it answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from relneuron.ablation.ablate import ablate_prompts
from relneuron.ablation.generate import generate
from relneuron.ablation.options import GenerateOptions
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import Prompt, prompts_bytes
from relneuron.methods.gains.attribute import attribute
from relneuron.methods.gains.options import AttributeOptions
from relneuron.methods.responses.options import RecordOptions
from relneuron.methods.responses.record import record
from relneuron.model.ask import Asker
from relneuron.model.questions import encode
from tests.kit.hooked import one_thread, read_rows
from tests.kit.speakers import byte_level, characters, save, sentence_piece, taught, tiny_llama

CAPITALS = {
    "甲国": "北京",
    "乙国": "北海",
    "丙国": "東京",
    "丁国": "南京",
    "戊国": "Łódź",
    "己国": "巴黎",
}
YEARS = {"Ada": "37", "Bob": "41", "Cyd": "19", "Dan": "18", "Eve": "90", "Fay": "12"}
QUICK = AttributeOptions(kinds=("ffn_neuron",), top=5, compare=False)
SHAPE = {"layers": 2, "width": 48, "hidden": 32}


def asked(facts: dict[str, str], template: str, language: str, end: str = "") -> list[Prompt]:
    """Each fact as a det and as an eva prompt of two relations."""
    return [
        Prompt(
            f"{split}.{i}",
            f"r{i % 2}",
            split,
            language,
            template,
            subject,
            answer,
            template.replace("{}", subject) + end,
        )
        for split in ("det", "eva")
        for i, (subject, answer) in enumerate(facts.items())
    ]


CHINESE = asked(CAPITALS, "{}的首都是", "zh")
ENGLISH = asked(YEARS, "{} was born in", "en")


def learned(tokenizer: Any, prompts: list[Prompt], space: str) -> Any:
    return taught(tokenizer, [p.prompt + space + p.object for p in prompts if p.split == "eva"])


def written(folder: Path, prompts: list[Prompt]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "asked.jsonl"
    path.write_bytes(prompts_bytes(prompts))
    return path


def greedy_bytes(model: Any, tokenizer: Any, prompt: str, n: int = 2) -> bytes:
    """The bytes of the first tokens that the model says, taken from the names of its tokens."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = [tokenizer.bos_token_id, *ids] if tokenizer.bos_token_id is not None else ids
    said = b""
    with torch.no_grad():
        for _ in range(n):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
            name = tokenizer.convert_ids_to_tokens(token)
            is_byte = name.startswith("<0x")
            text = tokenizer.decode([token])
            said += (
                bytes([int(name[3:5], 16)])
                if is_byte
                else b""
                if token == 2
                else (
                    bytes([LETTERS[name]]) if len(name) == 1 and name in LETTERS else text.encode()
                )
            )
    return said


def byte_letters() -> dict[str, int]:
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Two-byte characters show every byte above 0x7F; a letter stands for the byte in its place.
    found = {split.pre_tokenize_str(chr(b))[0][0]: b for b in range(128)}
    for code in range(0x80, 0x800):
        (name, _), *_ = split.pre_tokenize_str(chr(code))
        found |= dict(zip(name, chr(code).encode(), strict=True))
    for text in ("国北京海東南巴黎的首都是", "\u0fff\u1000\U00010000\U0010ffff"):
        for char in text:
            (name, _), *_ = split.pre_tokenize_str(char)
            found |= dict(zip(name, char.encode(), strict=True))
    return found


LETTERS = byte_letters()


# --- record ----------------------------------------------------------------------------------


@pytest.mark.parametrize("around", ["bos", "both", "eos"])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_answers_that_end_inside_a_character_count(kind: str, around: str, tmp_path: Path) -> None:
    tokenizer = byte_level([], around) if kind == "bytes" else sentence_piece([], around)
    with one_thread():
        model = learned(tokenizer, CHINESE, "")
        known = [
            p.object.encode().startswith(greedy_bytes(model, tokenizer, p.prompt)) for p in CHINESE
        ]
        assert sum(known) >= 10  # by heart
        accuracy = record(
            "m", model, tokenizer, written(tmp_path, CHINESE), tmp_path / "out", quiet=True
        )
    rows = read_rows(tmp_path / "out" / "validated.csv")
    assert accuracy == sum(known) / len(known)
    assert [row["correct"] == "1" for row in rows] == known
    for row, prompt in zip(rows, CHINESE, strict=True):
        assert "\ufffd" not in row["prediction"]
        if row["correct"] == "1":
            assert row["prediction"] and prompt.object.startswith(row["prediction"])
    said = Manifest(tmp_path / "out").data["tokens"]
    assert said["first_prompt_ids"].count(2) == 0
    assert ("is taken off" in said["special"]) == (around != "bos")


def test_eos_at_the_end_changes_nothing(tmp_path: Path) -> None:
    """Every stage that encodes a prompt, with a tokenizer that appends EOS and without."""
    files: dict[str, dict[str, bytes]] = {}
    with one_thread():
        model = learned(byte_level([" 37"]), ENGLISH, " ")
        rows = [(0, "gate", i, 1.0) for i in range(6)]
        for around in ("bos", "both"):
            tokenizer, out = byte_level([" 37"], around), tmp_path / around
            path = written(out, ENGLISH)
            record("m", model, tokenizer, path, out, quiet=True)
            neurons = out / "neurons.json"
            NeuronFile({"id": "m", **SHAPE}, "ap", {"r0": rows, "r1": rows[:2]}, {}).write(neurons)
            ablate_prompts(
                "m",
                model,
                tokenizer,
                neurons,
                path,
                out / "effects.csv",
                splits=("eva",),
                random_seeds=1,
                quiet=True,
            )
            with pytest.warns(UserWarning, match="makes a token of the space"):
                attribute("m", model, tokenizer, path, out / "a", QUICK, quiet=True)
            (out / "q.txt").write_text("Ada was born in\n<s>Bob was born in\n")
            generate(
                *("m", model, tokenizer, neurons, out / "q.txt", out / "said.jsonl"),
                GenerateOptions(max_new_tokens=6),
                quiet=True,
            )
            names = ["validated.csv", "responses.safetensors", "effects.csv", "said.jsonl"]
            names += ["a/targets.csv", "a/gains.safetensors"]
            files[around] = {name: (out / name).read_bytes() for name in names}
    assert files["bos"] == files["both"]
    said = [json.loads(line)["output"] for line in files["bos"]["said.jsonl"].splitlines()]
    assert [text.strip() for text in said] == ["37", "41"]


def test_a_first_token_that_is_no_bos_is_not_left_out(tmp_path: Path) -> None:
    tokenizer = byte_level([], "none")
    path = written(tmp_path, ENGLISH)
    with pytest.raises(RelneuronError, match="--exclude-bos") as error:
        record(
            "m",
            tiny_llama(tokenizer),
            tokenizer,
            path,
            tmp_path / "out",
            RecordOptions(exclude_bos=True),
        )
    assert error.value.exit_code == 2 and not (tmp_path / "out").exists()


def test_a_space_at_the_end_of_prompts_is_said(tmp_path: Path) -> None:
    tokenizer = byte_level([f" {year}" for year in YEARS.values()])
    blank = asked(YEARS, "{} was born in", "en", " ")
    with one_thread():
        model = learned(tokenizer, ENGLISH, " ")
        whole = record(
            "m", model, tokenizer, written(tmp_path, ENGLISH), tmp_path / "a", quiet=True
        )
        with pytest.warns(UserWarning, match=r"det.0, det.1, det.2 and 9 more: asked without"):
            path = written(tmp_path / "blank", blank)
            same = record("m", model, tokenizer, path, tmp_path / "b", quiet=True)
    assert whole == same == 1
    one, other = tmp_path / "a", tmp_path / "b"
    assert (one / "validated.csv").read_bytes() == (other / "validated.csv").read_bytes()
    responses = [load_file(folder / "responses.safetensors") for folder in (one, other)]
    for name, values in responses[0].items():
        assert torch.equal(values, responses[1][name])
    assert "asked without the space" in Manifest(tmp_path / "b").data["fallbacks"][-1]


# --- log-probabilities -----------------------------------------------------------------------


def joint(model: Any, tokenizer: Any, prompt: str, text: str, first: str) -> float:
    """log p of `text` after a prompt up to and with the token `first`, one token at a time."""
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    whole = [
        tokenizer.bos_token_id, *tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
    ]  # fmt: skip
    total = 0.0
    with torch.no_grad():
        for token in whole[len(ids) :]:
            total += float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
            ids.append(token)
            if tokenizer.convert_ids_to_tokens(token) == first:
                return total
    raise AssertionError(first)


@pytest.mark.parametrize(
    ("tokenizer", "prompts", "space"),
    [
        (characters([p.prompt + " " + p.object for p in ENGLISH]), ENGLISH, " "),
        (characters([p.prompt + p.object for p in CHINESE]), CHINESE, ""),
        (byte_level([], digits=True), ENGLISH, " "),
        (sentence_piece(), ENGLISH, " "),
        (sentence_piece(), CHINESE, ""),
        (byte_level([" 37", " 41"]), ENGLISH, " "),
    ],
)
def test_logprob_is_of_the_answers_own_first_token(
    tokenizer: Any, prompts: list[Prompt], space: str
) -> None:
    """Greedy or teacher-forced, in a batch with answers that need no space of their own."""
    model = tiny_llama(tokenizer)
    questions = encode(tokenizer, model, prompts)
    asker = Asker(model, tokenizer)
    with one_thread():
        greedy = asker.ask(questions, range(len(prompts)))
        forced = asker.ask_forced(questions, range(len(prompts)))
        for row, prompt in enumerate(prompts):
            first = tokenizer.convert_ids_to_tokens(questions.answers[row])
            assert tokenizer.decode([questions.answers[row]]).strip()
            wanted = joint(model, tokenizer, prompt.prompt, space + prompt.object, first)
            assert abs(greedy.logprobs[row] - wanted) < 1e-4
            assert abs(forced.logprobs[row] - wanted) < 1e-4
    assert greedy.predictions == forced.predictions
    assert asker.forces_exactly(questions)


# --- attribute -------------------------------------------------------------------------------


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
    with pytest.raises(RelneuronError, match="unknown target 'guess'"):
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


# --- the command line ------------------------------------------------------------------------


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
