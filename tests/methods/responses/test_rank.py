"""The `identify` stage on recorded responses that are written here, with planted neurons.

--fdr must find those; significance.csv must hold what scikit-learn computes from the same draws.
"""

from __future__ import annotations

import csv
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.metrics import average_precision_score

from relneuron.artifact.files import RelneuronError, csv_bytes
from relneuron.artifact.prompts import Prompt, prompts_bytes
from relneuron.methods.responses import significance
from relneuron.methods.responses.labels import sample_labels, why_unranked
from relneuron.methods.responses.options import RankOptions
from relneuron.methods.responses.rank import identify
from relneuron.methods.responses.significance import resamples, seed_of, shuffled_labels

SHAPE = {"layers": 2, "width": 40, "hidden": 20}
PLANTED = [(0, "gate", 3), (1, "up", 39), (1, "down", 0)]


def write_record(folder: Path, known: tuple[str, ...] = ("a", "b", "noise")) -> Path:
    """What `record` leaves: 4 relations, 25 det prompts each, of `known` ones answered right.

    The neurons in PLANTED rank a's prompts first; those of b have an index that is one higher, or
    lower where there is none. No neuron tells the prompts of the relation noise from others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    relations = ("a", "b", "noise", "unknown")
    prompts = [
        Prompt(f"{relation}.{split}.{i}", relation, split, "en", "{}", f"S{i}", "o", f"S{i}")
        for relation in relations
        for split in ("det", "eva")
        for i in range(25)
    ]
    (folder / "prompts.jsonl").write_bytes(prompts_bytes(prompts))
    rows = [(p.id, "o", int(p.relation in known)) for p in prompts]
    (folder / "validated.csv").write_bytes(csv_bytes(("id", "prediction", "correct"), rows))
    rng = np.random.default_rng(3)
    sizes = {"gate": 40, "up": 40, "down": 20}
    values = {
        f"{site}.{layer}": rng.standard_normal((100, size)).astype(np.float32)
        for layer in range(2)
        for site, size in sizes.items()
    }
    for layer, site, index in PLANTED:
        values[f"{site}.{layer}"][:25, index] += 3
        values[f"{site}.{layer}"][25:50, index + 1 if index < 39 else 38] += 3
    # Some neurons are the same for all prompts.
    values["gate.0"][:, 10:20] = 0
    save_file(values, folder / "responses.safetensors")
    head = {"schema": "relneuron.study/1", "stages": {}, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(head | {"model": {"id": "m", **SHAPE}}))
    return folder


def run(folder: Path, **options: Any) -> tuple[Any, list[dict[str, str]]]:
    """identify's neuron file and the rows of significance.csv; fewer draws than usual."""
    few = {"permutations": 200, "bootstrap": 100, "noise": 20_000} | options
    result = identify(folder, folder / "neurons.json", RankOptions(**few), force=True, quiet=True)
    with (folder / "significance.csv").open(newline="") as file:
        return result, list(csv.DictReader(file))


def test_fdr_finds_the_planted_neurons(tmp_path: Path) -> None:
    result, rows = run(write_record(tmp_path), fdr=0.02)
    assert {neuron[:3] for neuron in result.sets["a"]} == set(PLANTED)
    assert {neuron[:3] for neuron in result.sets["b"]} == {
        (0, "gate", 4),
        (1, "up", 38),
        (1, "down", 1),
    }
    found = result.selection["a"]
    assert (found["positives"], found["negatives"], found["fdr"]) == (25, 50, 0.02)
    assert found["ties_at_cut"] == found["ties_chosen"] and found["q_at_cut"] <= 0.02
    # 200 neurons, no p below 1 / 20,001: one neuron alone can pass.
    assert found["fdr_resolution"] == 1
    assert result.sets["noise"] == [] == result.sets["unknown"]
    assert result.selection["noise"]["reason"].startswith("none has q <= 0.02, the lowest is")
    assert result.selection["unknown"] == {"reason": "no correct det prompt"}
    assert {row["relation"] for row in rows} == {"a", "b"}
    assert all(float(row["q_value"]) <= 0.02 for row in rows)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert "top" not in manifest["stages"]["identify"]
    assert set(manifest["stages"]["identify"]["files"]) <= set(manifest["files"])
    # A larger rate takes the same neurons and more, in the order of --top.
    more, _ = run(tmp_path, fdr=0.9)
    everything, rows = run(tmp_path, top=200)
    n_passed = sum(row["relation"] == "a" and float(row["q_value"]) <= 0.9 for row in rows)
    assert len(more.sets["a"]) == n_passed > 3
    assert more.sets["a"] == everything.sets["a"][:n_passed]


def test_few_columns_of_noise_resolve_large_sets_only(tmp_path: Path) -> None:
    result, _ = run(write_record(tmp_path), fdr=0.05, noise=800)
    # 200 / 801 / 0.05
    assert result.selection["a"]["fdr_resolution"] == 5
    assert result.sets["a"] == []


def test_the_table_holds_what_others_compute(tmp_path: Path) -> None:
    result, rows = run(write_record(tmp_path), top=30)
    keys = [[row["relation"], int(row["layer"]), row["site"], int(row["index"])] for row in rows]
    assert keys == [
        [name, *neuron[:3]] for name, chosen in result.sets.items() for neuron in chosen
    ]
    scores = [neuron[3] for chosen in result.sets.values() for neuron in chosen]
    assert [float(row["score"]) for row in rows] == scores
    values = load_file(tmp_path / "responses.safetensors")
    relation_of = [name for name in ("a", "b", "noise", "unknown") for _ in range(25)]
    valid = [name != "unknown" for name in relation_of]
    labels = sample_labels(("a", "b", "noise", "unknown"), relation_of, valid)
    for number in (0, 29, 45, 85):
        row, (name, layer, site, index) = rows[number], keys[number]
        own = labels[["a", "b", "noise"].index(name)]
        kept, own = own >= 0, own[own >= 0]
        column = values[f"{site}.{layer}"][kept, index]
        shuffled = shuffled_labels(own, 200, seed_of("permutations", 0, name))
        null = np.array([average_precision_score(s, column) for s in shuffled], np.float32)
        assert float(row["p_permutation"]) == pytest.approx(
            (1 + (null >= float(row["score"])).sum()) / 201, rel=1e-5
        )
        weights = resamples(own, 100, seed_of("bootstrap", 0, name))
        drawn = [average_precision_score(own, column, sample_weight=w) for w in weights]
        ends = [float(row["ap_low"]), float(row["ap_high"])]
        np.testing.assert_allclose(ends, np.quantile(drawn, [0.025, 0.975]), rtol=1e-5)
    assert float(rows[29]["q_value"]) == pytest.approx(result.selection["a"]["q_at_cut"], rel=1e-5)


def test_the_same_bytes_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("neurons.json", "significance.csv", "scores.safetensors", "labels.csv")
    run(write_record(tmp_path), fdr=0.3)
    first = {name: (tmp_path / name).read_bytes() for name in (*names, "manifest.json")}
    run(tmp_path, fdr=0.3)
    for name, data in first.items():
        assert (tmp_path / name).read_bytes() == data, name
    monkeypatch.setattr(significance, "BLOCK_BYTES", 200_000)
    monkeypatch.setattr(significance, "WAITING_BYTES", 1)
    run(tmp_path, fdr=0.3)
    for name in names:
        assert (tmp_path / name).read_bytes() == first[name], name


def test_shuffles_and_resamples_are_held_of_no_relation_that_waits() -> None:
    labels = np.tile(np.array([1, 0, 0, 0, 0], np.int8), 200)
    tracemalloc.start()
    try:
        waiting = [
            significance.Significance(str(i), labels, [(0, "gate", 0, 0.5)], None, 1000, 1000, 0)
            for i in range(20)
        ]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(waiting) == 20
    assert held < 2 * 1000 * labels.size  # bytes that one relation's take


def test_what_is_not_asked_for_is_an_empty_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(tmp_path)
    for name, columns in (
        ("permutations", ["p_permutation"]),
        ("noise", ["q_value"]),
        ("bootstrap", ["ap_low", "ap_high"]),
    ):
        result, rows = run(tmp_path, top=5, **{name: 0})
        assert len(rows) == 15
        for row in rows:
            assert [key for key, cell in row.items() if not cell] == columns
        assert ("q_at_cut" in result.selection["a"]) == (name != "noise")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(RelneuronError, match="scipy"):
        run(tmp_path, top=5)
    _, rows = run(tmp_path, top=5, noise=0, permutations=0, bootstrap=0)
    assert {cell for row in rows for cell in list(row.values())[5:]} == {""}


def test_a_relation_without_positives_or_negatives_has_its_reason(tmp_path: Path) -> None:
    labels = sample_labels(("a", "b"), ["a", "a", "b"], [True, True, False])
    assert why_unranked(labels[0]) == "no negatives: no other relation has a correct det prompt"
    assert why_unranked(labels[1]) == "no correct det prompt"
    assert why_unranked(np.array([1, 0, -1], np.int8)) is None
    write_record(tmp_path, known=("a",))
    with pytest.raises(RelneuronError, match="a: no negatives.*; b: no correct det prompt"):
        run(tmp_path)
    assert not (tmp_path / "neurons.json").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_responses_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    path = write_record(tmp_path) / "responses.safetensors"
    values = load_file(path)
    values["up.1"][99, 7] = value
    save_file(values, path)
    with pytest.raises(RelneuronError, match="layer 1, up are not all finite"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"top": 5, "fdr": 0.05}, "--top and --fdr"),
        ({"fdr": 0.0}, "above 0 and below 1"),
        ({"fdr": 1.0}, "above 0 and below 1"),
        ({"fdr": float("nan")}, "--fdr nan is not finite"),
        ({"fdr": 0.05, "noise": 0}, "more columns of noise"),
        ({"fdr": 0.05, "noise": 18}, "more columns of noise"),
        ({"permutations": -1}, "--permutations"),
        ({"bootstrap": -1}, "--bootstrap"),
        ({"noise": -1}, "--noise"),
        ({"ends": "middle"}, "unknown --ends 'middle'"),
        ({"ends": "both", "fdr": 0.05}, "--fdr chooses among the highest scores"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], cause: str) -> None:
    defaults: dict[str, Any] = {"top": None, "fdr": None}
    defaults |= {"permutations": 10, "bootstrap": 10, "noise": 1000}
    with pytest.raises(RelneuronError, match=cause) as error:
        RankOptions(**(defaults | options))
    assert error.value.exit_code == 2
    RankOptions(**(defaults | {"fdr": 0.05, "noise": 19}))


def test_both_ends_of_the_ranking(tmp_path: Path) -> None:
    top, _ = run(write_record(tmp_path), top=200)
    order = top.sets["a"]  # all 200 neurons, the best first
    flat = {tuple(n[:3]): n[3] for n in order}
    site = {"gate": 0, "up": 1, "down": 2}
    ascending = sorted(flat, key=lambda n: (flat[n], n[0], site[n[1]], n[2]))
    bottom, rows = run(tmp_path, top=30, ends="bottom")
    assert [n[:3] for n in bottom.sets["a"]] == ascending[:30]
    about = bottom.selection["a"]
    assert about["ends"] == "bottom" and about["score_at_cut"] == bottom.sets["a"][-1][3]
    both, both_rows = run(tmp_path, top=41, ends="both")
    assert both.sets["a"] == order[:21] + bottom.sets["a"][:20]
    about = both.selection["a"]
    assert (about["score_at_cut"], about["lowest"]["score_at_cut"]) == (
        order[20][3],
        both.sets["a"][-1][3],
    )
    assert about["lowest"]["neurons"] == 20
    inputs = json.loads((tmp_path / "manifest.json").read_text())["stages"]["identify"]["inputs"]
    assert inputs["ends"] == "both"
    # p of a neuron that is low: how often shuffled labels are as low.
    values = load_file(tmp_path / "responses.safetensors")
    relation_of = [name for name in ("a", "b", "noise", "unknown") for _ in range(25)]
    valid = [name != "unknown" for name in relation_of]
    own = sample_labels(("a", "b", "noise", "unknown"), relation_of, valid)[0]
    kept, own = own >= 0, own[own >= 0]
    shuffled = shuffled_labels(own, 200, seed_of("permutations", 0, "a"))
    for row in (rows[0], rows[29], both_rows[21], both_rows[40], both_rows[20]):
        assert row["relation"] == "a"
        column = values[f"{row['site']}.{row['layer']}"][kept, int(row["index"])]
        null = np.array([average_precision_score(s, column) for s in shuffled], np.float32)
        score = np.float32(row["score"])
        n = (null >= score).sum() if row is both_rows[20] else (null <= score).sum()
        assert float(row["p_permutation"]) == pytest.approx((1 + n) / 201, rel=1e-5)
    assert both_rows[21]["q_value"] == rows[0]["q_value"]
    # More than there are: each neuron once.
    everything, _ = run(tmp_path, top=999, ends="both")
    assert len({n[:3] for n in everything.sets["a"]}) == len(everything.sets["a"]) == 200


def test_neurons_that_all_tie_are_chosen_once(tmp_path: Path) -> None:
    path = write_record(tmp_path) / "responses.safetensors"
    save_file({key: np.zeros_like(v) for key, v in load_file(path).items()}, path)
    result, _ = run(tmp_path, top=10, ends="both")
    assert [n[:3] for n in result.sets["a"]] == [(0, "gate", i) for i in range(10)]
