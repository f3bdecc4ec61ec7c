"""The tables of compiled kernels, `budgets/`, and what the gate has against a row of it."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import triton
from torch import Tensor

from bench.offline.cases import TARGETS, code_digest, compile_launch, digest
from bench.offline.code import (
    EXPONENTIAL,
    LOAD,
    PRODUCT,
    STORE,
    WIDE_LOAD,
    amd_loops,
    amd_waits,
    distance,
    narrow_products,
    sass,
    sass_loops,
    waits,
)
from bench.offline.model import GATED, GPUS, predict
from bench.offline.work import n_inputs, of_rows, work_of
from relneuron.ops import SITES
from relneuron.ops.swiglu_stats.triton_launch import Launch

# Of a row: target, dtype, variant, kernel.
Key = tuple[str, str, str, str]

# A file for each version of Triton that the rows were measured with.
BUDGETS = Path(__file__).with_name("budgets")
VERSION = ".".join(triton.__version__.split(".")[:2])
TOLERANCE = 1.10
# Upper limits that no `--update` moves: (target, dtype, variant, loop) -> instructions per element.
LIMITS = {
    ("sm_90", "bf16", "count", "blocks"): 14.0,
    ("sm_90", "bf16", "count, one condition", "blocks"): 17.0,
    # With the copies ahead; 21.6 without them, and three times the waiting.
    ("sm_90", "bf16", "all at act, conditions", "rows"): 28.0,
}
# How often a turn of a loop may wait for loads of 16 bytes: once for all that it needs. The second
# stage of moments first looks whose the rows are.
WAITS = {
    "_swiglu_stats_kernel": 1,
    "_responses_kernel": 1,
    "_moments_kernel": 2,
    "_sum_kernel": 1,
    "_peaks_kernel": 1,
    "_histogram_kernel": 1,
    # What logprob_gain loads, other programs have loaded: it waits for L2, while others work.
    "_gain_kernel": 3,
    "_gain_list_kernel": 4,
    "_gain_moments_kernel": 1,
}
# Kernels that a case launches for a few columns or neurons: the limiter is that of so many of it.
SMALL = ("_sort_kernel", "_sum_kernel", "_gain_kernel", "_gain_list_kernel", "_gain_moments_kernel")
SMALL_TIMES = 1000
# Instructions from the first load of a turn to its last, for each load.
APART = 12
# Spills that are known, none of them in a loop; on gfx942 of scalar registers, which are cheap.
SPILLS = {
    # More registers would cost half the programs with newer versions.
    ("3.6", "sm_90", "fp32", "residual"): 8,
    ("3.6", "sm_100", "fp32", "residual"): 8,
    ("3.6", "sm_100", "fp16", "responses"): 8,
    ("3.6", "gfx942", "bf16", "all at all sites"): 3,
    ("3.6", "gfx942", "fp16", "all at all sites"): 2,
}


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
    # Of the loop that does so most: waits for loads of 16 bytes in a turn, and instructions from
    # the first of them to the last, for each; asynchronous copies are not counted.
    waits: int | None
    apart: float | None
    # KiB of a multiprocessor that are under way while it waits, and what is predicted to limit the
    # kernel, see `model.py`; of targets in GATED.
    in_flight: float | None
    limiter: str
    # Instructions per element of the two loops, see above.
    blocks: float | None
    rows: float | None
    narrow_products: int
    # What was compiled: our part of it, which every version of Triton sees (see `code_digest`), and
    # all of it (see `digest`).
    code: str = ""
    source: str = ""

    @property
    def key(self) -> Key:
        return self.target, self.dtype, self.variant, self.kernel


def label(launch: Launch) -> str:
    """The kernel's name; the moments of a call are a launch per site."""
    site = launch.constants.get("SITE")
    name: str = launch.kernel.__name__
    return name + ("" if site is None else f" of {SITES[site]}")


def measure(target: str, dtype: str, variant: str, launch: Launch) -> Row:
    kind = TARGETS[target]
    compiled = compile_launch(launch, kind)
    if kind.backend == "cuda":
        code, usage = sass(compiled)
        numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        assert numbers, f"cuobjdump says nothing of registers: {usage}"
        registers, stack, _, local = (int(number) for number in numbers.groups())
        shared = compiled.metadata.shared
        spills, (all_code, loops) = stack + local, sass_loops(code)
    else:
        code = compiled.asm["amdgcn"]

        def number(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])  # type: ignore[index]

        registers, shared = number("vgpr_count"), number("group_segment_fixed_size")
        spills = number("vgpr_spill_count") + number("sgpr_spill_count")
        all_code, loops = amd_loops(code)
    name = launch.kernel.__name__
    # Only the main kernel stores in a loop: else it is code that was moved behind the end, which
    # jumps back.
    of_loads = [
        body
        for body in loops
        if any(map(WIDE_LOAD.search, body))
        and (name == "_swiglu_stats_kernel" or not any(map(STORE.search, body)))
    ]
    n_waits, apart, in_flight, limiter = None, None, None, ""
    if of_loads:
        is_nvidia = kind.backend == "cuda"
        n_waits = max(
            (waits if is_nvidia else amd_waits)(body).n // _turns(launch, body) for body in of_loads
        )
        apart = max(_apart(body) for body in of_loads)
    if target in GATED:
        work = work_of(launch, code, registers, shared)
        if name in SMALL:
            n = SMALL_TIMES
            work = replace(work, n_programs=n * work.n_programs, memory_bytes=n * work.memory_bytes)
        prediction = predict(work, GPUS[GATED[target]])
        in_flight, limiter = prediction.in_flight / 1024, prediction.limiter
    if name in ("_moments_kernel", "_histogram_kernel", "_sort_kernel"):
        # The first has a branch around the loads, the second one around each of its atomics, which
        # compilers turn into loops of all shapes.
        loops = [all_code]
    load_bytes, per_element = _loop_numbers(name, launch, loops, kind.warp_size)
    return Row(
        target,
        dtype,
        variant,
        label(launch),
        registers,
        spills,
        shared,
        load_bytes,
        n_waits,
        apart,
        in_flight,
        limiter,
        per_element[0],
        per_element[1],
        len(narrow_products(compiled.asm["ttir"])),
        code_digest(launch, kind),
        digest(launch, kind),
    )


def _turns(launch: Launch, body: list[str]) -> int:
    """How many turns of the source's loop the compiler has made one: a short one, in float32."""
    if launch.kernel.__name__ != "_swiglu_stats_kernel":
        return 1
    n_loads = sum(bool(WIDE_LOAD.search(text)) for text in body)
    return max(1, n_loads // n_inputs(launch))


def _apart(body: list[str]) -> float:
    n_loads = sum(bool(WIDE_LOAD.search(text)) for text in body)
    return round(distance(body) / n_loads, 1)


def _loop_numbers(
    name: str, launch: Launch, loops: list[list[str]], warp_size: int
) -> tuple[int | None, tuple[float | None, float | None]]:
    """(narrowest load, instructions per element of `blocks` and of `rows`)."""
    if name in ("_span_kernel", "_merge_kernel"):
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
    n_tensors = 1 if name == "_moments_kernel" else n_inputs(launch)
    turn_bytes = n_tensors * n_elements // (launch.num_warps * warp_size) * gate.element_size()
    widths, per_element = [], []
    for body in loops:
        wanted = of_rows(launch) if is_main else WIDE_LOAD
        if not any(wanted.search(text) for text in body):
            continue
        # More than one turn where the compiler has unrolled the loop.
        wide_bytes = 16 * sum(bool(WIDE_LOAD.search(text)) for text in body)
        widths.append(16 if wide_bytes >= turn_bytes else 8)
        elements = max(turn_bytes, wide_bytes) / gate.element_size() / n_tensors
        per_element.append(round(len(body) / elements, 1))
    if name in ("_moments_kernel", "_histogram_kernel"):
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


def faults(row: Row, budget: Row | None, version: str = VERSION) -> list[str]:
    """What the gate has against a row."""
    where = f"{', '.join(row.key)}: "
    found = []
    if budget is not None and budget.source == row.source and budget != row:
        found.append(f"the same code was measured as {budget}, now as {row}")
    if row.spills > SPILLS.get((version, *row.key[:3]), 0):
        found.append(f"spills {row.spills} (bytes, on gfx942 registers)")
    if row.load_bytes is not None and row.load_bytes < 16:
        found.append("loads are narrower than 16 bytes")
    name = row.kernel.split()[0]
    if row.waits is not None and row.waits > WAITS[name]:
        found.append(f"a turn waits {row.waits} times for what it loads")
    is_nvidia = TARGETS[row.target].backend == "cuda"
    if is_nvidia and row.apart is not None and row.apart > APART and not name.startswith("_gain"):
        found.append(f"loads are {row.apart} instructions apart")
    if budget is not None and row.in_flight is not None and budget.in_flight is not None:
        if row.in_flight < budget.in_flight / TOLERANCE:
            found.append(f"{row.in_flight} KiB under way, before {budget.in_flight}")
        if row.limiter != budget.limiter:
            found.append(f"limited by {row.limiter}, before by {budget.limiter}")
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


def versions() -> list[str]:
    """Of Triton, those with a file of budgets, in order."""
    return sorted(
        (path.stem for path in BUDGETS.glob("*.csv")),
        key=lambda version: [int(part) for part in version.split(".")],
    )


def read_budgets(version: str = VERSION) -> dict[Key, Row]:
    """The committed rows of a version of Triton; none if it has none."""
    path = BUDGETS / f"{version}.csv"
    if not path.exists():
        return {}

    def number(text: str) -> float | None:
        return float(text) if text else None

    with path.open(newline="") as file:
        rows = [
            Row(
                target=line["target"],
                dtype=line["dtype"],
                variant=line["variant"],
                kernel=line["kernel"],
                registers=int(line["registers"]),
                spills=int(line["spills"]),
                shared_bytes=int(line["shared_bytes"]),
                load_bytes=int(line["load_bytes"]) if line["load_bytes"] else None,
                waits=int(line["waits"]) if line["waits"] else None,
                apart=number(line["apart"]),
                in_flight=number(line["in_flight"]),
                limiter=line["limiter"],
                blocks=number(line["blocks"]),
                rows=number(line["rows"]),
                narrow_products=int(line["narrow_products"]),
                code=line["code"],
                source=line["source"],
            )
            for line in csv.DictReader(file)
        ]
    return {row.key: row for row in rows}


def faults_of_others(launches: Iterable[tuple[Key, str]]) -> list[str]:
    """What the gate has against the rows of the versions of Triton that are not here.

    They are gated as they stand, if they are of the code that is here: (key, `code_digest`) each.
    """
    found = []
    others = {version: read_budgets(version) for version in versions() if version != VERSION}
    for key, code in launches:
        for version, rows in others.items():
            row = rows.get(key)
            if row is None or row.code != code:
                found.append(
                    f"{', '.join(key)}: not measured with Triton {version}, see CONTRIBUTING"
                )
            else:
                found += [f"Triton {version}: {fault}" for fault in faults(row, row, version)]
    return found


def write_budgets(rows: Iterable[Row]) -> None:
    BUDGETS.mkdir(exist_ok=True)
    with (BUDGETS / f"{VERSION}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(astuple(row) for row in rows)
