"""The bench of logprob_gain: every contestant is right, and a wrong one is found."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from relneuron import ops
from relneuron.bench import gain as bench_gain
from relneuron.bench.case import Case

gained = partial(Case, "logprob_gain", layout="D=24")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_contestants_are_right(dtype: str) -> None:
    case = gained(dtype, T=130, F=40, G=3)
    found = bench_gain.logprob_gain_contestants(case, "cpu", 1, False)
    for contestant in found:
        contestant.check()
    names = {(c.variant, c.name) for c in found}
    assert {("exact", "plain"), ("exact", "relneuron"), ("top 40", "plain, in place")} <= names
    assert str(case) == f"logprob_gain {dtype} V=130 K=40 E=3 D=24"


def test_the_peers_are_the_definition() -> None:
    """Against logits at x + c v, which no peer makes."""
    given = bench_gain.draw(gained(T=50, F=6, G=2), "cpu")
    x, v, c, unembed = (given[k].double() for k in ("x", "values", "coefficients", "unembed"))
    moved = (x[:, None] + c[..., None] * v) @ unembed.T
    before = (x @ unembed.T).log_softmax(1)
    for e, w in enumerate(given["targets"].tolist()):
        want = moved[e].log_softmax(1)[:, w] - before[e, w]
        for peer in bench_gain.PEERS.values():
            assert torch.allclose(peer(**given)[e].double(), want, rtol=0, atol=1e-5)


def test_a_wrong_gain_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.logprob_gain

    def wrong(*args: Any, **given: Any) -> Any:
        gains = right(*args, **given)
        if isinstance(gains, torch.Tensor):
            gains[0, 0] += 1e-3
        return gains

    found = bench_gain.logprob_gain_contestants(gained(T=60, F=9, G=2), "cpu", 1, False)
    monkeypatch.setattr(ops, "logprob_gain", wrong)
    ours = next(c for c in found if c.name == "relneuron" and c.variant == "exact")
    with pytest.raises(AssertionError, match="differ: gains"):
        ours.check()
