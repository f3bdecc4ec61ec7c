"""Compact implementations of average_precision and logprob_gain with a fault to choose.

`RANKING` and `GAIN` name each fault and the check that must find it; without one both are right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# fault -> the check of relneuron.testing that finds it
RANKING = {
    "the curve is a trapezoid": "ap_is_the_step_function",
    "ascending": "ap_is_the_step_function",
    "ties are broken by the row": "ties_are_one_step",
    "zeros have signs": "plus_zero_is_minus_zero",
    "subnormal values are flushed": "extreme_values_keep_their_order",
    "values go through float32": "float64_is_compared_as_float64",
    "rows outside are negatives": "rows_outside_of_a_set_are_not_there",
    "the first relation's set is all relations'": "relations_have_sets_of_their_own",
    "positives alone are an error": "with_positives_alone_it_is_one",
    "sums are float32": "long_columns_are_exact",
    "weights are ignored": "a_weight_is_as_many_rows",
    "weights are of positives alone": "a_weight_is_as_many_rows",
    "strides are ignored": "values_may_lie_as_they_like",
    "no columns are an error": "nothing_to_rank_is_allowed",
    "values are sorted in place": "arguments_stay_as_they_are",
    "values are not looked at": "what_cannot_be_ranked_is_refused",
    "labels are not looked at": "what_cannot_be_ranked_is_refused",
    "no negative is taken": "what_cannot_be_ranked_is_refused",
}
GAIN = {
    "the tangent": "gains_are_the_definition",
    "bits for nats": "gains_are_the_definition",
    "logits are bfloat16": "gains_are_the_definition",
    "no maximum is taken off": "large_moves_do_not_overflow",
    "one scale for all": "sentences_have_their_own_target_and_scale",
    "one target for all": "sentences_have_their_own_target_and_scale",
    "the last tokens are missed": "any_number_of_neurons_and_tokens",
    "no neurons are an error": "no_neurons_have_no_gains",
    "products are in the dtype": "half_types_are_read_exactly",
    "gains are in the dtype": "half_types_are_read_exactly",
    "one position for all": "positions_have_coefficients_of_their_own",
    "the offset is ignored": "the_offset_is_in_the_logits",
    "the offset is added afterwards alone": "the_offset_is_in_the_logits",
    "scale_after is ignored": "the_scale_after_is_that_of_the_changed_state",
    "scale_after is the scale before, too": "the_scale_after_is_that_of_the_changed_state",
    "the cap is ignored": "the_cap_is_on_the_logits",
    "the cap leaves the offset out": "the_cap_is_put_on_the_offset_too",
    "certified is the tangent": "certified_gains_are_within_the_tolerance",
    "top is by size": "top_gains_are_the_largest",
    "top is by the tangent": "top_gains_are_the_largest",
    "the earlier of equals is first": "of_equal_gains_the_later_comes_first",
    "vectors are dense": "value_vectors_may_be_transposed",
    "coefficients are scaled in place": "gains_leave_their_arguments_alone",
    "targets are clamped": "wrong_targets_and_values_are_refused",
    "NaN is let through": "wrong_targets_and_values_are_refused",
}


def average_precision_with(
    fault: str | None, values: Tensor, labels: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """The op by one sort a column, right but for `fault`."""
    assert fault is None or fault in RANKING, fault
    if fault != "values are not looked at" and not bool(values.isfinite().all()):
        raise ValueError("values must be finite")
    if fault == "labels are not looked at":
        labels = labels.clamp(-1, 1)
    elif bool(((labels < -1) | (labels > 1)).any()):
        raise ValueError("labels must be 1, 0 or -1")
    if fault == "no columns are an error" and values.numel() == 0:
        raise RuntimeError("nothing to sort")
    if fault == "strides are ignored":
        values = values.as_strided(values.shape, (values.shape[1], 1))
    if fault == "values are sorted in place":
        values.copy_(values.sort(0).values)
    if fault == "the first relation's set is all relations'" and len(labels):
        labels = torch.where(labels[:1] < 0, -1, labels.clamp(min=0))
    if fault == "rows outside are negatives":
        labels = labels.clamp(min=0)
    found = torch.empty(len(labels), values.shape[1])
    for r, row in enumerate(labels):
        weight = torch.ones(len(row), dtype=torch.int64)
        if weights is not None and fault != "weights are ignored":
            weight = weights[r].long()
        if fault == "weights are of positives alone":
            weight = torch.where(row == 1, weight, 1)
        members = (row >= 0) & (weight > 0)
        positive = row[members] == 1
        refuse(fault, positive, len(row))
        for m in range(values.shape[1]):
            found[r, m] = of_column(fault, values[members, m], positive, weight[members])
    return found


def refuse(fault: str | None, positive: Tensor, n_rows: int) -> None:
    if fault != "labels are not looked at" and not bool(positive.any()):
        raise ValueError("a relation must have a positive")
    if not bool((~positive).any()):
        if len(positive) < n_rows and fault != "no negative is taken":
            raise ValueError("a relation that leaves rows out must have a negative")
        if fault == "positives alone are an error":
            raise ValueError("a relation must have a negative")


def of_column(fault: str | None, values: Tensor, positive: Tensor, weight: Tensor) -> float:
    if fault == "values go through float32":
        values = values.float()
    if fault == "subnormal values are flushed":
        values = torch.where(values.abs() < torch.finfo(values.dtype).tiny, 0.0, values)
    order = values.sort(stable=True, descending=fault != "ascending").indices
    if fault == "zeros have signs":
        key = torch.where((values == 0) & values.signbit(), -1e-320, values.double())
        order = key.sort(stable=True, descending=True).indices
    ordered, own, weight = values[order], positive[order], weight[order]
    last = torch.ones_like(own)
    last[:-1] = ordered[1:] != ordered[:-1]
    if fault == "ties are broken by the row":
        last[:] = True
    if fault == "zeros have signs":
        last[:-1] |= ordered[1:].signbit() != ordered[:-1].signbit()
    place = torch.arange(len(own))
    end = torch.where(last, place, len(own)).flip(0).cummin(0).values.flip(0)
    tp, n = (own * weight).cumsum(0)[end], weight.cumsum(0)[end]
    if fault == "the curve is a trapezoid":
        return float((own * weight * (tp - 0.5) / n).sum() / (own * weight).sum())
    if fault == "sums are float32":
        return float((own * weight * (tp / n)).sum() / (own * weight).sum())
    terms = zip(own.tolist(), weight.tolist(), tp.tolist(), n.tolist(), strict=True)
    total = sum(w * t * ((2**62 + k // 2) // k) for is_own, w, t, k in terms if is_own)
    return float(
        torch.tensor(total / (int((own * weight).sum()) << 62), dtype=torch.float64).float()
    )


def logprob_gain_with(
    fault: str | None,
    x: Tensor,
    values: Tensor,
    coefficients: Tensor,
    unembed: Tensor,
    scale: Tensor,
    targets: Tensor,
    *,
    mode: str = "exact",
    tolerance: float = 1e-5,
    top: int | None = None,
    offset: Tensor | None = None,
    scale_after: Tensor | None = None,
    cap: float | None = None,
) -> Any:
    """The op in float64, right but for `fault`."""
    assert fault is None or fault in GAIN, fault
    if fault == "targets are clamped":
        targets = targets.clamp(0, len(unembed) - 1)
    elif bool(((targets < 0) | (targets >= len(unembed))).any()):
        raise ValueError("a target is outside of the vocabulary")
    given = (x, values, coefficients, unembed)
    if fault != "NaN is let through" and not all(bool(t.isfinite().all()) for t in given):
        raise ValueError("values must be finite")
    if fault == "no neurons are an error" and coefficients.numel() == 0:
        raise RuntimeError("nothing to launch")
    if fault == "coefficients are scaled in place":
        coefficients.mul_(2).div_(2).mul_(1.5)
        coefficients = coefficients / 1.5
    if fault == "vectors are dense":
        values = values.as_strided(values.shape, (values.shape[1], 1))
    if fault == "one scale for all":
        scale = scale[:1].expand_as(scale)
    if fault == "one target for all":
        targets = targets[:1].expand_as(targets)
    if fault == "scale_after is ignored":
        scale_after = None
    if fault == "the offset is ignored":
        offset = None
    if fault == "one position for all" and coefficients.dim() == 3:
        coefficients = coefficients[:, :1].expand_as(coefficients)
    if fault == "products are in the dtype" and unembed.dtype.itemsize == 2:
        x, values = (x @ unembed.to(x).T).double(), (values @ unembed.to(values).T).double()
    else:
        x, values = x.double() @ unembed.double().T, values.double() @ unembed.double().T
    rows = coefficients.double()
    rows = rows if rows.dim() == 3 else rows.unsqueeze(1)
    after = scale[:, None, None].double().expand_as(rows)
    if scale_after is not None:
        after = scale_after.double().reshape(rows.shape)
    is_tangent = fault == "the tangent" or (
        fault == "certified is the tangent" and mode == "certified"
    )
    found = torch.empty_like(rows)
    tangents = torch.empty_like(rows)
    for e, target in enumerate(targets.tolist()):
        first = scale[e].double()
        if fault == "scale_after is the scale before, too" and scale_after is not None:
            first = after[e].mean()
        late = None if fault == "the offset is added afterwards alone" else offset
        before = logprobs(fault, first * x[e], late, cap)
        moved = after[e][..., None] * (x[e] + rows[e][..., None] * values)
        found[e] = logprobs(fault, moved, offset, cap)[..., target] - before[target]
        b = scale[e].double() * rows[e][..., None] * values
        tangents[e] = b[..., target] - (before.exp() * b).sum(-1)
    if is_tangent:
        found = tangents
    if fault == "bits for nats":
        found = found / 0.6931471805599453
    if mode == "top":
        return largest(fault, found.reshape(len(found), -1), tangents, top)
    gains = found.reshape(coefficients.shape).float()
    return gains.to(unembed.dtype) if fault == "gains are in the dtype" else gains


def logprobs(fault: str | None, logits: Tensor, offset: Tensor | None, cap: float | None) -> Tensor:
    if fault == "the last tokens are missed":
        logits = logits[..., : max(1, logits.shape[-1] // 8 * 8)]
        logits = torch.nn.functional.pad(logits, (0, 1000), value=-1e9)
        offset = None
    if fault == "logits are bfloat16":
        logits = logits.bfloat16().double()
    if offset is not None and fault != "the cap leaves the offset out":
        logits = logits + offset.double()
    if cap is not None and fault != "the cap is ignored":
        logits = cap * torch.tanh(logits / cap)
    if offset is not None and fault == "the cap leaves the offset out":
        logits = logits + offset.double()
    if fault == "no maximum is taken off":
        narrow = logits.float()
        return (narrow - narrow.exp().sum(-1, keepdim=True).log()).double()
    return logits.log_softmax(-1)


def largest(
    fault: str | None, gains: Tensor, tangents: Tensor, top: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    key = gains.abs() if fault == "top is by size" else gains
    if fault == "top is by the tangent":
        key = tangents.reshape(gains.shape)
    n = gains.shape[1]
    index = n - 1 - key.flip(1).sort(dim=1, descending=True, stable=True).indices
    if fault == "the earlier of equals is first":
        index = key.sort(dim=1, descending=True, stable=True).indices
    index = index[:, :top]
    index = index.gather(
        1, gains.gather(1, index).sort(stable=True, dim=1, descending=True).indices
    )
    return gains.gather(1, index).float(), torch.zeros_like(index), index
