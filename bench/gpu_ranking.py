"""The section of `bench.gpu` about average_precision: every neuron of a Llama-2-7B in one call.

The batched sort does all columns in the same rounds as relneuron. The loops of scikit-learn (on
one core of the host) and of torchmetrics would take from minutes to days: they do a sample of the
columns, and their times are scaled up, as their rows say.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch

from bench.gpu_run import Run
from relneuron.bench.case import Case
from relneuron.bench.ranking import average_precision_contestants
from relneuron.bench.timing import Effort, Row, run_case

N_NEURONS = 835_584  # gate, up and down of a Llama-2-7B
# Columns that the loops do: about a second of each.
LOOPED = {1: 512, 12: 48}
# What the columns need beside them: the batched sort's parts, and the checks.
MEMORY_SHARE = 0.5
# Goals by the number of prompts and relations, with whose time is compared.
ASKED = (
    (3400, 1, {"P11a": "batched torch", "P11b": "torchmetrics loop", "P11c": "sklearn loop"}),
    (4096, 12, {"P12a": "batched torch"}),
    (8192, 12, {"P12b": "batched torch", "P12c": "sklearn loop"}),
)


def rank_model(run: Run) -> None:
    """P11 and P12; fewer columns where the memory does not hold them all."""
    for n_prompts, n_relations, goals in ASKED:
        if not run.dry and run.left_s() < 60:
            for name in goals:
                run.missed(name, f"{run.left_s():.0f} s were left")
            continue
        case = Case("average_precision", "float32", n_prompts, N_NEURONS, n_relations)
        case = replace(case, layout="prompt-major")
        if run.dry:
            case = replace(case, T=n_prompts // 32, F=96)
        else:
            free_bytes, _ = torch.cuda.mem_get_info()
            case = replace(case, F=min(case.F, int(MEMORY_SHARE * free_bytes) // (4 * case.T)))
        rows = {row.contestant: row for row in time_case(run, case)}
        run.add(list(rows.values()))
        for name, who in goals.items():
            value = rows[who].ratio
            if value is None:
                run.missed(name, rows[who].note)
            else:
                run.reached(name, value, f"({case.F:,} columns; {rows[who].note or 'all done'})")


def time_case(run: Run, case: Case) -> list[Row]:
    """The rows of a case, those of the loops scaled up from a sample of its columns."""
    n_looped = min(case.F, 8 if run.dry else LOOPED[case.G])
    everybody = average_precision_contestants(case, run.device, 1, False, n_looped)
    # On a CPU the loops have a variant of their own; here all are compared with the same call.
    chosen = {c.name: c for c in everybody if "numpy" not in c.name}
    chosen |= {c.name: c for c in everybody if c.variant == "ap" and c.name in chosen}
    contestants = [replace(c, variant="ap", around=nullcontext) for c in chosen.values()]
    if not run.dry:
        torch.cuda.empty_cache()
    effort = Effort(3, 1) if run.dry else Effort(5, 1)
    rows = run_case(case, device=run.device, effort=effort, contestants=contestants)
    return [_scaled(row, n_looped) if row.contestant.endswith("loop") else row for row in rows]


def _scaled(row: Row, n_looped: int) -> Row:
    if row.median_ms is None or row.min_ms is None or row.ratio is None or row.GB_s is None:
        return row
    factor = row.F / n_looped
    return replace(
        row,
        median_ms=row.median_ms * factor,
        min_ms=row.min_ms * factor,
        ratio=row.ratio * factor,
        GB_s=row.GB_s / factor,
        note=f"scaled up from {n_looped:,} columns; {row.note}",
    )
