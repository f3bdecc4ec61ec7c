"""The one accuracy rule: as near to the truth as torch itself, plus one rounding.

The contract of `check_backend` and the tests of every op hold floating-point results to
`assert_accurate`, and results that must be equal to `assert_same_bits`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_accurate(
    out: Tensor, truth64: Tensor, baseline: Tensor, scale: Tensor | None = None
) -> None:
    """Per element |out - truth| <= 2 |baseline - truth| + eps(out.dtype) * scale.

    `truth64` is the result in float64 from the same inputs, `baseline` torch eager in the dtype of
    `out`. `scale` is |truth| + rms(truth) / 2 if left out, right for element-wise ops; reductions
    pass the sum of the absolute values of their terms. Where the truth is NaN or infinite, `out`
    must be the same. The message shows the worst element.
    """
    assert out.shape == truth64.shape == baseline.shape, (
        f"shapes differ: out {tuple(out.shape)}, truth {tuple(truth64.shape)}, "
        f"baseline {tuple(baseline.shape)}"
    )
    assert truth64.dtype == torch.float64, f"truth must be float64, got {truth64.dtype}"
    assert out.dtype == baseline.dtype, f"out is {out.dtype}, baseline {baseline.dtype}"
    if out.numel() == 0:
        return
    out64, baseline64 = out.double(), baseline.double()
    finite = truth64.isfinite()
    if scale is None:
        rms = torch.where(finite, truth64, 0.0).square().mean().sqrt()
        scale = truth64.abs() + rms / 2
    allowed = 2 * (baseline64 - truth64).abs() + torch.finfo(out.dtype).eps * scale
    error = (out64 - truth64).abs()
    # Written so that a NaN in `out` or in the bound is an excess.
    excess = torch.where(error <= allowed, 0.0, error - allowed).nan_to_num(nan=torch.inf)
    same = (out64 == truth64) | (out64.isnan() & truth64.isnan())
    excess = torch.where(finite, excess, torch.where(same, 0.0, torch.inf))
    if not bool((excess > 0).any()):
        return
    worst = int(excess.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), out.shape))
    numbers = [float(t.flatten()[worst]) for t in (out64, truth64, baseline64, allowed)]
    raise AssertionError(
        f"{int((excess > 0).sum())} of {out.numel()} elements are inaccurate; worst at {where}: "
        f"out {numbers[0]:.9g}, truth {numbers[1]:.9g}, baseline {numbers[2]:.9g}, "
        f"allowed error {numbers[3]:.3g}"
    )


def assert_same_bits(out: Tensor, expected: Tensor, what: str = "result") -> None:
    """Same shape, dtype and bits; all NaN count as the same value, and -0 differs from +0."""
    assert out.shape == expected.shape, (
        f"{what}: shapes differ, {tuple(out.shape)} and {tuple(expected.shape)}"
    )
    assert out.dtype == expected.dtype, f"{what}: dtypes differ, {out.dtype} and {expected.dtype}"
    different = out != expected
    if out.is_floating_point():
        different = different | (out.signbit() != expected.signbit())
        different = different & ~(out.isnan() & expected.isnan())
    n_different = int(different.sum())
    if n_different:
        where = tuple(int(i) for i in different.nonzero()[0])
        raise AssertionError(
            f"{what}: {n_different} of {out.numel()} elements differ, first at {where}: "
            f"{out[where].item()!r} instead of {expected[where].item()!r}"
        )
