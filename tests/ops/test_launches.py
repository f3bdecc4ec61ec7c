"""What is kept of calls never decides about another one: launches, checks, counts of labels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from relneuron.ops import GroupStats, average_precision, residual_stats, swiglu_stats
from relneuron.ops.swiglu_stats import repeat
from tests.conftest import ROOT
from tests.kit.interpreter import IS_INTERPRETED, needs_triton

pytestmark = needs_triton
DEVICE = "cpu" if IS_INTERPRETED else "cuda"


def launched(*fault: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "tests/ops/launched.py", *fault],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_launches_are_those_that_triton_would_make() -> None:
    """Calls of all ops with every mixture of strides, alignments and sizes, each launch twice."""
    done = launched()
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    assert seen["launches"] > 1000 and seen["known calls"] > 200
    # Each launch was made once by Triton for the comparison, and at most once to begin with.
    assert seen["launches"] <= seen["by triton"] < 2 * seen["launches"]
    kernels = {name for name in seen if name.endswith("_kernel")}
    assert len(kernels) == 12


@pytest.mark.parametrize("fault", ["alignment", "None", "strides"])
def test_what_is_left_out_of_a_likeness_is_seen(fault: str) -> None:
    done = launched(fault)
    assert done.returncode != 0 and "AssertionError" in done.stderr.splitlines()[-1]


def given(**changes: Any) -> dict[str, Any]:
    """A right call of swiglu_stats, or one that `changes` make wrong."""
    stats = GroupStats(groups=2, width=8, moments=True, device=DEVICE)
    call: dict[str, Any] = {
        "gate": torch.ones(3, 8, device=DEVICE),
        "up": torch.ones(3, 8, device=DEVICE),
        "stats": stats,
        "group_ids": torch.zeros(3, dtype=torch.int32, device=DEVICE),
        "responses": {"up": torch.zeros(2, 8, device=DEVICE)},
        "prompt_ids": torch.zeros(3, dtype=torch.int32, device=DEVICE),
        "keep": torch.full((2, 1), -1, dtype=torch.int32, device=DEVICE),
        "condition_ids": torch.zeros(3, dtype=torch.int32, device=DEVICE),
        "backend": "triton",
    }
    return call | changes


def with_stats(change: Callable[[GroupStats], object]) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        call = given()
        change(call["stats"])
        return call

    return make


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def shared_rows() -> dict[str, Any]:
    gate = torch.ones(3, 8, device=DEVICE)
    return given(gate=gate, out=gate.view(3, 8))


WRONG: dict[str, Callable[[], dict[str, Any]]] = {
    "no tensor": lambda: given(gate=[1.0]),
    "another shape": lambda: given(up=torch.ones(3, 9, device=DEVICE)),
    "another dtype": lambda: given(up=torch.ones(3, 8, dtype=torch.float64, device=DEVICE)),
    "strides": lambda: given(up=torch.ones(8, 3, device=DEVICE).T),
    "on meta": lambda: given(up=torch.ones(3, 8, device="meta")),
    "sparse": lambda: given(up=torch.ones(3, 8, device=DEVICE).to_sparse()),
    "negative bit": lambda: given(up=torch.complex(torch.ones(3, 8), torch.ones(3, 8)).conj().imag),
    "gradient": lambda: given(
        up=torch.ones(3, 8, device=DEVICE, requires_grad=True), out=torch.ones(3, 8, device=DEVICE)
    ),
    "ids of int64": lambda: given(group_ids=ids(0, 0, 0).long()),
    "ids out of range": lambda: given(group_ids=ids(0, 2, 0)),
    "condition out of range": lambda: given(condition_ids=ids(0, -1, 0)),
    "no ids": lambda: given(group_ids=None),
    "no prompts": lambda: given(prompt_ids=None),
    "another site": lambda: given(responses={"down": torch.zeros(2, 8, device=DEVICE)}),
    "shared memory": shared_rows,
    "a field": with_stats(lambda stats: setattr(stats, "threshold", 1.0)),
    "a tensor of stats": with_stats(lambda stats: setattr(stats, "tokens", stats.tokens.int())),
    "stats set aside": with_stats(lambda stats: stats._count.resize_(1, 1, 8)),
    "stats elsewhere": with_stats(lambda stats: setattr(stats.tokens, "data", torch.zeros(3))),
    "stats with gradient": with_stats(lambda stats: stats._sum.requires_grad_()),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_call_like_a_right_one_is_refused_as_ever(wrong: str) -> None:
    said = []
    for is_known in (False, True):
        repeat._KNOWN.clear()
        for _ in range(2 * is_known):
            swiglu_stats(**given())
        assert len(repeat._KNOWN) == is_known
        with pytest.raises((TypeError, ValueError)) as caught:
            swiglu_stats(**WRONG[wrong]())
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]


def test_a_known_call_of_another_op_is_another_call() -> None:
    repeat._KNOWN.clear()
    x = torch.full((3, 8), 2.0, device=DEVICE)
    for _ in range(2):
        assert float(residual_stats(x, x, backend="triton")[0, 0]) == 4.0
        assert float(swiglu_stats(x, x, activation="relu", backend="triton")[0, 0]) == 4.0
        assert float(swiglu_stats(x, x + 1, activation="relu", backend="triton")[0, 0]) == 6.0
    assert len(repeat._KNOWN) == 2


def test_what_is_kept_of_calls_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "_N_KEPT", 3)
    repeat._KNOWN.clear()
    for n_tokens in range(1, 9):
        x = torch.ones(n_tokens, 8, device=DEVICE)
        swiglu_stats(x, x, backend="triton")
        assert len(repeat._KNOWN) <= 3


def test_known_calls_count_like_the_first_one() -> None:
    repeat._KNOWN.clear()
    call = given()
    for n in range(1, 4):
        swiglu_stats(**call)
        assert call["stats"].tokens.tolist() == [3 * n, 0]
        assert call["stats"].count["act"].tolist() == [[3 * n] * 8, [0] * 8]
        assert call["responses"]["up"].tolist() == [[3.0 * n] * 8, [0.0] * 8]
    assert len(repeat._KNOWN) == 1


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_labels_that_change_where_they_lie_are_counted_again(backend: str) -> None:
    values = torch.arange(12.0, device=DEVICE).reshape(6, 2)
    memory = np.array([[1, 0, 1, 0, 0, -1]], np.int8)
    weights = torch.ones(1, 6, dtype=torch.uint8)
    labels = torch.from_numpy(memory)

    def ap(own: Tensor | None = None) -> float:
        return float(average_precision(values, labels, weights=own, backend=backend)[0, 0])

    first = ap()
    assert ap() == first
    memory[0, :4] = (0, 1, 0, 0)
    assert ap() != first
    memory[0, :4] = (1, 0, 1, 0)
    assert ap() == first == ap(weights)
    weights[0, 0] = 3
    weighted = ap(weights)
    assert weighted != first and ap() == first
    memory[0] = 0
    with pytest.raises(ValueError, match="labels must have a positive"):
        ap()
