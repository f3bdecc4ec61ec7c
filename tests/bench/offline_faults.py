"""What the gate of `bench.offline` says to seeded faults; test_offline.py runs this file.

Prints {name of the fault: what was found} as JSON; "none" is the kernel as it is.
"""

# What triton.jit compiles is not typed Python.
# mypy: ignore-errors

from __future__ import annotations

import json
from dataclasses import replace

import torch
import triton
import triton.language as tl

from bench import offline

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


def products(kernel, stride: str = "stride_ot") -> list[str]:
    out = torch.empty(4, 64, device="meta")
    args = {"out_ptr": out, stride: 64}
    launch = offline.Launch(kernel, (1,), args, {"F": 64}, num_warps=1)
    compiled = offline.compile_launch(launch, offline.TARGETS["sm_90"])
    return offline.narrow_products(compiled.asm["ttir"])


def main() -> None:
    launch = offline.launches(*CASE)[0]
    row = offline.measure(*CASE, launch)
    found = {"none": offline.faults(row, row)}

    few_registers = replace(launch, options={"maxnreg": 32})
    found["spill"] = offline.faults(offline.measure(*CASE, few_registers), row)

    # 128 columns for 128 threads in 4 rows: 4 elements, 8 bytes per thread.
    narrow = replace(launch, constants={**launch.constants, "BLOCK_F": 128})
    found["narrow load"] = offline.faults(offline.measure(*CASE, narrow), row)

    # Rows of the order that begin anywhere are loaded one by one.
    ranks = offline.launches(*SUM_CASE)[0]
    unaligned = replace(ranks, args={**ranks.args, "WIDTH": 4095})
    found["narrow order"] = offline.faults(offline.measure(*SUM_CASE, unaligned), row)

    found["budget"] = offline.faults(row, replace(row, blocks=row.blocks / 1.2))
    found["within budget"] = offline.faults(row, replace(row, blocks=row.blocks / 1.05))
    found["no budget"] = offline.faults(row, None)
    found["limit"] = offline.faults(replace(row, blocks=14.1), replace(row, blocks=14.1))
    found["32-bit offset"] = products(_narrow_offsets_kernel)
    found["widened too late"] = products(_late_widening_kernel)
    found["32-bit column"] = products(_narrow_columns_kernel, "M")
    found["64-bit offset"] = products(_wide_offsets_kernel)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
