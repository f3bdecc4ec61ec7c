"""Neurons from counts: sets, scores and manifest against the formulas, sites, bad folders."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from relneuron.artifact.counts import NAME, Counts
from relneuron.artifact.files import RelneuronError, sha256
from relneuron.artifact.manifest import Manifest
from relneuron.artifact.neurons import NeuronFile
from relneuron.methods.counts.lape import activation_probability, lape
from relneuron.methods.counts.rank import OPTIONS, identify_counts, identify_counts_inputs
from tests.kit.counted import rank_counts

MODEL = {"id": "tiny", "layers": 3, "width": 40, "hidden": 16}
GROUPS = ["en", "zh", "a, b"]


def make_counts(seed: int = 0, groups: Any = GROUPS, sites: Any = ("act",)) -> Counts:
    """Counts and sums of random neurons, some of them active in mostly one group."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(500, 1000, len(groups))
    arrays: dict[str, Any] = {}
    for site in sites:
        width = MODEL["hidden" if site == "down" else "width"]
        share = rng.beta(0.5, 3, (len(groups), MODEL["layers"], width))
        arrays[f"count.{site}"] = np.floor(share * tokens[:, None, None]).astype(np.int64)
        arrays[f"sum.{site}"] = rng.normal(0, 100, share.shape)
        arrays[f"n_nonfinite.{site}"] = np.zeros(share.shape, np.int64)
    return Counts(list(groups), tokens, arrays)


def write_folder(folder: Path, counts: Counts | None = None, **facts: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    counts = make_counts() if counts is None else counts
    counts.write(folder / NAME)
    manifest = Manifest(folder)
    manifest.describe(**({"model": MODEL, "threshold": 0.0} | facts))
    manifest.finish("count", {"corpus": "x"}, [folder / NAME], reads=[])
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "counts")


def test_lape_sets_scores_and_manifest(folder: Path) -> None:
    output = folder / "neurons.json"
    rates = {"top_rate": 0.1, "filter_rate": 0.8, "bar_ratio": 0.7}
    result = rank_counts(folder, output, **rates)
    counts = make_counts()
    p = activation_probability(counts.arrays["count.act"], counts.tokens)
    found = lape(p, **rates)
    for g, name in enumerate(GROUPS):
        expected = [
            (*divmod(place, 40), float(found.entropy.reshape(-1)[place]))
            for place in found.chosen.tolist()
            if p[g].reshape(-1)[place] > found.bar
        ]
        assert [(la, i, score) for la, _, i, score in result.sets[name]] == expected
        assert {site for _, site, _, _ in result.sets[name]} == {"gate"}
    assert NeuronFile.read(output) == result and result.model == MODEL
    chosen = result.selection
    assert (chosen["threshold"], chosen["bar"]) == (found.threshold, found.bar)
    assert (chosen["top"], chosen["chosen"], chosen["candidates"]) == (12, 12, found.candidates)
    assert chosen["activation_threshold"] == 0.0 and "low is specific" in chosen["score"]
    times = Counter((la, i) for s in result.sets.values() for la, _, i, _ in s)
    assert chosen["multiplicity"] == [
        sum(n == wanted for n in times.values()) for wanted in range(1, max(times.values()) + 1)
    ]
    assert chosen["neurons"] == {name: len(result.sets[name]) for name in GROUPS}
    with safe_open(folder / "scores.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["groups"]) == GROUPS
        assert sorted(file.keys()) == ["lape.act", "probability.act"]
        entropy, probability = file.get_tensor("lape.act"), file.get_tensor("probability.act")
    assert entropy.dtype == np.float64 and probability.dtype == np.float32
    np.testing.assert_array_equal(entropy, found.entropy)
    np.testing.assert_array_equal(probability, p.astype(np.float32))
    manifest = Manifest(folder)
    entry = manifest.data["stages"]["identify"]
    assert entry["files"] == ["scores.safetensors", "neurons.json"] and entry["top"] == 12
    assert entry["inputs"]["digests"] == {NAME: sha256(folder / NAME)}
    assert entry["inputs"]["top_rate"] == 0.1 and "count" in manifest.data["stages"]
    assert all(manifest.is_intact(name) for name in manifest.data["files"])


def test_the_same_call_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        rank_counts(folder, tmp_path / name / "neurons.json", top=9)
    for file in ("neurons.json", "scores.safetensors", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    described = Manifest(tmp_path / "a").data
    assert described["model"] == MODEL and described["threshold"] == 0.0
    assert [*described["stages"]] == ["identify"]
    assert [*Manifest(folder).data["stages"]] == ["count"]


@pytest.mark.parametrize("method", ["probability", "mean"])
def test_baselines(folder: Path, method: str) -> None:
    result = rank_counts(
        folder, folder / "neurons.json", method=method, top_rate=0.05, precision="float64"
    )
    counts = make_counts()
    array = counts.arrays["count.act" if method == "probability" else "sum.act"]
    for g, name in enumerate(GROUPS):
        values = (array[g] / counts.tokens[g]).reshape(-1).tolist()
        order = sorted(range(120), key=lambda i: (-values[i], i))[:6]
        assert result.sets[name] == [(i // 40, "gate", i % 40, values[i]) for i in order]
    assert result.method == method and result.selection["top"] == 6


def test_random_sets(folder: Path) -> None:
    def draw(**options: Any) -> dict[str, Any]:
        path = folder / "neurons.json"
        return rank_counts(folder, path, method="random", top=8, force=True, **options).sets

    sets = draw()
    assert draw() == sets != draw(seed=1)
    assert draw(groups=["zh"]) == {"zh": sets["zh"]}
    assert {len({n[:3] for n in chosen}) for chosen in sets.values()} == {8}
    assert {score for chosen in sets.values() for *_, score in chosen} == {0.0}
    assert sets["en"] != sets["zh"]


def test_groups_are_a_part_in_the_order_given(folder: Path) -> None:
    result = rank_counts(folder, folder / "neurons.json", groups=["a, b", "en"], top=7)
    counts = make_counts().take(["a, b", "en"])
    found = lape(activation_probability(counts.arrays["count.act"], counts.tokens), top=7)
    assert [*result.sets] == ["a, b", "en"]
    assert [len(chosen) for chosen in result.sets.values()] == [len(m) for m in found.members]
    with pytest.raises(RelneuronError, match="no group 'fr'") as caught:
        rank_counts(folder, folder / "n.json", groups=["en", "fr"])
    assert "en, zh" in caught.value.fix
    with pytest.raises(RelneuronError, match="'en' is given twice"):
        rank_counts(folder, folder / "n.json", groups=["en", "en"])


@pytest.mark.parametrize(
    ("site", "neuron_site", "width"),
    [("gate", "gate", 40), ("product", "gate", 40), ("up", "up", 40), ("down", "down", 16)],
)
def test_sites(tmp_path: Path, site: str, neuron_site: str, width: int) -> None:
    folder = write_folder(tmp_path / "c", make_counts(sites=("gate", "up", "product", "down")))
    result = rank_counts(folder, folder / "neurons.json", site=site, top=6)
    neurons = [neuron for chosen in result.sets.values() for neuron in chosen]
    assert neurons and {neuron[1] for neuron in neurons} == {neuron_site}
    with safe_open(folder / "scores.safetensors", "numpy") as file:
        assert file.get_tensor(f"lape.{site}").shape == (3, width)
        assert file.get_tensor(f"probability.{site}").shape == (3, 3, width)
    with pytest.raises(RelneuronError, match="no counts of site 'act', only of gate, up"):
        rank_counts(folder, folder / "n.json")


def test_a_group_without_tokens_is_left_out(tmp_path: Path) -> None:
    counts = make_counts().take(["en", "empty", "zh"])
    folder = write_folder(tmp_path / "c", counts)
    with pytest.warns(UserWarning, match="'empty' has no token"):
        result = rank_counts(folder, folder / "neurons.json", top=5)
    assert [*result.sets] == ["en", "zh"] and result.selection["left_out"] == ["empty"]
    two = ["en", "empty"]
    with (
        pytest.warns(UserWarning, match="'empty' has no token"),
        pytest.raises(RelneuronError, match="at least two groups with tokens, there is en"),
    ):
        rank_counts(folder, folder / "n.json", groups=two)
    with pytest.warns(UserWarning, match="'empty' has no token"):
        one = rank_counts(folder, folder / "n.json", groups=two, method="probability", top=5)
    assert [*one.sets] == ["en"] and len(one.sets["en"]) == 5
    with pytest.raises(RelneuronError, match="no group with tokens"):
        rank_counts(folder, folder / "m.json", groups=["empty"], method="random")


def test_limits_that_are_not_there_are_null(folder: Path) -> None:
    path = folder / "neurons.json"
    result = rank_counts(folder, path, filter_rate=0, bar_ratio=0, top=3)
    assert result.selection["threshold"] is None and result.selection["bar"] is None
    assert [len(chosen) for chosen in result.sets.values()] == [3, 3, 3]
    assert result.selection["multiplicity"] == [0, 0, 3]
    assert "Infinity" not in path.read_text()
    few = rank_counts(folder, path, filter_rate=1 - 1 / 360, top=9, force=True)
    assert few.selection["candidates"] == few.selection["chosen"] == 1
    assert "9 neurons were wanted, 1 pass the filter" in few.selection["reason"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"site": "attention"}, "unknown --site"),
        ({"precision": "float16"}, "unknown --precision"),
        ({"top": 0}, "--top must be at least 1"),
        ({"top_rate": 2.0}, "--top-rate"),
        ({"filter_rate": math.nan}, "--filter-rate"),
        ({"bar_ratio": -1.0}, "--bar-ratio"),
        ({"top_rate": 0.001}, "--top-rate 0.001 of 120 neurons is none"),
    ],
)
def test_options_that_are_refused(folder: Path, options: dict[str, Any], words: str) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(RelneuronError, match=words):
        rank_counts(folder, folder / "neurons.json", **options)
    with pytest.raises(RelneuronError, match="unknown method 'ap'"):
        identify_counts(folder, folder / "neurons.json", method="ap")
    assert sorted(folder.iterdir()) == before


def test_folders_that_are_refused(tmp_path: Path) -> None:
    def refused(folder: Path, words: str, **options: Any) -> None:
        with pytest.raises(RelneuronError, match=words):
            rank_counts(folder, tmp_path / "out" / "neurons.json", **options)
        assert not (tmp_path / "out").exists()

    bare = tmp_path / "bare"
    bare.mkdir()
    make_counts().write(bare / NAME)
    refused(bare, "has no count in its manifest")
    gone = write_folder(tmp_path / "gone")
    (gone / NAME).unlink()
    refused(gone, "does not exist")
    changed = write_folder(tmp_path / "changed")
    make_counts(seed=1).write(changed / NAME)
    refused(changed, "not the file that was written")
    refused(write_folder(tmp_path / "other", model=MODEL | {"width": 41}), r"shape \(3, 40\) .* 41")
    over = make_counts()
    over.arrays["count.act"][1, 2, 3] = over.tokens[1] + 1
    refused(write_folder(tmp_path / "over", over), "group 'zh' has .* tokens, but counts")
    plain = make_counts()
    del plain.arrays["sum.act"]
    refused(write_folder(tmp_path / "plain", plain), "no sums at site act", method="mean")
    for name, value in (("sum.act", math.inf), ("n_nonfinite.act", 1)):
        bad = make_counts()
        bad.arrays[name][0, 0, 0] = value
        refused(write_folder(tmp_path / name, bad), "were not all finite", method="mean")


def test_a_second_choice_leaves_the_scores_of_the_first(folder: Path) -> None:
    rank_counts(folder, folder / "neurons.json", top=3)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = rank_counts(folder, folder / "en.zh.json", groups=["en", "zh"], top=4)
    for name in ("neurons.json", "scores.safetensors", NAME):
        assert (folder / name).read_bytes() == before[name], name
    with safe_open(folder / "en.zh.scores.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["groups"]) == [*result.sets] == ["en", "zh"]
    manifest = Manifest(folder)
    files = ["en.zh.scores.safetensors", "en.zh.json"]
    assert manifest.data["stages"]["identify"]["files"] == files
    assert [*manifest.data["files"]] == sorted([NAME, *files])
    assert all(manifest.is_intact(name) for name in manifest.data["files"])


def test_an_output_is_only_replaced_with_force(folder: Path) -> None:
    path = folder / "neurons.json"
    rank_counts(folder, path, top=3)
    before = path.read_bytes()
    with pytest.raises(RelneuronError, match="exists"):
        rank_counts(folder, path, top=4)
    assert path.read_bytes() == before
    rank_counts(folder, path, top=4, force=True)
    assert path.read_bytes() != before


def test_inputs_change_with_the_counts_and_the_options(folder: Path, tmp_path: Path) -> None:
    def inputs(folder: Path, method: str = "lape", **asked: Any) -> Any:
        return identify_counts_inputs(folder, method, OPTIONS[method](**asked))

    first = inputs(folder, precision="float64")
    assert inputs(folder, precision="float64") == first
    assert inputs(folder, precision="float64", bar_ratio=0.9) != first
    # What a method does not take is none of its inputs, nor what does nothing.
    assert "seed" not in first
    assert inputs(folder, top=3, top_rate=0.5) == inputs(folder, top=3)
    drawn = [inputs(folder, "random", seed=seed) for seed in (0, 1)]
    assert drawn[0] != drawn[1] and "bar_ratio" not in drawn[0]
    other = write_folder(tmp_path / "other", make_counts(seed=1))
    assert inputs(other, precision="float64") != first


def test_nothing_is_written_beside_a_manifest_of_another_version(
    folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"schema": "relneuron.study/9"}')
    with pytest.raises(RelneuronError, match="has the schema"):
        rank_counts(folder, other / "neurons.json", top=3)
    assert [path.name for path in other.iterdir()] == ["manifest.json"]
