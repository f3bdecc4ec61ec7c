"""`python -m bench.host`: what a call of an op costs the host, beside a plain Triton launch.

A driver that launches nothing takes the place of Triton's: CPU tensors, the real way to a launch,
no GPU. So what is measured is the host's work alone: checks, plans, torch's own calls (which
compute here, so the tensors are small) and Triton's. `plain` is an element-wise kernel with three
tensors, and the allocation of its result. `launch` is our kernels' launches alone, `plan` what
swiglu_stats plans before them, `rest` all else.

    python -m bench.host                    # microseconds of a call
    python -m bench.host --against FOLDER   # and of the relneuron in FOLDER, in the same rounds

Each checkout runs in a process of its own; they take turns, and ratios are taken within a round.
Times are those of the thread on its processor, so that others on the machine change little.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

# Read when triton is imported: this is about the compiled launch, never about the interpreter.
os.environ["TRITON_INTERPRET"] = "0"

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

TOKENS = (1, 16, 512)
WIDTH = 1024
ROUNDS = 7
SLICE_S = 0.02  # of one measurement


class Driver:
    """A driver for Triton that has a GPU of some capability, and launches nothing."""

    def __init__(self, capability: int = 90) -> None:
        self.capability = capability
        self.launched: tuple[Any, ...] = ()  # as Triton called `launch` the last time

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def launch(self, *args: Any) -> None:
        # x, y, z, stream, function, two of metadata, two hooks, arguments.
        self.launched = args


class Kernel(CompiledKernel):  # type: ignore[misc]
    """What Triton believes it has compiled; its `hash` is of all that decides about the code."""

    def __init__(self, src: Any, target: Any = None, options: Any = None, **more: Any) -> None:
        self.src, self.name, self.module = src, src.name, None
        self.hash = hashlib.sha256(f"{src.hash()} {sorted(options.items())}".encode()).hexdigest()
        self.metadata, self.packed_metadata = SimpleNamespace(target=target), ()
        self.function, self._run = self.hash, driver.active.launch

    def _init_handles(self) -> None:
        pass


def install() -> Driver:
    """Put the driver in place, before the first launch; nothing is compiled."""
    active = Driver()
    driver.set_active(active)
    triton.compiler.compile = Kernel
    return active


@triton.jit
def _add_kernel(out_ptr, x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, x + tl.load(y_ptr + offs, mask=mask, other=0.0), mask=mask)


def take_cpu_tensors() -> None:
    """Have the launchers take CPU tensors, as they do in the interpreter, with a GPU's tiles."""
    from relneuron.ops import backends

    for op in ("swiglu_stats", "average_precision", "logprob_gain", "peaks"):
        module: Any = backends.triton_module(op)
        module.IS_INTERPRETED = True
        tiles = "NVIDIA_LAUNCH" if op in ("average_precision", "peaks") else "DEFAULT_LAUNCH"
        module.INTERPRETER_LAUNCH = getattr(module, tiles)


# --------------------------------------------------------------------------------------------------
# What is measured


def calls(n_tokens: int) -> dict[str, Callable[[], object]]:
    """Calls by name; T is the tokens, the rows to rank, or the neurons to evaluate."""
    from relneuron import ops

    def matrix(rows: int, columns: int) -> Any:
        return torch.randn(rows, columns)

    gate, up = (matrix(n_tokens, WIDTH).bfloat16() for _ in range(2))

    def plain() -> object:
        out = torch.empty_like(gate)
        n = out.numel()
        _add_kernel[(triton.cdiv(n, 1024),)](out, gate, up, n, BLOCK=1024)
        return out

    ids = torch.zeros(n_tokens, dtype=torch.int32)
    keep = torch.full((3, WIDTH // 32), -1, dtype=torch.int32)
    stats = {
        "count": ops.GroupStats(groups=12, width=WIDTH),
        "moments": ops.GroupStats(groups=12, width=WIDTH, moments=True),
        "down": ops.GroupStats(groups=12, width=WIDTH, sites=("down",)),
    }
    usual: dict[str, Any] = {"ids_checked": True, "backend": "triton"}
    counted = {**usual, "group_ids": ids}
    values, labels = matrix(n_tokens, 64), torch.ones(12, n_tokens, dtype=torch.int8)
    labels[:, 1::2] = 0
    x, vectors, unembed = matrix(2, 8), matrix(n_tokens, 8), matrix(32, 8)
    coefficients, scale = matrix(2, n_tokens), torch.ones(2)
    targets = torch.tensor([1, 2])
    return {
        "plain": plain,
        "swiglu_stats": lambda: ops.swiglu_stats(gate, up, **usual),
        "swiglu_stats, count": lambda: ops.swiglu_stats(gate, up, stats=stats["count"], **counted),
        "swiglu_stats, count, masks": lambda: ops.swiglu_stats(
            gate, up, stats=stats["count"], keep=keep, condition_ids=ids, **counted
        ),
        "swiglu_stats, moments": lambda: ops.swiglu_stats(
            gate, up, stats=stats["moments"], **counted
        ),
        "residual_stats, count": lambda: ops.residual_stats(
            gate, up, stats=stats["down"], **counted
        ),
        "average_precision": lambda: ops.average_precision(values, labels, backend="triton"),
        "logprob_gain": lambda: ops.logprob_gain(
            x, vectors, coefficients, unembed, scale, targets, backend="triton"
        ),
    }


def seconds(run: Callable[[], object]) -> float:
    """Of one call, on the processor."""
    start = time.thread_time()
    run()
    n = max(1, int(SLICE_S / max(time.thread_time() - start, 1e-6)))
    start = time.thread_time()
    for _ in range(n):
        run()
    return (time.thread_time() - start) / n


def serve() -> None:
    """Measure a round for each line of the input; print it as a line of JSON."""
    from relneuron.ops import backends

    install()
    torch.set_num_threads(1)
    take_cpu_tensors()
    swiglu: Any = backends.triton_module("swiglu_stats")
    launch_class: Any = swiglu.Launch
    own_run, own_plan = launch_class.run, swiglu.plan
    contestants: dict[tuple[int, str], dict[str, Callable[[], object]]] = {}
    for n_tokens in TOKENS:
        for name, call in calls(n_tokens).items():
            made: list[Any] = []
            plans: list[tuple[Any, ...]] = []

            def run(launch: Any, made: list[Any] = made) -> None:
                made.append(launch)
                own_run(launch)

            def plan(
                *args: Any, plans: list[tuple[Any, ...]] = plans, is_nvidia: bool
            ) -> list[Any]:
                plans.append(args)
                return own_plan(*args, is_nvidia=is_nvidia)  # type: ignore[no-any-return]

            call()
            launch_class.run, swiglu.plan = run, plan
            call()
            launch_class.run, swiglu.plan = own_run, own_plan

            def launch_all(made: list[Any] = made) -> None:
                for launch in made:
                    own_run(launch)

            def plan_all(plans: list[tuple[Any, ...]] = plans) -> None:
                for args in plans:
                    own_plan(*args, is_nvidia=True)

            contestants[n_tokens, name] = {"call": call, "launch": launch_all, "plan": plan_all}
    for _ in sys.stdin:
        found = [
            (n_tokens, name, {part: seconds(run) for part, run in parts.items()})
            for (n_tokens, name), parts in contestants.items()
        ]
        print(json.dumps(found), flush=True)


# --------------------------------------------------------------------------------------------------
# The command

# A round of one checkout: (T, name) -> {"call" | "launch" | "plan": seconds}.
Round = dict[tuple[int, str], dict[str, float]]


def worker(folder: Path) -> Any:
    """A process that serves, with the relneuron of a folder."""
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('host', sys.argv[1]); "
        "m = u.module_from_spec(s); sys.modules['host'] = m; s.loader.exec_module(m); m.serve()"
    )
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )


def ask(process: Any) -> Round:
    """Have a worker measure a round."""
    process.stdin.write("\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a worker ended with {process.wait()}")
    return {(n_tokens, name): parts for n_tokens, name, parts in json.loads(line)}


def table(rounds: Sequence[Sequence[Round]]) -> str:
    """A line a call: microseconds, and ratios within a round."""
    header = f"{'T':>4}  {'':27}{'call':>8}{'launch':>8}{'plan':>8}{'rest':>8}{'/ plain':>9}"
    if len(rounds[0]) > 1:
        header += f"{'against':>10}{'ratio':>7}"
    lines = [header]
    for n_tokens, name in rounds[0][0]:
        own = [turn[0][n_tokens, name] for turn in rounds]
        call, launch, plan = (median(parts[k] for parts in own) for k in ("call", "launch", "plan"))
        if name == "plain":
            launch = plan = 0.0
        parts = [call, launch, plan, call - launch - plan]
        line = f"{n_tokens:>4}  {name:27}" + "".join(f"{1e6 * part:8.1f}" for part in parts)
        plains = [turn[0][n_tokens, "plain"]["call"] for turn in rounds]
        ratios = [parts["call"] / plain for parts, plain in zip(own, plains, strict=True)]
        line += f"{median(ratios):9.2f}"
        if len(rounds[0]) > 1:
            others = [turn[1][n_tokens, name]["call"] for turn in rounds]
            ratios = [parts["call"] / other for parts, other in zip(own, others, strict=True)]
            line += f"{1e6 * median(others):10.1f}{median(ratios):7.2f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout of relneuron")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    folders = [Path(__file__).resolve().parents[1]]
    folders += [options.against.resolve()] if options.against else []
    workers = [worker(folder) for folder in folders]
    rounds = [[ask(process) for process in workers] for _ in range(options.rounds)]
    for process in workers:
        process.communicate()
    print(table(rounds))


if __name__ == "__main__":
    main()
