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
from tests.kit.files import read_rows
from tests.kit.speakers import byte_level, characters, sentence_piece, taught, tiny_llama

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
    model = learned(tokenizer, ENGLISH, " ")
    whole = record("m", model, tokenizer, written(tmp_path, ENGLISH), tmp_path / "a", quiet=True)
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
