"""Neurons of facts in the files of other authors: in, out, and what is none of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.methods.gradients.authors_files import read_facts
from relneuron.texts.options import PromptsOptions
from relneuron.texts.prompts import write_prompts
from relneuron.texts.queries import read_queries

Run = Callable[..., tuple[int, str, str]]

SHAPE = {"layers": 2, "width": 48, "hidden": 32}
KN = {"u1": [[0, 5], [1, 47]], "u2": []}
QRNCA = [
    {"uuid": "u1", "neurons": [[0, 5], [1, 47]], "scores": [0.5, 0.25]},
    {"uuid": "u2", "neurons": [], "scores": []},
]


def written(path: Path, value: Any) -> Path:
    lines = [json.dumps(line) for line in value] if isinstance(value, list) else [json.dumps(value)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_both_forms_are_read_and_written(
    relneuron: Run, model_folder: Path, tmp_path: Path
) -> None:
    for name, value, method in (("f.json", KN, "knowledge_neurons"), ("f.jsonl", QRNCA, "qrnca")):
        source, folder = written(tmp_path / name, value), tmp_path / method
        neurons = folder / "neurons.json"
        code, out, err = relneuron("import", source, "--model", model_folder, "-o", neurons)
        assert code == 0 and "2 facts, 2 neurons" in out, err
        found = NeuronFile.read(neurons)
        scores = (0.5, 0.25) if method == "qrnca" else (0.0, 0.0)
        both = [(0, "gate", 5, scores[0]), (1, "gate", 47, scores[1])]
        assert found.sets == {"u1": both, "u2": []} and found.method == method
        assert Manifest(folder).data["stages"]["import"]["files"] == ["neurons.json"]
        code, _, err = relneuron("export", neurons, "-o", folder / name)
        assert code == 0, err
        read = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        assert (read if method == "qrnca" else read[0]) == value
        assert relneuron("export", neurons, "-o", folder / name)[0] == 2  # it exists


def test_sets_of_facts_are_written_under_their_uuid(relneuron: Run, tmp_path: Path) -> None:
    def exported(*names: str) -> list[str]:
        sets = {name: [(0, "up", 1, 0.5)] for name in names}
        NeuronFile(SHAPE, "qrnca", sets, {}).write(tmp_path / "n.json")
        assert (
            relneuron("export", tmp_path / "n.json", "-o", tmp_path / "o.json", "--force")[0] == 0
        )
        return list(json.loads((tmp_path / "o.json").read_text()))

    assert exported("r/u1", "s/u2") == ["u1", "u2"]
    assert exported("r/u1", "s/u1") == ["r/u1", "s/u1"]
    assert exported("r", "s/u1") == ["r", "u1"]


def test_outputs_are_not_a_neuron_alone(relneuron: Run, tmp_path: Path) -> None:
    NeuronFile(SHAPE, "ap", {"r": [(0, "down", 1, 0.5)]}, {}).write(tmp_path / "n.json")
    code, _, err = relneuron("export", tmp_path / "n.json", "-o", tmp_path / "o.json")
    assert code == 1 and "at no site gate or up" in err and not (tmp_path / "o.json").exists()


def test_prompts_become_their_sentences(relneuron: Run, fact_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    facts = fact_folder / "lives_in.json"
    asked = write_prompts(facts, prompts, PromptsOptions(eva=8, choices=3))
    code, _, err = relneuron("export", prompts, "-o", tmp_path / "q.json")
    assert code == 0, err
    found = read_queries(tmp_path / "q.json")
    assert [(p.relation, p.subject, p.object, p.prompt, p.options) for p in found] == [
        (p.relation, p.subject, p.object, p.prompt, p.options) for p in asked
    ]
    assert "does not end in .json" in relneuron("export", prompts, "-o", tmp_path / "q.csv")[2]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("f.json", [], "is no object"),
        ("f.json", {}, "holds no fact"),
        ("f.json", {"": []}, "a fact without a name"),
        ("f.json", {"u": {}}, "'u': its neurons are no list"),
        ("f.json", {"u": [[0]]}, "no list of"),
        ("f.json", {"u": [[0, 1.0]]}, "no list of"),
        ("f.json", {"u": [[0, True]]}, "no list of"),
        ("f.json", {"u": [[2, 0]]}, "'u': neuron .layer 2, site 'gate', index 0. is not in"),
        ("f.json", {"u": [[0, 48]]}, "index 48"),
        ("f.json", {"u": [[0, -1]]}, "index -1"),
        ("f.jsonl", [3], "line 1 is no object"),
        ("f.jsonl", [{"neurons": []}], "line 1: a fact without a name"),
        ("f.jsonl", [QRNCA[0], QRNCA[0]], "line 2: a fact without a name of its own"),
        ("f.jsonl", [{"uuid": "u", "neurons": [[0, 1]], "scores": []}], "not one a neuron"),
        ("f.jsonl", [{"uuid": "u", "neurons": [[0, 1]], "scores": ["1"]}], "not one a neuron"),
        ("f.jsonl", [{"uuid": "u", "neurons": [[0, 1]], "scores": "1"}], "not one a neuron"),
    ],
)
def test_what_is_no_such_file_is_named(tmp_path: Path, name: str, value: Any, said: str) -> None:
    path = tmp_path / name
    path.write_text("[]") if value == [] else written(path, value)
    with pytest.raises(RelneuronError, match=said):
        read_facts(path, SHAPE)


def test_a_pickle_still_goes_to_its_own_reader(
    relneuron: Run, model_folder: Path, tmp_path: Path
) -> None:
    words = ["--model", model_folder, "-o", tmp_path / "n.json"]
    assert "add --names" in relneuron("import", tmp_path / "x.neuron.pth", *words)[2]
    code, _, err = relneuron("import", tmp_path / "x.json", *words, "--names", "a")
    assert code == 2 and "--names does something only with a .neuron.pth" in err
    assert "does not exist" in relneuron("import", tmp_path / "x.json", *words)[2]
