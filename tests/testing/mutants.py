"""A compact implementation of `swiglu_stats` with a fault to choose, for tests of check_backend.

`FAULTS` names each fault and the check that must find it; without one the implementation is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from relneuron.ops import GroupStats
from relneuron.ops.swiglu_stats.reference import ieee_arithmetic, site_values

# fault -> the check of relneuron.testing that finds it
FAULTS = {
    # h
    "the activation is always silu": "h_is_accurate",
    "h is truncated": "h_rounds_the_activation_and_the_product",
    "the activation is not rounded": "h_rounds_the_activation_and_the_product",
    "exp overflows": "h_of_all_half_patterns_is_within_one_ulp",
    "subnormal h is flushed": "h_of_all_half_patterns_is_within_one_ulp",
    "the last columns are missed": "h_is_whole_in_any_shape",
    "the last rows are missed": "h_is_whole_in_any_shape",
    "no tokens is an error": "empty_calls_are_allowed",
    "no neurons, no tokens": "empty_calls_are_allowed",
    "gate is modified": "inputs_stay_as_they_are",
    "ids are modified": "inputs_stay_as_they_are",
    # memory
    "row stride of gate is ignored": "rows_of_gate_and_up_may_be_strided",
    "row stride of up is ignored": "rows_of_gate_and_up_may_be_strided",
    "row stride of out is ignored": "rows_of_out_may_be_strided",
    "out is not returned": "out_is_written_and_returned",
    "out is not written": "out_is_written_and_returned",
    "out is stale where dropped": "dropped_elements_of_out_are_written",
    # masks
    "keep is ignored": "bit_f_of_keep_is_neuron_f",
    "bits of keep are big-endian": "bit_f_of_keep_is_neuron_f",
    "the last partial word is ignored": "the_last_partial_word_of_keep_counts",
    "the last row is the default": "without_conditions_row_zero_of_keep_is_taken",
    "conditions are ignored": "every_token_takes_the_row_of_its_condition",
    "dropped means times zero": "dropped_neurons_are_plus_zero",
    "masked before counting": "statistics_are_taken_before_masking",
    "masked before responses": "responses_are_taken_before_masking",
    # what is active
    "threshold is rounded to float32": "counts_of_all_half_patterns",
    "values go through bfloat16": "counts_of_float32_patterns",
    "active is greater or equal": "active_is_greater_not_equal",
    "threshold is rounded to the dtype": "the_threshold_is_not_rounded_to_the_dtype",
    "NaN is active": "nan_is_never_active_and_infinity_is",
    "infinity is not active": "nan_is_never_active_and_infinity_is",
    "subnormal values are flushed": "subnormal_values_count_and_zeros_do_not",
    "flush to zero is obeyed": "flush_to_zero_changes_no_count",
    # who is counted where
    "without ids nothing is counted": "without_ids_all_tokens_are_in_group_zero",
    "group -1 is the last group": "minus_one_is_in_no_group",
    "group -1 is in tokens": "minus_one_is_in_no_group",
    "the first id of a tile is all its ids": "groups_may_come_in_any_order",
    "the last columns are not counted": "every_column_is_counted_in_any_shape",
    "statistics ignore row strides": "strided_rows_are_counted",
    "counts are overwritten": "statistics_add_to_what_is_there",
    "tokens are counted in tiles": "any_split_of_the_tokens_counts_the_same",
    # large counters
    "counters wrap at 2^31": "counters_are_exact_past_2_to_the_31_and_53",
    "counters are float32": "counters_are_exact_past_2_to_the_31_and_53",
    "counters are float64": "counters_are_exact_past_2_to_the_31_and_53",
    "partial counters are bfloat16": "long_groups_are_counted_whole",
    "partial counters are float16": "long_groups_are_counted_whole",
    "partial counters are 16-bit": "more_than_65536_tokens_of_one_group",
    # moments
    "sums are bfloat16": "moments_are_accurate",
    "sums of squares are sums": "moments_are_accurate",
    "sums are overwritten": "moments_add_to_what_is_there",
    "maxima are overwritten": "moments_add_to_what_is_there",
    "moments take non-finite values": "moments_leave_nonfinite_values_out",
    "maxima start at zero": "maxima_start_at_minus_infinity",
    "a maximum can be -0": "maxima_start_at_minus_infinity",
    "squares are float32": "moments_of_all_half_patterns",
    # responses
    "responses are bfloat16": "responses_are_sums_per_prompt",
    "responses are overwritten": "responses_add_to_what_is_there",
    "prompt -1 is the last prompt": "prompt_minus_one_is_nowhere",
    "row stride of responses is ignored": "rows_of_responses_may_be_strided",
    "responses leave out non-finite values": "responses_take_nonfinite_values",
    # without up
    "without up gate takes its place": "without_up_h_is_the_activation",
    "without up h is truncated": "without_up_h_is_rounded_once",
    "without up h is in half of its precision": "without_up_h_is_rounded_once",
    "without up act is gate": "without_up_all_else_is_as_with_it",
    "without up nothing is recorded": "without_up_all_else_is_as_with_it",
    "without up nothing is dropped": "without_up_dropped_neurons_are_plus_zero",
    "without up a dropped neuron is times zero": "without_up_dropped_neurons_are_plus_zero",
    "without up rows are dense": "without_up_rows_may_be_strided",
    # everything
    "responses go by group": "all_features_work_in_one_call",
    "sums have no fixed order": "two_runs_give_the_same_bits",
    "ids are not looked at": "ids_out_of_range_are_refused",
    "ids are looked at too late": "ids_out_of_range_are_refused",
}


def swiglu_stats_with(
    fault: str | None,
    gate: Tensor,
    up: Tensor | None,
    *,
    activation: str = "silu",
    stats: GroupStats | None = None,
    group_ids: Tensor | None = None,
    responses: Mapping[str, Tensor] | None = None,
    prompt_ids: Tensor | None = None,
    keep: Tensor | None = None,
    condition_ids: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The op in plain torch, right but for `fault`."""
    assert fault is None or fault in FAULTS, fault
    n_tokens, width = gate.shape
    ids = [
        (group_ids, -1, stats.groups if stats else 0),
        (prompt_ids, -1, len(next(iter(responses.values()))) if responses else 0),
        (condition_ids, 0, len(keep) if keep is not None else 0),
    ]

    def refuse_wrong_ids() -> None:
        for values, low, high in ids:
            if values is not None and values.numel():
                if fault == "ids are not looked at":
                    values.clamp_(low, high - 1)
                elif int(values.min()) < low or int(values.max()) >= high:
                    raise ValueError("an id is out of range")

    if fault != "ids are looked at too late":
        refuse_wrong_ids()
    if fault == "no tokens is an error" and n_tokens == 0:
        raise RuntimeError("invalid configuration argument")
    if fault == "no neurons, no tokens" and width == 0:
        return torch.empty_like(gate)
    if fault == "ids are modified" and group_ids is not None:
        group_ids.clamp_(min=0)

    read_gate, read_up = gate, up
    if fault in ("row stride of gate is ignored", "statistics ignore row strides"):
        read_gate = gate.as_strided(gate.shape, (width, 1))
    if fault == "row stride of up is ignored" and up is not None:
        read_up = up.as_strided(up.shape, (width, 1))
    obeys_mode = fault == "flush to zero is obeyed"
    with nullcontext() if obeys_mode else ieee_arithmetic():
        mask = None
        if keep is not None and fault != "keep is ignored":
            mask = unpack(fault, keep, condition_ids, n_tokens, width)
        record(fault, read_gate, read_up, activation, stats, group_ids, responses, prompt_ids, mask)
        if fault == "statistics ignore row strides":
            read_gate = gate
        h = hidden(fault, read_gate, read_up, activation)
    if fault == "ids are looked at too late":
        refuse_wrong_ids()
    if fault == "gate is modified":
        gate.mul_(2)
    if up is None and fault == "without up nothing is dropped":
        mask = None
    dropped = torch.zeros_like(h, dtype=torch.bool) if mask is None else ~mask
    is_product = fault == "dropped means times zero"
    is_product |= up is None and fault == "without up a dropped neuron is times zero"
    masked = h * ~dropped if is_product else h.masked_fill(dropped, 0.0)
    if out is None or fault == "out is not returned":
        return masked
    if fault == "row stride of out is ignored" or (
        up is None and fault == "without up rows are dense"
    ):
        out.as_strided(out.shape, (width, 1)).copy_(masked)
    elif fault == "out is stale where dropped":
        out.copy_(torch.where(dropped, out, masked))
    elif fault != "out is not written":
        out.copy_(masked)
    return out


def hidden(fault: str | None, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    dtype = gate.dtype
    if fault == "the activation is always silu":
        activation = "silu"
    if up is None:
        return hidden_without_up(fault, gate, activation)
    act = site_values(gate, up, activation, ["act"])["act"]
    if fault == "exp overflows":
        act = gate.float() * gate.float().exp() / (1 + gate.float().exp())
    if fault == "the activation is not rounded":
        act = site_values(gate.float(), up.float(), activation, ["act"])["act"]
    wide = act * up.float()
    h = wide.to(dtype)
    if fault == "h is truncated" and dtype == torch.bfloat16:
        h = (wide.view(torch.int32) & -65536).view(torch.float32).to(dtype)
    if fault == "subnormal h is flushed":
        h = torch.where(h.abs() < torch.finfo(dtype).tiny, 0.0, h)
    n_tokens, width = h.shape
    if fault == "the last columns are missed":
        h[:, width // 8 * 8 :] = 0
    if fault == "the last rows are missed" and n_tokens > 16:
        h[n_tokens // 16 * 16 :] = 0
    return h


def hidden_without_up(fault: str | None, gate: Tensor, activation: str) -> Tensor:
    wide = site_values(gate.float(), None, activation, ["act"])["act"]
    h = wide.to(gate.dtype)
    if fault == "without up gate takes its place":
        h = h * gate
    if fault == "without up h is truncated" and gate.dtype == torch.bfloat16:
        h = (wide.view(torch.int32) & -65536).view(torch.float32).to(h)
    if fault == "without up h is in half of its precision":
        h = h.to(torch.float16 if gate.dtype == torch.bfloat16 else torch.bfloat16).to(h)
    return h


def unpack(
    fault: str | None, keep: Tensor, condition_ids: Tensor | None, n_tokens: int, width: int
) -> Tensor:
    neuron = torch.arange(width)
    bit = 31 - neuron % 32 if fault == "bits of keep are big-endian" else neuron % 32
    bits = ((keep[:, neuron // 32] >> bit.int()) & 1).bool()
    if fault == "the last partial word is ignored":
        bits[:, width // 32 * 32 :] = True
    if condition_ids is None or fault == "conditions are ignored":
        row = -1 if fault == "the last row is the default" else 0
        return bits[row].expand(n_tokens, width)
    return bits[condition_ids.long()]


def record(
    fault: str | None,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    stats: GroupStats | None,
    group_ids: Tensor | None,
    responses: Mapping[str, Tensor] | None,
    prompt_ids: Tensor | None,
    mask: Tensor | None,
) -> None:
    """The statistics and responses of one call."""
    if up is None and fault == "without up nothing is recorded":
        return
    sites = ("gate", "act") if up is None else ("gate", "up", "act", "product")
    values = site_values(gate, up, activation, sites)
    if up is None and fault == "without up act is gate":
        values["act"] = values["gate"]
    if fault == "values go through bfloat16":
        values = {site: value.bfloat16().float() for site, value in values.items()}
    if stats is not None and not (fault == "without ids nothing is counted" and group_ids is None):
        seen = values
        if fault == "masked before counting" and mask is not None:
            seen = {site: value.masked_fill(~mask, 0.0) for site, value in values.items()}
        add_statistics(fault, stats, seen, groups_of(fault, group_ids, gate.shape[0]), gate.dtype)
    if responses is None or prompt_ids is None:
        return
    if fault == "masked before responses" and mask is not None:
        values = {site: value.masked_fill(~mask, 0.0) for site, value in values.items()}
    add_responses(fault, responses, values, prompt_ids, group_ids)


def groups_of(fault: str | None, group_ids: Tensor | None, n_tokens: int) -> Tensor:
    if group_ids is None:
        return torch.zeros(n_tokens, dtype=torch.int64)
    if fault == "the first id of a tile is all its ids":
        return group_ids[torch.arange(n_tokens) // 8 * 8].long()
    return group_ids.long()


def add_statistics(
    fault: str | None,
    stats: GroupStats,
    values: dict[str, Tensor],
    ids: Tensor,
    dtype: torch.dtype,
) -> None:
    if fault == "group -1 is the last group":
        ids = ids % stats.groups
    if fault == "counts are overwritten":
        stats.tokens.zero_()
    counted = ids >= 0
    sizes = torch.bincount(ids[counted], minlength=stats.groups)
    if fault == "group -1 is in tokens":
        sizes[0] += (~counted).sum()
    if fault == "tokens are counted in tiles":
        sizes = (sizes + 7) // 8 * 8
    stats.tokens += sizes
    for site in stats.sites:
        value = values[site][counted]
        hits = torch.zeros(stats.groups, stats.width, dtype=torch.int64)
        hits.index_add_(0, ids[counted], is_active(fault, value, stats.threshold, dtype).long())
        add_counts(fault, stats.count[site], hits)
        if stats.moments:
            add_moments(fault, stats, site, value, ids[counted])


def is_active(fault: str | None, value: Tensor, threshold: float, dtype: torch.dtype) -> Tensor:
    wide = value.double()
    if fault == "threshold is rounded to float32":
        threshold = float(torch.tensor(threshold, dtype=torch.float32))
    if fault == "threshold is rounded to the dtype":
        threshold = float(torch.tensor(threshold).to(dtype))
    if fault == "subnormal values are flushed":
        wide = torch.where(wide.abs() < torch.finfo(torch.float32).tiny, 0.0, wide)
    if fault == "flush to zero is obeyed":
        # Computing with them flushes them to zero when the mode is on.
        wide = (value * 1.0).double()
    if fault == "NaN is active":
        return ~(wide <= threshold)
    if fault == "infinity is not active":
        return (wide > threshold) & wide.isfinite()
    return wide >= threshold if fault == "active is greater or equal" else wide > threshold


def add_counts(fault: str | None, count: Tensor, hits: Tensor) -> None:
    if fault == "the last columns are not counted":
        hits[:, hits.shape[1] // 32 * 32 :] = 0
    if fault == "counts are overwritten":
        count.zero_()
    if fault == "partial counters are 16-bit":
        hits &= 0xFFFF
    stall = {"partial counters are bfloat16": 256, "partial counters are float16": 2048}
    hits.clamp_(max=stall.get(fault or "", 2**62))
    total = count + hits
    if fault == "counters wrap at 2^31":
        total = total.int().long()
    if fault == "counters are float32":
        total = (count.float() + hits.float()).long()
    if fault == "counters are float64":
        total = (count.double() + hits.double()).long()
    count.copy_(total)


def add_moments(
    fault: str | None, stats: GroupStats, site: str, value: Tensor, ids: Tensor
) -> None:
    finite = value.isfinite()
    stats.n_nonfinite[site].index_add_(0, ids, (~finite).long())
    if fault == "moments take non-finite values":
        finite = torch.ones_like(finite)
    if fault == "sums are overwritten":
        stats.sum[site].zero_()
        stats.sum_sq[site].zero_()
    terms = torch.where(finite, value, 0.0).double()
    squares = (terms.float() ** 2).double() if fault == "squares are float32" else terms**2
    if fault == "sums of squares are sums":
        squares = terms
    if fault == "sums are bfloat16":
        terms = terms.bfloat16().double()
    for target, new in ((stats.sum[site], terms), (stats.sum_sq[site], squares)):
        if fault == "sums are bfloat16":
            partial = torch.zeros_like(target, dtype=torch.bfloat16)
            target += partial.index_add_(0, ids, new.bfloat16())
        elif fault == "sums have no fixed order":
            order = torch.randperm(len(ids))
            partial = torch.zeros_like(target, dtype=torch.float32)
            target += partial.index_add_(0, ids[order], new[order].float())
        else:
            target.index_add_(0, ids, new)
    if fault == "maxima are overwritten":
        stats.max[site].fill_(-math.inf)
    if fault == "maxima start at zero":
        stats.max[site].clamp_(min=0.0)
    shift = -0.0 if fault == "a maximum can be -0" else 0.0
    candidates = torch.where(finite, value + shift, -math.inf)
    stats.max[site].scatter_reduce_(0, ids[:, None].expand_as(value), candidates, reduce="amax")


def add_responses(
    fault: str | None,
    responses: Mapping[str, Tensor],
    values: dict[str, Any],
    prompt_ids: Tensor,
    group_ids: Tensor | None,
) -> None:
    if fault == "responses go by group" and group_ids is not None:
        prompt_ids = group_ids
    for site, target in responses.items():
        ids, value = prompt_ids.long(), values[site]
        if fault == "prompt -1 is the last prompt":
            ids = ids % len(target)
        if fault == "responses leave out non-finite values":
            value = torch.where(value.isfinite(), value, 0.0)
        if fault == "responses are bfloat16":
            value = value.bfloat16().float()
        if fault == "responses are overwritten":
            target.zero_()
        if fault == "row stride of responses is ignored":
            target = target.as_strided(target.shape, (target.shape[1], 1))
        target.index_add_(0, ids[ids >= 0], value[ids >= 0])
