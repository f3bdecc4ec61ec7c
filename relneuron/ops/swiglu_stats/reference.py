"""The plain-torch reference of `swiglu_stats`, and the activation that all its backends execute.

`op.py` calls it, on any device; tests compare the C++ and Triton kernels with it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from relneuron.ops.swiglu_stats.repeat import Known

# By name, torch's own, bit for bit what a model computes in eager mode.
TORCH_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nnf.silu,
    "gelu": nnf.gelu,
    "gelu_tanh": lambda x: nnf.gelu(x, approximate="tanh"),
    "relu": nnf.relu,
    "relu2": lambda x: nnf.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
}
ACTIVATIONS = tuple(TORCH_ACTIVATIONS)
# What a Call may name besides: h = up + gate where kept and up elsewhere, the op residual_stats.
RESIDUAL = "residual"
# Likewise act = gate - up in float32, never rounded to their dtype, without h: the op pair_stats.
DIFFERENCE = "difference"
# The position is the code in the C++ and Triton kernels.
CODES = (*ACTIVATIONS, RESIDUAL, DIFFERENCE)


@dataclass(slots=True)
class Call:
    """The arguments of one checked call, as every backend takes them."""

    gate: Tensor
    up: Tensor | None  # None: h is activation(gate)
    out: Tensor | None  # None: only statistics
    activation: str
    sites: tuple[str, ...]
    threshold_bits: int
    count: Tensor | None
    tokens: Tensor | None
    sum: Tensor | None
    sum_sq: Tensor | None
    max: Tensor | None
    n_nonfinite: Tensor | None
    group_ids: Tensor | None
    responses: dict[str, Tensor]
    prompt_ids: Tensor | None
    keep: Tensor | None
    condition_ids: Tensor | None
    known: Known | None = None  # of calls like it


def swiglu_stats_reference(call: Call) -> None:
    """The op in plain torch, for any device: what the other backends are compared with."""
    gate, up = call.gate, call.up
    if call.out is not None:
        _compute_h(call, call.out)
    if call.tokens is None and not call.responses:
        return

    with ieee_arithmetic():
        values = site_values(gate, up, call.activation, {*call.sites, *call.responses})
        if call.tokens is not None:
            if call.group_ids is None:
                rows = slice(None)
                ids = torch.zeros(gate.shape[0], dtype=torch.int64, device=gate.device)
            else:
                counted = call.group_ids >= 0
                rows, ids = counted, call.group_ids[counted].long()  # type: ignore[assignment]
            call.tokens.index_add_(0, ids, torch.ones_like(ids))
            for index, site in enumerate(call.sites):
                _add_statistics(call, index, values[site][rows], ids)
        if call.prompt_ids is not None:
            in_prompt = call.prompt_ids >= 0
            ids = call.prompt_ids[in_prompt].long()
            for site, sums in call.responses.items():
                sums.index_add_(0, ids, values[site][in_prompt])


def _compute_h(call: Call, h: Tensor) -> None:
    gate, up = call.gate, call.up
    if call.activation == RESIDUAL:
        assert up is not None, "a residual is added to something"
        torch.add(up, gate, out=h)
    elif up is None:
        h.copy_(TORCH_ACTIVATIONS[call.activation](gate))
    else:
        torch.mul(TORCH_ACTIVATIONS[call.activation](gate), up, out=h)
    if call.keep is not None:
        keep = keep_bits(call.keep, call.condition_ids, gate.shape[1])
        if call.activation == RESIDUAL:
            assert up is not None
            torch.where(keep, h, up, out=h)
        else:
            h.masked_fill_(~keep, 0.0)


def _add_statistics(call: Call, index: int, value: Tensor, ids: Tensor) -> None:
    """Add float32 values (T', F) of one site to the groups that `ids` (T',) names."""
    assert call.count is not None, "statistics come with counts"
    bits = torch.tensor(call.threshold_bits, dtype=torch.int32, device=value.device)
    hits = value > bits.view(torch.float32)
    call.count[index].index_add_(0, ids, hits.long())
    if call.sum is None:
        return
    assert call.sum_sq is not None and call.max is not None and call.n_nonfinite is not None
    finite = value.isfinite()
    call.n_nonfinite[index].index_add_(0, ids, (~finite).long())
    exact = torch.where(finite, value, 0.0).double()
    call.sum[index].index_add_(0, ids, exact)
    call.sum_sq[index].index_add_(0, ids, exact * exact)
    # Adding +0 turns -0 into +0, so that the maximum does not depend on the order of the two.
    candidates = torch.where(finite, value + 0.0, -math.inf)
    where = ids[:, None].expand_as(candidates)
    call.max[index].scatter_reduce_(0, where, candidates, reduce="amax", include_self=True)


def keep_bits(keep: Tensor, condition_ids: Tensor | None, width: int) -> Tensor:
    """The bit mask as (T, F) bool, or (1, F) when all tokens take row 0."""
    neuron = torch.arange(width, device=keep.device)
    bits = (keep[:, neuron // 32] >> (neuron % 32).int()) & 1
    return (bits[:1] if condition_ids is None else bits[condition_ids.long()]).bool()


def site_values(
    gate: Tensor, up: Tensor | None, activation: str, sites: Collection[str]
) -> dict[str, Tensor]:
    """The values of the asked sites as float32, each but a difference rounded to gate's dtype."""
    dtype = gate.dtype
    values = {"gate": gate.float()}
    if up is not None:
        values["up"] = up.float()
    if activation == DIFFERENCE:
        values["act"] = values["gate"] - values["up"]
    elif not {"act", "product"}.isdisjoint(sites):
        values["act"] = _activation(values["gate"], activation).to(dtype).float()
    if "product" in sites:
        values["product"] = (values["act"] * values["up"]).to(dtype).float()
    return values


def ieee_arithmetic() -> AbstractContextManager[None]:
    """Subnormal numbers count inside the block, also under torch.set_flush_denormal(True).

    torch's worker threads keep the mode they were created with, so one thread does the work then.
    """
    return _AS_IT_IS if _SMALLEST_NORMAL_DOUBLE * 0.5 != 0.0 else _without_flush()


@contextmanager
def _without_flush() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_flush_denormal(False)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
        torch.set_flush_denormal(True)


_AS_IT_IS = nullcontext()
_SMALLEST_NORMAL_DOUBLE = struct.unpack("<d", bytes(6) + b"\x10\x00")[0]


# --------------------------------------------------------------------------------------------------
# The activation of the statistics: one fixed sequence of float32 operations, the same here, in
# csrc/swiglu_stats_activation.h and in ops/swiglu_stats/triton_math.py. Every + - * / below rounds
# once, so no backend may contract them into fused multiply-adds, reorder them or replace the
# division.  The constants are float32 numbers with 9 digits. Largest relative errors against
# float64, over all 16-bit patterns and many float32 values (test_activation_error holds bounds on
# them), in units of 2^-24: exp 1.4, silu 2.9, relu2 1, tanh 1.5; gate > -1: gelu 5.5, gelu_tanh
# 4.6, quick_gelu 4.0. In the negative tail the rounding of the exponent counts as often as it is
# large: gate > -5: gelu 22, gelu_tanh 39, quick_gelu 13; further out gelu 131 (gate > -12),
# gelu_tanh 194 (gate > -9), quick_gelu 84 (gate > -50). torch's own float32 gelu has lost 20% of
# the value at gate = -5.

# exp(x) = 2^n * exp(r) with r = x - n ln 2 in two parts: the first has 10 bits, so n * it is exact.
LOG2_E = 1.44269502
LN2_HIGH = 0.693359375
LN2_LOW = -2.12194440e-4
# exp(r) = 1 + r + r^2 q(r): minimax for |r| <= ln(2)/2 in relative error (3.1e-9), lowest first.
EXP_Q = (0.49999994, 0.166665196, 0.0416683927, 0.00836877991, 0.001381448)
# Beyond these the result is 0 and +inf.
EXP_LOW, EXP_HIGH = -104.0, 89.0

# Phi(x) - 1/2 = x R(x^2): minimax for |x| <= 1 in absolute error (1.5e-10), lowest first.
PHI_R = (0.398942292, -0.0664903373, 0.00997319352, -0.00118603115, 0.000113185983, -7.5445364e-06)
# erfc(z) = t exp(-z^2 + P(t)), t = 1 / (1 + z/2): minimax for 0.7 <= z <= 10.3 (1.4e-8).
ERFC_P = (
    -1.26546896,
    0.998969734,
    0.385154188,
    0.030283194,
    0.0677839294,
    -0.361406326,
    -0.0744687095,
    0.379661053,
    -0.161039799,
)
SQRT_HALF = 0.707106769
# gelu_tanh(x) = x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)): of x and of x^3
GELU_LINEAR = 1.59576917
GELU_CUBIC = 0.0713548139
QUICK_GELU = 1.70200002
# Above this x sigmoid(s) is x, for both s.
SIGMOID_HIGH = 12.0
# tanh(x) = x + x^3 P(x^2): minimax for |x| <= 1 in relative error (4.6e-9), lowest first.
TANH_P = (
    -0.333332956,
    0.133323446,
    -0.0538798012,
    0.0214866586,
    -0.00794610661,
    0.0023013649,
    -0.000358452089,
)


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    result = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        result = result * x + coefficient
    return result


def _exp(x: Tensor) -> Tensor:
    x = torch.where(x < EXP_LOW, EXP_LOW, x)
    x = torch.where(x > EXP_HIGH, EXP_HIGH, x)
    n = torch.floor(x * LOG2_E + 0.5)
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    y = (_horner(r, EXP_Q) * (r * r) + r) + 1.0
    # 2^n as two exact factors: the first keeps y normal, the second rounds once if it must.
    n = torch.where(n == n, n, 0.0).int()
    half = n >> 1
    return (
        y * ((half + 127) << 23).view(torch.float32) * ((n - half + 127) << 23).view(torch.float32)
    )


def _times_sigmoid(x: Tensor, s: Tensor) -> Tensor:
    """x sigmoid(s) where s has the sign of x: of positive x a small part is taken off.

    So the roundings before the last one count for little where the result is large.
    """
    e = _exp(-s.abs())
    part = x * (e / (e + 1.0))
    return torch.where(x > SIGMOID_HIGH, x, torch.where(x > 0.0, x - part, part))


def _gelu(x: Tensor) -> Tensor:
    square = x * x
    t = torch.ones_like(x) / ((x.abs() * SQRT_HALF) * 0.5 + 1.0)
    tail = (_exp(_horner(t, ERFC_P) - square * 0.5) * t) * 0.5
    middle = x * _horner(square, PHI_R) + 0.5
    return x * torch.where(x < -1.0, tail, torch.where(x > 1.0, 1.0 - tail, middle))


def _relu(x: Tensor) -> Tensor:
    return torch.where(x < 0.0, 0.0, x)


def _tanh(x: Tensor) -> Tensor:
    size = x.abs()
    square = size * size
    near = size + size * (square * _horner(square, TANH_P))
    e = _exp(size * -2.0)
    far = 1.0 - (e * 2.0) / (e + 1.0)
    return torch.where(size > 1.0, far, near).copysign(x)


_SEQUENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (_exp(-x) + 1.0),
    "gelu": _gelu,
    "gelu_tanh": lambda x: _times_sigmoid(x, x * ((x * x) * GELU_CUBIC + GELU_LINEAR)),
    "relu": _relu,
    "relu2": lambda x: _relu(x) * _relu(x),
    "quick_gelu": lambda x: _times_sigmoid(x, x * QUICK_GELU),
    "tanh": _tanh,
}


def _activation(x: Tensor, activation: str) -> Tensor:
    """The activation of float32 values, as the sites act and product record it.

    NaN gives NaN. At -inf silu and the gelus give NaN, as torch's do; at +inf all but tanh give
    +inf (torch's gelu gives NaN there on a CPU).
    """
    return _SEQUENCES[activation](x)
