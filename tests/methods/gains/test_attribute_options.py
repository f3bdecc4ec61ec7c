"""Options of `attribute`: what is kept, scored and written; batch sizes; the model afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from relneuron.artifact.gains import read_attributions
from relneuron.artifact.manifest import Manifest
from relneuron.methods.gains.options import KINDS
from tests.kit.attribution_runs import OPTIONS, Attributed, files_of, rows_by
from tests.kit.files import read_rows


def test_known_sentences_only(llama: Attributed, tmp_path: Path) -> None:
    """The others have no scores; those of the known ones are what they are among all."""
    output = llama.attribute(tmp_path / "out", replace(OPTIONS, keep="known", compare=False))
    known = llama.known()
    gains, whole = (
        load_file(folder / "gains.safetensors") for folder in (output, llama.folder / "out")
    )
    for name, values in gains.items():
        for row, is_known in enumerate(known):
            if is_known:
                assert np.abs(values[row] - whole[name][row]).max() < 2e-5
            else:
                assert np.isnan(values[row]).all()
    ids = {row["id"] for row in read_rows(output / "attributions.csv")}
    assert ids == {name for name, is_known in zip(llama.names, known, strict=True) if is_known}
    rows = read_rows(output / "targets.csv")
    assert [row["kept"] == "1" for row in rows] == known
    assert not (output / "comparison.csv").exists()


def test_nothing_known_is_a_notice(tmp_path: Path) -> None:
    unknown = Attributed("llama", tmp_path, ranks=[80] * 12)
    assert not any(unknown.known())
    with pytest.warns(UserWarning, match="nothing compared: the model knows the answer of no sen"):
        unknown.attribute(tmp_path / "all")
    assert "attributions.csv" in files_of(tmp_path / "all")
    assert "comparison.csv" not in files_of(tmp_path / "all")
    fallbacks = Manifest(tmp_path / "all").data["fallbacks"]
    assert any("nothing compared" in note for note in fallbacks)
    with pytest.warns(UserWarning, match="nothing scored"):
        unknown.attribute(tmp_path / "known", replace(OPTIONS, keep="known", compare=False))
    assert not read_rows(tmp_path / "known" / "attributions.csv")


def test_some_kinds_only(llama: Attributed, tmp_path: Path) -> None:
    whole = rows_by(llama.folder / "out" / "attributions.csv", "kind")
    for kind in KINDS:
        output = tmp_path / kind
        llama.attribute(output, replace(OPTIONS, kinds=(kind,), compare=False))
        rows = read_rows(output / "attributions.csv")
        assert rows == whole[(kind,)]
        assert (output / "gains.safetensors").exists() == (kind == "ffn_neuron")


def test_a_table_of_parquet_holds_the_same(llama: Attributed, tmp_path: Path) -> None:
    output = llama.attribute(tmp_path / "out", replace(OPTIONS, format="parquet", compare=False))
    assert list(read_attributions(output)) == list(read_attributions(llama.folder / "out"))
    assert not (output / "attributions.csv").exists()


@pytest.mark.parametrize("batch_tokens", [1, 7, 500])
def test_the_batch_size_changes_no_score(
    llama: Attributed, tmp_path: Path, batch_tokens: int
) -> None:
    output = llama.attribute(tmp_path / "out", replace(OPTIONS, batch_tokens=batch_tokens))
    for ours, theirs in zip(
        *(load_file(f / "gains.safetensors").values() for f in (output, llama.folder / "out")),
        strict=True,
    ):
        assert np.abs(ours - theirs).max() < 2e-5
    pairs = zip(
        *(read_rows(f / "interventions.csv") for f in (output, llama.folder / "out")), strict=True
    )
    for row, other in pairs:
        assert [row[c] for c in ("condition", "id", "rank")] == [
            other[c] for c in ("condition", "id", "rank")
        ]
        assert abs(float(row["logprob"]) - float(other["logprob"])) < 1e-5


def test_the_model_is_left_as_it_was(llama: Attributed, tmp_path: Path) -> None:
    before = {name: dict(module.__dict__) for name, module in llama.model.named_modules()}
    implementation = llama.model.config._attn_implementation
    llama.attribute(tmp_path / "out", replace(OPTIONS, kinds=("head",)))
    assert llama.model.config._attn_implementation == implementation
    for name, module in llama.model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert "forward" not in module.__dict__ and not module._forward_hooks
