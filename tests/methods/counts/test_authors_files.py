"""Files of the LAPE authors: the published neurons, round trips, hostile and damaged files."""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from relneuron.artifact import torch_files
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import NeuronFile
from relneuron.methods.counts.authors_files import (
    read_counts_pth,
    read_neuron_pth,
    write_neuron_pth,
)
from relneuron.model.config import config_shape
from tests.conftest import SHARED

PUBLISHED = SHARED / "lape" / "LLaMA-2-7B.neuron.pth"
LLAMA2 = {"id": "llama-2-7b", "layers": 32, "width": 11008, "hidden": 4096}
NAMES = ["en", "zh", "fr", "es", "vi", "id", "ja"]
SMALL = {"id": "small", "layers": 2, "width": 50, "hidden": 8}

published = pytest.mark.skipif(
    not PUBLISHED.is_file(), reason="the published neurons are not beside the project"
)


def layer(*indices: int) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int64)


def small_lists() -> list[list[torch.Tensor]]:
    return [[layer(1, 5, 49), layer()], [layer(0), layer(7, 8)]]


def save(path: Path, value: object, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def where(neurons: NeuronFile, name: str, number: int) -> list[int]:
    return [index for la, site, index, _ in neurons.sets[name] if la == number and site == "gate"]


@published
def test_the_published_neurons(tmp_path: Path) -> None:
    neurons = read_neuron_pth(PUBLISHED, NAMES, LLAMA2)
    assert where(neurons, "zh", 4) == [6147, 9114, 9292]
    expected = [84, 1468, 1752, 3532, 3859, 7784, 8953, 9239, 9461, 10625]
    assert where(neurons, "en", 31) == expected
    times = Counter(neuron for chosen in neurons.sets.values() for neuron in chosen)
    assert (len(times), sum(times.values())) == (3523, 5024)
    multiplicity = Counter(times.values())
    assert [multiplicity[n] for n in range(1, 7)] == [2396, 856, 193, 58, 15, 5]
    assert neurons.method == "imported" and neurons.model == LLAMA2
    neurons.write(tmp_path / "neurons.json")
    write_neuron_pth(NeuronFile.read(tmp_path / "neurons.json"), tmp_path / "out.pth")
    before = torch.load(PUBLISHED, weights_only=True)
    after = torch.load(tmp_path / "out.pth", weights_only=True)
    assert len(before) == len(after) == 7
    for own, theirs in zip(before, after, strict=True):
        assert len(own) == len(theirs) == 32
        for a, b in zip(own, theirs, strict=True):
            assert a.dtype == b.dtype == torch.int64 and torch.equal(a, b)


@published
def test_a_file_of_six_groups(tmp_path: Path) -> None:
    lists = torch.load(PUBLISHED, weights_only=True)[:6]
    path = save(tmp_path / "six.pth", lists)
    six = read_neuron_pth(path, NAMES[:6], LLAMA2)
    seven = read_neuron_pth(path, NAMES, LLAMA2)
    assert [*seven.sets] == NAMES and seven.sets["ja"] == []
    assert seven.sets == six.sets | {"ja": []}
    with pytest.raises(RelneuronError, match="has 6 groups, there are 5 names"):
        read_neuron_pth(path, NAMES[:5], LLAMA2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("is_zip", [True, False])
def test_integers_of_any_kind_are_read(tmp_path: Path, dtype: Any, is_zip: bool) -> None:
    lists = [[tensor.to(dtype) for tensor in layers] for layers in small_lists()]
    path = save(tmp_path / "n.pth", lists, _use_new_zipfile_serialization=is_zip)
    neurons = read_neuron_pth(path, ["a", "b"], SMALL)
    assert neurons.sets == {
        "a": [(0, "gate", 1, 0.0), (0, "gate", 5, 0.0), (0, "gate", 49, 0.0)],
        "b": [(0, "gate", 0, 0.0), (1, "gate", 7, 0.0), (1, "gate", 8, 0.0)],
    }


def test_doubles_count_once(tmp_path: Path) -> None:
    path = save(tmp_path / "n.pth", [[layer(9, 3, 9, 9), layer()]])
    with pytest.warns(UserWarning, match="names 2 neurons twice"):
        neurons = read_neuron_pth(path, ["a"], SMALL)
    assert where(neurons, "a", 0) == [3, 9]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [layer(), layer()]}, "holds a dict, no list"),
        ([(layer(), layer())], "group 'a' is a tuple"),
        ([[layer()] * 40], "has 40 layers, the model 2"),
        ([[layer(), [1, 2]]], "layer 1 is a list, no tensor"),
        ([[layer(), torch.zeros(3)]], "float32 tensor of shape"),
        ([[layer(), torch.ones(3, dtype=torch.bool)]], "bool tensor"),
        ([[layer(), torch.zeros(2, 2, dtype=torch.int64)]], "not 1-D"),
        ([[layer(), torch.tensor(3)]], "not 1-D"),
        ([[layer(), torch.zeros(1, dtype=torch.int64).expand(1 << 40)]], "strided view"),
        ([[layer(), torch.ones(3, dtype=torch.int64).to_sparse()]], "no ordinary tensor"),
        ([[layer(50), layer()]], "index 50, the model's width is 50"),
        ([[layer(0, -1), layer()]], "index -1"),
    ],
)
def test_what_is_no_list_of_layers(tmp_path: Path, value: object, words: str) -> None:
    with pytest.raises(RelneuronError, match=words) as caught:
        read_neuron_pth(save(tmp_path / "n.pth", value), ["a"], SMALL)
    assert "n.pth" in caught.value.cause and "\n" not in caught.value.cause


def test_names_must_be_distinct(tmp_path: Path) -> None:
    path = save(tmp_path / "n.pth", small_lists())
    for names in ([], ["a", "a"]):
        with pytest.raises(RelneuronError, match="not one for each group"):
            read_neuron_pth(path, names, SMALL)
    with pytest.raises(RelneuronError, match="does not exist"):
        read_neuron_pth(tmp_path / "none.pth", ["a"], SMALL)


class Shell:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("is_zip", [True, False])
def test_nothing_in_a_file_is_run(tmp_path: Path, is_zip: bool) -> None:
    mark = tmp_path / "was_run"
    for value in (Shell(f"touch {mark}"), [[layer(), Shell(f"touch {mark}")]]):
        path = save(tmp_path / "n.pth", value, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(RelneuronError, match=r"n\.pth is no torch file") as caught:
            read_neuron_pth(path, ["a"], SMALL)
        said = caught.value.cause + caught.value.fix
        assert "it holds more, which was not run" in said
        assert "\n" not in said and "weights_only" not in said  # not how to run it
        with pytest.raises(RelneuronError, match=r"n\.pth is no torch file"):
            read_counts_pth({"a": path})
    assert not mark.exists()
    # The same bytes do run the command where they are trusted.
    torch.load(path, weights_only=False)
    assert mark.exists()


# torch does not always save the same bytes: damage may make one index another, which is said.
@pytest.mark.filterwarnings("ignore:.* neurons twice. each counts once")
@pytest.mark.parametrize("is_zip", [True, False])
def test_damaged_files_raise_the_one_error(tmp_path: Path, is_zip: bool) -> None:
    path = save(tmp_path / "n.pth", small_lists(), _use_new_zipfile_serialization=is_zip)
    good = path.read_bytes()
    rng = random.Random(5)
    n_refused = 0
    for case in range(300):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if case % 5 == 0:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            read_neuron_pth(path, ["a", "b"], SMALL)
        except RelneuronError as error:
            assert "\n" not in error.cause
            n_refused += 1
    assert n_refused > 50


def test_files_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_files, "MAX_BYTES", 1 << 16)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (17 << 20))
    bomb = tmp_path / "bomb.pth"
    bomb.write_bytes(buffer.getvalue())
    assert bomb.stat().st_size < 1 << 15
    with pytest.raises(RelneuronError, match=r"bomb\.pth: 17,825,792 bytes, an expansion"):
        read_neuron_pth(bomb, ["a"], SMALL)
    large = save(tmp_path / "large.pth", torch.zeros(1 << 15, dtype=torch.int64))
    with pytest.raises(RelneuronError, match=r"large\.pth has more than 65,536 bytes"):
        read_counts_pth({"a": large})


def test_neurons_that_a_file_cannot_hold(tmp_path: Path) -> None:
    def file(*neurons: Any, model: Any = SMALL) -> NeuronFile:
        return NeuronFile(model, "lape", {"a": list(neurons), "b": []}, {})

    path = tmp_path / "out.pth"
    for neurons, words in (
        (file((0, "down", 1, 0.0)), "site 'down'"),
        (file((2, "gate", 1, 0.0)), "layer 2, index 1"),
        (file((0, "gate", 50, 0.0)), "layer 0, index 50"),
        (file(model={"id": "x"}), "do not say the layers"),
    ):
        with pytest.raises(RelneuronError, match=words):
            write_neuron_pth(neurons, path)
        assert not path.exists()
    write_neuron_pth(file((1, "up", 9, 0.5), (1, "gate", 3, 0.1), (1, "gate", 9, 0.2)), path)
    lists = torch.load(path, weights_only=True)
    assert [[t.tolist() for t in layers] for layers in lists] == [[[], [3, 9]], [[], []]]
    assert {t.dtype for layers in lists for t in layers} == {torch.int64}
    with pytest.raises(RelneuronError, match="exists"):
        write_neuron_pth(file(), path)
    write_neuron_pth(file(), path, force=True)
    assert read_neuron_pth(path, ["a", "b"], SMALL).sets == {"a": [], "b": []}


def test_the_shape_of_a_model_without_its_weights(tmp_path: Path) -> None:
    from transformers import Gemma3nTextConfig, LlamaConfig

    folder = tmp_path / "llama"
    LlamaConfig(num_hidden_layers=3, intermediate_size=48, hidden_size=32).save_pretrained(folder)
    assert config_shape(str(folder)) == {
        "id": str(folder),
        "layers": 3,
        "width": 48,
        "hidden": 32,
    }
    Gemma3nTextConfig(num_hidden_layers=2, intermediate_size=[8, 9]).save_pretrained(
        tmp_path / "two"
    )
    with pytest.raises(RelneuronError, match="does not say the one width of its MLPs"):
        config_shape(str(tmp_path / "two"))
    with pytest.raises(RelneuronError, match=r"it has no config\.json"):
        config_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(RelneuronError, match="has no configuration"):
        config_shape(str(tmp_path))


# Family, what its configuration is given, and the layers, width and hidden size of the model.
SHAPES: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("Bloom", {"n_layer": 30, "hidden_size": 4096, "n_head": 32}, (30, 16384, 4096)),
    ("OPT", {"num_hidden_layers": 32, "hidden_size": 4096, "ffn_dim": 16384}, (32, 16384, 4096)),
    ("GPT2", {"n_layer": 2, "n_embd": 8, "n_head": 2}, (2, 32, 8)),
    ("GPT2", {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_inner": 24}, (2, 24, 8)),
    ("GPTNeoX", {"num_hidden_layers": 3, "hidden_size": 64}, (3, 24576, 64)),
    ("GPTJ", {"n_layer": 2, "n_embd": 64, "n_head": 4, "rotary_dim": 4}, (2, 256, 64)),
    ("Falcon", {"num_hidden_layers": 2, "hidden_size": 64}, (2, 256, 64)),
    ("Mpt", {"n_layers": 2, "d_model": 64, "n_heads": 4, "expansion_ratio": 3}, (2, 192, 64)),
    (
        "Phi",
        {"num_hidden_layers": 32, "hidden_size": 2560, "intermediate_size": 10240},
        (32, 10240, 2560),
    ),
    ("Mistral", {}, (32, 14336, 4096)),
    ("Llama", {}, (32, 11008, 4096)),
]


@pytest.mark.parametrize(("family", "given", "sizes"), SHAPES, ids=[s[0] for s in SHAPES])
def test_a_mask_of_any_family_is_read(
    tmp_path: Path, family: str, given: dict[str, Any], sizes: tuple[int, int, int]
) -> None:
    import transformers

    getattr(transformers, f"{family}Config")(**given).save_pretrained(tmp_path / "model")
    shape = config_shape(str(tmp_path / "model"))
    layers, width, hidden = sizes
    assert shape == {"id": str(tmp_path / "model")} | {
        "layers": layers,
        "width": width,
        "hidden": hidden,
    }
    last = [[layer() for _ in range(layers - 1)] + [layer(0, width - 1)] for _ in range(2)]
    path = save(tmp_path / "x.neuron.pth", last)
    found = read_neuron_pth(path, ["en", "zh"], shape)
    assert where(found, "zh", layers - 1) == [0, width - 1]
    write_neuron_pth(found, tmp_path / "back.neuron.pth")
    back = torch.load(tmp_path / "back.neuron.pth", weights_only=True)
    assert [[t.tolist() for t in group] for group in back] == [
        [t.tolist() for t in group] for group in last
    ]
    path = save(tmp_path / "wide.neuron.pth", [[layer(width)] * layers])
    with pytest.raises(RelneuronError, match=f"index {width}, the model's width is {width}"):
        read_neuron_pth(path, ["en"], shape)
