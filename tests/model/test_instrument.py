"""`relneuron.ablate` takes a file of neurons, its path, a data frame or triples: one result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

import relneuron
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import NeuronFile

SHAPE = {"layers": 3, "width": 48, "hidden": 32}
SETS = {
    "one": [(0, "gate", 5, 1.0), (2, "up", 40, 0.9), (1, "q", 3, 0.8)],
    "other": [(1, "down", 31, 0.7)],
}


def logits(model: Any, *given: Any, **options: Any) -> torch.Tensor:
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad(), relneuron.ablate(model, *given, **options):
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def test_a_file_a_path_and_a_frame_switch_off_the_same(llama: Any, tmp_path: Path) -> None:
    file = NeuronFile(SHAPE, "ap", SETS, {})
    file.write(tmp_path / "neurons.json")
    rows = [(name, *row) for name, chosen in SETS.items() for row in chosen]
    frame = pandas.DataFrame(rows, columns=["set", "layer", "site", "index", "score"])
    one = logits(llama, [row[:3] for row in SETS["one"]])
    both = logits(llama, [*SETS["one"], *SETS["other"]])
    assert not torch.equal(one, both)
    for given in (file, tmp_path / "neurons.json", str(tmp_path / "neurons.json"), frame):
        assert torch.equal(logits(llama, given, sets="one"), one)
        assert torch.equal(logits(llama, given, sets=["one", "other"]), both)
    assert torch.equal(logits(llama, frame), both)
    scaled = logits(llama, frame[frame["set"] == "one"], mode="scale", value=0.5)
    assert torch.equal(scaled, logits(llama, SETS["one"], mode="scale", value=0.5))


def test_a_file_of_another_model_is_refused(llama: Any) -> None:
    file = NeuronFile(SHAPE | {"width": 50}, "ap", {"one": SETS["other"]}, {})
    with pytest.raises(RelneuronError, match="the neurons are of a model of shape"):
        logits(llama, file)
    with pytest.raises(RelneuronError, match="the neurons are 2 sets: one, other"):
        logits(llama, NeuronFile(SHAPE, "ap", SETS, {}))
