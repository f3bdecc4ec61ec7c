"""bench.rankings on a few facts of the demo: its sets and numbers again, from the model and hooks.

What the stages wrote in the folder of the study is the subject; no code of theirs makes the numbers
that it is held to.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import rankings
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.reading import read_csv
from relneuron.demo import CHECKPOINT, FACTS
from tests.conftest import ROOT

TOP, N_EVA, SEEDS = 205, 6, 2
RELATIONS = ["landmark_continent", "landmark_country", "person_occupation"]
Json = dict[str, Any]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[rankings.Line]]:
    """The folder of a study of 16 facts of three relations, and its lines."""
    facts, folder = (tmp_path_factory.mktemp(name) for name in ("facts", "study"))
    for name in RELATIONS:
        relation = json.loads((FACTS / f"{name}.json").read_text(encoding="utf-8"))
        relation["samples"] = relation["samples"][:16]
        (facts / f"{name}.json").write_text(json.dumps(relation), encoding="utf-8")
    return folder, rankings.compare(facts, folder, top=TOP, seeds=SEEDS, n_eva=N_EVA)


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(CHECKPOINT)


def asked(folder: Path, relation: str, split: str) -> list[Json]:
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [
        p for p in found if (p["relation"], p["split"], p["language"]) == (relation, split, "en")
    ]


def sets_of(folder: Path, ranking: str) -> dict[str, list[int]]:
    """The indices of each set; the demo model has one layer."""
    name = ranking.replace(" ", "_")
    found = json.loads((folder / "off" / name / "neurons.json").read_text(encoding="utf-8"))
    assert {row[:2] == [0, "gate"] for rows in found["sets"].values() for row in rows} == {True}
    return {relation: [row[2] for row in rows] for relation, rows in found["sets"].items()}


def value(lines: list[rankings.Line], *which: str) -> float:
    (line,) = [x for x in lines if (x.number, x.ranking, x.beside, x.relation) == which]
    return line.value


def test_all_sets_have_as_many_neurons(study: tuple[Path, list[rankings.Line]]) -> None:
    for ranking in (*rankings.RANKINGS, "random choice 0", "random choice 1"):
        sets = sets_of(study[0], ranking)
        assert list(sets) == RELATIONS
        assert {len(set(chosen)) for chosen in sets.values()} == {TOP}, ranking


def test_neurons_by_activation_and_by_gradient_are_those_of_the_definitions(
    study: tuple[Path, list[rankings.Line]], demo: tuple[Any, Any]
) -> None:
    folder, (model, tokenizer), relation = study[0], demo, "landmark_country"
    mlp = model.model.layers[0].mlp
    seen: list[torch.Tensor] = []
    hook = mlp.act_fn.register_forward_hook(lambda *call: seen.append(call[2][0]))
    prompts = asked(folder, relation, "det")
    with torch.no_grad():
        for prompt in prompts:
            model(**tokenizer(prompt["prompt"], return_tensors="pt"))
    hook.remove()
    scores = torch.cat(seen).double().mean(0)
    assert sets_of(folder, rankings.ACTIVATION)[relation] == scores.topk(TOP).indices.tolist()

    # Twenty points of the path on one prompt after the other: P of the answer's first token.
    total = torch.zeros(model.config.intermediate_size, dtype=torch.float64)
    for prompt in prompts:
        ids = tokenizer(prompt["prompt"], return_tensors="pt")["input_ids"]
        both = tokenizer(f"{prompt['prompt']} {prompt['object']}")["input_ids"]
        target = both[ids.shape[1]]
        state: dict[str, torch.Tensor] = {}

        def scale(_: Any, inputs: Any, state: dict[str, torch.Tensor] = state) -> Any:
            state["own"] = inputs[0][0, -1].detach()
            steps = torch.linspace(0, 1, 20)[:, None] * state["own"]
            state["steps"] = steps.requires_grad_()
            rest = inputs[0].detach().expand(20, -1, -1)[:, :-1]
            return (torch.cat([rest, state["steps"][:, None]], 1),)

        hook = mlp.down_proj.register_forward_pre_hook(scale)
        logits = model(ids.expand(20, -1)).logits[:, -1]
        hook.remove()
        (slopes,) = torch.autograd.grad(logits.softmax(-1)[:, target].sum(), state["steps"])
        total += (state["own"] * slopes.sum(0) / 20).double()
    chosen = sets_of(folder, rankings.GRADIENT)[relation]
    assert chosen == total.topk(TOP).indices.tolist()
    found = load_file(folder / "gradients" / "ig.safetensors")["ig"]
    assert len(found) == sum(len(asked(folder, name, "det")) for name in RELATIONS)


def test_overlaps_by_hand(study: tuple[Path, list[rankings.Line]]) -> None:
    folder, lines = study
    one, other = (sets_of(folder, name) for name in (rankings.AP, rankings.RELEVANCE))
    shares = []
    for relation in RELATIONS:
        shared = len(set(one[relation]) & set(other[relation]))
        shares.append(shared / (2 * TOP - shared))
        found = value(lines, rankings.SHARED, rankings.AP, rankings.RELEVANCE, relation)
        assert found == round(shares[-1], 6)
    which = (rankings.SHARED, rankings.AP, rankings.RELEVANCE, "")
    assert value(lines, *which) == round(mean(shares), 6)


def test_chance_is_the_mean_over_all_pairs_of_sets() -> None:
    pairs = [
        len({*a} & {*b}) / len({*a} | {*b})
        for a in combinations(range(6), 3)
        for b in combinations(range(6), 3)
    ]
    assert abs(rankings.chance_overlap(6, 3) - mean(pairs)) < 1e-12


@pytest.mark.parametrize("ranking", rankings.RANKINGS)
def test_accuracies_by_hooks(
    study: tuple[Path, list[rankings.Line]], demo: tuple[Any, Any], ranking: str
) -> None:
    folder, lines, (model, tokenizer), relation = *study, demo, "landmark_continent"
    off = torch.tensor(sets_of(folder, ranking)[relation])
    down = model.model.layers[0].mlp.down_proj

    def share(name: str) -> float:
        right = []
        for prompt in asked(folder, name, "eva"):
            ids = tokenizer(prompt["prompt"], return_tensors="pt")
            made = model.generate(**ids, max_new_tokens=2, do_sample=False)
            said = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            right.append(bool(said.strip()) and prompt["object"].startswith(said.strip()))
        return mean(right)

    clean = share(relation)
    hook = down.register_forward_pre_hook(lambda _, x: (x[0].index_fill(-1, off, 0.0),))
    own, others = share(relation), mean(share(name) for name in RELATIONS if name != relation)
    hook.remove()
    assert own < clean  # else the hooks prove nothing
    assert value(lines, rankings.OWN, rankings.NONE, "", relation) == round(clean, 6)
    assert value(lines, rankings.OWN, ranking, "", relation) == round(own, 6)
    assert value(lines, rankings.OTHERS, ranking, "", relation) == round(others, 6)


def test_random_sets_are_means_over_their_seeds(study: tuple[Path, list[rankings.Line]]) -> None:
    folder, lines = study
    off, shares = "person_occupation", []
    for seed in range(SEEDS):
        path = folder / "off" / f"random_choice_{seed}" / "accuracy.csv"
        rows = read_csv(path, ("condition", "relation", "split", "accuracy"))
        mine = [row for row in rows if (row["condition"], row["split"]) == (off, "eva")]
        shares += [float(row["accuracy"]) for row in mine if row["relation"] != off]
    assert len(shares) == 2 * SEEDS and len(set(shares)) > 1
    assert value(lines, rankings.OTHERS, rankings.RANDOM, "", off) == round(mean(shares), 6)


def test_neurons_count_once_and_down_does_not() -> None:
    rows = [(0, "down", 1, 0.9), (0, "up", 3, 0.8), (0, "gate", 3, 0.7), (0, "gate", 2, 0.6)]
    assert rankings.neurons(NeuronFile({}, "ap", {"r": rows}, {}), 2) == {"r": [(0, 3), (0, 2)]}
    with pytest.raises(AssertionError, match="r has 2 of 3 neurons"):
        rankings.neurons(NeuronFile({}, "ap", {"r": rows}, {}), 3)


def test_the_figure_and_the_intervals(study: tuple[Path, list[rankings.Line]]) -> None:
    lines = study[1]
    assert rankings.draw_figure(lines).startswith(b"\x89PNG")
    ends = [(x.low, x.value, x.high) for x in lines if x.low != ""]
    # Five rankings, ten pairs of them, chance; each in its numbers.
    assert len(ends) == 10 + 5 + 1 + 2 * 5 + 2
    assert all(low - 1e-6 <= value <= high + 1e-6 for low, value, high in ends)


def test_the_page_has_the_numbers_of_the_committed_table() -> None:
    docs = ROOT / "docs"
    lines = []
    for row in read_csv(docs / "rankings.csv", rankings.Line._fields):
        *which, value, low, high = (row[name] for name in rankings.Line._fields)
        ends = [float(end) if end else "" for end in (low, high)]
        lines.append(rankings.Line(*which, float(value), *ends))
    page = (docs / "rankings.md").read_text(encoding="utf-8")
    for line in rankings.tables(lines):
        assert line in page
