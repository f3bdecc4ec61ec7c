"""Neurons from a contrast: E3, ties, windows, layers left out, groups, other files, bad folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from relneuron.artifact.contrast import NAME
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.methods.contrast.choices import ChangeOptions
from relneuron.methods.contrast.rank import identify_contrast, ranking
from tests.kit.contrasted import M1, M2, contrast_of, write_contrast

Places = list[tuple[int, int]]


def chosen(folder: Path, name: str = "contrast", **asked: Any) -> Places:
    """The (layer, index) of a set, which is at the site gate."""
    path = folder / "neurons.json"
    found = identify_contrast(folder, path, ChangeOptions(**asked), force=True)
    assert NeuronFile.read(path) == found
    assert {site for rows in found.sets.values() for _, site, *_ in rows} <= {"gate"}
    return [(layer, index) for layer, _, index, _ in found.sets[name]]


@pytest.fixture
def e3(tmp_path: Path) -> Path:
    return write_contrast(tmp_path / "e3")


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Two groups of random tokens, 3 layers of 20 neurons."""
    rng = np.random.default_rng(0)
    groups = {
        name: tuple(rng.normal(size=(2, n, 3, 20)).astype(np.float32))
        for name, n in (("x", 30), ("y", 5))
    }
    return write_contrast(tmp_path / "drawn", groups)


def best(folder: Path, able: Any = None, contrast: Any = None) -> Places:
    """All neurons by a plain sort of the file's own numbers."""
    rms = load_file(folder / NAME)["rms"] if contrast is None else contrast.rms()
    able = np.ones(rms.shape, bool) if able is None else able
    places = [(int(layer), int(i)) for layer, i in np.argwhere(able)]
    return sorted(places, key=lambda at: (-np.float32(rms[at]), at))


def test_e3(e3: Path) -> None:
    """The ranking of the specification: (0,2) and (1,2) tie up to rounding, (1,1) is the same."""
    found = chosen(e3, top=5)
    assert found[:3] == [(1, 0), (0, 1), (0, 0)]
    assert {*found[3:]} == {(0, 2), (1, 2)}
    ranks = ranking(contrast_of({"all": (M1, M2)}).rms(), np.ones((2, 3), bool))
    assert ranks[-1] == 4 and len(ranks) == 6  # (1,1) is the last of the ranking, in no set


def test_equal_changes_rank_by_layer_then_index() -> None:
    score = np.array([[1.0, 2, 1], [2, 1, 3]])
    assert ranking(score, np.ones((2, 3), bool)).tolist() == [5, 1, 3, 0, 2, 4]
    # Scores that only float64 tells apart are equal.
    assert ranking(np.array([[1, 1 + 1e-12]]), np.ones((1, 2), bool)).tolist() == [0, 1]


def test_how_many_and_from_where(drawn: Path) -> None:
    everything = best(drawn)
    assert chosen(drawn) == everything[:3]  # 5 % of 60
    assert chosen(drawn, rate=0.5) == everything[:30]
    assert chosen(drawn, top=10, from_rank=7) == everything[7:17]
    for size in (2, 5, 9):
        assert chosen(drawn, f"contrast@{size}", sizes=(9, 2, 5)) == everything[:size]
        assert (
            chosen(drawn, f"contrast@{size}", sizes=(9, 2, 5), from_rank=3)
            == (everything[3 : 3 + size])
        )
    assert list(NeuronFile.read(drawn / "neurons.json").sets) == [
        f"contrast@{n}" for n in (2, 5, 9)
    ]


def test_layers_and_other_files_leave_neurons_out(drawn: Path) -> None:
    layers = np.ones((3, 20), bool)
    layers[[0, 2]] = False
    assert chosen(drawn, top=8, without_layers=(2, 0)) == best(drawn, layers)[:8]
    # The share is one of the neurons that are ranked.
    assert len(chosen(drawn, rate=0.5, without_layers=(2, 0))) == 10
    everything = best(drawn)
    sets = {"p": [(*everything[0], 0.0)], "q": [(*everything[4], 0.0), (*everything[7], 0.0)]}
    rows = {n: [(la, "up", i, s) for la, i, s in own] for n, own in sets.items()}
    other = drawn.parent / "other.json"
    NeuronFile({"layers": 3, "width": 20, "hidden": 2}, "ap", rows, {}).write(other)
    assert chosen(drawn, top=3, within=other) == [everything[k] for k in (0, 4, 7)]
    left = [at for k, at in enumerate(everything) if k not in (0, 4, 7)]
    assert chosen(drawn, top=9, without=other) == left[:9]


def test_groups(drawn: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 30, 3, 20)).astype(np.float32)
    own = contrast_of({"x": (x[0], x[1])})
    assert chosen(drawn, "x", by_group=True, top=7) == best(drawn, contrast=own)[:7]
    assert chosen(drawn, groups=("x",), top=7) == best(drawn, contrast=own)[:7]
    chosen(drawn, "y@4", by_group=True, sizes=(4, 6))
    assert list(NeuronFile.read(drawn / "neurons.json").sets) == ["x@4", "x@6", "y@4", "y@6"]
    with safe_open(drawn / "scores.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["sets"]) == ["x", "y"]
        rms = file.get_tensor("rms")
    np.testing.assert_array_equal(rms[0], own.rms().astype(np.float32))


def test_layers_of_other_widths_have_no_neurons_beyond(tmp_path: Path) -> None:
    """What is behind the neurons of a narrow layer is none, whatever stands there."""
    shape = {"layers": 2, "width": 3, "hidden": 2, "widths": [2, 3]}
    folder = write_contrast(tmp_path / "c", model=shape)
    found = chosen(folder, top=4)
    assert found[:3] == [(1, 0), (0, 1), (0, 0)] and found[3] == (1, 2)
    rms = load_file(folder / "scores.safetensors")["rms"]
    assert np.isnan(rms[0, 0, 2]) and np.isfinite(rms[0]).sum() == 5


def test_the_manifest_makes_the_same_sets_again(relneuron: Any, drawn: Path) -> None:
    words = ["identify", drawn, "-o", drawn / "neurons.json", "--method", "contrast"]
    words += ["--sizes", "3,8", "--from-rank", 1, "--without-layers", "1"]
    code, out, _ = relneuron(*words)
    assert code == 0
    assert "40 neurons ranked by their change" in out and "contrast@8: 8 neurons, S from " in out
    first = (drawn / "neurons.json").read_bytes()
    [[_, folder, *again]] = Manifest(drawn).data["stages"]["identify"]["commands"]
    again = [word.replace("STUDY", str(drawn)) for word in (folder, *again)]
    assert relneuron("identify", *again, "--force")[0] == 0
    assert (drawn / "neurons.json").read_bytes() == first


def refused(folder: Path, match: str, **asked: Any) -> RelneuronError:
    before = sorted(folder.iterdir())
    with pytest.raises(RelneuronError, match=match) as error:
        identify_contrast(folder, folder / "none.json", ChangeOptions(**asked))
    assert sorted(folder.iterdir()) == before
    return error.value


def test_what_cannot_be_ranked_is_refused(e3: Path) -> None:
    assert "layers 0 to 1" in refused(e3, "--without-layers 2", without_layers=(2,)).cause
    refused(e3, "--without-layers leaves no layer", without_layers=(0, 1))
    refused(e3, "--from-rank 6, but 6 neurons", from_rank=6)
    refused(e3, "--rate 0.05 of 6 neurons is none")
    assert "its groups are all" in refused(e3, "no group 'b'", groups=("b",)).fix
    refused(e3, "names twice", groups=("all", "all"))
    other = e3.parent / "other.json"
    shape = {"layers": 2, "width": 3, "hidden": 2}
    NeuronFile(shape, "ap", {"p": []}, {}).write(other)
    refused(e3, "no neuron is left to rank", within=other, top=1)
    NeuronFile({"layers": 5, "width": 3, "hidden": 2}, "ap", {"p": []}, {}).write(other)
    refused(e3, "of a model of shape", within=other, top=1)


def test_models_that_are_the_same_have_no_neurons(tmp_path: Path) -> None:
    folder = write_contrast(tmp_path / "c", {"x": (M1, M1), "y": (M2, M2)})
    refused(folder, "no neuron differs between the models", top=2)
    refused(folder, "no neuron differs between the models", top=2, by_group=True)


def test_what_there_is_not_enough_of_is_said(e3: Path) -> None:
    with pytest.warns(UserWarning, match="contrast: 5 neurons, there are no more that change"):
        assert len(chosen(e3, top=6)) == 5


def test_tokens_that_are_not_there_or_not_finite(tmp_path: Path) -> None:
    none = (M1[:0], M2[:0])
    folder = write_contrast(tmp_path / "c", {"x": (M1, M2), "y": none})
    with pytest.warns(UserWarning, match="group 'y' has no token"):
        assert chosen(folder, "x", by_group=True, top=1) == [(1, 0)]
    refused(folder, "has no token", groups=("y",), top=1)
    bad = M1.copy()
    bad[0, 0, 0] = np.inf
    refused(write_contrast(tmp_path / "d", {"x": (bad, M2)}), "were not finite", top=1)


def test_bad_folders(tmp_path: Path) -> None:
    refused(write_contrast(tmp_path / "a", model=None), "no contrast in its manifest")
    shape = {"layers": 2, "width": 4, "hidden": 2}
    refused(write_contrast(tmp_path / "b", model=shape), "its model has", top=1)
    for number, shape in enumerate(
        ({"layers": 2}, {"layers": 2, "width": 3, "hidden": 2, "widths": 3})
    ):
        folder = write_contrast(tmp_path / f"s{number}", model=shape)
        refused(folder, "does not say the shape of the model", top=1)
    folder = write_contrast(tmp_path / "c")
    data = bytearray((folder / NAME).read_bytes())
    data[-1] ^= 1
    (folder / NAME).write_bytes(bytes(data))
    refused(folder, "is not the file that was written", top=1)
