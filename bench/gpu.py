"""One command for a machine with a GPU: the tests, the kernels, a 7B model's ranking and forward.

    PYTHONPATH=. python -m bench.gpu --out DIR

Needs no network and no file: the model's weights are random, made on the device. It ends within
--minutes (what does not fit is skipped, and said so) and leaves DIR/gpu.csv (the rows of
relneuron.bench) and DIR/gpu.json (tests, checks, sections, and each goal with what was measured),
both written again with every row and goal. `--dry-run` goes through all of it on a CPU in tiny
sizes; `--cache` takes kernels that bench/gpu_compile.py has compiled elsewhere.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_ablation import time_ablation
from bench.gpu_attribution import time_attribution
from bench.gpu_model import time_model
from bench.gpu_ranking import rank_model
from bench.gpu_run import GROUPS, Run, check, new_stats, reference_stats
from relneuron import ops
from relneuron.bench.case import Case
from relneuron.bench.suite import CONTESTANTS
from relneuron.bench.timing import Effort, Row, graph_timer, run_case

ROOT = Path(__file__).resolve().parents[1]
# Each kernel once, in the forms that a run needs: what comes before all timings.
FIRST_TESTS = tuple(
    f"tests/ops/{name}"
    for name in (
        "swiglu_stats/test_triton.py::test_groups_in_any_order[5-mixed]",
        "swiglu_stats/test_triton.py::test_groups_in_any_order[40-runs]",
        "swiglu_stats/test_triton.py::test_conditions_change_between_and_within_runs[mixed]",
        "swiglu_stats/test_triton.py::test_responses_in_any_order[runs]",
        "swiglu_stats/test_cases.py::test_cases[triton-wide-torch.bfloat16]",
        "test_residual_stats.py::test_sum_counts_masks_and_responses[triton-37-200-torch.bfloat16]",
        "peaks/test_peaks.py::test_peaks_are_those_of_a_loop[triton-shape0-torch.bfloat16]",
        "peaks/test_merge_peaks.py::test_the_best_are_those_of_a_sort[triton-16]",
        "peaks/test_histogram.py::test_counts_are_those_of_searchsorted"
        "[triton-shape0-torch.bfloat16]",
        "test_average_precision_triton.py::test_equal_to_the_reference[100-torch.float32]",
        "test_average_precision_triton.py::test_any_number_of_relations[13]",
        "test_logprob_gain_triton.py::test_all_pairs[9-77-1-torch.float32]",
        "test_logprob_gain_triton.py::test_a_list_has_the_bits_of_all_pairs"
        "[[0, 3, 0, 9, 1, 5, 0]-True]",
        "test_logprob_gain_triton.py::test_moments[5-77-3-torch.float32-None]",
    )
)
TESTS = tuple(
    f"tests/{name}.py"
    for name in (
        "ops/swiglu_stats/test_cases",
        "ops/swiglu_stats/test_h",
        "ops/swiglu_stats/test_bits",
        "ops/swiglu_stats/test_arguments",
        "ops/swiglu_stats/test_triton",
        "ops/test_residual_stats",
        "ops/peaks/test_peaks",
        "ops/peaks/test_merge_peaks",
        "ops/peaks/test_histogram",
        "ops/test_average_precision",
        "ops/test_average_precision_triton",
        "ops/test_logprob_gain",
        "ops/test_logprob_gain_triton",
        "testing/test_contract",
    )
)
# What the goals speak of, and other sizes, dtypes and layouts in the order of their value.
GOAL_CASE = Case(dtype="bfloat16", T=8192)
OTHER_CASES = (
    replace(GOAL_CASE, layout="mixed"),
    *(replace(GOAL_CASE, T=n_tokens) for n_tokens in (2048, 512, 64)),
    *(replace(GOAL_CASE, dtype=dtype) for dtype in ("float16", "float32")),
)

# --- tests and checks ------------------------------------------------------------------------


def run_tests(run: Run, name: str, tests: Sequence[str], minutes: float) -> None:
    """GPU tests as a process of their own; what fails is stated, and timing goes on."""
    command = [sys.executable, "-m", "pytest", *tests, "-q", "--maxfail=20", "-p", "no:xdist"]
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
    run.json["tests"][name] = {"code": code, "tests": tests, "end": lines[-40:]}
    print(f"{name}: {'pass' if code == 0 else 'FAIL'}: {lines[-1] if lines else 'no output'}")


def inputs(run: Run, n_tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up (T, F) bfloat16 and group_ids (T,) int32."""
    random = torch.Generator(run.device).manual_seed(0)
    options: dict[str, Any] = {"device": run.device, "dtype": torch.bfloat16, "generator": random}
    gate, up = (torch.randn(n_tokens, width, **options) for _ in range(2))
    ids = torch.arange(n_tokens, device=run.device) * GROUPS // n_tokens
    return gate, up, ids.int()


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
    run.add(rows)
    for row in rows:
        if row.note:
            print(f"  {row.variant} {row.contestant}: {row.note}")
    return rows


def goal_kernels(run: Run) -> None:
    """P1 to P7 from the one case that they speak of."""
    rows = time_kernels(run, shrink(run, GOAL_CASE), True)
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
            run.missed(name, error)


def shrink(run: Run, case: Case) -> Case:
    return replace(case, T=max(8, case.T // 128), F=352) if run.dry else case


def other_kernels(run: Run) -> None:
    """Other sizes, dtypes and layouts, as far as the time goes."""
    for case in OTHER_CASES:
        compiled = case.T == 2048
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
        run.add(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.csv and gpu.json")
    parser.add_argument("--minutes", type=float, default=9.5, help="time for everything")
    parser.add_argument("--cache", type=Path, help="folder that bench.gpu_compile has made")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, in tiny sizes")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --dry-run goes through it on a CPU")
    if options.cache:  # the tests' process inherits it
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())
    device = "cpu" if options.dry_run else "cuda"
    run = Run(options.out, device, options.minutes, options.dry_run)
    # By value: a run that is cut off has the figures of most goals.
    sections: list[tuple[str, float, Callable[[Run], None]]] = [
        ("kernels of the goals", 60, goal_kernels),
        ("average precision", 60, rank_model),
        ("attribution", 60, time_attribution),
        ("large tensor", 20, check_large),
        ("graph", 10, check_graph),
        ("ablation", 60, time_ablation),
        ("model", 60, time_model),
        ("graph timings", 20, graph_kernels),
        ("other kernels", 30, other_kernels),
        ("compile", 20, check_compile),
    ]
    if not options.skip_tests:
        first = partial(run_tests, name="first tests", tests=FIRST_TESTS, minutes=2)
        rest = partial(run_tests, name="all tests", tests=TESTS, minutes=3)
        sections = [("first tests", 60, first), *sections, ("all tests", 60, rest)]
    for name, needs_s, work in sections:
        run.section(name, needs_s, partial(work, run))
    fine = all(tests["code"] == 0 for tests in run.json["tests"].values())
    fine &= all(run.json["checks"].values())
    fine &= not any(s["status"] == "failed" for s in run.json["sections"].values())
    print(f"{'all fine' if fine else 'NOT all fine'} -> {run.out / 'gpu.json'}, gpu.csv")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
