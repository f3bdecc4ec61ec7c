"""Times the ops against their peers on this machine: correct first, then in the same rounds.

`relneuron bench`, the pytest suites in bench/ and bench/gpu.py call it. bench/suite.py says who
takes part, bench/plot.py draws what came out.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch

from relneuron.artifact.files import RelneuronError, atomic_write, csv_bytes
from relneuron.artifact.manifest import locked
from relneuron.artifact.reading import read_csv
from relneuron.bench.case import Case, Contestant
from relneuron.bench.machine import where
from relneuron.bench.own import Own
from relneuron.bench.sizes import SUITES
from relneuron.bench.suite import CONTESTANTS

# (run, n_calls) -> milliseconds of each call. `run` takes the number of the call.
Timer = Callable[[Callable[[int], object], int], list[float]]


@dataclass(frozen=True)
class Effort:
    """How long is measured: rounds, and in each the time that every contestant gets."""

    rounds: int
    slice_ms: float


EFFORTS = {"quick": Effort(3, 2), "usual": Effort(9, 60), "full": Effort(15, 60)}
# Whoever needs more than SLOW times our own time is measured in the first third of the rounds only,
# or they would take most of the time.
SLOW = 4.0
# A working set that no processor's cache holds.
BEYOND_CACHES_BYTES = 1 << 29


@dataclass(frozen=True)
class Row:
    """A line of results/<machine>.csv: one contestant in one case. Times are of one call.

    median_ms is the median over the rounds of each round's median, min_ms the fastest call. ratio
    is the time over that of relneuron's own first variant (count, ap), or in the same variant if
    relneuron is the base there (ap, 1 thread): the median over the rounds of the ratio within a
    round. bytes is the least the task moves, GB_s = bytes / median_ms, and share_triad and
    share_copy are GB_s over that of torch.add(gate, up, out=out) and of out.copy_(gate) in the
    same rounds. moved_bytes is what the peer's formula moves. A wrong contestant is not timed:
    correct is 0 and note says what is wrong.
    """

    op: str
    device: str
    dtype: str
    T: int
    F: int
    G: int
    layout: str
    variant: str
    contestant: str
    median_ms: float | None
    min_ms: float | None
    n_rounds: int
    bytes: int
    moved_bytes: int
    GB_s: float | None
    ratio: float | None
    share_triad: float | None
    share_copy: float | None
    correct: int | None
    note: str
    timing: str
    date: str
    machine: str
    processor: str
    threads: int
    python: str
    torch: str
    triton: str
    relneuron: str
    commit: str
    rounds_ms: tuple[float, ...] = ()  # the median of each round; not in the csv


COLUMNS = [field.name for field in fields(Row) if field.name != "rounds_ms"]


# --- timing ----------------------------------------------------------------------------------


def wall_timer(run: Callable[[int], object], n_calls: int) -> list[float]:
    """The clock of this process, for work that is done when `run` returns."""
    times = []
    for number in range(n_calls):
        start = time.perf_counter_ns()
        run(number)
        times.append((time.perf_counter_ns() - start) / 1e6)
    return times


def event_timer(run: Callable[[int], object], n_calls: int) -> list[float]:
    """CUDA events around every call: the GPU's time, as far as the host keeps ahead of it.

    The GPU first sleeps for as long as the host takes to queue the calls (0.3 ms each at most).
    """
    cuda: Any = torch.cuda
    events = [[cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n_calls)]
    cuda._sleep(600_000 * min(n_calls, 100))  # cycles of about half a nanosecond
    for number, (start, end) in enumerate(events):
        start.record()
        run(number)
        end.record()
    cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def graph_timer(run: Callable[[int], object], n_calls: int) -> list[float]:
    """CUDA graphs of `n_calls` calls, replayed: no launch from the host is in the time."""
    n_calls = min(n_calls, 50)
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(n_calls):
            run(number)
    graph.replay()
    return [ms / n_calls for ms in event_timer(lambda _: graph.replay(), 5)]


def measure(
    contestants: Sequence[Contestant], timer: Timer, effort: Effort
) -> list[list[list[float]]]:
    """Milliseconds of every call of every contestant in every round; the first is the base.

    In each round everybody has its turn, in an order drawn again, so that a drift of the machine
    meets all alike. A turn opens with a call that is not timed, since whoever had the turn before
    left its own data in the caches; beyond their size that call is saved.
    """
    once = []
    for contestant in contestants:
        with contestant.around():
            once.append(timer(contestant.run, 2)[-1])
    n_calls = [max(1, min(200, int(effort.slice_ms / max(ms, 1e-3)))) for ms in once]
    samples: list[list[list[float]]] = [[] for _ in contestants]
    order = list(range(len(contestants)))
    draw = random.Random(0)
    for number in range(effort.rounds):
        draw.shuffle(order)
        for i in order:
            contestant = contestants[i]
            if once[i] > SLOW * once[0] and 3 * number >= effort.rounds:
                continue
            with contestant.around():
                if contestant.n_bytes < BEYOND_CACHES_BYTES:
                    contestant.run(0)
                samples[i].append(timer(contestant.run, n_calls[i]))
    return samples


def ratio(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """How many times our time theirs is: the median over the rounds that both were in."""
    return median(median(b) / median(a) for a, b in zip(ours, theirs, strict=False) if min(a) > 0)


# --- rows ------------------------------------------------------------------------------------


def run_case(
    case: Case,
    *,
    device: str = "cpu",
    compiled: bool = True,
    effort: Effort = EFFORTS["usual"],
    timer: Timer | None = None,
    contestants: Sequence[Contestant] | None = None,
    own: Own | None = None,
) -> list[Row]:
    """Check everybody who takes part, time those who are right, and give a row for each."""
    with torch.no_grad(), warnings.catch_warnings():
        # torch.compile's own imports warn of what torch deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        if contestants is None:
            n_sets = _n_sets(case, device)
            more = {} if own is None else {"own": own}
            contestants = CONTESTANTS[case.op](case, device, n_sets, compiled, **more)
        notes = [_verdict(contestant) for contestant in contestants]
        right = [c for c, (correct, _) in zip(contestants, notes, strict=True) if correct]
        for contestant, (correct, note) in zip(contestants, notes, strict=True):
            if not correct and (contestant is contestants[0] or contestant.is_base):
                raise RelneuronError(
                    f"{case}: relneuron itself is wrong here: {note}",
                    "run the tests (pytest tests), and report what they say",
                )
        chosen = timer or (wall_timer if device == "cpu" else event_timer)
        samples = dict(zip(map(id, right), measure(right, chosen, effort), strict=True))
    place = where(device) | {"timing": chosen.__name__.removesuffix("_timer")}
    bases = {c.variant: samples[id(c)] for c in contestants if c.is_base}
    ceilings = {c.name: (samples[id(c)], c.n_bytes) for c in right if c.variant == "ceiling"}
    rows = []
    for contestant, (correct, note) in zip(contestants, notes, strict=True):
        values: dict[str, Any] = dict.fromkeys(
            ("median_ms", "min_ms", "GB_s", "ratio", "share_triad", "share_copy")
        )
        mine = samples.get(id(contestant), [])
        if mine:
            values["median_ms"] = median(map(median, mine))
            values["min_ms"] = min(map(min, mine))
            values["GB_s"] = contestant.n_bytes / values["median_ms"] / 1e6
            base = bases.get(contestant.variant, samples[id(contestants[0])])
            values["ratio"] = ratio(base, mine)
            for name, (theirs, n_bytes) in ceilings.items():
                values[f"share_{name}"] = ratio(mine, theirs) * contestant.n_bytes / n_bytes
        with contestant.around():
            values["threads"] = torch.get_num_threads()
        rows.append(
            Row(
                **vars(case) | place | values,
                device=device,
                variant=contestant.variant,
                contestant=contestant.name,
                n_rounds=len(mine),
                bytes=contestant.n_bytes,
                moved_bytes=contestant.moved_bytes,
                correct=None if contestant.missing else int(correct),
                note=note or contestant.note,
                rounds_ms=tuple(map(median, mine)),
            )
        )
    return rows


def _n_sets(case: Case, device: str) -> int:
    """On a GPU the inputs rotate over more than three times its L2 cache."""
    if device == "cpu":
        return 1
    size = 3 * case.T * case.F * getattr(torch, case.dtype).itemsize
    l2 = torch.cuda.get_device_properties(torch.device(device)).L2_cache_size
    return int(-(-3 * l2 // size))


def _verdict(contestant: Contestant) -> tuple[bool, str]:
    """Whether somebody may be timed, and if not, why: it is not here, fails or is wrong."""
    if contestant.missing:
        return False, contestant.missing
    try:
        contestant.check()
    except AssertionError as error:
        return False, f"wrong: {_line(error)}"
    except Exception as error:  # of whatever library the peer is made of
        return False, f"fails: {type(error).__name__}: {_line(error)}"
    return True, ""


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


# --- what is asked for, and what is told -----------------------------------------------------


def choose_cases(
    suite: str, op: str | None, dtypes: Sequence[str], tokens: Sequence[int]
) -> list[Case]:
    """The cases of a suite; `dtypes` and `tokens` replace those of its swiglu_stats cases."""
    if op is not None and op not in CONTESTANTS:
        raise RelneuronError(f"unknown op {op!r}", f"use {' or '.join(CONTESTANTS)}", 2)
    for dtype in dtypes:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise RelneuronError(f"unknown dtype {dtype!r}", "use float32, bfloat16, float16", 2)
    if any(n < 1 for n in tokens):
        raise RelneuronError("--tokens must be at least 1", "give numbers such as 2048,8192", 2)
    cases: dict[Case, None] = {}
    for case in SUITES[suite]:
        if op not in (None, case.op):
            continue
        if case.op != "swiglu_stats":
            cases[case] = None
            continue
        for dtype in dtypes or [case.dtype]:
            for n in tokens or [case.T]:
                cases[Case(case.op, dtype, n, case.F, case.G, case.layout)] = None
    return list(cases)


def summary(rows: Sequence[Row]) -> Iterator[tuple[str, str, float]]:
    """(what, who, ratio): times of the strongest peers over ours, of the rows of one case."""
    questions: list[tuple[str, str, str]] = [
        ("SwiGLU that counts nothing, compiled", "swiglu", "compile"),
        ("counting as the LAPE authors do", "total", "eager lape"),
        ("best eager counting, no relations", "total", "eager"),
        ("best compiled counting, no relations", "total", "compile"),
        ("best eager counting per relation, not tuned", "count", "eager|"),
        ("best eager counting per relation", "count", "eager"),
        ("best compiled counting per relation", "count", "compile"),
        ("best eager counting, not gated, to ours", "ungated", "eager"),
        ("best compiled counting, not gated, to ours", "ungated", "compile"),
        ("triad", "ceiling", "triad"),
        ("ours, with moments and 13 masks", "moments+masks", "relneuron"),
        ("ours, with responses of gate, up, product", "responses", "relneuron"),
        ("ours, with all of it", "all", "relneuron"),
        ("best eager, a, b and difference", "pair", "eager"),
        ("best compiled, a, b and difference", "pair", "compile"),
        ("best eager, difference alone, to ours", "difference", "eager"),
        ("best compiled, difference alone, to ours", "difference", "compile"),
        ("best batched sort", "ap", "batched"),
        ("scikit-learn, a call a column", "ap", "sklearn"),
        ("torchmetrics, a call a column", "ap", "torchmetrics"),
        ("best batched sort, both on one thread", "ap, 1 thread", "batched"),
        ("scikit-learn, a call a column, both on one thread", "ap, 1 thread", "sklearn"),
        ("torchmetrics, a call a column, both on one thread", "ap, 1 thread", "torchmetrics"),
    ]
    for what, variant, prefix in questions:
        found = [
            (row.ratio, row.contestant)
            for row in rows
            if row.variant == variant
            and row.ratio is not None
            and row.contestant.startswith(prefix.removesuffix("|"))
            and not (prefix.endswith("|") and row.contestant.endswith("tuned"))
        ]
        if found:
            value, who = min(found)
            yield what, who, value


def append_rows(folder: Path, rows: Sequence[Row]) -> Path:
    """Add `rows` to <folder>/<machine>.csv; older rows stay, so that the file is a history."""
    path = folder / f"{rows[0].machine}.csv"
    old: list[Sequence[object]] = []
    with locked(folder):
        if path.exists():
            old = [[row[name] for name in COLUMNS] for row in read_csv(path, COLUMNS)]
        atomic_write(path, csv_bytes(COLUMNS, [*old, *map(cells, rows)]))
    return path


def cells(row: Row) -> list[object]:
    """A row as it stands in the csv."""
    values = [getattr(row, name) for name in COLUMNS]
    return [
        "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
        for value in values
    ]
