"""Neurons from gains: sets and scores against plain means, ties, folders that lack something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from relneuron.artifact.files import RelneuronError, atomic_write, sha256
from relneuron.artifact.gains import GAINS, TARGETS, GainFile, Target, targets_bytes
from relneuron.artifact.manifest import Manifest, json_digest
from relneuron.artifact.neurons import NeuronFile, default_top
from relneuron.methods.gains.rank import (
    add_rows,
    best_neurons,
    identify_gains,
    identify_gains_inputs,
    mean_gains,
)

MODEL = {"id": "tiny", "layers": 3, "width": 40, "hidden": 16}
RELATIONS = ["b", "a", "c"]
N = 14


def make_targets(n: int = N) -> list[Target]:
    """Sentences of three relations in turn; every other one is known, of `c` none."""
    return [
        Target(f"s{i}", RELATIONS[i % 3], "x", 1, 1, 4, 2, 0.5, -0.7, i % 2 == 0 and i % 3 != 2)
        for i in range(n)
    ]


def make_gains(seed: int = 0) -> np.ndarray[Any, Any]:
    """(N, L, F), of few values, so that there are ties."""
    rng = np.random.default_rng(seed)
    return rng.integers(-3, 4, (N, MODEL["layers"], MODEL["width"])).astype(np.float32) / 8


def write_folder(
    folder: Path,
    gains: np.ndarray[Any, Any] | None = None,
    targets: list[Target] | None = None,
    **inputs: Any,
) -> Path:
    gains = make_gains() if gains is None else gains
    folder.mkdir(parents=True, exist_ok=True)
    ids = [target.id for target in targets or make_targets()]
    file = GainFile(folder / GAINS, MODEL, {"ids": [*ids, *map(str, range(N))][: len(gains)]})
    file.store(range(len(gains)), gains)
    file.flush()
    atomic_write(folder / TARGETS, targets_bytes(targets or make_targets()))
    manifest = Manifest(folder)
    manifest.describe(model=MODEL, dtype="float32")
    inputs = {"keep": "all", **inputs}
    manifest.finish("attribute", inputs, [folder / TARGETS, folder / GAINS], reads=[])
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "attribution")


def plain_means(rows: list[int]) -> dict[tuple[int, int], float]:
    gains = make_gains()
    return {
        (layer, k): float(np.float32(sum(float(gains[i, layer, k]) for i in rows) / len(rows)))
        for layer in range(MODEL["layers"])
        for k in range(MODEL["width"])
    }


def rows_of(relation: str, *, kept_only: bool) -> list[int]:
    return [
        i
        for i, t in enumerate(make_targets())
        if t.relation == relation and (t.kept or not kept_only)
    ]


@pytest.mark.parametrize("kept_only", [False, True])
def test_sets_are_the_highest_means(folder: Path, kept_only: bool) -> None:
    output = folder / "neurons.json"
    result = identify_gains(folder, output, top=17, kept_only=kept_only, quiet=True)
    assert NeuronFile.read(output) == result
    assert (result.method, result.model) == ("logprob_gain", MODEL)
    assert list(result.sets) == ["a", "b", "c"]
    with safe_open(folder / "scores.safetensors", "np") as file:
        assert json.loads(file.metadata()["relations"]) == ["a", "b", "c"]
        assert list(file.keys()) == ["logprob_gain.gate"]
        scores = file.get_tensor("logprob_gain.gate")
    assert scores.shape == (3, 3, 40) and scores.dtype == np.float32
    for r, name in enumerate(result.sets):
        rows = rows_of(name, kept_only=kept_only)
        if not rows:
            assert name == "c" and kept_only and np.isnan(scores[r]).all()
            assert result.sets[name] == [] and "no sentence" in result.selection[name]["reason"]
            continue
        means = plain_means(rows)
        assert all(scores[r][place] == mean for place, mean in means.items())
        order = sorted(means, key=lambda place: (-means[place], place))[:17]
        assert result.sets[name] == [(la, "gate", k, means[la, k]) for la, k in order]
        cut = means[order[-1]]
        assert result.selection[name] == {
            "sentences": len(rows),
            "score_at_cut": cut,
            "ties_at_cut": sum(mean == cut for mean in means.values()),
            "ties_chosen": sum(means[place] == cut for place in order),
        }


def test_the_manifest_and_another_folder(folder: Path, tmp_path: Path) -> None:
    identify_gains(folder, folder / "neurons.json", top=5, quiet=True)
    manifest = Manifest(folder)
    entry = manifest.data["stages"]["identify"]
    assert entry["files"] == ["scores.safetensors", "neurons.json"] and entry["top"] == 5
    assert [*manifest.data["stages"]] == ["attribute", "identify"]
    assert entry["inputs"] == identify_gains_inputs(folder, top=5, kept_only=False)
    assert entry["inputs"]["digests"] == {n: sha256(folder / n) for n in (TARGETS, GAINS)}
    assert entry["inputs"]["attribute"] == json_digest({"keep": "all"})
    assert all(manifest.is_intact(name) for name in manifest.data["files"])
    for name in ("x", "y"):
        identify_gains(folder, tmp_path / name / "best.json", top=5, quiet=True)
    for file in ("best.json", "best.scores.safetensors", "manifest.json"):
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()
    assert Manifest(tmp_path / "x").data["model"] == MODEL
    ours = NeuronFile.read(tmp_path / "x" / "best.json")
    assert ours == NeuronFile.read(folder / "neurons.json")


def test_how_many(folder: Path) -> None:
    output = folder / "neurons.json"

    def sizes(top: Any) -> dict[str, int]:
        found = identify_gains(folder, output, top=top, force=True, quiet=True)
        return {name: len(chosen) for name, chosen in found.sets.items()}

    assert default_top(MODEL) == 28  # a tenth of 3 * (2 * 40 + 16) neurons
    assert sizes(None) == dict.fromkeys("abc", 28)
    assert sizes(1000) == dict.fromkeys("abc", 120)
    assert sizes({"a": 3, "c": 0, "other": 9}) == {"a": 3, "b": 0, "c": 0}
    assert NeuronFile.read(output).selection["c"]["reason"] == "none was asked for"
    for top in (0, {"a": -1}):
        with pytest.raises(RelneuronError, match="--top must be at least"):
            sizes(top)


def test_sentences_that_were_not_scored_do_not_count(tmp_path: Path) -> None:
    gains, targets = make_gains(), make_targets()
    gains[[i for i, t in enumerate(targets) if not t.kept]] = np.nan
    known = write_folder(tmp_path / "known", gains, targets, keep="known")
    ours = identify_gains(known, known / "neurons.json", top=9, quiet=True)
    whole = write_folder(tmp_path / "whole")
    theirs = identify_gains(whole, whole / "neurons.json", top=9, kept_only=True, quiet=True)
    assert ours.sets == theirs.sets and ours.selection == theirs.selection


def check_refused(folder: Path, cause: str, **options: Any) -> None:
    output = folder / "neurons.json"
    with pytest.raises(RelneuronError, match=cause):
        identify_gains(folder, output, quiet=True, **options)
    assert not output.exists() and not (folder / "scores.safetensors").exists()


def test_folders_that_lack_something(tmp_path: Path) -> None:
    check_refused(tmp_path, "no finished attribution in its manifest")
    bad = make_gains()
    bad[3, 1, 7] = np.inf
    check_refused(write_folder(tmp_path / "inf", bad), "gains of layer 1 are not all finite")
    short = write_folder(tmp_path / "short", targets=make_targets(13))
    check_refused(short, "the rows of .*gains.safetensors are of other prompts")
    unknown = [Target("s", "a", "x", 1, 1, 4, 99, 0.0, -9.0, False)] * N
    check_refused(
        write_folder(tmp_path / "unknown", targets=unknown), "no sentence", kept_only=True
    )
    for name in (TARGETS, GAINS):
        gone = write_folder(tmp_path / f"gone {name}")
        (gone / name).unlink()
        check_refused(gone, f"{name} does not exist")
        changed = write_folder(tmp_path / f"changed {name}")
        with (changed / name).open("ab") as file:
            file.write(b"\n")
        check_refused(changed, "is not the file that was written")
    none = write_folder(tmp_path / "none")
    manifest = Manifest(none)
    manifest.finish("attribute", {"keep": "all"}, [none / TARGETS], reads=[])
    check_refused(none, "the FFN neurons were not scored")


def test_nothing_is_overwritten_without_force(folder: Path) -> None:
    (folder / "neurons.json").write_text("mine")
    with pytest.raises(RelneuronError, match="neurons.json exists") as caught:
        identify_gains(folder, folder / "neurons.json", quiet=True)
    assert caught.value.exit_code == 2
    assert not (folder / "scores.safetensors").exists()
    identify_gains(folder, folder / "neurons.json", quiet=True, force=True)
    assert NeuronFile.read(folder / "neurons.json").method == "logprob_gain"


# --- the score -------------------------------------------------------------------------------


def test_means_are_summed_in_float64() -> None:
    gains = np.full((3000, 2), 0.1, np.float32)
    gains[0] = 3e7
    group = np.zeros(3000, np.int64)
    group[1500:] = 1
    means = mean_gains(gains, group, 3)
    exact = gains[:1500].astype(np.float64).sum(0) / 1500
    np.testing.assert_array_equal(means[0], exact.astype(np.float32))
    assert means.dtype == np.float32 and means[1, 0] == np.float32(0.1)
    assert np.isnan(means[2]).all()


def test_equal_neurons_come_by_layer_and_index() -> None:
    scores = np.array([[0.5, 1, 0.5], [1, 0.5, -2]], np.float32)
    assert best_neurons(scores, 4) == [
        (0, "gate", 1, 1.0),
        (1, "gate", 0, 1.0),
        (0, "gate", 0, 0.5),
        (0, "gate", 2, 0.5),
    ]
    assert len(best_neurons(scores, 99)) == 6 and best_neurons(scores, 0) == []


@pytest.mark.parametrize("width", [2, 3, 64, 9000])
@pytest.mark.parametrize("n_block", [1, 7, 256, 1000])
def test_rows_that_come_in_blocks_have_the_same_mean(width: int, n_block: int) -> None:
    """To the last bit, however they are cut: as `mean_gains` has them at once."""
    rng = np.random.default_rng(width)
    n = 300 if width < 100 else 40
    gains = (rng.normal(size=(n, width)) * 10.0 ** rng.integers(-9, 9, (n, 1))).astype(np.float32)
    group = rng.integers(-1, 4, n)
    group[group == 2] = 1  # of which there is no sentence
    sums = np.zeros((4, width))
    for first in range(0, n, n_block):
        rows = slice(first, first + n_block)
        add_rows(sums, gains[rows], group[rows])
    wanted = mean_gains(gains, group, 4)
    with np.errstate(invalid="ignore"):
        found = (sums / np.bincount(group[group >= 0], minlength=4)[:, None]).astype(np.float32)
    assert np.isnan(found[2]).all() and np.array_equal(found, wanted, equal_nan=True)
