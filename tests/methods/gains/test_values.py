"""Value scores against all logits in float64, against published vectors, and their sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from relneuron.methods.gains.values import KINDS, ValueScores, value_scores
from relneuron.model.stream.read import read_residual_model
from relneuron.model.stream.trace import Trace, trace
from relneuron.ops.logprob_gain.op import TopGains
from tests.kit.attributed import (
    FAMILIES,
    HIDDEN,
    N_LAYERS,
    WIDTH,
    attributed_model,
    log_p,
    naive_value_scores,
    published_top,
    scale_of,
    sentences,
    stream_of_vectors,
    targets_of,
)

VARIANTS = [{}, {"own_norm": True}, {"norm_bias": True}, {"own_norm": True, "norm_bias": True}]


def scored(
    family: str, dtype: torch.dtype = torch.float32, **asked: Any
) -> tuple[Any, Trace, Tensor, ValueScores]:
    """A model, the trace of sentences of mixed lengths, their targets, and the scores."""
    model = attributed_model(family, dtype)
    residual = read_residual_model(model)
    found = trace(residual, sentences())
    targets = targets_of(found)
    return model, found, targets, value_scores(residual, found, targets, **asked)


def pairs(top: TopGains) -> list[list[tuple[int, int]]]:
    """(layer, index) of each sentence's list, without the places of a list that is too long."""
    return [
        [(layer, index) for layer, index in zip(*both, strict=True) if layer >= 0]
        for both in zip(top.layer.tolist(), top.index.tolist(), strict=True)
    ]


def assert_same_top(top: TopGains, scores: Tensor, n_pad: Tensor, n: int = 300) -> None:
    """The sets are those of float64 `scores`, and in their order but for float32 rounding."""
    for e, (ours, want) in enumerate(zip(pairs(top), published_top(scores, n_pad, n), strict=True)):
        assert set(ours) == set(want) and len(ours) == len(want)
        own = scores[e, :, int(n_pad[e]) :] if scores.dim() == 4 else scores[e]
        flat = own.reshape(len(own), -1)
        ordered = torch.stack([flat[layer, index] for layer, index in ours])
        assert float(ordered.diff().max()) < 2e-6
        assert float((ordered - top.gain[e, : len(ours)]).abs().max()) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_score_equals_the_plain_computation(family: str, variant: dict[str, bool]) -> None:
    model, found, targets, ours = scored(family, ffn="exact", attention="exact", **variant)
    want = naive_value_scores(model, found, targets, **variant)
    for kind in KINDS:
        score = getattr(ours, kind)
        assert score.dtype == torch.float32
        torch.testing.assert_close(
            score.double(),
            want[kind],
            rtol=0,
            atol=1e-5,
            equal_nan=True,
            msg=lambda m, k=kind: k + m,
        )
        assert float(want[kind].nan_to_num().abs().max()) > 0.1, f"{kind}: nothing to see"
    assert_same_top(ours.ffn_top, want["ffn_neuron"], found.n_pad)
    assert_same_top(ours.attention_top, want["attention_neuron"], found.n_pad)


@pytest.mark.parametrize("variant", VARIANTS[:2], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_certified_scores_keep_their_tolerance(family: str, variant: dict[str, bool]) -> None:
    for tolerance in (1e-5, 1e-2):
        asked: dict[str, Any] = {"ffn": "certified", "attention": "certified", **variant}
        model, found, targets, ours = scored(family, tolerance=tolerance, **asked)
        want = naive_value_scores(model, found, targets, **variant)
        for kind in ("ffn_neuron", "attention_neuron"):
            error = (getattr(ours, kind).double() - want[kind]).nan_to_num().abs().max()
            # Beside the tolerance: the trace's scale is a float32 number.
            assert float(error) <= tolerance + 2e-6, kind
        assert_same_top(ours.ffn_top, want["ffn_neuron"], found.n_pad)
        assert_same_top(ours.attention_top, want["attention_neuron"], found.n_pad)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_scores_telescope(family: str) -> None:
    model, found, targets, ours = scored(family, torch.float64, ffn=None, attention=None)
    total = (ours.ffn_layer + ours.attention_layer).sum(1)
    for e in range(len(targets)):
        scale = scale_of(model, found.h[-1][e, -1])
        ends = torch.stack([found.h[0][e, -1], found.h[-1][e, -1]])
        first, last = log_p(model, ends, scale, int(targets[e]), norm_bias=False)
        assert abs(float(total[e]) - float(last - first)) < 1e-6
    assert ours.ffn_neuron is ours.attention_neuron is ours.ffn_top is ours.attention_top is None


def test_with_the_norm_bias_the_last_state_gives_the_models_own_logprob() -> None:
    model, found, targets, ours = scored("gpt2", torch.float64, norm_bias=True)
    total = (ours.ffn_layer + ours.attention_layer).sum(1)
    rows = torch.arange(len(targets))
    own = found.logits.double().log_softmax(1)[rows, targets]
    for e in range(len(targets)):
        scale = scale_of(model, found.h[-1][e, -1])
        first = log_p(model, found.h[0][e, -1:], scale, int(targets[e]), norm_bias=True)
        assert abs(float(own[e] - first - total[e])) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sentence_has_the_same_scores_alone(family: str) -> None:
    residual = read_residual_model(attributed_model(family))
    together = trace(residual, sentences())
    targets = targets_of(together)
    asked = {"ffn": "exact", "attention": "exact", "top": 25}
    ours = value_scores(residual, together, targets, **asked)
    for e, ids in enumerate(sentences()):
        alone = value_scores(residual, trace(residual, [ids]), targets[e : e + 1], **asked)
        pad = int(together.n_pad[e])
        cut = {"position": (slice(None), slice(None), slice(pad, None)),
               "attention_neuron": (slice(None), slice(pad, None))}  # fmt: skip
        for kind in KINDS:
            batch = getattr(ours, kind)[e]
            want = getattr(alone, kind)[0]
            torch.testing.assert_close(batch[cut.get(kind, ...)], want, rtol=0, atol=2e-5)
            if kind in cut and pad:
                padding = torch.ones_like(batch, dtype=torch.bool)
                padding[cut[kind]] = False
                assert bool(batch[padding].isnan().all())
        assert pairs(ours.attention_top)[e] == pairs(alone.attention_top)[0]
        assert pairs(ours.ffn_top)[e] == pairs(alone.ffn_top)[0]


@pytest.mark.parametrize("own_norm", [False, True])
def test_blocks_of_sentences_give_the_same_scores(
    own_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, _, whole = scored("llama", ffn=None, attention=None, own_norm=own_norm)
    monkeypatch.setattr("relneuron.methods.gains.values._VECTORS", 1)
    _, _, _, parts = scored("llama", ffn=None, attention=None, own_norm=own_norm)
    for kind in KINDS[:4]:
        ours, want = getattr(parts, kind), getattr(whole, kind)
        torch.testing.assert_close(ours, want, rtol=0, atol=1e-6, equal_nan=True)


def test_equal_scores_are_ranked_later_first() -> None:
    """As the notebook ranks: sorted ascending and reversed, so that of equals the last is first."""
    model = attributed_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("gate_proj", "up_proj"):
                getattr(layer.mlp, name).weight[60:] = 0
            layer.mlp.gate_proj.weight[50] = layer.mlp.gate_proj.weight[20]
            layer.mlp.up_proj.weight[50] = layer.mlp.up_proj.weight[20]
            layer.mlp.down_proj.weight[:, 50] = layer.mlp.down_proj.weight[:, 20]
    residual = read_residual_model(model)
    found = trace(residual, sentences())
    targets = targets_of(found)
    for own_norm in (False, True):
        want = naive_value_scores(model, found, targets, own_norm=own_norm)["ffn_neuron"]
        assert float(want[..., 60:].abs().max()) < 1e-12
        want[..., 60:] = 0  # up to the rounding of products with one row or many
        for top in (150, 300):  # the shorter list ends among the zeros
            asked: dict[str, Any] = {"ffn": "top", "attention": None, "own_norm": own_norm}
            ours = value_scores(residual, found, targets, top=top, **asked)
            assert_same_top(ours.ffn_top, want, found.n_pad, top)
            ranked = pairs(ours.ffn_top)[0]
            zeros = [pair for pair in ranked if pair[1] >= 60]
            in_order = [(layer, i) for layer in range(N_LAYERS) for i in range(60, WIDTH)][::-1]
            assert len(zeros) > 20 and zeros == in_order[: len(zeros)]
        places = {pair: place for place, pair in enumerate(ranked)}
        twins = [layer for layer in range(N_LAYERS) if (layer, 20) in places]
        assert twins
        for layer in twins:
            assert places[layer, 20] == places[layer, 50] + 1


def test_fewer_neurons_than_asked() -> None:
    _, found, _, ours = scored("llama", ffn="top", attention="top", top=500)
    assert ours.ffn_neuron is None and ours.attention_neuron is None
    assert (ours.ffn_top.index[:, N_LAYERS * WIDTH :] == -1).all()
    n_tokens = found.mask.sum(1)
    for e, index in enumerate(ours.attention_top.index):
        n = min(500, N_LAYERS * HIDDEN * int(n_tokens[e]))
        assert (index[:n] >= 0).all() and (index[n:] == -1).all()
        assert int(index.max()) < int(n_tokens[e]) * HIDDEN
        assert (ours.attention_top.gain[e, n:] == -torch.inf).all()
        assert (ours.attention_top.layer[e, n:] == -1).all()


def test_what_is_not_asked_for_is_not_scored() -> None:
    _, _, _, ours = scored("llama", writes=False, ffn="exact", attention="top", top=5)
    _, _, _, whole = scored("llama", ffn="exact", attention="top", top=5)
    assert ours.ffn_layer is ours.attention_layer is ours.head is ours.position is None
    assert torch.equal(ours.ffn_neuron, whole.ffn_neuron)
    assert torch.equal(ours.attention_top.index, whole.attention_top.index)


def test_certified_with_the_own_norm_at_a_small_tolerance() -> None:
    """The scales at x and at x + v are float64: rounded, their quotient alone would be off by 1e-7.

    What remains is that of the folded unembedding, which is float32.
    """
    asked: dict[str, Any] = {"ffn": "certified", "attention": None, "tolerance": 1e-7}
    model, found, targets, ours = scored("llama", own_norm=True, **asked)
    want = naive_value_scores(model, found, targets, own_norm=True)["ffn_neuron"]
    error = (ours.ffn_neuron.double() - want).abs() - 2.0**-24 * want.abs()
    assert float(error.max()) < 2e-7


def test_own_norm_lists_that_are_too_long_are_marked() -> None:
    _, _, _, ours = scored("gpt2", ffn="top", attention="top", top=500, own_norm=True)
    n = N_LAYERS * WIDTH
    for part in (ours.ffn_top.index, ours.ffn_top.layer):
        assert (part[:, :n] >= 0).all() and (part[:, n:] == -1).all()


def test_half_precision_models_are_scored_in_float32() -> None:
    model, found, targets, ours = scored("llama", torch.bfloat16, ffn="exact", attention="exact")
    assert found.neurons[0].dtype == torch.bfloat16
    want = naive_value_scores(model, found, targets)
    for kind in KINDS:
        torch.testing.assert_close(
            getattr(ours, kind).double(), want[kind], rtol=0, atol=1e-5, equal_nan=True
        )


def test_other_modes_and_targets_outside_are_refused() -> None:
    residual = read_residual_model(attributed_model("llama"))
    found = trace(residual, sentences([4]))
    with pytest.raises(ValueError, match="mode must be"):
        value_scores(residual, found, torch.tensor([3]), ffn="best")
    with pytest.raises(ValueError, match=r"targets must be in \[0, 90\)"):
        value_scores(residual, found, torch.tensor([90]))


# --- the published vectors -------------------------------------------------------------------

GAIN = torch.tensor([1, 0.5, 2], dtype=torch.float64)
UNEMBED = torch.tensor(
    [[1, 0, 0.5], [0, 1, -0.5], [-1, 0.5, 0], [0.5, -1, 0.25]], dtype=torch.float64
)


def vector(*numbers: float) -> Tensor:
    """(1, 1, D): the state of one sentence of one token."""
    return torch.tensor([[numbers]], dtype=torch.float64)


def close(found: Tensor | float, wanted: float, digits: float = 1e-9) -> bool:
    return abs(float(found) - wanted) < digits


def ffn_stream() -> tuple[Any, Trace]:
    """Two FFN neurons on x = (.2, -.1, .4)."""
    values = torch.tensor([[1, 0, 0.5], [-0.5, 2, 1]], dtype=torch.float64)
    residual = stream_of_vectors(UNEMBED, GAIN, values, torch.eye(2, 3, dtype=torch.float64))
    x, y = vector(0.2, -0.1, 0.4), vector(2.45, -1.1, 0.9)
    found = Trace(
        n_pad=torch.zeros(1, dtype=torch.int64),
        mask=torch.ones(1, 1, dtype=torch.bool),
        scale=residual.final_norm.scale(y[:, -1]),
        logits=torch.zeros(1, 4),
        h=[x, y],
        r=[x],
        attention=[torch.zeros_like(x)],
        ffn=[y - x],
        neurons=[vector(2, -0.5)],
        ffn_scale=[None] * 1,
        attention_scale=[None] * 1,
        weights=[torch.zeros(1, 1, 1, dtype=torch.float64)],
        values=[torch.zeros(1, 1, 1, 2, dtype=torch.float64)],
    )
    return residual, found


def test_published_vector_of_ffn_neurons() -> None:
    residual, found = ffn_stream()
    assert close(found.scale, 0.6115129848596775)
    target = torch.zeros(1, dtype=torch.int64)
    for mode in ("exact", "certified"):
        ours = value_scores(residual, found, target, ffn=mode, attention="exact", top=2)
        assert close(ours.ffn_neuron[0, 0, 0], 0.7461940721384765)
        assert close(ours.ffn_neuron[0, 0, 1], -0.1258698692804492)
        assert close(ours.ffn_layer[0, 0], 0.6372087137275767)
        assert ours.ffn_top.index.tolist() == [[0, 1]]
        assert ours.attention_layer[0, 0] == ours.attention_neuron.abs().sum() == 0
    own = value_scores(residual, found, target, ffn="exact", attention=None, own_norm=True)
    assert close(own.ffn_neuron[0, 0, 0], 0.0587822497, 1e-10)
    assert close(own.ffn_neuron[0, 0, 1], -0.8048028777, 1e-10)
    assert close(own.ffn_layer[0, 0], -0.0846328049, 1e-10)
    assert close(own.ffn_top.gain[0, 0], 0.0587822497, 1e-10)


def test_published_vector_of_attention_neurons() -> None:
    values = torch.tensor([[1, 0.5, 0], [-1, 0, 2]], dtype=torch.float64)  # columns of W_O
    residual = stream_of_vectors(UNEMBED, GAIN, torch.eye(2, 3, dtype=torch.float64), values)
    h = vector(0.1, 0.2, -0.3).expand(1, 2, 3)
    write = vector(-1.0625, -0.3125, 0.875).expand(1, 2, 3)
    found = Trace(
        n_pad=torch.zeros(1, dtype=torch.int64),
        mask=torch.ones(1, 2, dtype=torch.bool),
        scale=residual.final_norm.scale((h + write)[:, -1]),
        logits=torch.zeros(1, 4),
        h=[h, h + write],
        r=[h + write],
        attention=[write],
        ffn=[torch.zeros_like(h)],
        neurons=[torch.zeros(1, 2, 2, dtype=torch.float64)],
        ffn_scale=[None] * 1,
        attention_scale=[None] * 1,
        weights=[torch.tensor([[[0.25, 0.75]]], dtype=torch.float64)],
        values=[torch.tensor([[[[0.5, 1]], [[-1, 0.25]]]], dtype=torch.float64)],
    )
    assert close(found.scale, 1.5371338705156754)
    ours = value_scores(
        residual, found, torch.zeros(1, dtype=torch.int64), attention="exact", top=4
    )
    wanted = [[0.1597793387720794, 0.3979521060485145], [-1.2563257407355082, 0.3220481870368857]]
    for p in range(2):
        for k in range(2):
            assert close(ours.attention_neuron[0, 0, p, k], wanted[p][k])
    assert ours.attention_top.index.tolist() == [[1, 3, 0, 2]]
    assert close(ours.position[0, 0, 0, 0], 0.5654823059, 1e-10)
    assert close(ours.position[0, 0, 0, 1], -1.0504027753, 1e-10)
    assert close(ours.head[0, 0, 0], -0.6246987216, 1e-10)
    assert close(ours.attention_layer[0, 0], -0.6246987216, 1e-10)
