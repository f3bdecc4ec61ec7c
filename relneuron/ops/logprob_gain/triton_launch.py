"""The GPU backend of `logprob_gain`: the launcher of its Triton kernels and the launch table.

ops/logprob_gain/op.py calls `gain_sums` (some pairs of neuron and sentence), `gain_sums_dense` (all
pairs) and `moment_sums`. What a neuron writes to the logits, b = values @ unembed.T, is computed by
torch, for as many neurons at a time as the scratch holds (`ops/logprob_gain/triton_tiles.py`); a
kernel of `ops/logprob_gain/triton_kernels.py` reads that tile for all sentences. bench/offline
compiles what `plan_dense`, `plan_list` and `plan_moments` return.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from relneuron.ops.launches import N_KEPT, Form, Launch, on_device
from relneuron.ops.logprob_gain import triton_kernels as kernels
from relneuron.ops.logprob_gain import triton_tiles as tiles

IS_INTERPRETED = not isinstance(kernels._gain_kernel, triton.JITFunction)


@dataclass(frozen=True)
class LaunchConfig:
    """Block sizes; `span` is a multiple of the blocks, `block` one of `moments_block`.

    Not measured on any GPU; the reasons are the compiled code (bench/offline). Eight neurons and
    eight sentences share what they load: one byte of b and p per pair and token, against which the
    8 to 11 instructions of each are long enough. A warp per sentence leaves 32 pairs of a token to
    a thread, all their sums in 110 to 170 registers; with tilt there is a third row to load, and
    four sentences are what fits. Without many sentences the blocks shrink with them.
    """

    is_nvidia: bool
    block: int  # tokens of a step: four for each thread of a warp, 16 bytes
    # The moments: 64 x 64 pairs in tensor cores, from two blocks of float32 in shared memory.
    moments_block: int
    precision: str
    neurons: int = 8
    sentences: int = 8
    moments_neurons: int = 64
    moments_sentences: int = 64
    span: int = 512


# By compute capability (gfx942 has 9.4). Three products of tf32 are float32; sm_80 keeps them in
# registers, where half as many tokens fit. AMD's matrix cores multiply float32.
LAUNCH_TABLE: dict[tuple[int, int], LaunchConfig] = {
    (8, 0): LaunchConfig(True, 128, 16, "tf32x3"),
    (9, 0): LaunchConfig(True, 128, 32, "tf32x3"),
    (10, 0): LaunchConfig(True, 128, 32, "tf32x3"),
    (9, 4): LaunchConfig(False, 256, 32, "ieee"),
}
DEFAULT_LAUNCH = LAUNCH_TABLE[8, 0]
DEFAULT_HIP_LAUNCH = LAUNCH_TABLE[9, 4]
# Small: tests cross blocks and spans.
INTERPRETER_LAUNCH = LaunchConfig(False, 16, 8, "ieee", 4, 2, 4, 2, 32)

LIST_SENTENCES = 4  # pairs of a neuron that a program of the list kernel takes


# --------------------------------------------------------------------------------------------------
# What the op calls


def gain_sums(
    values: Tensor,
    unembed: Tensor,
    p: Tensor,
    row_start: Tensor,
    sentence: Tensor,
    t: Tensor,
    tilt: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of the pairs i of neuron and sentence, and the largest |b| of every neuron.

    b = values @ unembed.T; sums[i] = sum_v p[sentence[i], v] expm1(t[i] b[k, v] + tilt[i] z[., v])
    for row_start[k] <= i < row_start[k + 1].

    Args:
        values: (K, D) float32, bfloat16 or float16, any strides. unembed: (V, D) likewise.
        p: (E, V) float32 probabilities. z: (E, V) float32, given with tilt.
        row_start: (K + 1,) int64. sentence: (n,) int32. t, tilt: (n,) float32.

    Returns:
        sums (n,) float64, right to 1e-6 of itself if all terms have one sign, while |y| <= 60;
        largest (K,) float32.
    """
    starts = row_start.cpu()  # waits for the device: sizes of grids are numbers
    shape = (len(values), len(p))
    if _are_all_pairs(starts, sentence, shape):
        tilts = None if tilt is None else tilt.reshape(shape).T
        dense, largest = gain_sums_dense(values, unembed, p, t.reshape(shape).T, tilts, z)
        return dense.T.reshape(-1), largest
    job = Job.of(values, unembed, p, z)
    sums = p.new_zeros(len(sentence), dtype=torch.float64)
    most = int(starts.diff().max()) if len(values) else 0
    shared = min(LIST_SENTENCES, triton.next_power_of_2(max(1, most)))
    with job.on_device():
        for rows, tile, largest in job.each_tile():
            row, place = _list_programs(starts[rows.start : rows.stop + 1], shared)
            if len(row):
                device = values.device
                end = row_start[rows.start + 1 : rows.stop + 1]
                pairs = Pairs(row.to(device), place.to(device), end, sentence, t, tilt, shared)
                plan_list(sums, tile, largest, job.tokens, pairs, job.config).run()
    return sums, job.largest


def gain_sums_dense(
    values: Tensor,
    unembed: Tensor,
    p: Tensor,
    t: Tensor,
    tilt: Tensor | None = None,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gain_sums` of all pairs: t and tilt (E, K) float32; sums (E, K) float64, largest (K,)."""
    job = Job.of(values, unembed, p, z)
    sums = p.new_zeros(t.shape, dtype=torch.float64)
    t, tilt = t.contiguous(), None if tilt is None else tilt.contiguous()
    with job.on_device():
        for rows, tile, largest in job.each_tile():
            factors = t[:, rows], None if tilt is None else tilt[:, rows]
            plan_dense(sums[:, rows], tile, largest, job.tokens, *factors, job.config).run()
    return sums, job.largest


def moment_sums(values: Tensor, unembed: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Second and third moments (K, E) float64, sum_v p[e, v] b[k, v]^n, and largest (K,).

    Right to 1e-6 of sum_v p |b|^n; the arguments are those of `gain_sums`.
    """
    job = Job.of(values, unembed, p, None)
    moments = p.new_zeros((2, values.shape[0], p.shape[0]), dtype=torch.float64)
    n_spans = triton.cdiv(job.tokens.width, job.config.span)
    with job.on_device():
        for rows, tile, _ in job.each_tile():
            step = max(1, tiles.SCRATCH_BYTES // (8 * n_spans * tile.shape[0]))
            for start in range(0, p.shape[0], step):
                chosen = slice(start, min(start + step, p.shape[0]))
                shape = (2, n_spans, tile.shape[0], chosen.stop - start)
                partial = tile.new_empty(shape)
                plan_moments(partial, tile, job.tokens.p[chosen], job.config).run()
                # In the order of the spans, whatever ran first.
                moments[:, rows, chosen] = partial.sum(1, dtype=torch.float64)
    return moments[0], moments[1], job.largest


# --------------------------------------------------------------------------------------------------
# The launches


class Tokens(NamedTuple):
    """What the sentences have of each token: (E, width) float32, past the end zeros."""

    p: Tensor
    z: Tensor | None
    z_largest: Tensor | None  # (E,): of |z|

    @property
    def width(self) -> int:
        return self.p.shape[1]


# What kernels call them.
TOKENS = ("p_ptr", "z_ptr", "z_largest_ptr")


class Pairs(NamedTuple):
    """The pairs of some neurons, see `_gain_list_kernel`."""

    row: Tensor
    place: Tensor
    end: Tensor
    sentence: Tensor
    t: Tensor
    tilt: Tensor | None
    shared: int  # pairs of a program


def _are_all_pairs(starts: Tensor, sentence: Tensor, shape: tuple[int, int]) -> bool:
    """Whether every neuron (of K) has every sentence (of E), in order."""
    if not torch.equal(starts, torch.arange(shape[0] + 1, device="cpu") * shape[1]):
        return False
    order = torch.arange(shape[1], device=sentence.device)
    return bool((sentence.reshape(shape) == order).all())


def _list_programs(starts: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Of every program the neuron, and its first pair: `shared` of them each, from row starts."""
    n_programs = (starts.diff() + shared - 1) // shared
    row = torch.repeat_interleave(n_programs)
    number = torch.arange(len(row), device="cpu") - (n_programs.cumsum(0) - n_programs)[row]
    return row, starts[row] + shared * number


def plan_dense(
    sums: Tensor,
    tile: Tensor,
    largest: Tensor,
    tokens: Tokens,
    t: Tensor,
    tilt: Tensor | None,
    config: LaunchConfig,
) -> Launch:
    """`_gain_kernel` for the neurons of a tile."""
    strides = (sums.stride(0), t.stride(0))
    form = _dense_form(*t.shape, *strides, tokens.width, tilt is not None, config)
    return Launch(form, (sums, tile, largest, *tokens, t, tilt))


@functools.lru_cache(N_KEPT)
def _dense_form(
    n_sentences: int,
    n_neurons: int,
    stride_se: int,
    stride_te: int,
    width: int,
    has_tilt: bool,
    config: LaunchConfig,
) -> Form:
    most = max(1, config.sentences // 2) if has_tilt else config.sentences
    shared = min(most, triton.next_power_of_2(n_sentences))
    return Form(
        kernels._gain_kernel,
        (triton.cdiv(n_neurons, config.neurons) * triton.cdiv(n_sentences, shared),),
        ("sums_ptr", "b_ptr", "largest_ptr", *TOKENS, "t_ptr", "tilt_ptr"),
        {
            "stride_se": stride_se,
            "stride_te": stride_te,
            "N": n_neurons,
            "E": n_sentences,
            "WIDTH": width,
        },
        {"NEURONS": config.neurons, "SENTENCES": shared, **_constants(config)},
        num_warps=shared,
    )


def plan_list(
    sums: Tensor,
    tile: Tensor,
    largest: Tensor,
    tokens: Tokens,
    pairs: Pairs,
    config: LaunchConfig,
) -> Launch:
    """`_gain_list_kernel` for the pairs of a tile's neurons."""
    form = _list_form(len(pairs.row), pairs.shared, tokens.width, config)
    return Launch(form, (sums, tile, largest, *tokens, *pairs[:-1]))


@functools.lru_cache(N_KEPT)
def _list_form(n_programs: int, shared: int, width: int, config: LaunchConfig) -> Form:
    return Form(
        kernels._gain_list_kernel,
        (n_programs,),
        (
            *("sums_ptr", "b_ptr", "largest_ptr", *TOKENS),
            *(f"{name}_ptr" for name in Pairs._fields[:-1]),
        ),
        {"WIDTH": width},
        {"SENTENCES": shared, **_constants(config)},
        num_warps=1,
    )


def plan_moments(partial: Tensor, tile: Tensor, p: Tensor, config: LaunchConfig) -> Launch:
    """`_gain_moments_kernel` for a tile, into partial (2, spans, neurons, sentences) float32."""
    form = _moments_form(*partial.shape[1:], p.shape[1], config)
    return Launch(form, (partial[0], partial[1], tile, p))


@functools.lru_cache(N_KEPT)
def _moments_form(
    n_spans: int, n_neurons: int, n_sentences: int, width: int, config: LaunchConfig
) -> Form:
    # With fewer than 32, a thread would load less than 16 bytes.
    shared = min(config.moments_sentences, max(32, triton.next_power_of_2(n_sentences)))
    blocks = triton.cdiv(n_neurons, config.moments_neurons) * triton.cdiv(n_sentences, shared)
    return Form(
        kernels._gain_moments_kernel,
        (blocks * n_spans,),
        ("second_ptr", "third_ptr", "b_ptr", "p_ptr"),
        {"N": n_neurons, "E": n_sentences, "WIDTH": width, "unit": 1},
        {
            "NEURONS": config.moments_neurons,
            "SENTENCES": shared,
            "SPAN": config.span,
            "BLOCK": config.moments_block,
            "PRECISION": config.precision,
        },
        num_warps=4,
    )


def _constants(config: LaunchConfig) -> dict[str, int | bool]:
    return {"SPAN": config.span, "BLOCK": config.block, "PTX": config.is_nvidia}


# --------------------------------------------------------------------------------------------------
# One call


@dataclass(frozen=True)
class Job:
    """The checked arguments of a call, as the kernels read them."""

    config: LaunchConfig
    values: Tensor
    unembed: Tensor
    tokens: Tokens
    largest: Tensor  # (K,) float32, known for the tiles that were computed

    @classmethod
    def of(cls, values: Tensor, unembed: Tensor, p: Tensor, z: Tensor | None) -> Job:
        config = INTERPRETER_LAUNCH if IS_INTERPRETED else _launch_config(values.device)
        z = None if z is None else tiles.padded(z, config.block)
        z_largest = None if z is None else z.abs().amax(1)
        tokens = Tokens(tiles.padded(p, config.block), z, z_largest)
        return cls(config, values, unembed, tokens, p.new_zeros(len(values)))

    def on_device(self) -> AbstractContextManager[object]:
        return on_device(self.values.device)

    def each_tile(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(neurons, b of them (n, width), the largest |b| of each).

        The largest is inf, so that no bound holds, where a sample of b is not right.
        """
        for rows, tile in tiles.tiles(self.values, self.unembed, self.tokens.width):
            largest = self.largest[rows]
            torch.linalg.vector_norm(tile, float("inf"), dim=1, out=largest)
            is_right = tiles.sample_is_right(self.values[rows], self.unembed, tile)
            largest.masked_fill_(~is_right, float("inf"))
            if self.tokens.p.shape[0]:
                yield rows, tile, largest


@functools.cache
def _launch_config(device: torch.device) -> LaunchConfig:
    if torch.version.hip is not None:
        # gfx90a has the number of an H100.
        return DEFAULT_HIP_LAUNCH
    return LAUNCH_TABLE.get(torch.cuda.get_device_capability(device), DEFAULT_LAUNCH)
