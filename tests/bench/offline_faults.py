"""What the gate of `bench.offline` says to seeded faults; test_offline.py runs this file.

Prints {op: {name of the fault: what was found}} as JSON; "none" is the kernel as it is.
"""

# What triton.jit compiles is not typed Python.
# mypy: ignore-errors

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from bench.offline.cases import TARGETS, compile_launch, launches
from bench.offline.code import narrow_products
from bench.offline.rows import faults, measure
from relneuron.ops.launches import Form, Launch
from relneuron.ops.swiglu_stats import triton_kernels

CASE = ("sm_90", "bf16", "count")
SUM_CASE = ("sm_90", "any", "rank for 12 relations")


@triton.jit
def _narrow_offsets_kernel(out_ptr, stride_ot, F: tl.constexpr):
    row = tl.program_id(0) * stride_ot
    tl.store(out_ptr + row + tl.arange(0, F), 0.0)


@triton.jit
def _late_widening_kernel(out_ptr, stride_ot, F: tl.constexpr):
    row = (tl.arange(0, 4)[:, None] * stride_ot).to(tl.int64)
    tl.store(out_ptr + row + tl.arange(0, F)[None, :], 0.0)


@triton.jit
def _wide_offsets_kernel(out_ptr, stride_ot, F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * stride_ot
    tl.store(out_ptr + row + tl.arange(0, F), 0.0)


@triton.jit
def _narrow_columns_kernel(out_ptr, M, F: tl.constexpr):
    column = (tl.arange(0, F) * M).to(tl.int64)
    tl.store(out_ptr + column, 0.0)


@triton.jit
def _as_it_is(gate, up, zero, PTX: tl.constexpr):
    return gate


def products(kernel, stride: str = "stride_ot") -> list[str]:
    out = torch.empty(4, 64, device="meta")
    form = Form(kernel, (1,), ("out_ptr",), {stride: 64}, {"F": 64}, num_warps=1)
    compiled = compile_launch(Launch(form, (out,)), TARGETS["sm_90"])
    return narrow_products(compiled.asm["ttir"])


def changed(launch: Launch, **fields: Any) -> Launch:
    return launch._replace(form=replace(launch.form, **fields))


def main() -> None:
    launch = launches(*CASE)[0]
    row = measure(*CASE, launch)
    found = {"none": faults(row, row)}

    few_registers = changed(launch, options={"maxnreg": 32})
    found["spill"] = faults(measure(*CASE, few_registers), row)

    # 128 columns for 128 threads in 4 rows: 4 elements, 8 bytes per thread.
    narrow = changed(launch, constants={**launch.constants, "BLOCK_F": 128})
    found["narrow load"] = faults(measure(*CASE, narrow), row)

    # Rows of the order that begin anywhere are loaded one by one.
    ranks = launches(*SUM_CASE)[0]
    unaligned = changed(ranks, sizes={**ranks.form.sizes, "WIDTH": 4095})
    found["narrow order"] = faults(measure(*SUM_CASE, unaligned), row)

    budget = replace(row, source="")
    found["budget"] = faults(row, replace(budget, blocks=row.blocks / 1.2))
    found["within budget"] = faults(row, replace(budget, blocks=row.blocks / 1.05))
    found["same code"] = faults(row, replace(row, blocks=row.blocks / 1.01))
    found["no budget"] = faults(row, None)
    found["limit"] = faults(replace(row, blocks=14.1), replace(row, blocks=14.1))
    plain = ("sm_90", "bf16", "plain")
    launch = launches(*plain)[0]
    found["none, plain"] = faults(measure(*plain, launch), None)
    triton_kernels._after = _as_it_is
    # Another tile, as Triton keeps what it has compiled.
    other = changed(launch, constants={**launch.constants, "TILE_T": 64})
    found["up loaded late"] = faults(measure(*plain, other), None)
    found["apart"] = faults(replace(row, apart=13.0), budget)
    found["under way"] = faults(replace(row, in_flight=row.in_flight / 1.2), budget)
    found["limiter"] = faults(replace(row, limiter="latency"), budget)
    found["32-bit offset"] = products(_narrow_offsets_kernel)
    found["widened too late"] = products(_late_widening_kernel)
    found["32-bit column"] = products(_narrow_columns_kernel, "M")
    found["64-bit offset"] = products(_wide_offsets_kernel)
    print(json.dumps({"stats": found, "gains": faults_of_gains()}))


def faults_of_gains() -> dict[str, list[str]]:
    """The same for the kernels of logprob_gain, whose loops are told by what is in them."""
    case, moments = ("sm_90", "any", "gain"), ("sm_90", "any", "moments")
    launch, product = launches(*case)[0], launches(*moments)[0]
    row = measure(*case, launch)
    found = {"none": faults(row, row)}
    few_registers = changed(launch, options={"maxnreg": 64})
    found["spill"] = faults(measure(*case, few_registers), row)
    # Rows that begin anywhere are loaded one by one.
    unaligned = changed(launch, sizes={**launch.form.sizes, "WIDTH": 32001})
    found["narrow"] = faults(measure(*case, unaligned), row)
    for loop in ("blocks", "rows"):
        less = replace(row, **{loop: getattr(row, loop) / 1.2}, source="")
        found[loop] = faults(row, less)
    try:
        plain = changed(product, constants={**product.constants, "PRECISION": "ieee"})
        measure(*moments, plain)
    except AssertionError as error:
        found["no matrix product"] = [str(error)]
    return found


if __name__ == "__main__":
    main()
