"""`python -m bench.offline` compiles the Triton kernels for GPUs that are not here, and gates them.

For every target and every kind of call (`offline_cases.py`) it compiles the launches that the op
would make and reads the machine code: registers, spills, shared memory, the width of loads, and
instructions per element. It fails on a spill, a load narrower than 16 bytes, a 32-bit product in an
offset, and more than 110% of an instruction budget in `offline_budgets.csv` (`--update` rewrites
that file).

Instructions per element are all instructions from the head of a loop to its backward branch,
predicated or not, divided by the elements one thread handles in one turn. The kernels of
swiglu_stats have two loops: `blocks` over whole blocks of rows, and `rows` over the rest of a run,
over rows out of order and over rows with different masks. What happens once per run (flush, sort)
is not in them. Of average_precision, `rows` is the loop of `_sum_kernel`, per row and relation;
`_sort_kernel` has no loop, and its `blocks` are all its instructions per row. Of logprob_gain, an
element is a token of a pair of neuron and sentence: `rows` is the loop with an exponential each, or
with the products of matrices of the moments; `blocks` is the one without exponentials.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

# Read when triton is imported: this is about the compiler, never about the interpreter.
os.environ["TRITON_INTERPRET"] = "0"

import triton
from torch import Tensor

from bench.offline_cases import TARGETS, cases, compile_launch, launches
from relneuron.ops.swiglu_stats.triton_launch import Launch

BUDGETS = Path(__file__).with_name("offline_budgets.csv")
TOLERANCE = 1.10
# Upper limits that no `--update` moves: (target, dtype, variant, loop) -> instructions per element.
LIMITS = {
    ("sm_90", "bf16", "count", "blocks"): 14.0,
    ("sm_90", "bf16", "count, one condition", "blocks"): 17.0,
    ("sm_90", "bf16", "all at act, conditions", "rows"): 23.0,
}


# --------------------------------------------------------------------------------------------------
# Reading machine code


def sass(compiled: Any) -> tuple[str, str]:
    """(code, resource usage) as cuobjdump prints them; it comes with triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        printed = [
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-sass", "-res-usage")
        ]
    return printed[0].stdout, printed[1].stdout


def sass_loops(code: str) -> tuple[list[str], list[list[str]]]:
    """All instructions (but those that fill the end), and those of each innermost loop."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", code)
    instructions = [(int(address, 16), text) for address, text in lines]
    ends = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*\b(0x[0-9a-f]+)", text)
        # The code ends with a branch to itself.
        if branch and int(branch[1], 16) < address:
            ends.append((int(branch[1], 16), address))
    return [text for _, text in instructions if text != "NOP"], [
        [text for address, text in instructions if head <= address <= end]
        for head, end in _innermost(ends)
    ]


def amd_loops(code: str) -> tuple[list[str], list[list[str]]]:
    """All instructions, and those of each innermost loop."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    ends = []
    for line in code.splitlines():
        text = line.split(";")[0].strip()
        if label := re.match(r"(\.L\w+):", text):
            labels[label[1]] = len(instructions)
        elif re.match(r"[a-z]+_\w+", text):
            branch = re.match(r"s_c?branch\w*\s+(\.L\w+)", text)
            if branch and branch[1] in labels:
                ends.append((labels[branch[1]], len(instructions)))
            instructions.append(text)
    return instructions, [instructions[head : end + 1] for head, end in _innermost(ends)]


def _innermost(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    # Several branches may lead to one head: the last one ends the loop.
    last = {head: max(end for other, end in loops if other == head) for head, _ in loops}
    return [
        (head, end)
        for head, end in sorted(last.items())
        if not any(head <= a and b <= end and (a, b) != (head, end) for a, b in last.items())
    ]


WIDE_LOAD = re.compile(r"\bLDG(?:STS)?\.E\S*\.128\b|\b(?:global|buffer)_load_dwordx4\b")
LOAD = re.compile(r"\bLDG(?:STS)?\.E|\b(?:global|buffer)_load_")
# What a pair of logprob_gain costs: an exponential, or a product of matrices.
EXPONENTIAL = re.compile(r"\bMUFU\.EX2\b|\bv_exp_f32")
PRODUCT = re.compile(r"\b(?:HMMA|HGMMA|UTCHMMA)\b|\bv_mfma_f32")
STORE = re.compile(r"\bSTG\b|\b(?:global|buffer)_store_")


def narrow_products(ttir: str) -> list[str]:
    """32-bit products with a size, a stride or a program id, which may not fit into 32 bits.

    An offset is row * stride + column; with a tensor past 2^31 elements only a 64-bit product
    holds it, whatever it is widened to afterwards.
    """
    large: set[str] = set(re.findall(r"(%(?:stride_\w+|n_tiles|WIDTH|[TFGNMRE])): i32", ttir))
    passes_on = r"tt\.(?:splat|expand_dims|broadcast|reshape)|ttg?\.convert_layout"
    found = []
    for line in ttir.splitlines():
        if not (definition := re.match(r"\s*(%\w+) = ([\w.]+) (.*?) loc\(", line)):
            continue
        name, operation, rest = definition.groups()
        operands = set(re.findall(r"%\w+", rest))
        if operation == "tt.get_program_id" or (
            re.fullmatch(passes_on, operation) and operands & large
        ):
            large.add(name)
        if operation == "arith.muli" and operands & large and re.search(r"\bi32\b|xi32>", rest):
            found.append(line.strip())
    return found


# --------------------------------------------------------------------------------------------------
# The table and its gate


@dataclass(frozen=True)
class Row:
    """What the compiled code of one launch says; None where the question makes no sense."""

    target: str
    dtype: str
    variant: str
    kernel: str
    registers: int
    spills: int
    shared_bytes: int
    # The narrowest load of gate or up in a loop, or of the order of rows.
    load_bytes: int | None
    # Instructions per element of the two loops, see above.
    blocks: float | None
    rows: float | None
    narrow_products: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.target, self.dtype, self.variant, self.kernel


def measure(target: str, dtype: str, variant: str, launch: Launch) -> Row:
    kind = TARGETS[target]
    compiled = compile_launch(launch, kind)
    if kind.backend == "cuda":
        code, usage = sass(compiled)
        numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        assert numbers, f"cuobjdump says nothing of registers: {usage}"
        registers, stack, shared, local = (int(number) for number in numbers.groups())
        spills, (all_code, loops) = stack + local, sass_loops(code)
    else:
        code = compiled.asm["amdgcn"]

        def number(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])  # type: ignore[index]

        registers, shared = number("vgpr_count"), number("group_segment_fixed_size")
        spills = number("vgpr_spill_count") + number("sgpr_spill_count")
        all_code, loops = amd_loops(code)
    name = launch.kernel.__name__
    if name in ("_moments_kernel", "_sort_kernel"):
        # The first has a branch around the loads, which compilers turn into loops of all shapes.
        loops = [all_code]
    load_bytes, per_element = _loop_numbers(name, launch, loops, kind.warp_size)
    return Row(
        target,
        dtype,
        variant,
        name,
        registers,
        spills,
        shared,
        load_bytes,
        per_element[0],
        per_element[1],
        len(narrow_products(compiled.asm["ttir"])),
    )


def _loop_numbers(
    name: str, launch: Launch, loops: list[list[str]], warp_size: int
) -> tuple[int | None, tuple[float | None, float | None]]:
    """(narrowest load, instructions per element of `blocks` and of `rows`)."""
    if name == "_span_kernel":
        return None, (None, None)
    if name.startswith("_gain"):
        return _gain_numbers(name, launch, loops, warp_size)
    if name in ("_sort_kernel", "_sum_kernel"):
        body = max(loops, key=len)
        elements = launch.constants["BLOCK"] * launch.constants.get("RELATIONS", 1)
        per_row = round(len(body) * launch.num_warps * warp_size / elements, 1)
        if name == "_sort_kernel":
            return None, (per_row, None)
        return 16 if any(map(WIDE_LOAD.search, body)) else 8, (None, per_row)
    gate = launch.args["gate_ptr"]
    assert isinstance(gate, Tensor), "gate is a tensor"
    n_elements = launch.constants["BLOCK_T"] * launch.constants["BLOCK_F"]
    is_main = name == "_swiglu_stats_kernel"
    # `_moments_kernel` reads one of gate and up for most sites.
    n_tensors = 1 if name == "_moments_kernel" else 2
    turn_bytes = n_tensors * n_elements // (launch.num_warps * warp_size) * gate.element_size()
    widths, per_element = [], []
    for body in loops:
        wanted = STORE if is_main else WIDE_LOAD
        if not any(wanted.search(text) for text in body):
            continue
        # More than one turn where the compiler has unrolled the loop.
        wide_bytes = 16 * sum(bool(WIDE_LOAD.search(text)) for text in body)
        widths.append(16 if wide_bytes >= turn_bytes else 8)
        elements = max(turn_bytes, wide_bytes) / gate.element_size() / n_tensors
        per_element.append(round(len(body) / elements, 1))
    if name == "_moments_kernel":
        return min(widths, default=8), (None, None)
    expected = 2 if is_main else 1
    # Where the compiler has made more loops of them, the shortest and the longest count.
    assert len(per_element) >= expected, f"{name} has {len(per_element)} loops, not {expected}"
    per_element.sort()
    return min(widths), (per_element[0] if is_main else None, per_element[-1])


def _gain_numbers(
    name: str, launch: Launch, loops: list[list[str]], warp_size: int
) -> tuple[int, tuple[float | None, float]]:
    """`_loop_numbers` of a kernel of logprob_gain, per token of a pair."""
    sizes = launch.constants
    pairs = sizes.get("NEURONS", 1) * sizes["SENTENCES"]
    elements = pairs * sizes["BLOCK"] / (launch.num_warps * warp_size)
    bodies = sorted((body for body in loops if any(map(LOAD.search, body))), key=len)
    loads = [text for body in bodies for text in body if LOAD.search(text)]
    load_bytes = 16 if all(map(WIDE_LOAD.search, loads)) else 8
    lengths = [round(len(body) / elements, 2) for body in bodies]
    is_moments = name == "_gain_moments_kernel"
    costs = PRODUCT if is_moments else EXPONENTIAL
    has_costs = [any(map(costs.search, body)) for body in bodies]
    expected = [True] if is_moments else [False, True]
    assert has_costs == expected, f"{name} has loops with {costs.pattern}: {has_costs}"
    return load_bytes, (None if is_moments else lengths[0], lengths[-1])


def faults(row: Row, budget: Row | None) -> list[str]:
    """What the gate has against a row."""
    where = f"{', '.join(row.key)}: "
    found = []
    if row.spills:
        found.append(f"spills {row.spills} (bytes, on gfx942 registers)")
    if row.load_bytes is not None and row.load_bytes < 16:
        found.append("loads are narrower than 16 bytes")
    if row.narrow_products:
        found.append(f"{row.narrow_products} 32-bit products in offsets")
    for loop in ("blocks", "rows"):
        value = getattr(row, loop)
        if value is None:
            continue
        allowed = None if budget is None else getattr(budget, loop)
        if allowed is None:
            found.append(f"no budget for loop {loop}, run with --update")
        elif value > TOLERANCE * allowed:
            found.append(f"{value} instructions per element in loop {loop}, budget {allowed}")
        limit = LIMITS.get((row.target, row.dtype, row.variant, loop), float("inf"))
        if row.kernel == "_swiglu_stats_kernel" and value > limit:
            found.append(f"{value} instructions per element in loop {loop}, limit {limit}")
    return [where + fault for fault in found]


def read_budgets(path: Path = BUDGETS) -> dict[tuple[str, str, str, str], Row]:
    """The committed rows; only their instruction counts are compared."""
    if not path.exists():
        return {}

    def number(text: str) -> float | None:
        return float(text) if text else None

    with path.open(newline="") as file:
        rows = [
            Row(
                *(line[name] for name in ("target", "dtype", "variant", "kernel")),
                *(int(line[name]) for name in ("registers", "spills", "shared_bytes")),
                int(line["load_bytes"]) if line["load_bytes"] else None,
                number(line["blocks"]),
                number(line["rows"]),
                int(line["narrow_products"]),
            )
            for line in csv.DictReader(file)
        ]
    return {row.key: row for row in rows}


def write_budgets(rows: Iterable[Row], path: Path = BUDGETS) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(astuple(row) for row in rows)


def measure_case(case: tuple[str, str, str]) -> list[Row]:
    """The rows of one case, in a process of its own."""
    return [measure(*case, launch) for launch in launches(*case)]


def table(rows: Iterable[Row]) -> str:
    header = [field.name for field in fields(Row)]
    lines = [header] + [["-" if v is None else str(v) for v in astuple(row)] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.offline", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the main variants everywhere")
    parser.add_argument("--update", action="store_true", help="rewrite offline_budgets.csv")
    options = parser.parse_args(arguments)
    chosen = cases(options.quick and not options.update)
    # A cache of its own, so that nothing compiled earlier is measured.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor() as pool:
            measured = [row for rows in pool.map(measure_case, chosen) for row in rows]
    # A kernel that several variants launch in the same way stands in the table once per variant.
    rows = list({row.key: row for row in measured}.values())
    print(table(rows))
    if options.update:
        write_budgets(rows)
    budgets = read_budgets()
    found = [fault for row in rows for fault in faults(row, budgets.get(row.key))]
    for fault in found:
        print(fault, file=sys.stderr)
    print(f"{len(rows)} kernels, {len(found)} faults", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
