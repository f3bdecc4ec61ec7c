"""The files of gradients: what is written is read back, sums of groups, damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.gradients import ABOUT, FILES, IG, RELEVANCE, GradientFile, Gradients

SHAPE = {"layers": 3, "width": 5, "hidden": 4}
ABOUT_FOUR = {
    "ids": ["a.0", "b.0", "a.1", "c.0"],
    "relations": ["a", "b", "a", "c"],
    "targets": [[1], [2, 3], [1], [4]],
    "steps": 20,
}


def written(folder: Path, method: str) -> tuple[Path, dict[str, Any]]:
    """A file of four sentences, stored in two batches, and what was stored."""
    rng = np.random.default_rng(0)
    path = folder / FILES[method]
    names = {method: (4, 3, 5)}
    names |= (
        {"probability": (4,), "probability_at_baseline": (4, 3)}
        if method == IG
        else {"value": (4,)}
    )
    found = {name: rng.normal(size=size).astype(np.float32) for name, size in names.items()}
    file = GradientFile(path, method, SHAPE, ABOUT_FOUR)
    for rows in ([2, 0], [1, 3]):
        file.store(rows, {name: values[rows] for name, values in found.items()})
    file.flush()
    return path, found


@pytest.mark.parametrize("method", FILES)
def test_what_is_written_is_read_back(tmp_path: Path, method: str) -> None:
    path, stored = written(tmp_path, method)
    found = Gradients.read(path, method)
    assert (found.ids, found.relations) == (ABOUT_FOUR["ids"], ABOUT_FOUR["relations"])
    assert found.targets == ABOUT_FOUR["targets"] and found.about["steps"] == 20
    assert (found.n_layers, found.width) == (3, 5)
    for name, values in found.beside.items():
        np.testing.assert_array_equal(values, stored[name])
    scores = dict(found.scores())
    assert list(scores) == [0, 1, 2, 3]
    np.testing.assert_array_equal(np.stack(list(scores.values())), stored[method])
    assert [row for row, _ in found.scores([3, 1])] == [3, 1]


def test_the_sums_of_groups_are_over_their_sentences(tmp_path: Path) -> None:
    path, stored = written(tmp_path, RELEVANCE)
    scores = stored[RELEVANCE].astype(np.float64)
    sums = Gradients.read(path, RELEVANCE).group_sums(["c", "a"])
    assert sums["sentences"].tolist() == [1, 2]
    own = scores[[0, 2]]
    np.testing.assert_allclose(sums["signed"], [scores[3], own.sum(0)], rtol=1e-15)
    np.testing.assert_allclose(sums["positive"][1], np.where(own > 0, own, 0).sum(0), rtol=1e-15)
    np.testing.assert_allclose(sums["absolute"][1], np.abs(own).sum(0), rtol=1e-15)
    every = Gradients.read(path, RELEVANCE).group_sums()
    assert every["sentences"].tolist() == [2, 1, 1]  # a, b, c, as the file has them


def test_the_digest_of_rows_is_of_all_their_tensors(tmp_path: Path) -> None:
    written(tmp_path, IG)
    file = GradientFile(tmp_path / FILES[IG], IG, SHAPE, ABOUT_FOUR)
    before = file.digest([0, 2])
    file.store([1], {"probability": np.float32([9])})
    assert file.digest([0, 2]) == before
    file.store([2], {"probability": np.float32([9])})
    assert file.digest([0, 2]) != before


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"method": RELEVANCE}, "does not say that it is one"),
        ({"ids": ["a"]}, "its ids, relations and targets are not one of each a sentence"),
        ({"targets": None}, "its ids, relations and targets are not one of each a sentence"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, change: dict[str, Any], cause: str) -> None:
    path = tmp_path / FILES[IG]
    about = {"method": IG, **ABOUT_FOUR, **change}
    tensors = {IG: np.zeros((4, 3, 5), np.float32), "probability": np.zeros(4, np.float32)}
    tensors["probability_at_baseline"] = np.zeros((4, 3), np.float32)
    save_file(tensors, path, {ABOUT: json.dumps(about)})
    with pytest.raises(RelneuronError, match=cause) as raised:
        Gradients.read(path, IG)
    assert "--method ig" in raised.value.fix


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / FILES[IG]
    tensors = {IG: np.zeros((4, 3, 5), np.float32), "probability": np.zeros(3, np.float32)}
    save_file(tensors, path, {ABOUT: json.dumps({"method": IG, **ABOUT_FOUR})})
    with pytest.raises(RelneuronError, match=r"probability is F32\[3\]"):
        Gradients.read(path, IG)
