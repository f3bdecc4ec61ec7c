"""Cases and contestants of pair_stats: relneuron and the same statistics in plain torch.

bench/suite.py lists them. Peers are written as well as we can: rows of a group are sliced (rows in
mixed order are put together first), buffers are kept where `tuned`, and a few rows at a time stay
in the caches. All add to float64 sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from relneuron import ops
from relneuron.bench.case import Case, Contestant, near
from relneuron.bench.own import Own
from relneuron.ops.backends import choose_backend

_case = partial(Case, "pair_stats", T=4096)
QUICK = [_case(dtype=dtype, T=64, F=352) for dtype in ("float32", "bfloat16")]
USUAL = [_case(dtype=dtype) for dtype in ("float32", "bfloat16")]
FULL = [
    _case(dtype=dtype, G=groups, layout=layout)
    for dtype in ("float32", "bfloat16", "float16")
    for groups, layout in ((1, "sorted"), (12, "sorted"), (12, "mixed"))
]
# Rows of a block of `Tuned`, of 11,008 columns in float32 2.8 MB.
BLOCK_ROWS = 64
# What a variant counts.
VARIANTS = {"pair": ops.PAIR_SITES, "difference": ("difference",)}

Bounds = Sequence[tuple[int, int]]
Peer = Callable[[Tensor, Tensor, ops.GroupStats], None]


def site_values(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The three sites in float32."""
    wide, other = a.float(), b.float()
    return {"a": wide, "b": other, "difference": wide - other}


def tables(a: Tensor, b: Tensor, bounds: Bounds, sites: Sequence[str]) -> list[Tensor]:
    """Five tables (G, F) a site: counts, sums, sums of squares, maxima, non-finite values."""
    values, found = site_values(a, b), []
    for site in sites:
        finite = values[site].isfinite()
        kept = torch.where(finite, values[site], 0.0)
        highest = torch.where(finite, values[site], -torch.inf)
        whole = (
            ((values[site] > 0), torch.sum),
            (kept, torch.sum),
            (kept.square(), torch.sum),
            (highest, torch.amax),
            (~finite, torch.sum),
        )
        for table, reduced in whole:
            found.append(torch.stack([reduced(table[start:end], 0) for start, end in bounds]))
    return found


def add_tables(
    make: Callable[..., list[Tensor]],
    bounds: Bounds,
    a: Tensor,
    b: Tensor,
    stats: ops.GroupStats,
) -> None:
    """The tables of `make`, added to the statistics."""
    found = iter(make(a, b, bounds, stats.sites))
    for site in stats.sites:
        stats.count[site].add_(next(found))
        stats.sum[site].add_(next(found))
        stats.sum_sq[site].add_(next(found))
        highest = stats.max[site]
        torch.maximum(highest, next(found), out=highest)
        stats.n_nonfinite[site].add_(next(found))


class Tuned:
    """`tables` with every buffer kept, for a few rows at a time, looking for NaN only in the sums.

    Hits are float32 at once: on a CPU torch sums float32 several times faster than bool.
    """

    def __init__(self, like: Tensor, bounds: Bounds, block_rows: int) -> None:
        self.bounds, self.block_rows = bounds, block_rows
        rows = min(block_rows, len(like))
        self.wide = [torch.empty(rows, like.shape[1], device=like.device) for _ in range(4)]
        self.row = torch.empty(like.shape[1], device=like.device)

    def __call__(self, a: Tensor, b: Tensor, stats: ops.GroupStats) -> None:
        for group, (begin, end) in enumerate(self.bounds):
            for start in range(begin, end, self.block_rows):
                rows = slice(start, min(end, start + self.block_rows))
                self.add(group, a[rows], b[rows], stats)

    def add(self, group: int, a: Tensor, b: Tensor, stats: ops.GroupStats) -> None:
        first, second, difference, scratch = (buffer[: len(a)] for buffer in self.wide)
        if a.dtype != torch.float32:
            a, b = first.copy_(a), second.copy_(b)
        values = {"a": a, "b": b, "difference": torch.sub(a, b, out=difference)}
        for site in stats.sites:
            x = values[site]
            torch.mul(x, x, out=scratch)
            square = torch.sum(scratch, 0, out=self.row)
            assert bool(square.isfinite().all()), "then the values would be looked at one by one"
            stats.sum_sq[site][group].add_(square)
            stats.sum[site][group].add_(torch.sum(x, 0, out=self.row))
            torch.gt(x, 0, out=scratch)
            stats.count[site][group].add_(torch.sum(scratch, 0, out=self.row).long())
            highest = stats.max[site][group]
            torch.maximum(highest, torch.amax(x, 0, out=self.row), out=highest)


def pair_stats_contestants(
    case: Case, device: str, n_sets: int, compiled: bool, own: Own | None = None
) -> list[Contestant]:
    """Everybody who takes part in a case of pair_stats; the first is what ratios refer to."""
    torch.compiler.reset()  # its limit of shapes per function is for a whole process
    random = torch.Generator(device).manual_seed(0)
    shape, dtype = (case.T, case.F), getattr(torch, case.dtype)

    def normal() -> Tensor:
        return torch.randn(shape, generator=random, dtype=dtype, device=device)

    empty = partial(torch.empty, shape, dtype=dtype, device=device)
    sets = [(normal(), normal(), empty()) for _ in range(n_sets)]
    order = torch.arange(case.T, device=device)
    if case.layout == "mixed":
        order = torch.randperm(case.T, generator=random, device=device)
    ids = (order * case.G // case.T).int()
    by_group = None if case.layout == "sorted" else ids.argsort(stable=True)
    ends = torch.bincount(ids, minlength=case.G).cumsum(0).tolist()
    bounds = tuple(zip([0, *ends[:-1]], ends, strict=True))
    is_kernel = choose_backend("pair_stats", "auto", device) != "reference"
    note = "" if is_kernel else "the reference ran: no kernel works here"
    element_bytes = sets[0][0].element_size()
    least = case.T * case.F * element_bytes
    found: list[Contestant] = []
    takes_ids = {"relneuron", own.name if own is not None else ""}

    def fresh(variant: str) -> ops.GroupStats:
        return ops.GroupStats(
            groups=case.G, width=case.F, sites=VARIANTS[variant], moments=True, device=device
        )

    def ours(a: Tensor, b: Tensor, stats: ops.GroupStats, backend: str = "auto") -> None:
        ops.pair_stats(a, b, stats=stats, group_ids=ids, ids_checked=True, backend=backend)

    def add(variant: str, name: str, call: Peer, moved: float = 2) -> None:
        stats = fresh(variant)

        def run(number: int) -> None:
            a, b, _ = sets[number % len(sets)]
            if by_group is not None and name not in takes_ids:
                a, b = a.index_select(0, by_group), b.index_select(0, by_group)
            call(a, b, stats)

        def check() -> None:
            if own is not None and name == own.name:
                own.verify(case, device)
            want = fresh(variant)
            ours(*sets[0][:2], want, backend="reference")
            run(0)
            _same_stats(stats, want)

        if by_group is not None and name not in takes_ids:
            moved += 4
        is_ours, n_bytes = name == "relneuron", (2 * least, round(moved * least))
        said = note if is_ours else ""
        found.append(Contestant(name, variant, run, check, *n_bytes, note=said, is_base=is_ours))

    # Elements per token and neuron: a float32 is written and read again.
    wide = 8 / element_bytes
    peers: list[tuple[str, Callable[[], Peer], float]] = [
        ("eager", lambda: partial(add_tables, tables, bounds), 2 + 7 * wide),
        ("eager tuned", lambda: Tuned(sets[0][0], bounds, case.T), 2 + 3 * wide),
        ("eager tuned, in blocks", lambda: Tuned(sets[0][0], bounds, BLOCK_ROWS), 2),
    ]
    if compiled:
        made = partial(torch.compile, tables, dynamic=False, fullgraph=True)
        peers.append(("compile", lambda: partial(add_tables, made(), bounds), 2))
    for variant in VARIANTS:
        add(variant, "relneuron", ours)
        for name, make, moved in peers:
            add(variant, name, make(), moved)
        if own is not None:
            add(variant, own.name, partial(_called, own, ids))

    def ceiling(name: str, call: Callable[[Tensor, Tensor, Tensor], Tensor], n: int) -> None:
        run = lambda number: call(*sets[number % len(sets)])  # noqa: E731
        found.append(Contestant(name, "ceiling", run, lambda: None, n * least, n * least))

    ceiling("triad", lambda a, b, out: torch.sub(a, b, out=out), 3)
    ceiling("copy", lambda a, b, out: out.copy_(a), 2)
    return found


def _called(own: Own, ids: Tensor, a: Tensor, b: Tensor, stats: ops.GroupStats) -> None:
    own.function(a, b, stats=stats, group_ids=ids)


def _same_stats(stats: ops.GroupStats, want: ops.GroupStats) -> None:
    """Counts, maxima and non-finite values exactly, sums as the contract of relneuron.testing."""
    eps = 16 * torch.finfo(torch.float32).eps
    for site in want.sites:
        for name in ("count", "max", "n_nonfinite"):
            n_wrong = int((getattr(stats, name)[site] != getattr(want, name)[site]).sum())
            assert not n_wrong, f"{n_wrong} of {name} of {site} differ"
        square = want.sum_sq[site]
        # The sum of the absolute values is at most this.
        size = (want.tokens[:, None] * square).sqrt()
        near(stats.sum[site], want.sum[site], eps * size, f"sum of {site}")
        near(stats.sum_sq[site], square, eps * square, f"sum_sq of {site}")
