"""Cases and contestants of peaks, merge_peaks and histogram: relneuron and plain torch.

bench/suite.py lists them. Peers are written as well as we can: rows of a window or group are
sliced. torch's own silu is within a rounding of ours, so a peer's peaks are compared by value.
`counting alone` is `swiglu_stats_only` for the same tokens, what the peaks come beside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as nnf

from relneuron import ops
from relneuron.bench.case import Case, Contestant, near
from relneuron.bench.own import Own
from relneuron.ops.backends import choose_backend

KEPT = 16  # the best peaks of a neuron
BINS = 64
_peaks = partial(Case, "peaks", T=4096, G=32)
_merge = partial(Case, "merge_peaks", T=32, G=1)
_histogram = partial(Case, "histogram", T=4096)
DTYPES = ("float32", "bfloat16")
QUICK = [
    *(_peaks(dtype=dtype, T=64, F=352, G=4) for dtype in DTYPES),
    _merge(T=8, F=352),
    *(_histogram(dtype=dtype, T=64, F=352) for dtype in DTYPES),
]
USUAL = [
    *(_peaks(dtype=dtype) for dtype in DTYPES),
    _merge(),
    *(_histogram(dtype=dtype) for dtype in DTYPES),
]
FULL = [
    *(
        make(dtype=dtype, layout=layout)
        for make in (_peaks, _histogram)
        for dtype in (*DTYPES, "float16")
        for layout in ("sorted", "mixed")
    ),
    *(_merge(G=groups) for groups in (1, 12)),
]


class _Bench:
    """Inputs and the contestants of a case whose rows belong to G windows or groups."""

    def __init__(self, case: Case, device: str, n_sets: int) -> None:
        torch.compiler.reset()  # its limit of shapes per function is for a whole process
        self.case, self.device = case, device
        random = torch.Generator(device).manual_seed(0)
        shape, dtype = (case.T, case.F), getattr(torch, case.dtype)
        self.sets = [
            torch.randn(shape, generator=random, dtype=dtype, device=device) for _ in range(n_sets)
        ]
        order = torch.arange(case.T, device=device)
        if case.layout == "mixed":
            order = torch.randperm(case.T, generator=random, device=device)
        self.ids = (order * case.G // case.T).int()
        self.by_group = None if case.layout == "sorted" else self.ids.argsort(stable=True)
        ends = torch.bincount(self.ids, minlength=case.G).cumsum(0).tolist()
        self.bounds = tuple(zip([0, *ends[:-1]], ends, strict=True))
        self.n_bytes = case.T * case.F * self.sets[0].element_size()
        self.contestants: list[Contestant] = []

    def add(
        self,
        name: str,
        run: Callable[[Tensor], object],
        check: Callable[[], None],
        moved: float = 1,
        variant: str = "",
    ) -> None:
        """`moved` counts elements of the inputs' dtype per neuron and token."""
        note = ""
        if name == "relneuron" and choose_backend("peaks", "auto", self.device) == "reference":
            note = "the reference ran: no kernel works here"
        self.contestants.append(
            Contestant(
                name,
                variant or self.case.op,
                lambda number: run(self.sets[number % len(self.sets)]),
                check,
                self.n_bytes,
                round(moved * self.n_bytes),
                note=note,
                is_base=name == "relneuron",
            )
        )

    def together(self, gate: Tensor) -> Tensor:
        """The rows of a group beside each other."""
        return gate if self.by_group is None else gate.index_select(0, self.by_group)

    def add_counting(self) -> None:
        """What comes beside it in a pass: the counts of the same tokens, all in one group."""
        stats = ops.GroupStats(groups=1, width=self.case.F, device=self.device)
        run = partial(_counted, stats=stats)
        self.add("counting alone", run, lambda: None, variant="count")


def _counted(gate: Tensor, *, stats: ops.GroupStats) -> None:
    ops.swiglu_stats_only(gate, None, stats=stats)


def eager_peaks(gate: Tensor, bounds: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """Values and rows of the largest acts of each window."""
    act = nnf.silu(gate)
    found = [act[begin:end].max(0) for begin, end in bounds]
    rows = [part.indices + begin for part, (begin, _) in zip(found, bounds, strict=True)]
    return torch.stack([part.values for part in found]), torch.stack(rows)


def peaks_contestants(
    case: Case, device: str, n_sets: int, compiled: bool, own: Own | None = None
) -> list[Contestant]:
    """Everybody who takes part in a case of peaks; the first is what ratios refer to."""
    b = _Bench(case, device, n_sets)
    values = torch.empty(case.G, case.F, device=device)
    positions = torch.empty(case.G, case.F, dtype=torch.int32, device=device)
    made: list[tuple[Tensor, Tensor]] = []

    def with_ids(op: Callable[..., None], gate: Tensor, **options: object) -> None:
        call = {"values": values.fill_(-torch.inf), "positions": positions.fill_(-1)}
        op(gate, None, activation="silu", site="act", **call, segment_ids=b.ids, **options)
        made[:] = [(values, positions)]

    ours = partial(with_ids, ops.peaks)

    def same(of: Callable[[Tensor], object]) -> None:
        ours(b.sets[0], backend="reference")
        want = [part.clone() for part in made[0]]
        of(b.sets[0])
        for got, wanted, what in zip(made[0], want, ("values", "positions"), strict=True):
            n_wrong = int((got != wanted).sum())
            assert not n_wrong, f"{n_wrong} of {got.numel()} {what} differ"

    def peer(make: Callable[..., tuple[Tensor, Tensor]], gate: Tensor) -> None:
        made[:] = [make(b.together(gate), b.bounds)]

    def about(make: Callable[..., tuple[Tensor, Tensor]]) -> None:
        ours(b.sets[0], backend="reference")
        want = made[0][0].clone()
        peer(make, b.sets[0])
        largest, rows = made[0]
        gate = b.together(b.sets[0])
        eps = torch.finfo(gate.dtype).eps
        near(largest.float(), want, 4 * eps * want.abs(), "values")
        there = nnf.silu(gate).gather(0, rows).float()
        near(there, largest.float(), 4 * eps * want.abs(), "the values at the rows")

    b.add("relneuron", partial(ours, backend="auto", ids_checked=True), partial(same, ours))
    moved = 3 + (0 if b.by_group is None else 2)
    b.add("eager", partial(peer, eager_peaks), partial(about, eager_peaks), moved)
    if compiled:
        fast = torch.compile(eager_peaks, dynamic=False, fullgraph=True)
        b.add("compile", partial(peer, fast), partial(about, fast), moved - 2)
    if own is not None:

        def check_own() -> None:
            own.verify(case, device, "ungated")
            same(partial(with_ids, own.function))

        b.add(own.name, partial(with_ids, own.function), check_own)
    b.add_counting()
    return b.contestants


def merge_peaks_contestants(
    case: Case, device: str, n_sets: int, compiled: bool, own: Own | None = None
) -> list[Contestant]:
    """Of merge_peaks: T segments join what a thousand batches of them have left, as most do."""
    b = _Bench(case, device, n_sets)
    positions = torch.arange(case.F, device=device).expand(case.T, -1).int() % 128
    numbers = torch.arange(case.T, device=device)
    # The K largest of 1000 T normal numbers are about here.
    start = ops.BestPeaks.none(case.G, case.F, KEPT, device=device)
    start.value.copy_(torch.linspace(4.2, 3.3, KEPT, device=device).expand_as(start.value))
    start.number.copy_(torch.arange(KEPT, device=device).expand_as(start.value))
    start.position.zero_()
    best = start.to(device)

    def joined(op: Callable[..., None], values: Tensor, **options: object) -> None:
        op(values, positions, best=best, numbers=numbers, group_ids=b.ids, **options)

    def eager(values: Tensor) -> None:
        """By value alone: torch has no order of three keys."""
        for group, (begin, end) in enumerate(b.bounds):
            own = torch.cat([best.value[group], b.together(values)[begin:end].T], 1)
            top = own.topk(KEPT, 1)
            best.value[group] = top.values
            others = (best.number, numbers, best.position, positions)
            for old, new in zip(others[::2], others[1::2], strict=True):
                rows = b.together(new)[begin:end]
                rows = rows.T if rows.ndim == 2 else rows.expand(case.F, -1)
                old[group] = torch.cat([old[group], rows], 1).gather(1, top.indices)

    def same(of: Callable[[Tensor], object]) -> None:
        found = []
        for run in (partial(joined, ops.merge_peaks, backend="reference"), of):
            for part, begin in zip(vars(best).values(), vars(start).values(), strict=True):
                part.copy_(begin)
            run(b.sets[0])
            found.append(best.to("cpu"))
        for name in vars(best):
            n_wrong = int((getattr(found[0], name) != getattr(found[1], name)).sum())
            assert not n_wrong, f"{n_wrong} of {name} differ"

    ours = partial(joined, ops.merge_peaks, ids_checked=True)
    b.add("relneuron", ours, partial(same, ours))
    b.add("eager", eager, partial(same, eager), 2)
    if own is not None:

        def check_own() -> None:
            own.verify(case, device)
            same(partial(joined, own.function))

        b.add(own.name, partial(joined, own.function), check_own)
    return b.contestants


def histogram_contestants(
    case: Case, device: str, n_sets: int, compiled: bool, own: Own | None = None
) -> list[Contestant]:
    """Of histogram; a peer's act may be in the neighbouring bin."""
    b = _Bench(case, device, n_sets)
    exponent, first = ops.histogram_edges(*ops.site_range(b.sets[0]), BINS)
    counts = torch.zeros(case.G, case.F, BINS, dtype=torch.int64, device=device)
    edges = {"exponent": exponent, "first": first}

    def counted(op: Callable[..., None], gate: Tensor, **options: object) -> None:
        given = {"activation": "silu", "site": "act", "counts": counts, **edges}
        op(gate, None, **given, group_ids=b.ids, **options)

    neuron = torch.arange(case.F, device=device) * BINS
    step = torch.exp2(-exponent.float())

    def eager(gate: Tensor) -> None:
        place = (nnf.silu(gate).float() * step).floor_().sub_(first).clamp_(0, BINS - 1)
        cell = place.long() + neuron + b.ids[:, None].long() * (case.F * BINS)
        counts.view(-1).add_(torch.bincount(cell.view(-1), minlength=counts.numel()))

    def made(of: Callable[[Tensor], object]) -> Tensor:
        counts.zero_()
        of(b.sets[0])
        return counts.clone()

    def same(of: Callable[[Tensor], object], allowed: float = 0.0) -> None:
        want = made(partial(counted, ops.histogram, backend="reference"))
        n_wrong = int((made(of) - want).abs().sum()) // 2
        assert n_wrong <= allowed * case.T * case.F, f"{n_wrong} are in another bin"

    ours = partial(counted, ops.histogram, ids_checked=True)
    b.add("relneuron", ours, partial(same, ours))
    size = b.sets[0].element_size()
    b.add("eager", eager, partial(same, eager, 1e-3), 1 + (16 + 24) / size)
    if own is not None:

        def check_own() -> None:
            own.verify(case, device, "ungated")
            same(partial(counted, own.function))

        b.add(own.name, partial(counted, own.function), check_own)
    b.add_counting()
    return b.contestants
