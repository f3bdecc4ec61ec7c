"""`python -m bench.offline --predict`: times of kernels on four GPUs, and which goals they meet.

Calls of swiglu_stats have 8,192 tokens of a layer of 11,008 neurons in bfloat16, twelve groups; a
ranking has the 835,584 neurons of a 7B model and a column of 3,400 or more prompts for each, an
attribution its 352,256 neurons, 32,000 tokens and many sentences, without the products of matrices
that come before. Columns of a ranking stand side by side: what one brings to L2 serves the next
seven. The times of others are what the bytes that they move take at the same bandwidth, so a ratio
is a bound of what a run may show.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import NamedTuple

from bench.offline.cases import GAINS, SORTS, SUMS, TARGETS, VARIANTS, compile_launch, launches
from bench.offline.code import sass
from bench.offline.model import ASSUMPTIONS, GPUS, Gpu, Prediction, predict
from bench.offline.work import work_of

N_TOKENS, WIDTH, N_LAYERS = 8192, 11008, 32
ELEMENTS = N_TOKENS * WIDTH
N_RANKED = N_LAYERS * (2 * WIDTH + 4096)
N_ATTRIBUTED = N_LAYERS * WIDTH
# What a launch of `cases.py` has of them.
COLUMNS, NEURONS, SENTENCES = 64, 1024, 64

Place = tuple[str, str, str]


class Compiled(NamedTuple):
    """A launch's code by its place in a case."""

    place: Place
    number: int
    code: str
    registers: int
    shared_bytes: int


def compile_case(place: Place) -> list[Compiled]:
    """In a process of the pool."""
    found = []
    for index, launch in enumerate(launches(*place)):
        compiled = compile_launch(launch, TARGETS[place[0]])
        code, usage = sass(compiled)
        registers = re.search(r"REG:(\d+)", usage)
        assert registers, f"cuobjdump says nothing of registers: {usage}"
        shared_bytes = compiled.metadata.shared
        found.append(Compiled(place, index, code, int(registers[1]), shared_bytes))
    return found


def places() -> list[Place]:
    """What is compiled, for each target once."""
    cases = [("bf16", variant) for variant in VARIANTS]
    cases += [("any", variant) for variant in (*SUMS, *GAINS)]
    cases += [(dtype, variant) for dtype in ("bf16", "fp32") for variant in list(SORTS)[-2:]]
    targets = dict.fromkeys(gpu.target for gpu in GPUS.values())
    return [(target, *case) for target in targets for case in cases]


@dataclass(frozen=True)
class Call:
    """The launches of a case on a GPU."""

    labels: Sequence[str]
    registers: Sequence[int]
    parts: Sequence[Prediction]

    @property
    def us(self) -> float:
        return sum(part.us for part in self.parts)


class Model:
    """Predictions of all cases for one GPU."""

    def __init__(self, gpu: Gpu, compiled: Iterable[Compiled]) -> None:
        self.gpu = gpu
        self.found: dict[tuple[str, str], list[Compiled]] = {}
        for one in compiled:
            if one.place[0] == gpu.target:
                self.found.setdefault(one.place[1:], []).append(one)

    def call(
        self,
        dtype: str,
        variant: str,
        *,
        is_mixed: bool = False,
        is_small: bool = False,
        times: float = 1.0,
    ) -> Call:
        """`times`: so many launches of the case's size, as one; the others: see `work_of`."""
        labels, registers, parts = [], [], []
        for one in self.found[dtype, variant]:
            launch = launches(*one.place)[one.number]
            work = work_of(
                launch,
                *one[2:],
                is_mixed=is_mixed,
                is_small=is_small,
            )
            work = replace(
                work,
                n_programs=round(work.n_programs * times),
                memory_bytes=work.memory_bytes * times,
            )
            labels.append(launch.kernel.__name__)
            registers.append(one.registers)
            parts.append(predict(work, self.gpu))
        return Call(labels, registers, parts)

    def copy_us(self, bytes_per_element: float) -> float:
        """What moving so many bytes for each element of a call takes."""
        return bytes_per_element * ELEMENTS / self.gpu.copy_bytes_per_us

    def ranking(self, dtype: str, rows: str, relations: str) -> float:
        """Seconds, sort and sums."""
        times = N_RANKED / COLUMNS
        # The sums of a case are over 4,096 rows.
        n_rows = int(rows.split()[1]) / 4096
        sort = self.call(dtype, rows, times=times).us
        return (sort + self.call("any", relations, times=times).us * n_rows) / 1e6

    def attribution(self, *, is_small: bool) -> float:
        """Milliseconds for a sentence, without the products b of all sentences."""
        us = self.call("any", "gain", is_small=is_small, times=N_ATTRIBUTED / NEURONS).us
        return us / SENTENCES / 1000


def _line(cells: Sequence[object]) -> str:
    widths = (26, 24, 5, 5, 6, 6, 7, 7, 7, 7, 8, 10)
    return " ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True))


def table(model: Model) -> list[str]:
    """Every kernel of every case."""
    header = "call kernel regs progs waves KiB memory issue MUFU shuffle predicted limiter"
    lines = [_line(header.split())]
    times = dict.fromkeys((*SORTS, *SUMS), N_RANKED / COLUMNS)
    times |= dict.fromkeys(GAINS, N_ATTRIBUTED / NEURONS)
    for dtype, variant in model.found:
        for order in ("", ", mixed groups"):
            if order and "sites" not in VARIANTS.get(variant, {}):
                continue
            call = model.call(dtype, variant, is_mixed=bool(order), times=times.get(variant, 1.0))
            for label, registers, part in zip(call.labels, call.registers, call.parts, strict=True):
                name = variant if dtype in ("bf16", "any") else f"{variant}, {dtype}"
                units = [f"{part.unit_us.get(u, 0.0):.0f}" for u in ("issue", "MUFU", "shuffle")]
                lines.append(
                    _line(
                        [
                            (name + order)[:26],
                            label,
                            registers,
                            part.resident,
                            f"{part.waves:.1f}",
                            f"{part.in_flight / 1024:.0f}",
                            f"{part.memory_us:.0f}",
                            *units,
                            f"{part.us:.0f} us",
                            part.limiter,
                        ]
                    )
                )
    return lines


class Goal(NamedTuple):
    """A figure of PERFORMANCE.md, section 11: at least, or at most, `must`."""

    name: str
    value: float
    must: float
    unit: str
    is_least: bool = True
    reason: str = ""  # why not

    @property
    def is_met(self) -> bool:
        return self.value >= self.must if self.is_least else self.value <= self.must


PARTIAL_SUMS = """\
  12 groups in a tile of 128 tokens leave 10 (gate, up, act) or 12 (all sites) rows of float32 each,
  3.75 or 4.5 bytes an element that are written and read again, beside 6 for gate, up and h."""
OF_H200 = """\
  The goal is that of an H200, scaled by special functions; an A100 has half the units of float32,
  and an RTX 4090 two of float64, which add up the spans."""


def goals(model: Model) -> list[Goal]:
    count = model.call("bf16", "count").us
    at_act = model.call("bf16", "all at act, conditions")
    at_three = model.call("bf16", "all at gate, up, act").us
    at_all = model.call("bf16", "all at all sites").us
    mixed = {
        variant: model.call("bf16", variant, is_mixed=True).us / model.call("bf16", variant).us
        for variant in (
            "count",
            "all at act, conditions",
            "all at gate, up, act",
            "all at all sites",
        )
    }
    responses = model.call("bf16", "responses").us
    one = model.ranking("fp32", "rank 4096 rows", "rank for 1 relation")
    twelve = model.ranking("fp32", "rank 4096 rows", "rank for 12 relations")
    long = model.ranking("fp32", "rank 8192 rows", "rank for 12 relations")
    # The times of an H200 in those that bandwidth, or special functions, allow another GPU.
    h200, gpu = GPUS["H200"], model.gpu
    share = h200.copy_bytes_per_us / gpu.copy_bytes_per_us
    functions = h200.n_multiprocessors * h200.ghz / (gpu.n_multiprocessors * gpu.ghz)
    return [
        # Eager SwiGLU, hook and one-hot product move 31 bytes an element.
        Goal("P1 counts against the eager hook", model.copy_us(31) / count, 4.5, "x"),
        Goal("P2 share of a copy's bandwidth", model.copy_us(6) / count, 0.90, ""),
        # Which reaches 0.98 of a copy.
        Goal("P3 against plain SwiGLU", count / (model.copy_us(6) / 0.98), 1.05, "x", False),
        Goal("P4 all statistics, masks to counts", at_act.us / count, 1.15, "x", False),
        # h in one kernel, its rereading for the sum: 8 bytes; by relation 43, and atomics.
        Goal("P5 against compiled sum(0)", model.copy_us(8) / count, 1.3, "x"),
        Goal("P5 against compiled index_add", model.copy_us(43) / count, 5, "x"),
        # SwiGLU 10 bytes, then a product with the mask and a sum for each of three sites.
        Goal("P7 against eager means", model.copy_us(10 + 3 * 10) / responses, 3, "x"),
        # Sorting 0.20 s of an H200 and 0.05 s for a relation.
        Goal("P11 against batched torch", 0.25 * share / one, 1.3, "x"),
        Goal("P11 against scikit-learn", 1404 / one, 7000, "x"),
        Goal("P12 against batched torch", 0.8 * share / twelve, 2, "x"),
        Goal("P12 against scikit-learn", 4.7 * 3600 / twelve, 30000, "x"),
        Goal("P12 of 8,192 rows, scikit-learn", 2 * 4.7 * 3600 / long, 30000, "x"),
        *[
            Goal(
                f"P14 a sentence, {name}",
                model.attribution(is_small=is_small),
                4.5 * functions,
                "ms",
                False,
                OF_H200,
            )
            for name, is_small in (("all |y| <= 0.5", True), ("exponentials for all", False))
        ],
        Goal("   moments and masks at act", at_act.us, 170 * share, "us", False),
        Goal("   moments at gate, up, act", at_three, 340 * share, "us", False),
        Goal("   moments at all sites", at_all, 450 * share, "us", False),
        *[
            Goal(f"   mixed groups, {name}", value, 1.5, "x sorted", False, PARTIAL_SUMS)
            for name, value in mixed.items()
        ],
    ]


def report(pool: Executor) -> str:
    compiled = [one for found in pool.map(compile_case, places()) for one in found]
    lines = [ASSUMPTIONS, "", __doc__.split("\n\n", 1)[1].strip()]
    for gpu in GPUS.values():
        model = Model(gpu, compiled)
        lines += ["", f"## {gpu.name}", "", *table(model), ""]
        for goal in goals(model):
            sign, verdict = ">=" if goal.is_least else "<=", "yes" if goal.is_met else "NO"
            lines.append(
                f"{goal.name:44} {goal.value:10.2f} {goal.unit:8} {sign} {goal.must:8.2f} {verdict}"
            )
            if not goal.is_met and goal.reason:
                lines.append(goal.reason)
    return "\n".join(lines)
