"""The logit lens against transformers' own hidden states, and the stages of made curves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from relneuron.artifact.files import RelneuronError
from relneuron.model.lens import Lens, stages
from tests.conftest import tiny_model

IDS = torch.tensor([[5, 9, 11, 3], [7, 2, 30, 41]])


def check(model: Any, norm: Any, logits_of: Any) -> None:
    """Each layer's entropy and tokens are those of norm and head on the hidden state behind it."""
    seen: list[torch.Tensor] = []
    layers = model.get_decoder().layers
    handles = [
        m.register_forward_hook(
            lambda _m, _i, y: seen.append((y[0] if isinstance(y, tuple) else y)[:, -1])
        )
        for m in layers
    ]
    with torch.no_grad(), Lens(model) as lens:
        out = model(input_ids=IDS).logits[:, -1].float()
        found = lens.read(out)
    for handle in handles:
        handle.remove()
    assert len(found) == 2
    assert all(len(row) == len(layers) for row in found)
    for layer, h in enumerate(seen[: len(layers)]):
        with torch.no_grad():
            logits = logits_of(model.get_output_embeddings()(norm(h)).float())
        wanted = torch.distributions.Categorical(logits=logits).entropy()
        for row in range(2):
            assert found[row][layer].entropy == pytest.approx(float(wanted[row]), rel=1e-5)
            assert found[row][layer].top == logits[row].topk(10).indices.tolist()
    last = torch.distributions.Categorical(logits=out).entropy()
    assert [row[-1].entropy for row in found] == pytest.approx(last.tolist(), rel=1e-5)
    # Nothing is left of it.
    assert not any(m._forward_hooks for m in model.modules())


def test_llama() -> None:
    model = tiny_model("llama")
    check(model, model.model.norm, lambda x: x)


def test_what_is_behind_the_head_is_done_too() -> None:
    gemma = tiny_model("gemma2")
    cap = gemma.config.final_logit_softcapping
    assert cap
    gemma.lm_head.weight.data *= 300
    check(gemma, gemma.model.norm, lambda x: cap * torch.tanh(x / cap))
    granite = tiny_model("granite", logits_scaling=4.0)
    check(granite, granite.model.norm, lambda x: x / 4)


def test_a_later_forward_is_of_its_own_rows() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), Lens(model) as lens:
        first = lens.read(model(input_ids=IDS).logits[:, -1])
        second = lens.read(model(input_ids=IDS[1:]).logits[:, -1])
    assert len(second) == 1
    assert [r.entropy for r in second[0]] == pytest.approx([r.entropy for r in first[1]], rel=1e-5)


def test_logits_that_are_no_heads_are_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), Lens(model) as lens:
        logits = model(input_ids=IDS).logits[:, -1]
        with pytest.raises(RelneuronError, match="its logits are not lm_head"):
            lens.read(logits.flip(-1))
    with Lens(model) as lens, pytest.raises(RelneuronError, match="does not call its layers"):
        lens.read(logits)


def test_stages() -> None:
    assert stages([9, 9, 9, 5, 5, 1, 1, 1]) == (3, 5)
    assert stages([9.1, 8.9, 5, 5.2, 4.9, 5, 0.1]) == (2, 6)
    assert stages([1, 2, 3]) == (1, 2)
    # All alike: every border is as good, the earliest are taken.
    assert stages([2.0] * 6) == (1, 2)
    assert stages([1, 2]) is None


def test_stages_are_the_best_of_all() -> None:
    """Against a fit of every pair of borders by torch."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        curve = torch.rand(9, generator=rng, dtype=torch.float64)
        best = min(
            ((a, b) for a in range(1, 8) for b in range(a + 1, 9)),
            key=lambda ab: sum(
                float(part.var(correction=0) * len(part))
                for part in torch.tensor_split(curve, list(ab))
            ),
        )
        assert stages(curve.numpy()) == best
