"""What one launch has to do, from its arguments and its machine code: for `model.predict`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import Tensor

from bench.offline.code import EXPONENTIAL, LOAD, STORE, WIDE_LOAD, sass_around, sass_loops, waits
from bench.offline.model import Part, Work
from relneuron.ops import SITES
from relneuron.ops.swiglu_stats.triton_launch import Launch

N_GROUPS = 12  # of a call that does not say


def work_of(
    launch: Launch,
    code: str,
    registers: int,
    shared_bytes: int,
    *,
    is_mixed: bool = False,
    is_small: bool = False,
) -> Work:
    """The work of one launch, where values decide about it.

    `is_mixed`: every tile of tokens has rows of every group. `is_small`: no pair of logprob_gain
    needs an exponential.
    """
    inner = [body for body in sass_loops(code)[1] if any(map(LOAD.search, body))]
    outside, around = sass_around(code)
    name = launch.kernel.__name__
    if name != "_swiglu_stats_kernel":
        # See `rows.measure`.
        inner = [body for body in inner if not any(map(STORE.search, body))]
    if name == "_swiglu_stats_kernel":
        parts, n_bytes = _stats(launch, inner, around, is_mixed)
    elif name == "_moments_kernel":
        parts, n_bytes = _moments(launch, inner, around, is_mixed)
    elif name == "_responses_kernel":
        parts, n_bytes = _responses(launch, inner)
    elif name in ("_peaks_kernel", "_histogram_kernel"):
        parts, n_bytes = _peaks(launch, inner, around)
    elif name == "_sum_kernel":
        parts, n_bytes = _sums(launch, inner)
    elif name.startswith("_gain"):
        parts, n_bytes = _gains(launch, inner, around, is_small)
    else:
        parts, n_bytes = [], _bytes(*launch.args.values())
    # What is in no loop waits for something at least once.
    parts.append(Part(outside, 1.0, waits(outside), is_cached=True))
    n_programs = math.prod(launch.grid)
    return Work(n_programs, launch.num_warps, registers, shared_bytes, parts, n_bytes)


def _bytes(*tensors: Tensor | int | None) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)))


def n_inputs(launch: Launch) -> int:
    """How many matrices a kernel of swiglu_stats reads: gate, and up if there is one."""
    return 1 if launch.args["up_ptr"] is None else 2


def of_rows(launch: Launch) -> re.Pattern[str]:
    """What only the loops over rows have, of a launch of the main kernel of swiglu_stats."""
    return WIDE_LOAD if launch.args["h_ptr"] is None else STORE


def _part(body: Sequence[str], turns: float, n_wide: int, *, is_cached: bool = False) -> Part:
    """A loop whose turn has n_wide loads of 16 bytes by each thread."""
    per_turn = 16 * n_wide
    n = sum(bool(WIDE_LOAD.search(text)) for text in body)
    # The compiler may have unrolled it.
    turns /= max(1, n // max(1, n_wide))
    return Part(body, turns, waits(list(body)), per_turn, is_cached)


def _n_runs(launch: Launch, n_tiles: int, is_mixed: bool) -> float:
    """Runs of rows of one group in a tile."""
    if launch.args.get("group_ids_ptr") is None:
        return 1.0
    n_groups = launch.args["G"] or N_GROUPS
    assert isinstance(n_groups, int), "a number of groups"
    return float(n_groups) if is_mixed else 1 + (n_groups - 1) / n_tiles


def _stats(
    launch: Launch, inner: list[list[str]], around: list[str], is_mixed: bool
) -> tuple[list[Part], float]:
    sizes, args = launch.constants, launch.args
    # As in `rows`: the shortest is `blocks`, the longest `rows`.
    wanted = of_rows(launch)
    loops = sorted((body for body in inner if any(map(wanted.search, body))), key=len)
    runs = _n_runs(launch, launch.grid[0], is_mixed)
    n_steps = sizes["TILE_T"] / sizes["BLOCK_T"]
    if is_mixed:
        blocks, rows = 0.0, n_steps + 0.375 * runs
    else:
        blocks, rows = n_steps - (runs - 1), 2 * (runs - 1)
    n_wide = n_inputs(launch)
    parts = [_part(loops[0], blocks, n_wide), _part(loops[-1], rows, n_wide), Part(around, runs)]
    n_bytes = _bytes(args["h_ptr"], args["gate_ptr"], args["up_ptr"])
    if (partial := args["partial_ptr"]) is not None:
        assert isinstance(partial, Tensor), "partial sums are a tensor"
        # Of four rows, the smallest is kept of act alone, in the fast form.
        n_rows = 3 * partial.shape[1] + (sizes["ACT_ROW"] >= 0 and not sizes["EXACT"])
        n_bytes += _bytes(partial) * runs / partial.shape[2] * n_rows / (4 * partial.shape[1])
    return parts, n_bytes


def _moments(
    launch: Launch, inner: list[list[str]], around: list[str], is_mixed: bool
) -> tuple[list[Part], float]:
    args, sizes = launch.args, launch.constants
    n_groups, partial = launch.grid[0], args["partial_ptr"]
    by_loads = sorted(inner, key=lambda body: sum(bool(WIDE_LOAD.search(text)) for text in body))
    gate = args["gate_ptr"]
    assert isinstance(gate, Tensor), "gate is a tensor"
    if not isinstance(partial, Tensor):
        # The rows of the group, if they stand together.
        turns = len(gate) / n_groups / sizes["BLOCK_T"]
        body = by_loads[-1]
        n_wide = sum(bool(WIDE_LOAD.search(text)) for text in body)
        return [_part(body, turns, n_wide), Part(around, 1)], _bytes(gate)
    n_tiles = partial.shape[0]
    tiles = _n_runs(launch, n_tiles, is_mixed) * n_tiles / n_groups
    turns = n_tiles / sizes["BLOCK_T"]
    with_rows = min(turns, tiles / sizes["BLOCK_T"] + 1)
    body = by_loads[-1]
    n_wide = sum(bool(WIDE_LOAD.search(text)) for text in body)
    empty = Part(body[:40], turns - with_rows, waits(body[:40]), is_cached=True)
    has_smallest = SITES[sizes["SITE"]] == "act" and not sizes["EXACT"]
    share = tiles / n_tiles * (4 if has_smallest else 3) / 4
    return [_part(body, with_rows, n_wide), empty, Part(around, 1)], _bytes(partial) * share


def _responses(launch: Launch, inner: list[list[str]]) -> tuple[list[Part], float]:
    args, n_prompts = launch.args, launch.grid[0]
    gate = args["gate_ptr"]
    assert isinstance(gate, Tensor), "gate is a tensor"
    turns = math.ceil(len(gate) / n_prompts / launch.constants["BLOCK_T"])
    sums = [args[name] for name in args if name.endswith("_response_ptr")]
    # Every row is read and written.
    n_bytes = _bytes(gate, args["up_ptr"]) + 2 * _bytes(*sums)
    return [_part(max(inner, key=len), turns, n_inputs(launch))], n_bytes


def _peaks(launch: Launch, inner: list[list[str]], around: list[str]) -> tuple[list[Part], float]:
    args, sizes = launch.args, launch.constants
    gate = args["gate_ptr"]
    assert isinstance(gate, Tensor), "gate is a tensor"
    # A program has the rows of a segment, or a tile of them.
    n_rows = sizes.get("TILE_T", len(gate) / launch.grid[0])
    # What is updated is read and written.
    updated = [args[name] for name in ("values_ptr", "positions_ptr", "counts_ptr") if name in args]
    n_bytes = _bytes(gate, args["up_ptr"]) + 2 * _bytes(*updated)
    body = max(inner, key=len, default=around)
    return [_part(body, n_rows / sizes["BLOCK_T"], n_inputs(launch))], n_bytes


def _sums(launch: Launch, inner: list[list[str]]) -> tuple[list[Part], float]:
    width, block = launch.args["WIDTH"], launch.constants["BLOCK"]
    assert isinstance(width, int), "a number of rows"
    part = _part(max(inner, key=len), width / block, 1, is_cached=True)
    # The order comes from L2, where the sort has left it.
    return [part], 0.0


def _gains(
    launch: Launch, inner: list[list[str]], around: list[str], is_small: bool
) -> tuple[list[Part], float]:
    args, sizes = launch.args, launch.constants
    width = args["WIDTH"]
    assert isinstance(width, int), "a number of tokens"
    n_bytes = _bytes(args["b_ptr"], args["p_ptr"], args.get("z_ptr"))
    if launch.kernel.__name__ == "_gain_moments_kernel":
        turns = sizes["SPAN"] / sizes["BLOCK"]
        body = max(inner, key=len)
        n_wide = sum(bool(WIDE_LOAD.search(text)) for text in body)
        return [_part(body, turns, n_wide, is_cached=True)], n_bytes
    body = max((b for b in inner if any(map(EXPONENTIAL.search, b)) != is_small), key=len)
    n_wide = sum(bool(WIDE_LOAD.search(text)) for text in body)
    turns, spans = width / sizes["BLOCK"], width / sizes["SPAN"]
    # One of the two nests of loops.
    return [
        _part(body, turns, n_wide, is_cached=True),
        Part(around[: len(around) // 2], spans),
    ], n_bytes
