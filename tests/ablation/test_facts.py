"""Sets of facts, products that are scaled, and options: against plain hooks and plain argmax."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from relneuron.ablation.conditions import Ablation
from relneuron.ablation.evaluate import How, wave_states
from relneuron.artifact.effects import Condition, read_conditions, read_effects
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import Shape, random_neurons
from relneuron.artifact.prompts import Prompt, fact_name
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.patch import Patch
from relneuron.model.states import Tokens
from relneuron.texts.options import PromptsOptions
from relneuron.texts.prompts import write_prompts
from tests.conftest import tiny_model
from tests.kit.attributed import attributed_model
from tests.kit.hooked import INSIDE, SHAPE, Hooked, Study


@pytest.fixture(scope="module")
def study(
    model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Study]:
    yield Study(model_folder, fact_folder, tmp_path_factory.mktemp("facts"))


# --- products --------------------------------------------------------------------------------


def hooked_logits(model: Any, downs: list[Any], off: Any, factor: float, last: bool) -> Tensor:
    """Logits with what each down map reads scaled by a plain pre-hook, everywhere or at the end."""

    def hook(layer: int) -> Any:
        def scale(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].clone()
            rows = slice(-1, None) if last else slice(None)
            x[:, rows, off[layer]] *= factor
            return (x,)

        return scale

    handles = [down.register_forward_pre_hook(hook(layer)) for layer, down in enumerate(downs)]
    try:
        with torch.no_grad():
            return torch.as_tensor(model(IDS).logits)
    finally:
        for handle in handles:
            handle.remove()


IDS = torch.tensor([[5, 17, 3, 60, 22, 41], [9, 9, 4, 31, 8, 2]])


@pytest.mark.parametrize("factor", [0.0, 2.0, -0.5])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "gpt2"])
def test_scaled_products_are_those_of_plain_hooks(family: str, last: bool, factor: float) -> None:
    model = attributed_model("gpt2") if family == "gpt2" else tiny_model(family)
    if family == "gpt2":
        downs = [block.mlp.c_proj for block in model.transformer.h]
    else:
        downs = [block.mlp.down_proj for block in model.model.layers]
    mlps = find_mlps(model)
    shape = model_shape(mlps)
    order, rng = Shape.of(shape), np.random.default_rng(0)
    off = [rng.choice(shape["width"], 9, replace=False) for _ in downs]
    # Half of them by their gates, half by their ups: the product is the same one.
    sites = ("gate", "up") if shape.get("gated", True) else ("gate", "gate")
    neurons = [
        (layer, sites[k % 2], int(i)) for layer, some in enumerate(off) for k, i in enumerate(some)
    ]
    plan = [Ablation(Condition("r", "set"), np.sort(order.places(neurons)), [])]
    states = wave_states(plan, range(1), mlps, How("scale", factor, at_product=True))
    conditions = torch.ones(IDS.shape, dtype=torch.int32)
    if last:
        conditions[:, :-1] = 0
    with Patch(mlps, states) as patch, torch.no_grad():
        patch.tokens = Tokens(conditions=conditions)
        ours = model(IDS).logits
    wanted = hooked_logits(model, downs, off, factor, last)
    clean = hooked_logits(model, downs, off, 1.0, last)
    assert (ours - wanted).abs().max() <= 1e-5 < (wanted - clean).abs().max()


def test_a_gate_that_is_scaled_is_no_product_that_is(study: Study, tmp_path: Path) -> None:
    path = study.write_sets(tmp_path / "n.json", {"lives_in": [(0, "gate", i) for i in range(9)]})
    asked: dict[str, Any] = {"neurons": path, "random_seeds": 0, "mode": "scale", "factor": 2.0}
    outputs = study.ablate(tmp_path / "a", **asked)
    products = study.ablate(tmp_path / "b", **asked, scale_at="product")
    key = next(key for key in outputs if key[0] == "lives_in")
    assert outputs[key]["logprob"] != products[key]["logprob"]
    # Neurons that were found by the gradient of the product are scaled there.
    data = json.loads(path.read_text())
    for site, wanted in (("product", products), ("gate", outputs)):
        data["selection"] = {"how": {"site": site}}
        path.write_text(json.dumps(data))
        assert study.ablate(tmp_path / site, **asked) == wanted


# --- sets of facts -----------------------------------------------------------------------------


def test_a_set_of_a_fact_is_asked_its_prompts_and_some_others(study: Study, tmp_path: Path) -> None:
    prompts = [p for p in study.prompts.values() if p.split == "eva"]
    first = next(p for p in prompts if p.relation == "lives_in")
    sets = {fact_name(first): [(0, "up", 3), (1, "up", 5)], "likes_fruit": [(1, "up", 7)]}
    path = study.write_sets(tmp_path / "n.json", sets)
    asked: dict[str, Any] = {"analyses": ("matched",), "random_seeds": 2, "unrelated": 3}
    rows = study.ablate(tmp_path, neurons=path, mode="scale", factor=0.0, positions="last", **asked)
    by_condition: dict[str, list[str]] = {}
    for condition, key in rows:
        by_condition.setdefault(condition, []).append(key)
    fact = by_condition[fact_name(first)]
    own = [p.id for p in prompts if fact_name(p) == fact_name(first)]
    others = [study.prompts[key] for key in fact if key not in own]
    assert {*own} <= {*fact} and len(fact) == len(own) + 3
    assert all(p.relation != "lives_in" for p in others)
    assert len(by_condition["likes_fruit"]) == 3 + sum(p.relation == "likes_fruit" for p in prompts)
    assert by_condition[f"{fact_name(first)}~1"] == [
        key for key in fact if study.prompts[key].language == "en"
    ]
    assert len(by_condition["clean"]) == len(by_condition["random.0"]) == len(prompts)
    hooked = Hooked(study)
    with hooked.changing(sets[fact_name(first)], inside=INSIDE["last"]):
        for key in fact:
            text, logprob = hooked.answer(study.prompts[key], cached=True)
            row = rows[fact_name(first), key]
            assert row["prediction"] == text and abs(float(row["logprob"]) - logprob) <= 1e-5
    conditions = read_conditions(tmp_path / "conditions.csv")
    assert conditions[fact_name(first)].relation == fact_name(first)
    everything = study.ablate(tmp_path / "all", neurons=path, random_seeds=0)
    assert sum(c == fact_name(first) for c, _ in everything) == len(prompts)


def test_a_set_may_be_named_after_a_subject(study: Study, tmp_path: Path) -> None:
    """As files of others name facts by their uuid alone."""
    path = study.write_sets(tmp_path / "n.json", {"Person3": [(0, "up", 3)]})
    rows = study.ablate(tmp_path, neurons=path, random_seeds=0, unrelated=0, splits=("det", "eva"))
    asked = {study.prompts[key].subject for name, key in rows if name == "Person3"}
    assert asked == {"Person3"}
    strange = study.write_sets(tmp_path / "s.json", {"Nobody": [(0, "up", 3)]})
    with pytest.raises(RelneuronError, match="a set for Nobody, which no prompt is about"):
        study.ablate(tmp_path / "s", neurons=strange)


# --- options -----------------------------------------------------------------------------------


def letter_logprob(study: Study, hooked: Hooked, prompt: Prompt, letter: str) -> float:
    """log p of a letter after a prompt, with the space that this tokenizer makes a token."""
    ids = study.tokenizer(prompt.prompt)["input_ids"]
    whole = study.tokenizer(f"{prompt.prompt} {letter}")["input_ids"]
    hooked._columns, hooked._n_prompt = range(len(whole)), len(ids)
    logits = study.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return float(sum(logits[i - 1, whole[i]] for i in range(len(ids), len(whole))))


def test_the_choice_is_the_most_probable_option(
    study: Study, fact_folder: Path, tmp_path: Path
) -> None:
    facts, prompts = fact_folder / "lives_in.json", tmp_path / "prompts.jsonl"
    made = write_prompts(facts, prompts, PromptsOptions(eva=8, choices=1))
    short = [p for p in made if p.split == "eva"]
    assert all(p.options == tuple("ABCD") for p in short)
    off = random_neurons(SHAPE, 128, 3)
    path = study.write_sets(tmp_path / "n.json", {"lives_in": off})
    asked: dict[str, Any] = {"random_seeds": 0, "mode": "scale", "factor": -2.0}
    rows = study.ablate(tmp_path, neurons=path, prompts=prompts, **asked)
    hooked = Hooked(study)
    chosen: set[str] = set()
    for condition, neurons in (("clean", []), ("lives_in", off)):
        with hooked.changing(neurons, lambda out, *_: -2 * out), torch.no_grad():
            for prompt in short:
                scores = [letter_logprob(study, hooked, prompt, x) for x in prompt.options]
                best = prompt.options[int(np.argmax(scores))]
                row = rows[condition, prompt.id]
                assert row["choice"] == best
                own = scores[prompt.options.index(prompt.object)]
                assert abs(float(row["logprob"]) - own) <= 1e-5
                chosen.add(best)
    assert len(chosen) > 1
    grid = read_effects(tmp_path / "effects.csv", read_conditions(tmp_path / "conditions.csv"))
    assert grid["eva"].choice["clean"] == [rows["clean", p.id]["choice"] for p in short]


def test_options_that_begin_alike_are_refused(study: Study, tmp_path: Path) -> None:
    prompt = next(p for p in study.prompts.values() if p.split == "eva")
    asked = replace(prompt, options=("Oslo", "Oslo Oslo", "Rome"))
    prompts = study.write_prompts(tmp_path / "p.jsonl", [asked])
    path = study.write_sets(tmp_path / "n.json", {prompt.relation: [(0, "up", 3)]})
    with pytest.raises(RelneuronError, match="'Oslo' and 'Oslo Oslo' begin with the same token"):
        study.ablate(tmp_path, neurons=path, prompts=prompts)
    assert not (tmp_path / "effects.csv").exists()
