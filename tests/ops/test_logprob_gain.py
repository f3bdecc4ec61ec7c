"""`ops.logprob_gain` against the definition in float64, the published vectors and its own promises.

The bounds that certify are in test_logprob_gain_bounds.py, Triton in test_logprob_gain_triton.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from relneuron.ops import (
    GainLayer,
    TopGains,
    available_backends,
    backends,
    logprob_gain,
    logprob_gain_top,
    logprob_gain_vectors,
)
from relneuron.ops.logprob_gain import engine
from relneuron.ops.logprob_gain.base import Base, make_head
from tests.conftest import SHARED
from tests.ops.gain_problems import best, extras, naive, problem

VECTORS = SHARED / "methods" / "vectors.json"
ISAS = backends.cpu_module().isa_levels() if available_backends()["cpu"].works else []
VARIANTS = ["reference", *(f"cpu-{isa}" for isa in ISAS)]


@contextmanager
def forced(variant: str, threads: int = 1) -> Iterator[str]:
    """The backend of a variant, its instruction set and threads forced."""
    backend, _, isa = variant.partition("-")
    call = engine._call_cpu

    def with_isa(base: Base, rows: Tensor, **given: Any) -> Tensor:
        return call(base, rows, **(given | {"isa": isa, "n_threads": threads}))

    with mock.patch.object(engine, "_call_cpu", with_isa):
        yield backend


# --- the published vectors -------------------------------------------------------------------


def vector_problem() -> tuple[dict[str, Any], Any]:
    if not VECTORS.exists():
        pytest.skip("no test vectors beside the project")
    wanted = json.loads(VECTORS.read_text())["log_prob_increase_ffn"]
    numbers = {name: torch.tensor(wanted[name], dtype=torch.float64) for name in wanted if name in (
        "gain", "W_U_rows_are_tokens", "x_residual_before_ffn", "value_vectors_rows",
        "coefficients", "final_y",
    )}  # fmt: skip
    given = {
        "x": numbers["x_residual_before_ffn"][None],
        "values": numbers["value_vectors_rows"],
        "coefficients": numbers["coefficients"][None],
        "unembed": numbers["W_U_rows_are_tokens"] * numbers["gain"],
        "scale": 1 / (numbers["final_y"].square().mean() + wanted["eps"]).sqrt()[None],
        "targets": torch.tensor([wanted["target"]]),
    }
    return given, wanted


def test_frozen_norm_of_the_vectors() -> None:
    given, wanted = vector_problem()
    assert float(given["scale"]) == pytest.approx(wanted["frozen_scale"], abs=1e-12)
    gains = logprob_gain(**given)
    assert gains.dtype == torch.float64
    assert gains[0].tolist() == pytest.approx(wanted["frozen"]["importance"], abs=1e-9)
    head = make_head(given["unembed"], given["scale"], given["targets"], None)
    base = Base(head, given["x"], given["values"], given["coefficients"][None], None)
    assert base.logp[0].tolist() == pytest.approx(wanted["frozen"]["logp_x"], abs=1e-9)
    first = base.first_order().reshape(-1).tolist()
    assert first == pytest.approx(wanted["first_order_upper_bound"], abs=1e-9)
    layer = (given["coefficients"] @ given["values"])[None]
    arguments = {name: given[name] for name in ("x", "unembed", "scale", "targets")}
    whole = logprob_gain_vectors(vectors=layer, **arguments)
    assert float(whole) == pytest.approx(wanted["frozen"]["layer_importance"], abs=1e-9)


def test_own_norm_of_the_vectors() -> None:
    given, wanted = vector_problem()

    def scale_at(y: Tensor) -> Tensor:
        return 1 / (y.square().mean(-1) + wanted["eps"]).sqrt()

    moved = given["x"] + given["coefficients"][0][:, None] * given["values"]
    own = given | {"scale": scale_at(given["x"])}
    gains = logprob_gain(**own, scale_after=scale_at(moved)[None])
    assert gains[0].tolist() == pytest.approx(wanted["own_norm_variant"]["importance"], abs=1e-9)
    arguments = {name: own[name] for name in ("x", "unembed", "scale", "targets")}
    write = given["coefficients"] @ given["values"]
    whole = logprob_gain_vectors(
        vectors=write[None], scale_after=scale_at(given["x"] + write)[None], **arguments
    )
    assert float(whole) == pytest.approx(wanted["own_norm_variant"]["layer_importance"], abs=1e-9)


def test_attention_neurons_of_the_vectors() -> None:
    """Vector D8: two coordinates at two positions, their positions and their head."""
    wide = torch.float64
    unembed = torch.tensor([[1, 0, 0.5], [0, 1, -0.5], [-1, 0.5, 0], [0.5, -1, 0.25]], dtype=wide)
    w_out = torch.tensor([[1, -1], [0.5, 0], [0, 2]], dtype=wide)
    value = torch.tensor([[0.5, 1], [-1, 0.25]], dtype=wide)
    alpha = torch.tensor([0.25, 0.75], dtype=wide)
    x = torch.tensor([[0.1, 0.2, -0.3]], dtype=wide)
    coefficients = alpha[:, None] * value
    final = x[0] + coefficients.sum(0) @ w_out.T
    arguments: dict[str, Any] = {
        "x": x,
        "unembed": unembed * torch.tensor([1, 0.5, 2], dtype=wide),
        "scale": 1 / (final.square().mean() + 1e-6).sqrt()[None],
        "targets": torch.tensor([0]),
    }
    gains = logprob_gain(values=w_out.T, coefficients=coefficients[None], **arguments)
    wanted = [0.1597793387720794, 0.3979521060485145, -1.2563257407355082, 0.3220481870368857]
    assert gains.reshape(-1).tolist() == pytest.approx(wanted, abs=1e-9)
    vectors = torch.cat([coefficients, coefficients.sum(0)[None]]) @ w_out.T
    whole = logprob_gain_vectors(vectors=vectors[None], **arguments)[0].tolist()
    assert whole == pytest.approx([0.5654823059, -1.0504027753, -0.6246987216], abs=1e-9)


# --- the definition --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("own_norm", [False, True])
@pytest.mark.parametrize("size", [0.002, 0.3, 3.0, 30.0])
def test_every_mode_is_the_definition(variant: str, size: float, own_norm: bool) -> None:
    """Logits that hardly move, and such that move by 100: every way to sum in the kernel."""
    given = extras(problem((3, 2, 53, 37, 700), size=size), offset=True, own_norm=own_norm)
    truth = naive(given)
    with forced(variant) as backend:
        exact = logprob_gain(**given, backend=backend)
        certified = logprob_gain(**given, mode="certified", backend=backend)
        top = logprob_gain(**given, mode="top", top=20, backend=backend)
    # Half an ulp of the float32 result lies beside the tolerance.
    ulp = 2.0**-24 * truth.abs()
    assert ((certified.double() - truth).abs() <= 1e-5 + ulp).all()
    # float32 logits that move by much are off by more, as are those of any float32 softmax.
    allowed = 2e-6 * min(1.0, size) + 5e-7 * float(truth.abs().max())
    assert ((exact.double() - truth).abs() <= allowed).all()
    values, places = best(truth, 20)
    assert isinstance(top, TopGains)
    assert torch.equal(top.index.sort(1).values, places.sort(1).values)
    assert torch.allclose(top.gain.double(), values, rtol=0, atol=allowed)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("values", "unembed"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
    ],
)
def test_16_bit_weights(variant: str, values: torch.dtype, unembed: torch.dtype) -> None:
    given = problem((2, 1, 50, 33, 530))  # nothing is a multiple of a vector
    given["values"], given["unembed"] = given["values"].to(values), given["unembed"].to(unembed)
    with forced(variant) as backend:
        gains = logprob_gain(**given, backend=backend)
    assert gains.dtype == torch.float32
    assert torch.allclose(gains.double(), naive(given), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hidden", [1, 255, 256, 257, 600])
def test_any_depth_of_the_inner_products(hidden: int) -> None:
    given = problem((2, 1, 13, hidden, 20))
    assert torch.allclose(logprob_gain(**given).double(), naive(given), rtol=1e-6, atol=1e-6)


# --- the largest -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_top_over_layers_is_exact(variant: str) -> None:
    parts = [problem((4, p, k, 24, 300), seed=p) for p, k in ((1, 90), (3, 40), (1, 5))]
    shared = {name: parts[0][name] for name in ("unembed", "scale", "targets")}
    layers = [GainLayer(part["x"], part["values"], part["coefficients"]) for part in parts]
    layers[2] = GainLayer(layers[2].x, layers[2].values, layers[2].coefficients[:, 0])  # (E, K)
    truth = torch.cat([naive(part | shared).reshape(4, -1) for part in parts], 1)
    starts = [0, 90, 90 + 120]
    for top in (1, 30, 215):
        with forced(variant) as backend:
            found = logprob_gain_top(layers, **shared, top=top, backend=backend)
        flat = torch.tensor(starts)[found.layer] + found.index
        values, places = best(truth, top)
        assert torch.equal(flat.sort(1).values, places.sort(1).values)
        assert torch.allclose(found.gain.double(), values, rtol=1e-6, atol=1e-6)
        assert (found.gain.diff(dim=1) <= 0).all()


def test_top_visits_few() -> None:
    given = problem((5, 1, 3000, 32, 400), size=0.3)
    visited = 0
    evaluate = engine.Engine.gains

    def counted(self: engine.Engine, base: Base, place: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal visited
        visited += len(place)
        return evaluate(self, base, place)

    with mock.patch.object(engine.Engine, "gains", counted):
        logprob_gain(**given, mode="top", top=50)
    assert visited < 5 * 150


def test_ties_put_the_later_neuron_first() -> None:
    given = problem((2, 2, 8, 16, 30))
    given["values"] = given["values"][:1].repeat(8, 1)
    given["coefficients"] = torch.ones(2, 2, 8)
    found = logprob_gain(**given, mode="top", top=5)
    assert found.index.tolist() == [[15, 14, 13, 12, 11]] * 2


def test_what_is_not_valid_is_never_chosen() -> None:
    given = problem((2, 3, 4, 16, 30))
    valid = torch.tensor([[False, True, True], [False, False, False]])
    layer = GainLayer(given["x"], given["values"], given["coefficients"], None, valid)
    shared = {name: given[name] for name in ("unembed", "scale", "targets")}
    found = logprob_gain_top([layer], **shared, top=10)
    assert (found.index[0, :8] >= 4).all() and (found.index[0, :8] < 12).all()
    assert found.index[0, 8:].tolist() == [-1, -1] and found.layer[0, 8:].tolist() == [-1, -1]
    assert (found.gain[0, 8:] == -torch.inf).all() and (found.gain[1] == -torch.inf).all()
    longer = logprob_gain_top([layer], **shared, top=40)
    assert longer.gain.shape == (2, 40) and torch.equal(longer.index[:, :10], found.index)


def test_what_is_valid_may_differ_from_neuron_to_neuron() -> None:
    given = problem((3, 2, 30, 16, 40))
    valid = torch.rand(3, 2, 30, generator=torch.Generator().manual_seed(4)) < 0.4
    layer = GainLayer(given["x"], given["values"], given["coefficients"], None, valid)
    shared = {name: given[name] for name in ("unembed", "scale", "targets")}
    found = logprob_gain_top([layer], **shared, top=8)
    every = logprob_gain(**given, mode="exact")
    best = every.masked_fill(~valid, -torch.inf).flatten(1).topk(8, dim=1)
    torch.testing.assert_close(found.gain, best.values, rtol=0, atol=1e-5)
    assert torch.equal(found.index, best.indices)
    with pytest.raises(ValueError, match=r"valid must be \(3, 2, 30\) bool"):
        logprob_gain_top([layer._replace(valid=valid[..., 1:])], **shared, top=8)


# --- promises --------------------------------------------------------------------------------


@pytest.mark.skipif(not ISAS, reason="no C++ extension")
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_any_number_of_threads(isa: str) -> None:
    given = problem((3, 4, 230, 40, 1100), size=2.0)
    results = []
    for threads in (1, 2, 3, 7):
        with forced(f"cpu-{isa}", threads) as backend:
            results.append(
                [
                    logprob_gain(**given, mode=mode, backend=backend)
                    for mode in ("exact", "certified")
                ]
            )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_sentence_does_not_depend_on_its_batch() -> None:
    given = problem((5, 2, 60, 24, 300))
    together = logprob_gain(**given)
    for e in range(5):
        alone = {k: v if k in ("values", "unembed") else v[e : e + 1] for k, v in given.items()}
        assert torch.allclose(logprob_gain(**alone)[0], together[e], rtol=1e-5, atol=1e-7)


def test_more_pairs_than_fit_at_once() -> None:
    given = problem((4, 3, 70, 16, 50))
    whole = logprob_gain(**given)
    with mock.patch.object(engine, "_PAIRS", 100):
        assert torch.allclose(logprob_gain(**given), whole, rtol=1e-6, atol=1e-7)


def test_neurons_beyond_the_packed_block() -> None:
    """More value vectors than are packed at once: 32 MB of them."""
    given = problem((1, 1, 2100, 4096, 40))
    assert torch.allclose(logprob_gain(**given).double(), naive(given), rtol=0, atol=5e-6)


def test_zero_coefficients_gain_nothing() -> None:
    given = problem((2, 1, 10, 16, 30))
    given["coefficients"] = torch.zeros(2, 1, 10)
    for mode in ("exact", "certified"):
        assert (logprob_gain(**given, mode=mode) == 0).all()


def test_nothing_to_do() -> None:
    given = problem((2, 1, 0, 16, 30))
    assert logprob_gain(**given).shape == (2, 1, 0)
    assert logprob_gain(**given, mode="certified").shape == (2, 1, 0)
    none = problem((0, 1, 4, 16, 30))
    assert logprob_gain(**none).shape == (0, 1, 4)


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(3, 5)}, r"x must be \(-, D\) with D=16"),
        ({"values": torch.zeros(8, 5)}, r"values must be \(-, D\) with D=16"),
        ({"coefficients": torch.zeros(3, 7)}, r"coefficients must be .*K=8 \(values\)"),
        ({"coefficients": torch.zeros(2, 1, 8)}, "coefficients must be .*E=3"),
        ({"coefficients": [1.0]}, "coefficients must be .*got list"),
        ({"unembed": torch.zeros(30)}, r"unembed must be \(V, D\)"),
        ({"scale": torch.ones(2)}, r"scale must be \(E,\) with E=3"),
        ({"scale": torch.tensor([1.0, 0.0, 1.0])}, "scale must be positive"),
        ({"targets": torch.tensor([0, 1, 30])}, r"targets must be in \[0, 30\).*got 30"),
        ({"targets": torch.tensor([0, -1, 3])}, "targets must be in .*got -1"),
        ({"targets": torch.zeros(3)}, "targets must be int64"),
        ({"offset": torch.zeros(29)}, r"offset must be \(V,\) with V=30"),
        ({"scale_after": torch.ones(3, 8)}, r"scale_after must be \(3, 1, 8\)"),
        ({"scale_after": torch.zeros(3, 1, 8)}, "scale_after must be positive"),
        ({"mode": "fast"}, "mode must be one of"),
        ({"mode": "top"}, "top is given with mode='top'"),
        ({"top": 3}, "top is given with mode='top'"),
        ({"mode": "top", "top": 0}, "top must be positive"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"x": torch.full((3, 16), torch.nan)}, "x must be finite"),
        ({"values": torch.full((8, 16), torch.inf)}, "values must be finite"),
        ({"coefficients": torch.full((3, 1, 8), torch.nan)}, "coefficients must be finite"),
        ({"unembed": torch.full((30, 16), torch.nan)}, "unembed must be finite"),
        ({"x": torch.zeros(3, 16, dtype=torch.float64)}, "x must be .*got torch.float64"),
        ({"values": torch.zeros(8, 16, dtype=torch.int32)}, "values must be .*got torch.int32"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"logprob_gain: {said}"):
        logprob_gain(**(problem((3, 1, 8, 16, 30)) | change))


def test_float64_is_for_the_reference() -> None:
    given = {k: v.double() if k != "targets" else v for k, v in problem((2, 1, 4, 8, 9)).items()}
    with pytest.raises(ValueError, match="the reference takes it"):
        logprob_gain(**given, backend="cpu")


def test_vectors_of_other_shapes() -> None:
    given = problem((2, 1, 4, 8, 9))
    shared = {name: given[name] for name in ("x", "unembed", "scale", "targets")}
    with pytest.raises(ValueError, match=r"vectors must be \(E, M, D\) with E=2"):
        logprob_gain_vectors(vectors=torch.zeros(3, 1, 8), **shared)
    with pytest.raises(ValueError, match=r"scale_after must be \(2, 3\)"):
        logprob_gain_vectors(vectors=torch.zeros(2, 3, 8), scale_after=torch.ones(2, 2), **shared)
    with pytest.raises(ValueError, match="there must be a layer"):
        logprob_gain_top([], **{k: v for k, v in shared.items() if k != "x"}, top=1)
