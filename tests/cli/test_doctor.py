"""`relneuron doctor` says yes where every stage takes a model, and else why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from relneuron.artifact import installed
from relneuron.artifact.installed import EXTRAS, USES, install_command
from relneuron.cli.doctor import machine_report, model_report
from relneuron.cli.main import stages
from tests.conftest import tiny_model


def unsupported_models() -> dict[str, Any]:
    """Models all of whose layers have a supported MLP, and which no stage takes."""
    import transformers as hf

    size = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    own = {"lru_width": 16, "block_types": ["recurrent", "attention"], "head_dim": 8}
    recurrent = hf.RecurrentGemmaConfig(**size, **own)
    mixed = tiny_model("llama")
    for layer in mixed.model.layers[1:]:
        layer.mlp = torch.nn.Sequential(
            torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32)
        )
    return {
        "without a cache of keys and values": hf.RecurrentGemmaForCausalLM(recurrent).eval(),
        "whether their MLPs are gated": mixed.eval(),
    }


def test_doctor_says_no_where_stages_do() -> None:
    for why, model in unsupported_models().items():
        rows, supported = model_report(model)
        assert not supported and why in dict(rows)["record, ablate, generate, run"]
        assert dict(rows)["summary"] == "supported: 3 of 3 layers"
        assert dict(rows)["nll"] == "works"
    rows, supported = model_report(tiny_model("llama"))
    said = dict(rows)
    assert supported and said["record, ablate, generate, run"] == said["count"] == "works"
    about = "model.layers.{}.mlp: silu, F=48, D=32 (31 KB, cpu)"
    assert said["layers 0-2"] == f"supported: {about}"
    assert said["neurons"] == "384 (144 gate, 144 up, 96 down)"


def test_doctor_says_what_is_missing_for_which_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that cannot run, or what a command cannot do."""
    assert not any(name.startswith("without") for name, _ in machine_report())
    found = installed.find_spec
    gone = ("sklearn", "pandas", "pyarrow")
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name in gone else found(name))
    rows = dict(machine_report())
    for extra, package in {"probe": "sklearn", "frames": "pandas", "data": "pyarrow"}.items():
        assert rows[f"extra {extra}"] == f"without {package}: {install_command(extra)}"
    assert rows["extra cli"] == "there"
    ready = rows["commands"].partition(":")[0].split(", ")
    assert ready == [stage.name for stage in stages() if stage.name != "probe"]
    assert rows["without sklearn"] == "no probe"
    assert rows["without pyarrow"] == "no .parquet files in count, nll, attribute and ablate"
    assert rows["without pandas"].startswith("no data frames of relneuron.load")


def test_every_optional_package_is_for_something() -> None:
    needed = {package for stage in stages() for package in stage.needs}
    assert needed | {*USES} | {"typer", "rich", "pydantic"} == {*EXTRAS}
    assert not needed & {*USES}
