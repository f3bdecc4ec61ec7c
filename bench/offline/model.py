"""How long a compiled kernel takes on a GPU that is not here: a prediction, and what limits it.

Nothing here was measured. What the numbers are taken from stands beside them, and
`python -m bench.offline --predict` prints it with every table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bench.offline.code import Waits

ASSUMPTIONS = """\
Predictions, not measurements. Assumed:
- memory: what a copy reaches on the GPU (4.3 TB/s on an H200, 3.0 on an H100, 1.75 on an A100, 0.92
  on an RTX 4090); every tensor of a call is moved once; what programs share comes from L2;
- latency: 700 ns until a load from memory is here, 300 ns from L2, 60 ns for ids and bits of masks,
  most of which are in L1. Loads that are under way together come together. A loop with n turns of
  asynchronous copies under way waits for the oldest one, which had n - 1 turns' time;
- instructions: per clock and multiprocessor 128 are issued (lanes), and the unit of each kind takes
  as many as NVIDIA's table of throughputs says (16 special functions, 32 shuffles, 64 of integers,
  comparisons and logic, 128 of float32 on sm_89 and sm_90 and 64 on sm_80, 64, 32 or 2 of float64);
  one warp by itself issues every second clock;
- programs: as many as registers, shared memory and threads allow, started in order; each
  multiprocessor has the same number of them, rounded up, and the last ones share it with fewer;
- a kernel takes the longest of its memory time and its programs' time, and 2 us of launch. What a
  program does outside of its loops is counted once, also what only other inputs need (a sort, the
  second reading of values that are not finite).
An RTX 4090 (sm_89) is given the code of sm_80."""

LAUNCH_US = 2.0
MEMORY_NS = 700.0
L2_NS = 300.0
NARROW_NS = 60.0
# Clocks from one instruction of a warp to its next.
SPACING = 2.0
WARP = 32


@dataclass(frozen=True)
class Gpu:
    """Of a multiprocessor per clock: lanes of each unit; products of tf32 in tensor cores."""

    name: str
    target: str
    n_multiprocessors: int
    ghz: float
    copy_bytes_per_us: float
    float32: float
    float64: float
    tensor: float
    max_threads: int
    max_programs: int
    shared_bytes: int
    registers: int = 65536

    def lanes(self, unit: str) -> float:
        return {
            "issue": 128.0,
            "float32": self.float32,
            "float64": self.float64,
            "integer": 64.0,
            "MUFU": 16.0,
            "shuffle": 32.0,
            "tensor": self.tensor,
        }[unit]

    def resident(self, registers: int, n_warps: int, shared_bytes: int) -> int:
        """Programs of a multiprocessor at a time. A warp's registers come in pieces of 256."""
        per_warp = math.ceil(max(registers, 1) * WARP / 256) * 256
        return min(
            self.registers // (per_warp * n_warps),
            self.max_threads // (WARP * n_warps),
            self.max_programs,
            # 1 KiB of each program is the system's.
            self.shared_bytes // (shared_bytes + 1024),
        )


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", "sm_90", 132, 1.83, 4.3e6, 128, 64, 1024, 2048, 32, 228 << 10),
        Gpu("H100", "sm_90", 132, 1.83, 3.0e6, 128, 64, 1024, 2048, 32, 228 << 10),
        Gpu("A100", "sm_80", 108, 1.41, 1.75e6, 64, 32, 512, 2048, 32, 164 << 10),
        Gpu("RTX 4090", "sm_80", 128, 2.52, 0.92e6, 128, 2, 256, 1536, 24, 100 << 10),
    )
}
# The one that stands in the table of budgets for a target.
GATED = {"sm_90": "H200", "sm_80": "A100"}

UNITS = (
    ("MUFU", r"MUFU|F2F\b|F2I\b|I2F\b|FRND|POPC|FLO|BREV"),
    ("float64", r"D(?:ADD|MUL|FMA|SETP|MNMX)"),
    ("tensor", r"HMMA|HGMMA"),
    ("shuffle", r"(?:SHFL|LDSM?|STSM?|LDG(?:STS)?|STG|RED(?:UX)?|ATOM[GS]?|LDL|STL)\b"),
    ("float32", r"F(?:ADD|MUL|FMA)|H(?:ADD|MUL|FMA|SET)2|IMAD|IDP"),
    (
        "none",
        r"U[A-Z]|R2UR|S2U?R|CS2R|BRA|BSSY|BSYNC|BAR|EXIT|NOP|WARPSYNC|DEPBAR|LDGDEPBAR|LDC|ERR",
    ),
)


def unit_of(text: str) -> tuple[str, float]:
    """(the unit of an instruction of SASS, lanes of it that a warp takes)."""
    name = re.sub(r"^@!?U?P\w+\s+", "", text)
    for unit, pattern in UNITS:
        if not re.match(pattern, name):
            continue
        if unit == "tensor":
            sizes = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name)
            # m16n8k8 of a warp, or a quarter of what four warps multiply together.
            return unit, math.prod(map(int, sizes.groups())) / 4 if sizes else 1024.0
        if unit == "shuffle":
            # 128 bytes of a warp at a time.
            return unit, WARP * (4.0 if ".128" in name else 2.0 if ".64" in name else 1.0)
        # Half the units of float32 multiply integers, where there are 128.
        return unit, WARP * (2.0 if name.startswith("IMAD") else 1.0)
    return "integer", float(WARP)


@dataclass(frozen=True)
class Part:
    """Instructions that a program executes `turns` times, and how each turn waits for loads."""

    body: Sequence[str]
    turns: float
    waits: Waits = Waits(0, 0, 0)
    turn_bytes: int = 0  # of the wide loads of a thread, 0 = none
    is_cached: bool = False  # they come from L2

    def lanes(self) -> dict[str, float]:
        """Of each unit, in one turn of a warp."""
        found: dict[str, float] = {"issue": float(WARP * len(self.body))}
        for text in self.body:
            unit, lanes = unit_of(text)
            found[unit] = found.get(unit, 0.0) + lanes
        found.pop("none", None)
        return found

    def latency_ns(self, gpu: Gpu) -> float:
        """Of a turn that nothing else holds up."""
        own = len(self.body) * SPACING / gpu.ghz
        far = L2_NS if self.is_cached else MEMORY_NS
        depth = self.waits.in_flight / self.turn_bytes if self.turn_bytes else 1.0
        wide = far * self.waits.n
        if depth >= 2:
            return max(own, wide / (depth - 1)) + NARROW_NS * self.waits.n_narrow
        return own + wide + NARROW_NS * self.waits.n_narrow


@dataclass(frozen=True)
class Work:
    """What one launch does."""

    n_programs: int
    n_warps: int
    registers: int
    shared_bytes: int
    parts: Sequence[Part]
    memory_bytes: float


@dataclass(frozen=True)
class Prediction:
    us: float
    limiter: str
    resident: int
    waves: float
    in_flight: int  # bytes under way of a multiprocessor
    memory_us: float
    # What each unit would take by itself, "issue" among them, and the waiting.
    unit_us: dict[str, float]


def predict(work: Work, gpu: Gpu) -> Prediction:
    k = max(1, gpu.resident(work.registers, work.n_warps, work.shared_bytes))
    share = math.ceil(work.n_programs / gpu.n_multiprocessors)

    def units_ns(part: Part, n: int) -> dict[str, float]:
        return {
            unit: n * work.n_warps * lanes * part.turns / gpu.lanes(unit) / gpu.ghz
            for unit, lanes in part.lanes().items()
        }

    def wave_ns(n: int) -> float:
        return sum(
            max(part.turns * part.latency_ns(gpu), *units_ns(part, n).values())
            for part in work.parts
        )

    full, rest = divmod(share, k)
    programs_us = (full * wave_ns(k) + (wave_ns(rest) if rest else 0.0)) / 1000
    memory_us = work.memory_bytes / gpu.copy_bytes_per_us
    totals: dict[str, float] = {}
    for part in work.parts:
        for unit, time in units_ns(part, 1).items():
            totals[unit] = totals.get(unit, 0.0) + time * share / 1000
    limiter = "memory"
    if programs_us > memory_us:
        busiest = max(totals, key=lambda unit: totals[unit])
        # Neither the units nor the memory are busy: waiting, or too few programs to share it.
        is_busy = totals[busiest] > 0.8 * programs_us
        limiter = busiest if is_busy else "waves" if full < 2 and rest else "latency"
    in_flight = max((part.waits.in_flight for part in work.parts), default=0)
    return Prediction(
        us=max(memory_us, programs_us) + LAUNCH_US,
        limiter=limiter,
        resident=k,
        waves=share / k,
        in_flight=k * work.n_warps * WARP * in_flight,
        memory_us=memory_us,
        unit_us=totals,
    )
