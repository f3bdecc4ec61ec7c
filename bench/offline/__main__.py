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
from bench.offline.cases import TARGETS, Case, cases, code_digest, cover, digest, launches
from bench.offline.predict import report
from bench.offline.rows import (
    Key,
    Row,
    faults,
    faults_of_others,
    label,
    measure,
    read_budgets,
    versions,
    write_budgets,
)

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


def all_launches() -> Iterator[tuple[Key, str]]:
    """(key, digest of our code) of every launch."""
    for case in cases():
        for launch in launches(*case):
            yield (*case, label(launch)), code_digest(launch, TARGETS[case[0]])


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
        _cache_in(cache)
        # A process may have the environment of another time (Python 3.14: of its server's start).
        with ProcessPoolExecutor(initializer=_cache_in, initargs=(cache,)) as pool:
            yield pool


def _cache_in(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.offline", description=offline.__doc__)
    parser.add_argument("--all", action="store_true", help="compile also what did not change")
    parser.add_argument(
        "--update", action="store_true", help="also rewrite the file of this Triton"
    )
    parser.add_argument("--predict", action="store_true", help="predicted times, nothing else")
    options = parser.parse_args(arguments)
    if options.predict:
        with compiling() as pool:
            print(report(pool))
        return 0
    # Of a version without a file, all is compiled and held to the newest one.
    budgets = read_budgets() or read_budgets(versions()[-1])
    known, chosen = to_compile(budgets, options.all)
    with compiling() as pool:
        measured = list(pool.map(measure_place, chosen))
    if options.update:
        order = {case: place for place, case in enumerate(cases())}
        write_budgets(sorted(measured + known, key=lambda row: order[row.key[:3]]))
        budgets = read_budgets()
    rows = measured + known
    print(table(rows))
    found = [fault for row in rows for fault in faults(row, budgets.get(row.key))]
    if not options.update:
        found += faults_of_others(all_launches())
    for fault in found:
        print(fault, file=sys.stderr)
    counts = f"{len(rows)} kernels, {len(measured)} compiled, {len(found)} faults"
    print(counts, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
