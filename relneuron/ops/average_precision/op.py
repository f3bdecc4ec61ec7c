"""The op `average_precision`: how well each column of values ranks the positives of a relation.

`identify` calls it for every neuron and relation, and with shuffled labels or resampled weights for
their uncertainty. Here are the public function, its spec and the reference in plain torch; the C++
kernel is csrc/average_precision*, the Triton kernel ops/average_precision/triton_launch.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron.ops.backends import check_backend_name, choose_backend, cpu_module, triton_module
from relneuron.ops.tensors import check_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ONE_BITS = 62  # the reciprocals below are integers, in units of 2^-62
LOW_BITS = 31  # a sum of them is kept in two integers, the lower one of 31 bits

Array = np.ndarray[Any, Any]

_CHUNK = 1 << 20  # values sorted at a time: bounds the reference's memory at about 100 MB


def average_precision(
    values: Tensor, labels: Tensor, *, weights: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Exact average precision of every column, for every relation.

    With TP(s) = #{positives >= s}, N(s) = #{positives and negatives >= s} and P positives:

        AP = (1 / P) * sum over positives i of TP(s_i) / N(s_i)

    the step-function AP with tie groups (arXiv 2502.17355, section 3.2; scikit-learn's
    `average_precision_score`).

    Arguments
        values   (N, M) float32|bfloat16|float16|float64, any strides (a transposed view of
                 neuron-major responses is read as it lies); compared in their own dtype, +0 = -0
        labels   (R, N) int8: 1 positive, 0 negative, -1 not in this relation's set
        weights  (R, N) uint8: how often each row counts in each relation, as a bootstrap draws it
                 (scikit-learn's sample_weight); once if left out
        backend  auto | reference | cpu (N up to 2^24) | triton; one that cannot run here raises

    Exactness. The sum is one of integers, so it has no order:

        S = sum over positives i of w_i TP(s_i) I(N(s_i)),  I(n) = floor((2^62 + floor(n/2)) / n)
        AP = float32(S / (2^62 P))

    with two roundings in float64 before the last one to float32. I(n) is off by n 2^-63 of its
    value at most, so AP is within one float32 ulp of scikit-learn's, and bit-identical over
    backends, thread counts, the order of the rows and any split of the columns.

    Returns (R, M) float32 on the device of `values`. M = 0 and R = 0 give an empty result.

    Raises ValueError for a shape, dtype or device that does not fit, for NaN and infinities in
    `values`, labels other than 1, 0 and -1, a relation without positives, and one that leaves rows
    out and keeps no negative (with all N rows positive AP is 1, as in scikit-learn); TypeError for
    what is no tensor. There is no gradient: with grad mode on, `values` that require it are
    refused. `labels` and `weights` may also be on the CPU.
    """
    check_backend_name("average_precision", backend)
    _check(values, labels, weights)
    chosen = choose_backend("average_precision", backend, values.device, values.dtype)
    kept = _checked(labels.cpu().numpy(), None if weights is None else weights.cpu().numpy())
    if not values.shape[1] or not labels.shape[0]:
        return torch.empty(labels.shape[0], values.shape[1], device=values.device)
    if chosen == "cpu":
        result = average_precision_cpu(values, labels, weights)
    elif chosen == "triton":
        result = triton_module("average_precision").average_precision_triton(
            values, labels, weights, kept
        )
    else:
        result = average_precision_reference(values, labels, weights)
    if result is None:
        raise _not_finite(values)
    return result


def _check(values: Tensor, labels: Tensor, weights: Tensor | None) -> None:
    given = {"values": values, "labels": labels}
    check_tensors("average_precision", given, {"weights": weights})
    if values.dim() != 2 or values.dtype not in DTYPES:
        raise _error("values", "(N, M) float32|bfloat16|float16|float64", values)
    n = values.shape[0]
    if labels.dim() != 2 or labels.shape[1] != n or labels.dtype != torch.int8:
        raise _error("labels", f"(R, N) int8 with N={n} (from values)", labels)
    if weights is not None and (weights.shape != labels.shape or weights.dtype != torch.uint8):
        wanted = f"(R, N) uint8 with R={labels.shape[0]} (from labels), N={n} (from values)"
        raise _error("weights", wanted, weights)
    for name, tensor in (("labels", labels), ("weights", weights)):
        if tensor is not None and tensor.device not in (values.device, torch.device("cpu")):
            raise ValueError(
                f"average_precision: {name} must be on {values.device} (from values) or cpu, "
                f"got {tensor.device}"
            )


# The labels and weights of the last call (copies), and what a backend has made of them. One object,
# so that no thread reads half of what another one writes.
_last: tuple[Array, Array | None, dict[object, Any]] | None = None
_MOST_KEPT_BYTES = 1 << 22


def _checked(labels: Array, weights: Array | None) -> dict[object, Any]:
    """Check the labels, and return what is kept of them.

    A study ranks layer after layer by the same ones: those of the last call are right, too.
    """
    global _last
    last = _last
    if last is not None and np.array_equal(last[0], labels) and _are_same(last[1], weights):
        return last[2]
    _check_labels(labels, weights)
    kept: dict[object, Any] = {}
    if labels.nbytes <= _MOST_KEPT_BYTES:
        _last = (labels.copy(), None if weights is None else weights.copy(), kept)
    return kept


def _are_same(a: Array | None, b: Array | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def _check_labels(labels: Array, weights: Array | None) -> None:
    """By numpy, whose comparisons of bytes take a tenth of torch's time."""
    if labels.size and (labels.min() < -1 or labels.max() > 1):
        row, column = np.argwhere((labels < -1) | (labels > 1))[0].tolist()
        raise ValueError(
            "average_precision: labels must be 1, 0 or -1, "
            f"got {labels[row, column]} at ({row}, {column})"
        )
    is_positive, is_negative = labels == 1, labels == 0
    if weights is not None:
        is_positive &= weights > 0
        is_negative &= weights > 0
    n_positive = np.count_nonzero(is_positive, axis=1)
    n_negative = np.count_nonzero(is_negative, axis=1)
    for what, wrong in (
        ("positive", n_positive == 0),
        ("negative", (n_negative == 0) & (n_positive < labels.shape[1])),
    ):
        if wrong.any():
            rows = np.flatnonzero(wrong).tolist()
            shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            of_weight = "" if weights is None else " of weight > 0"
            raise ValueError(
                f"average_precision: labels must have a {what}{of_weight} in every relation, "
                f"got none in row {shown}"
            )


def _error(name: str, wanted: str, got: Tensor) -> ValueError:
    return ValueError(
        f"average_precision: {name} must be {wanted}, got {tuple(got.shape)} {got.dtype}"
    )


def _not_finite(values: Tensor) -> ValueError:
    """What is said of values that cannot be ranked; looked for only when there are some."""
    step = max(1, _CHUNK // max(1, values.shape[0]))
    for start in range(0, values.shape[1], step):
        wrong = ~values[:, start : start + step].isfinite()
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            column += start
            return ValueError(
                "average_precision: values must be finite, "
                f"got {float(values[row, column])} at ({row}, {column})"
            )
    raise AssertionError("a kernel found values that are not finite, torch does not")


# --------------------------------------------------------------------------------------------------
# The reference. Backends return None if a value is not finite.


def reciprocals(n_max: int, device: torch.device | str = "cpu") -> Tensor:
    """I(n) of the spec for n = 0 ... n_max, int64; that of 0 is 0."""
    n = torch.arange(n_max + 1, device=device).clamp_(min=1)
    table = torch.div(
        (1 << ONE_BITS) + torch.div(n, 2, rounding_mode="floor"), n, rounding_mode="floor"
    )
    table[0] = 0
    return table


def from_sums(high: Tensor, low: Tensor, n_positive: Tensor) -> Tensor:
    """AP (R, M) float32 of S = high * 2^31 + low (int64) and P (R,); low may have carries."""
    high = high + (low >> LOW_BITS)
    low = low & ((1 << LOW_BITS) - 1)
    total = torch.add(low, high.double(), alpha=2.0**LOW_BITS)
    return (total / (n_positive.double() * 2.0**ONE_BITS).unsqueeze(1)).float()


def average_precision_reference(
    values: Tensor, labels: Tensor, weights: Tensor | None = None
) -> Tensor | None:
    """`average_precision` in plain torch: one sort a column, counts at the ends of tie groups."""
    n, m = values.shape
    device = values.device
    labels = labels.to(device)
    counted = (labels >= 0).to(torch.int64)
    if weights is not None:
        counted *= weights.to(device)
    positive = counted * (labels == 1)
    table = reciprocals(int(counted.sum(1).max()), device)
    high, low = (torch.empty(len(labels), m, dtype=torch.int64, device=device) for _ in range(2))
    step = max(1, _CHUNK // n)
    for start in range(0, m, step):
        columns = slice(start, start + step)
        block = values[:, columns].T.contiguous()
        if not bool(block.isfinite().all()):
            return None
        ordered, order = block.sort(dim=1, descending=True)
        # end[i]: the last place of the tie group that place i belongs to.
        place = torch.arange(n, device=device).expand_as(order)
        is_end = torch.ones_like(order, dtype=torch.bool)
        is_end[:, :-1] = ordered[:, :-1] != ordered[:, 1:]
        end = torch.where(is_end, place, n).flip(1).cummin(1).values.flip(1)
        rows_step = max(1, _CHUNK // order.numel())
        for first in range(0, len(labels), rows_step):
            rows = slice(first, first + rows_step)
            own = positive[rows][:, order]  # (rows, columns, N)
            ends = end.expand_as(own)
            tp = own.cumsum(2).gather(2, ends)
            term = tp * table[counted[rows][:, order].cumsum(2).gather(2, ends)]
            high[rows, columns] = (own * (term >> LOW_BITS)).sum(2)
            low[rows, columns] = (own * (term & ((1 << LOW_BITS) - 1))).sum(2)
    return from_sums(high, low, positive.sum(1))


# --------------------------------------------------------------------------------------------------
# The C++ kernel


def average_precision_cpu(
    values: Tensor, labels: Tensor, weights: Tensor | None, isa: str = "", n_threads: int = 0
) -> Tensor | None:
    """The C++ kernel; `isa` forces an instruction set and `n_threads` a thread count (tests)."""
    n, m = values.shape
    ap = torch.empty(len(labels), m, device="cpu")
    labels = labels.contiguous()
    weights = weights.contiguous() if weights is not None else None
    is_finite = cpu_module().average_precision(
        ap=ap.data_ptr(),
        values=values.data_ptr(),
        stride_vn=values.stride(0),
        stride_vm=values.stride(1),
        N=n,
        M=m,
        dtype=DTYPES.index(values.dtype),
        labels=labels.data_ptr(),
        weights=weights.data_ptr() if weights is not None else 0,
        R=len(labels),
        isa=isa,
        n_threads=n_threads or torch.get_num_threads(),
    )
    return ap if is_finite else None
