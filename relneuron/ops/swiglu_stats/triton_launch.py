"""The GPU backend of `swiglu_stats`: the launcher of its Triton kernels and the launch table.

`op.py` imports this file when a GPU tensor (or backend="triton") asks for it. The kernels
are in `ops/swiglu_stats/triton_kernels.py` (h and counts) and `ops/swiglu_stats/triton_sums.py`,
their arithmetic in `ops/swiglu_stats/triton_math.py`. `bench/offline` compiles what `plan`
returns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from relneuron.ops.swiglu_stats import reference
from relneuron.ops.swiglu_stats import triton_kernels as kernels
from relneuron.ops.swiglu_stats import triton_sums as sums
from relneuron.ops.swiglu_stats.groups import SITES
from relneuron.ops.swiglu_stats.reference import CODES, Call


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes; every program handles whole tiles, the last ones by masks."""

    # Tokens that one program walks; at most 256, so that float32 partial sums stay short.
    tile_t: int
    # Tokens of one step, the bytes of gate that it takes of each, and the warps for it.
    block_t: int
    block_bytes: int
    num_warps: int
    # Likewise for the second stage of the moments: tiles (or tokens) and columns of one step.
    moments_block_t: int = 4
    moments_block_f: int = 64
    moments_warps: int = 1
    # With partial sums: n stages have n - 1 steps' gate and up under way at a time.
    stages: int = 1
    # With partial sums, instead of all this where there are MIN_PROGRAMS of them.
    long: LaunchConfig | None = None

    def block_f(self, call: Call) -> int:
        """Columns of one step."""
        return self.block_bytes // call.gate.element_size()

    def with_partials(self, n_tokens: int, row_bytes: int) -> LaunchConfig:
        """What a call with partial sums takes, of rows of so many bytes of gate."""
        long = self.long
        if long is None:
            return self
        n_blocks = triton.cdiv(row_bytes, long.block_bytes)
        return long if triton.cdiv(n_tokens, long.tile_t) * n_blocks >= MIN_PROGRAMS else self


# Eight warps for nearly every multiprocessor of an H200.
MIN_PROGRAMS = 1024

# By compute capability (gfx942 has 9.4). Not measured on any GPU; the reasons are arithmetic on the
# compiled code (bench/offline, which predicts times). A thread takes one 16-byte load each of gate
# and up, both before it waits for one, so a program of 128 threads has 4 KiB in flight; 15 to 23
# KiB per multiprocessor hide the memory latency of an H200. 128 tokens per tile are 2,752 programs
# at T = 8192, F = 11008, 2.6 waves or more of an H200; what a run does once (flush) is then 7% of
# the instructions with counts.
#
# All statistics leave room for 8 to 13 warps, so the loads of three steps are under way at a time,
# as asynchronous copies. To flush them, four rows of a step are added up through shared memory, 16
# us of an H200 for each group more that a tile has: where tokens are many, a program is one warp
# and a step one row, so that each thread has its columns for itself, and groups may be mixed.
_LONG = LaunchConfig(128, 1, 512, 1, stages=4)
_NVIDIA = LaunchConfig(128, 4, 512, 4, stages=4, long=_LONG)
LAUNCH_TABLE: dict[tuple[int, int], LaunchConfig] = {
    # Of 65,536 registers h alone takes 32 per thread (16 programs), counts 56 (9, 36 KiB in
    # flight), all statistics of one site 153 (36 KiB), of four 254 (24 KiB).
    (8, 0): _NVIDIA,
    (9, 0): _NVIDIA,
    # Of four sites in one warp, sm_100 spills 16 bytes.
    (10, 0): LaunchConfig(128, 4, 512, 4, stages=4),
    # Wavefronts have 64 threads: two of them for the same 16 bytes per thread.
    (9, 4): LaunchConfig(128, 4, 512, 2, 16, 64, 2),
}
DEFAULT_LAUNCH = LAUNCH_TABLE[9, 0]
DEFAULT_HIP_LAUNCH = LAUNCH_TABLE[9, 4]
# The interpreter's cost is per operation, not per element.
INTERPRETER_LAUNCH = LaunchConfig(64, 64, 4096, 4, 64, 1024)

# With more groups than this the moments come from a second reading of gate and up: the partial sums
# are 16 G / tile_t bytes per element, 2 of them at G = 16, beside 6 for gate, up and h.
MAX_PARTIAL_GROUPS = 16

IS_INTERPRETED = not isinstance(kernels._swiglu_stats_kernel, triton.JITFunction)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `bench/offline` compiles it, `swiglu_stats_triton` runs it."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Tensor | int | None]
    constants: dict[str, Any]
    num_warps: int
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        self.kernel[self.grid](**self.args, **self.constants, **self.compiler_options())

    def compiler_options(self) -> dict[str, Any]:
        # No fused multiply-adds but those that are written: an exact operation rounds once.
        return {"num_warps": self.num_warps, "enable_fp_fusion": False, **self.options}


def swiglu_stats_triton(call: Call) -> None:
    """Launch the kernels for one checked call; nothing here waits for the device."""
    if IS_INTERPRETED:
        with reference.ieee_arithmetic():
            for launch in plan(call, INTERPRETER_LAUNCH, is_nvidia=False):
                launch.run()
    else:
        with torch.cuda.device(call.gate.device):
            config = _launch_config(call.gate.device)
            for launch in plan(call, config, is_nvidia=torch.version.hip is None):
                launch.run()


@functools.cache
def _launch_config(device: torch.device) -> LaunchConfig:
    default = DEFAULT_LAUNCH if torch.version.hip is None else DEFAULT_HIP_LAUNCH
    return LAUNCH_TABLE.get(torch.cuda.get_device_capability(device), default)


def plan(call: Call, config: LaunchConfig, *, is_nvidia: bool) -> list[Launch]:
    """The launches of one call, in order; also allocates their scratch.

    Shapes alone decide about them, so a captured CUDA graph can be replayed with other values.
    """
    n_tokens, width = call.gate.shape
    if n_tokens == 0:
        return []
    n_groups = 0 if call.tokens is None else call.tokens.shape[0]
    has_moments = call.sum is not None and width > 0
    has_partials = has_moments and n_groups <= MAX_PARTIAL_GROUPS
    if has_partials:
        config = config.with_partials(n_tokens, width * call.gate.element_size())
    block_f = config.block_f(call)
    n_tiles = triton.cdiv(n_tokens, config.tile_t)
    # One column of tiles also without columns: it counts the tokens.
    n_blocks = max(1, triton.cdiv(width, block_f))
    limits = _gate_limits(call)
    shared = {
        "ACTIVATION": CODES.index(call.activation),
        "EXACT": limits is None,
        "PTX": is_nvidia,
    }
    high_bits, low_bits = limits or (0, None)

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=call.gate.device)

    partial, n_rows = None, None
    if has_partials:
        shape = (n_tiles, len(call.sites), n_groups, 4, width)
        partial = empty(shape, torch.float32)
        n_rows = empty((n_tiles, n_groups), torch.int32).zero_()
    order = None
    if call.group_ids is not None:
        order = empty((n_tiles, n_blocks, config.tile_t), torch.int32)

    # The kernel always writes h.
    out = torch.empty_like(call.gate) if call.out is None else call.out
    rows = {f"{site.upper()}_ROW": call.sites.index(site) for site in call.sites}
    launches = [
        Launch(
            kernels._swiglu_stats_kernel,
            (n_tiles, n_blocks),
            {
                "h_ptr": out,
                "count_ptr": call.count,
                "tokens_ptr": call.tokens,
                "partial_ptr": partial,
                "n_rows_ptr": n_rows,
                "order_ptr": order,
                "gate_ptr": call.gate,
                "up_ptr": call.up,
                "group_ids_ptr": call.group_ids,
                "keep_ptr": None if call.keep is None else call.keep.view(torch.uint8),
                "condition_ids_ptr": call.condition_ids,
                "stride_ht": out.stride(0),
                "stride_gt": call.gate.stride(0),
                "stride_ut": call.up.stride(0),
                "stride_kc": 0 if call.keep is None else 4 * call.keep.shape[1],
                "T": n_tokens,
                "F": width,
                "G": n_groups,
                "threshold_bits": call.threshold_bits,
                "high_bits": high_bits,
                "low_bits": low_bits or 0,
            },
            {
                **{f"{site.upper()}_ROW": -1 for site in SITES},
                **rows,
                **shared,
                "HAS_LOW": low_bits is not None,
                "MOMENTS": has_partials,
                "EVEN_F": width > 0 and width % block_f == 0,
                "STAGES": config.stages if has_partials else 1,
                "TILE_T": config.tile_t,
                "BLOCK_T": config.block_t,
                "BLOCK_F": block_f,
            },
            config.num_warps,
            # Left alone, ptxas stops at 72 registers for sm_100 and spills the next.
            {"maxnreg": 96} if is_nvidia and call.activation == "gelu" and not has_partials else {},
        )
    ]
    if has_moments:
        launches += _plan_moments(call, config, shared, partial, n_rows)
    if call.responses and width > 0:
        launches += _plan_responses(call, config, shared)
    return launches


def _plan_moments(
    call: Call,
    config: LaunchConfig,
    shared: dict[str, Any],
    partial: Tensor | None,
    n_rows: Tensor | None,
) -> list[Launch]:
    assert call.tokens is not None and call.sum is not None and call.sum_sq is not None
    assert call.max is not None and call.n_nonfinite is not None
    n_tokens, width = call.gate.shape
    n_groups = call.tokens.shape[0]
    launches, span = [], None
    # Left alone, ptxas stops at 96 registers for sm_100 and spills the next.
    options = {"maxnreg": 144} if shared["PTX"] else {}
    if partial is None and call.group_ids is not None:
        launch, span = _plan_span(call.group_ids, n_groups)
        launches.append(launch)
    for index, site in enumerate(call.sites):
        launches.append(
            Launch(
                sums._moments_kernel,
                (n_groups, triton.cdiv(width, config.moments_block_f)),
                {
                    "sum_ptr": call.sum[index],
                    "sum_sq_ptr": call.sum_sq[index],
                    "max_ptr": call.max[index],
                    "n_nonfinite_ptr": call.n_nonfinite[index],
                    "partial_ptr": None if partial is None else partial[:, index],
                    "n_rows_ptr": n_rows,
                    "span_ptr": span,
                    "gate_ptr": call.gate,
                    "up_ptr": call.up,
                    "group_ids_ptr": call.group_ids,
                    "stride_pn": 0 if partial is None else partial.stride(0),
                    "stride_gt": call.gate.stride(0),
                    "stride_ut": call.up.stride(0),
                    "T": n_tokens,
                    "F": width,
                    "G": n_groups,
                    "n_tiles": 0 if partial is None else partial.shape[0],
                },
                {
                    **shared,
                    "SITE": SITES.index(site),
                    "BLOCK_T": config.moments_block_t,
                    "BLOCK_F": config.moments_block_f,
                },
                config.moments_warps,
                options,
            )
        )
    return launches


def _plan_span(ids: Tensor, n: int) -> tuple[Launch, Tensor]:
    span = torch.full((2, n), -1, dtype=torch.int64, device=ids.device)
    n_tokens, block = ids.shape[0], 1024
    args: dict[str, Tensor | int | None] = {"span_ptr": span, "ids_ptr": ids, "T": n_tokens, "N": n}
    grid = (triton.cdiv(n_tokens, block),)
    return Launch(sums._span_kernel, grid, args, {"BLOCK": block}, num_warps=4), span


def _plan_responses(call: Call, config: LaunchConfig, shared: dict[str, Any]) -> list[Launch]:
    assert call.prompt_ids is not None, "responses come with prompt ids"
    n_tokens, width = call.gate.shape
    block_f = config.block_f(call)
    n_prompts = next(iter(call.responses.values())).shape[0]
    launch, span = _plan_span(call.prompt_ids, n_prompts)
    pointers = {f"{site}_response_ptr": call.responses.get(site) for site in SITES}
    strides = {
        f"stride_{site[0]}r": call.responses[site].stride(0) if site in call.responses else 0
        for site in SITES
    }
    args: dict[str, Tensor | int | None] = {
        **pointers,
        "span_ptr": span,
        "gate_ptr": call.gate,
        "up_ptr": call.up,
        "prompt_ids_ptr": call.prompt_ids,
        **strides,
        "stride_gt": call.gate.stride(0),
        "stride_ut": call.up.stride(0),
        "T": n_tokens,
        "F": width,
        "N": n_prompts,
    }
    constants = {**shared, "BLOCK_T": config.block_t, "BLOCK_F": block_f}
    grid = (n_prompts, triton.cdiv(width, block_f))
    return [
        launch,
        Launch(sums._responses_kernel, grid, args, constants, config.num_warps),
    ]


# --------------------------------------------------------------------------------------------------
# Which gates are hits at the site act


def _gate_limits(call: Call) -> tuple[int, int | None] | None:
    """(high, low) as float32 bits when the kernel may compute act in the fast form, else None.

    The exact form is needed where its bits are recorded: in float32, and for the site product. For
    the site act gate is enough: it tells hits and the maximum. relu needs no fast form.
    """
    if call.gate.dtype == torch.float32 or call.activation == "relu" or "product" in call.sites:
        return None
    if "act" not in call.sites:
        return 0, None
    return _limits_of(call.activation, call.gate.dtype, call.threshold_bits)


@functools.cache
def _limits_of(
    activation: str, dtype: torch.dtype, threshold_bits: int
) -> tuple[int, int | None] | None:
    """The gates of a 16-bit dtype with act > threshold are gate > high, or -inf < gate < low.

    act falls, then rises with gate. All 65,536 gates are tried, also for what `_moments_kernel`
    uses: that the largest act of any set of finite gates is at its largest or its smallest.
    """
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cpu").to(torch.int16)
    with reference.ieee_arithmetic():
        gate = bits.view(dtype).float()
        gate = gate[~gate.isnan()].sort().values
        act = reference._activation(gate, activation).to(dtype).float()
        threshold = torch.tensor(threshold_bits, dtype=torch.int32, device="cpu")
        is_hit = act > threshold.view(torch.float32)
        misses = gate[~is_hit]
        if len(misses) == 0:
            return None
        high = misses.max()
        is_left = is_hit & (gate < high)
        low = misses[misses > -torch.inf].min() if bool(is_left.any()) else None
        predicted = gate > high
        if low is not None:
            predicted |= (gate < low) & (gate > -torch.inf)
        inside = act[gate.isfinite()]
        turn = int(inside.argmin())
        is_valley = bool((inside[: turn + 1].diff() <= 0).all() & (inside[turn:].diff() >= 0).all())
    if not is_valley or not torch.equal(predicted, is_hit):
        return None

    def float_bits(x: Tensor) -> int:
        return int(x.view(torch.int32))

    return float_bits(high), None if low is None else float_bits(low)
