"""A model, a tokenizer or a text that is another one than before is seen by every stage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relneuron.ablation.nll import nll
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.manifest import Manifest
from relneuron.methods.counts.merge import merge
from relneuron.model.load import load_model, load_tokenizer
from relneuron.study.run import run_study
from relneuron.texts.sources import parse_sources
from tests.artifact.handed import NLL, OPTIONS, counted
from tests.artifact.test_integrity import STAGES, ablated, generated


def changed(model_folder: Path, tmp_path: Path, change: Callable[[Any, Any], object]) -> Path:
    """A copy of the model whose weights and tokenizer `change` has changed."""
    folder = tmp_path / "changed"
    model = load_model(str(model_folder))
    tokenizer = load_tokenizer(str(model_folder))
    with torch.no_grad():
        change(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def without_columns(model: Any, _: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, 1:] = 0


def other_template(_: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages }}"


def other_tokens(_: Any, tokenizer: Any) -> None:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("Person1", "Person2")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without_columns, "record was made from other inputs: model.digest: "),
        (other_template, "record was made from other inputs: tokenizer: "),
        (other_tokens, "record was made from other inputs: tokenizer: "),
    ],
)
def test_a_finished_run_is_not_taken_for_that_of_a_changed_model(
    made: Path, model_folder: Path, facts: Path, tmp_path: Path, change: Any, named: str
) -> None:
    model = changed(model_folder, tmp_path, change)
    study = tmp_path / "study"
    shutil.copytree(made / "study", study)
    with pytest.raises(RelneuronError, match=named):
        run_study(str(model), facts, study, OPTIONS, quiet=True)


def test_every_stage_notes_its_tokenizer(made: Path) -> None:
    noted = {
        stage: entry["inputs"].get("tokenizer")
        for folder in ("study", "attribution", "counts")
        for stage, entry in Manifest(made / folder).data["stages"].items()
        if stage in ("record", "ablate", "attribute", "count", "nll")
    }
    assert len(noted) == 4 and len(set(noted.values())) == 1  # a new identify forgot nll
    assert None not in noted.values()


def test_neurons_of_other_weights_are_taken_with_a_notice_that_stays(
    made: Path, model_folder: Path, corpus: list[str], tmp_path: Path
) -> None:
    folder = changed(model_folder, tmp_path, without_columns)
    loaded = load_model(str(folder)), load_tokenizer(str(folder))
    out = tmp_path / "out"
    with pytest.warns(
        match="neurons.json: neurons of other weights: found in .*model.*, used in m$"
    ):
        ablated(loaded, corpus, made, out)
    fallbacks = Manifest(out).data["fallbacks"]
    assert any("neurons of other weights" in notice for notice in fallbacks)
    with pytest.warns(match="neurons of other weights"):
        STAGES["nll"][0](loaded, corpus, made, tmp_path / "nll")
    assert any("other weights" in n for n in Manifest(tmp_path / "nll").data["fallbacks"])
    with pytest.warns(UserWarning) as said:
        generated(loaded, corpus, made, tmp_path / "texts", set_to="a")
    texts = [str(warning.message) for warning in said]
    assert [text.split(": ")[1] for text in texts] == ["neurons of other weights"] * 1 + [
        "means of other weights"
    ]


@pytest.mark.parametrize("name", ["ablate", "nll"])
def test_a_folder_of_a_study_is_not_filled_by_another_model(
    made: Path, model_folder: Path, corpus: list[str], tmp_path: Path, name: str
) -> None:
    folder = changed(model_folder, tmp_path, without_columns)
    loaded = load_model(str(folder)), load_tokenizer(str(folder))
    root = tmp_path / "made"
    shutil.copytree(made, root)
    study = root / ("study" if name == "ablate" else "counts")
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    with pytest.raises(RelneuronError, match="holds a study of another model, or of other weights"):
        if name == "ablate":
            ablated(loaded, corpus, root, study, force=True)
        else:
            neurons = study / "neurons.json"
            nll("m", *loaded, neurons, parse_sources(corpus), study, NLL, force=True, quiet=True)
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


def test_the_middle_of_a_text_counts(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    data = bytearray(b"Person1 eats plum\n" * 180_000)  # 3 MiB
    text.write_bytes(data)
    corpus = [f"a={text}"]
    counted(loaded, corpus, tmp_path / "one", max_tokens=64)
    data[len(data) // 2] ^= 1
    text.write_bytes(data)
    with pytest.raises(RelneuronError, match=r"other inputs: sources.0.files.0.sha256"):
        counted(loaded, corpus, tmp_path / "one", max_tokens=64)
    counted(loaded, corpus, tmp_path / "two", max_tokens=64)
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both")  # two texts, not one twice


def test_a_text_that_changes_while_it_is_counted_is_refused(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relneuron.methods.counts.counter import Speed

    text, true = tmp_path / "a.txt", Speed.count
    text.write_text("Person1 eats plum\n" * 50)

    def counting(*args: Any) -> None:
        text.write_text("Person1 eats pear\n" * 50)
        true(*args)

    monkeypatch.setattr(Speed, "count", counting)
    with pytest.raises(RelneuronError, match=r"a text changed while it was read: 0.files.0.sha256"):
        counted(loaded, [f"a={text}"], tmp_path / "out")
    assert not (tmp_path / "out" / "counts.safetensors").exists()
