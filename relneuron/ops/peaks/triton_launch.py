"""The GPU backend of `peaks`, `merge_peaks` and `histogram`: the launcher of their Triton kernels.

`op.py` imports this file when a GPU tensor (or backend="triton") asks for it; `bench/offline`
compiles what the plans return.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from relneuron.ops.launches import N_KEPT, Form, Launch, on_device
from relneuron.ops.peaks import triton_kernels as kernels
from relneuron.ops.peaks.reference import HistogramCall, MergeCall, PeaksCall, SiteCall
from relneuron.ops.swiglu_stats.groups import SITES
from relneuron.ops.swiglu_stats.reference import CODES, ieee_arithmetic
from relneuron.ops.swiglu_stats.triton_sums import _span_kernel

IS_INTERPRETED = not isinstance(kernels._peaks_kernel, triton.JITFunction)


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes, not measured on any GPU: the reasons are arithmetic on the compiled code.

    A thread takes 16 bytes of a row, a step of four warps 8 rows of 256 bytes: half of what a step
    of `swiglu_stats` has, so that 32 windows and 11,008 neurons in 16 bits make 2,752 programs.
    """

    is_nvidia: bool
    block_t: int = 8
    block_bytes: int = 256
    num_warps: int = 4
    # Of a histogram, tokens that one program walks.
    tile_t: int = 64
    # Of a merge, places of all lists that a program looks at at once.
    places: int = 1024

    def block_f(self, dtype: torch.dtype) -> int:
        """Columns of one step."""
        return self.block_bytes // dtype.itemsize


# A wavefront of AMD's has 64 threads.
NVIDIA_LAUNCH, HIP_LAUNCH = LaunchConfig(True), LaunchConfig(False, num_warps=2)
# The interpreter's cost is per operation, not per element.
INTERPRETER_LAUNCH = LaunchConfig(False, 64, 1024, 4, 64, 4096)


def peaks_triton(call: PeaksCall) -> None:
    """Launch the kernels for one checked call; nothing here waits for the device."""
    _run(plan_peaks(call, _config()), call.gate.device)


def histogram_triton(call: HistogramCall) -> None:
    """As `peaks_triton`."""
    _run(plan_histogram(call, _config()), call.gate.device)


def merge_peaks_triton(call: MergeCall) -> None:
    """As `peaks_triton`."""
    _run(plan_merge(call, _config()), call.values.device)


def _config() -> LaunchConfig:
    if IS_INTERPRETED:
        return INTERPRETER_LAUNCH
    return NVIDIA_LAUNCH if torch.version.hip is None else HIP_LAUNCH


def _run(launches: list[Launch], device: torch.device) -> None:
    context: AbstractContextManager[object] = nullcontext()
    if IS_INTERPRETED:
        context = ieee_arithmetic()
    with context, on_device(device):
        for launch in launches:
            launch.run()


# --------------------------------------------------------------------------------------------------
# The launches of a call, in order; shapes alone decide about them


class Shapes(NamedTuple):
    """What decides about the launches of a call that reads a site."""

    n_rows: int
    width: int
    dtype: torch.dtype
    activation: str
    site: str
    has_ids: bool
    n_ids: int
    stride_gt: int
    stride_ut: int

    @classmethod
    def of(cls, call: SiteCall, n_ids: int) -> tuple[Shapes, Tensor, Tensor | None]:
        """And what is read as gate and up: the site up is the site gate of another tensor."""
        gate, up, site = call.gate, call.up, call.site
        if site == "up":
            assert up is not None, "the site needs it"
            gate, up, site = up, None, "gate"
        shapes = cls(
            *(gate.shape[0], gate.shape[1], gate.dtype, call.activation, site),
            *(call.ids is not None, n_ids, gate.stride(0), 0 if up is None else up.stride(0)),
        )
        return shapes, gate, up

    def constants(self, config: LaunchConfig) -> dict[str, int | bool]:
        return {
            "SITE": SITES.index(self.site),
            "ACTIVATION": CODES.index(self.activation),
            "PTX": config.is_nvidia,
        }

    def sizes(self, letter: str) -> dict[str, int]:
        return {
            "stride_gt": self.stride_gt,
            "stride_ut": self.stride_ut,
            "T": self.n_rows,
            "F": self.width,
            letter: self.n_ids,
        }


def plan_peaks(call: PeaksCall, config: LaunchConfig) -> list[Launch]:
    """The launches of a call of `peaks`; also allocates their scratch."""
    if 0 in call.gate.shape or not len(call.values):
        return []
    shapes, gate, up = Shapes.of(call, len(call.values))
    launches, span = [], None
    if call.ids is not None:
        span = torch.full((2, shapes.n_ids), -1, dtype=torch.int64, device=gate.device)
        launches.append(Launch(_span_form(shapes.n_rows, shapes.n_ids), (span, call.ids)))
    form = _peaks_form(shapes, call.first_row, config)
    return [*launches, Launch(form, (call.values, call.positions, span, gate, up, call.ids))]


def plan_histogram(call: HistogramCall, config: LaunchConfig) -> list[Launch]:
    """The launch of a call of `histogram`."""
    if 0 in call.gate.shape:
        return []
    shapes, gate, up = Shapes.of(call, len(call.counts))
    form = _histogram_form(shapes, call.counts.shape[2], config)
    return [Launch(form, (call.counts, call.exponent, call.first, gate, up, call.ids))]


def plan_merge(call: MergeCall, config: LaunchConfig) -> list[Launch]:
    """The launch of a call of `merge_peaks`."""
    if 0 in call.values.shape:
        return []
    best = call.best
    n_groups, width, k = best.value.shape
    form = _merge_form(n_groups, len(call.values), width, k, config)
    lists = (best.value, best.number, best.position)
    return [Launch(form, (*lists, call.values, call.positions, call.numbers, call.group_ids))]


@functools.lru_cache(N_KEPT)
def _span_form(n_rows: int, n_ids: int) -> Form:
    block = 1024
    sizes, grid = {"T": n_rows, "N": n_ids}, (triton.cdiv(n_rows, block),)
    return Form(_span_kernel, grid, ("span_ptr", "ids_ptr"), sizes, {"BLOCK": block}, 4)


@functools.lru_cache(N_KEPT)
def _peaks_form(shapes: Shapes, first_row: int, config: LaunchConfig) -> Form:
    block_f = config.block_f(shapes.dtype)
    return Form(
        kernels._peaks_kernel,
        (shapes.n_ids, triton.cdiv(shapes.width, block_f)),
        ("values_ptr", "positions_ptr", "span_ptr", "gate_ptr", "up_ptr", "segment_ids_ptr"),
        {**shapes.sizes("S"), "first_row": first_row},
        {**shapes.constants(config), "BLOCK_T": config.block_t, "BLOCK_F": block_f},
        config.num_warps,
    )


@functools.lru_cache(N_KEPT)
def _histogram_form(shapes: Shapes, n_bins: int, config: LaunchConfig) -> Form:
    block_f = config.block_f(shapes.dtype)
    return Form(
        kernels._histogram_kernel,
        (triton.cdiv(shapes.n_rows, config.tile_t), triton.cdiv(shapes.width, block_f)),
        ("counts_ptr", "exponent_ptr", "first_ptr", "gate_ptr", "up_ptr", "group_ids_ptr"),
        {**shapes.sizes("G"), "B": n_bins},
        {
            **shapes.constants(config),
            "TILE_T": config.tile_t,
            "BLOCK_T": config.block_t,
            "BLOCK_F": block_f,
        },
        config.num_warps,
    )


@functools.lru_cache(N_KEPT)
def _merge_form(n_groups: int, n_segments: int, width: int, k: int, config: LaunchConfig) -> Form:
    block_k = triton.next_power_of_2(k)
    block_f = config.places // block_k
    return Form(
        kernels._merge_kernel,
        (n_groups, triton.cdiv(width, block_f)),
        (
            *("best_value_ptr", "best_number_ptr", "best_position_ptr", "values_ptr"),
            *("positions_ptr", "numbers_ptr", "group_ids_ptr"),
        ),
        {"S": n_segments, "F": width},
        {"K": k, "BLOCK_K": block_k, "BLOCK_F": block_f},
        config.num_warps,
    )
