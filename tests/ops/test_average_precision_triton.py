"""Tests of what only the Triton kernels of average_precision have: keys, blocks, packed counts.

test_average_precision.py holds every backend to the spec. Here the results are compared with the
reference bit for bit; in the interpreter blocks have 32 rows, so few rows cross many of them.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from relneuron.ops import average_precision, backends
from relneuron.ops.average_precision.op import average_precision_reference
from tests.kit.interpreter import IS_INTERPRETED, needs_triton

pytestmark = needs_triton
SORTED = (torch.float32, torch.bfloat16, torch.float16)  # by our kernel; float64 is by torch's
DTYPES = (*SORTED, torch.float64)


@pytest.fixture
def launcher() -> ModuleType:
    return backends.triton_module("average_precision")


@pytest.fixture
def torch_sorts(launcher: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with more rows than `_sort_kernel` takes."""
    monkeypatch.setattr(launcher, "MAX_SORTED_ROWS", 1)


def run(values: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor | None:
    launcher = backends.triton_module("average_precision")
    if not IS_INTERPRETED:
        values = values.cuda()  # labels and weights stay on the CPU
    result: Tensor | None = launcher.average_precision_triton(values, labels, weights)
    return None if result is None else result.cpu()


def check(values: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
    result = run(values, labels, weights)
    expected = average_precision_reference(values, labels, weights)
    assert result is not None and expected is not None
    assert result.dtype == torch.float32 and result.is_contiguous()
    assert torch.equal(result, expected)


def draw(n: int, m: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(N, M): columns without ties, with some, and with two values and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, m, generator=generator, dtype=torch.float64)
    values[:, 1::3] = (2 * values[:, 1::3]).round()
    values[:, 2::3] = torch.where(values[:, 2::3] > 0.5, 0.25, values[:, 2::3].sign() * 0.0)
    return values.to(dtype)


def draw_labels(r: int, n: int, seed: int = 0) -> Tensor:
    """(R, N): positives, negatives and rows left out, more positives in later relations."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 2, (r, n), generator=generator, dtype=torch.int8)
    rare = torch.rand(r, n, generator=generator) > (1 + torch.arange(r)[:, None]) / r
    labels[rare & (labels == 1)] = 0
    labels[:, n // 2], labels[:, -1] = 1, 0
    return labels


def draw_weights(r: int, n: int, most: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, most + 1, (r, n), generator=generator, dtype=torch.uint8)
    weights[:, n // 2] = most
    return weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 31, 32, 33, 64, 100])
def test_equal_to_the_reference(n: int, dtype: torch.dtype) -> None:
    check(draw(n, 3, dtype), draw_labels(2, n))


def exact_sum(values: Tensor, labels: Tensor, weights: Tensor) -> int:
    """S of the spec for one column and relation."""
    total = 0
    for i in (labels == 1).nonzero().flatten().tolist():
        counted = (values >= values[i]) & (labels >= 0)
        tp = int(weights[counted & (labels == 1)].sum())
        n = int(weights[counted].sum())
        if n:
            total += int(weights[i]) * tp * ((2**62 + n // 2) // n)
    return total


@pytest.mark.parametrize("most", [1, 3, 255])
def test_sums_to_the_last_bit(
    most: int, launcher: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 does not show the low parts."""
    sums: list[tuple[Tensor, Tensor]] = []

    def keep(high: Tensor, low: Tensor, n_positive: Tensor) -> Tensor:
        sums.append((high.cpu(), low.cpu()))
        return high.float()

    monkeypatch.setattr(launcher, "from_sums", keep)
    values, labels = draw(200, 3, torch.float32), draw_labels(2, 200)
    weights = draw_weights(2, 200, most) if most > 1 else torch.ones_like(labels)
    run(values, labels, weights if most > 1 else None)
    high, low = sums[0]
    for r in range(2):
        for m in range(3):
            total = int(high[r, m]) * 2**31 + int(low[r, m])
            assert total == exact_sum(values[:, m], labels[r], weights[r].long())


@pytest.mark.parametrize("r", [1, 3, 4, 13, 16, 40])
def test_any_number_of_relations(r: int) -> None:
    values, labels = draw(40, 2, torch.float16), draw_labels(r, 40)
    check(values, labels)
    check(values, labels, draw_weights(r, 40, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sorted_by_torch(dtype: torch.dtype, torch_sorts: None) -> None:
    values, labels = draw(130, 3, dtype), draw_labels(5, 130)
    values[10:120, 1] = 1.5  # a tie group over five blocks
    check(values, labels)
    check(values, labels, draw_weights(5, 130, 3))


def test_tie_groups_over_several_blocks() -> None:
    values = torch.full((100, 3), 2.0, dtype=torch.bfloat16)
    values[:5, 1], values[95:, 1] = 3.0, 1.0
    values[:, 2] = torch.arange(100) // 33
    check(values, draw_labels(3, 100))
    check(values, draw_labels(3, 100), draw_weights(3, 100, 2))


@pytest.mark.parametrize("dtype", SORTED, ids=str)
def test_keys_rank_as_the_values(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    tiny = torch.tensor(1, dtype=torch.int64).to(torch.int16 if info.bits == 16 else torch.int32)
    subnormal = tiny.view(dtype)
    ladder = torch.stack(
        [torch.tensor(x, dtype=dtype) for x in (1.0, 1.0 + info.eps, info.tiny, info.max)]
    )
    ladder = torch.cat([ladder, subnormal[None], torch.zeros(1, dtype=dtype)])
    values = torch.cat([ladder, -ladder])[torch.randperm(12, generator=torch.manual_seed(0))]
    # Every row once as the only positive: AP is 1 over the number of rows >= it.
    labels = torch.eye(12, dtype=torch.int8)
    check(values[:, None], labels)
    result = run(values[:, None], labels)
    at_least = (values.double()[None, :] >= values.double()[:, None]).sum(1)
    assert result is not None and torch.equal(result[:, 0], 1 / at_least.float())


def test_strides() -> None:
    labels = draw_labels(2, 40)
    base = draw(40, 9, torch.float32)
    check(base[:, ::4], labels)
    check(base.T.contiguous().T[:, :3], labels)
    check(torch.cat([base, base])[1::2, :2], labels)
    check(base[:, 1:2].expand(40, 3), labels)
    check(base[:1, :2].expand(40, 2), labels)  # every value is the same cell
    check(base.flatten().as_strided((40, 3), (7, 5), 3), labels)
    check(base.double().T.contiguous().T[:, ::3], labels)


def test_one_positive_and_all_positive() -> None:
    values = draw(33, 3, torch.bfloat16)
    labels = torch.zeros(3, 33, dtype=torch.int8)
    labels[0, 17], labels[1] = 1, 1
    labels[2], labels[2, 3], labels[2, 32] = -1, 1, 0
    check(values, labels)
    result = run(values, labels)
    assert result is not None and torch.equal(result[1], torch.ones(3))


def test_counts_of_15_bits_and_more(launcher: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """More take halves of 32 bits: a sum of weights, or rows without weights."""
    values, labels = draw(129, 2, torch.float32), torch.ones(2, 129, dtype=torch.int8)
    labels[0, ::3] = 0
    weights = torch.full_like(labels, 255, dtype=torch.uint8)
    for last, half in ((127, 16), (128, 32)):
        weights[1, -1] = last
        weights[0, 0] = last
        assert int(weights[1].sum()) == 2**15 - 128 + last
        assert launcher.Counts.of(labels, weights, 160, values.device).half == half
        check(values[:, 1:], labels, weights)
    monkeypatch.setattr(launcher, "NARROW_COUNTS", 1)
    assert launcher.Counts.of(labels, None, 160, values.device).half == 32
    check(values, labels)
    check(draw(40, 2, torch.bfloat16), draw_labels(5, 40))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_any_split_of_the_columns(
    dtype: torch.dtype, launcher: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, labels = draw(40, 5, dtype), draw_labels(3, 40)
    for chunk in (1, 128):
        monkeypatch.setattr(launcher, "_CHUNK", chunk)
        check(values, labels)


@pytest.mark.parametrize("n_rows", [32, 40])  # with and without rows past the end
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_values_that_are_not_finite(dtype: torch.dtype, n_rows: int) -> None:
    labels = draw_labels(2, n_rows)
    assert run(draw(n_rows, 2, dtype), labels) is not None
    for value, row, column in (("nan", 0, 0), ("inf", n_rows - 1, 1), ("-inf", 7, 1)):
        values = draw(n_rows, 2, dtype)
        values[row, column] = float(value)
        assert run(values, labels) is None
    with pytest.raises(ValueError, match="must be finite, got -inf"):
        on = "cpu" if IS_INTERPRETED else "cuda"
        average_precision(values.to(on), labels, backend="triton")


def test_weights_that_do_not_fit_are_refused(launcher: ModuleType) -> None:
    labels = torch.ones(1, 1, dtype=torch.int8).expand(1, 2**23 + 2**16)
    weights = torch.full((1, 1), 255, dtype=torch.uint8).expand_as(labels)
    with pytest.raises(ValueError, match="add up to"):
        launcher.Counts.of(labels, weights, 2**24, torch.device("cpu"))


def test_blocks_cover_the_rows(launcher: ModuleType) -> None:
    """For every N: whole blocks, and no more warps than a program can have."""
    for config in (launcher.NVIDIA_LAUNCH, launcher.HIP_LAUNCH, launcher.INTERPRETER_LAUNCH):
        for n in (1, 2, 127, 128, 129, 4096, 4097, launcher.MAX_SORTED_ROWS):
            width = config.width(n)
            assert width % config.sum_block == 0
            order = torch.empty(3, width, dtype=torch.int32, device="meta")
            values = torch.empty(n, 3, device="meta")
            launch = launcher.plan_sort(order, order, values, config)
            assert n <= width <= launch.constants["BLOCK"]
            assert 1 <= launch.num_warps <= 16
