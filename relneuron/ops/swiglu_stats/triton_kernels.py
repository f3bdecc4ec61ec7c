"""The main Triton kernel of `swiglu_stats`, which `triton_launch.py` launches.

It reads gate and up (if there is one) once, writes h, adds the counts, and leaves the moments of
every tile for `_moments_kernel` in `ops/swiglu_stats/triton_sums.py`. Only integers are added
atomically. How a site is recorded on the way is in `triton_records.py`.
"""

# What triton.jit compiles is not typed Python.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from relneuron.ops.swiglu_stats.triton_math import (
    DIFFERENCE,
    RESIDUAL,
    SITE_ACT,
    SITE_GATE,
    SITE_PRODUCT,
    SITE_UP,
    _act,
    _add,
    _after,
    _is_above,
    _multiply,
    _spread_bits,
    _widen,
)
from relneuron.ops.swiglu_stats.triton_records import (
    SECOND,
    _count,
    _flush,
    _hits_of_two,
    _nothing,
    _record,
)

# Larger than every id.
NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _load(ptr, mask):
    """Values, and zeros where `mask` is False; no mask costs no instruction."""
    return tl.load(ptr) if mask is None else tl.load(ptr, mask=mask, other=0)


@triton.jit
def _step(
    records,  # one per site
    cells,  # pointers into h and gate [BLOCK_T, BLOCK_F]
    up_cells,  # likewise, None = h is act
    kept,  # [BLOCK_T or 1, BLOCK_F] int16, None = nothing is dropped
    mask,  # of the loads, None = all
    live,  # of the store, None = all
    weight,
    zero,  # see `_after`; None where both come at once
    limits,  # threshold, high, low: see `_swiglu_stats_kernel`
    ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_LOW: tl.constexpr,
    MOMENTS: tl.constexpr,
    PTX: tl.constexpr,
):
    """h of one block [BLOCK_T, BLOCK_F]; its values go into the records."""
    h_cells, gate_cells = cells
    threshold, high, low = limits
    gate_record, up_record, act_record, product_record = records
    gate = _load(gate_cells, mask)
    up = None
    if up_cells is not None:
        up = _load(up_cells, mask)
    gate = _after(gate, up, zero, PTX)
    if ACTIVATION == RESIDUAL:
        tl.store(h_cells, _add(up, gate, kept, PTX), mask=live)
    else:
        act = _act(gate, up, weight, ACTIVATION, EXACT, PTX)
        if ACTIVATION != DIFFERENCE:
            tl.store(h_cells, _multiply(act, up, kept, PTX), mask=live)

    x = _widen(gate, PTX)
    if ROWS[SITE_GATE] >= 0:
        gate_record = _count(gate_record, _is_above(x, threshold, PTX), weight, 1.0)
        gate_record = _record(gate_record, x, x, weight, MOMENTS)
    if ROWS[SITE_UP] >= 0:
        y = _widen(up, PTX)
        is_hit = _is_above(y, threshold, PTX)
        if ROWS[SITE_GATE] >= 0:
            gate_record = _count(gate_record, is_hit, weight, SECOND)
        else:
            up_record = _count(up_record, is_hit, weight, 1.0)
        up_record = _record(up_record, y, y, weight, MOMENTS)
    if ROWS[SITE_ACT] >= 0:
        a = _widen(act, PTX)
        if EXACT:
            act_record = _count(act_record, _is_above(a, threshold, PTX), weight, 1.0)
            act_record = _record(act_record, a, a, weight, MOMENTS)
        else:
            is_hit = _is_above(x, high, PTX)
            if HAS_LOW:
                is_hit += _is_above(low, x, PTX) * _is_above(x, float("-inf"), PTX)
            act_record = _count(act_record, is_hit, weight, 1.0)
            # The weight is in act already. The extremes are those of gate, which keeps its highest.
            HIGHEST: tl.constexpr = ROWS[SITE_GATE] < 0
            act_record = _record(act_record, a, x, None, MOMENTS, HIGHEST, True)
    if ROWS[SITE_PRODUCT] >= 0:
        p = _widen(_multiply(act, up, None, PTX), PTX)
        is_hit = _is_above(p, threshold, PTX)
        if ROWS[SITE_ACT] >= 0:
            act_record = _count(act_record, is_hit, weight, SECOND)
        else:
            product_record = _count(product_record, is_hit, weight, 1.0)
        product_record = _record(product_record, p, p, weight, MOMENTS)
    return gate_record, up_record, act_record, product_record


# A size or bit pattern of 1 would otherwise become a compile-time constant without `.to`.
@triton.jit(do_not_specialize=["G", "threshold_bits", "high_bits", "low_bits"])
def _swiglu_stats_kernel(
    h_ptr,  # (T, F), None where there is no h, that is of a difference
    count_ptr,  # (S, G, F) int64, None without statistics
    tokens_ptr,  # (G,) int64
    partial_ptr,  # (tiles, S, G, 4, F) float32, None without moments
    n_rows_ptr,  # (tiles, G) int32, zeros: becomes the tokens of each group in each tile
    order_ptr,  # (tiles, column blocks, TILE_T) int32: room for an order of rows
    gate_ptr,  # (T, F)
    up_ptr,  # (T, F), None = h is act
    group_ids_ptr,  # (T,) int32, None = all tokens in group 0
    keep_ptr,  # (C, 4 W) uint8, None without masks
    condition_ids_ptr,  # (T,) int32, None = row 0
    stride_ht,
    stride_gt,
    stride_ut,
    stride_kc,
    T,
    F,
    G,
    threshold_bits,
    high_bits,
    low_bits,
    GATE_ROW: tl.constexpr,  # position of the site in count_ptr, -1 = not recorded
    UP_ROW: tl.constexpr,
    ACT_ROW: tl.constexpr,
    PRODUCT_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_LOW: tl.constexpr,
    MOMENTS: tl.constexpr,
    EVEN_F: tl.constexpr,  # F is a multiple of BLOCK_F
    PTX: tl.constexpr,
    STAGES: tl.constexpr,
    TILE_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """h and statistics of a tile of TILE_T tokens and BLOCK_F columns, group after group.

    A run is the rows of the tile in one group. Rows of equal id mostly stand together; then a run
    is walked in whole blocks of BLOCK_T rows. Otherwise the rows are visited in the sorted order of
    their groups, so that every group of a tile is flushed once, whatever the order of the tokens.

    Without EXACT the site act is a hit where gate > high or -inf < gate < low, which the launcher
    has checked for all gates; act itself may then differ from the exact one in its last bit.
    """
    ROWS: tl.constexpr = (GATE_ROW, UP_ROW, ACT_ROW, PRODUCT_ROW)
    S: tl.constexpr = (GATE_ROW >= 0) + (UP_ROW >= 0) + (ACT_ROW >= 0) + (PRODUCT_ROW >= 0)
    # int64, so that the products with strides cannot overflow.
    pid_t = tl.program_id(0).to(tl.int64)
    pid_f = tl.program_id(1).to(tl.int64)
    first = pid_t * TILE_T
    n_rows = tl.minimum(T - first, TILE_T).to(tl.int32)
    offs_p = tl.arange(0, TILE_T)  # [TILE_T], positions in the tile
    offs_t = tl.arange(0, BLOCK_T)  # [BLOCK_T]
    offs_f = pid_f * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    mask_f = offs_f < F
    offs_b = pid_f * (BLOCK_F // 8) + tl.arange(0, BLOCK_F // 8)  # bytes of keep
    mask = None
    mask_b = None
    if not EVEN_F:
        mask = mask_f[None, :]
        mask_b = (offs_b * 8 < F)[None, :]
    limits = (
        threshold_bits.to(tl.float32, bitcast=True),
        high_bits.to(tl.float32, bitcast=True),
        low_bits.to(tl.float32, bitcast=True),
    )
    # An address in place of an h that is not there and that nothing is stored to.
    h_tile = (gate_ptr if h_ptr is None else h_ptr) + first * stride_ht + offs_f[None, :]
    gate_tile = gate_ptr + first * stride_gt + offs_f[None, :]
    if up_ptr is not None:
        up_tile = up_ptr + first * stride_ut + offs_f[None, :]
    group_ids_tile = group_ids_ptr
    order_tile = order_ptr
    condition_ids_tile = condition_ids_ptr

    zero = (G < 0).to(tl.int32)  # see `_after`; never a constant, as T of one token is
    group = tl.full([], 0, tl.int32)
    if group_ids_ptr is not None:
        group_ids_tile += first
        gid = tl.load(group_ids_tile + offs_p, mask=offs_p < n_rows, other=NO_ID)  # [TILE_T]
        has_previous = (offs_p > 0) & (offs_p < n_rows)
        previous = tl.load(group_ids_tile + offs_p - 1, mask=has_previous, other=-1)
        group = tl.min(gid, axis=0)
        is_mixed = tl.max((previous > gid).to(tl.int32), axis=0) > 0
        order_tile += (pid_t * tl.num_programs(1) + pid_f) * TILE_T
        n_sorted = tl.where(is_mixed, n_rows, 0)
        if is_mixed:
            key = tl.sort((gid.to(tl.int64) << 16) | offs_p)
            tl.store(order_tile + offs_p, (key & 0xFFFF).to(tl.int32))
            # Other threads of this program read it.
            tl.debug_barrier()
    if condition_ids_ptr is not None:
        condition_ids_tile += first
        condition = tl.load(condition_ids_tile + offs_p, mask=offs_p < n_rows, other=0)

    begin = tl.full([], 0, tl.int32)
    while begin < n_rows:
        stop = n_rows
        if group_ids_ptr is not None:
            stop = begin + tl.sum((gid == group).to(tl.int32), axis=0)
        n_blocks = (stop - begin) // BLOCK_T
        if group_ids_ptr is not None:
            n_blocks = tl.where(is_mixed, 0, n_blocks)
        kept = None
        if keep_ptr is not None:
            condition_row = tl.zeros([1, 1], tl.int64)
            if condition_ids_ptr is not None:
                is_mine = (offs_p >= begin) & (offs_p < stop)
                lowest = tl.min(tl.where(is_mine, condition, NO_ID), axis=0)
                highest = tl.max(tl.where(is_mine, condition, -1), axis=0)
                n_blocks = tl.where(lowest == highest, n_blocks, 0)
                condition_row += lowest
            run_bytes = keep_ptr + condition_row * stride_kc + offs_b[None, :]
            kept = _spread_bits(_load(run_bytes, mask_b), PTX)

        nothing = _nothing(BLOCK_T, BLOCK_F)
        records = (nothing, nothing, nothing, nothing)

        # Whole blocks of neighbouring rows, all with one row of `keep`.
        at = (begin + offs_t).to(tl.int64)[:, None]  # [BLOCK_T, 1]
        cells = (h_tile + at * stride_ht, gate_tile + at * stride_gt)
        up_cells = None
        if up_ptr is not None:
            up_cells = up_tile + at * stride_ut
        block = tl.full([], BLOCK_T, tl.int64)
        for _ in tl.range(n_blocks, num_stages=STAGES):
            records = _step(
                records,
                cells,
                up_cells,
                kept,
                mask,
                mask,
                None,
                zero if STAGES == 1 else None,
                limits,
                ROWS,
                ACTIVATION,
                EXACT,
                HAS_LOW,
                MOMENTS,
                PTX,
            )
            cells = (cells[0] + block * stride_ht, cells[1] + block * stride_gt)
            if up_ptr is not None:
                up_cells += block * stride_ut

        # The other rows. Past the end of the run its last row is repeated, with weight 0.
        for position in tl.range(begin + n_blocks * BLOCK_T, stop, BLOCK_T, num_stages=STAGES):
            is_row = (position + offs_t < stop)[:, None]
            weight = None
            if BLOCK_T > 1:
                weight = is_row.to(tl.float32)
            place = tl.minimum(position + offs_t, stop - 1)  # [BLOCK_T]
            if group_ids_ptr is not None:
                # Without a branch, so that loads of later steps can be under way.
                ordered = tl.load(order_tile + place, mask=place < n_sorted, other=0)
                place = tl.where(is_mixed, ordered, place)
            # Places are not negative: the conversion of an unsigned number takes no instruction.
            at = place.to(tl.uint32).to(tl.int64)[:, None]
            kept_rows = kept
            if condition_ids_ptr is not None:
                condition_rows = tl.load(condition_ids_tile + place).to(tl.uint32).to(tl.int64)
                row_bytes = keep_ptr + condition_rows[:, None] * stride_kc + offs_b[None, :]
                kept_rows = _spread_bits(_load(row_bytes, mask_b), PTX)
            cells = (h_tile + at * stride_ht, gate_tile + at * stride_gt)
            if up_ptr is not None:
                up_cells = up_tile + at * stride_ut
            live = is_row & mask_f[None, :]
            records = _step(
                records,
                cells,
                up_cells,
                kept_rows,
                mask,
                live,
                weight,
                zero,
                limits,
                ROWS,
                ACTIVATION,
                EXACT,
                HAS_LOW,
                MOMENTS,
                PTX,
            )

        if count_ptr is not None:  # noqa: SIM102
            if group >= 0:
                if pid_f == 0:
                    tl.atomic_add(tokens_ptr + group, (stop - begin).to(tl.int64), sem="relaxed")
                    if MOMENTS:
                        tl.store(n_rows_ptr + pid_t * G + group, stop - begin)
                gate_hits, up_hits = _hits_of_two(records[0], records[1], GATE_ROW, UP_ROW)
                act_hits, product_hits = _hits_of_two(records[2], records[3], ACT_ROW, PRODUCT_ROW)
                n_hits = (gate_hits, up_hits, act_hits, product_hits)
                for site in tl.static_range(len(ROWS)):
                    if ROWS[site] >= 0:
                        cell = (ROWS[site] * G.to(tl.int64) + group) * F
                        partial_cells = partial_ptr
                        if MOMENTS:
                            partial_cells += (pid_t * S * G * F + cell) * 4 + offs_f
                        count_cells = count_ptr + cell + offs_f
                        hits, total, total_sq, high_end, low_end = records[site]
                        if site == SITE_ACT and not EXACT and GATE_ROW >= 0:
                            high_end = records[SITE_GATE][3]
                        _flush(
                            (hits, total, total_sq, high_end, low_end),
                            n_hits[site],
                            count_cells,
                            partial_cells,
                            mask_f,
                            F,
                            MOMENTS,
                            site == SITE_ACT and not EXACT,
                        )
        begin = stop
        if group_ids_ptr is not None:
            group = tl.min(tl.where(gid > group, gid, NO_ID), axis=0)
