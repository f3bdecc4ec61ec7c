"""The GPU backend of `swiglu_stats`: the launcher of its Triton kernels and the launch table.

`op.py` imports this file when a GPU tensor (or backend="triton") asks for it. The kernels
are in `ops/swiglu_stats/triton_kernels.py` (h and counts) and `ops/swiglu_stats/triton_sums.py`,
their arithmetic in `ops/swiglu_stats/triton_math.py`. `bench/offline` compiles what `plan`
returns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor

from relneuron.ops.launches import N_KEPT, Form, Launch, on_device
from relneuron.ops.swiglu_stats import reference
from relneuron.ops.swiglu_stats import triton_kernels as kernels
from relneuron.ops.swiglu_stats import triton_sums as sums
from relneuron.ops.swiglu_stats.groups import SITES
from relneuron.ops.swiglu_stats.reference import CODES, DIFFERENCE, Call
from relneuron.ops.swiglu_stats.triton_limits import _limits_of


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
    # With partial sums, and without up, where a step is one load: n stages have n - 1 steps' gate
    # and up under way at a time.
    stages: int = 1
    # With partial sums, instead of all this where there are MIN_PROGRAMS of them.
    long: LaunchConfig | None = None

    def block_f(self, dtype: torch.dtype) -> int:
        """Columns of one step."""
        return self.block_bytes // dtype.itemsize

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


def swiglu_stats_triton(call: Call) -> None:
    """Launch the kernels for one checked call; nothing here waits for the device."""
    if IS_INTERPRETED:
        with reference.ieee_arithmetic():
            for launch in plan(call, INTERPRETER_LAUNCH, is_nvidia=False):
                launch.run()
    else:
        with on_device(call.gate.device):
            config = _launch_config(call.gate.device)
            for launch in plan(call, config, is_nvidia=torch.version.hip is None):
                launch.run()


@functools.cache
def _launch_config(device: torch.device) -> LaunchConfig:
    if torch.version.hip is not None:
        # gfx90a has the number of an H100.
        return DEFAULT_HIP_LAUNCH
    return LAUNCH_TABLE.get(torch.cuda.get_device_capability(device), DEFAULT_LAUNCH)


def plan(call: Call, config: LaunchConfig, *, is_nvidia: bool) -> list[Launch]:
    """The launches of one call, in order; also allocates their scratch.

    Shapes alone decide about them, so a captured CUDA graph can be replayed with other values.
    """
    if call.gate.shape[0] == 0:
        return []
    # The kernel always writes h, if there is one.
    out = call.out
    if out is None and call.activation != DIFFERENCE:
        out = torch.empty_like(call.gate)
    forms = _kept_forms(call, out, config, is_nvidia)

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=call.gate.device)

    partial = None if forms.partial is None else empty(forms.partial, torch.float32)
    n_rows = None if forms.n_rows is None else empty(forms.n_rows, torch.int32).zero_()
    order = None if forms.order is None else empty(forms.order, torch.int32)
    keep = None if call.keep is None else call.keep.view(torch.uint8)
    gate, up, ids = call.gate, call.up, call.group_ids
    tensors = (out, call.count, call.tokens, partial, n_rows, order, gate, up, ids)
    launches = [Launch(forms.main, (*tensors, keep, call.condition_ids))]
    if forms.moments:
        assert call.sum is not None and call.sum_sq is not None
        assert call.max is not None and call.n_nonfinite is not None
        span = None
        if forms.group_span is not None:
            assert ids is not None, "without ids all tokens are in one group"
            launch, span = _plan_span(forms.group_span, ids)
            launches.append(launch)
        for index, form in enumerate(forms.moments):
            own, part = (call.sum, call.sum_sq, call.max, call.n_nonfinite), partial
            if len(forms.moments) > 1:  # an index takes as long as a launch
                own = (own[0][index], own[1][index], own[2][index], own[3][index])
                part = None if partial is None else partial[:, index]
            launches.append(Launch(form, (*own, part, n_rows, span, gate, up, ids)))
    if forms.responses is not None and forms.prompt_span is not None:
        assert call.prompt_ids is not None, "responses come with prompt ids"
        launch, span = _plan_span(forms.prompt_span, call.prompt_ids)
        pointers = (*map(call.responses.get, SITES), span, gate, up, call.prompt_ids)
        launches += [launch, Launch(forms.responses, pointers)]
    return launches


def _plan_span(form: Form, ids: Tensor) -> tuple[Launch, Tensor]:
    span = torch.full((2, form.sizes["N"]), -1, dtype=torch.int64, device=ids.device)
    return Launch(form, (span, ids)), span


# --------------------------------------------------------------------------------------------------
# What shapes decide: made once for all calls of the same ones


class Shapes(NamedTuple):
    """All that decides about the launches of a call, but for where its tensors lie."""

    n_tokens: int
    width: int
    dtype: torch.dtype
    activation: str
    is_gated: bool
    sites: tuple[str, ...]
    threshold_bits: int
    n_groups: int  # 0: no statistics
    has_moments: bool
    has_group_ids: bool
    stride_ht: int
    stride_gt: int
    stride_ut: int
    stride_kc: int  # 0: no masks
    n_prompts: int
    strides_r: tuple[int | None, ...]  # of the responses of each site, None if it has none

    @classmethod
    def of(cls, call: Call, out: Tensor | None) -> Shapes:
        gate, responses = call.gate, call.responses
        return cls(
            gate.shape[0],
            gate.shape[1],
            gate.dtype,
            call.activation,
            call.up is not None,
            call.sites,
            call.threshold_bits,
            0 if call.tokens is None else call.tokens.shape[0],
            call.sum is not None,
            call.group_ids is not None,
            0 if out is None else out.stride(0),
            gate.stride(0),
            0 if call.up is None else call.up.stride(0),
            0 if call.keep is None else 4 * call.keep.shape[1],
            next(iter(responses.values())).shape[0] if responses else 0,
            tuple([responses[s].stride(0) if s in responses else None for s in SITES])
            if responses
            else (),
        )


def _kept_forms(call: Call, out: Tensor | None, config: LaunchConfig, is_nvidia: bool) -> Forms:
    """`_forms`, which of a known call are at hand."""
    known = call.known
    if known is not None and known.kept is not None:
        forms, made_for, made_for_nvidia = known.kept
        if made_for is config and made_for_nvidia == is_nvidia:
            return cast(Forms, forms)
    forms = _forms(Shapes.of(call, out), config, is_nvidia)
    if known is not None:
        known.kept = forms, config, is_nvidia
    return forms


class Forms(NamedTuple):
    """The launches of a call without their tensors, and the shapes of its scratch."""

    main: Form
    partial: tuple[int, ...] | None
    n_rows: tuple[int, ...] | None
    order: tuple[int, ...] | None
    group_span: Form | None
    moments: tuple[Form, ...]  # one a site
    prompt_span: Form | None
    responses: Form | None


@functools.lru_cache(N_KEPT)
def _forms(shapes: Shapes, config: LaunchConfig, is_nvidia: bool) -> Forms:
    n_tokens, width, n_groups = shapes.n_tokens, shapes.width, shapes.n_groups
    has_moments = shapes.has_moments and width > 0
    has_partials = has_moments and n_groups <= MAX_PARTIAL_GROUPS
    if has_partials:
        config = config.with_partials(n_tokens, width * shapes.dtype.itemsize)
    block_f = config.block_f(shapes.dtype)
    n_tiles = triton.cdiv(n_tokens, config.tile_t)
    # One column of tiles also without columns: it counts the tokens.
    n_blocks = max(1, triton.cdiv(width, block_f))
    limits = _gate_limits(shapes)
    shared = {
        "ACTIVATION": CODES.index(shapes.activation),
        "EXACT": limits is None,
        "PTX": is_nvidia,
    }
    high_bits, low_bits = limits or (0, None)
    rows = {f"{site.upper()}_ROW": -1 for site in SITES}
    rows |= {f"{site.upper()}_ROW": shapes.sites.index(site) for site in shapes.sites}
    main = Form(
        kernels._swiglu_stats_kernel,
        (n_tiles, n_blocks),
        (
            *("h_ptr", "count_ptr", "tokens_ptr", "partial_ptr", "n_rows_ptr", "order_ptr"),
            *("gate_ptr", "up_ptr", "group_ids_ptr", "keep_ptr", "condition_ids_ptr"),
        ),
        {
            "stride_ht": shapes.stride_ht,
            "stride_gt": shapes.stride_gt,
            "stride_ut": shapes.stride_ut,
            "stride_kc": shapes.stride_kc,
            "T": n_tokens,
            "F": width,
            "G": n_groups,
            "threshold_bits": shapes.threshold_bits,
            "high_bits": high_bits,
            "low_bits": low_bits or 0,
        },
        {
            **rows,
            **{name: shared[name] for name in ("ACTIVATION", "EXACT")},
            "HAS_LOW": low_bits is not None,
            "MOMENTS": has_partials,
            "EVEN_F": width > 0 and width % block_f == 0,
            "PTX": is_nvidia,
            "STAGES": config.stages if has_partials or not shapes.is_gated else 1,
            "TILE_T": config.tile_t,
            "BLOCK_T": config.block_t,
            "BLOCK_F": block_f,
        },
        config.num_warps,
        # Left alone, ptxas stops at 72 registers for sm_100 and spills the next.
        {"maxnreg": 96} if is_nvidia and shapes.activation == "gelu" and not has_partials else {},
    )
    has_ids = shapes.has_group_ids
    has_group_span = has_moments and not has_partials and has_ids
    has_responses = bool(shapes.strides_r) and width > 0
    return Forms(
        main,
        (n_tiles, len(shapes.sites), n_groups, 4, width) if has_partials else None,
        (n_tiles, n_groups) if has_partials else None,
        (n_tiles, n_blocks, config.tile_t) if has_ids else None,
        _span_form(n_tokens, n_groups) if has_group_span else None,
        _moments_forms(shapes, config, shared, n_tiles if has_partials else 0)
        if has_moments
        else (),
        _span_form(n_tokens, shapes.n_prompts) if has_responses else None,
        _responses_form(shapes, config, shared) if has_responses else None,
    )


def _span_form(n_tokens: int, n: int) -> Form:
    block = 1024
    sizes, grid = {"T": n_tokens, "N": n}, (triton.cdiv(n_tokens, block),)
    return Form(sums._span_kernel, grid, ("span_ptr", "ids_ptr"), sizes, {"BLOCK": block}, 4)


def _moments_forms(
    shapes: Shapes, config: LaunchConfig, shared: dict[str, Any], n_tiles: int
) -> tuple[Form, ...]:
    """`n_tiles` have partial sums, 0 if the rows are read again."""
    width, n_groups, n_sites = shapes.width, shapes.n_groups, len(shapes.sites)
    return tuple(
        Form(
            sums._moments_kernel,
            (n_groups, triton.cdiv(width, config.moments_block_f)),
            (
                *("sum_ptr", "sum_sq_ptr", "max_ptr", "n_nonfinite_ptr", "partial_ptr"),
                *("n_rows_ptr", "span_ptr", "gate_ptr", "up_ptr", "group_ids_ptr"),
            ),
            {
                "stride_pn": n_sites * n_groups * 4 * width if n_tiles else 0,
                "stride_gt": shapes.stride_gt,
                "stride_ut": shapes.stride_ut,
                "T": shapes.n_tokens,
                "F": width,
                "G": n_groups,
                "n_tiles": n_tiles,
            },
            {
                "SITE": SITES.index(site),
                **shared,
                "BLOCK_T": config.moments_block_t,
                "BLOCK_F": config.moments_block_f,
            },
            config.moments_warps,
            # Left alone, ptxas stops at 96 registers for sm_100 and spills the next.
            {"maxnreg": 144} if shared["PTX"] else {},
        )
        for site in shapes.sites
    )


def _responses_form(shapes: Shapes, config: LaunchConfig, shared: dict[str, Any]) -> Form:
    block_f = config.block_f(shapes.dtype)
    strides = zip(SITES, shapes.strides_r, strict=True)
    return Form(
        sums._responses_kernel,
        (shapes.n_prompts, triton.cdiv(shapes.width, block_f)),
        (
            *(f"{site}_response_ptr" for site in SITES),
            *("span_ptr", "gate_ptr", "up_ptr", "prompt_ids_ptr"),
        ),
        {
            **{f"stride_{site[0]}r": stride or 0 for site, stride in strides},
            "stride_gt": shapes.stride_gt,
            "stride_ut": shapes.stride_ut,
            "T": shapes.n_tokens,
            "F": shapes.width,
            "N": shapes.n_prompts,
        },
        {**shared, "BLOCK_T": config.block_t, "BLOCK_F": block_f},
        config.num_warps,
    )


def _gate_limits(shapes: Shapes) -> tuple[int, int | None] | None:
    """(high, low) as float32 bits when the kernel may compute act in the fast form, else None.

    The exact form is needed where its bits are recorded: in float32, and for the site product. For
    the site act gate is enough: it tells hits and the maximum. relu, relu2 and a difference need no
    fast form.
    """
    is_exact = shapes.dtype == torch.float32 or shapes.activation in ("relu", "relu2", DIFFERENCE)
    if is_exact or "product" in shapes.sites:
        return None
    if "act" not in shapes.sites:
        return 0, None
    return _limits_of(shapes.activation, shapes.dtype, shapes.threshold_bits)
