"""`merge`: shards of one corpus are one process, and what must not be added is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relneuron.artifact.counts import Counts
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.methods.counts.merge import merge
from tests.conftest import tiny_model
from tests.kit.count_crash import LEFT, files_of
from tests.kit.counted import Numbers, assert_equal, draw, run

ASKED: dict[str, Any] = {"window": 16, "batch_tokens": 48}


@pytest.fixture(scope="module")
def documents() -> dict[str, list[list[int]]]:
    return draw(("en", "zh", "fr"), 250)


def shards(model: Any, documents: Any, folder: Path, of: int, **asked: Any) -> list[Path]:
    """One count of every `of`-th batch each."""
    found = []
    for number in range(1, of + 1):
        found.append(folder / f"{number} of {of}")
        run(model, documents, found[-1], shard=(number, of), **(ASKED | asked))
    return found


def refused(folders: list[Path], output: Path, cause: str, code: int = 1) -> RelneuronError:
    before = files_of(output) if output.is_dir() else None
    with pytest.raises(RelneuronError, match=cause) as error:
        merge(folders, output)
    assert error.value.exit_code == code and "\n" not in error.value.cause + error.value.fix
    assert (files_of(output) if output.is_dir() else None) == before
    return error.value


@pytest.mark.parametrize("of", [2, 3])
@pytest.mark.parametrize("mode", ["packed", "documents"])
def test_shards_are_one_process_to_the_last_bit(
    model: Any, documents: Any, tmp_path: Path, of: int, mode: str
) -> None:
    whole = run(model, documents, tmp_path / "whole", mode=mode, **ASKED)
    parts = shards(model, documents, tmp_path, of, mode=mode)
    total = merge(parts, tmp_path / "o")
    assert_equal(total, whole)
    name = "counts.safetensors"
    assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert files_of(tmp_path / "o").keys() == LEFT
    assert all((Counts.read(part / name).tokens > 0).all() for part in parts)
    merge(parts[::-1], tmp_path / "back")
    assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "o" / name).read_bytes()


def test_moments_are_those_of_one_process_but_for_rounding(
    model: Any, documents: Any, tmp_path: Path
) -> None:
    whole = run(model, documents, tmp_path / "whole", moments=True, **ASKED)
    total = merge(shards(model, documents, tmp_path, 3, moments=True), tmp_path / "o")
    assert total.arrays.keys() == whole.arrays.keys()
    for name, array in whole.arrays.items():
        if name.startswith("sum"):
            assert np.allclose(total.arrays[name], array, rtol=1e-9, atol=1e-12)
        else:
            assert np.array_equal(total.arrays[name], array), name


def test_the_manifest_says_what_was_added(model: Any, documents: Any, tmp_path: Path) -> None:
    parts = shards(model, documents, tmp_path, 2)
    total = merge(parts, tmp_path / "o")
    manifest = Manifest(tmp_path / "o")
    one = Manifest(parts[0]).data
    for key in ("model", "dtype", "sites", "threshold", "versions", "fallbacks"):
        assert manifest.data[key] == one[key], key
    assert manifest.data["groups"] == total.groups == ["en", "zh", "fr"]
    told = manifest.data["tokens"]
    assert told["counted"] == dict(zip(total.groups, total.tokens.tolist(), strict=True))
    assert [part["counted"] for part in told["parts"]] == [
        Manifest(part).data["tokens"]["counted"] for part in parts
    ]
    assert manifest.is_intact("counts.safetensors")
    assert str(tmp_path) not in (tmp_path / "o" / "manifest.json").read_text()


def test_groups_are_matched_by_their_names(model: Any, documents: Any, tmp_path: Path) -> None:
    one = run(model, {k: documents[k] for k in ("en", "zh")}, tmp_path / "a", **ASKED)
    more = draw(("zh", "vi"), 100, seed=5)
    other = run(model, more, tmp_path / "b", **ASKED)
    total = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "o")
    assert total.groups == ["en", "zh", "vi"]
    assert_equal(total, one + other)
    expected = [one.tokens[0], one.tokens[1] + other.tokens[0], other.tokens[1]]
    assert total.tokens.tolist() == expected


def test_merged_counts_can_be_merged_again(model: Any, documents: Any, tmp_path: Path) -> None:
    first = shards(model, documents, tmp_path / "first", 2)
    more = draw(("zh", "vi"), 120, seed=9)
    second = shards(model, more, tmp_path / "second", 2)
    merge(first, tmp_path / "a")
    merge(second, tmp_path / "b")
    total = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "o")
    assert_equal(total, merge([*first, *second], tmp_path / "flat"))
    for folders in ([tmp_path / "a", tmp_path / "o"], [tmp_path / "o", *second]):
        refused(folders, tmp_path / "twice", "count the same windows")
    whole = run(model, documents, tmp_path / "whole", **ASKED)
    again = merge([tmp_path / "whole", tmp_path / "b"], tmp_path / "p")
    assert_equal(again, whole + Counts.read(tmp_path / "b" / "counts.safetensors"))


def test_a_finished_merge_is_left_alone(model: Any, documents: Any, tmp_path: Path) -> None:
    parts = shards(model, documents, tmp_path, 2)
    total = merge(parts, tmp_path / "o")
    before = files_of(tmp_path / "o")
    assert_equal(merge(parts, tmp_path / "o"), total)
    assert_equal(merge(parts, tmp_path / "o", force=True), total)
    assert files_of(tmp_path / "o") == before
    run(model, draw(("vi",), 90), tmp_path / "vi", **ASKED)
    refused([*parts, tmp_path / "vi"], tmp_path / "o", "count was made from other inputs")
    merge([*parts, tmp_path / "vi"], tmp_path / "o", force=True)
    assert Counts.read(tmp_path / "o" / "counts.safetensors").groups == ["en", "zh", "fr", "vi"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model", "model.digest: "),
        ("tokenizer", "tokenizer: "),
        ({"sites": ("up",)}, "sites: "),
        ({"threshold": 0.25}, "threshold: 0.0 -> 0.25"),
        ({"moments": True}, "moments: False -> True"),
        ({"exclude_bos": True}, "exclude_bos: False -> True"),
        ({"boundaries": "position"}, "boundaries: none -> position"),
    ],
    ids=str,
)
def test_counts_that_mean_something_else_are_refused_by_name(
    model: Any, documents: Any, tmp_path: Path, change: Any, named: str
) -> None:
    run(model, documents, tmp_path / "a", **ASKED)
    other = model
    if change == "model":
        other = tiny_model("llama")
        other.model.layers[0].mlp.up_proj.weight.data[0] *= 2
    tokenizer = Numbers(vocabulary=95) if change == "tokenizer" else Numbers()
    asked = ASKED | (change if isinstance(change, dict) else {})
    run(other, draw(("vi",), 90), tmp_path / "b", tokenizer=tokenizer, **asked)
    error = refused([tmp_path / "a", tmp_path / "b"], tmp_path / "o", "cannot be added")
    assert named in error.cause
    assert str(tmp_path / "a") in error.cause and str(tmp_path / "b") in error.cause


def test_how_windows_were_made_may_differ(model: Any, documents: Any, tmp_path: Path) -> None:
    run(model, documents, tmp_path / "a", **ASKED)
    run(model, draw(("vi",), 90), tmp_path / "b", window=8, mode="documents", batch_tokens=99)
    total = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "o")
    assert total.groups == ["en", "zh", "fr", "vi"]


def test_the_same_windows_twice_and_missing_shards(
    model: Any, documents: Any, tmp_path: Path
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    run(model, documents, whole, **ASKED)
    run(model, documents, again, **ASKED)
    thirds, halves = (shards(model, documents, tmp_path, of) for of in (3, 2))
    other = tmp_path / "other"
    run(model, draw(("vi",), 90), other, **ASKED)
    output = tmp_path / "o"
    for folders, cause in (
        ([whole, whole], "count the same windows"),
        ([whole, again], "count the same windows"),
        ([thirds[0], thirds[1], thirds[0], thirds[2]], "count the same windows"),
        (thirds[:2], "shard 3/3 of the corpus of .*1 of 3 is missing"),
        ([other, thirds[1]], "shard 1/3, 3/3 of the corpus of .*2 of 3 is missing"),
        ([*thirds, *halves], "shards of different numbers: .*1 of 3 .1/3.*2 of 2 .2/2"),
        ([whole, halves[0]], "shards of different numbers"),
    ):
        refused(folders, output, cause)
    assert not output.exists()


def test_the_same_text_in_two_corpora(model: Any, documents: Any, tmp_path: Path) -> None:
    """However it is cut into batches, windows and corpora, a text of a group is counted once."""
    whole, other, output = tmp_path / "whole", tmp_path / "other batches", tmp_path / "o"
    run(model, documents, whole, **ASKED)
    run(model, documents, other, **(ASKED | {"batch_tokens": 99}))
    refused([whole, other], output, "count the same windows")
    halves = shards(model, documents, tmp_path, 2)
    merge(halves, tmp_path / "merged")
    for one in (whole, other):
        refused([tmp_path / "merged", one], output, "shards of different numbers")
        refused([one, tmp_path / "merged"], output, "shards of different numbers")
    part, short = tmp_path / "part", tmp_path / "short"
    run(model, {"vi": draw(("vi",), 90)["vi"], "en": documents["en"]}, part, **ASKED)
    run(model, {"en": documents["en"]}, short, window=8, batch_tokens=48)
    for one in (whole, tmp_path / "merged"):
        for two in (part, short):
            error = refused([one, two], output, r"both count en\.txt")
            assert str(one) in error.cause and str(two) in error.cause
    # Text of one group may be text of another one, too.
    run(model, {"western": documents["en"]}, tmp_path / "b", **ASKED)
    assert merge([whole, tmp_path / "b"], output).groups == ["en", "zh", "fr", "western"]


def test_splits_of_one_data_set_are_two_texts(model: Any, documents: Any, tmp_path: Path) -> None:
    run(model, documents, tmp_path / "a", **ASKED)
    run(model, draw(("vi",), 90), tmp_path / "b", **ASKED)

    def from_dataset(folder: Path, split: str) -> None:
        """As if the texts were a split of a data set in one file."""
        about = {"name": "data", "kind": "hf"}
        files = {"0": about | {"config": None, "split": split}}
        files["1"] = about | {"name": "all.arrow", "bytes": 9, "sha256": "a" * 64}
        manifest = Manifest(folder)
        entry = manifest.data["stages"]["count"]
        sources = {"0": {"group": "en", "text_column": "text", "files": files}}
        inputs = entry["inputs"] | {"sources": sources}
        manifest.finish("count", inputs, [folder / "counts.safetensors"], reads=[])

    from_dataset(tmp_path / "a", "train")
    from_dataset(tmp_path / "b", "test")
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "o").groups[-1] == "vi"
    manifest = Manifest(tmp_path / "b")
    inputs = manifest.data["stages"]["count"]["inputs"]
    inputs["sources"]["0"]["files"]["0"]["split"] = "train"
    inputs["packing"]["window"] = 8
    manifest.save()
    refused([tmp_path / "a", tmp_path / "b"], tmp_path / "p", "both count data")


def test_shards_with_other_batches_are_refused(model: Any, documents: Any, tmp_path: Path) -> None:
    run(model, documents, tmp_path / "1", shard=(1, 2), **ASKED)
    run(model, documents, tmp_path / "2", shard=(2, 2), **(ASKED | {"batch_tokens": 64}))
    error = refused([tmp_path / "1", tmp_path / "2"], tmp_path / "o", "have not the same batches")
    assert "--batch-tokens" in error.fix


def test_shards_may_be_counted_in_other_places(model: Any, documents: Any, tmp_path: Path) -> None:
    whole = run(model, documents, tmp_path / "whole", **ASKED)
    parts = shards(model, documents, tmp_path, 2)
    # As if the second shard was counted on a GPU.
    manifest = Manifest(parts[1])
    for described in (manifest.data["model"], manifest.data["stages"]["count"]["inputs"]["model"]):
        assert described["device"] == "cpu" and described["backend"] != "triton"
        described |= {"backend": "triton", "device": "cuda", "attention": "flash_attention_2"}
    manifest.save()
    assert_equal(merge(parts, tmp_path / "o"), whole)
    assert_equal(merge(parts[::-1], tmp_path / "back"), whole)


def test_killed_between_the_sum_and_the_manifest(
    model: Any, documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, output = shards(model, documents, tmp_path, 2), tmp_path / "o"
    run(model, draw(("vi",), 90), tmp_path / "vi", **ASKED)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Manifest, "finish", killed)
        merge(parts, output)
    left = files_of(output)
    assert left.keys() == LEFT - {"manifest.json"}
    refused([*parts, tmp_path / "vi"], output, r"counts\.safetensors exists", 2)
    merge(parts, output)
    assert files_of(output).keys() == LEFT
    assert files_of(output)["counts.safetensors"] == left["counts.safetensors"]
    assert Manifest(output).is_intact("counts.safetensors")


def test_no_sum_is_written_into_a_study_of_relations(
    model: Any, documents: Any, tmp_path: Path
) -> None:
    parts, output = shards(model, documents, tmp_path, 2), tmp_path / "o"
    output.mkdir()
    (output / "prompts.jsonl").write_text("{}")
    (output / ".lock").touch()
    Manifest(output).finish("prompts", {}, [output / "prompts.jsonl"], reads=[])
    refused(parts, output, "o holds a study of relations")
    merge(parts, output, force=True)
    assert [*Manifest(output).data["stages"]] == ["prompts", "count"]


def test_what_is_no_finished_count(model: Any, documents: Any, tmp_path: Path) -> None:
    good, bad, output = tmp_path / "good", tmp_path / "bad", tmp_path / "o"
    run(model, documents, good, **ASKED)
    refused([good], output, "nothing to merge", 2)
    refused([], output, "nothing to merge", 2)
    refused([good, tmp_path / "none"], output, "none holds no finished count")
    (tmp_path / "file").write_text("x")
    refused([good, tmp_path / "file"], output, "file holds no finished count")
    bad.mkdir()
    refused([bad, good], output, "bad holds no finished count")
    run(model, draw(("vi",), 90), bad, **ASKED)
    path = bad / "counts.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x01")
    refused([good, bad], output, "counts.safetensors is not the file that was written")
    path.unlink()
    refused([good, bad], output, "counts.safetensors is not there")
    path.write_bytes(whole)
    (bad / "manifest.json").write_text("{")
    refused([good, bad], output, "JSON")
    assert not output.exists()


def test_the_output_is_none_of_the_inputs_and_nobody_elses(
    model: Any, documents: Any, tmp_path: Path
) -> None:
    parts = shards(model, documents, tmp_path, 2)
    refused(parts, parts[0], "is one of the counts", 2)
    (tmp_path / "link").symlink_to(parts[1], target_is_directory=True)
    refused(parts, tmp_path / "link", "is one of the counts", 2)
    output = tmp_path / "o"
    output.mkdir()
    (output / "counts.safetensors").write_text("mine")
    with pytest.raises(RelneuronError, match=r"counts\.safetensors exists"):
        merge(parts, output)
    assert (output / "counts.safetensors").read_text() == "mine"
    merge(parts, output, force=True)
    assert json.loads((output / "manifest.json").read_text())["groups"] == ["en", "zh", "fr"]
