"""The largest value of every neuron in each segment, the K best of them, and histograms.

`count` calls them on the way through a corpus: where a neuron is strongest, and how its values are
spread. Here are the public functions and their specs; `reference.py` has what they do in plain
torch, csrc/peaks* and `triton_launch.py` the kernels.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from relneuron.ops.backends import check_backend_name, choose_backend, triton_module
from relneuron.ops.peaks.best import BestPeaks
from relneuron.ops.peaks.checks import (
    check_apart,
    check_best,
    check_bins,
    check_edges,
    check_ids,
    check_plain,
    check_range,
    check_site,
)
from relneuron.ops.peaks.cpu_launch import histogram_cpu, merge_peaks_cpu, peaks_cpu
from relneuron.ops.peaks.reference import (
    HistogramCall,
    MergeCall,
    PeaksCall,
    histogram_reference,
    merge_peaks_reference,
    peaks_reference,
)
from relneuron.ops.swiglu_stats.checks import describe
from relneuron.ops.swiglu_stats.reference import ieee_arithmetic, site_values
from relneuron.ops.tensors import check_tensors

# Positions are int32.
_MOST_ROWS = 2**31


def peaks(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    activation: str = "silu",
    site: str = "act",
    values: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None = None,
    first_row: int = 0,
    ids_checked: bool = False,
    backend: str = "auto",
) -> None:
    """The largest value of every neuron in each segment of the tokens, and where it is; in place.

        values[s, f] = max over the tokens t of segment s of v[t, f]
        positions[s, f] = first_row + the lowest t with that value

    where v is the value at the site, as `swiglu_stats` records it: rounded to the dtype of gate.

    Arguments
        gate, up     (T, F) float32|bfloat16|float16, as in `swiglu_stats`; up may be left out for
                     the sites gate and act, and is read for up and product alone
        activation   as in `swiglu_stats`
        site         gate | up | act | product
        values       (S, F) float32, contiguous: -inf where a segment has had no token yet
        positions    (S, F) int32, contiguous: -1 there
        segment_ids  (T,) int32 in [-1, S): the segment of each token (a window, a prompt), -1 =
                     none, in any order. May be left out when S = 1
        first_row    what token 0 of this call is to be called in `positions`
        ids_checked  True: the caller promises that all ids are in range
        backend      auto | reference | cpu | triton, as in `swiglu_stats`

    What is in values and positions counts as seen, and is replaced by a larger value, or an equal
    one at a lower position. So a call begins with -inf and -1, and rows that come in several calls,
    each with its first_row, in any order, give the same bits as those of one call.

    NaN is no value; a segment without a value keeps -inf and -1. +inf and -inf are values: one of
    -inf alone has the position of its first one. -0 and +0 are equal, and recorded as +0.

    Exactness. All bits are the same between backends, splits of the tokens, thread counts and runs;
    subnormal values count also when torch flushes them to zero. T = 0, F = 0 and S = 0 are allowed.
    There is no gradient. What does not fit is a ValueError, before anything is written.
    """
    check_backend_name("peaks", backend)
    outputs = {"values": values, "positions": positions}
    names = check_site("peaks", gate, up, activation, site, {**outputs, "segment_ids": segment_ids})
    _check_given("peaks", outputs)
    n_rows, width = gate.shape
    n_segments = values.shape[0] if values.ndim else 0
    shape, origin = (n_segments, width), "from gate"
    check_plain("peaks", "values", values, "(S, F)", shape, torch.float32, gate, origin)
    check_plain("peaks", "positions", positions, "(S, F)", shape, torch.int32, gate, "from values")
    check_ids(names, "segment_ids", segment_ids, gate, n_segments, f"values has S={n_segments}")
    if isinstance(first_row, bool) or not isinstance(first_row, int):
        raise TypeError(f"peaks: first_row must be an int, got {type(first_row).__name__}")
    if not 0 <= first_row <= _MOST_ROWS - n_rows:
        raise ValueError(
            f"peaks: first_row must be in [0, 2^31 - T] with T={n_rows} (from gate), as positions "
            f"are int32, got {first_row}"
        )
    _peaks_op(
        gate, up, activation, site, values, positions, segment_ids, first_row, ids_checked, backend
    )


def merge_peaks(
    values: Tensor,
    positions: Tensor,
    *,
    best: BestPeaks,
    numbers: Tensor,
    group_ids: Tensor | None = None,
    ids_checked: bool = False,
    backend: str = "auto",
) -> None:
    """Put the peaks of segments into the K best of their groups, in place.

    Arguments
        values, positions  (S, F) float32 and int32, as `peaks` leaves them; where the position is
                           negative, or the value NaN, there is no peak
        best               a BestPeaks of width F on the same device, whose docstring has the order
        numbers            (S,) int64, not negative: what each segment is called in `best`, where it
                           decides between equal values; two segments of one number are two
        group_ids          (S,) int32 in [-1, G): the group of each segment, -1 = none. May be left
                           out when G = 1
        ids_checked        True: the caller promises that ids and numbers are in range
        backend            auto | reference | cpu | triton, as in `swiglu_stats`

    best.value[g, f] then are the K largest of what it was and the values[s, f] of group g. All bits
    are the same between backends, thread counts, and orders and splits of the segments; and
    `best_1 + best_2` is what all their segments give in one. What does not fit is a ValueError,
    before anything is written.
    """
    check_backend_name("merge_peaks", backend)
    given = {"values": values, "positions": positions, "numbers": numbers}
    check_tensors("merge_peaks", given, {"group_ids": group_ids})
    if values.ndim != 2:
        raise ValueError(f"merge_peaks: values must be (S, F) float32, got {describe(values)}")
    shape = (n_segments, _) = (values.shape[0], values.shape[1])
    origin = "from values"
    check_plain("merge_peaks", "values", values, "(S, F)", shape, torch.float32, values, origin)
    check_plain("merge_peaks", "positions", positions, "(S, F)", shape, torch.int32, values, origin)
    check_plain(
        "merge_peaks", "numbers", numbers, "(S,)", (n_segments,), torch.int64, values, origin
    )
    best = check_best("merge_peaks", best, values)
    n_groups = best.value.shape[0]
    if group_ids is not None:
        check_plain(
            "merge_peaks",
            "group_ids",
            group_ids,
            "(S,)",
            (n_segments,),
            torch.int32,
            values,
            origin,
        )
    elif n_groups != 1:
        raise ValueError(
            f"merge_peaks: group_ids must be (S,) int32 with S={n_segments} (from values) when "
            f"best has G={n_groups}, got None"
        )
    parts = (best.value, best.number, best.position)
    _merge_op(values, positions, *parts, numbers, group_ids, ids_checked, backend)


def histogram(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    activation: str = "silu",
    site: str = "act",
    counts: Tensor,
    exponent: Tensor,
    first: Tensor,
    group_ids: Tensor | None = None,
    ids_checked: bool = False,
    backend: str = "auto",
) -> None:
    """Count the values of every neuron in bins, per group of tokens, in place.

    Bin b of neuron f holds (first[f] + b) 2^exponent[f] <= v < (first[f] + b + 1) 2^exponent[f], of
    which both ends are exact; the first bin all that is below, too, and the last one all above:

        counts[g, f, b] += #{t of group g : b = clamp(floor(v[t, f] 2^-exponent[f]) - first[f],
                                                      0, B - 1)}

    where v is the value at the site, as `swiglu_stats` records it: rounded to the dtype of gate.

    Arguments
        gate, up     (T, F) float32|bfloat16|float16, as in `peaks`
        activation   as in `swiglu_stats`
        site         gate | up | act | product
        counts       (G, F, B) int64, contiguous, B in [1, 4096]
        exponent     (F,) int32 in [-126, 126]: 2^exponent is the width of a bin
        first        (F,) int32, |first| < 2^24: where bin 0 begins, in such widths; both are what
                     `histogram_edges` gives
        group_ids    (T,) int32 in [-1, G), -1 = not counted. May be left out when G = 1
        ids_checked  True: the caller promises that ids, exponent and first are in range
        backend      auto | reference | cpu | triton, as in `swiglu_stats`

    NaN is in no bin; an infinite value is in the bin at its end. Counts are the same between
    backends, splits of the tokens, thread counts and runs, and are those that numpy's searchsorted
    gives on the edges; subnormal values count also when torch flushes them to zero. T = 0 and F = 0
    are allowed. There is no gradient. What does not fit is a ValueError, and nothing is written.
    """
    check_backend_name("histogram", backend)
    own = {"counts": counts, "exponent": exponent, "first": first}
    names = check_site("histogram", gate, up, activation, site, {**own, "group_ids": group_ids})
    _check_given("histogram", own)
    width = gate.shape[1]
    check_bins(counts, width)
    n_groups, _, n_bins = counts.shape
    shape, origin = (n_groups, width, n_bins), "from gate"
    check_plain("histogram", "counts", counts, "(G, F, B)", shape, torch.int64, gate, origin)
    for name, tensor in (("exponent", exponent), ("first", first)):
        check_plain("histogram", name, tensor, "(F,)", (width,), torch.int32, gate, origin)
    check_ids(names, "group_ids", group_ids, gate, n_groups, f"counts has G={n_groups}")
    _histogram_op(
        gate, up, activation, site, counts, exponent, first, group_ids, ids_checked, backend
    )


def site_range(
    gate: Tensor, up: Tensor | None = None, *, activation: str = "silu", site: str = "act"
) -> tuple[Tensor, Tensor]:
    """The smallest and the largest finite value of every neuron, (F,) float32 each.

    For `histogram_edges`, of a first sample: arguments are those of `peaks`, in plain torch on any
    device. A neuron without a finite value has +inf and -inf.
    """
    check_site("site_range", gate, up, activation, site)
    with ieee_arithmetic():
        values = site_values(gate, up, activation, (site,))[site] + 0.0
        finite = values.isfinite()
        most = values.new_full((1, values.shape[1]), torch.inf)
        smallest = torch.cat([most, torch.where(finite, values, torch.inf)]).amin(0)
        return smallest, torch.cat([-most, torch.where(finite, values, -torch.inf)]).amax(0)


def _check_given(op: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            raise TypeError(f"{op}: {name} must be a tensor, got NoneType")


# --------------------------------------------------------------------------------------------------
# The ops that torch sees. They look at what the checks have not seen, addresses and values

# Two threads that write into the same tensors would lose some of each other's.
_WRITING = threading.Lock()


def _peaks_impl(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    site: str,
    values: Tensor,
    positions: Tensor,
    segment_ids: Tensor | None,
    first_row: int,
    ids_checked: bool,
    backend: str,
) -> None:
    chosen = choose_backend("peaks", backend, gate.device, gate.dtype, "peaks")
    written = {"values": values, "positions": positions}
    check_apart("peaks", written, {"gate": gate, "up": up, "segment_ids": segment_ids})
    if not ids_checked:
        why = f"S={len(values)} from values"
        check_range("peaks", "segment_ids", segment_ids, -1, len(values), why)
    up = up if site in ("up", "product") else None
    call = PeaksCall(gate, up, activation, site, segment_ids, values, positions, first_row)
    with _WRITING:
        if chosen == "cpu":
            peaks_cpu(call)
        elif chosen == "triton":
            triton_module("peaks").peaks_triton(call)
        else:
            peaks_reference(call)


def _merge_impl(
    values: Tensor,
    positions: Tensor,
    best_value: Tensor,
    best_number: Tensor,
    best_position: Tensor,
    numbers: Tensor,
    group_ids: Tensor | None,
    ids_checked: bool,
    backend: str,
) -> None:
    chosen = choose_backend("merge_peaks", backend, values.device, values.dtype, "peaks")
    written = {"best.value": best_value, "best.number": best_number, "best.position": best_position}
    read = {"values": values, "positions": positions, "numbers": numbers, "group_ids": group_ids}
    check_apart("merge_peaks", written, read)
    if not ids_checked:
        n_groups = len(best_value)
        why = f"G={n_groups} from best"
        check_range("merge_peaks", "group_ids", group_ids, -1, n_groups, why)
        check_range("merge_peaks", "numbers", numbers, 0, 2**63 - 1, "-1 stands for none")
    best = BestPeaks(best_value, best_number, best_position)
    call = MergeCall(best, values, positions, group_ids, numbers)
    with _WRITING:
        if chosen == "cpu":
            merge_peaks_cpu(call)
        elif chosen == "triton":
            triton_module("peaks").merge_peaks_triton(call)
        else:
            merge_peaks_reference(call)


def _histogram_impl(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    site: str,
    counts: Tensor,
    exponent: Tensor,
    first: Tensor,
    group_ids: Tensor | None,
    ids_checked: bool,
    backend: str,
) -> None:
    chosen = choose_backend("histogram", backend, gate.device, gate.dtype, "peaks")
    read = {"gate": gate, "up": up, "exponent": exponent, "first": first, "group_ids": group_ids}
    check_apart("histogram", {"counts": counts}, read)
    if not ids_checked:
        check_edges(exponent, first)
        why = f"G={len(counts)} from counts"
        check_range("histogram", "group_ids", group_ids, -1, len(counts), why)
    up = up if site in ("up", "product") else None
    call = HistogramCall(gate, up, activation, site, group_ids, counts, exponent, first)
    with _WRITING:
        if chosen == "cpu":
            histogram_cpu(call)
        elif chosen == "triton":
            triton_module("peaks").histogram_triton(call)
        else:
            histogram_reference(call)


for _name, _impl, _written in (
    ("peaks", _peaks_impl, ("values", "positions")),
    ("merge_peaks", _merge_impl, ("best_value", "best_number", "best_position")),
    ("histogram", _histogram_impl, ("counts",)),
):
    torch.library.define(
        f"relneuron::{_name}",
        torch.library.infer_schema(_impl, mutates_args=_written),
        tags=torch.Tag.pt2_compliant_tag,
    )
    torch.library.impl(f"relneuron::{_name}", "CompositeExplicitAutograd", _impl)
    torch.library.register_fake(f"relneuron::{_name}", lambda *args: None)
_peaks_op = torch.ops.relneuron.peaks.default
_merge_op = torch.ops.relneuron.merge_peaks.default
_histogram_op = torch.ops.relneuron.histogram.default
