"""Tests of ops.peaks: every backend against a loop over all values, and its arguments."""

from __future__ import annotations

import itertools

import pytest
import torch

from relneuron.ops import ACTIVATIONS, SITES, BestPeaks, histogram, merge_peaks, peaks
from relneuron.ops.swiglu_stats.reference import site_values
from relneuron.testing import assert_same_bits
from relneuron.testing.oracle import all_patterns, integers
from relneuron.testing.oracle_peaks import brute_peaks, no_peaks, wild
from tests.kit.interpreter import quiet
from tests.ops.peaks.runs import BACKENDS, op, run_peaks
from tests.ops.swiglu_stats.cases import DTYPES, strided

pytestmark = quiet
SHAPES = [(37, 70), (1, 1), (5, 64), (129, 33), (0, 8), (3, 0)]


def assert_same(
    out: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    assert_same_bits(out[0], expected[0], "values (segment, neuron)")
    assert_same_bits(out[1], expected[1], "positions (segment, neuron)")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_peaks_are_those_of_a_loop(
    backend: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Segments of neighbours and in any order, at every site; one segment has no row."""
    gate, up = wild(*shape, dtype, 1), wild(*shape, dtype, 5)
    mixed = integers(-1, 4, shape[0])
    for ids, site in zip((mixed, mixed.sort().values) * 2, SITES, strict=True):
        value = site_values(gate, up, "silu", (site,))[site]
        expected = brute_peaks(value, ids, no_peaks(6, shape[1]))
        assert_same(run_peaks(backend, gate, up, ids, 6, site=site), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_activation_with_and_without_up(backend: str, activation: str) -> None:
    for dtype, up in itertools.product(DTYPES, (None, wild(20, 40, torch.float32, 3))):
        gate = wild(20, 40, dtype, 2)
        value = site_values(gate, None, activation, ("act",))["act"]
        ids = torch.zeros(20, dtype=torch.int32)
        expected = brute_peaks(value, ids, no_peaks(1, 40))
        other = None if up is None else up.to(dtype)
        assert_same(run_peaks(backend, gate, other, None, 1, activation=activation), expected)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_values_are_those_of_the_dtype(backend: str, dtype: torch.dtype) -> None:
    """Different gates with one rounded act are a tie, and it goes to the first of them."""
    gate = all_patterns(dtype).view(4096, 16)
    value = site_values(gate, None, "silu", ("act",))["act"]
    ids = torch.arange(4096, dtype=torch.int32) // 1024
    expected = brute_peaks(value, ids, no_peaks(4, 16))
    assert_same(run_peaks(backend, gate, None, ids, 4), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_in_several_calls_are_those_of_one(backend: str) -> None:
    """In any order, with the same bits."""
    gate, ids = wild(60, 33, torch.bfloat16, 9), integers(-1, 3, 60)
    whole = run_peaks(backend, gate, None, ids, 3, site="gate", first_row=100)
    for order in ((slice(25), slice(25, 60)), (slice(25, 60), slice(25))):
        part = None
        for rows in order:
            part = run_peaks(
                *(backend, gate[rows], None, ids[rows], 3, part),
                site="gate",
                first_row=100 + rows.indices(60)[0],
            )
        assert part is not None
        assert_same(part, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_is_a_value_and_nan_is_none(backend: str) -> None:
    gate = torch.tensor([[torch.nan, torch.nan, -torch.inf], [torch.nan, -torch.inf, -torch.inf]])
    values, positions = run_peaks(backend, gate, None, None, 1, site="gate")
    assert values.tolist() == [[-torch.inf] * 3] and positions.tolist() == [[-1, 1, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_are_equal_and_recorded_as_plus_zero(backend: str) -> None:
    gate = torch.tensor([[-0.0, 0.0, -1.0], [0.0, -0.0, -0.0]])
    values, positions = run_peaks(backend, gate, None, None, 1, site="gate")
    assert_same_bits(values, torch.zeros(1, 3))
    assert positions.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_larger_tensors(backend: str, dtype: torch.dtype) -> None:
    gate, up, ids = strided(21, 77, dtype, 1, 3), strided(21, 77, dtype, 2, 40), integers(-1, 3, 21)
    for one in (gate, gate[:1].expand(21, 77)):
        value = site_values(one, up, "silu", ("product",))["product"]
        expected = brute_peaks(value, ids, no_peaks(3, 77))
        assert_same(run_peaks(backend, one, up, ids, 3, site="product"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_position_of_all(backend: str) -> None:
    gate = torch.tensor([[1.0], [2.0]])
    _, positions = run_peaks(backend, gate, None, None, 1, first_row=2**31 - 2)
    assert positions.tolist() == [[2**31 - 1]]


def test_mistakes_have_their_message_and_nothing_is_written() -> None:
    gate, ids = torch.zeros(3, 4), torch.tensor([0, 1, 2], dtype=torch.int32)
    values, positions = no_peaks(2, 4)
    both = torch.zeros(8)
    for message, changes in (
        ("activation must be one of", {"activation": "sin"}),
        (
            "site must be one of .'gate', 'act'. .there is no up., got 'product'",
            {"site": "product"},
        ),
        (r"up must be \(T, F\) float32 with T=3, F=4", {"up": torch.zeros(3, 5)}),
        (
            r"values must be \(S, F\) float32 with S=2, F=4 .from gate., got",
            {"values": torch.zeros(2, 3)},
        ),
        ("positions must be .*int32 with S=2, F=4 .from values., got", {"positions": ids}),
        ("values must be contiguous", {"values": torch.zeros(4, 2).T}),
        ("segment_ids must be .*T=3", {"segment_ids": ids[:2]}),
        ("segment_ids must be .* when values has S=2, got None", {"segment_ids": None}),
        (r"segment_ids must be in \[-1, 2\) .S=2 from values., got 2 at 2", {}),
        ("first_row must be in", {"first_row": 2**31 - 2}),
        ("first_row must be in", {"first_row": -1}),
        ("backend must be one of", {"backend": "gpu"}),
        ("values must not require grad", {"values": values.clone().requires_grad_()}),
        (
            "values must not share memory with gate",
            {
                "gate": both[:6].view(3, 2),
                "values": both[:4].view(2, 2),
                "positions": positions[:, :2].contiguous(),
                "segment_ids": ids.clamp(max=1),
            },
        ),
    ):
        given = {"values": values, "positions": positions, "segment_ids": ids} | changes
        with pytest.raises(ValueError, match=f"^peaks: {message}"):
            peaks(given.pop("gate", gate), given.pop("up", None), **given)  # type: ignore[arg-type]
    for wrong, message in (
        ({"values": None}, "values must be a tensor, got NoneType"),
        ({"first_row": 1.0}, "first_row must be an int, got float"),
    ):
        given = {"values": values, "positions": positions, "segment_ids": ids} | wrong
        with pytest.raises(TypeError, match=f"^peaks: {message}"):
            peaks(gate, **given)  # type: ignore[arg-type]
    assert values.isinf().all() and (positions == -1).all()


def test_compiled_code_and_the_dispatcher_see_the_ops() -> None:
    """One graph of all three, with the bits of the ops themselves."""
    gate, up, ids = (
        wild(20, 40, torch.float32, 1),
        wild(20, 40, torch.float32, 2),
        integers(-1, 3, 20),
    )
    exponent = torch.full((40,), -2, dtype=torch.int32)

    def all_three(*written: torch.Tensor) -> None:
        values, positions, value, number, position, counts = written
        peaks(gate, up, site="product", values=values, positions=positions, segment_ids=ids)
        best = BestPeaks(value, number, position)
        merge_peaks(values, positions, best=best, numbers=torch.arange(3))
        histogram(gate, counts=counts, exponent=exponent, first=exponent, group_ids=ids)

    def fresh() -> list[torch.Tensor]:
        best = BestPeaks.none(1, 40, 2)
        lists = (best.value, best.number, best.position)
        return [*no_peaks(3, 40), *lists, torch.zeros(3, 40, 8, dtype=torch.int64)]

    plain, compiled = fresh(), fresh()
    all_three(*plain)
    torch.compile(all_three, backend="aot_eager", fullgraph=True)(*compiled)
    for ours, expected in zip(compiled, plain, strict=True):
        assert_same_bits(ours, expected)
    arguments = (gate, up, "silu", "act", *no_peaks(3, 40), ids, 0, False, "reference")
    torch.library.opcheck(op._peaks_op, arguments)


# --- the search among gates, csrc/peaks_kernel.cpp -----------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbouring_gates(backend: str, activation: str) -> None:
    """Gates a few units apart: their acts are equal, or off by as much as they differ."""
    sizes = (
        20.0,
        3.0,
        0.7,
        1e-3,
        1e-30,
        1e-40,
        -1e-40,
        -1e-3,
        -0.5,
        -0.76,
        -1.27,
        -3.0,
        -9.0,
        -90.0,
    )
    base = torch.tensor(sizes).view(torch.int32)
    gate = (base + integers(-3, 4, 60, len(sizes), seed=3)).view(torch.float32)
    # In some columns one gate stands out, below or above.
    gate = gate.repeat(1, 3)
    gate[7, len(sizes) : 2 * len(sizes)] = -300.0
    gate[9, 2 * len(sizes) :] = torch.tensor(sizes) * torch.where(torch.tensor(sizes) > 0, 1.1, 0.9)
    ids = (torch.arange(60) // 20).int()
    value = site_values(gate, None, activation, ("act",))["act"]
    expected = brute_peaks(value, ids, no_peaks(3, gate.shape[1]))
    assert_same(run_peaks(backend, gate, None, ids, 3, activation=activation), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_acts_of_16_bits_fall_and_then_rise(dtype: torch.dtype, activation: str) -> None:
    """With their gates, as the C++ kernel takes for granted."""
    gate = all_patterns(dtype).float()
    gate = gate[gate.isfinite()].sort().values.to(dtype)[:, None]
    act = site_values(gate, None, activation, ("act",))["act"][:, 0]
    turn = int(act.argmin())
    assert (act[1 : turn + 1] <= act[:turn]).all() and (act[turn + 1 :] >= act[turn:-1]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpu")])
def test_any_number_of_threads_and_columns(backend: str, dtype: torch.dtype) -> None:
    """More columns than are known at a time, and more chunks of rows than one."""
    gate, up, ids = wild(70, 2100, dtype, 4), wild(70, 2100, dtype, 6), integers(-1, 2, 70)
    for site in ("act", "product"):
        expected = run_peaks("reference", gate, up, ids, 2, site=site)
        for n_threads in (1, 3):
            found = run_peaks(backend, gate, up, ids, 2, site=site, n_threads=n_threads)
            assert_same(found, expected)
