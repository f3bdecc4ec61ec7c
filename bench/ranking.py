"""A whole model's worth of ranking: average precision of every neuron of a Llama-2-7B, on this CPU.

    PYTHONPATH=. python -m bench.ranking [--threads N] [-o FILE.csv]

32 layers of responses (11,008 gates, 11,008 ups, 4,096 outputs of down), float32, one block after
the other as `identify` reads them, for twelve relations with negatives of their own. Responses are
noise that is made once; each block is a copy of it, rolled by another number of rows and columns
and scaled again column by column, and the time for that is told apart. Some columns of every block
are held to the reference, outside of both times; a difference ends the run.

Memory: with the libraries loaded, noise and block written and nothing ranked, the resident memory
is read. Before every call the kernel's own record of the peak (VmHWM) is set back to what is
resident, by /proc/self/clear_refs; after the call it is read. The largest, less what was resident
at first, is the peak beyond block and interpreter: the results are in it, and what the checks
between the calls left. Where there is no such record it is the peak of the process (ru_maxrss),
with the checks themselves.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relneuron import ops
from relneuron.artifact.files import atomic_write, csv_bytes
from relneuron.artifact.memory import peak_bytes, resident_bytes
from relneuron.artifact.reading import read_csv
from relneuron.bench.machine import where
from relneuron.bench.ranking import draw_labels

SITES = (11008, 11008, 4096)  # gate, up and down of a layer of Llama-2-7B
N_LAYERS = 32
CHECKED = 4  # columns of each block
PROGRESS_S = 2.0


def widths(n_neurons: int, block: int) -> Iterator[int]:
    """The blocks of layer after layer, until there are `n_neurons`; none is wider than `block`."""
    while n_neurons > 0:
        for site in SITES:
            left = min(site, n_neurons)
            n_neurons -= left
            while left > 0:
                yield min(left, block)
                left -= block


class Responses:
    """A block's values (N, M), made again in the same memory for every block."""

    def __init__(self, n: int, m: int, neuron_major: bool) -> None:
        self.random = torch.Generator().manual_seed(0)
        shape = (m, n) if neuron_major else (n, m)
        self.noise, self.values = torch.empty(shape), torch.empty(shape)
        self.noise.normal_(generator=self.random)
        self.values.copy_(self.noise)
        if neuron_major:
            self.noise, self.values = self.noise.T, self.values.T

    def make(self, m: int) -> Tensor:
        """The next block, of m columns."""
        n, width = self.noise.shape
        draw = [int(torch.randint(size, (), generator=self.random)) for size in (n, width)]
        scale = torch.randn(width, generator=self.random).exp_()
        made = self.values[:, :m]
        for row, source_row, n_rows in _parts(draw[0], n, n):
            for column, source, n_columns in _parts(draw[1], width, m):
                part = slice(column, column + n_columns)
                torch.mul(
                    self.noise[source_row : source_row + n_rows, source : source + n_columns],
                    scale[part],
                    out=made[row : row + n_rows, part],
                )
        return made


def _parts(start: int, size: int, n: int) -> Iterator[tuple[int, int, int]]:
    """(to, from, how many) of the first n of `size` things that are read from `start` around."""
    first = min(n, size - start)
    yield 0, start, first
    if first < n:
        yield first, 0, n - first


def forget_peak() -> int:
    """Set the peak back to what is resident now, and return that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def rank(
    n_neurons: int,
    n_prompts: int,
    n_relations: int,
    block: int,
    neuron_major: bool = False,
    backend: str = "auto",
) -> dict[str, Any]:
    """Rank them all on the threads that are set; what was measured, under the csv's names."""
    labels = draw_labels(n_prompts, n_relations)
    responses = Responses(n_prompts, min(block, max(SITES), n_neurons), neuron_major)
    ops.available_backends()  # loads them
    n_done = n_blocks = n_checked = 0
    ranking_s = generating_s = 0.0
    peak = resident = forget_peak()
    told = time.monotonic()
    for m in widths(n_neurons, block):
        start = time.perf_counter()
        values = responses.make(m)
        generating_s += time.perf_counter() - start
        forget_peak()
        start = time.perf_counter()
        ap = ops.average_precision(values, labels, backend=backend)
        ranking_s += time.perf_counter() - start
        peak = max(peak, peak_bytes() or 0)
        columns = torch.randint(m, (min(CHECKED, m),), generator=responses.random)
        want = ops.average_precision(values[:, columns], labels, backend="reference")
        if not torch.equal(ap[:, columns], want):
            raise AssertionError(f"block {n_blocks}: columns {columns.tolist()} are wrong")
        n_done, n_blocks, n_checked = n_done + m, n_blocks + 1, n_checked + len(columns)
        if sys.stderr.isatty() and time.monotonic() - told > PROGRESS_S:
            told = time.monotonic()
            print(f"\r{n_done:,} neurons, {ranking_s:.1f} s", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return {
        "neurons": n_done,
        "prompts": n_prompts,
        "relations": n_relations,
        "block": block,
        "layout": "neuron-major" if neuron_major else "prompt-major",
        "backend": backend,
        "blocks": n_blocks,
        "checked_columns": n_checked,
        "ranking_s": round(ranking_s, 3),
        "generating_s": round(generating_s, 3),
        "neurons_per_s": round(n_done / ranking_s),
        "resident_bytes": resident,
        "peak_beyond_bytes": peak - resident,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--neurons", type=int, default=N_LAYERS * sum(SITES), help="of Llama-2-7B, layer by layer")
    add("--prompts", type=int, default=8192, help="rows of every block")
    add("--relations", type=int, default=12, help="each with four negatives to a positive")
    add("--threads", type=int, default=0, help="0: as torch chooses")
    add("--block", type=int, default=max(SITES), help="columns of a block at most")
    add("--neuron-major", action="store_true", help="a column lies in one piece")
    add("--backend", choices=["auto", "cpu", "reference"], default="auto")
    add("-o", "--output", type=Path, metavar="FILE.csv", help="add a row to this file")
    options = parser.parse_args(arguments)
    if min(options.neurons, options.relations, options.block) < 1 or options.threads < 0:
        parser.error("--neurons, --relations and --block must be at least 1, --threads at least 0")
    if options.prompts < max(2, options.relations):
        parser.error("--prompts must be at least 2, and one for every relation")
    if options.threads:
        torch.set_num_threads(options.threads)
    row = rank(
        options.neurons,
        options.prompts,
        options.relations,
        options.block,
        options.neuron_major,
        options.backend,
    ) | where("cpu")
    for name, value in row.items():
        print(f"{name:<18} {f'{value:,}' if isinstance(value, int | float) else value}")
    if options.output is not None:
        old: list[Sequence[object]] = []
        if options.output.exists():
            old = [[line[name] for name in row] for line in read_csv(options.output, list(row))]
        atomic_write(options.output, csv_bytes(list(row), [*old, list(row.values())]))
        print(f"-> {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
