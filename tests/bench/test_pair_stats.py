"""The bench of pair_stats: every contestant is right, and a wrong one is found."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from relneuron import ops
from relneuron.bench import pair_stats as bench_pair
from relneuron.bench import timing
from relneuron.bench.case import Case

pair = partial(Case, "pair_stats")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["sorted", "mixed"])
def test_every_contestant_is_right(dtype: str, layout: str) -> None:
    case = pair(dtype, 150, 40, 2, layout)
    found = bench_pair.pair_stats_contestants(case, "cpu", 2, False)
    with torch.no_grad():
        assert [c.name for c in found if timing._verdict(c) != (True, "")] == []
    assert [c.variant for c in found if c.is_base] == ["pair", "difference"]
    assert {c.variant for c in found} == {"pair", "difference", "ceiling"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("count", lambda x: x + 1),
        ("sum", lambda x: x + 0.01),
        ("sum_sq", lambda x: x * 1.001),
        ("max", lambda x: x * 1.001),
        ("n_nonfinite", lambda x: x + 1),
    ],
)
def test_a_wrong_one_is_found(name: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.pair_stats

    def wrong(*tensors: Any, stats: ops.GroupStats, backend: str, **others: Any) -> None:
        right(*tensors, stats=stats, backend=backend, **others)
        if backend != "reference":
            table = getattr(stats, name)["difference"]
            table[1, 3] = change(table[1, 3])

    found = bench_pair.pair_stats_contestants(pair(T=60, F=9, G=2), "cpu", 1, False)
    monkeypatch.setattr(ops, "pair_stats", wrong)
    for contestant in found:
        if contestant.name == "relneuron":
            is_right, note = timing._verdict(contestant)
            assert not is_right and note.startswith("wrong: 1 of ")
