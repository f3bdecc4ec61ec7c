"""Counts in the format of the LAPE authors: round trips, imported counts, damaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relneuron.artifact.counts import Counts
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.methods.counts.authors_files import (
    read_counts_pth,
    write_counts_pth,
)
from relneuron.methods.counts.folders import import_counts, name_counts
from tests.methods.counts.test_authors_files import SMALL, save


def test_counts_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    groups = ["en", "../../zh", "a\nb", "CON"]
    tokens = np.array([100, 200, 300, 400])
    count = rng.integers(0, 100, (4, 3, 5))
    counts, model = Counts(groups, tokens, {"count.act": count}), "meta-llama/Llama-2-7b"
    written = write_counts_pth(counts, tmp_path / "out", model)
    assert [path.name for path in written] == [
        "activation.en.train.Llama-2-7b",
        "activation.%2E%2E%2F%2E%2E%2Fzh.train.Llama-2-7b",
        "activation.a%0Ab.train.Llama-2-7b",
        "activation.CON.train.Llama-2-7b",
    ]
    there = [path for path in tmp_path.rglob("*") if path.name != ".lock"]
    assert sorted(there) == sorted([tmp_path / "out", *written])
    paths = name_counts([str(path) for path in written])
    assert paths == dict(zip(groups, written, strict=True))
    assert name_counts([str(tmp_path / "out")]) == paths
    found = read_counts_pth(paths, {"layers": 3, "width": 5})
    assert found.groups == groups and found.tokens.tolist() == tokens.tolist()
    assert found.arrays["count.act"].dtype == np.int64
    np.testing.assert_array_equal(found.arrays["count.act"], count)
    data = torch.load(written[0], weights_only=True)
    assert {*data} == {"n", "over_zero"} and type(data["n"]) is int
    assert data["over_zero"].dtype == torch.int32 and data["over_zero"].shape == (3, 5)
    with pytest.raises(RelneuronError, match="exists"):
        write_counts_pth(found, tmp_path / "out", model)
    twins = Counts(["EN", "en"], tokens[:2], {"count.act": count[:2]})
    with pytest.raises(RelneuronError, match="EN, en some differ in their case only"):
        write_counts_pth(twins, tmp_path / "twins", model)
    assert not (tmp_path / "twins").exists()


def test_counts_beyond_32_bits(tmp_path: Path) -> None:
    count = np.array([[[1 << 31, 5]]])
    counts = Counts(["a"], np.array([1 << 33]), {"count.act": count})
    with pytest.warns(UserWarning, match="hold int64"):
        (path,) = write_counts_pth(counts, tmp_path, "m")
    np.testing.assert_array_equal(read_counts_pth({"a": path}).arrays["count.act"], count)
    with pytest.raises(RelneuronError, match="of gate, not of act"):
        write_counts_pth(
            Counts(["a"], np.array([9]), {"count.gate": count}), tmp_path, "m", force=True
        )


def test_imported_counts_are_a_finished_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = {"n": 9, "over_zero": torch.ones(2, 50, dtype=torch.int32)}
    paths = {"a": save(tmp_path / "a.pth", value), "b": save(tmp_path / "b.pth", value | {"n": 8})}
    folder = tmp_path / "o"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Manifest, "finish", killed)
        import_counts(paths, SMALL, folder)
    left = (folder / "counts.safetensors").read_bytes()
    with pytest.raises(RelneuronError, match=r"counts\.safetensors exists"):
        import_counts({"a": paths["b"], "b": paths["a"]}, SMALL, folder)
    assert (folder / "counts.safetensors").read_bytes() == left
    assert not (folder / "manifest.json").exists()
    counts = import_counts(paths, SMALL, folder)  # what a killed run left needs no --force
    assert (folder / "counts.safetensors").read_bytes() == left == counts.to_bytes()
    assert Manifest(folder).data["groups"] == ["a", "b"]
    assert Manifest(folder).is_intact("counts.safetensors")


def test_no_counts_are_imported_into_a_study_of_relations(tmp_path: Path) -> None:
    value = {"n": 9, "over_zero": torch.ones(2, 50, dtype=torch.int32)}
    paths, prompts = {"a": save(tmp_path / "a.pth", value)}, tmp_path / "o" / "prompts.jsonl"
    prompts.parent.mkdir()
    prompts.write_text("{}")
    Manifest(prompts.parent).finish("prompts", {}, [prompts], reads=[])
    with pytest.raises(RelneuronError, match="o holds a study of relations") as caught:
        import_counts(paths, SMALL, prompts.parent)
    assert "--force" in caught.value.fix
    assert not (prompts.parent / "counts.safetensors").exists()
    import_counts(paths, SMALL, prompts.parent, force=True)
    assert [*Manifest(prompts.parent).data["stages"]] == ["prompts", "count"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1], "holds list"),
        ({"n": 3}, "a dictionary of"),
        ({"n": True, "over_zero": torch.ones(2, 3, dtype=torch.int32)}, "n is no number"),
        ({"n": -1, "over_zero": torch.ones(2, 3, dtype=torch.int32)}, "n is no number"),
        ({"n": 9, "over_zero": torch.ones(2, 3)}, "float32"),
        ({"n": 9, "over_zero": torch.ones(6, dtype=torch.int32)}, "not 2-D"),
        ({"n": 9, "over_zero": torch.ones(2, 0, dtype=torch.int32)}, "is empty"),
        ({"n": 9, "over_zero": torch.full((2, 3), -5, dtype=torch.int32)}, "overflowed"),
        ({"n": 9, "over_zero": torch.full((2, 3), 10, dtype=torch.int32)}, "10 for 9 tokens"),
        ({"n": 9, "over_zero": torch.ones(2, 4, dtype=torch.int32)}, "shape"),
    ],
)
def test_what_is_no_file_of_counts(tmp_path: Path, value: object, words: str) -> None:
    good = save(tmp_path / "good.pth", {"n": 9, "over_zero": torch.ones(2, 3, dtype=torch.int32)})
    bad = save(tmp_path / "bad.pth", value)
    with pytest.raises(RelneuronError, match=words) as caught:
        read_counts_pth({"a": good, "b": bad})
    assert "bad.pth" in caught.value.cause and "\n" not in caught.value.cause
    with pytest.raises(RelneuronError, match="the model has"):
        read_counts_pth({"a": good}, {"layers": 3, "width": 3})
    with pytest.raises(RelneuronError, match="no file of counts"):
        read_counts_pth({})
