"""What the sections of `bench.gpu` share: the goals, the files of a run, checks, the reference."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relneuron import ops
from relneuron.artifact.files import atomic_write, csv_bytes, json_bytes
from relneuron.bench.machine import where
from relneuron.bench.timing import COLUMNS, Row, cells

GROUPS = 12


@dataclass(frozen=True)
class Goal:
    """A figure to reach; `at_most` where less is better."""

    what: str
    must: float
    moonshot: float
    at_most: bool = False


GOALS = {
    "P1": Goal("time of eager counting per relation by one-hot product / ours, T=8192", 4.5, 5.5),
    "P2": Goal("ours, share of the copy bandwidth of the same run, T=8192", 0.90, 0.97),
    "P3": Goal("our time / Liger's SwiGLU, which counts nothing, T=8192", 1.05, 1.00, True),
    "P4": Goal("our time with moments and 13 masks / counting alone", 1.15, 1.05, True),
    "P5a": Goal("time of torch.compile counting by sum(0) / ours", 1.3, 1.6),
    "P5b": Goal("time of torch.compile counting per relation by index_add / ours", 5, 15),
    "P7a": Goal("time of eager masked sums of three sites / ours with responses", 3, 4.5),
    "P7b": Goal("time of pooling on the host / ours with responses", 30, 90),
    "P8a": Goal("speed of the instrumented model / plain eager, T=8192", 1.00, 1.015),
    "P8b": Goal("speed of the instrumented model / plain under torch.compile", 0.97, 1.00),
    "P8c": Goal("tokens/s of `count`, five groups / plain eager, T=8192", 1.00, 1.03),
    "P8d": Goal("the same batch: time of the LAPE hook / ours", 1.05, 1.10),
    "P9a": Goal("seconds for 13 conditions x 600 prompts of a 7B model", 6, 4, True),
    "P9b": Goal("time of generate with hooks, prompt by prompt / ours", 50, 90),
    "P10": Goal("a set of its own per prompt: time of one forward per prompt / ours", 10, 50),
    "P11a": Goal("AP of 3,400 prompts, 1 relation: time of a batched sort in torch / ours", 1.3, 3),
    "P11b": Goal("the same: time of torchmetrics / ours", 1500, 3500),
    "P11c": Goal("the same: time of scikit-learn on one core / ours", 7000, 15000),
    "P12a": Goal("AP of 4,096 prompts, 12 relations: batched sort in torch / ours", 2, 4),
    "P12b": Goal("AP of 8,192 prompts, 12 relations: batched sort in torch / ours", 2, 4),
    "P12c": Goal("the same: time of scikit-learn on one core / ours", 30000, 80000),
    "P14a": Goal("ms per example for the gain of every neuron of a 7B model, exact", 4.5, 3, True),
    "P14b": Goal("the same: time of naive batched bfloat16 products / ours", 30, 45),
    "P15a": Goal("the same gains within 1e-5: ms per example", 0.35, 0.15, True),
    "P15b": Goal("the same: time of naive batched bfloat16 products / ours", 350, 900),
    "P16a": Goal("the exact 300 largest of them: ms per example", 0.2, 0.03, True),
    "P16b": Goal("the same: time of naive batched bfloat16 products / ours", 600, 4000),
    "P17": Goal("largest error of a gain against float64", 1e-4, 2e-5, True),
}


class Run:
    """The sections of a run: each may fail or be skipped without harm to the others."""

    def __init__(self, out: Path, device: str, minutes: float, dry: bool) -> None:
        self.out, self.device, self.dry = out, device, dry
        self.end = time.monotonic() + 60 * minutes
        self.rows: list[Row] = []
        self.json: dict[str, Any] = {
            "where": where(device),
            "dry_run": dry,
            "tests": {},
            "checks": {},
            "model": {},
            "goals": {name: vars(goal) | {"measured": None} for name, goal in GOALS.items()},
            "sections": {},
        }

    def left_s(self) -> float:
        return self.end - time.monotonic()

    def section(self, name: str, needs_s: float, work: Callable[[], None]) -> None:
        """Do `work` if its time is left, and write down how it went."""
        state: dict[str, Any] = {"status": "done"}
        start = time.monotonic()
        if not self.dry and self.left_s() < needs_s:
            state = {"status": f"skipped: {self.left_s():.0f} s are left, it needs {needs_s:.0f}"}
        else:
            try:
                work()
            except Exception as error:
                state = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
                state["traceback"] = traceback.format_exc().splitlines()[-12:]
        state["seconds"] = round(time.monotonic() - start, 1)
        self.json["sections"][name] = state
        error = f" ({state['error'].splitlines()[0]})" if "error" in state else ""
        print(f"{name}: {state['status']}{error}, {state['seconds']} s", flush=True)
        self.save()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, also if the run is cut off behind them."""
        self.rows += rows
        self.save()

    def save(self) -> None:
        atomic_write(self.out / "gpu.json", json_bytes(self.json))
        atomic_write(self.out / "gpu.csv", csv_bytes(COLUMNS, map(cells, self.rows)))

    def reached(self, name: str, value: float, note: str = "") -> None:
        """Write down what was measured for a goal."""
        goal = GOALS[name]
        state = self.json["goals"][name]
        for level in ("must", "moonshot"):
            target = getattr(goal, level)
            state[f"{level}_met"] = value <= target if goal.at_most else value >= target
        state |= {"measured": round(value, 4), "note": note}
        self.save()
        bound = "at most" if goal.at_most else "at least"
        met = "met" if state["must_met"] else "NOT met"
        met = "in tiny sizes it says nothing" if self.dry else met
        print(f"  {name} {goal.what}: {value:.3f}, must be {bound} {goal.must}: {met} {note}")

    def missed(self, name: str, why: object) -> None:
        """Write down why a goal has no figure."""
        self.json["goals"][name]["note"] = f"not measured: {why}"
        print(f"  {name} not measured: {why}")


def check(run: Run, name: str, is_right: bool) -> None:
    run.json["checks"][name] = bool(is_right)
    print(f"  {name}: {'right' if is_right else 'WRONG'}")


def new_stats(gate: Tensor) -> ops.GroupStats:
    return ops.GroupStats(groups=GROUPS, width=gate.shape[1], device=gate.device)


def reference_stats(gate: Tensor, up: Tensor, ids: Tensor) -> ops.GroupStats:
    stats = new_stats(gate)
    for part in range(0, gate.shape[0], 4096):
        rows = slice(part, part + 4096)
        ops.swiglu_stats(
            gate[rows], up[rows], stats=stats, group_ids=ids[rows], backend="reference"
        )
    return stats
