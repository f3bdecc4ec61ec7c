"""Files of MMNeuron: written by hand as its code writes them, read, written, damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.artifact.counts import NAME, RAN, Counts
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.methods.counts.folders import name_mmneuron
from relneuron.methods.counts.mmneuron_files import (
    DOMAINS,
    read_masks,
    read_snapshots,
    write_masks,
    write_snapshots,
)
from relneuron.model.config import modules_shape
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.pictures import Processor, picture_run
from tests.kit.counted import rank_counts
from tests.kit.pictures import save, tiny, write_lines

# Two layers of language, two of vision, a projector.
LLAVA = {"id": "hub/llava-1", "layers": 5, "width": 9, "hidden": 6}
LLAVA |= {"widths": [9, 9, 7, 7, 6], "modules": {"language": 2, "vision": 2, "projector": 1}}
SIZES = {"lang": (2, 9), "vision": (2, 7), "mmproj": (1, 6)}
FIRST = {"lang": 0, "vision": 2, "mmproj": 4}


def mask(rng: np.random.Generator, n_groups: int, layers: int, width: int) -> list[Any]:
    """As their code makes it: lists of ascending int64 tensors."""
    return [
        [torch.tensor(np.flatnonzero(rng.random(width) < 0.3)).long() for _ in range(layers)]
        for _ in range(n_groups)
    ]


@pytest.fixture
def masks(tmp_path: Path) -> dict[str, list[Any]]:
    """In the projector the last two domains have none: their code leaves the lists out."""
    rng = np.random.default_rng(0)
    made = {
        "lang": mask(rng, 5, *SIZES["lang"]),
        "vision": mask(rng, 5, *SIZES["vision"]),
        "mmproj": mask(rng, 3, *SIZES["mmproj"]),
    }
    for name, value in made.items():
        torch.save(value, tmp_path / f"llava-v1.6-{name}")
    return made


def snapshot(rng: np.random.Generator, lengths: dict[str, int]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, n in lengths.items():
        found[f"{name}_log"] = torch.tensor(rng.integers(0, n + 1, SIZES[name]), dtype=torch.int32)
        found[f"{name}_value"] = torch.tensor(rng.normal(size=SIZES[name]), dtype=torch.float64)
        found[f"{name}_len"] = torch.tensor(n)
    return found


@pytest.fixture
def logs(tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    rng = np.random.default_rng(1)
    made = {}
    for number, domain in enumerate(DOMAINS):
        lengths = {"lang": 300 + number, "vision": 500, "mmproj": 240}
        made[domain] = snapshot(rng, lengths)
        torch.save(made[domain], tmp_path / f"{domain}_1.log")
    return made


# --- masks -----------------------------------------------------------------------------------


def test_masks_of_several_modules(tmp_path: Path, masks: dict[str, list[Any]]) -> None:
    paths, none = name_mmneuron([str(tmp_path)])
    assert set(paths) == set(masks) and not none
    found = read_masks(paths, DOMAINS, LLAVA)
    assert found.model == LLAVA and list(found.sets) == list(DOMAINS)
    for g, domain in enumerate(DOMAINS):
        wanted = {
            (FIRST[name] + layer, "gate", int(index), 0.0)
            for name, lists in masks.items()
            if g < len(lists)
            for layer, own in enumerate(lists[g])
            for index in own
        }
        assert set(found.sets[domain]) == wanted
        assert len(found.sets[domain]) == len(wanted)
    assert found.selection["files"]["projector"]["groups"] == 3
    written = write_masks(found, tmp_path / "out")
    assert [path.name for path in written] == ["llava-1-lang", "llava-1-vision", "llava-1-mmproj"]
    for path, (name, lists) in zip(written, masks.items(), strict=True):
        again = torch.load(path, weights_only=True)
        # All five domains stand there, also those that the short file left out.
        assert [len(layers) for layers in again] == [SIZES[name][0]] * 5
        empty = [[torch.empty(0, dtype=torch.int64)] * SIZES[name][0]] * (5 - len(lists))
        for ours, theirs in zip(again, [*lists, *empty], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.dtype == torch.int64 and torch.equal(a, b)
    assert read_masks(name_mmneuron([str(tmp_path / "out")])[0], DOMAINS, LLAVA).sets == found.sets


def test_a_q_former_has_two_masks_and_an_encoder(tmp_path: Path) -> None:
    shape = {"id": "blip", "layers": 4, "width": 5, "hidden": 4}
    modules = {"language": 1, "vision": 1, "qformer_query": 1, "qformer_text": 1}
    shape |= {"modules": modules}
    names = ("lang", "encoder", "query", "qformer")
    for number, name in enumerate(names):
        torch.save([[torch.tensor([number])]], tmp_path / f"blip-{name}")
    paths = name_mmneuron([f"{name}={tmp_path}/blip-{name}" for name in names])[0]
    found = read_masks(paths, DOMAINS, shape)
    assert [row[:3] for row in found.sets["ad"]] == [(n, "gate", n) for n in range(4)]
    assert found.sets["doc"] == []
    written = write_masks(found, tmp_path / "out")
    assert [path.name for path in written] == [f"blip-{name}" for name in names]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: [*m, m[0]], "has 6 groups, there are 5 names"),
        (lambda m: [[layer[0]] for layer in m], "has 1 layers, the model 2"),
        (lambda m: [[m[0][0], torch.tensor([9])]], "has the index 9, the model's width is 9"),
        (lambda m: [[m[0][0], torch.tensor([-1])]], "has the index -1"),
        (lambda m: [[m[0][0], torch.tensor([0.5])]], "not 1-D integers"),
        (lambda m: [[m[0][0], [1]]], "is a list, no tensor"),
        (lambda m: {"ad": m[0]}, "holds a dict, no list"),
        (lambda m: [m[0], 3], "is a int, no list"),
    ],
)
def test_damaged_masks(
    tmp_path: Path, masks: dict[str, list[Any]], change: Callable[[Any], Any], said: str
) -> None:
    path = tmp_path / "llava-v1.6-lang"
    torch.save(change(masks["lang"]), path)
    with pytest.raises(RelneuronError, match=said):
        read_masks({"lang": path}, DOMAINS, LLAVA)


def test_what_runs_code_is_no_mask(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("run",))

    torch.save([Evil()], tmp_path / "m-lang")
    with pytest.raises(RelneuronError, match="no torch file of tensors"):
        read_masks({"lang": tmp_path / "m-lang"}, DOMAINS, LLAVA)


def test_modules_that_the_model_has_not(tmp_path: Path, masks: dict[str, list[Any]]) -> None:
    path = tmp_path / "llava-v1.6-lang"
    with pytest.raises(RelneuronError, match="of the module 'query'; the model has language, vis"):
        read_masks({"query": path}, DOMAINS, LLAVA)
    with pytest.raises(RelneuronError, match="second file of the module language"):
        read_masks({"lang": path, "language": path}, DOMAINS, LLAVA)
    with pytest.raises(RelneuronError, match="neuron of site 'down'"):
        write_masks(NeuronFile(LLAVA, "m", {"a": [(0, "down", 1, 0.0)]}, {}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    uneven = LLAVA | {"widths": [9, 8, 7, 7, 6]}
    with pytest.raises(RelneuronError, match=r"language are of the widths \[8, 9\]"):
        read_masks({"lang": path}, DOMAINS, uneven)


# --- snapshots -------------------------------------------------------------------------------


def test_snapshots(tmp_path: Path, logs: dict[str, dict[str, torch.Tensor]]) -> None:
    none, paths = name_mmneuron([str(tmp_path / f"{domain}_1.log") for domain in DOMAINS])
    assert list(paths) == list(DOMAINS) and not none
    found = read_snapshots(paths, LLAVA)
    assert found.tokens.tolist() == [500] * 5
    for g, data in enumerate(logs.values()):
        for name, (layers, width) in SIZES.items():
            rows = slice(FIRST[name], FIRST[name] + layers)
            count, total = found.arrays["count.act"][g, rows], found.arrays["sum.act"][g, rows]
            assert (count[:, :width] == data[f"{name}_log"].numpy()).all()
            assert (total[:, :width] == data[f"{name}_value"].numpy()).all()
            assert not count[:, width:].any() and not total[:, width:].any()
            assert (found.beside[RAN][g, rows] == int(data[f"{name}_len"])).all()
    found.write(tmp_path / NAME)
    written = write_snapshots(Counts.read(tmp_path / NAME), tmp_path / "out", LLAVA)
    assert [path.name for path in written] == [f"{domain}_1.log" for domain in DOMAINS]
    for path, data in zip(written, logs.values(), strict=True):
        again = torch.load(path, weights_only=True)
        assert again.keys() == data.keys()
        for name, tensor in data.items():
            assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name


def test_the_number_of_a_snapshot_is_of_vision_tokens(tmp_path: Path) -> None:
    shape = (1, 5, 9)
    ran = np.array([[7, 7, 250_000, 250_000, 9]])
    arrays = {"count.act": np.zeros(shape, np.int64), "sum.act": np.zeros(shape)}
    counts = Counts(["a"], np.array([250_000]), arrays, {RAN: ran})
    assert [path.name for path in write_snapshots(counts, tmp_path, LLAVA)] == ["a_2.log"]
    del arrays["sum.act"]
    with pytest.raises(RelneuronError, match="hold no sum.act"):
        write_snapshots(counts, tmp_path / "b", LLAVA)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lang_len", None, "lacks lang_len"),
        ("vision_log", None, "lacks vision_log"),
        ("lang_len", torch.tensor(3), "has a count of"),
        ("lang_len", torch.tensor(0.5), "not 0-D integers"),
        ("lang_len", "many", "is no number of tokens"),
        ("lang_log", torch.full((2, 9), -1, dtype=torch.int32), "has a count of -1"),
        ("lang_log", torch.zeros(3, 9, dtype=torch.int32), r"shape \(3, 9\), the model's language"),
        ("lang_value", torch.zeros(2, 9, dtype=torch.int32), "not 2-D floats"),
        ("lang_value", torch.full((2, 9), float("nan"), dtype=torch.float64), "is not finite"),
        ("mmproj_value", torch.zeros(1, 1).expand(1, 6), "strided view"),
    ],
)
def test_damaged_snapshots(
    tmp_path: Path, logs: dict[str, dict[str, torch.Tensor]], name: str, value: Any, said: str
) -> None:
    data: dict[str, Any] = dict(logs["ad"])
    if value is None:
        del data[name]
    else:
        data[name] = value
    torch.save(data, tmp_path / "ad_1.log")
    with pytest.raises(RelneuronError, match=said):
        read_snapshots({"ad": tmp_path / "ad_1.log"}, LLAVA)


def test_names_of_files(tmp_path: Path, masks: Any, logs: Any) -> None:
    with pytest.raises(RelneuronError, match="masks and snapshots make different files"):
        name_mmneuron([str(tmp_path)])
    one = str(tmp_path / "ad_1.log")
    with pytest.raises(RelneuronError, match="ad is there twice"):
        name_mmneuron([one, f"ad={tmp_path}/med_1.log"])
    for strange in ("nothing.pth", "=x", str(tmp_path / "absent")):
        with pytest.raises(RelneuronError, match="no mask and no snapshot"):
            name_mmneuron([strange])
    assert name_mmneuron([f"a_b={one}"])[1] == {"a_b": Path(one)}


# --- models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llava", "instructblip"])
def test_the_configuration_says_what_the_model_has(tmp_path: Path, kind: str) -> None:
    """Against what is found in the model itself, in a forward with a picture."""
    model, processor = tiny(kind)
    mlps = find_mlps(model, modules=("all",), run=picture_run(model, Processor(processor)))
    wanted = model_shape(mlps)
    shape = modules_shape(str(save(kind, tmp_path / "m")))
    assert shape.pop("id") == str(tmp_path / "m")
    assert shape == {key: value for key, value in wanted.items() if key != "gated"}
    one = modules_shape(str(tmp_path / "m"), ["vision"])
    mlps = find_mlps(model, modules=("vision",), run=picture_run(model, Processor(processor)))
    del one["id"]
    assert one == {key: value for key, value in model_shape(mlps).items() if key != "gated"}
    language = modules_shape(str(tmp_path / "m"), ["language"])
    assert "modules" not in language and language["layers"] == 2
    with pytest.raises(RelneuronError, match="has no module"):
        absent = "projector" if kind == "instructblip" else "qformer_query"
        modules_shape(str(tmp_path / "m"), [absent])


def test_the_commands(tmp_path: Path, relneuron: Callable[..., Any]) -> None:
    """In, ranked, and out again, by the command line."""
    folder = save("llava", tmp_path / "m")
    sizes = {"lang": (2, 48), "vision": (3, 40), "mmproj": (1, 32)}
    rng = np.random.default_rng(5)
    for domain in ("ad", "med"):
        data: dict[str, Any] = {}
        for name, size in sizes.items():
            log = torch.tensor(rng.integers(0, 1001, size), dtype=torch.int32)
            data |= {f"{name}_log": log, f"{name}_len": torch.tensor(1000)}
            data[f"{name}_value"] = torch.tensor(rng.random(size))
        torch.save(data, tmp_path / f"{domain}_1.log")
    files = [tmp_path / f"{domain}_1.log" for domain in ("ad", "med")]
    how = ("--format", "mmneuron")
    study = tmp_path / "study"
    code, out, err = relneuron("import", *files, "--model", folder, "-o", study, *how)
    assert code == 0 and "ad: 1,000 tokens" in out, err
    model = Manifest(study).data["model"]
    assert model["modules"] == {"language": 2, "vision": 3, "projector": 1}
    code, out, err = relneuron("export", study, "-o", tmp_path / "logs", *how)
    assert code == 0, err
    for path in files:
        again = torch.load(tmp_path / "logs" / path.name, weights_only=True)
        theirs = torch.load(path, weights_only=True)
        assert all(torch.equal(again[name], tensor) for name, tensor in theirs.items())
    chosen = rank_counts(study, study / "neurons.json", top=20)
    code, out, err = relneuron("export", study / "neurons.json", "-o", tmp_path / "masks", *how)
    assert code == 0 and out.count("-> ") == 3, err
    words = (tmp_path / "masks", "--model", folder, "--names", "ad,med", "-o", tmp_path / "n.json")
    code, out, err = relneuron("import", *words, *how)
    assert code == 0, err
    back = NeuronFile.read(tmp_path / "n.json")
    assert {name: {row[:3] for row in rows} for name, rows in back.sets.items()} == {
        name: {row[:3] for row in rows} for name, rows in chosen.sets.items()
    }
    back.check_model(chosen.model)
    # Again: nothing to do, or refused.
    assert relneuron("import", *files, "--model", folder, "-o", study, *how)[0] == 0
    assert relneuron("import", *words, *how)[0] == 2
    code, _, err = relneuron("import", *files, "--model", folder, "-o", study, "--format", "other")
    assert code == 2 and "unknown --format 'other'" in err


def test_what_is_counted_goes_out_and_comes_back(
    tmp_path: Path, relneuron: Callable[..., Any]
) -> None:
    """Real counts of a model with a Q-Former: out as snapshots, in again, the same numbers."""
    folder = save("instructblip", tmp_path / "m")
    files = [f"{g}={write_lines(tmp_path, g, 3, first)}" for g, first in (("ad", 0), ("doc", 5))]
    study, back = tmp_path / "study", tmp_path / "back"
    words = ("--module", "all", "--moments", "--quiet")
    code, _, err = relneuron("count", folder, *files, "-o", study, *words)
    assert code == 0, err
    how = ("--format", "mmneuron")
    code, out, err = relneuron("export", study, "-o", tmp_path / "logs", *how)
    assert code == 0 and "ad_1.log" in out, err
    names = ("encoder", "lang", "qformer", "query")
    data = torch.load(tmp_path / "logs" / "ad_1.log", weights_only=True)
    kinds = ("len", "log", "value")
    assert sorted(data) == [f"{name}_{kind}" for name in names for kind in kinds]
    assert data["encoder_len"] == 3 * 17  # 16 patches and the class
    assert data["query_len"] == 3 * 4
    code, _, err = relneuron("import", tmp_path / "logs", "--model", folder, "-o", back, *how)
    assert code == 0, err
    first, second = (Counts.read(one / NAME) for one in (study, back))
    assert (first.tokens_at() == second.tokens_at()).all()
    for name in ("count.act", "sum.act"):
        assert (first.arrays[name] == second.arrays[name]).all()
