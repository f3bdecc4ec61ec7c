"""Sampled, scored and looked-into outputs of `generate`, by plain loops and counts by hand."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import relneuron.ablation.generate
from relneuron.ablation.conditions import module_sets
from relneuron.ablation.continuer import sample
from relneuron.ablation.generate import generate
from relneuron.ablation.options import GenerateOptions
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import read_prompts, read_questions
from relneuron.model.load import load_model, load_tokenizer
from relneuron.model.mlps.find import find_mlps
from tests.ablation.test_generate import LAYERS, SHAPE, WIDTH, hooked

LINES = [
    {"id": "p", "prompt": "Person1 lives in", "group": "en", "answers": ["Paris", "Lyon"]},
    {"id": "q", "prompt": "x", "group": "zh", "answers": "y"},
    {"prompt": "Person3 works as a", "group": "en", "answers": ["cook"]},
]


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> Iterator[tuple[Any, Any]]:
    model = load_model(str(model_folder))
    generator = torch.Generator().manual_seed(2)
    for mlp in find_mlps(model):
        weight = mlp.module.down_proj.weight.data
        weight += 0.3 * torch.randn(weight.shape, generator=generator)
    yield model, load_tokenizer(str(model_folder))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    sets = {}
    for name in ("en", "zh"):
        chosen = sorted(rng.choice(LAYERS * WIDTH, 25, replace=False).tolist())
        sets[name] = [(c // WIDTH, "gate", c % WIDTH, 0.5) for c in chosen]
    NeuronFile({"id": "m", **SHAPE}, "lape", sets, {}).write(tmp_path / "neurons.json")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def ours(loaded: Any, study: Path, **asked: Any) -> list[Any]:
    options = GenerateOptions(**{"max_new_tokens": 6, "stop": ()} | asked)
    files = (study / "neurons.json", study / "p.jsonl", study / "o.jsonl")
    return generate("m", *loaded, *files, options, quiet=True, force=True)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- sampling --------------------------------------------------------------------------------


def test_what_is_drawn_is_distributed_as_the_model_says() -> None:
    logits = torch.tensor([[1.0, -2.0, float("-inf"), 0.5, 2.0]])
    n = 20_000
    drawn = [random.Random(i).random() for i in range(n)]
    found = sample(logits.expand(n, -1), drawn, 0.9)
    wanted = (logits[0].double() / 0.9).softmax(-1)
    share = torch.bincount(found, minlength=5).double() / n
    # Three standard errors and a half of a share.
    assert ((share - wanted).abs() <= 3.5 * (wanted * (1 - wanted) / n).sqrt()).all()
    assert share[2] == 0
    # Of the two most probable ones only.
    among = sample(logits.expand(n, -1), drawn, 0.9, 2)
    assert set(among.tolist()) == {0, 4}
    two = (logits[0, [0, 4]].double() / 0.9).softmax(-1)
    assert abs(float((among == 4).double().mean()) - float(two[1])) < 0.015


def test_both_ends_of_a_draw() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(3, -1)
    nearly = float(np.nextafter(1.0, 0.0))
    assert sample(logits, [0.0, 0.5, nearly], 1.0).tolist() == [1, 2, 2]
    assert sample(logits, [0.0, 0.5, nearly], 1.0, 1).tolist() == [1, 2, 2]  # equal ones stay


def test_sampled_texts_are_those_of_a_plain_loop(loaded: Any, study: Path) -> None:
    """One prompt at a time, without a cache or padding, under hooks, from the same numbers."""
    model, tokenizer = loaded
    neurons = NeuronFile.read(study / "neurons.json").sets
    asked = {"temperature": 0.9, "seeds": 3, "off": ("clean", "zh"), "repetition_penalty": 1.2}
    made = ours(loaded, study, **asked)
    assert [(g.mask, g.id, g.seed) for g in made] == [
        (mask, name, seed) for mask in ("clean", "zh") for name in "pq3" for seed in range(3)
    ]
    texts = {line.get("id", "3"): line["prompt"] for line in LINES}
    for g in made:
        draw = random.Random(f"relneuron.sample.{g.seed}.{g.id}")
        prompt = tokenizer(texts[g.id])["input_ids"]
        tokens: list[int] = []
        off = [n[:3] for n in neurons[g.mask]] if g.mask != "clean" else []
        with hooked(model, off), torch.no_grad():
            for _ in range(6):
                logits = model(torch.tensor([prompt + tokens])).logits[0, -1]
                for token in {*prompt, *tokens}:
                    logits[token] = (
                        logits[token] * 1.2 if logits[token] < 0 else logits[token] / 1.2
                    )
                p = (logits.double() / 0.9).softmax(-1).numpy()
                token = int(np.flatnonzero(p.cumsum() > draw.random() * p.sum())[0])
                if token == tokenizer.eos_token_id:
                    break
                tokens.append(token)
        # Part of a character's bytes is no text.
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert g.output == text.rstrip("\ufffd")
        assert g.n_tokens == len(tokens)
    assert len({g.output for g in made if g.id == "p"}) > 3
    # Batches and what stands beside do not matter.
    small = ours(loaded, study, **asked | {"batch_tokens": 1, "off": ("zh",)})
    assert small == made[9:]
    lines = [json.loads(line) for line in (study / "o.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines[:3]] == [0, 1, 2]


def test_seeds_without_a_temperature_are_one(loaded: Any, study: Path) -> None:
    assert [g[:7] for g in ours(loaded, study, seeds=4)] == [g[:7] for g in ours(loaded, study)]


# --- scores ----------------------------------------------------------------------------------


def test_scores_and_their_means(loaded: Any, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (study / "length_measure.py").write_text(
        "def of(prediction, answers):\n    return len(prediction) + len(answers[0]) / 100\n"
    )
    monkeypatch.chdir(study)
    asked = {"temperature": 0.9, "seeds": 2, "off": ("clean", "en")}
    made = ours(loaded, study, measure="length_measure:of", **asked)
    answers = {"p": ["Paris", "Lyon"], "q": ["y"], "3": ["cook"]}
    assert [g.score for g in made] == [len(g.output) + len(answers[g.id][0]) / 100 for g in made]
    rows = rows_of(study / "o.scores.csv")
    assert [(r["mask"], r["group"]) for r in rows] == [
        (mask, group) for mask in ("clean", "en") for group in ("en", "zh")
    ]
    for row in rows:
        own = [g for g in made if (g.mask, g.group) == (row["mask"], row["group"])]
        assert float(row["score"]) == pytest.approx(np.mean([g.score for g in own]))
        seeds = [np.mean([g.score for g in own if g.seed == seed]) for seed in range(2)]
        assert float(row["sd_seeds"]) == pytest.approx(np.std(seeds, ddof=1))
        assert float(row["low"]) <= float(row["score"]) <= float(row["high"])
        assert (row["n_prompts"], row["n_seeds"]) == ("2" if row["group"] == "en" else "1", "2")
    # The same texts with another measure; then with none, whose table is gone.
    exact = ours(loaded, study, measure="exact", **asked)
    assert [g[:7] for g in exact] == [g[:7] for g in made]
    assert {g.score for g in exact} <= {0.0, 1.0}
    ours(loaded, study)
    assert not (study / "o.scores.csv").exists()


def test_greedy_answers_are_right_or_wrong(loaded: Any, study: Path) -> None:
    said = ours(loaded, study)[0].output
    LINES_RIGHT = [{**LINES[0], "answers": ["nothing", f" {said.upper()} "]}, *LINES[1:]]
    (study / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES_RIGHT))
    made = ours(loaded, study, measure="exact")
    assert [g.score for g in made] == [1.0, 0.0, 0.0]
    (row, _) = rows_of(study / "o.scores.csv")
    assert (row["score"], row["sd_seeds"], row["n_seeds"]) == ("0.5", "", "1")


def test_what_cannot_be_scored_is_refused(loaded: Any, study: Path) -> None:
    (study / "p.jsonl").write_text('{"prompt": "a", "answers": "b"}\n{"prompt": "c"}\n')
    with pytest.raises(RelneuronError, match="2 has none"):
        ours(loaded, study, measure="exact")
    with pytest.raises(RelneuronError, match="unknown --measure"):
        ours(loaded, study, measure="bleu")
    for wrong in ('"answers": [3]', '"answers": []', '"group": 1', '"image": {"a": 1}'):
        (study / "p.jsonl").write_text(f'{{"prompt": "a", {wrong}}}\n')
        with pytest.raises(RelneuronError, match="line 1: not a prompt"):
            ours(loaded, study)
    assert not (study / "o.jsonl").exists()


def test_scores_of_a_run_that_failed_are_made_of_its_texts(
    loaded: Any, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (study / "fails_measure.py").write_text("def of(p, a):\n    raise KeyError('oh')\n")
    monkeypatch.chdir(study)
    with pytest.raises(RelneuronError, match="KeyError"):
        ours(loaded, study, measure="fails_measure:of")
    monkeypatch.setattr("relneuron.ablation.continuer.Continuer.go_on", lambda *_: 1 / 0)
    assert [g.score for g in ours(loaded, study, measure="anls")] == [0, 0, 0]


@pytest.mark.parametrize("number", range(4))
def test_a_run_that_is_killed_between_its_files_goes_on(
    loaded: Any, study: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    asked = {"off": ("clean", "en"), "measure": "anls", "lens": 1}
    ours(loaded, study, **asked)
    names = ("o.jsonl", "o.scores.csv", "o.lens.csv", "o.stages.csv")
    whole = {name: (study / name).read_bytes() for name in names}
    for name in names:
        (study / name).unlink()
    true, left = relneuron.ablation.generate.atomic_write, number

    def dies(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        true(*args)

    monkeypatch.setattr(relneuron.ablation.generate, "atomic_write", dies)
    with pytest.raises(KeyboardInterrupt):
        ours(loaded, study, **asked)
    assert sum((study / name).exists() for name in names) == number
    monkeypatch.undo()
    options = GenerateOptions(max_new_tokens=6, stop=(), **asked)
    files = (study / "neurons.json", study / "p.jsonl", study / "o.jsonl")
    generate("m", *loaded, *files, options, quiet=True)  # without --force
    assert {name: (study / name).read_bytes() for name in names} == whole
    with pytest.raises(RelneuronError, match="exists"):
        generate("m", *loaded, *files, options, quiet=True)


# --- the lens --------------------------------------------------------------------------------


def test_the_lens_of_the_first_tokens(loaded: Any, study: Path) -> None:
    """Against hidden states of whole forwards, one prompt at a time, under hooks."""
    model, tokenizer = loaded
    neurons = NeuronFile.read(study / "neurons.json").sets
    made = ours(loaded, study, off=("clean", "en"), lens=2, repetition_penalty=1.0)
    rows = rows_of(study / "o.lens.csv")
    curves: dict[str, list[list[float]]] = {}
    for g in made:
        prompt = tokenizer(g.prompt)["input_ids"]
        said = tokenizer(g.output, add_special_tokens=False)["input_ids"]
        off = [n[:3] for n in neurons[g.mask]] if g.mask != "clean" else []
        for number in range(2):
            seen: list[torch.Tensor] = []
            hooks = [
                block.register_forward_hook(
                    lambda _m, _i, y, seen=seen: seen.append(y[0] if isinstance(y, tuple) else y)
                )
                for block in model.model.layers
            ]
            with hooked(model, off), torch.no_grad():
                model(torch.tensor([prompt + said[:number]]))
            for hook in hooks:
                hook.remove()
            own = [
                r for r in rows if (r["mask"], r["id"], r["token"]) == (g.mask, g.id, str(number))
            ]
            assert [r["layer"] for r in own] == ["0", "1"]
            for row, h in zip(own, seen, strict=True):
                with torch.no_grad():
                    logits = model.lm_head(model.model.norm(h))[0, -1]
                entropy = float(torch.distributions.Categorical(logits=logits).entropy())
                assert float(row["entropy"]) == pytest.approx(entropy, rel=1e-4)
                top = [tokenizer.decode([t]) for t in logits.topk(10).indices.tolist()]
                assert json.loads(row["top"].removeprefix("'")) == top
            curves.setdefault(g.mask, []).append([float(r["entropy"]) for r in own])
    means = rows_of(study / "o.stages.csv")
    assert [(r["mask"], r["layer"], r["n_tokens"], r["stage"]) for r in means] == [
        (mask, str(layer), "6", "") for mask in ("clean", "en") for layer in range(2)
    ]
    for row in means:
        column = [curve[int(row["layer"])] for curve in curves[row["mask"]]]
        assert float(row["entropy"]) == pytest.approx(np.mean(column))


# --- modules ---------------------------------------------------------------------------------


def test_sets_of_modules() -> None:
    assert module_sets(["language", "vision", "projector"]) == {
        "none": (),
        "language": ("language",),
        "vision+projector": ("vision", "projector"),
        "projector": ("projector",),
        "all": ("language", "vision", "projector"),
    }
    both = ("qformer_query", "qformer_text")
    assert module_sets(["language", "vision", *both]) == {
        "none": (),
        "language": ("language",),
        "vision": ("vision",),
        "qformer": both,
        "vision+qformer": ("vision", *both),
        "all": ("language", "vision", *both),
    }
    assert list(module_sets(["language", "vision"])) == ["none", "language", "vision", "all"]
    with pytest.raises(RelneuronError, match="of the language module alone"):
        module_sets(["language"])


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(RelneuronError, match="--module-sets says itself what is off"):
        GenerateOptions(module_sets=True, off=("en",))
    with pytest.raises(RelneuronError, match="--module-sets says itself what is off"):
        GenerateOptions(module_sets=True, set_to="en")
    with pytest.raises(RelneuronError, match="--seeds must be at least 1"):
        GenerateOptions(temperature=1.0, seeds=0)


# --- lines about pictures ----------------------------------------------------------------------


def test_lines_about_pictures(tmp_path: Path) -> None:
    lines = [
        {"image": "a.png", "text": "What?", "group": "doc", "answers": ["one", "two"]},
        {"image": ["b.png", "/c.png"], "text": "What?", "group": "doc", "object": "three"},
        {"image": "a.png", "text": "What?", "group": "doc", "answers": "four"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    for found in (read_questions(path), read_prompts(path)):
        assert [(p.id, p.relation, p.prompt, p.images) for p in found] == [
            ("1", "doc", "What?", (a,)),
            ("2", "doc", "What?", (b, "/c.png")),
            ("3", "doc", "What?", (a,)),
        ]
        assert found[1].objects == ("three",)
    assert [p.objects for p in read_questions(path)] == [("one", "two"), ("three",), ("four",)]
    # A fact that is asked twice has all the answers of both lines, that of another picture has not.
    assert read_prompts(path)[0].objects == ("one", "two", "four")
    assert {p.split for p in read_prompts(path)} == {"eva"}
    path.write_text('{"text": "What?", "group": "doc", "answers": "x"}\n')
    with pytest.raises(RelneuronError, match="line 1: not a prompt"):
        read_prompts(path)
