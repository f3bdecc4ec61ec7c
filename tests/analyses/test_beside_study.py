"""Both ways to find neurons in one study: sets, effects, crashes, and what makes gains again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest import MonkeyPatch
from safetensors.numpy import load_file

import relneuron.methods.gains.scorer
import relneuron.study.gain
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.prompts import read_prompts
from relneuron.model.load import load_model, load_tokenizer
from relneuron.study.run import run_study
from relneuron.study.settings import RunOptions
from tests.kit.files import contents, read_rows

OPTIONS = RunOptions(eva=8, top=40, random_seeds=1, batch_tokens=256, analyses=("gain",))


@pytest.fixture(scope="module")
def study(model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gain") / "s"
    run_study(str(model_folder), fact_folder, folder, OPTIONS, quiet=True)
    return folder


def test_sets_are_as_large_and_hold_the_largest_mean_gains(study: Path) -> None:
    neurons = json.loads((study / "attribution" / "neurons.json").read_text())
    own = json.loads((study / "neurons.json").read_text())["sets"]
    targets = read_rows(study / "attribution" / "targets.csv")
    right = {row["id"] for row in read_rows(study / "validated.csv") if row["correct"] == "1"}
    det = {p.id for p in read_prompts(study / "prompts.jsonl") if p.split == "det"}
    assert {row["id"] for row in targets} == det & right
    gains = load_file(study / "attribution" / "gains.safetensors")
    assert neurons["method"] == "logprob_gain" and set(neurons["sets"]) == set(own)
    for relation, chosen in neurons["sets"].items():
        members = [i for i, row in enumerate(targets) if row["relation"] == relation]
        mean = {
            (layer, i): float(np.mean([float(gains[f"ffn.{layer}"][m, i]) for m in members]))
            for layer in range(2)
            for i in range(48)
        }
        best = sorted(mean.values(), reverse=True)[: len(own[relation])]
        assert [score for *_, score in chosen] == pytest.approx(best, abs=1e-6)
        for layer, site, index, score in chosen:
            assert site == "gate" and score == pytest.approx(mean[layer, index], abs=1e-6)


@torch.no_grad()
def test_effects_are_those_of_zeroed_products(study: Path, model_folder: Path) -> None:
    model, tokenizer = load_model(str(model_folder)), load_tokenizer(str(model_folder))
    prompts = {p.id: p for p in read_prompts(study / "prompts.jsonl")}
    sets = json.loads((study / "attribution" / "neurons.json").read_text())["sets"]
    effects = [r for r in read_rows(study / "effects.csv") if r["condition"].startswith("gain:")]
    assert {row["split"] for row in effects} == {"eva"}
    n_eva = sum(p.split == "eva" and p.language == "en" for p in prompts.values())
    assert len(effects) == len(sets) * n_eva and len(sets) == 3
    for relation, chosen in sets.items():
        off = [[i for la, _, i, _ in chosen if la == layer] for layer in range(2)]
        handles = [
            block.mlp.down_proj.register_forward_pre_hook(
                lambda _, args, i=indices: (args[0].index_fill(-1, torch.tensor(i).long(), 0.0),)
            )
            for block, indices in zip(model.model.layers, off, strict=True)
        ]
        for row in effects[:: max(1, len(effects) // 30)]:
            if row["condition"] != f"gain:{relation}":
                continue
            prompt = prompts[row["id"]]
            ids = tokenizer(prompt.prompt, return_tensors="pt")["input_ids"]
            both = tokenizer(f"{prompt.prompt} {prompt.object}")["input_ids"]
            logprobs = model(ids).logits[0, -1].float().log_softmax(-1)
            assert abs(float(row["logprob"]) - float(logprobs[both[ids.shape[1]]])) < 1e-4
        for handle in handles:
            handle.remove()


def test_the_gains_survive_crashes_and_are_made_once(
    study: Path, model_folder: Path, fact_folder: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """It breaks between any two files of the gains, and in the middle of the scores."""
    copy = tmp_path / "s"

    def breaking(of: Any, name: str, *, after: bool) -> None:
        real, calls = getattr(of, name), [0]
        breaks = (1, 2) if after else (2, 3)  # of the calls: before is in the middle of the scores

        def run(*args: Any, **options: Any) -> Any:
            inside = any(isinstance(a, Path) and "attribution" in a.parts for a in args)
            fails = name == "score" or inside or "attribution" in str(getattr(args[0], "path", ""))
            calls[0] += fails
            fails = fails and calls[0] in breaks
            if fails and not after:
                raise OSError("the disk is gone")
            result = real(*args, **options)
            if fails and after:
                raise OSError("the disk is gone")
            return result

        monkeypatch.setattr(of, name, run)

    monkeypatch.setattr(Journal, "SAVE_EVERY_S", 0.0)
    breaking(relneuron.methods.gains.scorer.Scorer, "score", after=False)
    breaking(Manifest, "finish", after=True)
    breaking(relneuron.study.gain, "identify_gains", after=True)
    failures: list[OSError] = []
    while len(failures) < 40:
        try:
            run_study(str(model_folder), fact_folder, copy, OPTIONS, quiet=True)
            break
        except OSError as error:
            failures.append(error)
    assert 2 < len(failures) < 40
    monkeypatch.undo()
    assert contents(copy) == contents(study)

    # What is done is not done again: nothing of it is there to be called.
    monkeypatch.setattr(relneuron.methods.gains.scorer.Scorer, "score", None)
    monkeypatch.setattr(relneuron.study.gain, "identify_gains", None)
    run_study(str(model_folder), fact_folder, copy, OPTIONS, quiet=True)
    assert contents(copy) == contents(study)


def test_other_sets_need_force_and_make_other_gains(
    study: Path, model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "s"
    for name, data in contents(study).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    fewer = replace(OPTIONS, top=7)
    with pytest.raises(RelneuronError, match="top: 40 -> 7"):
        run_study(str(model_folder), fact_folder, copy, fewer, quiet=True)
    assert contents(copy) == contents(study)
    run_study(str(model_folder), fact_folder, copy, fewer, quiet=True, force=True)
    sets = json.loads((copy / "attribution" / "neurons.json").read_text())["sets"]
    assert {len(chosen) for chosen in sets.values()} == {7}
    new = tmp_path / "new"
    run_study(str(model_folder), fact_folder, new, fewer, quiet=True)
    assert contents(copy) == contents(new)


def test_a_model_that_cannot_be_attributed_has_a_study_without(
    study: Path, model_folder: Path, fact_folder: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    def refuse(model: Any) -> None:
        raise RelneuronError("this model has norms behind its layers", "give another model")

    monkeypatch.setattr(relneuron.study.gain, "read_residual_model", refuse)
    with pytest.warns(UserWarning, match="gain left out") as caught:
        run_study(str(model_folder), fact_folder, tmp_path / "s", OPTIONS, quiet=True)
    messages = [str(warning.message) for warning in caught]
    assert "gain left out: this model has norms behind its layers" in messages
    assert not (tmp_path / "s" / "attribution").exists()
    assert not any("gain:" in row["condition"] for row in read_rows(tmp_path / "s" / "effects.csv"))
    assert (tmp_path / "s" / "neurons.json").read_bytes() == (study / "neurons.json").read_bytes()


def test_gains_are_dropped_and_made_anew_when_they_are_needed(
    study: Path, model_folder: Path, fact_folder: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    folder, dropping = tmp_path / "s", replace(OPTIONS, drop_responses=True)
    run_study(str(model_folder), fact_folder, folder, dropping, quiet=True)
    gains = folder / "attribution" / "gains.safetensors"
    assert not gains.exists() and not (folder / "responses.safetensors").exists()
    for name in ("attribution/neurons.json", "effects.csv"):
        assert (folder / name).read_bytes() == (study / name).read_bytes()

    # What is done is not done again.
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(relneuron.methods.gains.scorer.Scorer, "score", None)
        run_study(str(model_folder), fact_folder, folder, dropping, quiet=True)
    assert contents(folder) == before

    (folder / "attribution" / "neurons.json").unlink()
    run_study(str(model_folder), fact_folder, folder, dropping, quiet=True)
    assert contents(folder) == before
