"""What `attribute` does with files that are there already: its own, of others, in use."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import relneuron.methods.gains.attribute as attribute_module
from relneuron.artifact.manifest import Manifest, locked
from relneuron.methods.gains.attribute import JOURNAL
from relneuron.texts.knowledge import read_knowledge
from tests.kit.attribution_runs import OPTIONS, Attributed, files_of
from tests.methods.gains.test_attribute_input import QUICK, refused


def test_the_output_is_a_file(llama: Attributed, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused(llama, tmp_path / "out", "is a file", QUICK)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["targets.csv", "attributions.parquet", "gains.safetensors", "comparison.csv"]
)
def test_files_of_others_stay(llama: Attributed, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / name).write_text("mine")
    assert refused(llama, output, f"{name} exists", QUICK).exit_code == 2
    llama.attribute(output, QUICK, force=True)
    assert (output / "targets.csv").read_text().startswith("id,relation")


def test_other_prompts_stay(llama: Attributed, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "prompts.jsonl").write_text("mine")
    refused(llama, output, "prompts.jsonl exists", QUICK)
    # A file that is read is left as it is, however it is written.
    prompts = read_knowledge(llama.path)
    text = "".join(json.dumps(asdict(p), indent=None, sort_keys=True) + "\n" for p in prompts)
    (output / "prompts.jsonl").write_text(text)
    llama.attribute(output, QUICK, output / "prompts.jsonl")
    assert (output / "prompts.jsonl").read_text() == text


def test_what_is_finished_is_left_as_it_is(
    llama: Attributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    shutil.copytree(llama.folder / "out", output)
    before = files_of(output)

    def never(*_: Any) -> None:
        raise AssertionError("a sentence was scored again")

    monkeypatch.setattr(attribute_module.Scorer, "score", never)
    for force in (False, True):
        # Killed behind the manifest, a run leaves its journal.
        (output / JOURNAL).write_text("left")
        llama.attribute(output, force=force)
        assert files_of(output) == before
    (output / "targets.csv").write_text("changed")
    assert "digest differs" in refused(llama, output, "is not the file that was written").cause


def test_other_options_need_force(llama: Attributed, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(llama.folder / "out", output)
    other = replace(OPTIONS, top=3, compare=False)
    cause = "compare: True -> False; .*; top: 40 -> 3"
    refused(llama, output, f"attribute was made from other inputs: {cause}", other)
    llama.attribute(output, other, force=True)
    llama.attribute(tmp_path / "again", other)
    assert files_of(output) == files_of(tmp_path / "again")
    assert not (output / "comparison.csv").exists()


def test_forced_and_killed_it_goes_on_with_force_only(
    llama: Attributed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, other = tmp_path / "out", replace(OPTIONS, top=3, compare=False)
    shutil.copytree(llama.folder / "out", output)
    true, n_scored = attribute_module.Scorer.score, 0

    def score(self: Any, rows: list[int], keep: Any) -> Any:
        nonlocal n_scored
        n_scored += 1
        if n_scored == 3:
            raise KeyboardInterrupt
        return true(self, rows, keep)

    monkeypatch.setattr(attribute_module.Scorer, "score", score)
    with pytest.raises(KeyboardInterrupt):
        llama.attribute(output, other, force=True)
    # Neither attribution is whole: the first one's gains are gone.
    refused(llama, output, "made from other inputs", other)
    refused(llama, output, "exists|not the file")
    llama.attribute(output, other, force=True)
    n_batches = Manifest(output).data["stages"]["attribute"]["batch_plan"]["batches"]
    assert n_scored == n_batches + 1
    llama.attribute(tmp_path / "again", other)
    assert files_of(output) == files_of(tmp_path / "again")


def test_a_study_of_a_corpus_is_not_overwritten(llama: Attributed, tmp_path: Path) -> None:
    output = tmp_path / "count"
    manifest = Manifest(output)
    manifest.data["stages"]["count"] = {"inputs": {}, "files": []}
    manifest.save()
    refused(llama, output, "holds a study of groups of text", QUICK)


def test_a_locked_folder(llama: Attributed, tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys, time; from pathlib import Path\n"
        "from relneuron.artifact.manifest import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    try:
        refused(llama, tmp_path / "out", "another process is writing to", QUICK)
    finally:
        holder.communicate()
    llama.attribute(tmp_path / "out", QUICK)
    with locked(tmp_path / "out"):
        assert "targets.csv" in files_of(tmp_path / "out")
