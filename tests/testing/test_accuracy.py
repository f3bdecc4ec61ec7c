"""Tests of the test tools: `assert_accurate` and `assert_same_bits` see known-wrong results.

A checker that accepts them would make every other numerical test worthless.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from relneuron.testing import assert_accurate, assert_same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def swiglu(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate, up, the float64 truth and torch's result in dtype."""
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(61, 127, generator=generator).mul(2).to(dtype)
    up = torch.randn(61, 127, generator=generator).to(dtype)
    return gate, up, nnf.silu(gate.double()) * up.double(), nnf.silu(gate) * up


def drop_row(h: Tensor) -> Tensor:
    h = h.clone()
    h[17] = 0
    return h


def drop_column(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 33] = 0
    return h


def one_nan(h: Tensor) -> Tensor:
    h = h.clone()
    h[60, 126] = torch.nan
    return h


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "x0.7": lambda h: h * 0.7,
    "x0.99": lambda h: h * 0.99,
    "rows shifted": lambda h: h.roll(1, 0),
    "columns shifted": lambda h: h.roll(1, 1),
    "row dropped": drop_row,
    "column dropped": drop_column,
    "one NaN": one_nan,
    "one infinity": lambda h: one_nan(h).nan_to_num(nan=torch.inf),
    "sign": lambda h: -h,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_results_are_rejected(wrong: str, dtype: torch.dtype, seed: int) -> None:
    _, _, truth, baseline = swiglu(dtype, seed)
    assert_accurate(baseline, truth, baseline)
    with pytest.raises(AssertionError, match=r"worst at \("):
        assert_accurate(WRONG[wrong](baseline), truth, baseline)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_correct_formula_is_accepted(dtype: torch.dtype, seed: int) -> None:
    gate, up, truth, baseline = swiglu(dtype, seed)
    wide = gate.float()
    act = (wide / (1 + torch.exp2(wide * -1.44269504))).to(dtype)
    assert_accurate(act * up, truth, baseline)


def test_nonfinite_truth_must_be_met() -> None:
    truth = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    good = truth.float()
    assert_accurate(good, truth, good)
    for position, value in ((1, 1e30), (1, -torch.inf), (2, torch.nan), (3, 0.0)):
        bad = good.clone()
        bad[position] = value
        with pytest.raises(AssertionError):
            assert_accurate(bad, truth, good)


def test_shape_and_dtype_must_match() -> None:
    _, _, truth, baseline = swiglu(torch.bfloat16)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_accurate(baseline[:-1], truth, baseline)
    with pytest.raises(AssertionError, match="out is"):
        assert_accurate(baseline.float(), truth, baseline)
    with pytest.raises(AssertionError, match="truth must be float64"):
        assert_accurate(baseline, truth.float(), baseline)


def test_same_bits() -> None:
    values = torch.tensor([1.0, -0.0, torch.nan, torch.inf])
    assert_same_bits(values.clone(), values)
    for position, value in ((0, 1.0000001), (1, 0.0), (2, 0.0), (3, torch.nan)):
        other = values.clone()
        other[position] = value
        with pytest.raises(AssertionError, match="1 of 4"):
            assert_same_bits(other, values)
    with pytest.raises(AssertionError, match="dtypes differ"):
        assert_same_bits(values.double(), values)
    counts = torch.tensor([3, 4])
    with pytest.raises(AssertionError, match="first at"):
        assert_same_bits(counts + torch.tensor([0, 1]), counts)
