"""The CPU backend of `peaks`, `merge_peaks` and `histogram`: launches their C++ kernels."""

from __future__ import annotations

from typing import Any

import torch

from relneuron.ops.backends import cpu_module
from relneuron.ops.peaks.reference import HistogramCall, MergeCall, PeaksCall, SiteCall
from relneuron.ops.swiglu_stats.checks import DTYPES
from relneuron.ops.swiglu_stats.cpu_launch import address
from relneuron.ops.swiglu_stats.groups import SITES
from relneuron.ops.swiglu_stats.reference import CODES


def peaks_cpu(call: PeaksCall, isa: str = "", n_threads: int = 0) -> None:
    """The C++ kernel; `isa` forces an instruction set and `n_threads` a thread count (tests)."""
    cpu_module().peaks(
        **_site(call, len(call.values)),
        values=call.values.data_ptr(),
        positions=call.positions.data_ptr(),
        first_row=call.first_row,
        isa=isa,
        n_threads=n_threads or torch.get_num_threads(),
    )


def histogram_cpu(call: HistogramCall, isa: str = "", n_threads: int = 0) -> None:
    """As `peaks_cpu`."""
    cpu_module().histogram(
        **_site(call, len(call.counts)),
        counts=call.counts.data_ptr(),
        exponent=call.exponent.data_ptr(),
        first=call.first.data_ptr(),
        B=call.counts.shape[2],
        isa=isa,
        n_threads=n_threads or torch.get_num_threads(),
    )


def merge_peaks_cpu(call: MergeCall, n_threads: int = 0) -> None:
    """Likewise, but the kernel has no instruction set."""
    best = call.best
    cpu_module().merge_peaks(
        values=call.values.data_ptr(),
        positions=call.positions.data_ptr(),
        numbers=call.numbers.data_ptr(),
        group_ids=address(call.group_ids),
        best_value=best.value.data_ptr(),
        best_number=best.number.data_ptr(),
        best_position=best.position.data_ptr(),
        S=call.values.shape[0],
        F=call.values.shape[1],
        K=best.value.shape[2],
        n_threads=n_threads or torch.get_num_threads(),
    )


def _site(call: SiteCall, n_ids: int) -> dict[str, Any]:
    gate, up = call.gate, call.up
    return {
        "gate": gate.data_ptr(),
        "up": address(up),
        "stride_gt": gate.stride(0),
        "stride_ut": 0 if up is None else up.stride(0),
        "T": gate.shape[0],
        "F": gate.shape[1],
        "dtype": DTYPES.index(gate.dtype),
        "activation": CODES.index(call.activation),
        "site": SITES.index(call.site),
        "ids": address(call.ids),
        "n_ids": n_ids,
    }
