"""h and the activations behind it: the accuracy rule, all half patterns, the formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from relneuron.ops import ACTIVATIONS
from relneuron.ops.swiglu_stats import reference
from relneuron.testing import assert_accurate, assert_same_bits
from relneuron.testing.oracle import normal
from tests.kit.interpreter import quiet
from tests.ops.swiglu_stats.cases import DTYPES, all_patterns
from tests.ops.swiglu_stats.runs import BACKENDS, FUSED, run

pytestmark = quiet


def torch_act(gate: Tensor, activation: str) -> Tensor:
    return reference._torch_activation(gate, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_h(backend: str, activation: str, dtype: torch.dtype) -> None:
    gate = normal(53, 300, dtype=dtype, seed=1, scale=3.0)
    up = normal(53, 300, dtype=dtype, seed=2)
    h = run(backend, gate, up, activation=activation).h
    eager = torch_act(gate, activation) * up
    if backend == "reference" or activation == "relu":
        assert_same_bits(h, eager)
    assert_accurate(h, torch_act(gate.double(), activation) * up.double(), eager)


def exact_activation(wide: Tensor, activation: str) -> Tensor:
    """In float64, by formulas that keep their digits in the negative tail."""
    if activation == "gelu":
        return wide * torch.special.erfc(wide * -math.sqrt(0.5)) * 0.5
    if activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        return wide / (1 + torch.exp(-2 * inner))
    return wide / (1 + torch.exp(-wide))


def ulps_apart(a: Tensor, b: Tensor) -> Tensor:
    """Distance in representable numbers of two tensors of one float dtype, 0 for two NaN."""

    def order(x: Tensor) -> Tensor:
        bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).long()
        top = 2 ** (8 * x.element_size() - 1)
        return torch.where(bits < 0, -(bits + top), bits)

    return torch.where(a.isnan() & b.isnan(), 0, (order(a) - order(b)).abs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", FUSED)
def test_h_of_all_patterns_is_within_one_ulp(
    backend: str, activation: str, dtype: torch.dtype
) -> None:
    gate = all_patterns(dtype)
    h = run(backend, gate, torch.ones_like(gate), activation=activation).h
    eager = torch_act(gate, activation)
    apart = ulps_apart(h, eager)
    if activation in ("silu", "relu"):
        assert int(apart.max()) <= 1
        assert (apart == 0).float().mean() >= 0.999
        return
    # torch's gelu on a CPU loses its digits in the negative tail, overflows above 1.7e38, gives NaN
    # for +inf and 0 for subnormal numbers: there the truth is the float64 value, elsewhere torch.
    exact = exact_activation(gate.double(), activation).to(dtype)
    wide = gate.float()
    beyond = (wide < -1.5) | (wide > 1e38) | (wide.abs() < 3e-38)
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
    truth = exact_activation(values.double(), activation)
    out = reference._activation(values, activation).double()
    normal_range = truth.abs() > 2e-38
    return ((out - truth).abs() / truth.abs() * 2**24)[normal_range]


# Bounds are the errors measured over these inputs, rounded up.
@pytest.mark.parametrize(
    ("activation", "low", "bound"),
    [
        ("silu", -87.0, 3.0),
        ("gelu", -1.0, 5.5),
        ("gelu", -5.0, 22.0),
        ("gelu", -12.0, 131.0),
        ("gelu_tanh", -1.0, 4.3),
        ("gelu_tanh", -5.0, 46.1),
        ("gelu_tanh", -9.0, 233.0),
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
    expected = torch_act(x, activation)
    if activation == "gelu":
        expected[2] = torch.inf
    out = reference._activation(x, activation)
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-6, atol=0)
