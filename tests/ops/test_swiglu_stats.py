"""Tests of ops.swiglu_stats: every backend and instruction set against the reference and the spec.

Counts, tokens, maxima and non-finite counts must be equal bit for bit; h is held to the accuracy
rule. Triton runs in its interpreter where there is no GPU (TRITON_INTERPRET=1, from conftest.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from relneuron.ops import (
    ACTIVATIONS,
    SITES,
    GroupStats,
    available_backends,
    backends,
    swiglu_stats,
    swiglu_stats_only,
)
from relneuron.ops import swiglu_stats as public_function
from relneuron.ops.swiglu_stats import reference
from relneuron.testing import assert_accurate, assert_same_bits
from relneuron.testing import oracle as data
from relneuron.testing.oracle import integers, normal

# The interpreter computes with numpy, which warns about overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

op = sys.modules["relneuron.ops.swiglu_stats.op"]
assert public_function is op.swiglu_stats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATUS = available_backends()
ISAS = backends.cpu_module().isa_levels() if STATUS["cpu"].works else []
BACKENDS = ["reference", *(f"cpu-{isa}" for isa in ISAS)]
if STATUS["triton"].works:
    BACKENDS.append("triton")
FUSED = BACKENDS[1:]
IS_INTERPRETED = STATUS["triton"].works and backends.triton_module("swiglu_stats").IS_INTERPRETED


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The tensors are small: on a busy machine torch's threads would mostly wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and not IS_INTERPRETED else "cpu"


def move(tensor: Tensor | None, device: str) -> Tensor | None:
    """A copy on a GPU with the same strides; the tensor itself on a CPU."""
    if tensor is None or device == "cpu":
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@dataclasses.dataclass
class Result:
    h: Tensor
    stats: GroupStats | None
    responses: dict[str, Tensor]
    # Of Triton's sums, which have an order of their own: what `assert_same` allows.
    tolerance: TritonTolerance | None = None


@dataclasses.dataclass
class TritonTolerance:
    """float32 sums of up to 128 tokens: 34 roundings, of 32 rows in a thread and then of blocks.

    Without the site product act of a 16-bit dtype may also be the neighbouring number: then one
    such step of the largest term is allowed, more than one is rare.
    """

    act_eps: float
    # Sum and maximum of the absolute terms of each response, (N, F).
    responses: dict[str, tuple[Tensor, Tensor]]

    ROUNDING = 34 * 2.0**-24

    @staticmethod
    def of(gate: Tensor, up: Tensor, kwargs: dict[str, Any], n_prompts: int) -> TritonTolerance:
        activation = kwargs.get("activation", "silu")
        is_exact = gate.dtype == torch.float32 or "product" in kwargs["sites"]
        responses = {}
        ids = kwargs["prompt_ids"]
        for site in kwargs["response_sites"]:
            terms = reference.site_values(gate, up, activation, {site})[site].double().abs()
            rows, at = terms[ids >= 0], ids[ids >= 0].long()
            zero = torch.zeros(n_prompts, gate.shape[1], dtype=torch.float64)
            total = zero.index_add(0, at, rows)
            largest = zero.scatter_reduce(0, at[:, None].expand_as(rows), rows, "amax")
            responses[site] = total, largest
        return TritonTolerance(0.0 if is_exact else torch.finfo(gate.dtype).eps, responses)


def interpreter_tiles(
    gate: Tensor, gpu_tiles: bool | None
) -> contextlib.AbstractContextManager[Any]:
    if gpu_tiles is None or not IS_INTERPRETED:
        return contextlib.nullcontext()
    kernels = backends.triton_module("swiglu_stats")
    block_t, block_f = (max(1, 1 << (n - 1).bit_length()) for n in gate.shape)
    block_t, block_f = min(block_t, 64), max(block_f, 8)
    block_bytes = block_f * gate.element_size()
    tiles = kernels.LaunchConfig(block_t, block_t, block_bytes, 4, block_t, block_f)
    return mock.patch.object(
        kernels, "INTERPRETER_LAUNCH", kernels.DEFAULT_LAUNCH if gpu_tiles else tiles
    )


def run(
    backend: str,
    gate: Tensor,
    up: Tensor,
    *,
    stats: dict[str, Any] | None = None,
    response_sites: tuple[str, ...] = (),
    n_prompts: int = 0,
    n_threads: int | None = None,
    gpu_tiles: bool = False,
    only_stats: bool = False,
    **kwargs: Any,
) -> Result:
    """Run one backend ("cpu-avx2" forces an instruction set); everything comes back on the CPU.

    With `only_stats` it is swiglu_stats_only that runs, without masks; h stays a sentinel.

    The interpreter takes time per tile, so it gets one big tile unless `gpu_tiles` is set.
    """
    device = device_of(backend)
    name, _, isa = backend.partition("-")
    tolerance = None
    if name == "triton":
        asked = {
            "activation": kwargs.get("activation", "silu"),
            "sites": stats["sites"] if stats and "sites" in stats else (),
            "prompt_ids": kwargs.get("prompt_ids"),
            "response_sites": response_sites,
        }
        tolerance = TritonTolerance.of(gate, up, asked, n_prompts)
    group_stats = None if stats is None else GroupStats(width=gate.shape[1], device=device, **stats)
    responses = {
        site: torch.zeros(n_prompts, gate.shape[1], device=device) for site in response_sites
    }
    # A sentinel in all elements: one that is not written would show.
    out = torch.full(gate.shape, 77.0, dtype=gate.dtype, device=device)
    tensors = {
        key: move(kwargs.pop(key, None), device)
        for key in ("group_ids", "prompt_ids", "keep", "condition_ids")
    }
    function: Any = functools.partial(swiglu_stats, out=out)
    if only_stats:
        function = swiglu_stats_only
        del tensors["keep"], tensors["condition_ids"]
    forced = functools.partial(op._swiglu_stats_cpu, isa=isa, n_threads=n_threads or 1)
    with (
        mock.patch.object(op, "_swiglu_stats_cpu", forced),
        mock.patch.object(op, "_ran_quickly", return_value=False),
        interpreter_tiles(gate, gpu_tiles if backend == "triton" else None),
    ):
        h = function(
            move(gate, device),
            move(up, device),
            stats=group_stats,
            responses=responses or None,
            backend=name,
            **tensors,
            **kwargs,
        )
    assert h is (None if only_stats else out), "out must be returned"
    return Result(
        out.cpu(),
        None if group_stats is None else group_stats.to("cpu"),
        {site: tensor.cpu() for site, tensor in responses.items()},
        tolerance,
    )


def assert_same_stats(
    out: GroupStats,
    expected: GroupStats,
    *,
    exact_sums: bool = True,
    tolerance: TritonTolerance | None = None,
) -> None:
    """Equal bits; sums may instead have the rounding of float32 partial sums."""
    assert_same_bits(out.tokens, expected.tokens, "tokens")
    for name in ("count", "max", "n_nonfinite", *(("sum", "sum_sq") if exact_sums else ())):
        for site in expected.sites if expected.moments or name == "count" else ():
            assert_same_bits(
                getattr(out, name)[site], getattr(expected, name)[site], f"{name}[{site}]"
            )
    if exact_sums or not expected.moments:
        return
    eps, smallest = torch.finfo(torch.float32).eps, 2.0**-149
    n_tokens = expected.tokens.double().unsqueeze(1)
    for site in expected.sites:
        # The sum of the absolute values is at most sqrt(n * sum of squares).
        scales = {
            "sum": (n_tokens * expected.sum_sq[site]).sqrt(),
            "sum_sq": expected.sum_sq[site] + n_tokens * smallest / eps,
        }
        for name, scale in scales.items():
            error = (getattr(out, name)[site] - getattr(expected, name)[site]).abs()
            allowed = 19 * 2.0**-24 * scale  # part_sums in csrc/swiglu_stats_records.h
            if tolerance is not None:
                allowed = tolerance.ROUNDING * scale
                if site == "act":
                    largest = expected.sum_sq[site].sqrt()
                    largest = largest if name == "sum" else 2 * largest.square()
                    allowed = allowed + tolerance.act_eps * largest
            relative = (error / scale).nan_to_num()
            assert bool((error <= allowed).all()), (
                f"{name}[{site}]: off by {float(relative.max()):.2g} of its scale"
            )


def assert_same(out: Result, expected: Result, *, exact_sums: bool = False) -> None:
    """Everything but h, whose rounding may differ from torch's."""
    if expected.stats is not None:
        assert out.stats is not None
        assert_same_stats(out.stats, expected.stats, exact_sums=exact_sums, tolerance=out.tolerance)
    for site, response in expected.responses.items():
        if out.tolerance is None:
            assert_same_bits(out.responses[site], response, f"responses[{site}]")
            continue
        total, largest = out.tolerance.responses[site]
        is_act = site in ("act", "product")
        allowed = out.tolerance.ROUNDING * total
        allowed = allowed + (2 * out.tolerance.act_eps * largest if is_act else 0.0)
        error = (out.responses[site].double() - response.double()).abs()
        same = out.responses[site] == response
        same |= out.responses[site].isnan() & response.isnan()
        assert bool((same | (error <= allowed)).all()), f"responses[{site}]"


def all_patterns(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(1, 65536): every 16-bit pattern once; for float32 as many random bit patterns."""
    if dtype == torch.float32:
        special = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, torch.inf, -torch.inf, torch.nan]
        bits = integers(-(2**31), 2**31 - 1, 65536, seed=seed).view(torch.float32)
        bits[: len(special)] = torch.tensor(special)
        # A quarter where the activations are neither 0 nor the identity.
        bits[32768:49152] = normal(16384, dtype=dtype, seed=seed, scale=6.0)
        return bits.view(1, 65536)
    return data.all_patterns(dtype, seed)


# --------------------------------------------------------------------------------------------------
# An oracle written from the spec, in float64 and one group at a time


def oracle(result: Result, gate: Tensor, up: Tensor, ids: Tensor, activation: str) -> None:
    """Check counts, tokens and moments of one fresh call against the definition."""
    stats = result.stats
    assert stats is not None
    call_values = {
        "gate": gate,
        "up": up,
        "act": reference._activation(gate.float(), activation).to(gate.dtype),
    }
    call_values["product"] = (call_values["act"].float() * up.float()).to(gate.dtype)
    for group in range(stats.groups):
        rows = [t for t, at in enumerate(ids.tolist()) if at == group]
        assert int(stats.tokens[group]) == len(rows)
        for site in stats.sites:
            value = call_values[site][rows].double()
            finite = value.isfinite()
            hits = (value > stats.threshold).sum(0)
            assert_same_bits(stats.count[site][group], hits, f"count[{site}]")
            if not stats.moments:
                continue
            assert_same_bits(stats.n_nonfinite[site][group], (~finite).sum(0), "n_nonfinite")
            kept = torch.where(finite, value, -torch.inf)
            largest = kept.amax(0) if rows else torch.full((stats.width,), -torch.inf)
            torch.testing.assert_close(
                stats.max[site][group].double(), largest.double(), rtol=0, atol=0
            )
            total, total_sq = torch.zeros(2, stats.width, dtype=torch.float64)
            for row, ok in zip(value, finite, strict=True):
                total = total + torch.where(ok, row, 0.0)
                total_sq = total_sq + torch.where(ok, row * row, 0.0)
            assert_same_bits(stats.sum[site][group], total, f"sum[{site}]")
            assert_same_bits(stats.sum_sq[site][group], total_sq, f"sum_sq[{site}]")


# --------------------------------------------------------------------------------------------------
# Named cases


def strided(rows: int, columns: int, dtype: torch.dtype, seed: int, offset: int) -> Tensor:
    """A slice of a larger tensor: long rows, an odd start."""
    return normal(rows + 2, columns * 2 + 9, dtype=dtype, seed=seed)[
        1 : rows + 1, offset : offset + columns
    ]


def case(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """gate, up and the keyword arguments of `run`."""
    n_tokens, width, groups = {
        "one": (1, 1, 1),
        "ragged": (257, 1003, 5),
        "tile_minus_1": (7, 255, 2),
        "tile_plus_1": (9, 257, 2),
        "empty": (0, 40, 3),
        "no_columns": (5, 0, 3),
        "single_group": (33, 64, 1),
        "all_masked": (33, 96, 3),
        "strided": (21, 77, 4),
        "wide": (3, 14336, 2),
    }[name]
    if name == "strided":
        gate = strided(n_tokens, width, dtype, 1, 3)
        up = strided(n_tokens, width, dtype, 2, 40)
    else:
        gate = normal(n_tokens, width, dtype=dtype, seed=1)
        up = normal(n_tokens, width, dtype=dtype, seed=2)
    keep = integers(-(2**31), 2**31 - 1, 3, (width + 31) // 32, seed=3)
    kwargs: dict[str, Any] = {
        "stats": {"groups": groups, "sites": SITES, "moments": True, "threshold": 0.1},
        "group_ids": integers(-1, groups, n_tokens, seed=4),
        "response_sites": ("gate", "product"),
        "n_prompts": 4,
        "prompt_ids": integers(-1, 4, n_tokens, seed=5),
        "keep": keep,
        "condition_ids": integers(0, 3, n_tokens, seed=6),
    }
    if name == "single_group":
        del kwargs["group_ids"], kwargs["condition_ids"]
    if name == "all_masked":
        kwargs["group_ids"] = torch.full((n_tokens,), -1, dtype=torch.int32)
        kwargs["keep"] = torch.zeros_like(keep)
    return gate, up, kwargs


CASES = (
    "one",
    "ragged",
    "tile_minus_1",
    "tile_plus_1",
    "empty",
    "no_columns",
    "single_group",
    "all_masked",
    "strided",
    "wide",
)


def keep_mask(kwargs: dict[str, Any], n_tokens: int, width: int) -> Tensor:
    """Bit f % 32 of word f // 32, by numpy: in little-endian bytes that is bit f of the row."""
    words = kwargs["keep"].numpy().astype("<i4").view(np.uint8)
    bits = np.unpackbits(words, axis=1, bitorder="little")[:, :width].astype(bool)
    rows = kwargs.get("condition_ids", torch.zeros(n_tokens, dtype=torch.int32)).numpy()
    return torch.from_numpy(bits[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cases(backend: str, name: str, dtype: torch.dtype) -> None:
    gate, up, kwargs = case(name, dtype)
    if name == "ragged" and backend == "triton" and IS_INTERPRETED:
        gate, up = gate[:67], up[:67]
        for key in ("group_ids", "prompt_ids", "condition_ids"):
            kwargs[key] = kwargs[key][:67]
    result = run(backend, gate, up, gpu_tiles=name.startswith("tile"), **kwargs)
    assert_same(result, run("reference", gate, up, **kwargs))
    n_tokens, width = gate.shape
    ids = kwargs.get("group_ids", torch.zeros(n_tokens, dtype=torch.int32))
    if backend == "reference":
        oracle(result, gate, up, ids, "silu")
        for site, value in (("gate", gate), ("product", None)):
            if value is not None:
                expected = torch.zeros(4, width)
                for t in range(n_tokens):
                    if kwargs["prompt_ids"][t] >= 0:
                        expected[kwargs["prompt_ids"][t]] += value[t].float()
                assert_same_bits(result.responses[site], expected, site)

    # h: exactly +0 where dropped, accurate elsewhere.
    dropped = torch.zeros_like(gate)
    mask = keep_mask(kwargs, n_tokens, width)
    assert_same_bits(result.h[~mask], dropped[~mask], "dropped h")
    truth = torch.where(mask, nnf.silu(gate.double()) * up.double(), 0.0)
    baseline = torch.where(mask, nnf.silu(gate) * up, 0.0)
    assert_accurate(result.h, truth, baseline)


# --------------------------------------------------------------------------------------------------
# h and the activation


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


# --------------------------------------------------------------------------------------------------
# Bit-identity of the statistics

THRESHOLDS = (
    0.0,
    -0.0,
    0.1,
    -1.0,
    1e-45,
    -1e-45,
    1e-7,
    65504.0,
    1e300,
    -1e300,
    math.inf,
    -math.inf,
)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_gates_are_classified_as_in_float64(dtype: torch.dtype, threshold: float) -> None:
    gate = all_patterns(dtype)
    expected = gate.double() > threshold
    stats = {"groups": 1, "sites": ("gate",), "threshold": threshold}
    for backend in BACKENDS:
        result = run(backend, gate, gate, stats=stats)
        assert result.stats is not None
        assert_same_bits(result.stats.count["gate"], expected.long(), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_patterns_give_the_same_statistics(activation: str, dtype: torch.dtype) -> None:
    gate, up = all_patterns(dtype, seed=1), all_patterns(dtype, seed=2)
    for threshold in (0.0, -0.17, 0.3):
        stats = {"groups": 1, "sites": SITES, "threshold": threshold, "moments": True}
        expected = run("reference", gate, up, activation=activation, stats=stats)
        for backend in FUSED:
            assert_same(run(backend, gate, up, activation=activation, stats=stats), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_active_means_torchs_activation_is_positive(dtype: torch.dtype) -> None:
    gate = all_patterns(dtype)
    result = run("reference", gate, gate, stats={"groups": 1, "sites": ("act",)})
    assert result.stats is not None
    assert_same_bits(result.stats.count["act"], (nnf.silu(gate) > 0).long())


FLOATS = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 0.5, 1e30, -1e30]) | st.sampled_from(
    [torch.nan, torch.inf, -torch.inf]
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    n_tokens, width = draw(st.integers(0, 12)), draw(st.sampled_from([1, 2, 31, 33, 64, 70]))
    dtype = draw(st.sampled_from(DTYPES))
    groups, conditions, n_prompts = (draw(st.integers(1, 4)) for _ in range(3))
    seed = draw(st.integers(0, 2**20))

    def matrix(seed: int) -> Tensor:
        layout = draw(st.sampled_from(["plain", "slice", "expanded", "overlapping"]))
        base = normal(n_tokens + 2, width + 40, dtype=dtype, seed=seed)
        for _ in range(draw(st.integers(0, 3))):
            base[draw(st.integers(0, n_tokens + 1)), draw(st.integers(0, width + 39))] = draw(
                FLOATS
            )
        if layout == "plain":
            return base[:n_tokens, :width].contiguous()
        if layout == "expanded":
            return base[:1, 5 : 5 + width].expand(n_tokens, width)
        if layout == "overlapping":
            return (
                base.as_strided((n_tokens, width), (3, 1), 1)
                if n_tokens < 10
                else base[:-2, :width]
            )
        return base[2:, 7 : 7 + width]

    kwargs: dict[str, Any] = {
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "stats": {
            "groups": groups,
            "sites": tuple(draw(st.permutations(SITES))[: draw(st.integers(1, 4))]),
            "moments": draw(st.booleans()),
            "threshold": draw(st.sampled_from([0.0, 0.1, -1e-45, -math.inf, 1e39])),
        },
        "group_ids": integers(-1, groups, n_tokens, seed=seed),
    }
    if draw(st.booleans()):
        kwargs["group_ids"] = kwargs["group_ids"].sort().values
    if draw(st.booleans()):
        kwargs["keep"] = integers(-(2**31), 2**31 - 1, conditions, (width + 31) // 32, seed=seed)
        if draw(st.booleans()):
            kwargs["condition_ids"] = integers(0, conditions, n_tokens, seed=seed + 1)
    if draw(st.booleans()):
        kwargs["response_sites"] = tuple(draw(st.permutations(SITES))[: draw(st.integers(1, 3))])
        kwargs["n_prompts"] = n_prompts
        kwargs["prompt_ids"] = integers(-1, n_prompts, n_tokens, seed=seed + 2)
    return matrix(seed + 3), matrix(seed + 4), kwargs


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(calls())
def test_random_calls_agree(call: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    gate, up, kwargs = call
    expected = run("reference", gate, up, **kwargs)
    ids = kwargs["group_ids"]
    oracle(expected, gate, up, ids, kwargs["activation"])
    for backend in FUSED:
        result = run(backend, gate, up, **kwargs)
        assert_same(result, expected)
        assert_same(run(backend, gate, up, only_stats=True, **kwargs), result, exact_sums=True)


@settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(calls())
def test_random_calls_agree_on_a_cpu(call: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    gate, up, kwargs = call
    expected = run("reference", gate, up, **kwargs)
    results = [run(f"cpu-{isa}", gate, up, **kwargs) for isa in ISAS]
    for result in results:
        assert_same(result, expected)
        assert_same(result, results[0], exact_sums=True)
        assert_same_bits(result.h, results[0].h, "h of two instruction sets")
    only = run("reference", gate, up, only_stats=True, **kwargs)
    assert_same(only, expected, exact_sums=True)
    for isa in ISAS:
        only = run(f"cpu-{isa}", gate, up, only_stats=True, **kwargs)
        assert_same(only, results[0], exact_sums=True)


# --------------------------------------------------------------------------------------------------
# Properties


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_worked_example_of_counts_and_moments(backend: str) -> None:
    gate = torch.tensor([[1, -1, 0, 2], [0.5, 3, -2, -0.1], [-4, 0.2, 1, 0]])
    expected = {
        "sum": [0.9703434, 2.6987478, 0.4926527, 1.7140921],
        "sum_sq": [0.6364866, 8.2509994, 0.5912840, 3.1054704],
        "max": [0.7310586, 2.8577224, 0.7310586, 1.7615942],
    }
    asked = {"groups": 1, "sites": ("act",), "moments": True}
    found = run(backend, gate, torch.ones_like(gate), stats=asked).stats
    assert found is not None and found.count["act"].tolist() == [[2, 2, 1, 1]]
    for name, values in expected.items():
        got = getattr(found, name)["act"][0].double().tolist()
        assert got == pytest.approx(values, rel=2e-7), name
    # A neuron whose gate is zeroed is never active.
    gate[:, 1] = 0
    found = run(backend, gate, torch.ones_like(gate), stats=asked).stats
    assert found is not None and found.count["act"].tolist() == [[2, 0, 1, 1]]
    assert float(found.sum["act"][0, 1]) == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
def test_small_gates_are_active_as_their_act_is(isa: str, activation: str) -> None:
    near_zero = torch.arange(-70, 70, dtype=torch.int32)  # patterns of 0, subnormals, NaN
    near_normal = torch.arange(0x007FFFF0, 0x00800010, dtype=torch.int32)
    bits = torch.cat([near_zero, near_zero ^ -(2**31), near_normal, near_normal ^ -(2**31)])
    special = torch.tensor([math.inf, -math.inf, math.nan, 1.0, -1.0])
    gate = torch.cat([bits.view(torch.float32), special]).unsqueeze(0).repeat(3, 1)
    stats = {"groups": 1, "sites": ("act",)}
    call: dict[str, Any] = {"activation": activation, "stats": stats, "only_stats": True}
    up = torch.ones_like(gate)
    assert_same(run(f"cpu-{isa}", gate, up, **call), run("reference", gate, up, **call))


def busy(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A case with three groups and all statistics."""
    gate, up = normal(24, 70, dtype=dtype, seed=7), normal(24, 70, dtype=dtype, seed=8)
    kwargs: dict[str, Any] = {
        "stats": {"groups": 3, "sites": SITES, "moments": True},
        "group_ids": integers(-1, 3, 24, seed=9),
    }
    return gate, up, kwargs


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_halves_merge(backend: str) -> None:
    gate, up, kwargs = busy()
    ids = kwargs.pop("group_ids")
    whole = run(backend, gate, up, group_ids=ids, **kwargs)
    first = run(backend, gate[:11], up[:11], group_ids=ids[:11], **kwargs)
    second = run(backend, gate[11:], up[11:], group_ids=ids[11:], **kwargs)
    assert whole.stats is not None and first.stats is not None and second.stats is not None
    merged = first.stats + second.stats
    assert_same_stats(merged, whole.stats, exact_sums=False)
    assert_same_bits(torch.cat([first.h, second.h]), whole.h, "h")


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_tokens_does_not_matter(backend: str) -> None:
    gate, up, kwargs = busy()
    ids = kwargs.pop("group_ids")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    one = run(backend, gate, up, group_ids=ids, **kwargs)
    other = run(backend, gate[order], up[order], group_ids=ids[order], **kwargs)
    assert one.stats is not None and other.stats is not None
    assert_same_stats(other.stats, one.stats, exact_sums=False)
    assert_same_bits(other.h, one.h[order], "h")


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal(backend: str) -> None:
    gate, up, kwargs = case("strided", torch.float32)
    one, two = run(backend, gate, up, **kwargs), run(backend, gate, up, **kwargs)
    assert_same(one, two, exact_sums=True)
    assert_same_bits(one.h, two.h)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_a_bit(isa: str) -> None:
    gate, up = (
        normal(130, 1500, dtype=torch.float32),
        normal(130, 1500, dtype=torch.float32, seed=1),
    )
    kwargs: dict[str, Any] = {
        "stats": {"groups": 3, "sites": SITES, "moments": True},
        "group_ids": integers(-1, 3, 130),
        "response_sites": SITES,
        "n_prompts": 5,
        "prompt_ids": integers(-1, 5, 130),
    }
    one = run(f"cpu-{isa}", gate, up, n_threads=1, **kwargs)
    for n_threads in (2, 3, 7):
        other = run(f"cpu-{isa}", gate, up, n_threads=n_threads, **kwargs)
        assert_same(other, one, exact_sums=True)
        assert_same_bits(other.h, one.h)


@pytest.mark.parametrize("isa", ISAS)
def test_many_groups_in_few_slots(isa: str) -> None:
    """More groups than the kernel keeps in cache at a time: a group lies in many segments."""
    gate, up = normal(900, 70, dtype=torch.float16), normal(900, 70, dtype=torch.float16, seed=1)
    kwargs: dict[str, Any] = {
        "stats": {"groups": 300, "sites": SITES, "moments": True, "threshold": 0.2},
        "group_ids": integers(-1, 300, 900, seed=2),
    }
    one = run(f"cpu-{isa}", gate, up, **kwargs)
    assert_same(one, run("reference", gate, up, **kwargs))
    assert_same(run(f"cpu-{isa}", gate, up, n_threads=2, **kwargs), one, exact_sums=True)
    assert_same(one, run(f"cpu-{ISAS[0]}", gate, up, **kwargs), exact_sums=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recording_happens_before_masking(backend: str) -> None:
    gate, up, kwargs = busy()
    keep = torch.zeros(1, 3, dtype=torch.int32)
    masked, free = run(backend, gate, up, keep=keep, **kwargs), run(backend, gate, up, **kwargs)
    assert_same(masked, free, exact_sums=True)
    assert_same_bits(masked.h, torch.zeros_like(gate))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_neurons_are_plus_zero_whatever_their_value(backend: str) -> None:
    gate = torch.tensor([[torch.nan, torch.inf, -1.0, 1.0]])
    up = torch.tensor([[1.0, torch.inf, 1.0, -torch.inf]])
    h = run(backend, gate, up, keep=torch.zeros(1, 1, dtype=torch.int32)).h
    assert_same_bits(h, torch.zeros(1, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_accumulate_and_counters_are_64_bit(backend: str) -> None:
    gate = torch.ones(7, 3)
    device = device_of(backend)
    stats = GroupStats(groups=1, width=3, moments=True, device=device)
    stats.count["act"].fill_(2**31 - 3)
    stats.tokens.fill_(2**53)
    stats.n_nonfinite["act"].fill_(2**53)
    name = backend.partition("-")[0]
    swiglu_stats(gate.to(device), gate.to(device), stats=stats, backend=name)
    swiglu_stats(gate.to(device) * torch.nan, gate.to(device), stats=stats, backend=name)
    assert stats.count["act"].tolist() == [[2**31 + 4] * 3]
    assert stats.tokens.tolist() == [2**53 + 14]
    assert stats.n_nonfinite["act"].tolist() == [[2**53 + 7] * 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_infinity_and_zero(backend: str) -> None:
    nan, inf = torch.nan, torch.inf
    gate = torch.tensor([[nan, inf, -inf, -0.0], [1.0, 2.0, 3.0, 0.0], [0.5, -inf, 1.0, -0.0]])
    stats = {"groups": 1, "sites": ("gate",), "moments": True}
    result = run(backend, gate, gate, stats=stats).stats
    assert result is not None
    assert result.count["gate"].tolist() == [[2, 2, 2, 0]]
    assert result.n_nonfinite["gate"].tolist() == [[1, 2, 1, 0]]
    assert result.sum["gate"].tolist() == [[1.5, 2.0, 4.0, 0.0]]
    assert result.sum_sq["gate"].tolist() == [[1.25, 4.0, 10.0, 0.0]]
    assert_same_bits(result.max["gate"], torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
    nothing = run(backend, gate[:1] * nan, gate[:1], stats=stats).stats
    assert nothing is not None and nothing.max["gate"].tolist() == [[-inf] * 4]


@pytest.mark.parametrize("backend", [b for b in BACKENDS if device_of(b) == "cpu"])
def test_flush_to_zero_changes_nothing(backend: str) -> None:
    gate, up = all_patterns(torch.float32), all_patterns(torch.float32, seed=1)
    kwargs: dict[str, Any] = {
        "stats": {"groups": 1, "sites": SITES, "moments": True, "threshold": 1e-42},
    }
    expected = run(backend, gate, up, **kwargs)
    n_threads = torch.get_num_threads()
    assert torch.set_flush_denormal(True)
    try:
        flushed = run(backend, gate, up, **kwargs)
        assert torch.get_num_threads() == n_threads
        assert float(torch.tensor(1e-38) * 0.1) == 0.0, "the caller's mode must come back"
    finally:
        torch.set_flush_denormal(False)
    assert_same(flushed, expected, exact_sums=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_past_two_to_the_31(backend: str) -> None:
    device, stride = device_of(backend), 2**31 + 64

    def far_rows() -> Tensor:
        # Only the pages that are touched take memory on a CPU.
        storage = torch.empty(stride + 70, dtype=torch.bfloat16, device=device)
        return storage.as_strided((2, 70), (stride, 1))

    try:
        gate, out = far_rows(), far_rows()
    except RuntimeError:
        pytest.skip("2 x 4 GiB of address space are not to be had")
    values = normal(2, 70, dtype=torch.bfloat16)
    gate.copy_(values)
    stats = GroupStats(groups=2, width=70, moments=True, device=device)
    ids = torch.tensor([0, 1], dtype=torch.int32, device=device)
    prompts = {"gate": torch.zeros(2, 70, device=device)}
    swiglu_stats(
        gate,
        values.to(device),
        stats=stats,
        group_ids=ids,
        responses=prompts,
        prompt_ids=ids,
        out=out,
        backend=backend.partition("-")[0],
    )
    assert_same_bits(out.cpu(), nnf.silu(values) * values)
    assert_same_bits(prompts["gate"].cpu(), values.float())
    assert_same_bits(stats.count["act"].cpu(), (values > 0).long())


# --------------------------------------------------------------------------------------------------
# GroupStats


def test_group_stats_merge_and_move() -> None:
    stats = GroupStats(groups=2, width=3, sites=("gate", "up"), moments=True)
    assert stats.max["up"].tolist() == [[-math.inf] * 3] * 2
    stats.count["up"][1, 2] += 5
    assert stats._count[1, 1, 2] == 5, "count[site] is a view"
    copy = stats.to("cpu")
    copy.count["up"].zero_()
    assert stats.count["up"][1, 2] == 5, "to() copies"
    assert (stats + stats).count["up"][1, 2] == 10
    assert stats.count["up"][1, 2] == 5, "+ leaves its operands alone"
    assert GroupStats(groups=1, width=1).sum == {}
    assert "groups=2, width=3, sites=('gate', 'up')" in repr(stats)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 3},
        {"width": 4},
        {"sites": ("up",)},
        {"threshold": 0.5},
        {"moments": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_group_stats_refuse_to_merge_different_ones(change: dict[str, Any]) -> None:
    base: dict[str, Any] = {"groups": 2, "width": 3}
    with pytest.raises(ValueError, match=f"GroupStats: {next(iter(change))} must be equal"):
        GroupStats(**base) + GroupStats(**{**base, **change})
    with pytest.raises(TypeError):
        GroupStats(**base) + 1  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"groups": 0, "width": 1}, "groups must be at least 1, got 0"),
        ({"groups": 1, "width": -1}, "width must be at least 0, got -1"),
        ({"groups": 1, "width": 1, "sites": ()}, "sites must be one or more"),
        ({"groups": 1, "width": 1, "sites": ("act", "act")}, "sites must be one or more"),
        ({"groups": 1, "width": 1, "sites": ("head",)}, "sites must be one or more"),
        ({"groups": 1, "width": 1, "threshold": math.nan}, "threshold must be a number"),
    ],
)
def test_group_stats_errors(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GroupStats(**kwargs)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.floats(allow_nan=False) | st.floats(width=32, allow_nan=False))
def test_threshold_is_the_largest_float32_below(threshold: float) -> None:
    bits = GroupStats(groups=1, width=1, threshold=threshold)._threshold_bits
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    above = torch.nextafter(value, torch.tensor(torch.inf))
    assert float(value) <= threshold
    assert float(above) > threshold or threshold == math.inf


# --------------------------------------------------------------------------------------------------
# Errors


def good_call() -> dict[str, Any]:
    return {
        "gate": torch.zeros(6, 40),
        "up": torch.zeros(6, 40),
        "stats": GroupStats(groups=2, width=40),
        "group_ids": torch.zeros(6, dtype=torch.int32),
        "responses": {"gate": torch.zeros(3, 40)},
        "prompt_ids": torch.zeros(6, dtype=torch.int32),
        "keep": torch.zeros(2, 2, dtype=torch.int32),
        "condition_ids": torch.zeros(6, dtype=torch.int32),
    }


def ids(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


PACKED = torch.zeros(6, 80)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"gate": 3}, "gate and up must be tensors, got int and Tensor"),
    ({"gate": torch.zeros(6, 40, dtype=torch.float64)}, "gate must be .*got .6, 40. float64"),
    ({"gate": torch.zeros(2, 3, 40)}, "gate must be .T, F. .*got .2, 3, 40. float32"),
    (
        {"up": torch.zeros(5, 40)},
        "up must be .T, F. float32 with T=6, F=40 .from gate., got .5, 40",
    ),
    ({"up": torch.zeros(6, 40).bfloat16()}, "up must be .*float32.*got .6, 40. bfloat16"),
    ({"up": torch.zeros(6, 40, device="meta")}, "up must be on cpu .from gate., got meta"),
    ({"up": torch.zeros(40, 6).T}, r"up must be .* last stride 1.* with strides \(1, 6\)"),
    ({"up": torch.zeros(6, 80)[:, ::2]}, "up must be .* last stride 1"),
    ({"gate": torch.zeros(40, 6).T}, "gate must be .* last stride 1"),
    ({"activation": "swish"}, "activation must be one of .*got 'swish'"),
    ({"backend": "cuda"}, "backend must be one of .*got 'cuda'"),
    ({"stats": None}, "group_ids must come with stats"),
    ({"stats": GroupStats(groups=2, width=41)}, "stats must have width F=40 .*got width 41"),
    (
        {"stats": GroupStats(groups=2, width=40, sites=("down",))},
        "stats must have sites among .*got ..down.,.",
    ),
    ({"group_ids": None}, "group_ids must be .T,. int32 with T=6 .*G=2 groups, got None"),
    ({"group_ids": ids(0, 0, 0, 0, 0)}, r"group_ids must be .*T=6 .from gate., got \(5,\) int32"),
    ({"group_ids": ids(*[0] * 6, dtype=torch.int64)}, r"group_ids must be .*got \(6,\) int64"),
    ({"group_ids": ids(*[0] * 12)[::2]}, "group_ids must be .*stride 1"),
    ({"group_ids": ids(0, 0, 2, 0, 0, -5)}, r"group_ids must be in \[-1, 2\).*got 2 at token 2"),
    ({"group_ids": ids(0, -2, 0, 0, 0, 0)}, "group_ids must be .*got -2 at token 1"),
    ({"prompt_ids": ids(0, 0, 0, 0, 0, 3)}, r"in \[-1, 3\) .N=3 from responses., got 3 at token 5"),
    ({"condition_ids": ids(0, 0, -1, 0, 0, 0)}, r"in \[0, 2\) .C=2 from keep., got -1 at token 2"),
    ({"condition_ids": ids(0, 2, 0, 0, 0, 0)}, "condition_ids must be in .*got 2 at token 1"),
    ({"prompt_ids": None}, "responses and prompt_ids must come together"),
    ({"responses": None}, "responses and prompt_ids must come together"),
    ({"responses": {"down": torch.zeros(3, 40)}}, "responses must have keys among"),
    ({"responses": {"gate": torch.zeros(3, 41)}}, r"responses\['gate'\] must be .N, F. .*F=40"),
    ({"responses": {"gate": torch.zeros(3)}}, r"responses\['gate'\] must be .N, F."),
    (
        {"responses": {"gate": torch.zeros(3, 40), "up": torch.zeros(4, 40)}},
        r"responses\['up'\] must be .*N=3",
    ),
    ({"responses": {"up": torch.zeros(1, 40).expand(3, 40)}}, "rows that do not overlap"),
    ({"keep": torch.zeros(2, 1, dtype=torch.int32)}, r"keep must be .*ceil\(F/32\)=2 .*got .2, 1"),
    ({"keep": torch.zeros(0, 2, dtype=torch.int32)}, "keep must be .*C >= 1"),
    ({"keep": torch.zeros(2, 2, dtype=torch.int64)}, "keep must be .*int32.*got .2, 2. int64"),
    ({"keep": torch.zeros(2, 2, dtype=torch.int32).T}, "keep must be contiguous"),
    ({"keep": None}, "condition_ids must come with keep"),
    ({"out": torch.zeros(6, 41)}, "out must be .*T=6, F=40"),
    ({"out": torch.zeros(1, 40).expand(6, 40)}, "out must be .*rows that do not overlap"),
    (
        {"gate": PACKED[:, :40], "up": PACKED[:, 40:], "out": PACKED[:, :40]},
        "out must not share memory with gate",
    ),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("change", "match"), ERRORS, ids=[e[1][:40] for e in ERRORS])
def test_errors(change: dict[str, Any], match: str, backend: str) -> None:
    kwargs = {"backend": backend, **good_call(), **change}
    gate, up = kwargs.pop("gate"), kwargs.pop("up")
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        swiglu_stats(gate, up, **kwargs)
    assert str(caught.value).startswith("swiglu_stats: ")
    # Nothing has been written.
    if kwargs["stats"] is not None:
        assert int(kwargs["stats"].tokens.sum()) == 0


def test_the_good_call_works_and_packed_halves_need_no_copy() -> None:
    kwargs = good_call()
    kwargs["gate"], kwargs["up"] = PACKED[:, :40], PACKED[:, 40:]
    swiglu_stats(kwargs.pop("gate"), kwargs.pop("up"), **kwargs)
    assert kwargs["stats"].tokens.tolist() == [6, 0]


def test_checked_ids_are_not_looked_at() -> None:
    with mock.patch.object(op, "_check_ids_range", side_effect=AssertionError("looked")):
        kwargs = good_call()
        swiglu_stats(kwargs.pop("gate"), kwargs.pop("up"), ids_checked=True, **kwargs)


def test_gradients_are_refused_with_the_fix() -> None:
    gate = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"gate\.detach\(\).*torch\.no_grad\(\)"):
        swiglu_stats(gate, gate.detach())
    with torch.no_grad():
        swiglu_stats(gate, gate)
    with torch.inference_mode():
        stats = GroupStats(groups=1, width=3)
        swiglu_stats(gate, gate, stats=stats)


# --------------------------------------------------------------------------------------------------
# Instruction sets


@pytest.mark.skipif(not ISAS, reason=STATUS["cpu"].detail)
def test_unknown_isa_is_refused() -> None:
    with pytest.raises(ValueError, match=r"isa must be one of isa_levels\(\), got mmx"):
        run("cpu-mmx", torch.zeros(2, 3), torch.zeros(2, 3))


# --------------------------------------------------------------------------------------------------
# torch.compile and the registration


def op_args(backend: str) -> tuple[Any, ...]:
    device = device_of(backend)
    gate, up = normal(6, 40, dtype=torch.bfloat16), normal(6, 40, dtype=torch.bfloat16, seed=1)
    stats = GroupStats(groups=2, width=40, sites=("gate", "act"), moments=True, device=device)
    return (
        gate.to(device),
        up.to(device),
        torch.empty_like(gate, device=device),
        "silu",
        "gate,act",
        0,
        stats._count,
        stats.tokens,
        stats._sum,
        stats._sum_sq,
        stats._max,
        stats._n_nonfinite,
        integers(-1, 2, 6).to(device),
        "gate,up",
        [torch.zeros(3, 40, device=device), torch.zeros(3, 40, device=device)],
        integers(-1, 3, 6).to(device),
        integers(-9, 9, 2, 2).to(device),
        integers(0, 2, 6).to(device),
        False,
        backend.partition("-")[0],
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck(backend: str) -> None:
    torch.library.opcheck(op._swiglu_stats_op, op_args(backend))
    plain = (*op_args(backend)[:6], *[None] * 7, "", [], None, None, None, False, backend)
    torch.library.opcheck(op._swiglu_stats_op, plain)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_gives_the_same(dynamic: bool) -> None:
    gate, up, kwargs = busy()
    ids = kwargs["group_ids"]
    keep = integers(-(2**31), 2**31 - 1, 1, 3)

    def mlp(
        gate: Tensor, up: Tensor, ids: Tensor, stats: GroupStats, responses: dict[str, Tensor]
    ) -> Tensor:
        h = swiglu_stats(
            gate * 2, up, stats=stats, group_ids=ids, keep=keep, responses=responses, prompt_ids=ids
        )
        return h + 1

    def fresh() -> tuple[GroupStats, dict[str, Tensor]]:
        return GroupStats(width=70, **kwargs["stats"]), {"up": torch.zeros(3, 70)}

    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    (stats, responses), (expected_stats, expected_responses) = fresh(), fresh()
    for n_tokens in (24, 13):
        part = (gate[:n_tokens], up[:n_tokens], ids[:n_tokens])
        h = compiled(*part, stats, responses)
        assert_same_bits(h, mlp(*part, expected_stats, expected_responses))
    assert_same_stats(stats, expected_stats)
    assert_same_bits(responses["up"], expected_responses["up"])
    with pytest.raises(ValueError, match="group_ids must be in"):
        compiled(gate, up, ids + 2, stats, responses)
