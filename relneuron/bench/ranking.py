"""Cases and contestants of average_precision: relneuron, batched sorts and the libraries' loops.

bench/suite.py lists them; bench/ranking.py and bench/gpu_ranking.py take inputs and peers from
here. Peers are written as well as we can; all get the columns of one call and have to be right
before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from relneuron import ops
from relneuron.bench.case import Case, Contestant, near
from relneuron.bench.own import Own
from relneuron.ops.backends import choose_backend

_case = partial(Case, "average_precision", layout="prompt-major")
# One relation whose set is every prompt, as long as an LRE relation with its negatives; and twelve
# with sets of their own. As many columns as scikit-learn's loop does in a few hundred ms.
QUICK = [_case(T=200, F=16, G=1), _case(T=200, F=16, G=12)]
USUAL = [_case(T=4000, F=256, G=1), _case(T=8192, F=64, G=12)]
COLUMNS = {1: 128, 12: 16}  # of the cases below, by the number of relations
FULL = [
    *(_case(T=n, F=m, G=r) for r, m in COLUMNS.items() for n in (512, 4096, 16384, 65536)),
    *(_case(t, 8192, m, r) for r, m in COLUMNS.items() for t in ("bfloat16", "float64")),
    *(
        _case(T=8192, F=m, G=r, layout=layout)
        for r, m in COLUMNS.items()
        for layout in ("prompt-major", "neuron-major", "tied", "heavy-tailed")
    ),
]

ONE_THREAD = "ap, 1 thread"  # the variant whose ratios are per core
NEGATIVES = 4  # to a positive, as `identify` draws them
# What two roundings of the same sum to float32 may differ by; and what is stated for torchmetrics,
# which sums float32: 1e-7 was seen at 3,400 prompts, and the error may grow with their number.
ONE_ULP = torch.finfo(torch.float32).eps
FLOAT32_SUMS = 1e-5
MANY_COLUMNS = 4096  # past twice as many, the first and the last so many are checked


# --- inputs ----------------------------------------------------------------------------------


def draw_labels(n: int, n_relations: int) -> Tensor:
    """(R, N) int8: every relation owns its part of the rows, and draws negatives of its own.

    A single relation owns a fifth of the rows, all others are its negatives.
    """
    random = torch.Generator().manual_seed(0)
    labels = torch.full((n_relations, n), -1, dtype=torch.int8)
    n_parts = n_relations if n_relations > 1 else min(n, NEGATIVES + 1)
    for r, row in enumerate(labels):
        own = torch.arange(n) * n_parts // n == r
        n_negative = NEGATIVES * int(own.sum()) if n_relations > 1 else n
        others = (~own).nonzero().flatten()
        row[others[torch.randperm(len(others), generator=random)[:n_negative]]] = 0
        row[own] = 1
    return labels


def draw_values(case: Case, device: str) -> Tensor:
    """(N, M) of the case's dtype, with the strides and the kind of values that its layout says."""
    random = torch.Generator(device).manual_seed(0)
    is_transposed = case.layout == "neuron-major"
    shape = (case.F, case.T) if is_transposed else (case.T, case.F)
    values = torch.randn(shape, generator=random, device=device)
    if case.layout == "tied":
        values = values.mul_(100).round_().div_(100)
    elif case.layout == "heavy-tailed":
        values = values.mul_(2).exp_()
    elif case.layout not in ("prompt-major", "neuron-major"):
        raise ValueError(f"no layout {case.layout!r} of average_precision")
    values = values.to(getattr(torch, case.dtype))
    return values.T if is_transposed else values


def ranks_in_unit_interval(values: Tensor) -> Tensor:
    """(M, N) float32: each column's dense ranks over N, so ties stay ties and nothing else is."""
    ordered, order = values.T.contiguous().sort(dim=1)
    rank = torch.zeros_like(order)
    rank[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    return torch.empty_like(ordered, dtype=torch.float32).scatter_(
        1, order, rank.float() / values.shape[0]
    )


# --- batched peers ---------------------------------------------------------------------------

STEPS = 4  # tie groups of more than a few are found by a scan of everything
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 27}  # values sorted at a time by torch
NUMPY_CHUNK = 1 << 16  # doubles: 0.5 MB, inside of a core's own cache


def batched_torch(values: Tensor, labels: Tensor) -> Tensor:
    """One sort of contiguous rows for all relations; precision at the positives alone."""
    n, m = values.shape
    device = values.device
    ap = torch.empty(len(labels), m, device=device)
    n_positive = (labels == 1).sum(1).tolist()
    is_full = (labels >= 0).all(1).tolist()
    step = max(1, CHUNK[device.type] // n)
    # On a CPU a whole matrix is transposed by tiles, a part of it element by element.
    columns = values.T.contiguous() if device.type == "cpu" else values.T
    for start in range(0, m, step):
        rows = columns[start : start + step].contiguous()
        ordered, order = rows.sort(dim=1, descending=True)
        is_tied = torch.zeros_like(order, dtype=torch.bool)
        torch.eq(ordered[:, 1:], ordered[:, :-1], out=is_tied[:, :-1])
        first = torch.arange(len(rows), device=device)[:, None]
        for r, row in enumerate(labels):
            p = n_positive[r]
            own = row.take(order)
            place = (own == 1).view(-1).nonzero().view(-1, p)
            end = _ends_torch(is_tied, place)
            if is_full[r]:
                count = end - (n * first - 1)
            else:
                count = (own >= 0).cumsum(1, dtype=torch.int32).view(-1)[end]
            tp = torch.arange(1, p + 1, device=device)[None]
            if end is not place:
                is_tied_own = torch.zeros_like(end, dtype=torch.bool)
                torch.eq(end[:, 1:], end[:, :-1], out=is_tied_own[:, :-1])
                tp = _ends_torch(is_tied_own, p * first + tp - 1) - (p * first - 1)
            ap[r, start : start + step] = (tp / count.double()).sum(1) / p
    return ap


def _ends_torch(is_tied: Tensor, place: Tensor) -> Tensor:
    """Where the tie groups of flat places end; is_tied (m, n): a place equals the next one."""
    flat, end = is_tied.view(-1), place
    for _ in range(STEPS):
        moves = flat[end]
        if not bool(moves.any()):
            return end
        end = end + moves
    ends = torch.arange(flat.numel(), device=flat.device).view_as(is_tied)
    ends = ends.masked_fill_(is_tied, flat.numel()).flip(1).cummin(1).values.flip(1)
    return ends.reshape(-1)[place]


class _Relation(NamedTuple):
    members: np.ndarray[Any, Any]  # rows of its set
    is_positive: np.ndarray[Any, Any]  # uint64, of its members
    n_positive: int


def batched_numpy(values: Tensor, labels: Tensor) -> Tensor:
    """One sort for each relation's own rows; numpy sorts by vector instructions.

    A float64 holds a float32 and has 29 bits to spare: the lowest carries the label, so the sort
    moves labels along and nothing is gathered. float64 values need argsort.
    """
    is_double = values.dtype == torch.float64
    # torch transposes a whole matrix by tiles, numpy element by element.
    columns = values.T.contiguous()
    array = (columns if is_double else columns.float()).numpy()
    relations = []
    for row in labels.numpy():
        members = np.flatnonzero(row >= 0)
        positive = (row[members] == 1).astype(np.uint64)
        relations.append(_Relation(members, positive, int(positive.sum())))
    ap = np.empty((len(labels), values.shape[1]), np.float32)
    step = max(1, NUMPY_CHUNK // values.shape[0])

    def work(start: int) -> None:
        part = slice(start, start + step)
        # Negated, so that ascending is descending; 0 - x knows no -0.
        rows = np.subtract(0.0, array[part], dtype=np.float64)
        for r, relation in enumerate(relations):
            ap[r, part] = _ap_numpy(rows, relation, is_double)

    starts = range(0, values.shape[1], step)
    n_threads = torch.get_num_threads()
    # numpy lets go of Python's lock while it sorts and takes.
    in_threads = n_threads > 1 and len(starts) > 1
    list(_pool(n_threads).map(work, starts) if in_threads else map(work, starts))
    return torch.from_numpy(ap)


def _ap_numpy(rows: Any, relation: _Relation, is_double: bool) -> Any:
    """AP (m,) of rows (m, N) that are sorted ascending."""
    # A set of all rows is copied, since sorting is done in place.
    is_full = len(relation.members) == rows.shape[1]
    keys = rows.copy() if is_full else rows.take(relation.members, axis=1)
    m, n = keys.shape
    is_tied = np.zeros((m, n), bool)
    if is_double:
        order = keys.argsort(axis=1)
        keys = np.take_along_axis(keys, order, axis=1)
        is_positive = relation.is_positive[order] != 0
        np.equal(keys[:, 1:], keys[:, :-1], out=is_tied[:, :-1])
    else:
        bits = keys.view(np.uint64)
        bits |= relation.is_positive
        keys.sort(axis=1)
        is_positive = (bits & 1) != 0
        np.less(bits[:, 1:] ^ bits[:, :-1], 2, out=is_tied[:, :-1])
    p = relation.n_positive
    first = np.arange(m)[:, None]
    place = np.flatnonzero(is_positive).reshape(m, p)
    end = _ends_numpy(is_tied, place)
    tp = np.arange(1, p + 1)
    if end is not place:
        is_tied_own = np.zeros((m, p), bool)
        np.equal(end[:, 1:], end[:, :-1], out=is_tied_own[:, :-1])
        tp = _ends_numpy(is_tied_own, p * first + tp - 1) - (p * first - 1)
    return (tp / (end - (n * first - 1))).sum(1) / p


def _ends_numpy(is_tied: Any, place: Any) -> Any:
    """`_ends_torch` in numpy."""
    flat, end = is_tied.reshape(-1), place
    for _ in range(STEPS):
        moves = flat.take(end)
        if not moves.any():
            return end
        end = end + moves
    ends = np.flatnonzero(~flat)
    return np.repeat(ends, np.diff(ends, prepend=-1)).take(place)


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads)


# --- the loops of libraries ------------------------------------------------------------------


def sklearn_loop(rows: Any, labels: Any) -> Tensor:
    """scikit-learn's function, a call for each relation and row of (M, N), which lie as it likes.

    A relation's rows are taken out for all columns at once.
    """
    from sklearn.metrics import average_precision_score

    ap = torch.empty(len(labels), len(rows))
    for r, label in enumerate(labels):
        members = np.flatnonzero(label >= 0)
        is_full, truth = len(members) == len(label), label[members]
        part = rows if is_full else rows.take(members, axis=1)
        ap[r] = torch.tensor([average_precision_score(truth, row) for row in part])
    return ap


def torchmetrics_loop(rows: Tensor, labels: Tensor) -> Tensor:
    """torchmetrics' binary function, likewise; its multilabel one is a slower loop around it.

    It takes whatever is outside of [0, 1] for logits and applies a sigmoid, which rounds 40.0 and
    41.0 to the same 1.0: give it values in [0, 1], such as `ranks_in_unit_interval`.
    """
    classification: Any = import_module("torchmetrics.functional.classification")
    binary = classification.binary_average_precision
    ap = torch.empty(len(labels), len(rows), device=rows.device)
    for r, label in enumerate(labels):
        members = (label >= 0).nonzero().flatten()
        truth = label[members].long()
        part = rows if len(members) == len(label) else rows.index_select(1, members)
        calls = [binary(row, truth, thresholds=None, validate_args=False) for row in part]
        ap[r] = torch.stack(calls)
    return ap


# --- contestants -----------------------------------------------------------------------------


@contextmanager
def one_thread() -> Iterator[None]:
    """torch and relneuron on one thread."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def average_precision_contestants(
    case: Case,
    device: str,
    n_sets: int,
    compiled: bool,
    n_looped: int | None = None,
    own: Own | None = None,
) -> list[Contestant]:
    """Everybody who takes part in a case of average_precision; the first is what ratios refer to.

    On a CPU the loops, which use one thread, are compared with relneuron on one thread. With
    `n_looped` the loops do no more than that many columns of the case.
    """
    values, on_cpu = draw_values(case, device), draw_labels(case.T, case.G)
    labels = on_cpu.to(device)
    checked = torch.arange(case.F, device=device)
    if case.F > 2 * MANY_COLUMNS:
        checked = torch.cat([checked[:MANY_COLUMNS], checked[-MANY_COLUMNS:]])
    want = ops.average_precision(values[:, checked], labels, backend="reference")

    def same_bits(ap: Tensor) -> None:
        n_wrong = int((ap[:, checked] != want).sum())
        assert not n_wrong, f"{n_wrong} of {want.numel()} differ in a bit: average precision"

    def same(ap: Tensor, tolerance: float = ONE_ULP) -> None:
        ap = ap.to(device)
        n_done = ap.shape[1]
        got, right = (ap[:, checked], want) if n_done == case.F else (ap, want[:, :n_done])
        near(got, right, tolerance * right, "average precision")

    some = values[:, :n_looped]
    # numpy has no bfloat16; as float32 its values are the same.
    columns = (some if some.dtype == torch.float64 else some.float()).T.contiguous().cpu().numpy()
    ranks, plain_labels = ranks_in_unit_interval(some), on_cpu.numpy()
    n_bytes = values.numel() * values.element_size() + labels.numel() + 4 * case.G * case.F
    found = []

    def add(
        variant: str,
        name: str,
        call: Callable[[], Tensor],
        check: Callable[[Tensor], None] = same,
        **more: Any,
    ) -> None:
        around = one_thread if variant == ONE_THREAD else nullcontext

        def verify() -> None:
            with around():
                check(call())

        run = lambda _: call()  # noqa: E731
        found.append(Contestant(name, variant, run, verify, n_bytes, n_bytes, around, **more))

    variants = ("ap", ONE_THREAD) if device == "cpu" else ("ap",)
    ours = partial(ops.average_precision, values, labels)
    is_kernel = choose_backend("average_precision", "auto", device) != "reference"
    note = "" if is_kernel else "the reference ran: no kernel works here"
    for variant in variants:
        add(variant, "relneuron", ours, same_bits, is_base=True, note=note)
        add(variant, "batched torch", partial(batched_torch, values, labels))
        if device == "cpu":
            add(variant, "batched numpy", partial(batched_numpy, values, labels))
    if own is not None:

        def same_as_contract(ap: Tensor) -> None:
            own.verify(case, device, *(["strides"] if not values.is_contiguous() else []))
            same_bits(ap)

        add("ap", own.name, partial(own.function, values, labels), same_as_contract)
    add(
        variants[-1],
        "sklearn loop",
        partial(sklearn_loop, columns, plain_labels),
        missing="" if find_spec("sklearn") else "scikit-learn is not installed",
        note="one CPU thread",
    )
    add(
        variants[-1],
        "torchmetrics loop",
        partial(torchmetrics_loop, ranks, labels),
        partial(same, tolerance=FLOAT32_SUMS),
        missing="" if find_spec("torchmetrics") else "torchmetrics is not installed",
        note=f"float32 sums, held to {FLOAT32_SUMS:g}; given ranks in [0, 1], since it applies a "
        "sigmoid to values outside, which makes ties",
    )
    return found
