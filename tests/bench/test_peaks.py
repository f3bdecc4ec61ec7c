"""The benches of peaks, merge_peaks and histogram: everybody is right, and a wrong one is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from relneuron import ops
from relneuron.bench import peaks as bench_peaks
from relneuron.bench import timing
from relneuron.bench.case import Case

CONTESTANTS = {
    "peaks": bench_peaks.peaks_contestants,
    "merge_peaks": bench_peaks.merge_peaks_contestants,
    "histogram": bench_peaks.histogram_contestants,
}


@pytest.mark.parametrize("layout", ["sorted", "mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op", CONTESTANTS)
def test_every_contestant_is_right(op: str, dtype: str, layout: str) -> None:
    if op == "merge_peaks" and dtype != "float32":
        return  # peaks are float32
    found = CONTESTANTS[op](Case(op, dtype, 150, 40, 3, layout), "cpu", 2, False)
    with torch.no_grad():
        verdicts = {(c.name, *timing._verdict(c)) for c in found}
    assert {verdict[1:] for verdict in verdicts} == {(True, "")}, verdicts
    assert [c.name for c in found if c.is_base] == ["relneuron"]
    assert {c.variant for c in found} <= {op, "count"}


def _later(right: Callable[..., None], *tensors: Any, positions: Any, **options: Any) -> None:
    right(*tensors, positions=positions, **options)
    positions[1, 3] += 1


def _worse(right: Callable[..., None], *tensors: Any, best: ops.BestPeaks, **options: Any) -> None:
    right(*tensors, best=best, **options)
    best.number[1, 3, 0] += 1


def _more(right: Callable[..., None], *tensors: Any, counts: Any, **options: Any) -> None:
    right(*tensors, counts=counts, **options)
    counts[1, 3, 5] += 2


@pytest.mark.parametrize(
    ("op", "wrong"), [("peaks", _later), ("merge_peaks", _worse), ("histogram", _more)]
)
def test_a_wrong_one_is_found(op: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ops, op)

    def run(*tensors: Any, backend: str = "auto", **options: Any) -> None:
        if backend == "reference":
            right(*tensors, backend=backend, **options)
        else:
            wrong(right, *tensors, **options)

    monkeypatch.setattr(ops, op, run)
    found = CONTESTANTS[op](Case(op, "float32", 60, 9, 2), "cpu", 1, False)
    for contestant in found:
        if contestant.name == "relneuron":
            is_right, note = timing._verdict(contestant)
            assert not is_right and note.startswith("wrong: 1 ")
