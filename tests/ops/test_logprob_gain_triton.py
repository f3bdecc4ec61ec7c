"""Tests of the Triton kernels of logprob_gain: their sums, against float64 loops of the formulas.

test_logprob_gain.py holds every backend to the op's spec. In the interpreter blocks have 16 tokens,
spans 32 and programs 4 x 2 pairs, so that small sizes cross all of them.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from relneuron.ops import backends
from tests.kit.interpreter import IS_INTERPRETED, needs_triton

pytestmark = needs_triton


@pytest.fixture
def launcher() -> ModuleType:
    return backends.triton_module("logprob_gain")


@pytest.fixture
def tiles(launcher: ModuleType) -> ModuleType:
    module: ModuleType = launcher.tiles
    return module


def place(tensor: Tensor) -> Tensor:
    """On the device that the kernels run on."""
    return tensor if IS_INTERPRETED else tensor.cuda()


@dataclass
class Case:
    """The arguments of a call, and what they are in float64."""

    values: Tensor
    unembed: Tensor
    p: Tensor
    t: Tensor  # (E, K)
    tilt: Tensor
    z: Tensor

    @property
    def b(self) -> Tensor:
        return self.values.double() @ self.unembed.double().T

    def exact(self, e: int, k: int, is_tilted: bool) -> tuple[float, float]:
        """(sum_v p expm1(t b + tilt z), what float32 may change of it)."""
        t, tilt = float(self.t[e, k]), float(self.tilt[e, k]) * is_tilted
        norms = self.unembed.double().norm(dim=1) * self.values[k].double().norm()
        terms, errors = [], []
        columns = (self.p[e], self.b[k], self.z[e], norms)
        for p, b, z, norm in zip(*(column.tolist() for column in columns), strict=True):
            y = t * b + tilt * z
            terms.append(p * math.expm1(y))
            errors.append(p * math.exp(abs(y)) * (abs(t) * norm + abs(tilt * z)))
        return math.fsum(terms), 1e-6 * math.fsum(errors)

    def check(self, sums: Tensor, is_tilted: bool) -> None:
        """`sums` (E, K) against the loops."""
        assert sums.dtype == torch.float64 and sums.shape == self.t.shape
        for e in range(sums.shape[0]):
            for k in range(sums.shape[1]):
                expected, error = self.exact(e, k, is_tilted)
                assert abs(float(sums[e, k]) - expected) <= error, (e, k)


def make_case(
    k: int = 5, v: int = 77, e: int = 3, d: int = 6, dtype: torch.dtype = torch.float32
) -> Case:
    """Pairs of all kinds: y from 1e-4 to about 10."""
    torch.manual_seed(0)
    sizes = torch.logspace(-4, 0.5, e * k).reshape(e, k)
    return Case(
        values=place(torch.randn(k, d).to(dtype)),
        unembed=place(torch.randn(v, d).to(dtype)),
        p=place(torch.randn(e, v).softmax(1)),
        t=place(torch.randn(e, k) * sizes),
        tilt=place(0.1 * torch.randn(e, k)),
        z=place(torch.randn(e, v)),
    )


def as_list(case: Case, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row_start, sentence, neuron) of counts[k] pairs of neuron k, sentences in any order."""
    torch.manual_seed(1)
    row_start = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    n = int(row_start[-1])
    sentence = torch.randint(len(case.p), (n,), dtype=torch.int32)
    return place(row_start), place(sentence), place(torch.repeat_interleave(counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("k", "v", "e"), [(1, 1, 1), (4, 16, 2), (5, 33, 3), (9, 77, 1)])
def test_all_pairs(launcher: ModuleType, k: int, v: int, e: int, dtype: torch.dtype) -> None:
    case = make_case(k, v, e, dtype=dtype)
    plain = (case.values, case.unembed, case.p, case.t)
    sums, largest = launcher.gain_sums_dense(*plain)
    case.check(sums, False)
    assert largest.dtype == torch.float32
    torch.testing.assert_close(largest.double(), case.b.abs().amax(1), rtol=1e-5, atol=1e-6)
    case.check(launcher.gain_sums_dense(*plain, case.tilt, case.z)[0], True)


@pytest.mark.parametrize("is_tilted", [False, True])
@pytest.mark.parametrize(
    "counts", [[0, 3, 0, 9, 1, 5, 0], [1] * 7, [0] * 6 + [2], [0] * 7, [4] * 7], ids=str
)
def test_a_list_has_the_bits_of_all_pairs(
    launcher: ModuleType, counts: list[int], is_tilted: bool
) -> None:
    case = make_case(k=7, e=4)
    row_start, sentence, neuron = as_list(case, torch.tensor(counts))
    more = (case.tilt[sentence.long(), neuron], case.z) if is_tilted else ()
    sums, largest = launcher.gain_sums(
        case.values,
        case.unembed,
        case.p,
        row_start,
        sentence,
        case.t[sentence.long(), neuron],
        *more,
    )
    dense, all_largest = launcher.gain_sums_dense(
        case.values, case.unembed, case.p, case.t, *((case.tilt, case.z) if is_tilted else ())
    )
    case.check(dense, is_tilted)
    assert torch.equal(sums, dense[sentence.long(), neuron])
    assert torch.equal(largest, all_largest)


def test_a_list_of_all_pairs_runs_as_all_pairs(
    launcher: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case()
    n_sentences, n_neurons = case.t.shape
    row_start = place(torch.arange(n_neurons + 1) * n_sentences)
    sentence = place(torch.arange(n_sentences, dtype=torch.int32).repeat(n_neurons))
    factors = case.t.T.reshape(-1), case.tilt.T.reshape(-1), case.z
    shared = (case.values, case.unembed, case.p)
    dense, _ = launcher.gain_sums_dense(*shared, case.t, case.tilt, case.z)
    swapped = sentence.clone()
    swapped[:2] = sentence[[1, 0]]
    other, _ = launcher.gain_sums(*shared, row_start, swapped, *factors)  # not in order: a list
    assert torch.equal(other[n_sentences:], dense.T.reshape(-1)[n_sentences:])
    assert not torch.equal(other[:2], dense[:2, 0])
    monkeypatch.setattr(launcher, "plan_list", None)
    sums, largest = launcher.gain_sums(*shared, row_start, sentence, *factors)
    assert torch.equal(sums, dense.T.reshape(-1))
    assert largest.shape == (n_neurons,)


@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("t", [1e-9, 1e-5, 1e-2, 0.05, 0.1, 0.5, 1.0, 5.0])
def test_every_size_of_y_to_1e_6_of_itself(launcher: ModuleType, t: float, is_listed: bool) -> None:
    """b is exact and every term positive (or negative), so nothing else can lose digits."""
    b = torch.cat([torch.arange(1, 65) / 16, torch.tensor([0.0, 6.0])])
    p = torch.rand(1, len(b), generator=torch.manual_seed(0))
    for sign in (1.0, -1.0):
        factors = torch.full((1, 1), sign * t)
        call = (place(torch.ones(1, 1)), place(b[:, None]), place(p))
        if is_listed:
            ends = place(torch.tensor([0, 1])), place(torch.zeros(1, dtype=torch.int32))
            sums, _ = launcher.gain_sums(*call, *ends, place(factors[0]))
        else:
            sums, _ = launcher.gain_sums_dense(*call, place(factors))
        expected = (p[0].double() * torch.expm1(float(factors) * b.double())).sum()
        assert abs(float(sums) / float(expected) - 1) < 2e-6 * max(1.0, t)


def test_y_up_to_60(launcher: ModuleType) -> None:
    b = place(torch.tensor([[60.0], [-60.0], [1.0]]))
    p = place(torch.tensor([[1e-20, 0.5, 0.5]]))
    sums, largest = launcher.gain_sums_dense(place(torch.ones(1, 1)), b, p, place(torch.ones(1, 1)))
    expected = 1e-20 * math.expm1(60) + 0.5 * math.expm1(-60) + 0.5 * math.expm1(1)
    assert float(sums) == pytest.approx(expected, rel=2e-5)
    assert float(largest) == 60.0


def test_a_pair_does_not_depend_on_the_others(
    launcher: ModuleType, tiles: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither through the shorter path of small y, nor by where tiles and programs end."""
    case = make_case(k=9, e=5)
    # Halves: b is exact, however torch multiplies.
    case.values, case.unembed = (2 * case.values).round() / 2, (2 * case.unembed).round() / 2
    t = torch.full_like(case.t, 0.01)
    whole, _ = launcher.gain_sums_dense(case.values, case.unembed, case.p, t)
    t[1::2, 1::2] = 2.0  # every program has large ones now
    mixed, _ = launcher.gain_sums_dense(case.values, case.unembed, case.p, t)
    assert torch.equal(mixed[::2], whole[::2]) and torch.equal(mixed[:, ::2], whole[:, ::2])
    assert not torch.equal(mixed, whole)
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 2 * 80 * 4)  # two neurons
    again, largest = launcher.gain_sums_dense(case.values, case.unembed, case.p, t)
    assert torch.equal(again, mixed)
    case.t = t
    case.check(again, False)
    assert torch.equal(largest.double(), case.b.abs().amax(1))


@pytest.mark.parametrize("scratch", [None, 2 * 80 * 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("k", "v", "e"), [(1, 1, 1), (5, 77, 3), (9, 33, 5)])
def test_moments(
    launcher: ModuleType,
    tiles: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    k: int,
    v: int,
    e: int,
    dtype: torch.dtype,
    scratch: int | None,
) -> None:
    if scratch is not None:
        monkeypatch.setattr(tiles, "SCRATCH_BYTES", scratch)
    case = make_case(k, v, e, dtype=dtype)
    # Integers: b is exact, so the moments' own errors are seen.
    case.values, case.unembed = (2 * case.values).round(), (2 * case.unembed).round()
    case.values[-1] *= 2**-9
    second, third, largest = launcher.moment_sums(case.values, case.unembed, case.p)
    for n, moments in ((2, second), (3, third)):
        assert moments.shape == (k, e) and moments.dtype == torch.float64
        for row in range(k):
            for column in range(e):
                b, p = case.b[row].tolist(), case.p[column].tolist()
                expected = math.fsum(q * each**n for q, each in zip(p, b, strict=True))
                size = math.fsum(q * abs(each) ** n for q, each in zip(p, b, strict=True))
                assert abs(float(moments[row, column]) - expected) <= 1e-6 * size
    assert torch.equal(largest.double(), case.b.abs().amax(1))


def test_the_vectors_of_the_method(launcher: ModuleType) -> None:
    """d = 3, V = 4, target 0: gains 0.7461940721 and -0.1258698693."""
    gain = torch.tensor([1.0, 0.5, 2.0])
    rows = torch.tensor([[1, 0, 0.5], [0, 1, -0.5], [-1, 0.5, 0], [0.5, -1, 0.25]])
    unembed, x = rows * gain, torch.tensor([0.2, -0.1, 0.4])
    values, m = torch.tensor([[1.0, 0.0, 0.5], [-0.5, 2.0, 1.0]]), torch.tensor([2.0, -0.5])
    s = 0.6115129848596775
    p = (s * (x @ unembed.T)).softmax(0)[None]
    t = (s * m)[None]
    sums, _ = launcher.gain_sums_dense(*map(place, (values, unembed, p, t)))
    gains = t[0].double() * (values @ unembed[0]).double() - torch.log1p(sums[0]).cpu()
    expected = [0.7461940721384765, -0.1258698692804492]
    assert gains.tolist() == pytest.approx(expected, abs=5e-7)


def test_strides_and_parameters(launcher: ModuleType) -> None:
    case = make_case()
    expected, _ = launcher.gain_sums_dense(
        case.values, case.unembed, case.p, case.t, case.tilt, case.z
    )
    weight = torch.nn.Parameter(case.values.T.contiguous())  # as a down projection has it
    twice = [torch.cat([each, each], 1)[:, : each.shape[1]] for each in (case.p, case.t, case.z)]
    p, t, z = twice
    tilt = case.tilt.T.contiguous().T
    sums, largest = launcher.gain_sums_dense(
        weight.T, torch.nn.Parameter(case.unembed), p, t, tilt, z
    )
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-9)
    assert not sums.requires_grad and not largest.requires_grad
    second, _, _ = launcher.moment_sums(weight.T, case.unembed, p)
    moments = (case.p.double()[None] * case.b[:, None] ** 2).sum(2)
    torch.testing.assert_close(second, moments, rtol=1e-5, atol=1e-9)


def test_nothing_to_do(launcher: ModuleType) -> None:
    case = make_case(k=3, e=2)
    no_pairs = place(torch.zeros(0, dtype=torch.int32)), place(torch.zeros(0))
    starts = place(torch.zeros(4, dtype=torch.int64))
    sums, largest = launcher.gain_sums(case.values, case.unembed, case.p, starts, *no_pairs)
    assert sums.shape == (0,)
    torch.testing.assert_close(largest.double(), case.b.abs().amax(1), rtol=1e-5, atol=1e-6)
    none = case.values[:0]
    sums, largest = launcher.gain_sums(none, case.unembed, case.p, starts[:1], *no_pairs)
    assert sums.shape == largest.shape == (0,)
    sums, largest = launcher.gain_sums_dense(none, case.unembed, case.p, case.t[:, :0])
    assert sums.shape == (2, 0) and largest.shape == (0,)
    sums, largest = launcher.gain_sums_dense(case.values, case.unembed, case.p[:0], case.t[:0])
    assert sums.shape == (0, 3) and bool((largest > 0).all())
    second, third, _ = launcher.moment_sums(case.values, case.unembed, case.p[:0])
    assert second.shape == third.shape == (3, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stays_with_its_neuron(launcher: ModuleType, bad: float) -> None:
    case = make_case(k=5, e=3)
    expected, _ = launcher.gain_sums_dense(case.values, case.unembed, case.p, case.t)
    case.values[2, 1] = bad
    sums, largest = launcher.gain_sums_dense(case.values, case.unembed, case.p, case.t)
    assert not sums[:, 2].isfinite().any() and not bool(largest[2].isfinite())
    others = [0, 1, 3, 4]
    assert torch.equal(sums[:, others], expected[:, others])


def test_float32_unembed_with_bfloat16_values(launcher: ModuleType, tiles: ModuleType) -> None:
    """Three bfloat16 pieces are the float32 numbers, so the sums have float32's accuracy."""
    case = make_case()
    case.values = case.values.bfloat16()
    pieces = tiles._in_bfloat16(case.unembed)
    assert pieces.dtype == torch.bfloat16
    assert torch.equal(pieces.float().reshape(len(pieces), 3, -1).sum(1), case.unembed)
    case.check(launcher.gain_sums_dense(case.values, case.unembed, case.p, case.t)[0], False)
    half = make_case(dtype=torch.float16)
    half.unembed = half.unembed.float() * 1.0001
    half.check(launcher.gain_sums_dense(half.values, half.unembed, half.p, half.t)[0], False)
    wide = make_case()
    wide.unembed = wide.unembed.half()
    wide.check(launcher.gain_sums_dense(wide.values, wide.unembed, wide.p, wide.t)[0], False)


def test_factors_without_16_bit_products(
    launcher: ModuleType, tiles: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an AMD GPU: everything is float32."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    case = make_case(dtype=torch.float16)
    assert tiles._factor(torch.bfloat16, case.unembed.float()).shape == case.unembed.shape
    assert tiles._factor(torch.float16, case.unembed).dtype == torch.float32
    if IS_INTERPRETED:
        case.check(launcher.gain_sums_dense(case.values, case.unembed, case.p, case.t)[0], False)


def test_the_pieces_are_kept_while_they_are_right(tiles: ModuleType) -> None:
    unembed = torch.randn(4, 3)
    first = tiles._in_bfloat16(unembed)
    assert tiles._in_bfloat16(unembed.detach()) is first
    assert tiles._in_bfloat16(unembed[1:]) is not first
    first = tiles._in_bfloat16(unembed)
    unembed[0] = 2.0
    second = tiles._in_bfloat16(unembed)
    assert second is not first and second[0, 0] == 2.0
    other = torch.randn(4, 3)
    tiles._in_bfloat16(other)
    del unembed
    gc.collect()
    assert len(tiles._LAST) == 1  # of `other`, which lives
    del other
    gc.collect()
    assert not tiles._LAST
    with torch.inference_mode():
        unversioned = torch.randn(4, 3)
        first = tiles._in_bfloat16(unversioned)
        unversioned[0] = 2.0
        assert tiles._in_bfloat16(unversioned)[0, 0] == 2.0 and not tiles._LAST


def test_float32_products_are_never_tf32(
    launcher: ModuleType, tiles: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    seen: list[str] = []
    multiply = torch.mm

    def mm(*args: Tensor, **options: object) -> Tensor:
        seen.append(setting.fp32_precision)
        if len(seen) > 1:
            raise MemoryError
        return multiply(*args, **options)  # type: ignore[no-any-return, call-overload]

    monkeypatch.setattr(torch, "mm", mm)
    case = make_case()
    try:
        setting.fp32_precision = "tf32"
        launcher.moment_sums(case.values, case.unembed, case.p)
        with pytest.raises(MemoryError):
            launcher.moment_sums(case.values, case.unembed, case.p)
        assert seen == ["ieee", "ieee"] and setting.fp32_precision == "tf32"
    finally:
        setting.fp32_precision = before


def test_blocks_fit_each_other(launcher: ModuleType) -> None:
    table = launcher.LAUNCH_TABLE
    for config in (*table.values(), launcher.DEFAULT_LAUNCH, launcher.INTERPRETER_LAUNCH):
        assert config.span % config.block == 0 and config.block % config.moments_block == 0
    for config in table.values():
        lanes = 32 if config.is_nvidia else 64
        assert config.block == 4 * lanes  # 16 bytes for each
        for n_sentences in (1, 2, 3, 8, 100):
            p = torch.empty(n_sentences, 50304, device="meta")
            tile, t = torch.empty(100, 50304, device="meta"), torch.empty(n_sentences, 100)
            for tilt in (None, t):
                launch = launcher.plan_dense(
                    t, tile, tile, launcher.Tokens(p, None, None), t, tilt, config
                )
                shared = launch.constants["SENTENCES"]
                assert launch.grid[0] == 13 * -(-n_sentences // shared)
                assert shared <= (8 if tilt is None else 4) and launch.num_warps == shared
            partial = torch.empty(2, 99, 100, n_sentences, device="meta")
            launch = launcher.plan_moments(partial, tile, p, config)
            width = launch.constants["SENTENCES"]
            assert launch.grid[0] == 2 * -(-n_sentences // width) * 99 and width >= 32
