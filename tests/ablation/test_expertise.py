"""expertise.csv and the modes p50, p90 and off_mean, from a recorded study of the tiny model.

The numbers are numpy's and scikit-learn's on the recorded rows that labels.csv names; what
`ablate` makes of them is what plain hooks make.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score

from relneuron.ablation.expertise import _MODULES, _units, export_expertise, statistic
from relneuron.ablation.options import AblateOptions
from relneuron.analyses.page import off
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import random_neurons
from relneuron.study.settings import RunOptions
from tests.kit.files import read_rows
from tests.kit.hooked import RELATIONS, SHAPE, TOP, Hooked, Study

SITES = ("gate", "up", "down")
AUTHORS = ["ap", "off_mean", "off_p50", "on_p50", "on_p90", "layer", "unit", "uuid"]
AUTHORS += ["concept", "group"]


@pytest.fixture(scope="module")
def study(
    model_folder: Path, fact_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Study]:
    yield Study(model_folder, fact_folder, tmp_path_factory.mktemp("expertise"))


def labelled(study: Study) -> dict[str, tuple[list[int], list[int]]]:
    """The rows of the positives and of the negatives by relation; "": all of them, twice."""
    order = [p.id for p in study.prompts.values() if p.split == "det"]
    found: dict[str, tuple[list[int], list[int]]] = {name: ([], []) for name in RELATIONS}
    for row in read_rows(study.folder / "labels.csv"):
        found[row["relation"]][row["label"] == "0"].append(order.index(row["id"]))
    used = sorted({row for sides in found.values() for side in sides for row in side})
    return found | {"": (used, used)}


def plain(values: np.ndarray[Any, Any], mode: str, rows: tuple[list[int], list[int]]) -> Any:
    """What numpy says of responses (N, K) in float64."""
    on, off = values[rows[0]].astype(np.float64), values[rows[1]].astype(np.float64)
    return {
        "on_p50": np.quantile(on, 0.5, axis=0),
        "on_p90": np.quantile(on, 0.9, axis=0),
        "off_p50": np.quantile(off, 0.5, axis=0),
        "off_mean": off.mean(0),
    }[mode]


@pytest.mark.parametrize("source", ["folder", "neurons.json"])
def test_expertise_is_what_others_compute(
    relneuron: Any, study: Study, tmp_path: Path, source: str
) -> None:
    given = study.folder if source == "folder" else study.folder / "neurons.json"
    output = tmp_path / "expertise.csv"
    code, out, err = relneuron("export", given, "-o", output)
    assert (code, err) == (0, "") and "expertise_info.json" in out
    rows, recorded, labels = read_rows(output), None, labelled(study)
    recorded = load_file(study.folder / "responses.safetensors")
    assert list(rows[0]) == AUTHORS and len(rows) == 3 * 256
    infos = json.loads((tmp_path / "expertise_info.json").read_text())
    for name, info in zip(RELATIONS, infos, strict=True):
        own = [row for row in rows if row["concept"] == name]
        assert [int(row["uuid"]) for row in own] == list(range(256))
        assert {row["group"] for row in own} == {"relation"}
        # As the authors sort them: down before gate before up, in each layer.
        assert list(dict.fromkeys(row["layer"] for row in own)) == info["layer_names"]
        assert info["layer_names"] == [
            f"model.layers.{layer}.mlp.{site}_proj:0"
            for layer in range(2)
            for site in sorted(SITES)
        ]
        on, off = labels[name]
        y = [1] * len(on) + [0] * len(off)
        aps = []
        for row in own:
            layer, site = row["layer"].split(".")[2], row["layer"].split(".")[4].split("_")[0]
            column = recorded[f"{site}.{layer}"][:, [int(row["unit"])]]
            ap = average_precision_score(y, column[on + off, 0])
            np.testing.assert_allclose(np.float32(row["ap"]), np.float32(ap), rtol=2e-7)
            aps.append(float(np.float32(row["ap"])))
            for key in ("on_p50", "on_p90", "off_p50", "off_mean"):
                wanted = np.float32(plain(column, key, labels[name])[0])
                assert abs(np.float32(row[key]) - wanted) <= 1e-6 * max(1, abs(wanted))
        assert info["concept"] == name and info["total_neurons"] == 256
        assert info["max_ap"] == max(aps) and len(info["neurons_at_ap"]) == 501
        for text in ("0.50000", "0.75000", "1.00000"):
            assert info["neurons_at_ap"][text] == sum(ap > float(text) for ap in aps)
    assert relneuron("export", given, "-o", output)[0] == 2  # it is there


def test_a_folder_gets_the_authors_layout(relneuron: Any, study: Study, tmp_path: Path) -> None:
    assert relneuron("export", study.folder, "-o", tmp_path / "out")[0] == 0
    whole = export_expertise(study.folder, tmp_path / "all.csv")[0]
    rows = read_rows(whole)
    for name in RELATIONS:
        inside = tmp_path / "out" / "relation" / name / "expertise"
        with (inside / "expertise.csv").open(newline="") as file:
            assert list(csv.DictReader(file)) == [r for r in rows if r["concept"] == name]
        info = json.loads((inside / "expertise_info.json").read_text())
        assert info["concept"] == name
        # As the authors' code counts it.
        ap = np.array([float(r["ap"]) for r in rows if r["concept"] == name])
        assert info["neurons_at_ap"] == {
            f"{a:0.5f}": int(np.sum(ap > a)) for a in np.linspace(0.5, 1.0, 501)
        }


def test_modules_are_in_the_order_of_their_names() -> None:
    names = [name for name, *_ in _units(_MODULES, SHAPE | {"layers": 12})]
    assert names == sorted(names) and names.index("model.layers.10.mlp.down_proj:0") < names.index(
        "model.layers.2.mlp.down_proj:0"
    )
    packed = {"gate": ["m.{}.gate_up_proj", 0], "up": ["m.{}.gate_up_proj", 9]}
    units = _units(packed | {"down": ["m.{}.down_proj", 0]}, SHAPE | {"layers": 1})
    assert units == [
        ("m.0.down_proj:0", 0, (0, "down")),
        ("m.0.gate_up_proj:0", 0, (0, "gate")),
        ("m.0.gate_up_proj:0", 9, (0, "up")),
    ]


def test_statistics_of_few_values() -> None:
    values = np.array([[1.0], [2.0], [3.0], [10.0]], np.float32)
    found = {name: float(statistic(values, name)[0]) for name in ("on_p50", "on_p90", "off_mean")}
    assert found == {"on_p50": 2.5, "on_p90": pytest.approx(7.9), "off_mean": 4.0}


@pytest.mark.parametrize("mode", ["p50", "p90", "off_mean"])
def test_neurons_at_these_values_are_those_of_plain_hooks(
    study: Study, tmp_path: Path, mode: str
) -> None:
    rows = study.ablate(tmp_path, mode=mode)
    recorded, labels = load_file(study.folder / "responses.safetensors"), labelled(study)
    key = {"p50": "on_p50", "p90": "on_p90", "off_mean": "off_mean"}[mode]
    sets = {**study.sets, "random.0": random_neurons(SHAPE, TOP, 0)}
    hooked, differ = Hooked(study), 0
    for condition, neurons in sets.items():
        own = labels.get(condition, labels[""])

        def change(
            out: torch.Tensor, where: tuple[int, str], index: torch.Tensor, own: Any = own
        ) -> torch.Tensor:
            values = plain(recorded[f"{where[1]}.{where[0]}"], key, own)
            return torch.from_numpy(values.astype(np.float32))[index]

        with hooked.changing(neurons, change):
            for (name, prompt), row in rows.items():
                if name == condition:
                    text, logprob = hooked.answer(study.prompts[prompt], cached=True)
                    assert row["prediction"] == text, (condition, prompt)
                    assert abs(float(row["logprob"]) - logprob) <= 1e-5, (condition, prompt)
                    differ += row["logprob"] != rows["clean", prompt]["logprob"]
    assert differ > len(rows) / 2
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    inputs = manifest["stages"]["ablate"]["inputs"]
    words = {"p50": "at their median over", "p90": "at their 90th percentile over"}
    assert inputs["mode"] == mode and words.get(mode, "at their mean over what") in off(manifest)
    assert {"labels.csv", "prompts.jsonl", "responses.safetensors"} <= set(inputs["beside"])


def test_what_has_no_value_is_refused(study: Study, tmp_path: Path) -> None:
    path = study.write_sets(tmp_path / "n" / "neurons.json", {"other": study.sets["works_as"]})
    with pytest.raises(RelneuronError, match="labels.csv does not exist"):
        study.ablate(tmp_path / "o", neurons=path, mode="p50", any_set=True)
    for name in ("labels.csv", "prompts.jsonl", "responses.safetensors"):
        (path.parent / name).write_bytes((study.folder / name).read_bytes())
    with pytest.raises(RelneuronError, match="no positives and negatives of other: --mode p90"):
        study.ablate(tmp_path / "o", neurons=path, mode="p90", any_set=True)
    assert not (tmp_path / "o").exists()
    with pytest.raises(RelneuronError, match="unknown --mode 'p80'") as caught:
        AblateOptions(mode="p80")
    assert "p50, p90, off_mean" in caught.value.fix
    with pytest.raises(RelneuronError, match="--mode p50 takes its values from the responses"):
        RunOptions(mode="p50", drop_responses=True)
