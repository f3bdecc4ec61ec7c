"""The GPU backend of `average_precision`: two Triton kernels and their launcher.

`_sort_kernel` sorts each column once, or torch.sort does; `_sum_kernel` takes the relations' sums.
"""

# What triton.jit compiles is not typed Python.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from relneuron.ops.average_precision.op import from_sums, reciprocals
from relneuron.ops.launches import N_KEPT, Form, Launch, on_device

# --------------------------------------------------------------------------------------------------
# Kernels. Rows are in ascending order, so what lies before a tie group is known when it begins, and
# the counts of the rows >= it are the totals less that. Two counts, N and TP, travel in one integer
# of two halves: one sum adds both, and as neither ever falls, one maximum finds the latest of both.


@triton.jit(do_not_specialize=["N"])
def _sort_kernel(
    order_ptr,  # (columns, WIDTH) int32: rows in ascending order of their values, ~row where a
    # value is larger than the one before
    bad_ptr,  # (1,) int32: becomes 1 if a value is not finite
    values_ptr,  # (N, columns): the bits of the values as integers
    stride_vn,
    stride_vm,
    N,
    WIDTH,
    INFINITY: tl.constexpr,  # its bits
    BITS: tl.constexpr,  # of a value: 16 or 32
    BLOCK: tl.constexpr,  # >= WIDTH >= N
):
    """Sort one column, as integers of the value's key above the row's number."""
    LOWEST: tl.constexpr = -(2 ** (BITS - 1))
    # int64, so that the products with strides cannot overflow.
    column = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    is_row = place < N
    cells = values_ptr + column * stride_vm + place.to(tl.int64) * stride_vn
    bits = tl.load(cells, mask=is_row, other=0).to(tl.int32)
    # All that store here store the same.
    is_bad = (bits & (-1 - LOWEST)) >= INFINITY
    tl.store(bad_ptr + tl.zeros_like(place), 1, mask=is_bad)
    # Sign and magnitude become an integer that compares as the value does; -0 becomes +0. What is
    # past the end comes last: its key is larger than that of infinity.
    key = tl.where(bits < 0, LOWEST - bits, bits)
    key = tl.where(is_row, key, -1 - LOWEST)
    if BITS == 32:
        key = key.to(tl.int64)
    pair = tl.sort((key << BITS) | place)
    row = (pair & (-1 - 2 * LOWEST)).to(tl.int32)
    key = (pair >> BITS).to(tl.int32)
    previous = tl.gather(key, tl.maximum(place - 1, 0), 0)
    order = tl.where(key == previous, row, ~row)
    tl.store(order_ptr + column * WIDTH + place, order, mask=place < WIDTH)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["M", "R", "first"])
def _sum_kernel(
    high_ptr,  # (R, M) int64
    low_ptr,  # (R, M) int64
    order_ptr,  # (columns, WIDTH) int32, see `_sort_kernel`
    own_ptr,  # (-, WIDTH) int32, what each row counts: see `Counts`
    totals_ptr,  # (R,) int32 or int64: the counts of all rows
    table_ptr,  # (N + 1,) int64: the reciprocals
    WIDTH,
    M,
    R,
    first,  # the column of high and low that order begins with
    WEIGHTED: tl.constexpr,
    HALF: tl.constexpr,  # bits of a count
    RELATIONS: tl.constexpr,
    BLOCK: tl.constexpr,  # divides WIDTH
):
    """S of the spec for one column and RELATIONS relations, as sums of its high and low parts."""
    MASK: tl.constexpr = 2**HALF - 1
    n_programs = tl.cdiv(R, RELATIONS)  # for a column
    column = (tl.program_id(0) // n_programs).to(tl.int64)
    begin = tl.program_id(0) % n_programs * RELATIONS
    relation = begin + tl.arange(0, RELATIONS)
    is_relation = relation < R
    total = tl.load(totals_ptr + relation, mask=is_relation, other=0)[:, None]
    order_ptr += column * WIDTH
    shift = (relation % 16)[:, None]
    if WEIGHTED:
        own_ptr += begin.to(tl.int64) * WIDTH
    else:
        own_ptr += (begin // 16).to(tl.int64) * WIDTH

    seen = tl.zeros([RELATIONS, 1], total.dtype)  # counts of the rows before this block
    seen_at_start = seen  # and of those before its first row's tie group
    high = tl.zeros([RELATIONS], tl.int64)
    low = tl.zeros([RELATIONS], tl.int64)
    for start in range(0, WIDTH, BLOCK):
        # Two dimensions like all that follows: then a thread keeps neighbours from load to sum.
        order = tl.load(order_ptr + start + tl.arange(0, BLOCK)[None, :])
        is_start = order < 0
        own = tl.load(own_ptr + tl.where(is_start, ~order, order))  # [1, BLOCK]
        if not WEIGHTED:
            own = (own >> shift) & 0x10001  # [RELATIONS, BLOCK]
        if HALF == 32:
            own = ((own >> 16).to(tl.int64) << 32) | (own & 0xFFFF)
        before = seen - own + tl.cumsum(own, axis=1)
        before = tl.where(is_start, before, seen_at_start)
        before = tl.associative_scan(before, 1, _larger)  # the tie group
        seen += tl.sum(own, axis=1, keep_dims=True)
        seen_at_start = tl.max(before, axis=1, keep_dims=True)
        count = total - before
        positive = own & MASK
        share = tl.load(table_ptr + (count >> HALF), mask=positive > 0, other=0)
        term = (count & MASK).to(tl.int64) * share
        term_high = term >> 31
        term_low = term & 0x7FFFFFFF
        if WEIGHTED:
            term_high *= positive
            term_low *= positive
        high += tl.sum(term_high, axis=1)
        low += tl.sum(term_low, axis=1)

    cell = relation.to(tl.int64) * M + first + column
    tl.store(high_ptr + cell, high, mask=is_relation)
    tl.store(low_ptr + cell, low, mask=is_relation)


IS_INTERPRETED = not isinstance(_sum_kernel, triton.JITFunction)


# --------------------------------------------------------------------------------------------------
# The launcher


@dataclass(frozen=True)
class LaunchConfig:
    """Block sizes. Not measured on any GPU; the reasons are the compiled code (bench/offline).

    A sort has the fewest instructions with 16 rows per thread (8 take 8 to 15% more), in 64 to 128
    registers and without spills up to 8192 rows. `_sum_kernel` is one warp, so that nothing in its
    loop waits for other warps: 4 neighbouring rows per thread (one load of 16 bytes), and a few
    relations that share the gather of a row's bits.
    """

    sort_block_per_warp: int
    sum_block: int
    shared_relations: int  # divides 16: they are in one word

    def width(self, n: int) -> int:
        """N rounded up to whole blocks: the places that are stored of an order."""
        return -(-n // self.sum_block) * self.sum_block


NVIDIA_LAUNCH = LaunchConfig(512, 128, 4)
HIP_LAUNCH = LaunchConfig(1024, 256, 2)  # a wavefront has 64 threads; more relations spill
INTERPRETER_LAUNCH = LaunchConfig(512, 32, 4)  # small: tests cross blocks
MAX_SORTED_ROWS = 8192

INFINITIES = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
NARROW_COUNTS = 2**15  # below it both counts of a relation fit into one int32
# Rows sorted at a time: their order, 32 MB, stays in the L2 cache of the larger GPUs.
_CHUNK = 1 << 23


@dataclass(frozen=True)
class Counts:
    """What `_sum_kernel` reads of labels and weights.

    A row counts N << 16 | TP in a relation: with weights that is `own` (R, WIDTH) int32. Without
    them both are bits, and `own` (cdiv(R, 16), WIDTH) int32 has those of relation r at bits
    16 + r % 16 and r % 16. Rows past the end count nothing. `totals` (R,) are N << half | TP.
    """

    own: Tensor
    totals: Tensor
    table: Tensor
    n_positive: Tensor
    is_weighted: bool
    half: int

    @classmethod
    def of(cls, labels: Tensor, weights: Tensor | None, width: int, device: torch.device) -> Counts:
        """On the device of the values; counted where the labels are."""
        counted = (labels >= 0).int()
        if weights is not None:
            counted *= weights.to(labels.device)
        positive = counted * (labels == 1)
        n, n_positive = counted.sum(1), positive.sum(1)
        n_max = int(n.max())
        if n_max >= 2**31:
            raise ValueError(f"average_precision: weights must add up to < 2^31, got {n_max}")
        half = 16 if n_max < NARROW_COUNTS else 32
        own = (counted << 16) | positive
        if weights is None:
            place = torch.arange(16, dtype=torch.int32, device=own.device)[:, None]
            bits = torch.nn.functional.pad(own, (0, 0, 0, -len(own) % 16))
            # No two have a bit in common: their sum is all of them.
            own = (bits.view(-1, 16, own.shape[1]) << place).sum(1, dtype=torch.int32)
        return cls(
            own=torch.nn.functional.pad(own, (0, width - own.shape[1])).to(device),
            totals=((n << half) | n_positive).to(device, torch.int32 if half == 16 else None),
            table=reciprocals(n_max, device),
            n_positive=n_positive.to(device),
            is_weighted=weights is not None,
            half=half,
        )


def average_precision_triton(
    values: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    kept: dict[object, Counts] | None = None,
) -> Tensor | None:
    """AP (R, M) of checked arguments, None if a value is not finite.

    `kept` is where calls of the same labels and weights leave what they have counted of them.
    """
    kept = {} if kept is None else kept
    if IS_INTERPRETED:
        return _run(values, labels, weights, INTERPRETER_LAUNCH, kept)
    with on_device(values.device):
        config = NVIDIA_LAUNCH if torch.version.hip is None else HIP_LAUNCH
        return _run(values, labels, weights, config, kept)


def _run(
    values: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    config: LaunchConfig,
    kept: dict[object, Counts],
) -> Tensor | None:
    n, m = values.shape
    device, width = values.device, config.width(n)
    # On another stream they might be read before they are there.
    stream = torch.cuda.current_stream(device).cuda_stream if values.is_cuda else 0
    counts = kept.get((width, device, stream))
    if counts is None:
        counts = kept[width, device, stream] = Counts.of(labels, weights, width, device)
    high = torch.empty((len(labels), m), dtype=torch.int64, device=device)
    low = torch.empty_like(high)
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    # A grid has fewer than 2^31 programs: here columns * relations.
    step = min(m, max(1, _CHUNK // max(width, len(labels))))
    scratch = torch.empty((step, width), dtype=torch.int32, device=device)
    for first in range(0, m, step):
        columns = values if step == m else values[:, first : first + step]
        order = scratch if columns.shape[1] == step else scratch[: columns.shape[1]]
        if n <= MAX_SORTED_ROWS and values.dtype in INFINITIES:
            plan_sort(order, bad, columns, config).run()
        else:
            _sort(order, bad, columns)
        plan_sum(high, low, order, counts, first, config).run()
    # The only wait for the device, but for the sizes of relations in labels there.
    return None if bool(bad) else from_sums(high, low, counts.n_positive)


def plan_sort(order: Tensor, bad: Tensor, values: Tensor, config: LaunchConfig) -> Launch:
    """`_sort_kernel` for some columns."""
    n, m = values.shape
    form = _sort_form(n, m, values.dtype, *values.stride(), order.shape[1], config)
    bits = torch.int16 if values.element_size() == 2 else torch.int32
    return Launch(form, (order, bad, values.view(bits)))


@functools.lru_cache(N_KEPT)
def _sort_form(
    n: int,
    m: int,
    dtype: torch.dtype,
    stride_vn: int,
    stride_vm: int,
    width: int,
    config: LaunchConfig,
) -> Form:
    block = max(triton.next_power_of_2(n), width)
    return Form(
        _sort_kernel,
        (m,),
        ("order_ptr", "bad_ptr", "values_ptr"),
        {"stride_vn": stride_vn, "stride_vm": stride_vm, "N": n, "WIDTH": width},
        {"INFINITY": INFINITIES[dtype], "BITS": 8 * dtype.itemsize, "BLOCK": block},
        num_warps=max(1, block // config.sort_block_per_warp),
    )


def _sort(order: Tensor, bad: Tensor, values: Tensor) -> None:
    """What `_sort_kernel` does, by torch.sort."""
    n, width = values.shape[0], order.shape[1]
    ordered, rows = values.T.contiguous().sort(dim=1)
    bad |= (~ordered[:, [0, -1]].isfinite()).any()
    order[:, :n] = rows
    order[:, n:] = torch.arange(n, width, device=order.device)
    order[:, 1:n] ^= -(ordered[:, 1:] != ordered[:, :-1]).int()


def plan_sum(
    high: Tensor, low: Tensor, order: Tensor, counts: Counts, first: int, config: LaunchConfig
) -> Launch:
    """`_sum_kernel` for the columns that `order` has, into those of high and low from `first`."""
    form = _sum_form(*high.shape, *order.shape, first, counts.is_weighted, counts.half, config)
    return Launch(form, (high, low, order, counts.own, counts.totals, counts.table))


@functools.lru_cache(N_KEPT)
def _sum_form(
    n_relations: int,
    m: int,
    n_columns: int,
    width: int,
    first: int,
    is_weighted: bool,
    half: int,
    config: LaunchConfig,
) -> Form:
    is_shared = n_relations > 1 and not is_weighted and half == 16
    relations = config.shared_relations if is_shared else 1
    return Form(
        _sum_kernel,
        (n_columns * triton.cdiv(n_relations, relations),),
        ("high_ptr", "low_ptr", "order_ptr", "own_ptr", "totals_ptr", "table_ptr"),
        {"WIDTH": width, "M": m, "R": n_relations, "first": first},
        {
            "WEIGHTED": is_weighted,
            "HALF": half,
            "RELATIONS": relations,
            "BLOCK": config.sum_block,
        },
        num_warps=1,
    )
