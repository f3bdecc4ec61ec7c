"""Neurons from a file, its path, a frame or rows: the same ones, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from relneuron.artifact.chosen import choose_neurons
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile

SHAPE = {"layers": 2, "width": 9, "hidden": 4}
ONE = [(1, "gate", 3, 0.9), (0, "down", 2, 0.5)]
OTHER = [(0, "up", 8, 0.7)]


def neuron_file(**sets: Any) -> NeuronFile:
    return NeuronFile(SHAPE, "ap", sets, {})


def triples(found: Any) -> list[tuple[int, str, int]]:
    return [tuple(row[:3]) for row in found.rows]


def frame(*sets: tuple[str, list[Any]]) -> pandas.DataFrame:
    rows = [(name, *neuron) for name, neurons in sets for neuron in neurons]
    return pandas.DataFrame(rows, columns=["set", "layer", "site", "index", "score"])


def test_all_forms_are_the_same_neurons(tmp_path: Path) -> None:
    file = neuron_file(one=ONE, other=OTHER)
    file.write(tmp_path / "neurons.json")
    table = frame(("one", ONE), ("other", OTHER))
    plain = {name: table[name].to_numpy() for name in table.columns}
    expected = [(1, "gate", 3), (0, "down", 2)]
    for given in (file, tmp_path / "neurons.json", str(tmp_path / "neurons.json"), table, plain):
        for sets in ("one", ["one"]):
            assert triples(choose_neurons(given, sets)) == expected
        assert triples(choose_neurons(given, ["other", "one"])) in (
            [(0, "up", 8), *expected],
            [*expected, (0, "up", 8)],  # rows of a frame keep their order
        )
    assert triples(choose_neurons(ONE)) == triples(choose_neurons(iter(ONE))) == expected
    assert triples(choose_neurons(table)) == [*expected, (0, "up", 8)]
    assert triples(choose_neurons(table[table["score"] < 0.8][["index", "site", "layer"]])) == [
        (0, "down", 2),
        (0, "up", 8),
    ]
    assert choose_neurons(file, "one").file is file
    assert choose_neurons(table).file is None


def test_one_set_needs_no_name_and_several_do() -> None:
    assert triples(choose_neurons(neuron_file(other=OTHER))) == [(0, "up", 8)]
    for sets in ({"one": ONE, "other": OTHER}, {}):
        with pytest.raises(RelneuronError, match="the neurons are [02] sets") as error:
            choose_neurons(neuron_file(**sets))
        assert error.value.fix.startswith("say which")


@pytest.mark.parametrize(
    ("given", "sets", "cause"),
    [
        (neuron_file(one=ONE), "on", "no set 'on'"),
        (frame(("one", ONE)), ["one", "x"], "no set 'x'"),
        (frame(("one", ONE)).drop(columns=["set"]), "one", "no column 'set'"),
        (frame(("one", ONE)).drop(columns=["site", "index"]), None, "lacks the column site, index"),
        (ONE, "one", "sets does something only with a file or a frame"),
        ({"layer": [0.5], "site": ["up"], "index": [1]}, None, "column layer .* no whole number"),
        ({"layer": [0], "site": ["up"], "index": [np.nan]}, None, "column index .* no whole"),
        ({"layer": ["a"], "site": ["up"], "index": [1]}, None, "column layer .* no whole number"),
    ],
)
def test_what_is_refused(given: Any, sets: Any, cause: str) -> None:
    with pytest.raises(RelneuronError, match=cause):
        choose_neurons(given, sets)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "neurons.json"
    neuron_file(one=ONE).write(path)
    Manifest(tmp_path).finish("identify", {}, [path], reads=[])
    path.write_text(path.read_text().replace("0.9", "0.8"))
    with pytest.raises(RelneuronError, match="is not the file that was written by identify"):
        choose_neurons(path)


def test_numpy_and_empty_frames() -> None:
    table = frame(("one", ONE)).astype({"layer": np.int8, "index": np.float32})
    assert triples(choose_neurons(table)) == [(1, "gate", 3), (0, "down", 2)]
    assert choose_neurons(frame()).rows == []
