"""`ops.average_precision` against the test vectors and scikit-learn, ties and special values too.

Counts are exact and the sum is float64, so scikit-learn's value is met to one float32 ulp.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from relneuron import ops

VECTORS = SHARED / "methods" / "vectors.json"


def ap(values: Any, labels: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return ops.average_precision(
        torch.as_tensor(values, dtype=dtype), torch.as_tensor(labels, dtype=torch.int8)
    )


@pytest.mark.skipif(not VECTORS.is_file(), reason="the test vectors are not beside the project")
def test_the_published_vectors() -> None:
    vectors = json.loads(VECTORS.read_text())
    for case in vectors["ap"]:
        ours = ap(np.array(case["scores"])[:, None], [case["labels"]])
        assert float(ours) == np.float32(case["ap"]), case["name"]
    tie = vectors["ap_float32_tie"]
    scores = np.array(tie["scores_f64"])[:, None]
    for dtype, key in ((torch.float32, "32"), (torch.float64, "64")):
        wanted = np.float32(tie[f"ap_if_scores_float{key}"])
        assert float(ap(scores, [tie["labels"]], dtype)) == wanted
    case = vectors["ap_randomstate_1234"]
    state = np.random.RandomState(1234)
    for key in ("ap_a", "ap_b"):
        ours = ap(state.rand(10, 6).T, [case["labels"]])[0]
        np.testing.assert_allclose(ours, case[key], rtol=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_equal_to_scikit_learn(n: int, m: int, r: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.choice([-1.5, -0.0, 0.0, 0.25, 3.0], (n, m))
    smooth = rng.random(m) < 0.5
    values[:, smooth] = rng.standard_normal((n, smooth.sum()))
    values = values.astype(np.float32)
    labels = rng.integers(-1, 2, (r, n)).astype(np.int8)
    labels[:, rng.integers(n)] = 1
    ours = ap(values, labels, torch.float32).numpy()
    assert ours.dtype == np.float32
    for row in range(r):
        members = labels[row] >= 0
        for column in range(m):
            truth = np.float32(
                average_precision_score(labels[row][members], values[members, column])
            )
            assert abs(ours[row, column] - truth) <= np.spacing(truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_ranks_as_itself(dtype: torch.dtype) -> None:
    values = torch.randn(200, 7, dtype=torch.float64).to(dtype)
    labels = (torch.rand(3, 200) < 0.3).to(torch.int8)
    labels[:, 0] = 1
    assert torch.equal(
        ops.average_precision(values, labels), ops.average_precision(values.double(), labels)
    )


def test_blocks_and_order_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 40, generator=generator).round(decimals=1)
    labels = torch.randint(-1, 2, (2, 300), generator=generator, dtype=torch.int8)
    whole = ops.average_precision(values, labels)
    order = torch.randperm(300, generator=generator)
    assert torch.equal(ops.average_precision(values[order], labels[:, order]), whole)
    assert torch.equal(ops.average_precision(values.T.contiguous().T, labels), whole)
    module = importlib.import_module("relneuron.ops.average_precision")
    monkeypatch.setattr(module, "_CHUNK", 1)
    assert torch.equal(ops.average_precision(values, labels), whole)


def test_constants_and_extremes() -> None:
    labels = [[1, 0, 0, 1]]
    inf = float("inf")
    columns = np.array([[2, 2, 2, 2], [inf, 1, 0, inf], [-inf, 0, 1, -inf]]).T
    assert ap(columns, labels).tolist()[0] == [0.5, 1.0, 0.5]
    assert ap(np.zeros((4, 0)), labels).shape == (1, 0)
    assert float(ap([[1.0], [2.0]], [[1, 1]])) == 1.0


def test_what_cannot_be_ranked_is_refused() -> None:
    good = torch.zeros(3, 2)
    labels = torch.tensor([[1, 0, -1]], dtype=torch.int8)
    for values, given_labels, cause in (
        (good.fill_(float("nan")), labels, "NaN"),
        (torch.zeros(3), labels, r"\(N, M\)"),
        (torch.zeros(3, 2, dtype=torch.int64), labels, "floating point"),
        (torch.zeros(4, 2), labels, "N=4"),
        (torch.zeros(3, 2), labels.long(), "int8"),
        (torch.zeros(3, 2), labels * 2, "1, 0 or -1"),
        (torch.zeros(3, 2), labels.clamp(max=0), "no positive"),
    ):
        with pytest.raises(ValueError, match=cause):
            ops.average_precision(values, given_labels)
    with pytest.raises(ValueError, match="backend"):
        ops.average_precision(torch.zeros(3, 2), labels, backend="cpu")
