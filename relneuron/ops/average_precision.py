"""The op `average_precision`: how well each column of values ranks the positives of a relation.

`identify` calls it for every neuron; scikit-learn's step-function definition, exact, all relations
from one sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 20  # values sorted at a time: bounds the reference's memory at about 100 MB


def average_precision(values: Tensor, labels: Tensor, *, backend: str = "auto") -> Tensor:
    """Exact average precision of every column, for every relation.

    With TP(s) = #{positives >= s}, N(s) = #{positives and negatives >= s} and P positives:

        AP = (1 / P) * sum over positives i of TP(s_i) / N(s_i)

    the step-function AP with tie groups (arXiv 2502.17355, section 3.2; equal to scikit-learn's
    `average_precision_score`). Counts are integers, the sum is float64, rounded once to float32.

    Args:
        values: (N, M) floating point; compared in their own dtype, +0.0 equals -0.0.
        labels: (R, N) int8: 1 positive, 0 negative, -1 not in this relation's set.
        backend: "auto" or "reference".

    Returns: (R, M) float32 on the device of `values`.

    Raises ValueError for a shape or dtype that does not fit, for NaN in `values`, and for a
    relation without positives. M = 0 gives an empty result.
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f"average_precision: backend must be auto or reference, got {backend!r}")
    if values.dim() != 2 or not values.is_floating_point():
        raise ValueError(
            f"average_precision: values must be (N, M) floating point, got "
            f"{tuple(values.shape)} {values.dtype}"
        )
    n = values.shape[0]
    if labels.dim() != 2 or labels.shape[1] != n or labels.dtype != torch.int8:
        raise ValueError(
            f"average_precision: labels must be (R, N) int8 with N={n} (from values), got "
            f"{tuple(labels.shape)} {labels.dtype}"
        )
    if bool(((labels != 1) & (labels != 0) & (labels != -1)).any()):
        raise ValueError("average_precision: labels must be 1, 0 or -1")
    without = (~(labels == 1).any(1)).nonzero().flatten().tolist()
    if without:
        raise ValueError(f"average_precision: labels rows {without} have no positive")
    if bool(values.isnan().any()):
        raise ValueError("average_precision: values hold NaN")
    return average_precision_reference(values, labels.to(values.device))


def average_precision_reference(values: Tensor, labels: Tensor) -> Tensor:
    """`average_precision` in plain torch: one sort a column, counts at the ends of tie groups."""
    n, m = values.shape
    result = torch.empty(labels.shape[0], m, device=values.device)
    step = max(1, _CHUNK // max(n, 1))
    for start in range(0, m, step):
        block = values[:, start : start + step].T.contiguous()
        ordered, order = block.sort(dim=1, descending=True)
        # end[i]: the last place of the tie group that place i belongs to.
        place = torch.arange(n, device=values.device).expand_as(order)
        is_end = torch.ones_like(order, dtype=torch.bool)
        is_end[:, :-1] = ordered[:, :-1] != ordered[:, 1:]
        end = torch.where(is_end, place, n).flip(1).cummin(1).values.flip(1)
        for relation, row in enumerate(labels):
            sorted_labels = row[order]
            positive = sorted_labels == 1
            tp = positive.cumsum(1, dtype=torch.int32).gather(1, end)
            count = (sorted_labels >= 0).cumsum(1, dtype=torch.int32).gather(1, end)
            terms = torch.where(positive, tp.double() / count.clamp(min=1), 0.0)
            result[relation, start : start + step] = terms.sum(1) / (row == 1).sum()
    return result
