"""The study end to end on a tiny model trained on its facts, against an independent computation.

Plain hooks, scikit-learn and one prompt at a time must give the same answers, scores and drops.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import Shape
from relneuron.artifact.prompts import read_prompts
from relneuron.model.load import load_model, load_tokenizer
from relneuron.study.run import run_study
from relneuron.study.settings import RunOptions
from tests.kit.files import contents, read_rows
from tests.kit.forked import Forked, command

OPTIONS = RunOptions(eva=8, top=40, random_seeds=3, batch_tokens=256)
FILES = {
    "manifest.json",
    "prompts.jsonl",
    "validated.csv",
    "scores.safetensors",
    "neurons.json",
    "significance.csv",
    "effects.csv",
    "conditions.csv",
    "accuracy.csv",
    "report.html",
    "analyses/drop.csv",
}


@pytest.fixture(scope="module")
def study(model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "s"
    run_study(str(model_folder), fact_folder, folder, OPTIONS, quiet=True)
    return folder


class Plain:
    """The model with plain forward hooks only: what relneuron is compared with."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(str(folder))
        self.tokenizer = load_tokenizer(str(folder))
        self.modules = {
            f"{site}.{layer}": getattr(block.mlp, f"{site}_proj")
            for layer, block in enumerate(self.model.model.layers)
            for site in ("gate", "up", "down")
        }

    @torch.no_grad()
    def responses(self, prompt: str) -> dict[str, np.ndarray[Any, Any]]:
        found: dict[str, np.ndarray[Any, Any]] = {}
        handles = [
            module.register_forward_hook(
                lambda _m, _i, out, name=name: found.update({name: out[0].double().mean(0).numpy()})
            )
            for name, module in self.modules.items()
        ]
        self.model(**self.tokenizer(prompt, return_tensors="pt"))
        for handle in handles:
            handle.remove()
        return found

    @torch.no_grad()
    def answer(self, prompt: str, off: list[Any]) -> tuple[str, Tensor]:
        """Two greedy tokens without a cache, the neurons in `off` overwritten with zero."""
        handles = []
        for layer, site, index in off:

            def zero(_m: Any, _i: Any, out: Tensor, index: int = index) -> None:
                out[:, :, index] = 0

            handles.append(self.modules[f"{site}.{layer}"].register_forward_hook(zero))
        tokens = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        first = None
        made: list[int] = []
        for _ in range(2):
            logits = self.model(tokens).logits[0, -1].float()
            first = logits if first is None else first
            token = int(logits.argmax())
            if token == self.tokenizer.eos_token_id:
                break
            made.append(token)
            tokens = torch.cat([tokens, torch.tensor([[token]])], 1)
        for handle in handles:
            handle.remove()
        assert first is not None
        return self.tokenizer.decode(made, skip_special_tokens=True).strip(), first.log_softmax(-1)


@pytest.fixture(scope="module")
def plain(model_folder: Path) -> Plain:
    return Plain(model_folder)


def test_every_file_is_there_and_the_manifest_knows_it(study: Path) -> None:
    manifest = json.loads((study / "manifest.json").read_text())
    names = set(contents(study))
    assert names >= FILES
    assert names - set(manifest["files"]) == {"manifest.json"}
    assert manifest["model"]["layers"] == 2
    assert manifest["seeds"] == {
        "split": 0,
        "negatives": 0,
        "significance": 0,
        "random": [0, 1, 2],
    }
    assert "streamed" in manifest["memory"]["responses"]
    stages = ["prompts", "record", "identify", "look", "ablate", "report"]
    assert list(manifest["stages"]) == stages


def test_answers_before_ablation_are_those_of_the_plain_model(study: Path, plain: Plain) -> None:
    prompts = read_prompts(study / "prompts.jsonl")
    answered = {row["id"]: row for row in read_rows(study / "validated.csv")}
    for prompt in prompts:
        text, _ = plain.answer(prompt.prompt, [])
        assert answered[prompt.id]["prediction"] == text
        right = text != "" and prompt.object.lower().startswith(text.lower())
        assert answered[prompt.id]["correct"] == str(int(right))
    assert sum(row["correct"] == "1" for row in answered.values()) > len(answered) / 2


def test_scores_and_sets_are_scikit_learns(study: Path, plain: Plain) -> None:
    from sklearn.metrics import average_precision_score

    det = [p for p in read_prompts(study / "prompts.jsonl") if p.split == "det"]
    valid = {row["id"] for row in read_rows(study / "validated.csv") if row["correct"] == "1"}
    plainly = [plain.responses(prompt.prompt) for prompt in det]
    recorded = load_file(study / "responses.safetensors")
    for name, ours in recorded.items():
        theirs = np.stack([response[name] for response in plainly])
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    scores = load_file(study / "scores.safetensors")
    sets = json.loads((study / "neurons.json").read_text())["sets"]
    label_rows = read_rows(study / "labels.csv")
    for number, relation in enumerate(sorted(sets)):
        labels = {r["id"]: int(r["label"]) for r in label_rows if r["relation"] == relation}
        positives = [p.id for p in det if p.relation == relation and p.id in valid]
        assert sorted(positives) == sorted(key for key, label in labels.items() if label)
        others = [p.id for p in det if p.relation != relation and p.id in valid]
        negatives = [key for key, label in labels.items() if not label]
        assert set(negatives) <= set(others)
        assert len(negatives) == min(len(others), 4 * len(positives))
        members = [i for i, p in enumerate(det) if p.id in labels]
        wanted = np.array([labels[det[i].id] for i in members])
        flat = []
        for layer in range(2):
            for site in ("gate", "up", "down"):
                values = recorded[f"{site}.{layer}"][members]
                for index in range(values.shape[1]):
                    ap = np.float32(average_precision_score(wanted, values[:, index]))
                    ours = scores[f"ap.{site}"][number, layer, index]
                    assert abs(float(ours) - float(ap)) <= np.spacing(ap)
                    flat.append((-float(ours), layer, ("gate", "up", "down").index(site), index))
        best = [[la, ("gate", "up", "down")[s], i, -score] for score, la, s, i in sorted(flat)[:40]]
        assert sets[relation] == best


def test_neurons_chosen_by_fdr_are_ablated_and_reported(
    study: Path, model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    """The trained model knows its relations: some neurons pass, fewer at a lower rate."""
    sizes = []
    for fdr in (0.2, 0.01):
        folder = tmp_path / str(fdr)
        folder.mkdir()
        for name in ("prompts.jsonl", "validated.csv", "responses.safetensors", "manifest.json"):
            (folder / name).write_bytes((study / name).read_bytes())
        options = RunOptions(**{**OPTIONS.__dict__, "top": None, "fdr": fdr, "random_seeds": 1})
        run_study(str(model_folder), fact_folder, folder, options, quiet=True, force=True)
        neurons = json.loads((folder / "neurons.json").read_text())
        table = read_rows(folder / "significance.csv")
        for relation, chosen in neurons["sets"].items():
            own = [row for row in table if row["relation"] == relation]
            assert [[int(r["layer"]), r["site"], int(r["index"])] for r in own] == [
                neuron[:3] for neuron in chosen
            ]
            assert all(float(row["q_value"]) <= fdr for row in own)
            assert "reason" in neurons["selection"][relation] or chosen
            assert neurons["selection"][relation]["fdr_resolution"] == 1
        sizes.append(sum(map(len, neurons["sets"].values())))
        assert f"A set is every neuron with q ≤ {fdr}." in (folder / "report.html").read_text()
        assert f"--fdr {fdr}" in (folder / "report.html").read_text()
    assert sizes[0] > sizes[1] > 0


def test_effects_are_those_of_plain_hooks(study: Path, plain: Plain) -> None:
    prompts = {p.id: p for p in read_prompts(study / "prompts.jsonl")}
    sets = json.loads((study / "neurons.json").read_text())["sets"]
    effects = read_rows(study / "effects.csv")
    conditions = list(dict.fromkeys(row["condition"] for row in effects))
    assert conditions == ["clean", *sorted(sets), "random.0", "random.1", "random.2"]
    asked = [p for p in prompts.values() if p.split != "det"]
    assert len(effects) == len(conditions) * len(asked)
    for row in effects:
        if row["condition"].startswith("random") or row["split"] != "eva":
            continue
        prompt = prompts[row["id"]]
        off = [neuron[:3] for neuron in sets.get(row["condition"], [])]
        text, logprobs = plain.answer(prompt.prompt, off)
        assert row["prediction"] == text
        token = plain.tokenizer(f"{prompt.prompt} {prompt.object}")["input_ids"]
        first = token[len(plain.tokenizer(prompt.prompt)["input_ids"])]
        assert abs(float(row["logprob"]) - float(logprobs[first])) < 1e-4


def test_accuracies_count_the_effects(study: Path) -> None:
    effects = read_rows(study / "effects.csv")
    for row in read_rows(study / "accuracy.csv"):
        key = ("condition", "relation", "split")
        right = [int(e["correct"]) for e in effects if all(e[k] == row[k] for k in key)]
        assert int(row["n_prompts"]) == len(right)
        assert int(row["n_correct"]) == sum(right)
        assert float(row["accuracy"]) == sum(right) / len(right)
    # The same in another language is a split of its own.
    assert {e["split"] for e in effects} == {"eva", "eva2", "eva.de"}


def test_random_sets_are_as_large_and_all_differ() -> None:
    from relneuron.artifact.neurons import random_neurons

    shape = {"layers": 2, "width": 48, "hidden": 32}
    drawn = [random_neurons(shape, 40, seed) for seed in range(3)]
    assert all(len(set(neurons)) == 40 for neurons in drawn)
    assert len({tuple(neurons) for neurons in drawn}) == 3
    assert len(set(random_neurons(shape, Shape.of(shape).total, 0))) == Shape.of(shape).total


def test_running_again_changes_nothing_and_is_quick(
    study: Path, model_folder: Path, fact_folder: Path
) -> None:
    before = contents(study)
    times = {path: path.stat().st_mtime_ns for path in study.iterdir()}
    run_study(str(model_folder), fact_folder, study, OPTIONS, quiet=True)
    assert contents(study) == before
    assert {path: path.stat().st_mtime_ns for path in study.iterdir()} == times


def test_another_batch_size_gives_the_same_answers(
    study: Path, model_folder: Path, fact_folder: Path, tmp_path: Path
) -> None:
    changed = RunOptions(**{**OPTIONS.__dict__, "batch_tokens": 40})
    run_study(str(model_folder), fact_folder, tmp_path / "s", changed, quiet=True)
    for name in ("prompts.jsonl", "validated.csv", "accuracy.csv", "labels.csv"):
        assert (tmp_path / "s" / name).read_bytes() == (study / name).read_bytes()


def test_other_options_in_the_same_folder_are_refused(
    study: Path, model_folder: Path, fact_folder: Path
) -> None:
    before = contents(study)
    changed = RunOptions(**{**OPTIONS.__dict__, "top": 41})
    with pytest.raises(RelneuronError, match="top: 40 -> 41"):
        run_study(str(model_folder), fact_folder, study, changed, quiet=True)
    changed = RunOptions(**{**OPTIONS.__dict__, "top": None, "fdr": 0.05, "bootstrap": 10})
    with pytest.raises(RelneuronError, match="bootstrap: 1000 -> 10; fdr: None -> 0.05; top"):
        run_study(str(model_folder), fact_folder, study, changed, quiet=True)
    changed = RunOptions(**{**OPTIONS.__dict__, "dtype": "bfloat16"})
    with pytest.raises(RelneuronError, match="model.dtype: float32 -> bfloat16"):
        run_study(str(model_folder), fact_folder, study, changed, quiet=True)
    assert contents(study) == before


def test_the_same_model_by_another_path_is_the_same_study(
    study: Path, model_folder: Path, fact_folder: Path
) -> None:
    before = contents(study)
    path = model_folder / ".." / model_folder.name
    run_study(str(path), fact_folder, study, OPTIONS, quiet=True)
    assert contents(study) == before


def test_a_changed_file_is_noticed(
    model_folder: Path, fact_folder: Path, study: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "s"
    copy.mkdir()
    for name, data in contents(study).items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(data)
    effects = copy / "effects.csv"
    effects.write_bytes(effects.read_bytes().replace(b",1,", b",0,", 1))
    with pytest.raises(RelneuronError, match="digest"):
        run_study(str(model_folder), fact_folder, copy, OPTIONS, quiet=True)
    run_study(str(model_folder), fact_folder, copy, OPTIONS, quiet=True, force=True)
    assert contents(copy) == contents(study)


def start(model: Path, facts: Path, folder: Path) -> Forked:
    words = ["run", model, "--facts", facts, "-o", folder, "--eva", 8, "--top", 40]
    return command(*words, "--random-seeds", 3, "--batch-tokens", 256, "--quiet")


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_again_and_again_ends_with_the_same_bits(
    study: Path,
    model_folder: Path,
    fact_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    """Every ninth forward raises; an interrupt loses nothing, a crash what was not yet saved."""
    import relneuron.model.ask
    from relneuron.artifact.journal import Journal

    monkeypatch.setattr(Journal, "SAVE_EVERY_S", 10.0 if error is KeyboardInterrupt else 0.0)
    forward, calls = relneuron.model.ask.Asker._forward, []

    def failing(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) % 9 == 0:
            raise error
        return forward(self, *args)

    monkeypatch.setattr(relneuron.model.ask.Asker, "_forward", failing)
    n_failures = 0
    while n_failures < 30:
        try:
            run_study(str(model_folder), fact_folder, tmp_path / "s", OPTIONS, quiet=True)
            break
        except error:
            n_failures += 1
    assert 2 < n_failures < 30
    assert contents(tmp_path / "s") == contents(study)


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.1, 0.4, 0.8])
def test_killed_and_started_again_gives_the_same_bits(
    study: Path, model_folder: Path, fact_folder: Path, tmp_path: Path, wait: float
) -> None:
    folder = tmp_path / "s"
    process = start(model_folder, fact_folder, folder)
    while process.poll() is None and not (folder / "manifest.json").exists():
        time.sleep(0.01)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = start(model_folder, fact_folder, folder)
    assert again.wait() == 0, again.said()
    assert contents(folder) == contents(study)
