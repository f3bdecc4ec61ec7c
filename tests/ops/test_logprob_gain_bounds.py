"""What `logprob_gain` proves: its tolerance, first-order bounds, and bounds on rounding errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from relneuron.ops import TopGains, available_backends, backends, logprob_gain, logprob_gain_vectors
from relneuron.ops.logprob_gain import base as base_module
from relneuron.ops.logprob_gain import engine, triton_tiles
from relneuron.ops.logprob_gain.base import Base, exact_gains, make_head
from tests.ops.gain_problems import best, extras, naive, problem

needs_triton = pytest.mark.skipif(
    not available_backends()["triton"].works, reason="no GPU and no interpreter"
)
ISAS = backends.cpu_module().isa_levels() if available_backends()["cpu"].works else []


# --- the tolerance ---------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("size", [0.01, 0.1, 1.0])
def test_certified_is_never_outside_its_tolerance(tolerance: float, size: float) -> None:
    given = problem((3, 6, 120, 48, 900), size=size, seed=5)  # positions enough for moments
    gains = logprob_gain(**given, mode="certified", tolerance=tolerance)
    truth = naive(given)
    assert ((gains.double() - truth).abs() <= tolerance + 2.0**-24 * truth.abs()).all()


def test_moments_settle_most_of_a_typical_layer() -> None:
    """The share that is left to exact sums is small, or the mode would be of no use."""
    given = problem((4, 8, 200, 64, 900), size=0.05, seed=3)
    evaluated = 0
    kernel = engine._cpu_sums

    def counted(base: Base, pairs: Any, *rest: Any) -> Any:
        nonlocal evaluated
        evaluated += len(pairs.place)
        return kernel(base, pairs, *rest)

    with mock.patch.object(engine, "_cpu_sums", counted):
        logprob_gain(**given, mode="certified", backend="cpu" if ISAS else "auto")
    assert evaluated < 0.1 * given["coefficients"].numel()


def test_a_thousand_bounds_and_the_telescope() -> None:
    """No gain exceeds its first-order bound, and the gains of layers add up to the whole path's."""
    for seed in range(20):
        given = problem((2, 1, 25, 12, 40), size=1.0, seed=seed)
        given = {k: v.double() if k != "targets" else v for k, v in given.items()}
        head = make_head(given["unembed"], given["scale"], given["targets"], None)
        base = Base(head, given["x"], given["values"], given["coefficients"], None)
        gains = logprob_gain(**given)
        assert (gains <= base.first_order() + 1e-12).all()
        own = extras(given, offset=True, own_norm=True)
        head = make_head(own["unembed"], own["scale"], own["targets"], own["offset"])
        base = Base(head, own["x"], own["values"], own["coefficients"], own["scale_after"])
        assert (logprob_gain(**own) <= base.first_order() + 1e-12).all()
        # h^0, then what five layers write.
        writes = torch.randn(2, 5, 12, dtype=torch.float64)
        path = torch.cat([given["x"][:, None], writes], 1).cumsum(1)
        shared = {name: given[name] for name in ("unembed", "scale", "targets")}
        steps = [
            logprob_gain_vectors(path[:, i], writes[:, i : i + 1], **shared)[:, 0] for i in range(5)
        ]
        whole = logprob_gain_vectors(path[:, 0], (path[:, -1] - path[:, 0])[:, None], **shared)
        assert torch.allclose(sum(steps, torch.zeros(2)), whole[:, 0], rtol=0, atol=1e-12)


# --- rounding --------------------------------------------------------------------------------


def coherent(hidden: int, size: float, vocabulary: int = 800) -> dict[str, Any]:
    """Inner products whose terms have one sign: their partial sums grow, and so do roundings."""
    given = problem((2, 1, 60, hidden, vocabulary), size=size)
    for name, factor in (("x", 0.1), ("values", 1.0), ("unembed", 1.0)):
        given[name] = given[name].abs() * factor
    return given


def common(seed: int, tilt: float) -> dict[str, Any]:
    """Logits that are large and alike, so that their differences are lost in float32."""
    given = problem((3, 1, 80, 64, 500), size=0.01, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    given["unembed"] = given["unembed"] * 1e-4 + 20 * torch.randn(64, generator=generator)
    change = 1 + tilt * torch.rand(given["coefficients"].shape, generator=generator).double()
    return given | {"scale_after": given["scale"][:, None, None] * change}


HARD = {
    "one sign": lambda: coherent(4096, 0.02),
    "one sign, far": lambda: coherent(1024, 0.5),
    "one sign, few tokens": lambda: coherent(4096, 0.1, 3),  # whose roundings do not average out
    "no more than a piece of terms": lambda: coherent(128, 0.1),
    "alike, scaled": lambda: common(1, 0.2),
    "alike, scaled far": lambda: common(2, 20.0),
    "improbable target": lambda: improbable(30.0, 1.0),
    "hopeless target": lambda: improbable(300.0, 30.0),
}


def improbable(base: float, size: float) -> dict[str, Any]:
    """Large base logits, and the least probable target."""
    given = problem((2, 1, 80, 48, 900), size=size)
    given["x"] *= base / 3
    logits = given["x"] @ given["unembed"].T
    return given | {"targets": logits.argmin(1)}


@pytest.mark.parametrize("case", HARD)
def test_hard_inputs_stay_within_their_bounds(case: str) -> None:
    """Every bound holds with room: nothing is off by more than 0.7 of what it says."""
    given = HARD[case]()
    truth = naive(given)
    for tolerance in (1e-3, 1e-5, 1e-6):
        gains = logprob_gain(**given, mode="certified", tolerance=tolerance)
        assert ((gains.double() - truth).abs() <= tolerance + 2.0**-24 * truth.abs()).all()
    for top in (1, 15):
        found = logprob_gain(**given, mode="top", top=top)
        assert isinstance(found, TopGains)
        assert torch.equal(found.index.sort(1).values, best(truth, top)[1].sort(1).values)
    if ISAS:
        head = make_head(given["unembed"], given["scale"], given["targets"], None)
        after = given.get("scale_after")
        base = Base(head, given["x"], given["values"], given["coefficients"], after)
        gains, errors = engine.Engine("cpu").gains(base, torch.arange(truth.numel()))
        assert ((gains - truth.reshape(-1)).abs() <= 0.7 * errors).all()
        assert (truth <= base.first_order() + 0.7 * base.rounding(base.reach())).all()


@pytest.mark.skipif(not ISAS, reason="no C++ extension")
def test_few_neurons_of_a_certified_layer_need_float64() -> None:
    """Base logits of 60 and moves of 1, as in large models, are within float32 at 1e-5."""
    given = problem((4, 1, 300, 256, 2000), size=0.3)
    given["x"] *= 5
    asked = 0

    def counted(base: Base, place: Tensor) -> Tensor:
        nonlocal asked
        asked += len(place)
        return exact_gains(base, place)

    with mock.patch.object(engine, "exact_gains", counted):
        logprob_gain(**given, mode="certified", backend="cpu")
    assert asked < 0.01 * given["coefficients"].numel()


# --- products of matrices on tensor cores ----------------------------------------------------


def truncated(values: Tensor, unembed: Tensor, out: Tensor) -> None:
    """out = values @ unembed.T of 16 bits as tensor cores compute it: eight exact products at a
    time, every partial sum cut to float32."""
    total = torch.zeros(out.shape, dtype=torch.float64)
    for at in range(0, values.shape[1], 8):
        total += values[:, at : at + 8].double() @ unembed[:, at : at + 8].double().T
        nearest = total.float()
        away = nearest.double().abs() > total.abs()
        total = torch.where(away, nearest.nextafter(torch.zeros(())), nearest).double()
    out.copy_(total)


TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "of one sign": torch.abs,
}


def on_tensor_cores(hidden: int, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    given = problem((2, 1, 24, hidden, 60), size=0.5)
    if change is torch.abs:  # b is larger by sqrt(D)
        given["values"] = given["values"] / hidden**0.5
    for name in ("values", "unembed"):
        given[name] = change(given[name]).bfloat16()
    return given


@needs_triton
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("hidden", [256, 2048, 16384])
def test_bounds_hold_where_partial_sums_are_truncated(hidden: int, terms: str) -> None:
    given = on_tensor_cores(hidden, TERMS[terms])
    truth = naive(given)
    head = make_head(given["unembed"], given["scale"], given["targets"], None)
    base = Base(head, given["x"], given["values"], given["coefficients"], None)
    with mock.patch.object(triton_tiles, "_multiply", truncated):
        gains, errors = engine.Engine("triton").gains(base, torch.arange(truth.numel()))
        certified = logprob_gain(**given, mode="certified", tolerance=1e-6, backend="triton")
    assert (errors > 0).all()  # none of them had to be evaluated in float64
    assert ((gains - truth.reshape(-1)).abs() <= 0.7 * errors).all()
    assert ((certified.double() - truth).abs() <= 1e-6 + 2.0**-24 * truth.abs()).all()


def up_and_down(x: Tensor) -> Tensor:
    """One sign in the first half and the other in the second: what is cut off from a large partial
    sum is much of the rest."""
    return torch.where(torch.arange(x.shape[1]) < x.shape[1] // 2, x.abs(), -x.abs())


@needs_triton
def test_products_that_are_off_by_more_than_their_bound_are_found() -> None:
    given = on_tensor_cores(4096, torch.abs)
    given["unembed"] = up_and_down(given["unembed"])
    engine._warn_of_products.cache_clear()
    with (
        mock.patch.object(triton_tiles, "_multiply", truncated),
        pytest.warns(RuntimeWarning, match="products of matrices are off by more"),
    ):
        gains = logprob_gain(**given, mode="certified", tolerance=1e-7, backend="triton")
    truth = naive(given)
    assert ((gains.double() - truth).abs() <= 1e-7 + 2.0**-24 * truth.abs()).all()
    assert torch.equal(gains, truth.float().reshape(gains.shape))  # all of them are float64's


def test_float64_gains_do_not_depend_on_their_order() -> None:
    given = extras(problem((3, 2, 40, 16, 90)), offset=True, own_norm=True)
    head = make_head(given["unembed"], given["scale"], given["targets"], given["offset"])
    arguments = (given["x"], given["values"], given["coefficients"], given["scale_after"])
    base = Base(head, *arguments)
    place = torch.randperm(240, generator=torch.Generator().manual_seed(0))[:100]
    with mock.patch.object(base_module, "_SCRATCH", 4096 * 7):  # seven pairs at a time
        gains = exact_gains(base, place)
    assert torch.allclose(gains, naive(given).reshape(-1)[place], rtol=0, atol=1e-12)


def test_the_longest_row_is_looked_for_once_and_again_after_a_change() -> None:
    given = problem((2, 1, 5, 16, 30))
    unembed = given["unembed"]
    blocks = mock.Mock(side_effect=base_module.blocks)

    def norm() -> tuple[float, int]:
        blocks.reset_mock()
        with mock.patch.object(base_module, "blocks", blocks):
            head = make_head(unembed, given["scale"], given["targets"], None)
        return head.norm, blocks.call_count

    first, _ = norm()
    assert norm() == (first, 0)
    unembed *= 3
    assert norm() == (pytest.approx(3 * first), 1)
    assert norm()[1] == 0
    other = problem((2, 1, 5, 16, 30), seed=1)
    make_head(other["unembed"], other["scale"], other["targets"], None)
    assert norm() == (pytest.approx(3 * first), 1)
