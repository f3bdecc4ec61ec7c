"""One command for a machine with a GPU: the tests, the kernels and a 7B-shaped model.

    PYTHONPATH=. python -m bench.gpu --out DIR

Needs no network and no file: the model's weights are random, made on the device. It ends within
--minutes (what does not fit is skipped, and said so) and leaves DIR/gpu.csv (the rows of
relneuron.bench) and DIR/gpu.json (tests, checks, sections, and each goal with what was measured),
both written anew after every section. `--dry-run` goes through all of it on a CPU in tiny sizes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import relneuron
from relneuron import ops
from relneuron.artifact import atomic_write, csv_bytes, json_bytes
from relneuron.bench import (
    COLUMNS,
    Effort,
    Row,
    cells,
    event_timer,
    graph_timer,
    measure,
    ratio,
    run_case,
    wall_timer,
    where,
)
from relneuron.bench_suite import CONTESTANTS, Case, Contestant
from relneuron.model import find_gated_mlps

ROOT = Path(__file__).resolve().parents[1]
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in ("swiglu_stats", "swiglu_stats_triton", "residual_stats", "testing")
)
LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
TINY = LLAMA_2_7B | {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
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
        bound = "at most" if goal.at_most else "at least"
        met = "met" if state["must_met"] else "NOT met"
        met = "in tiny sizes it says nothing" if self.dry else met
        print(f"  {name} {goal.what}: {value:.3f}, must be {bound} {goal.must}: {met} {note}")


# --- tests and checks ------------------------------------------------------------------------


def run_tests(run: Run, minutes: float) -> None:
    """The GPU tests as a process of their own; what fails is stated, and timing goes on."""
    paths = [path for path in TESTS if (ROOT / path).is_file()]
    command = [sys.executable, "-m", "pytest", *paths, "-q", "--maxfail=20"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60 * minutes
        )
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        so_far = error.stdout or ""
        so_far = so_far.decode() if isinstance(so_far, bytes) else so_far
        code, text = -1, f"{so_far}\nstopped after {error.timeout:.0f} s"
    lines = text.strip().splitlines()
    run.json["tests"] = {"code": code, "files": paths, "end": lines[-40:]}
    print(f"tests: {'pass' if code == 0 else 'FAIL'}: {lines[-1] if lines else 'no output'}")


def inputs(run: Run, n_tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up (T, F) bfloat16 and group_ids (T,) int32."""
    random = torch.Generator(run.device).manual_seed(0)
    options: dict[str, Any] = {"device": run.device, "dtype": torch.bfloat16, "generator": random}
    gate, up = (torch.randn(n_tokens, width, **options) for _ in range(2))
    ids = torch.arange(n_tokens, device=run.device) * GROUPS // n_tokens
    return gate, up, ids.int()


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


def check(run: Run, name: str, is_right: bool) -> None:
    run.json["checks"][name] = bool(is_right)
    print(f"  {name}: {'right' if is_right else 'WRONG'}")


def check_large(run: Run) -> None:
    """Offsets past 2^31 elements: counts of all, and h of the last rows as of them alone."""
    n_tokens, width = (200, 352) if run.dry else (200_000, 11008)
    gate, up, ids = inputs(run, n_tokens, width)
    stats = new_stats(gate)
    h = ops.swiglu_stats(gate, up, stats=stats, group_ids=ids)
    last = slice(n_tokens - 64, n_tokens)
    wanted = ops.swiglu_stats(gate[last].clone(), up[last].clone())
    check(run, "h of the last rows of a tensor past 2^31 elements", torch.equal(h[last], wanted))
    same = torch.equal(stats.count["act"], reference_stats(gate, up, ids).count["act"])
    check(run, "counts of a tensor past 2^31 elements", same)


def check_graph(run: Run) -> None:
    """A CUDA graph counts right over replays, with new values in the same tensors."""
    if run.device == "cpu":
        return
    gate, up, ids = inputs(run, 1024, 11008)
    stats, out = new_stats(gate), torch.empty_like(gate)

    def call() -> None:
        ops.swiglu_stats(gate, up, stats=stats, group_ids=ids, out=out, ids_checked=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for tensor in (stats.count["act"], stats.tokens):
        tensor.zero_()
    want = reference_stats(gate, up, ids)
    graph.replay()
    graph.replay()
    once = torch.equal(stats.count["act"], 2 * want.count["act"])
    gate.neg_()
    graph.replay()
    other = reference_stats(gate, up, ids)
    both = torch.equal(stats.count["act"], 2 * want.count["act"] + other.count["act"])
    tokens = torch.equal(stats.tokens, 3 * want.tokens)
    check(run, "counts over three replays of a CUDA graph", once and both and tokens)
    check(run, "h of a CUDA graph's last replay", torch.equal(out, ops.swiglu_stats(gate, up)))


def check_compile(run: Run) -> None:
    """Inside torch.compile the op gives the bits and counts that it gives outside."""
    if run.dry:
        return
    gate, up, ids = inputs(run, 512, 11008)
    stats, want = new_stats(gate), new_stats(gate)

    def layer(gate: Tensor, up: Tensor) -> Tensor:
        return ops.swiglu_stats(gate, up, stats=stats, group_ids=ids, ids_checked=True) * 2

    h = torch.compile(layer, fullgraph=True, dynamic=False)(gate, up)
    same = torch.equal(h, ops.swiglu_stats(gate, up, stats=want, group_ids=ids) * 2)
    counts = torch.equal(stats.count["act"], want.count["act"])
    check(run, "the op inside torch.compile", same and counts)


# --- kernels ---------------------------------------------------------------------------------


def time_kernels(run: Run, case: Case, compiled: bool) -> list[Row]:
    effort = Effort(3, 1) if run.dry else Effort(9, 60)
    rows = run_case(case, device=run.device, compiled=compiled and not run.dry, effort=effort)
    run.rows += rows
    for row in rows:
        if row.note:
            print(f"  {row.variant} {row.contestant}: {row.note}")
    return rows


def goal_kernels(run: Run) -> None:
    """P1 to P7 from the one case that they speak of."""
    rows = time_kernels(run, shrink(run, Case(dtype="bfloat16", T=8192)), True)
    ratios = {(r.variant, r.contestant): r.ratio for r in rows if r.ratio is not None}

    def least(variant: str, prefix: str) -> float:
        found = [v for (task, who), v in ratios.items() if task == variant and prefix in who]
        if not found:
            raise LookupError(f"no right {prefix} of {variant}")
        return min(found)

    ours = next(r for r in rows if r.contestant == "relneuron" and r.variant == "count")
    responses = ratios["responses", "relneuron"]
    liger = ("swiglu", "liger") in ratios
    for name, value in {
        "P1": lambda: least("count", "eager one-hot"),
        "P2": lambda: ours.share_copy,
        "P3": lambda: 1 / least("swiglu", "liger" if liger else "compile"),
        "P4": lambda: ratios["moments+masks", "relneuron"],
        "P5a": lambda: least("total", "compile"),
        "P5b": lambda: min(v for (_, w), v in ratios.items() if "compile" in w and "index" in w),
        "P7a": lambda: ratios["responses", "eager masked sums"] / responses,
        "P7b": lambda: ratios["responses", "to the host"] / responses,
    }.items():
        try:
            note = "(inductor's SwiGLU in place of Liger's)" if name == "P3" and not liger else ""
            run.reached(name, value(), note)
        except (LookupError, ValueError) as error:
            run.json["goals"][name]["note"] = f"not measured: {error}"
            print(f"  {name} not measured: {error}")


def shrink(run: Run, case: Case) -> Case:
    return replace(case, T=max(8, case.T // 128), F=352) if run.dry else case


def other_kernels(run: Run) -> None:
    """Other sizes, dtypes and layouts, as far as the time goes."""
    for case, compiled in (
        (Case(dtype="bfloat16", T=8192, layout="mixed"), False),
        (Case(dtype="bfloat16", T=2048), True),
        (Case(dtype="bfloat16", T=512), False),
        (Case(dtype="bfloat16", T=64), False),
        (Case(dtype="float16", T=8192), False),
        (Case(dtype="float32", T=8192), False),
    ):
        if run.dry and case.layout == "sorted":
            continue
        if not run.dry and run.left_s() < (120 if compiled else 30):
            print(f"  {case}: skipped, {run.left_s():.0f} s are left")
            continue
        time_kernels(run, shrink(run, case), compiled)


def graph_kernels(run: Run) -> None:
    """Small sizes without the host's launches, from CUDA graphs."""
    if run.device == "cpu":
        return
    for n_tokens in (64, 512, 2048, 8192):
        case = Case(dtype="bfloat16", T=n_tokens)
        with torch.no_grad():
            everybody = CONTESTANTS[case.op](case, run.device, 8 if n_tokens < 4096 else 1, False)
        chosen = [c for c in everybody if c.variant in ("count", "swiglu", "ceiling", "all")]
        chosen = [c for c in chosen if c.name in ("relneuron", "eager", "liger", "triad", "copy")]
        effort = Effort(5, 5)
        rows = run_case(
            case, device=run.device, effort=effort, timer=graph_timer, contestants=chosen
        )
        run.rows += rows


# --- a whole model ---------------------------------------------------------------------------


def time_model(run: Run) -> None:
    """A Llama-2-7B of random weights: plain, counting, with neurons off, and compiled."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = TINY if run.dry else LLAMA_2_7B
    n_rows, length = (2, 16) if run.dry else (4, 2048)
    with torch.device(run.device):
        config = LlamaConfig(**shape)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        tokens = torch.randint(0, shape["vocab_size"], (n_rows, length))
        mask = torch.ones_like(tokens)
        groups = torch.arange(n_rows * length).view(n_rows, length) * GROUPS // (n_rows * length)
        chosen = torch.randint(0, shape["intermediate_size"], (3000,)).tolist()
    neurons = [(i % shape["num_hidden_layers"], "gate", f) for i, f in enumerate(chosen)]

    def forward(_: int) -> Tensor:
        return model(tokens, use_cache=False).logits

    @contextmanager
    def counting() -> Iterator[Any]:
        with relneuron.instrument(model, groups=GROUPS) as probe:
            probe.batch(mask, groups)
            yield probe

    check_model(run, model, forward, counting, groups)
    contexts: dict[str, Any] = {
        "instrumented": counting,
        "ablated": lambda: relneuron.ablate(model, neurons),
    }
    contestants = [
        _forward_contestant("plain eager", forward),
        *(replace(_forward_contestant(name, forward), around=c) for name, c in contexts.items()),
    ]
    run.json["model"] |= {"shape": shape, "tokens": n_rows * length, "peak_bytes": {}}
    if run.device != "cpu":
        for contestant in contestants:
            torch.cuda.reset_peak_memory_stats()
            with contestant.around(), torch.no_grad():
                contestant.run(0)
            peak = torch.cuda.max_memory_allocated()
            run.json["model"]["peak_bytes"][contestant.name] = peak
    times = _measure_models(run, contestants, n_rows * length)
    run.reached("P8a", 1 / ratio(times["plain eager"], times["instrumented"]))
    run.save()

    # Last, since compiling may fail or take long.
    if run.dry or run.left_s() < 150:
        run.json["goals"]["P8b"]["note"] = f"not measured: {run.left_s():.0f} s were left"
        return
    compiled = torch.compile(model, dynamic=False)
    plain = _forward_contestant(
        "plain compiled", lambda _: compiled(tokens, use_cache=False).logits
    )
    with torch.no_grad():
        plain.run(0)
    times = _measure_models(run, [contestants[0], plain, contestants[1]], n_rows * length)
    run.reached("P8b", 1 / ratio(times["plain compiled"], times["instrumented"]))


def _forward_contestant(name: str, forward: Callable[[int], object]) -> Contestant:
    return Contestant(name, "model", forward, lambda: None, 0, 0)


def _measure_models(
    run: Run, contestants: Sequence[Contestant], n_tokens: int
) -> dict[str, list[list[float]]]:
    timer = wall_timer if run.device == "cpu" else event_timer
    with torch.no_grad():
        samples = measure(contestants, timer, Effort(3, 1) if run.dry else Effort(9, 400))
    times = dict(zip([c.name for c in contestants], samples, strict=True))
    speeds = run.json["model"].setdefault("tokens_per_s", {})
    for name, rounds in times.items():
        speeds[name] = round(n_tokens / median(map(median, rounds)) * 1e3)
        print(f"  {name}: {speeds[name]:,} tokens/s")
    return times


def check_model(run: Run, model: Any, forward: Any, counting: Any, groups: Tensor) -> None:
    """Counts of the first layer against the reference on the gates that the plain model makes."""
    first = find_gated_mlps(model)[0]
    seen: list[Tensor] = []
    hook = first.module.gate_proj.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        plain = forward(0)
        hook.remove()
        with counting() as probe:
            counted = forward(0)
    gate = seen[0].reshape(-1, first.width)
    want = reference_stats(gate, gate, groups.reshape(-1).int())
    same = torch.equal(probe.stats[0].count["act"], want.count["act"])
    check(run, "counts of the model's first layer", same)
    tokens = all(int(s.tokens.sum()) == groups.numel() for s in probe.stats)
    check(run, "every layer counts every token", tokens)
    run.json["model"]["largest_logit"] = float(plain.abs().max())
    run.json["model"]["largest_logit_change"] = float((plain - counted).abs().max())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.csv and gpu.json")
    parser.add_argument("--minutes", type=float, default=9.5, help="time for everything")
    parser.add_argument("--test-minutes", type=float, default=3, help="of these, for the tests")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, in tiny sizes")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --dry-run goes through it on a CPU")
    device = "cpu" if options.dry_run else "cuda"
    run = Run(options.out, device, options.minutes, options.dry_run)
    if not options.skip_tests:
        run.section("tests", 60, lambda: run_tests(run, options.test_minutes))
    # What the goals speak of comes first, the rest as far as the time goes.
    for name, needs_s, work in (
        ("large tensor", 20, check_large),
        ("graph", 10, check_graph),
        ("compile", 20, check_compile),
        ("kernels of the goals", 60, goal_kernels),
        ("model", 60, time_model),
        ("graph timings", 20, graph_kernels),
        ("other kernels", 30, other_kernels),
    ):
        run.section(name, needs_s, lambda work=work: work(run))  # type: ignore[misc]
    tests_pass = options.skip_tests or run.json["tests"].get("code") == 0
    fine = tests_pass and all(run.json["checks"].values())
    fine &= not any(s["status"] == "failed" for s in run.json["sections"].values())
    print(f"{'all fine' if fine else 'NOT all fine'} -> {run.out / 'gpu.json'}, gpu.csv")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
