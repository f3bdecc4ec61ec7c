"""Tests of ops.pair_stats: every backend against its definition, and against the others by bits."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from relneuron.ops import PAIR_SITES, GroupStats, pair_stats
from relneuron.testing import assert_same_bits
from relneuron.testing.oracle import all_patterns, integers, normal
from tests.kit.interpreter import quiet
from tests.ops.swiglu_stats import runs
from tests.ops.swiglu_stats.cases import DTYPES, THRESHOLDS, check_values, strided
from tests.ops.swiglu_stats.runs import BACKENDS, FUSED, ISAS, assert_same_stats, device_of, move

op: Any = importlib.import_module("relneuron.ops.swiglu_stats.op")
pytestmark = quiet

SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, torch.inf, -torch.inf, torch.nan)
# As many sums as csrc and the interpreter's tiles add up in float32.
TOLERANCE = runs.TritonTolerance(0.0, {})


def run(
    backend: str,
    a: Tensor,
    b: Tensor,
    ids: Tensor | None = None,
    *,
    n_threads: int = 1,
    launch: Any = None,
    **options: Any,
) -> GroupStats:
    """Of one call, on the CPU; "cpu-avx2" forces an instruction set."""
    device, (name, _, isa) = device_of(backend), backend.partition("-")
    given = {"groups": 3, "sites": PAIR_SITES, "moments": True, **options}
    stats = GroupStats(width=a.shape[1], device=device, **given)
    forced = functools.partial(op.swiglu_stats_cpu, isa=isa, n_threads=n_threads)
    with (
        mock.patch.object(op, "swiglu_stats_cpu", forced),
        mock.patch.object(op, "ran_quickly", return_value=False),
        runs.interpreted_with(a, launch) if name == "triton" else contextlib.nullcontext(),
    ):
        tensors = {"group_ids": move(ids, device)} if ids is not None else {}
        pair_stats(move(a, device), move(b, device), stats=stats, backend=name, **tensors)  # type: ignore[arg-type]
    return stats.to("cpu")


def assert_same(out: GroupStats, expected: GroupStats, backend: str) -> None:
    """Integers and maxima exactly, sums with the rounding of float32 partial sums."""
    tolerance = TOLERANCE if backend == "triton" else None
    assert_same_stats(out, expected, exact_sums=False, tolerance=tolerance)


def wild(n_tokens: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random values, some of them special ones."""
    values = normal(n_tokens, width, dtype=dtype, seed=seed)
    flat = values.view(-1)
    places = integers(0, max(flat.numel(), 1), flat.numel() // 9, seed=seed + 1).long()
    flat[places] = torch.tensor(SPECIAL).to(dtype)[places % len(SPECIAL)]
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_tokens", "width"), [(37, 200), (1, 1), (5, 64), (0, 8), (3, 0)])
def test_the_reference_is_the_definition(n_tokens: int, width: int, dtype: torch.dtype) -> None:
    a, b = wild(n_tokens, width, dtype, 1), wild(n_tokens, width, dtype, 2)
    ids = integers(-1, 3, n_tokens)
    with np.errstate(all="ignore"):
        difference = np.subtract(a.float().numpy(), b.float().numpy(), dtype=np.float32)
    values = {"a": a, "b": b, "difference": torch.from_numpy(difference)}
    for threshold in (0.0, 0.1):
        stats = run("reference", a, b, ids, threshold=threshold)
        check_values(stats, values, ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 200), (1, 1), (131, 65), (0, 8), (3, 0)])
@pytest.mark.parametrize("backend", FUSED)
def test_all_backends_record_the_same(
    backend: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    a, b = wild(*shape, dtype, 3), wild(*shape, dtype, 4)
    mixed = integers(-1, 3, shape[0])
    for ids in (mixed, mixed.sort().values):
        expected = run("reference", a, b, ids, threshold=0.1)
        assert_same(run(backend, a, b, ids, threshold=0.1), expected, backend)


@pytest.mark.parametrize("backend", FUSED)
def test_any_choice_of_sites_is_that_of_all(backend: str) -> None:
    """One site alone, without moments and at zero, has ways of its own in the kernels."""
    a, b = wild(9, 70, torch.float32, 5), wild(9, 70, torch.float32, 6)
    whole = run("reference", a, b, groups=1)
    choices = itertools.chain.from_iterable(
        itertools.permutations(PAIR_SITES, n) for n in range(1, 4)
    )
    for sites, moments in itertools.product(choices, (False, True)):
        stats = run(backend, a, b, groups=1, sites=sites, moments=moments)
        for site in sites:
            assert_same_bits(stats.count[site], whole.count[site], f"{site} of {sites}")
            if moments:
                assert_same_bits(stats.max[site], whole.max[site], f"{site} of {sites}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_all_half_patterns_and_thresholds(backend: str, dtype: torch.dtype) -> None:
    a, b = all_patterns(dtype, 1), all_patterns(dtype, 2)
    for threshold in (0.0, *THRESHOLDS[2:4]):
        expected = run("reference", a, b, groups=1, threshold=threshold)
        assert_same(run(backend, a, b, groups=1, threshold=threshold), expected, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_difference_of_large_numbers(backend: str, dtype: torch.dtype) -> None:
    """Mean 10, differences of 1e-3, or one unit of a 16-bit type: the RMS to 1e-6.

    Made of the moments of a and b in float32, it would be off by a factor.
    """
    n_tokens, width = 4000, 24
    b = normal(n_tokens, width, dtype=torch.float32, scale=1.0).add(10.0).to(dtype)
    step = max(1e-3, 16 * torch.finfo(dtype).eps)
    a = (b.float() + normal(n_tokens, width, dtype=torch.float32, seed=1, scale=step)).to(dtype)
    truth = (a.double() - b.double()).square().mean(0).sqrt()
    stats = run(backend, a, b, groups=1)
    rms = (stats.sum_sq["difference"][0] / n_tokens).sqrt()
    assert float((rms / truth - 1).abs().max()) < 1e-6
    one, two = a.float(), b.float()
    moments = (one.square().mean(0) + two.square().mean(0) - 2 * (one * two).mean(0)).abs().sqrt()
    if dtype == torch.float32:
        assert float((moments / truth - 1).abs().max()) > 0.1


# Chen et al. (arXiv 2406.14144), the change score, by hand: 4 tokens, 2 layers of 3 neurons.
M1 = [
    [0.5, -1, 0, 2, 0.1, -0.2],
    [0.4, -1.2, 0.1, 1.8, 0.1, -0.1],
    [0.6, -0.8, 0.3, 2.2, 0.3, -0.3],
    [0.5, -1, 0, 2, 0.1, 0.2],
]
M2 = [
    [0.5, -0.5, 0, 1, 0.1, -0.2],
    [0.1, -0.6, 0.1, 0.9, 0.1, -0.1],
    [0.6, -0.4, -0.1, 1.1, 0.3, -0.3],
    [0.2, -0.5, 0, 1, 0.1, 0.6],
]
SCORES = [0.21213203, 0.50497525, 0.2, 1.00249688, 0.0, 0.2]
STD_A = [0.08164966, 0.16329932, 0.14142136, 0.16329932, 0.1, 0.21602469]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_change_score(backend: str) -> None:
    a, b = torch.tensor(M1), torch.tensor(M2)
    stats = run(backend, a, b, groups=1)
    rms = (stats.sum_sq["difference"][0] / stats.tokens[0]).sqrt()
    torch.testing.assert_close(rms, torch.tensor(SCORES).double(), rtol=1e-6, atol=1e-8)
    mean = stats.sum["a"][0] / 4
    std = ((stats.sum_sq["a"][0] - 4 * mean**2) / 3).sqrt()
    torch.testing.assert_close(std, torch.tensor(STD_A).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_tensors_do_not_differ(backend: str) -> None:
    """Nor does a tensor from itself; where both are infinite the difference is NaN."""
    a = wild(20, 40, torch.bfloat16, 7)
    for b in (a, a.clone()):
        stats = run(backend, a, b, groups=1, threshold=-1e-45)
        assert not stats.sum_sq["difference"].any()
        nonfinite = (~a.isfinite()).sum(0)
        assert_same_bits(stats.n_nonfinite["difference"][0], nonfinite)
        assert_same_bits(stats.count["difference"][0], 20 - nonfinite)
        assert_same_bits(stats.sum_sq["a"], stats.sum_sq["b"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_larger_tensors(dtype: torch.dtype) -> None:
    a, b = strided(21, 77, dtype, 1, 3), strided(21, 77, dtype, 2, 40)
    expected = run("reference", a, b, groups=1)
    for backend in FUSED:
        assert_same(run(backend, a, b, groups=1), expected, backend)
        row = a[:1].expand(21, 77)
        assert_same(run(backend, row, b, groups=1), run("reference", row, b, groups=1), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_groups", [1, 5, 70])
def test_cpu_bits_depend_on_neither_isa_nor_threads(n_groups: int, dtype: torch.dtype) -> None:
    """Enough elements for three threads, and groups for more than one way of adding up."""
    a, b = wild(700, 200, dtype, 8), wild(700, 200, dtype, 9)
    mixed = integers(-1, n_groups, 700)
    for ids in (mixed, mixed.sort().values):
        first, *others = (
            run(f"cpu-{isa}", a, b, ids, groups=n_groups, n_threads=n)
            for isa, n in itertools.product(ISAS, (1, 3))
        )
        for other in others:
            assert_same_stats(other, first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_split_of_the_tokens(backend: str) -> None:
    a, b = wild(150, 33, torch.bfloat16, 10), wild(150, 33, torch.bfloat16, 11)
    ids = integers(-1, 3, 150)
    whole = run(backend, a, b, ids)
    parts = [run(backend, a[rows], b[rows], ids[rows]) for rows in (slice(70), slice(70, 150))]
    assert_same(parts[0] + parts[1], whole, backend)


@pytest.mark.parametrize("backend", ["reference", *(["cpu"] if ISAS else [])])
def test_the_dispatcher_sees_the_op(backend: str) -> None:
    """The quick way and the one through torch.library give the same bits, compiled code too."""
    a, b = normal(12, 40, dtype=torch.float32), normal(12, 40, dtype=torch.float32, seed=1)
    ids = integers(-1, 3, 12)

    def both(stats: GroupStats) -> None:
        pair_stats(a, b, stats=stats, group_ids=ids, backend=backend)

    def fresh() -> GroupStats:
        return GroupStats(groups=3, width=40, sites=PAIR_SITES, moments=True)

    quick, slow, compiled = fresh(), fresh(), fresh()
    both(quick)
    with mock.patch.object(op, "ran_quickly", return_value=False):
        both(slow)
    torch.compile(both, backend="aot_eager", fullgraph=True)(compiled)
    assert_same_stats(slow, quick)
    assert_same_stats(compiled, quick)
    stats = fresh()
    counters = [*stats._tensors(), ids, "", [], None, None, None, False, backend]
    torch.library.opcheck(
        op._swiglu_stats_op, (a, b, None, "difference", "gate,up,act", 0, *counters)
    )


def test_mistakes_name_this_op_and_its_arguments() -> None:
    a = torch.zeros(2, 3)
    stats = GroupStats(groups=2, width=3, sites=PAIR_SITES)
    ids = torch.tensor([0, 2], dtype=torch.int32)
    for message, b, given in (
        ("b must be .*T=2, F=3 .from a.", a[:1], {}),
        ("b must be .* float32", a.half(), {}),
        ("group_ids must be .* when stats has G=2", a, {}),
        ("group_ids must be in .* got 2 at token 1", a, {"group_ids": ids}),
        ("stats must have sites among .*'difference'", a, {"stats": GroupStats(groups=1, width=3)}),
        ("backend must be one of", a, {"backend": "gpu"}),
    ):
        with pytest.raises(ValueError, match=f"^pair_stats: {message}"):
            pair_stats(a, b, **{"stats": stats, **given})  # type: ignore[arg-type]
    for wrong, message in (
        ({"stats": None}, "stats must be a GroupStats, got NoneType"),
        ({"b": None, "stats": stats}, "a and b must be tensors, got Tensor and NoneType"),
    ):
        with pytest.raises(TypeError, match=f"^pair_stats: {message}"):
            pair_stats(a, **{"b": a, **wrong})  # type: ignore[arg-type]
    one = GroupStats(groups=1, width=3, sites=PAIR_SITES, moments=True)
    with pytest.raises(ValueError, match=r"^pair_stats: stats.max must not share memory with a"):
        pair_stats(one._max[0], a[:1], stats=one)  # type: ignore[index]
    assert not stats.tokens.any() and not one.tokens.any()
