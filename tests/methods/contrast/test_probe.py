"""The probe: products by plain hooks, scikit-learn's own cross-validation, and a planted label."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import read_questions
from relneuron.methods.contrast.classify import NAME, Probe, cross_validated, fit, score
from relneuron.methods.contrast.options import ProbeOptions
from relneuron.methods.contrast.probe import probe
from relneuron.model.batches import Budget
from relneuron.model.load import load_model, load_tokenizer
from relneuron.model.pair import running
from relneuron.model.products import last_products
from relneuron.model.questions import encode
from tests.kit.corpus_commands import check_refused

SHAPE = {"layers": 2, "width": 48, "hidden": 32}
LINES = [
    f"{start} {verb}"
    for i in range(12)
    for start in (f"Person{i}", f"Everybody knows that Person{i}")
    for verb in ("eats", "lives in", "works as a")
]
TOP = [(0, 41), (0, 7), (1, 40), (0, 3), (1, 0), (0, 47)]  # (layer, index), best first


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> Iterator[tuple[Any, Any]]:
    yield load_model(str(model_folder)), load_tokenizer(str(model_folder))


@pytest.fixture(scope="module")
def plain(loaded: Any) -> np.ndarray[Any, Any]:
    """(N, L, F) what each down_proj reads at the last token, one prompt at a time."""
    model, tokenizer = loaded
    found = np.zeros((len(LINES), 2, 48))
    for row, line in enumerate(LINES):
        handles = []
        for layer, block in enumerate(model.model.layers):

            def keep(_: Any, args: Any, at: tuple[int, int] = (row, layer)) -> None:
                found[at] = args[0][0, -1].numpy()

            handles.append(block.mlp.down_proj.register_forward_pre_hook(keep))
        with torch.no_grad():
            model(torch.tensor([tokenizer(line)["input_ids"]]))
        for handle in handles:
            handle.remove()
    return found


@pytest.fixture
def study(tmp_path: Path, plain: Any) -> Path:
    """Prompts, neurons, and costs that are above 0 where neuron (0, 41) is above its median."""
    (tmp_path / "p.txt").write_text("".join(line + "\n" for line in LINES))
    sets = {"contrast": [(layer, "gate", i, 1.0) for layer, i in TOP]}
    sets["contrast"].insert(2, (0, "up", 7, 0.5))  # a product that stands there already
    NeuronFile({"id": "m", **SHAPE}, "contrast", sets, {}).write(tmp_path / "n.json")
    value = plain[:, 0, 41] - np.median(plain[:, 0, 41])
    lines = [f"{mask},{k},{v * s}" for k, v in enumerate(value, 1) for mask, s in COSTS]
    (tmp_path / "c.csv").write_text("\n".join(["mask,id,cost", *lines]) + "\n")
    return tmp_path


COSTS = (("clean", 1), ("donor", -1))


def fitted(loaded: Any, study: Path, output: str = "o", **asked: Any) -> Any:
    labels = f"{study / 'c.csv'}:cost"
    options = ProbeOptions(**{"neurons": study / "n.json", "labels": labels} | asked)
    return probe("m", *loaded, study / "p.txt", study / output, options, quiet=True)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- products ----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_products_are_those_of_plain_hooks(
    loaded: Any, plain: Any, study: Path, budget: int
) -> None:
    model, tokenizer = loaded
    prompts = read_questions(study / "p.txt")
    questions = encode(tokenizer, model, prompts, answers=False, n_tokens=0)
    for neurons in (TOP, [(0, 46), (0, 0)], [(1, 3)]):
        found = last_products(model, running(model), questions, neurons, Budget(budget))
        wanted = plain[:, [layer for layer, _ in neurons], [i for _, i in neurons]]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert all("forward" not in module.__dict__ for module in model.modules())


# --- the regression ----------------------------------------------------------------------------


def test_cross_validation_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 9)).astype(np.float32)
    labels = (values[:, 0] + rng.normal(size=60) > 0.4).astype(np.int64)
    found, folds, n_short = cross_validated(values, labels, 4, 3)
    parts = StratifiedKFold(4, shuffle=True, random_state=3)
    wanted = cross_val_predict(
        LogisticRegression(), values.astype(float), labels, cv=parts, method="predict_proba"
    )
    np.testing.assert_allclose(found, wanted[:, 1], rtol=1e-9)
    assert n_short == 0 and sorted(set(folds)) == [0, 1, 2, 3]
    one = score("top", found, labels, 9)
    assert one.accuracy == np.mean((wanted[:, 1] > 0.5) == labels)
    assert one.low < one.accuracy < one.high
    assert one.chance == max(labels.mean(), 1 - labels.mean()) and one.n_positive == labels.sum()
    coefficients, intercept, _ = fit(values, labels)
    plain = LogisticRegression().fit(values.astype(float), labels)
    np.testing.assert_allclose(coefficients, plain.coef_[0])
    assert intercept == pytest.approx(plain.intercept_[0])
    # Values that are far apart take more steps than scikit-learn's default of 100.
    assert not fit(values * np.geomspace(1e-3, 1e5, 9).astype(np.float32), labels)[2]


def test_the_file_says_the_same_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    made = Probe(np.array([[0, 3], [2, 1]]), rng.normal(size=2), 0.25, {"reads": "product"})
    (tmp_path / NAME).write_bytes(made.to_bytes())
    found = Probe.read(tmp_path / NAME)
    assert found.neurons.tolist() == made.neurons.tolist() and found.about == made.about
    values = rng.normal(size=(4, 2)) * 1e4
    np.testing.assert_array_equal(found.probabilities(values), made.probabilities(values))
    assert made.to_bytes() == found.to_bytes()
    for other in (
        Probe(made.neurons[:1], made.coefficients, 0.0, made.about),
        Probe(made.neurons, made.coefficients * np.nan, 0.0, made.about),
        Probe(made.neurons, made.coefficients, 0.0, {}),
    ):
        (tmp_path / NAME).write_bytes(other.to_bytes())
        with pytest.raises(RelneuronError, match=r"probe\.safetensors is no probe"):
            Probe.read(tmp_path / NAME)


# --- the stage ---------------------------------------------------------------------------------


def test_a_label_that_a_neuron_carries_is_found(loaded: Any, study: Path, plain: Any) -> None:
    rows = {row.neurons: row for row in fitted(loaded, study, top=5, random_seeds=3)}
    assert [*rows] == ["top", "random.0", "random.1", "random.2", "random.*"]
    top, together = rows["top"], rows["random.*"]
    assert (top.n_prompts, top.n_neurons) == (72, 5) and top.accuracy > 0.75 > top.chance
    others = [rows[f"random.{seed}"].accuracy for seed in range(3)]
    assert together.accuracy == pytest.approx(np.mean(others))
    assert together.sd_sets == pytest.approx(np.std(others, ddof=1)) and together.low is None
    made = Probe.read(study / "o" / NAME)
    assert [tuple(row) for row in made.neurons.tolist()] == TOP[:5]
    labels = (plain[:, 0, 41] > np.median(plain[:, 0, 41])).astype(np.int64)
    values = plain[:, [layer for layer, _ in TOP[:5]], [i for _, i in TOP[:5]]]
    wanted = LogisticRegression().fit(values, labels)
    np.testing.assert_allclose(made.coefficients, wanted.coef_[0], rtol=1e-3, atol=1e-4)
    table = rows_of(study / "o" / "probe_predictions.csv")
    assert [int(row["label"]) for row in table] == labels.tolist()
    right = [row["label"] == row["predicted"] for row in table]
    assert (
        np.mean(right) == top.accuracy == float(rows_of(study / "o" / "probe.csv")[0]["accuracy"])
    )
    assert made.about["scaling"] == "none"
    # The other model's rows have the other labels.
    (study / "m").mkdir()
    flipped = fitted(loaded, study, "m", top=5, random_seeds=0, mask="donor", above=0.0)
    assert len(flipped) == 1 and flipped[0].n_positive == 36
    # The same command, the same bytes.
    before = {path.name: path.read_bytes() for path in (study / "o").iterdir()}
    with pytest.raises(RelneuronError, match="exists"):
        fitted(loaded, study, top=5, random_seeds=3)
    for path in (study / "o").iterdir():
        path.unlink()
    fitted(loaded, study, top=5, random_seeds=3)
    assert {path.name: path.read_bytes() for path in (study / "o").iterdir()} == before


def test_a_probe_is_applied_to_other_prompts(
    relneuron: Any, model_folder: Path, study: Path, plain: Any
) -> None:
    labels, words = f"{study / 'c.csv'}:cost", ["probe", model_folder, study / "p.txt", "-o"]
    given = ["--neurons", study / "n.json", "--labels", labels, "--quiet", "--random-seeds", 1]
    with pytest.warns(UserWarning, match="has 6 such neurons, not 1500: all of them are read"):
        code, out, err = relneuron(*words, study / "o", *given)
    assert code == 0 and "chance" in out and "random.*" in out, err
    (study / "q.jsonl").write_text(
        "".join(json.dumps({"id": f"x{i}", "prompt": LINES[i]}) + "\n" for i in (9, 3, 60))
    )
    words[2] = study / "q.jsonl"
    assert relneuron(*words, study / "a", "--apply", study / "o" / NAME, "--quiet")[0] == 0
    made = Probe.read(study / "o" / NAME)
    values = plain[:, [layer for layer, _ in TOP], [i for _, i in TOP]]
    wanted = made.probabilities(values)
    rows = rows_of(study / "a" / "applied_predictions.csv")
    assert [row["id"] for row in rows] == ["x9", "x3", "x60"] and not rows[0]["label"]
    found = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(found, wanted[[9, 3, 60]], rtol=1e-4)
    assert not (study / "a" / "applied.csv").exists()
    # Prompts that are written in another way are said to be.
    words_of = [*words, study / "c", "--apply", study / "o" / NAME, "--quiet"]
    with pytest.warns(UserWarning, match="of prompts with another --template: None"):
        assert relneuron(*words_of, "--template", "Q: {prompt}")[0] == 0
    # With labels it is scored.
    words[2] = study / "p.txt"
    words += [study / "b", "--apply", study / "o" / NAME, "--labels", labels, "--quiet"]
    assert relneuron(*words)[0] == 0
    (row,) = rows_of(study / "b" / "applied.csv")
    cells = rows_of(study / "b" / "applied_predictions.csv")
    assert float(row["accuracy"]) == np.mean([cell["label"] == cell["predicted"] for cell in cells])
    assert row["neurons"] == "applied" and Manifest(study / "b").data["stages"]["probe_apply"]


def test_what_no_probe_is_made_of(
    relneuron: Any, model_folder: Path, study: Path, tmp_path: Path
) -> None:
    labels, words = f"{study / 'c.csv'}:cost", ["probe", model_folder, study / "p.txt", "-o"]
    words += [study / "o", "--quiet"]
    known = ["--neurons", study / "n.json"]
    for more, cause in (
        ([], "a probe learns labels from neurons"),
        (known, "a probe learns labels from neurons"),
        ([*known, "--labels", "c.csv"], "names no column of a csv"),
        ([*known, "--labels", labels, "--mask", "s"], "has no cost for 1, 2, 3 and 69 more"),
        ([*known, "--labels", labels, "--above", "9e9"], "0 are labelled 1: each label needs"),
        ([*known, "--labels", labels, "--folds", "40"], "36 are labelled 1: each label needs"),
        ([*known, "--labels", labels, "--set", "s"], "has no set 's'"),
        ([*known, "--labels", labels, "--chat-template"], "the tokenizer has no chat template"),
        (["--apply", study / "n.json"], "n.json is no probe"),
        (["--apply", study / NAME, "--top", "5"], "--top does something only without --apply"),
    ):
        check_refused(relneuron, study, cause, *words, *more)
    (study / "d.csv").write_text("id,y\n1,1\n1,0\n")
    twice = [*known, "--labels", f"{study / 'd.csv'}:y"]
    check_refused(relneuron, study, "line 3: a second number for 1", *words, *twice)
    for sets, cause in (
        ({"a": [(0, "gate", 1, 1.0)], "b": [(0, "gate", 1, 1.0)]}, "has several sets"),
        ({"a": [(0, "down", 1, 1.0)]}, "a has neurons of down"),
        ({"a": []}, "a has no neuron"),
        ({"a": [(0, "gate", i, 1.0) for i in range(30)]}, "not as many others for a random set"),
    ):
        NeuronFile({"id": "m", **SHAPE}, "x", sets, {}).write(study / "n.json")
        check_refused(relneuron, study, cause, *words, *known, "--labels", labels)
    # A probe of a larger model.
    large = Probe(np.array([[7, 3]]), np.ones(1), 0.0, {"model": {}})
    (study / NAME).write_bytes(large.to_bytes())
    cause = "reads neuron 3 of layer 7, which the model has not"
    check_refused(relneuron, study, cause, *words, "--apply", study / NAME)


def test_a_fit_that_is_cut_short_is_said(loaded: Any, study: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "relneuron.methods.contrast.probe.last_products",
        lambda *_, **__: np.random.default_rng(0).normal(size=(72, 6)) * np.geomspace(1e-3, 1e5, 6),
    )
    with pytest.warns(UserWarning, match="of 6 fits ended before they converged"):
        fitted(loaded, study, top=6, random_seeds=0)
    assert any("fits" in said for said in Manifest(study / "o").data["stages"]["probe"]["notices"])
