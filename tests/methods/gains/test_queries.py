"""Query scores against loops over units and neurons, the published vector, and promoted tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.methods.gains.promoted import promoted_tokens
from relneuron.methods.gains.scores import query_scores
from relneuron.methods.gains.values import value_scores
from relneuron.model.stream.read import read_residual_model
from relneuron.model.stream.trace import Trace, trace
from relneuron.ops.logprob_gain.op import TopGains
from tests.kit.attributed import (
    FAMILIES,
    HIDDEN,
    N_LAYERS,
    WIDTH,
    attributed_model,
    naive_query_scores,
    sentences,
    stream_of_vectors,
    targets_of,
    weights_of,
)


def scored(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Trace, Any]:
    model = attributed_model(family, dtype)
    residual = read_residual_model(model)
    found = trace(residual, sentences())
    values = value_scores(residual, found, targets_of(found), ffn="top", attention="top", top=40)
    return model, residual, found, values


def later_units(found: Trace, kind: str, n: int = 40) -> TopGains:
    """Units of the last two layers at all positions, as only these have many components."""
    generator = torch.Generator().manual_seed(3)
    shape = (len(found.mask), n)
    lengths = found.mask.sum(1, keepdim=True)
    width = WIDTH if kind == "ffn" else lengths * HIDDEN
    return TopGains(
        torch.rand(shape, generator=generator) - 0.2,
        torch.randint(1, N_LAYERS, shape, generator=generator),
        torch.randint(0, 1 << 20, shape, generator=generator) % width,
    )


KINDS_AND_KEYS = [("attention", "gate"), ("ffn", "gate"), ("ffn", "up"), ("ffn", "down")]


@pytest.mark.parametrize(("kind", "key"), KINDS_AND_KEYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_a_loop_over_units_and_neurons(family: str, kind: str, key: str) -> None:
    model, residual, found, values = scored(family)
    top = values.attention_top if kind == "attention" else values.ffn_top
    for units in (top, later_units(found, kind)):
        ours = query_scores(residual, found, units, kind=kind, n_units=12, key=key)
        naive = naive_query_scores(model, found, units, kind=kind, n_units=12, key=key)
        assert ours.layer.dtype == ours.ffn_neuron.dtype == torch.float32
        for score, want in zip((ours.layer, ours.ffn_neuron, ours.coefficient), naive, strict=True):
            error = (score.double() - want).abs() / want.abs().clamp(min=1)
            assert float(error.max()) < 1e-5
            assert float(want.abs().max()) > 0.01
        assert (ours.ffn_neuron[:, -1] == 0).all()  # nothing reads what the last layer's FFN writes
        assert (ours.layer[:, 2 * N_LAYERS] == 0).all()
        assert bool((ours.layer[:, 2 * N_LAYERS - 1] != 0).any()) == (kind == "ffn")


def test_neurons_in_parts_have_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    _, residual, found, values = scored("llama")
    whole = query_scores(residual, found, values.attention_top)
    monkeypatch.setattr(
        "relneuron.methods.gains.scores._SCRATCH", 7 * max(HIDDEN, 30 * len(found.mask))
    )
    parts = query_scores(residual, found, values.attention_top)
    torch.testing.assert_close(parts.ffn_neuron, whole.ffn_neuron, rtol=1e-6, atol=1e-9)
    assert bool(whole.ffn_neuron.any())


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_a_unit_sum_to_one(family: str, kind: str) -> None:
    _, residual, found, _ = scored(family, torch.float64)
    units = later_units(found, kind)
    ours = query_scores(residual, found, units, kind=kind, n_units=40)
    assert torch.allclose(ours.layer.sum(1), units.gain.double().sum(1), atol=1e-6, rtol=0)
    left = (ours.ffn_neuron.sum(2) - ours.layer[:, 2::2]).abs().max()
    if family == "llama":
        assert float(left) < 1e-9
    else:
        assert float(left) > 1e-4  # the bias of c_proj belongs to no neuron


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sentence_has_the_same_scores_alone(family: str) -> None:
    residual = read_residual_model(attributed_model(family))
    found = trace(residual, sentences())
    units = later_units(found, "attention")
    ours = query_scores(residual, found, units)
    for e, ids in enumerate(sentences()):
        own = TopGains(*(part[e : e + 1] for part in units))
        alone = query_scores(residual, trace(residual, [ids]), own)
        for name in ("layer", "ffn_neuron"):
            batch, want = getattr(ours, name)[e], getattr(alone, name)[0]
            assert torch.allclose(batch, want, rtol=1e-3, atol=1e-4)


def test_places_without_a_unit_and_units_that_read_nothing_count_for_nothing() -> None:
    model, residual, found, values = scored("llama")
    units = values.attention_top
    whole = query_scores(residual, found, units, n_units=7)
    short = TopGains(*(part.clone() for part in units))
    short.gain[:, 7:], short.layer[:, 7:], short.index[:, 7:] = -torch.inf, -1, -1
    cut = query_scores(residual, found, short, n_units=40)
    assert torch.equal(cut.layer, whole.layer) and torch.equal(cut.ffn_neuron, whole.ffn_neuron)
    nothing = TopGains(units.gain, torch.full_like(units.layer, -1), units.index)
    none = query_scores(residual, found, nothing)
    assert not none.layer.any() and not none.ffn_neuron.any()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.zero_()
    blind = query_scores(residual, found, units)
    assert not blind.layer.any() and not blind.ffn_neuron.any()


def test_other_kinds_and_keys_are_refused() -> None:
    _, residual, found, values = scored("llama")
    for asked in ({"kind": "head"}, {"key": "q"}):
        with pytest.raises(ValueError, match="query_scores: kind"):
            query_scores(residual, found, values.ffn_top, **asked)
    with pytest.raises(RelneuronError, match="unknown key"):
        residual.layers[0].ffn_keys("q", torch.tensor([0]))


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_centred_where_the_norm_is_unless_asked_not_to(family: str, kind: str) -> None:
    """Not centred: <c, q (.) g> / <h, q (.) g> as methods B4 has it, of GPT-2's notebook."""
    model, residual, found, _ = scored(family)
    units = later_units(found, kind)
    ours = query_scores(residual, found, units, kind=kind, n_units=12, center_keys=False)
    layers, neurons, _ = naive_query_scores(
        model, found, units, kind=kind, n_units=12, key="gate", center=False
    )
    for score, want in ((ours.layer, layers), (ours.ffn_neuron, neurons)):
        error = (score.double() - want).abs() / want.abs().clamp(min=1)
        assert float(error.max()) < 1e-5
    centred = query_scores(residual, found, units, kind=kind, n_units=12)
    assert torch.equal(centred.ffn_neuron, ours.ffn_neuron) == (family == "llama")


# --- the published vector --------------------------------------------------------------------


def published_stream(kind: str) -> tuple[Any, Trace, TopGains]:
    """q = (.5, -1, 2), g = (1, 2, .5); four components in the order h^0, A^0, F^0, A^1."""
    vectors = torch.tensor([[1, 1, 0], [0, 0.5, -0.25]], dtype=torch.float64)
    n_layers = 3 if kind == "attention" else 2
    residual = stream_of_vectors(
        torch.ones(4, 3, dtype=torch.float64),
        torch.ones(3, dtype=torch.float64),
        vectors,
        torch.eye(2, 3, dtype=torch.float64),
        n_layers=n_layers,
        key=torch.tensor([0.5, -1, 2], dtype=torch.float64),
        key_gain=torch.tensor([1, 2, 0.5], dtype=torch.float64),
    )

    def state(*numbers: float) -> Tensor:
        return torch.tensor([[numbers]], dtype=torch.float64)

    none = state(0, 0, 0)
    h, writes = [state(0.1, 0.2, 0.3)], [state(1, 0, 0.5), state(0, -0.5, 1), state(0.2, 0.1, -0.4)]
    attention, ffn = [writes[0], writes[2], none], [writes[1], none, none]
    r = []
    for i in range(n_layers):
        r.append(h[i] + attention[i])
        h.append(r[i] + ffn[i])
    off = torch.zeros(1, 1, 2, dtype=torch.float64)
    found = Trace(
        n_pad=torch.zeros(1, dtype=torch.int64),
        mask=torch.ones(1, 1, dtype=torch.bool),
        scale=torch.ones(1, dtype=torch.float64),
        logits=torch.zeros(1, 4),
        h=h,
        r=r,
        attention=attention[:n_layers],
        ffn=ffn[:n_layers],
        neurons=[torch.tensor([[[0.3, -1.2]]], dtype=torch.float64), off, off],
        ffn_scale=[None] * 3,
        attention_scale=[None] * 3,
    )
    one = torch.ones(1, 1, dtype=torch.int64)
    units = TopGains(0.04 * one.double(), one * (n_layers - 1), 0 * one)
    return residual, found, units


@pytest.mark.parametrize("kind", ["attention", "ffn"])
@pytest.mark.parametrize("center_keys", [True, False])
def test_published_vector(kind: str, center_keys: bool) -> None:
    residual, found, units = published_stream(kind)
    ours = query_scores(residual, found, units, kind=kind, center_keys=center_keys)
    wanted = [-0.0008163265, 0.0163265306, 0.0326530612, -0.0081632653]
    wanted = torch.tensor(wanted, dtype=torch.float64)
    assert torch.allclose(ours.layer[0, :4], wanted, rtol=0, atol=1e-10)
    shares = torch.tensor([-0.05, 1, 2, -0.5], dtype=torch.float64) / 2.45
    assert torch.allclose(ours.layer[0, :4], 0.04 * shares, rtol=0, atol=1e-12)
    assert (ours.layer[0, 4:] == 0).all()
    neurons = torch.tensor([-0.0073469388, 0.0244897959], dtype=torch.float64)
    assert torch.allclose(ours.ffn_neuron[0, 0], neurons, rtol=0, atol=1e-10)
    assert (ours.ffn_neuron[0, 1:] == 0).all()


# --- promoted tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_promoted_tokens_are_the_largest_logits_of_the_value_vector(family: str) -> None:
    model = attributed_model(family)
    residual = read_residual_model(model)
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    weights = weights_of(model)[1]
    for kind, values, index, place in (
        ("ffn_neuron", weights.w_down, 100, 100),
        ("attention_neuron", weights.w_out, 13, 13),
        ("attention_neuron", weights.w_out, 3 * HIDDEN + 13, 13),  # position 3
    ):
        v = values[place]
        v = v - v.mean() if family == "gpt2" else v
        logits = (v * norm.weight.detach().double()) @ model.lm_head.weight.detach().double().T
        want = sorted(range(len(logits)), key=lambda token: -float(logits[token]))[:10]
        found = promoted_tokens(residual, kind, 1, index)
        assert [token for token, _ in found] == want
        assert all(abs(logit - float(logits[token])) < 1e-5 for token, logit in found)
        least = promoted_tokens(residual, kind, 1, index, sign=-1)
        want = sorted(range(len(logits)), key=lambda token: float(logits[token]))[:10]
        assert [token for token, _ in least] == want and least[0][1] < 0 < found[0][1]
    assert len(promoted_tokens(residual, "ffn_neuron", 0, 0, n=3)) == 3
    with pytest.raises(ValueError, match="no kind of neuron"):
        promoted_tokens(residual, "head", 0, 0)


def test_of_equal_logits_the_lower_token_comes_first() -> None:
    model = attributed_model("llama")
    with torch.no_grad():
        model.lm_head.weight[:] = 0  # a product with equal rows may round their ends otherwise
    found = promoted_tokens(read_residual_model(model), "ffn_neuron", 0, 0)
    assert [token for token, _ in found] == list(range(10))
