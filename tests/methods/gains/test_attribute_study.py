"""An attribution in the folder of a recorded study: both stand beside each other, as they were."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from relneuron.ablation.ablate import ablate_prompts
from relneuron.ablation.conditions import read_rankings
from relneuron.analyses.page import build
from relneuron.analyses.study import PAGE
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile, Shape
from relneuron.artifact.prompts import read_prompts
from relneuron.artifact.stage import commands
from relneuron.methods.gains.attribute import attribute
from relneuron.methods.gains.options import AttributeOptions
from relneuron.methods.gains.rank import identify_gains
from relneuron.model.load import load_model, load_tokenizer
from relneuron.report.page import kind_of, render
from relneuron.study.pages import PAGES, titles
from relneuron.study.run import run_study
from relneuron.study.settings import RunOptions
from tests.kit.files import contents, read_rows

OPTIONS = RunOptions(eva=8, top=20, random_seeds=1, batch_tokens=256, permutations=9, bootstrap=9)
ATTRIBUTED = AttributeOptions(splits=("det",), kinds=("ffn_neuron",), compare=False)
SHAPE = {"layers": 2, "width": 48, "hidden": 32}
NEW = {"targets.csv", "attributions.csv", "promoted.csv", "gains.safetensors"}
NEW_BESIDE = {"gain.json", "gain.scores.safetensors"}


@pytest.fixture(scope="module")
def recorded(
    model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "s"
    run_study(str(model_folder), fact_folder, folder, OPTIONS, quiet=True)
    return folder


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    return load_model(str(model_folder)), load_tokenizer(str(model_folder))


@pytest.fixture(scope="module")
def both(recorded: Path, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded study, with an attribution and its neurons."""
    folder = tmp_path_factory.mktemp("both") / "s"
    shutil.copytree(recorded, folder)
    score(model, folder)
    identify_gains(folder, folder / "gain.json", top=20, quiet=True)
    return folder


def score(model: Any, folder: Path, prompts: Path | None = None, **more: Any) -> None:
    path = prompts or folder / "prompts.jsonl"
    options = more.pop("options", ATTRIBUTED)
    attribute("m", *model, path, folder, options, quiet=True, **more)


def test_the_recorded_study_stays_as_it_was(recorded: Path, both: Path) -> None:
    before, after = contents(recorded), contents(both)
    assert after.keys() - before.keys() == NEW | NEW_BESIDE
    changed = {name for name, data in before.items() if after[name] != data}
    assert changed == {"manifest.json"}
    old, new = json.loads(before["manifest.json"]), json.loads(after["manifest.json"])
    stages = {"prompts", "record", "identify", "look", "ablate", "report"}
    assert {*old["stages"]} == stages
    assert {*new["stages"]} == stages | {"attribute", "identify_gains"}
    assert all(old["stages"][name] == new["stages"][name] for name in stages)
    # The report has read nothing that changed; what there is besides, the next `run` sees.
    assert old.keys() == new.keys() and "report.html" in new["files"]
    assert all(old[key] == new[key] for key in old if key not in ("stages", "files", "digest"))
    entry = new["stages"]["attribute"]
    assert entry["sentences"] == sum(p.split == "det" for p in read_prompts(both / "prompts.jsonl"))
    assert {"tokens", "seeds", "batch_plan", "memory", "versions", "dtype"} <= entry.keys()
    assert {*new["stages"]["identify_gains"]["files"]} == NEW_BESIDE <= new["files"].keys()
    assert NeuronFile.read(both / "neurons.json").method == "ap"
    assert NeuronFile.read(both / "gain.json").method == "logprob_gain"


def test_the_study_goes_on_and_is_reported(
    both: Path, model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    shutil.copytree(both, folder)
    run_study(str(model_folder), fact_folder, folder, OPTIONS, quiet=True)
    before, after = contents(both), contents(folder)
    assert {n for n in after if after[n] != before.get(n)} == {"manifest.json", "report.html"}
    assert kind_of(folder, PAGES) is PAGE
    assert "report" in Manifest(folder).data["stages"]
    lines = "\n".join(commands(Manifest(folder).data))
    assert "relneuron attribute" in lines and " STUDY/prompts.jsonl -o STUDY" in lines
    assert "relneuron identify STUDY -o STUDY/gain.json" in lines
    assert "relneuron identify STUDY -o STUDY/neurons.json" in lines


def test_a_new_attribution_forgets_only_what_is_made_from_it(
    both: Path, model: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    shutil.copytree(both, folder)
    before = Manifest(folder).data["stages"]
    other = AttributeOptions(splits=("eva",), kinds=("ffn_neuron",), compare=False)
    with pytest.raises(RelneuronError, match="made from other inputs"):
        score(model, folder, options=other)
    score(model, folder, options=other, force=True)
    after = Manifest(folder).data["stages"]
    assert "identify_gains" not in after and after["attribute"] != before["attribute"]
    assert all(after[n] == before[n] for n in ("prompts", "record", "identify", "ablate"))


def test_a_new_attribution_forgets_the_neurons_made_from_it(
    recorded: Path, model: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    prompts = recorded / "prompts.jsonl"
    score(model, folder, prompts)
    identify_gains(folder, folder / "neurons.json", top=5, quiet=True)
    assert "identify" in Manifest(folder).data["stages"]
    other = AttributeOptions(splits=("eva",), kinds=("ffn_neuron",), compare=False)
    score(model, folder, prompts, options=other, force=True)
    assert [*Manifest(folder).data["stages"]] == ["attribute"]


@pytest.mark.parametrize("force", [False, True])
def test_another_model_or_other_prompts_are_refused(
    recorded: Path, model: Any, tmp_path: Path, *, force: bool
) -> None:
    before = contents(recorded)
    fewer = tmp_path / "prompts.jsonl"
    lines = (recorded / "prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    fewer.write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(RelneuronError, match="a study of other prompts"):
        score(model, recorded, fewer, force=force)
    other = copy.deepcopy(model[0])
    with torch.no_grad():
        other.lm_head.weight[5] += 1
    with pytest.raises(RelneuronError, match="a study of another model"):
        score((other, model[1]), recorded, force=force)
    assert contents(recorded) == before


def test_neurons_are_not_named_after_another_model(both: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(both, folder)
    manifest = Manifest(folder)
    manifest.data["model"]["digest"] = "0" * 64
    manifest.save()
    with pytest.raises(RelneuronError, match="of another model"):
        identify_gains(folder, folder / "other.json", quiet=True)
    assert not (folder / "other.json").exists()


def test_gains_in_place_of_the_recorded_neurons(recorded: Path, model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(recorded, folder)
    score(model, folder)
    output = folder / "neurons.json"
    with pytest.raises(RelneuronError, match="exists"):
        identify_gains(folder, output, top=20, quiet=True)
    identify_gains(folder, output, top=20, force=True, quiet=True)
    assert [*Manifest(folder).data["stages"]] == ["prompts", "record", "attribute", "identify"]
    # Nothing is left that was said of the others.
    assert not {"labels.csv", "significance.csv"} & contents(folder).keys()
    with pytest.raises(RelneuronError, match="with other neurons than"):
        build(folder, titles())
    effects, prompts = folder / "effects.csv", folder / "prompts.jsonl"
    ablate_prompts("m", *model, output, prompts, effects, random_seeds=1, force=True, quiet=True)
    html = render(build(folder, titles()))
    assert "ranked by log-probability gain" in html


def test_neurons_by_gain_of_another_folder_stand_beside_the_study(
    recorded: Path, model: Any, tmp_path: Path
) -> None:
    folder, other = tmp_path / "s", tmp_path / "a"
    shutil.copytree(recorded, folder)
    before = contents(folder)
    score(model, other, folder / "prompts.jsonl")
    identify_gains(other, folder / "gain.json", top=20, quiet=True)
    after = contents(folder)
    assert {n for n in after if after[n] != before.get(n)} == NEW_BESIDE | {"manifest.json"}
    old, new = json.loads(before["manifest.json"]), json.loads(after["manifest.json"])
    assert new["stages"].pop("identify_gains")["files"] == ["gain.scores.safetensors", "gain.json"]
    new["files"] = {n: about for n, about in new["files"].items() if n not in NEW_BESIDE}
    assert new.pop("digest") != old.pop("digest")
    assert new == old


def test_the_facts_own_folder_is_no_output(model: Any, fact_folder: Path) -> None:
    before = contents(fact_folder)
    with pytest.raises(RelneuronError, match="is the folder of the facts"):
        score(model, fact_folder, fact_folder)
    assert contents(fact_folder) == before


# Neurons by gain, switched off


def test_gains_rank_the_neurons_beyond_the_set(both: Path) -> None:
    sets = {
        name: Shape.of(SHAPE).places(rows)
        for name, rows in NeuronFile.read(both / "gain.json").sets.items()
    }
    found = read_rankings(both / "gain.scores.safetensors", sets, SHAPE)
    targets = read_rows(both / "targets.csv")
    gains = load_file(both / "gains.safetensors")
    for name, ranking in found.items():
        rows = [i for i, target in enumerate(targets) if target["relation"] == name]
        mean = {
            (layer, "gate", k): np.float32(gains[f"ffn.{layer}"][rows, k].astype(float).mean())
            for layer in range(2)
            for k in range(48)
        }
        order = sorted(mean, key=lambda at: (-mean[at], at))
        assert ranking.tolist() == Shape.of(SHAPE).places(order).tolist()


def test_sizes_of_neurons_by_gain(both: Path, model: Any, tmp_path: Path) -> None:
    prompts, output = both / "prompts.jsonl", tmp_path / "effects.csv"
    with pytest.warns(UserWarning, match="sizes 97 left out"):
        ablate_prompts(
            "m",
            *model,
            both / "gain.json",
            prompts,
            output,
            analyses=("sizes",),
            sizes=(5, 96, 97),
            random_seeds=0,
            splits=("eva",),
            quiet=True,
        )
    conditions = {row["condition"]: row for row in read_rows(tmp_path / "conditions.csv")}
    names = NeuronFile.read(both / "gain.json").sets
    for name in names:
        assert conditions[f"{name}@5"]["n_neurons"] == "5"
        assert conditions[f"{name}@96"]["n_neurons"] == "96"
    inputs = Manifest(tmp_path).data["stages"]["ablate"]["inputs"]
    assert [*inputs["beside"]] == ["gain.scores.safetensors"]
    # All gates at zero: no MLP writes anything, whatever the relation.
    found = [row for row in read_rows(output) if row["condition"].endswith("@96")]
    asked = {p.id: p for p in read_prompts(prompts) if p.split == "eva" and p.language == "en"}
    assert {row["id"] for row in found} == {*asked} and len(found) == len(names) * len(asked)
    network, tokenizer = model
    handles = [
        block.mlp.register_forward_hook(lambda _m, _i, out: out * 0)
        for block in network.model.layers
    ]
    try:
        for row in found[::5]:
            prompt = asked[row["id"]]
            ids = tokenizer(prompt.prompt, return_tensors="pt")["input_ids"]
            full = tokenizer(f"{prompt.prompt} {prompt.object}")["input_ids"]
            with torch.no_grad():
                logprobs = network(ids).logits[0, -1].log_softmax(-1)
            assert abs(float(row["logprob"]) - float(logprobs[full[ids.shape[1]]])) < 1e-4
    finally:
        for handle in handles:
            handle.remove()


def test_scores_of_another_kind_rank_nothing(tmp_path: Path) -> None:
    sets, path = {"a": np.arange(3)}, tmp_path / "scores.safetensors"
    relations = {"relations": json.dumps(["a"])}
    save_file({"lape.act": np.zeros((1, 2, 48), np.float32)}, path, relations)
    assert read_rankings(path, sets, SHAPE)["a"].tolist() == [0, 1, 2]
    nan = np.full((1, 2, 48), np.nan, np.float32)
    save_file({"logprob_gain.gate": nan}, path, relations)
    assert read_rankings(path, {"a": np.arange(0)}, SHAPE)["a"].tolist() == []
    path.write_bytes(b"no safetensors")
    with pytest.raises(RelneuronError, match="damaged"):
        read_rankings(path, sets, SHAPE)
    assert Shape.of(SHAPE).total == 2 * (2 * 48 + 32)
