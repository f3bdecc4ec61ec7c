"""Runs any backend of the ops of relneuron.ops.peaks, and has values that are hard for them."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import Tensor

from relneuron.ops import BestPeaks, histogram, merge_peaks, peaks
from relneuron.testing.oracle_peaks import no_peaks
from tests.ops.swiglu_stats.runs import FUSED, device_of, move

op: Any = importlib.import_module("relneuron.ops.peaks.op")
BACKENDS = ["reference", *FUSED]


@contextlib.contextmanager
def forced(backend: str, n_threads: int) -> Iterator[str]:
    """The name for the op; "cpu-avx2" forces an instruction set."""
    name, _, isa = backend.partition("-")
    own = {"n_threads": n_threads}
    with contextlib.ExitStack() as stack:
        for launcher, options in (
            ("peaks_cpu", own | {"isa": isa}),
            ("histogram_cpu", own | {"isa": isa}),
            ("merge_peaks_cpu", own),
        ):
            function = functools.partial(getattr(op, launcher), **options)
            stack.enter_context(mock.patch.object(op, launcher, function))
        yield name


def run_peaks(
    backend: str,
    gate: Tensor,
    up: Tensor | None,
    ids: Tensor | None,
    n_segments: int,
    before: tuple[Tensor, Tensor] | None = None,
    n_threads: int = 1,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """values and positions after one call, on the CPU."""
    device = device_of(backend)
    values, positions = (
        part.to(device, copy=True) for part in before or no_peaks(n_segments, gate.shape[1])
    )
    with forced(backend, n_threads) as name:
        peaks(
            move(gate, device),  # type: ignore[arg-type]
            move(up, device),
            values=values,
            positions=positions,
            segment_ids=move(ids, device),
            backend=name,
            **options,
        )
    return values.cpu(), positions.cpu()


def run_merge(
    backend: str,
    best: BestPeaks,
    values: Tensor,
    positions: Tensor,
    numbers: Tensor,
    ids: Tensor | None,
    n_threads: int = 1,
    **options: Any,
) -> BestPeaks:
    """`best` after one call, on the CPU; what is given stays as it is."""
    device = device_of(backend)
    own = best.to(device)
    with forced(backend, n_threads) as name:
        merge_peaks(
            values.to(device),
            positions.to(device),
            best=own,
            numbers=numbers.to(device),
            group_ids=move(ids, device),
            backend=name,
            **options,
        )
    return own.to("cpu")


def run_histogram(
    backend: str,
    gate: Tensor,
    up: Tensor | None,
    ids: Tensor | None,
    counts: Tensor,
    exponent: Tensor,
    first: Tensor,
    n_threads: int = 1,
    **options: Any,
) -> Tensor:
    """The counts after one call, on the CPU; what is given stays as it is."""
    device = device_of(backend)
    own = counts.to(device, copy=True)
    with forced(backend, n_threads) as name:
        histogram(
            move(gate, device),  # type: ignore[arg-type]
            move(up, device),
            counts=own,
            exponent=exponent.to(device),
            first=first.to(device),
            group_ids=move(ids, device),
            backend=name,
            **options,
        )
    return own.cpu()
