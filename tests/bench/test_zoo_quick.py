"""bench.zoo finds faults that are put in, doubts what it cannot read, and its page is its csv."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import relneuron
from bench.zoo import build, gains, oracle
from bench.zoo.check import FAILED, RIGHT, UNPROVED, WRONG, Inputs, Row, check
from bench.zoo.page import fill, is_proved
from relneuron.methods.gains.values import value_scores
from relneuron.model.mlps import find
from relneuron.model.stream.trace import Trace
from tests.conftest import ROOT

instrument, ablate = relneuron.instrument, relneuron.ablate


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_all_is_right(model_type: str) -> None:
    row = check("causal", model_type)
    assert row.verdict == "supported" and is_proved(row), row
    assert row.reason == "" and row.attribution == "supported: 4 heads a layer; right"


@contextmanager
def one_less(model: Any, groups: Any, **options: Any) -> Iterator[Any]:
    with instrument(model, groups, **options) as probe:
        yield probe
    probe.stats[1].count["up"][0, 3] -= 1


@contextmanager
def one_more_token(model: Any, groups: Any, **options: Any) -> Iterator[Any]:
    with instrument(model, groups, **options) as probe:
        yield probe
    probe.stats[2].tokens[1] += 1


def test_a_count_that_is_off_by_one_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relneuron, "instrument", one_less)
    row = check("causal", "llama")
    assert row.counts == WRONG and row.reason == "layer 1: up is counted in another way"
    monkeypatch.setattr(relneuron, "instrument", one_more_token)
    row = check("causal", "llama")
    assert row.counts == WRONG and "tokens are counted" in row.reason


def without_one(model: Any, neurons: Sequence[Any], **options: Any) -> AbstractContextManager[None]:
    return ablate(model, neurons[1:], **options)


@contextmanager
def on_in_generation(model: Any, neurons: Any, **options: Any) -> Iterator[None]:
    """Off while a whole text is read only, as if a cache were not filled by the ablated model."""
    with ablate(model, neurons, **options):
        forwards = [(m, m.__dict__.pop("forward")) for m in model.modules() if "forward" in vars(m)]

        def read(module: nn.Module, args: Any, kwargs: Any) -> None:
            for part, forward in forwards if kwargs.get("use_cache") is False else ():
                part.__dict__["forward"] = forward

        handle = model.register_forward_pre_hook(read, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            for part, forward in forwards:
                part.__dict__["forward"] = forward


@contextmanager
def left_on(model: Any, neurons: Any, **options: Any) -> Iterator[None]:
    with ablate(model, neurons, **options):
        yield
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward


@contextmanager
def leaving_a_weight(model: Any, neurons: Any, **options: Any) -> Iterator[None]:
    with ablate(model, neurons, **options):
        yield
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 0.01


@pytest.mark.parametrize(
    ("fault", "column"),
    [
        (without_one, "ablation"),
        (on_in_generation, "generation"),
        (left_on, "restored"),
        (leaving_a_weight, "restored"),
    ],
)
def test_a_faulty_ablation_is_wrong(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any], column: str
) -> None:
    monkeypatch.setattr(relneuron, "ablate", fault)
    row = check("causal", "llama")
    assert getattr(row, column) == WRONG, row
    assert not is_proved(row)


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe"])
def test_gains_of_other_factors_are_wrong(monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    own = Trace.ffn_coefficient

    def off(self: Trace, layer: Any, e: int, index: int) -> float:
        return own(self, layer, e, index) * (1.001 if layer.layer == 2 else 1)

    monkeypatch.setattr(Trace, "ffn_coefficient", off)
    row = check("causal", model_type)
    assert row.attribution.startswith(f"{WRONG}: layer 2, neuron ")
    assert row.attribution.endswith("it does not write what the state loses without it")
    monkeypatch.setattr(Trace, "ffn_coefficient", own)
    monkeypatch.setattr(gains, "value_scores", other_gains)
    row = check("causal", model_type)
    assert row.attribution.startswith(f"{WRONG}: layer 1") and "its gain is" in row.attribution


def other_gains(*args: Any, **options: Any) -> Any:
    found = value_scores(*args, **options)
    assert found.ffn_neuron is not None
    found.ffn_neuron[:, 1] += 1e-3
    return found


def test_another_reading_than_the_oracle_s_is_never_right(monkeypatch: pytest.MonkeyPatch) -> None:
    read = oracle.read

    def blind(model: Any, run: Any) -> oracle.Reading:
        found = read(model, run)
        found.mlps.pop()
        return found

    monkeypatch.setattr(oracle, "read", blind)
    row = check("causal", "llama")
    assert row.verdict == "supported"
    assert {row.counts, row.ablation, row.restored, row.generation} == {UNPROVED}
    assert row.reason == "the oracle does not read model.layers.3.mlp"


def test_an_mlp_that_is_left_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    inspect_layers = find.inspect_layers
    for module in ("bench.zoo.check", "relneuron.model.mlps.find"):
        monkeypatch.setattr(f"{module}.inspect_layers", lambda model, *_: inspect_layers(model)[:3])
    row = check("causal", "llama")
    assert row.verdict == "supported"
    assert row.counts == row.generation == UNPROVED
    assert row.reason == "left out by relneuron: model.layers.3.mlp.down_proj"


def test_an_error_of_relneuron_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("gone")

    monkeypatch.setattr(relneuron, "instrument", broken)
    row = check("causal", "llama")
    assert row.counts == FAILED and row.generation == RIGHT
    assert row.reason == "counts: KeyError: 'gone'"


def test_a_type_that_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.EXCEPTIONS, "llama", {"num_attention_heads": 3})
    row = check("causal", "llama")
    assert row.verdict == "not built" and row.counts == "" and row.reason


class Odd(nn.Module):
    """A layer whose h mixes the neurons of a token: no MLP by the oracle's reading."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({n: nn.Linear(32, 32) for n in "abc"})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layers[0]
        h = layer["a"](x) * layer["b"](x)
        return layer["c"](h / h.norm(dim=-1, keepdim=True))


def test_the_oracle_reads_no_mlp_where_neurons_are_mixed() -> None:
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(64, 32)
    found = oracle.read(model, lambda: model(x))
    assert found.mlps == []


def test_the_oracle_tells_gate_from_up_by_values() -> None:
    model = build.build("causal", "phi3")
    whole = Inputs.make(4, 16, padded=False)
    found = oracle.read(model, lambda: whole.logits(model))
    assert [str(mlp.gate) for mlp in found.mlps] == [
        f"model.layers.{i}.mlp.gate_up_proj[0:{build.WIDTH}:1]" for i in range(build.LAYERS)
    ]
    assert all(str(mlp.up).endswith(f"[{build.WIDTH}:{2 * build.WIDTH}:1]") for mlp in found.mlps)


def test_the_page_is_made_of_the_rows() -> None:
    page = (ROOT / "docs/zoo.md").read_text(encoding="utf-8")
    assert fill(page, ROOT / "bench/results/zoo.csv") == page
    assert Row._fields[0] == "model_type"
