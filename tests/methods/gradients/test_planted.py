"""Planted truth: each answer of a random model is written by two neurons, found and erased.

The neurons are written into the last layer by plain linear algebra; nothing of relneuron helps.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.ablation.ablate import ablate_prompts
from relneuron.analyses.changes import ALL, changes
from relneuron.artifact.effects import read_conditions, read_effects
from relneuron.artifact.gradients import FILES, IG, Gradients
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import Prompt, fact_name, prompts_bytes
from relneuron.artifact.reading import read_csv
from relneuron.methods.gradients.attribute import attribute
from relneuron.methods.gradients.choices import ConsistencyOptions, KnowledgeOptions, QueryOptions
from relneuron.methods.gradients.edit import EDIT, EDIT_COLUMNS, edit_model
from relneuron.methods.gradients.options import EditOptions, IgOptions
from relneuron.methods.gradients.rank import identify_gradients
from relneuron.model.load import load_model, load_tokenizer

FACTS = [("lives_in", "Ann", "Rome"), ("lives_in", "Bob", "Oslo"), ("likes_fruit", "Cid", "plum")]
WORDINGS = ("{} has", "They say that {} has", "Of {} we know")
LAST, WIDTH = 1, 48
OWN = {fact: (5 * k + 3, 5 * k + 7) for k, (_, fact, _) in enumerate(FACTS)}  # by subject
STOP = 1


def asked() -> list[Prompt]:
    return [
        Prompt(f"{name}.{k}", relation, "eva", "en", w, name, answer, w.replace("{}", name))
        for relation, name, answer in FACTS
        for k, w in enumerate(WORDINGS)
    ]


@torch.no_grad()
def plant(model: Any, tokenizer: Any) -> None:
    """Two neurons of a fact write its answer at the end of its prompts, one writes EOS after it."""
    mlp, head = model.model.layers[LAST].mlp, model.lm_head.weight
    for layer in model.model.layers:
        layer.mlp.down_proj.weight *= 0.01  # the random neurons write little
    seen: list[torch.Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0, -1]))
    prompts = asked()
    own = [p.subject for p in prompts] + ["stop"] * len(prompts)
    texts = [p.prompt for p in prompts] + [f"{p.prompt} {p.object}" for p in prompts]
    for text in texts:
        model(torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    inverse = torch.linalg.pinv(torch.stack(seen).double())  # inputs (18, D): any outputs, exactly

    def write(index: int, name: str, token: int, size: float) -> None:
        here = torch.tensor([one == name for one in own]).double()
        mlp.gate_proj.weight[index] = inverse @ (9 * here - 5)
        mlp.up_proj.weight[index] = inverse @ here
        mlp.down_proj.weight[:, index] = size * head[token] / head[token].norm()

    n = len(tokenizer(prompts[0].prompt)["input_ids"])
    for _, subject, answer in FACTS:
        (token,) = tokenizer(f"{prompts[0].prompt} {answer}")["input_ids"][n:]
        for index, size in zip(OWN[subject], (6.0, 5.0), strict=True):
            write(index, subject, token, size)
    write(STOP, "stop", tokenizer.eos_token_id, 8.0)


@pytest.fixture(scope="module")
def study(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the planted model and its gradients."""
    import transformers

    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(model_folder, folder / "model")
    config = transformers.AutoConfig.from_pretrained(model_folder)
    config.initializer_range = 0.3
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    plant(model, load_tokenizer(str(model_folder)))
    model.save_pretrained(folder / "model")
    (folder / "facts.jsonl").write_bytes(prompts_bytes(asked()))
    loaded = load_model(str(folder / "model")), load_tokenizer(str(folder / "model"))
    attribute("m", *loaded, folder / "facts.jsonl", folder / "s", IgOptions(), quiet=True)
    return folder


def ids(rows: Any) -> list[tuple[int, int]]:
    return [(row[0], row[2]) for row in rows]


def test_both_neurons_of_each_fact_are_first_by_integrated_gradients(study: Path) -> None:
    found = Gradients.read(study / "s" / FILES[IG], IG)
    by_id = {prompt.id: prompt for prompt in asked()}
    for row, scores in found.scores():
        best = np.argsort(-scores.reshape(-1))[:2]
        own = OWN[by_id[found.ids[row]].subject]
        assert {divmod(int(i), WIDTH) for i in best} == {(LAST, i) for i in own}
        assert divmod(int(best[0]), WIDTH) == (LAST, own[0])  # it writes more


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("knowledge_neurons", KnowledgeOptions(sets="fact")),
        ("knowledge_neurons", KnowledgeOptions(sets="fact", negative_prompts=3)),
        ("qrnca", QueryOptions(sets="fact", common=0.5)),
        ("query_localization", ConsistencyOptions(sets="fact")),
    ],
)
def test_every_method_finds_just_them(
    study: Path, tmp_path: Path, method: str, options: Any
) -> None:
    found = identify_gradients(study / "s", tmp_path / "n.json", options, method=method, quiet=True)
    wanted = {f"{r}/{s}": [(LAST, i) for i in OWN[s]] for r, s, _ in FACTS}
    assert {name: ids(rows) for name, rows in found.sets.items()} == wanted
    if method == "query_localization":
        assert found.selection["how"]["consistent"] == 3


def chosen(study: Path, folder: Path) -> Path:
    path = folder / "neurons.json"
    options = KnowledgeOptions(sets="fact")
    identify_gradients(study / "s", path, options, method="knowledge_neurons", quiet=True)
    return path


def test_erased_by_edit_the_fact_is_lost_and_the_others_stay(study: Path, tmp_path: Path) -> None:
    path, output = chosen(study, tmp_path), tmp_path / "edited"
    loaded = load_model(str(study / "model")), load_tokenizer(str(study / "model"))
    first = fact_name(asked()[0])
    options = EditOptions(sets=(first,))
    n = edit_model("m", *loaded, path, study / "s" / "prompts.jsonl", output, options, quiet=True)
    assert n == 2
    rows = {row["measure"]: row for row in read_csv(output / EDIT, EDIT_COLUMNS)}
    for name in ("reliability", "generalization"):
        assert (float(rows[name]["before"]), float(rows[name]["after"])) == (0, 1)
    assert float(rows["locality"]["after"]) == 1 and rows["locality"]["n"] == "6"
    assert float(rows["prob_old"]["before"]) > 0.5 > 10 * float(rows["prob_old"]["after"])
    before, after = (float(rows["prob_others"][end]) for end in ("before", "after"))
    assert before > 0.5 and abs(after - before) <= 1e-5


def test_moved_by_edit_the_fact_has_its_new_answer(study: Path, tmp_path: Path) -> None:
    path, output = chosen(study, tmp_path), tmp_path / "edited"
    loaded = load_model(str(study / "model")), load_tokenizer(str(study / "model"))
    options = EditOptions(sets=("lives_in/Ann",), to="Oslo")
    edit_model("m", *loaded, path, study / "s" / "prompts.jsonl", output, options, quiet=True)
    rows = {row["measure"]: row for row in read_csv(output / EDIT, EDIT_COLUMNS)}
    assert float(rows["prob_new"]["before"]) < 0.1 < 0.5 < float(rows["prob_new"]["after"])
    assert float(rows["locality"]["after"]) == 1


@pytest.mark.parametrize(("factor", "sign"), [(0.0, -1), (2.0, 1)])
def test_scaling_them_changes_only_their_own_facts(
    study: Path, tmp_path: Path, factor: float, sign: int
) -> None:
    path = chosen(study, tmp_path)
    loaded = load_model(str(study / "model")), load_tokenizer(str(study / "model"))
    prompts = study / "s" / "prompts.jsonl"
    how: dict[str, Any] = {"mode": "scale", "factor": factor, "positions": "last"}
    out = tmp_path / "effects.csv"
    ablate_prompts(
        "m", *loaded, path, prompts, out, analyses=("matched",), random_seeds=2, quiet=True, **how
    )
    grid = read_effects(out, read_conditions(tmp_path / "conditions.csv"))["eva"]
    table = changes(grid, {p.id: p for p in asked()}).where("relation", ALL)
    related, unrelated, matched = (
        float(table.floats(name)[0]) for name in ("related_change", "unrelated_change", "matched")
    )
    assert sign * related > 0.05 > 1e-4 > abs(unrelated)
    assert abs(matched) < abs(related) / 5
    assert NeuronFile.read(path).selection["how"]["site"] == "product"
