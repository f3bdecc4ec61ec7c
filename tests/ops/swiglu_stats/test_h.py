"""h and the activations behind it: the accuracy rule, all half patterns, the formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from relneuron.ops import ACTIVATIONS
from relneuron.ops.swiglu_stats import reference
from relneuron.testing import assert_same_bits
from relneuron.testing.oracle import (
    assert_h,
    eager_activation,
    exact_activation,
    normal,
    ulps_apart,
)
from tests.kit.interpreter import quiet
from tests.ops.swiglu_stats.cases import DTYPES, all_patterns
from tests.ops.swiglu_stats.runs import BACKENDS, FUSED, run

pytestmark = quiet


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_h(backend: str, activation: str, dtype: torch.dtype) -> None:
    gate = normal(53, 300, dtype=dtype, seed=1, scale=3.0)
    up = normal(53, 300, dtype=dtype, seed=2)
    h = run(backend, gate, up, activation=activation).h
    eager = eager_activation(gate, activation) * up
    if backend == "reference" or activation in ("relu", "relu2"):
        assert_same_bits(h, eager)
    assert_h(h, gate, up, activation)


def test_h_of_float32_keeps_the_rule_in_many_calls() -> None:
    """The site product, which every backend's h is, in 1,400 calls; seeds of their own."""
    for activation in ACTIVATIONS:
        for seed in range(200):
            gate = normal(19, 130, dtype=torch.float32, seed=2 * seed)
            up = normal(19, 130, dtype=torch.float32, seed=2 * seed + 1)
            h = reference.site_values(gate, up, activation, ["product"])["product"]
            assert_h(h, gate, up, activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", FUSED)
def test_h_of_all_patterns_is_within_one_ulp(
    backend: str, activation: str, dtype: torch.dtype
) -> None:
    gate = all_patterns(dtype)
    h = run(backend, gate, torch.ones_like(gate), activation=activation).h
    eager = eager_activation(gate, activation)
    apart = ulps_apart(h, eager)
    if activation in ("silu", "relu", "relu2", "tanh"):
        assert int(apart.max()) <= 1
        assert (apart == 0).float().mean() >= 0.999
        return
    # torch's gelu on a CPU loses its digits in the negative tail, overflows above 1.7e38, gives NaN
    # for +inf and 0 for subnormal numbers: there the truth is the float64 value, elsewhere torch.
    exact = exact_activation(gate, activation).to(dtype)
    wide = gate.float()
    beyond = (wide < -1.5) | (wide > 1e38) | (wide.abs() < 3e-38)
    if activation == "quick_gelu":  # which torch rounds three times
        apart = ulps_apart(h, exact)
    # The float32 formulas underflow where float64 does not yet.
    tiny = torch.finfo(dtype).tiny if dtype == torch.float16 else 1e-36
    ok = torch.where(beyond, ulps_apart(h, exact) <= 1, apart <= 1) | (exact.abs() < tiny)
    assert bool(ok.all()), gate[~ok]
    assert (apart[~beyond] == 0).float().mean() >= 0.999


@pytest.mark.parametrize("backend", FUSED)
def test_float32_silu_is_within_four_ulp_of_torch(backend: str) -> None:
    gate = torch.linspace(-86, 88, 60000).view(60, 1000)
    h = run(backend, gate, torch.ones_like(gate)).h
    assert int(ulps_apart(h, nnf.silu(gate)).max()) <= 4


def relative_error(values: Tensor, activation: str) -> Tensor:
    """Of the activation in float32, in units of 2^-24, against float64."""
    truth = exact_activation(values, activation)
    out = reference._activation(values, activation).double()
    error = (out - truth).abs() / truth.abs() * 2**24
    return torch.where(truth.abs() > 2e-38, error, 0.0)


# Bounds are the errors measured over these inputs, rounded up.
@pytest.mark.parametrize(
    ("activation", "low", "bound"),
    [
        ("silu", -87.0, 3.0),
        ("gelu", -1.0, 5.5),
        ("gelu", -5.0, 22.0),
        ("gelu", -12.0, 131.0),
        ("gelu_tanh", -1.0, 4.6),
        ("gelu_tanh", -5.0, 39.0),
        ("gelu_tanh", -9.0, 194.0),
        ("relu2", -1.0, 1.0),
        ("quick_gelu", -1.0, 4.0),
        ("quick_gelu", -5.0, 13.0),
        ("quick_gelu", -50.0, 84.0),
        ("tanh", -88.0, 1.5),
    ],
)
def test_activation_error(activation: str, low: float, bound: float) -> None:
    small = torch.logspace(-30, 0, 50000)
    values = [torch.linspace(low, 88.0, 1_000_000), small, -small]
    for dtype in (torch.bfloat16, torch.float16):
        patterns = all_patterns(dtype).flatten().float()
        values.append(patterns[(patterns >= low) & (patterns <= 88.0)])
    worst = max(float(relative_error(v, activation).max()) for v in values)
    print(f"{activation} from {low}: {worst:.2f} x 2^-24")
    assert worst <= bound


def test_exp_error() -> None:
    x = torch.linspace(-87.3, 88.7, 2_000_001)
    exact = x.double().exp()
    error = (reference._exp(x).double() - exact).abs() / exact
    assert float(error.max()) * 2**24 <= 1.4
    ends = torch.tensor([-torch.inf, -1e30, -104.1, 88.8, 1e30, torch.inf, torch.nan, 0.0, -0.0])
    expected = torch.tensor([0, 0, 0, torch.inf, torch.inf, torch.inf, torch.nan, 1, 1])
    assert_same_bits(reference._exp(ends), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_special_values_is_torchs(activation: str) -> None:
    x = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0, -0.0, -1e30, 1e30, -100.0])
    expected = eager_activation(x, activation)
    if activation == "gelu":
        expected[2] = torch.inf
    out = reference._activation(x, activation)
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-6, atol=0)


def test_activations_have_other_names_in_transformers() -> None:
    """Those that docs/backend.md names; of the others none is one of ours."""
    table = pytest.importorskip("transformers.activations").ACT2FN
    same = {name: name for name in ACTIVATIONS if name in table}
    same |= {"swish": "silu", "gelu_python": "gelu"}
    tanh = ("new", "fast", "accurate", "pytorch_tanh", "python_tanh")
    same |= {f"gelu_{name}": "gelu_tanh" for name in tanh}
    x = torch.linspace(-20, 20, 4001)
    for name in table:
        with torch.no_grad():
            found = table[name](x)
        near = {a for a in ACTIVATIONS if (eager_activation(x, a) - found).abs().max() < 1e-5}
        assert near == ({same[name]} if name in same else set()), name
