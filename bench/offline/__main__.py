"""The command of `bench.offline`, see there."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, fields

from bench import offline
from bench.offline.cases import TARGETS, Case, cases, cover, digest, launches
from bench.offline.predict import report
from bench.offline.rows import Key, Row, faults, label, measure, read_budgets, write_budgets

# A launch by its place: a case and a number.
Place = tuple[Case, int]


def measure_place(place: Place) -> Row:
    """In a process of the pool, which gets no tensors."""
    case, index = place
    return measure(*case, launches(*case)[index])


def to_compile(budgets: dict[Key, Row], everything: bool) -> tuple[list[Row], list[Place]]:
    """(rows of the file that stand as they are, what is compiled)."""
    known: dict[Key, Row] = {}
    chosen: dict[Key, Place] = {}
    covered = set(cases()) if everything else cover()
    for case in cases():
        for index, launch in enumerate(launches(*case)):
            key = (*case, label(launch))
            row = budgets.get(key)
            if row and case not in covered and row.source == digest(launch, TARGETS[case[0]]):
                known[key] = row
            else:
                chosen[key] = (case, index)
    return list(known.values()), list(chosen.values())


def table(rows: Iterable[Row]) -> str:
    header = [field.name for field in fields(Row)]
    lines = [header] + [["-" if v is None else str(v) for v in astuple(row)] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


@contextmanager
def compiling() -> Iterator[ProcessPoolExecutor]:
    """Processes with a cache of their own, so that nothing compiled earlier is measured."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor() as pool:
            yield pool


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.offline", description=offline.__doc__)
    parser.add_argument("--all", action="store_true", help="compile also what did not change")
    parser.add_argument(
        "--update", action="store_true", help="all, and rewrite the file of this Triton"
    )
    parser.add_argument("--predict", action="store_true", help="predicted times, nothing else")
    options = parser.parse_args(arguments)
    if options.predict:
        with compiling() as pool:
            print(report(pool))
        return 0
    budgets = read_budgets()
    known, chosen = to_compile(budgets, options.all or options.update)
    with compiling() as pool:
        measured = list(pool.map(measure_place, chosen))
    if options.update:
        write_budgets(measured)
        budgets = read_budgets()
    rows = measured + known
    print(table(rows))
    found = [fault for row in rows for fault in faults(row, budgets.get(row.key))]
    for fault in found:
        print(fault, file=sys.stderr)
    counts = f"{len(rows)} kernels, {len(measured)} compiled, {len(found)} faults"
    print(counts, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
