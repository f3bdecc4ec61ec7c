"""Scores of the authors of safety neurons: round trips, layers left out, hostile files."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.methods.contrast.authors_files import read_scores, scores_of
from tests.kit.contrasted import M1, M2, write_contrast

Run = Callable[..., tuple[int, str, str]]
Tuple = tuple[torch.Tensor, ...]


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Tokens of the shape of the `model_folder`: 2 layers of 48 neurons."""
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(2, 12, 2, 48)).astype(np.float32)
    shape = {"layers": 2, "width": 48, "hidden": 32}
    return write_contrast(tmp_path / "drawn", {"x": (pair[0], pair[1])}, model=shape)


def theirs(m1: np.ndarray, m2: np.ndarray) -> Tuple:
    """As their code makes it: M1 wrote the completions and is the second one."""
    second, first = torch.from_numpy(m1), torch.from_numpy(m2)
    scores = (first - second).square().mean(0).sqrt()
    order = scores.flatten().argsort(descending=True)
    ranks = torch.stack([order // scores.shape[1], order % scores.shape[1]], 1)
    return (scores, ranks, first.mean(0), first.std(0), second.mean(0), second.std(0))


def test_what_is_written_is_what_their_code_makes(relneuron: Run, tmp_path: Path) -> None:
    folder, path = write_contrast(tmp_path / "e3"), tmp_path / "scores.pt"
    assert relneuron("export", folder, "-o", path)[0] == 0
    found, wanted = torch.load(path, weights_only=True), theirs(M1, M2)
    assert type(found) is tuple and found[1].dtype == torch.int64
    for own, their in zip(found, wanted, strict=True):
        assert own.dtype == their.dtype
        if own.dtype == torch.float32:
            torch.testing.assert_close(own, their, rtol=1e-6, atol=1e-7)
    assert found[1][:3].tolist() == wanted[1][:3].tolist() == [[1, 0], [0, 1], [0, 0]]
    assert {*map(tuple, found[1].tolist())} == {(la, i) for la in (0, 1) for i in range(3)}
    assert relneuron("export", folder, "-o", path)[0] == 2  # it exists


def test_the_model_that_wrote_is_the_second(tmp_path: Path) -> None:
    folder = write_contrast(tmp_path / "c")
    np.testing.assert_allclose(scores_of(folder).mean_second, M1.mean(0), rtol=1e-6)
    manifest = Manifest(folder)
    manifest.data["stages"]["contrast"]["inputs"]["completion_by"] = "b"
    manifest.save()
    np.testing.assert_allclose(scores_of(folder).mean_second, M2.mean(0), atol=1e-6)


def test_their_file_becomes_neurons_and_ours_theirs(
    relneuron: Run, drawn: Path, model_folder: Path, tmp_path: Path
) -> None:
    path, neurons = tmp_path / "scores.pt", tmp_path / "in" / "neurons.json"
    assert relneuron("export", drawn, "-o", path)[0] == 0
    own = ("--model", model_folder, "-o", neurons, "--format", "safety")
    code, out, err = relneuron("import", path, *own)
    assert code == 0 and "contrast: 5 of 96 neurons" in out, err  # 5 %
    assert relneuron("import", path, *own, "--top", 20, "--force")[0] == 0
    words = ("identify", drawn, "-o", drawn / "neurons.json", "--method", "contrast", "--top", 20)
    assert relneuron(*words)[0] == 0
    assert NeuronFile.read(neurons).sets == NeuronFile.read(drawn / "neurons.json").sets
    assert Manifest(neurons.parent).data["stages"]["import"]["files"] == ["neurons.json"]


def test_rows_are_layers_but_those_left_out(
    relneuron: Run, drawn: Path, model_folder: Path, tmp_path: Path
) -> None:
    path, neurons = tmp_path / "scores.pt", tmp_path / "neurons.json"
    assert relneuron("export", drawn, "-o", path, "--without-layers", 0)[0] == 0
    assert read_scores(path).change_scores.shape == (1, 48)
    own = ("import", path, "--model", model_folder, "-o", neurons, "--format", "safety")
    code, _, err = relneuron(*own)
    assert code != 0 and "has 1 layers of 48 neurons, the model 2 of 48" in err
    assert "--without-layers" in err and not neurons.exists()
    assert relneuron(*own, "--without-layers", 0, "--top", 9)[0] == 0
    [rows] = NeuronFile.read(neurons).sets.values()
    assert {layer for layer, *_ in rows} == {1} and len(rows) == 9
    words = ("identify", drawn, "-o", drawn / "n.json", "--method", "contrast", "--top", 9)
    assert relneuron(*words, "--without-layers", 0)[0] == 0
    assert NeuronFile.read(drawn / "n.json").sets["contrast"] == rows


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--top", "0"], "--top must be at least 1"),
        (["--without-layers", "2"], "there are the layers 0 to 1"),
        (["--without-layers", "0,1"], "--without-layers leaves no layer"),
        (["--without-layers", "x"], "unknown number in --without-layers 'x'"),
        (["--names", "a"], "--names does something only"),
    ],
)
def test_what_is_asked_wrongly_is_refused(
    relneuron: Run, drawn: Path, model_folder: Path, tmp_path: Path, words: Any, said: str
) -> None:
    path = tmp_path / "scores.pt"
    assert relneuron("export", drawn, "-o", path)[0] == 0
    own = ("--model", model_folder, "-o", tmp_path / "n.json", "--format", "safety")
    code, _, err = relneuron("import", path, *own, *words)
    assert code == 2 and said in err and len(err.splitlines()) == 2
    assert not (tmp_path / "n.json").exists()


def test_options_of_other_files_do_nothing(relneuron: Run, drawn: Path, tmp_path: Path) -> None:
    own = ("import", "f.pth", "--model", "m", "-o", tmp_path / "n.json")
    for flag in ("--top", "--without-layers"):
        code, _, err = relneuron(*own, flag, 3)
        assert code == 2 and f"{flag} does something only with --format safety" in err
    (tmp_path / "n.json").write_text("{}")
    words: tuple[object, ...]
    words = ("export", tmp_path / "n.json", "-o", tmp_path / "n.pth", "--without-layers", 3)
    assert "--without-layers does something only with a contrasted" in relneuron(*words)[2]
    words = ("export", drawn, "-o", tmp_path / "o", "--format", "mmneuron")
    assert "holds a contrast, no counts" in relneuron(*words)[2]
    assert "f.pth" in relneuron("import", "f.pth", "g.pth", "--model", "m", "-o", "o")[2]


def test_layers_of_several_widths_have_no_such_file(tmp_path: Path) -> None:
    shape = {"layers": 2, "width": 3, "hidden": 2, "widths": [2, 3]}
    with pytest.raises(RelneuronError, match="differ in width"):
        scores_of(write_contrast(tmp_path / "c", model=shape))


class Shell:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def other(place: int, value: Any) -> Any:
    """E3's tuple with another value at one place."""
    good = list(theirs(M1, M2))
    good[place] = value(good[place])
    return tuple(good)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda: list(theirs(M1, M2)), "holds a list of 6, no tuple"),
        (lambda: theirs(M1, M2)[:5], "holds a tuple of 5, no tuple of six"),
        (lambda: 3, "holds a int, no tuple"),
        (lambda: torch.tensor(3), "holds a Tensor, no tuple"),
        (lambda: other(1, lambda t: t.int()), "neuron_ranks is a int32 tensor"),
        (lambda: other(1, lambda t: t[:4].clone()), r"neuron_ranks is \(4, 2\), not \(6, 2\)"),
        (lambda: other(1, lambda t: t.flip(0)), "not by descending change_scores"),
        (lambda: other(1, lambda t: t + 1), "does not name every neuron once"),
        (lambda: other(1, lambda t: t[[0, 0, 1, 2, 3, 4]]), "does not name every neuron once"),
        (lambda: other(0, lambda t: t.half()), "change_scores is a float16 tensor"),
        (lambda: other(0, lambda t: t[:1].expand(2, 3)), "strided view"),
        (lambda: other(0, lambda t: t - 1), "not by descending change_scores"),
        (lambda: other(0, lambda t: t / 0), "not by descending change_scores"),
        (lambda: other(3, lambda t: t[0].clone()), "not 2-D floats"),
        (lambda: other(3, lambda t: t[:, :2].clone()), r"std_first is \(2, 2\), not \(2, 3\)"),
        (lambda: other(5, lambda t: t.to_sparse()), "no ordinary tensor"),
        (lambda: other(5, lambda t: 1.0), "is a float, no tensor"),
    ],
)
def test_what_is_no_such_tuple(tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(RelneuronError, match=words) as caught:
        read_scores(saved(tmp_path / "s.pt", value()))
    assert "s.pt" in caught.value.cause and "\n" not in caught.value.cause


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    path = saved(tmp_path / "s.pt", other(5, lambda _: Shell(f"touch {mark}")))
    with pytest.raises(RelneuronError, match=r"s\.pt is no torch file"):
        read_scores(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the same bytes do run the command where they are trusted


def test_damaged_files_raise_the_one_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "s.pt", theirs(M1, M2))
    good, rng, refused = path.read_bytes(), random.Random(5), 0
    for case in range(100):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if case % 5 == 0:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            read_scores(path)
        except RelneuronError as error:
            assert "\n" not in error.cause
            refused += 1
    assert refused > 20
