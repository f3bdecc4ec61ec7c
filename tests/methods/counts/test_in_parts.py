"""Models that two processes hold in parts (tensor parallelism): the counters of one process.

All of it runs in forks of one process (kit/in_parts.py); one test starts torchrun itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.stage import commands, loading
from relneuron.model.load import load_model
from relneuron.model.shards import agree, n_parts, own_inputs, part_number, together
from tests.conftest import tiny_model
from tests.kit import in_parts
from tests.kit.count_crash import LEFT, files_of
from tests.kit.forked import Forked

has_gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
has_parts = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 16)
in_two = pytest.mark.skipif(
    not (has_gloo and has_parts), reason="gloo, or transformers 5.16, is not here"
)


def done(what: str, *arguments: object) -> Any:
    process = Forked(in_parts.main, what, *map(str, arguments))
    assert process.wait(600) == 0, process.said()
    return json.loads(process.said()[0].splitlines()[-1])


@in_two
@pytest.mark.parametrize("name", in_parts.MODELS)
def test_two_processes_count_as_one(name: str, tmp_path: Path) -> None:
    done("same_counters", tmp_path, name)


@in_two
def test_the_contexts_of_a_model_in_parts(tmp_path: Path) -> None:
    done("contexts", tmp_path)


@in_two
def test_experts_in_parts_are_refused(tmp_path: Path) -> None:
    done("experts", tmp_path)


@in_two
def test_the_end_of_one_is_the_end_of_all(tmp_path: Path) -> None:
    done("ends_of_one", tmp_path)


@in_two
@pytest.mark.slow
def test_killed_while_it_writes(tmp_path: Path) -> None:
    assert done("kills", tmp_path) > 5


@in_two
@pytest.mark.slow
def test_torchrun(model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "en.txt"
    text.write_text("Person1 eats plum. Person2 lives in Oslo.\n" * 40, encoding="utf-8")
    words = ["count", str(model_folder), f"en={text}", "--window", "16", "--workers", "1"]
    words += ["--tensor-parallel-size", "2", "-o"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "relneuron"]
    result = subprocess.run(
        [sys.executable, *launcher, *words, str(tmp_path / "a"), "--quiet"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"-> {tmp_path / 'a'}") == 1  # one process speaks
    assert files_of(tmp_path / "a").keys() == LEFT
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert commands(manifest)[0].startswith("torchrun --nproc-per-node 2 -m relneuron count")
    assert manifest["stages"]["count"]["commands"][0][:3] == words[:3]


def refused(folder: object, cause: str, fix: str, code: int, **options: Any) -> None:
    with pytest.raises(RelneuronError, match=cause) as caught:
        load_model(str(folder), **{"tensor_parallel_size": 2, **options})
    assert fix in caught.value.fix and caught.value.exit_code == code


def test_what_cannot_be_held_in_parts(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begin = "torchrun --nproc-per-node 2 -m relneuron"
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    refused(model_folder, "2 processes.*one without torchrun", begin, 2)
    refused(model_folder, "each process takes a GPU", "leave out --device", 2, device="cpu")
    refused(model_folder, "each process", "leave out --device-map", 2, device_map="auto")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")  # two models of two parts each
    refused(model_folder, "2 processes.*torchrun started 4", "several of them by --shard", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = json.loads((model_folder / "config.json").read_text())
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    (quantised / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    refused(quantised, "is quantised", "--device-map auto", 1)
    monkeypatch.setattr("relneuron.model.shards.fields", lambda _: ())  # as before 5.16
    refused(model_folder, "does not load a model in parts", "transformers>=5.16", 1)


def test_a_model_in_one_part_waits_for_nobody() -> None:
    model = tiny_model("llama")
    assert (n_parts(model), part_number(model)) == (1, 0)
    assert own_inputs(model.model.layers[0].mlp.down_proj, 48) == (0, 48)
    agree(model, "anything")
    run = tuple
    assert together(model, run) is run


def test_other_commands_take_no_parts(relneuron: Any) -> None:
    code, _, said = relneuron("record", "m", "p.jsonl", "-o", "x", "--tensor-parallel-size", "2")
    assert code == 2 and "--tensor-parallel-size" in said


def test_the_command_of_a_model_in_parts() -> None:
    about = {"device": "cuda", "dtype": "bfloat16", "backend": "triton", "revision": None}
    options = loading(about | {"tensor_parallel_size": 8})
    assert options["tensor_parallel_size"] == 8 and options["device"] is None
