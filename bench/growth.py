"""What a stage costs when one thing doubles: prompts, relations, conditions, groups, layers, ...

    PYTHONPATH=. python -m bench.growth [--only conditions] [--doublings 3] [--rounds 3] [-o DIR]
    PYTHONPATH=. python -m bench.growth --only conditions --doublings 0 --world conditions=10000

Each axis doubles one field of a `World` (bench/growth_world.py) and runs the stages that it touches
as commands, each in a fork of this process that has imported everything: its CPU seconds (user and
system, those of its own processes with them) and its peak of resident memory beyond what it was
born with, pages of the files that it maps among them. One thread, float32, on a CPU; what is set up
before a stage is not measured. All sizes are run in every round, in an order drawn anew, so that a
machine that gets slower does not make the larger sizes dearer; a time is the shortest of its
rounds, a peak the highest. An idle machine takes about a quarter of an hour. With no doubling a
stage is run at one size: `--world` says which.

Where relations double, the prompts in all stay as many: each relation has half the facts. So do
the texts where groups double. A study of twice the relations with as many facts each has twice the
prompts, too, and costs what both doublings cost together.

A cost is taken to be a + b n^k. With k from 0 to 3 in steps of 0.01, a and b are those of the least
squares of (a + b n^k) / cost - 1, neither below 0; k is the one with the smallest sum. a is what a
stage costs whatever its size is: imports that are left, the model, the files. `last` is the same
from the last doubling alone, log2((c(2n) - a) / (c(n) - a)): an exponent that still rises shows
there. Where the largest cost is less than a quarter above the smallest one it is flat, and k is 0.
Of memory `bytes_per_n` says, whatever the curve, what one more of n takes (a fact of each of the
four relations, a condition, ...): the difference of the peaks of the largest and the smallest size
by that of n.

A stage whose result is itself a matrix (the page of R relations under R sets, the NLL of G groups
under G masks) is fitted against its cells, R^2; its rows say so in `of`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import os
import pkgutil
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

import relneuron
from bench.growth_world import World, write_facts, write_model, write_sets, write_texts
from bench.rows import add_rows
from relneuron.artifact.files import atomic_write
from relneuron.bench.machine import where
from relneuron.report import kit

N, CELLS = "n", "cells"
FLAT = 1.25  # the largest cost over the smallest one, up to which nothing grows: noise is less
POWERS = np.arange(0, 3.001, 0.01)
WINDOW = 32
COLOURS = ("#4477aa", "#ee7733", "#228833", "#aa3377", "#66ccee", "#59636f")


# --- stages and axes ----------------------------------------------------------------------------


def words_of(stage: str, world: World, folder: Path) -> list[str]:
    """The command line of a stage, in a folder with the world's model, facts, sets and texts."""
    model, study, corpus = (str(folder / name) for name in ("model", "study", "corpus"))
    prompts, neurons = f"{study}/prompts.jsonl", f"{study}/neurons.json"
    texts = [str(folder / "texts.jsonl"), "--group-column", "group", "--window", str(WINDOW)]
    n_windows = world.texts * (world.words + 1) // WINDOW + 1
    attribute = ["attribute", model, prompts, "-o"]
    named: dict[str, list[str]] = {
        "prompts": ["prompts", str(folder / "facts"), "-o", prompts],
        "record": ["record", model, prompts, "-o", study],
        "identify": ["identify", study, "-o", neurons],
        "ablate": ["ablate", model, neurons, prompts, "-o", f"{study}/effects.csv", "--any-set"],
        "report": ["report", study, "-o", f"{study}/report.html"],
        "attribute": [*attribute, str(folder / "gains"), "--no-compare"],
        "with comparison": [*attribute, str(folder / "compared")],
        "count": ["count", model, *texts, "-o", corpus],
        "identify lape": ["identify", corpus, "-o", f"{corpus}/neurons.json", "--method", "lape"],
        "nll": ["nll", model, f"{corpus}/neurons.json", *texts, "-o", corpus],
        "report nll": ["report", corpus, "-o", f"{corpus}/report.html"],
    }
    named["prompts"] += ["--eva", f"{world.facts // 2}"]
    named["ablate"] += ["--random-seeds", "2"]
    named["nll"] += ["--windows", str(n_windows)]
    return named[stage]


STUDY = ("prompts", "record", "identify", "ablate", "report")
CORPUS = ("count", "identify lape", "nll", "report nll")


class Axis(NamedTuple):
    """What is doubled, from where on, and in which stages.

    before  stages that are run first, and not measured
    cells   those of them whose result is a matrix of n by n
    halved  a field that is half as large at each doubling, so that there is as much of all together
    """

    field: str
    world: World
    stages: Sequence[str]
    before: Sequence[str] = ()
    cells: Sequence[str] = ()
    halved: str | None = None


AXES = {
    "prompts": Axis("facts", World(facts=512), STUDY),
    "sentences": Axis(
        "facts", World(facts=64), ("attribute", "with comparison"), before=("prompts",)
    ),
    "relations": Axis(
        "relations", World(relations=16, facts=256), STUDY, cells=("report",), halved="facts"
    ),
    "conditions": Axis("conditions", World(conditions=256), ("ablate", "report"), ("prompts",)),
    # More groups than a page draws whole; a text is two windows, so that there are always as many.
    "groups": Axis(
        *("groups", World(groups=64, texts=16, words=2 * WINDOW - 1), CORPUS),
        cells=("nll", "report nll"),
        halved="texts",
    ),
    "layers": Axis("layers", World(facts=256, width=256), (*STUDY[1:4], "count"), ("prompts",)),
    "width": Axis("width", World(facts=256, width=512), (*STUDY[1:4], "count"), ("prompts",)),
    "tokens": Axis("texts", World(texts=256), CORPUS[:3]),
}


# --- a stage in a process of its own ------------------------------------------------------------


class Cost(NamedTuple):
    cpu_s: float
    peak_bytes: int


def import_all() -> None:
    """All modules of relneuron and what they import late: forks have them, and need no second."""
    for found in pkgutil.walk_packages(relneuron.__path__, "relneuron."):
        if ".triton_" not in found.name and not found.name.endswith(("__main__", "_cpu")):
            importlib.import_module(found.name)
    late = ("safetensors.torch", "filelock", "tqdm", "jinja2", "scipy.stats")
    for name in (*late, "matplotlib.figure", "matplotlib.backends.backend_svg"):
        importlib.import_module(name)
    from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    gc.collect()
    gc.freeze()  # pages that no fork writes to


def _own_bytes() -> int:
    """Memory of this process that a fork shares with it: resident, and of no file."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def in_fork(act: Callable[[], object], said: Path) -> Cost:
    """What `act` costs in a fork; what it prints goes to the file `said`. It must end well."""
    inherited = _own_bytes()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(file, number)
            sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115, PTH123
            torch.set_num_threads(1)
            act()
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(said.read_text(encoding="utf-8"))
    peak = max(0, 1024 * usage.ru_maxrss - inherited)
    return Cost(usage.ru_utime + usage.ru_stime, peak)


def command(words: Sequence[str]) -> None:
    from relneuron.cli import main as cli

    sys.argv = ["relneuron", *words]
    cli.main()


def set_up(axis: Axis, world: World, folder: Path) -> None:
    """The files that the stages of an axis read."""
    stages = {*axis.before, *axis.stages}
    write_model(world, folder / "model")
    if "prompts" in stages:
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(folder / "model")
        write_facts(world, model, folder / "facts")
    (folder / "study").mkdir()
    if "ablate" in stages and "identify" not in stages:
        write_sets(world, folder / "study" / "neurons.json")
    if "count" in stages:
        write_texts(world, folder / "texts.jsonl")


def measure(axis: Axis, world: World) -> dict[str, Cost]:
    """What each stage of an axis costs in one world."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        said = folder / "said.txt"
        in_fork(lambda: set_up(axis, world, folder), said)
        found = {}
        for stage in (*axis.before, *axis.stages):
            words = words_of(stage, world, folder)
            found[stage] = in_fork(lambda words=words: command(words), said)  # type: ignore[misc]
    return {stage: found[stage] for stage in axis.stages}


# --- what grows how -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """cost = constant + factor n^exponent; `last`: the exponent of the last doubling alone."""

    constant: float
    factor: float
    exponent: float
    last: float


def fit(n: Sequence[float], cost: Sequence[float]) -> Fit:
    """The curve of the smallest relative squares, as the file's head says; n ascending."""
    x, y = np.array(n, np.float64), np.array(cost, np.float64)
    if y.max() < FLAT * y.min():
        return Fit(float(y.mean()), 0.0, 0.0, 0.0)
    best = (np.inf, 0.0, 0.0, 0.0)
    for k in POWERS[1:]:
        columns = np.stack([np.ones_like(x), (x / x[-1]) ** k], 1) / y[:, None]
        a, b = np.linalg.lstsq(columns, np.ones_like(x), rcond=None)[0]
        if a < 0 or b < 0:  # the better one of the two edges
            alone = [float(c @ np.ones_like(x) / (c @ c)) for c in columns.T]
            ends = [(alone[0], 0.0), (0.0, alone[1])]
            a, b = min(ends, key=lambda ab: float(((columns @ ab - 1) ** 2).sum()))
        error = float(((columns @ (a, b) - 1) ** 2).sum())
        best = min(best, (error, float(k), float(a), float(b)))
    _, k, a, b = best
    grown = y[-2:] - a
    last = np.log(grown[1] / grown[0]) / np.log(x[-1] / x[-2]) if grown.min() > 0 else np.nan
    return Fit(a, b / x[-1] ** k, k, float(last))


def sizes_of(axis: Axis, doublings: int) -> list[World]:
    first = int(getattr(axis.world, axis.field))
    worlds = [axis.world._replace(**{axis.field: first << step}) for step in range(doublings + 1)]
    if axis.halved:
        most = int(getattr(axis.world, axis.halved))
        if not most >> doublings:
            raise ValueError(f"{axis.halved}: {most} cannot be halved {doublings} times")
        worlds = [w._replace(**{axis.halved: most >> step}) for step, w in enumerate(worlds)]
    return worlds


def measure_all(axis: Axis, worlds: Sequence[World], rounds: int) -> dict[World, dict[str, Cost]]:
    """What each stage costs in each world: the shortest time of all rounds, the highest peak."""
    found: dict[World, dict[str, Cost]] = {}
    draw = random.Random("relneuron.growth.rounds")
    for _ in range(rounds):
        for world in draw.sample(worlds, len(worlds)):
            new = measure(axis, world)
            old = found.get(world, new)
            found[world] = {
                stage: Cost(
                    min(cost.cpu_s, old[stage].cpu_s), max(cost.peak_bytes, old[stage].peak_bytes)
                )
                for stage, cost in new.items()
            }
    return {world: found[world] for world in worlds}


def rows_of(
    name: str, axis: Axis, points: Mapping[World, Mapping[str, Cost]]
) -> list[dict[str, object]]:
    """A row of the csv for each stage and size, with what was fitted to all sizes of the stage."""
    rows: list[dict[str, object]] = []
    machine = where("cpu")
    for stage in axis.stages:
        n = [int(getattr(world, axis.field)) for world in points]
        is_matrix = stage in axis.cells
        x = [float(i**2 if is_matrix else i) for i in n]
        costs = [found[stage] for found in points.values()]
        fits = [fit(x, [float(cost[place]) for cost in costs]) for place in range(2)]
        per_n = (costs[-1].peak_bytes - costs[0].peak_bytes) / max(1, n[-1] - n[0])
        for i, cost in zip(n, costs, strict=True):
            row: dict[str, object] = {"axis": name, "stage": stage, "n": i}
            row |= {"cpu_s": round(cost.cpu_s, 3), "peak_bytes": cost.peak_bytes}
            row |= {"of": CELLS if is_matrix else N}
            for what, one in zip(("time", "memory"), fits, strict=True):
                row |= {f"{what}_exponent": round(one.exponent, 2)}
                row |= {f"{what}_last": round(one.last, 2)}
                row |= {f"{what}_constant": round(one.constant, 3)}
            row |= {"bytes_per_n": round(per_n)}
            rows.append(row | machine)
    return rows


def say(rows: Sequence[Mapping[str, object]]) -> None:
    for stage in dict.fromkeys(str(row["stage"]) for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        last = own[-1]
        seconds = " ".join(f"{row['cpu_s']:.2f}" for row in own)
        mib = " ".join(f"{int(str(row['peak_bytes'])) >> 20}" for row in own)
        print(
            f"{last['axis']:<10} {stage:<13} {'per cell' if last['of'] == CELLS else '':<8} "
            f"time n^{last['time_exponent']:<4} (last {last['time_last']:<5}) {seconds} s   "
            f"memory n^{last['memory_exponent']:<4} {mib} MiB, {last['bytes_per_n']} bytes each",
            flush=True,
        )


# --- a picture ----------------------------------------------------------------------------------


def draw(rows: Sequence[Mapping[str, object]]) -> bytes:
    """PNG: for each axis time and memory against n, both logarithmic, a line a stage."""
    axes = list(dict.fromkeys(str(row["axis"]) for row in rows))
    with kit.themed():
        fig = Figure(figsize=(9.2, 2.7 * len(axes)), layout="constrained", facecolor=kit.PAPER)
        grid = fig.subplots(len(axes), 2, squeeze=False)
        for name, pair in zip(axes, grid, strict=True):
            own = [row for row in rows if row["axis"] == name]
            stages = dict.fromkeys(str(row["stage"]) for row in own)
            for ax, key, exponent, unit in (
                (pair[0], "cpu_s", "time_exponent", "CPU seconds"),
                (pair[1], "peak_bytes", "memory_exponent", "peak memory, MiB"),
            ):
                for stage, colour in zip(stages, COLOURS, strict=False):
                    some = [row for row in own if row["stage"] == stage]
                    scale = 1 if key == "cpu_s" else 1 << 20
                    n = [float(str(row["n"])) for row in some]
                    y = [float(str(row[key])) / scale for row in some]
                    power = f"{some[-1][exponent]}{' per cell' if some[-1]['of'] == CELLS else ''}"
                    ax.plot(n, y, "o-", ms=3, lw=1.3, color=colour, label=f"{stage}, {power}")
                ax.set(xscale="log", yscale="log", xlabel=name)
                ax.set_xticks(n, [f"{int(i):,}" for i in n])
                ax.minorticks_off()
                ax.set_title(unit, loc="left", fontsize=8.5, color=kit.MUTED)
                ax.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
                ax.grid(color=kit.LINE, lw=0.5)
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=AXES, default=list(AXES), help="axes; default: all")
    add("--doublings", type=int, default=3, help="of each axis")
    add("--rounds", type=int, default=3, help="how often each size is run")
    add("--world", nargs="+", default=[], metavar="FIELD=N", help="in place of the axis' own size")
    add("-o", "--output", type=Path, metavar="DIR", help="add rows to a csv there, and draw them")
    o = parser.parse_args(arguments)
    if o.rounds < 1 or o.doublings < 0:
        parser.error("--rounds must be at least 1 and --doublings at least 0")
    try:
        fields = {name: int(n) for name, n in (one.split("=") for one in o.world)}
        axes = {
            name: AXES[name]._replace(world=AXES[name].world._replace(**fields)) for name in o.only
        }
        worlds = {name: sizes_of(axis, o.doublings) for name, axis in axes.items()}
    except ValueError as error:
        parser.error(str(error))
    import_all()
    found: list[dict[str, object]] = []
    for name, axis in axes.items():
        points = measure_all(axis, worlds[name], o.rounds)
        found += (rows := rows_of(name, axis, points))
        say(rows)
    if o.output:
        o.output.mkdir(parents=True, exist_ok=True)
        stem = f"{where('cpu')['machine']}-growth"
        add_rows(o.output / f"{stem}.csv", found)
        atomic_write(o.output / f"{stem}.png", draw(found))
    gc.unfreeze()  # or what is left at the end counts as leaked
    return 0


if __name__ == "__main__":
    sys.exit(main())
