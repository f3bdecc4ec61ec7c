"""bench.zoo over types of different kinds, each with what the plain reading must find in it."""

from __future__ import annotations

import time

import pytest

from bench.zoo import build
from bench.zoo.__main__ import sweep
from bench.zoo.check import RIGHT
from bench.zoo.page import is_proved

# Type -> what its small model has: gated MLPs, plain ones, modules of experts.
KINDS = {
    "bamba": "4 gated",  # state spaces, and attention in some layers
    "bitnet": "4 gated",  # a norm before down
    "dbrx": "4 experts",  # flat parameters
    "deepseek_v3": "4 gated, 3 experts",  # a dense layer, shared experts, latent attention
    "gemma2": "4 gated",  # norms on both sides
    "gpt2": "4 plain",  # Conv1D
    "llama4_text": "4 gated, 4 experts",  # experts that get their weighted inputs
    "mixtral": "4 experts",
    "nemotron_h": "2 plain, 1 experts",  # layers without an MLP, no gates
    "opt": "4 plain",  # maps in the layer itself
    "phi3": "4 gated",  # packed
    "qwen3_next": "4 gated, 4 experts",  # linear attention
}


@pytest.fixture(scope="module")
def rows():
    asked = [("causal", model_type) for model_type in KINDS]
    return {row.model_type: row for row, _ in sweep(asked)}


@pytest.mark.parametrize("model_type", KINDS)
def test_relneuron_is_what_plain_hooks_are(rows, model_type: str) -> None:
    row = rows[model_type]
    assert row.verdict == "supported", row.reason
    assert row.oracle == KINDS[model_type]
    assert is_proved(row), row
    assert row.counts == row.restored == row.generation == RIGHT


def test_a_type_that_takes_too_long_has_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.zoo.__main__.LIMIT_S", 0.0)
    monkeypatch.setattr("bench.zoo.__main__._child", lambda *_: time.sleep(60))
    (row, _), *others = sweep([("causal", "llama")])
    assert not others
    assert (row.model_type, row.verdict, row.counts) == ("llama", "ended", "")
    assert "takes more than 0 s" in row.reason


@pytest.mark.parametrize("kind", build.KINDS)
def test_every_configuration_that_can_be_made_is_small(kind: str) -> None:
    made = 0
    for model_type in build.types(kind):
        try:
            config = build.small_config(model_type)
        except Exception:  # the sweep says why
            continue
        made += 1
        for name, value in config.to_dict().items():
            if name in ("hidden_size", "intermediate_size", "vocab_size"):
                assert not isinstance(value, int) or value <= 256, (model_type, name, value)
    assert made > 0.9 * len(build.types(kind))
