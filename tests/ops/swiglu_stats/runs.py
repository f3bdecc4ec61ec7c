"""Runs any backend of swiglu_stats on copies of a call, and compares what two of them gave."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from relneuron.ops import GroupStats, available_backends, backends, swiglu_stats, swiglu_stats_only
from relneuron.ops.swiglu_stats import reference
from relneuron.testing import assert_same_bits
from tests.kit.interpreter import IS_INTERPRETED

op = sys.modules["relneuron.ops.swiglu_stats.op"]
STATUS = available_backends()
ISAS = backends.cpu_module().isa_levels() if STATUS["cpu"].works else []
FUSED = [*(f"cpu-{isa}" for isa in ISAS), *(["triton"] if STATUS["triton"].works else [])]
BACKENDS = ["reference", *FUSED]


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
    def of(
        gate: Tensor, up: Tensor | None, kwargs: dict[str, Any], n_prompts: int
    ) -> TritonTolerance:
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


def tiles(dtype: torch.dtype, tile_t: int, block_t: int, block_f: int) -> Any:
    """A launch of programs of `tile_t` tokens in steps of block_t x block_f."""
    config = backends.triton_module("swiglu_stats").LaunchConfig
    return config(tile_t, block_t, block_f * dtype.itemsize, 4, block_t, block_f)


def interpreted_with(gate: Tensor, launch: Any) -> contextlib.AbstractContextManager[Any]:
    """The interpreter takes time per program and step: one big tile if `launch` is None."""
    if launch is None:
        block_t, block_f = (max(1, 1 << (n - 1).bit_length()) for n in gate.shape)
        launch = tiles(gate.dtype, min(block_t, 64), min(block_t, 64), max(block_f, 8))
    module = backends.triton_module("swiglu_stats")
    return mock.patch.object(module, "INTERPRETER_LAUNCH", launch)


def run(
    backend: str,
    gate: Tensor,
    up: Tensor | None,
    *,
    stats: dict[str, Any] | None = None,
    response_sites: tuple[str, ...] = (),
    n_prompts: int = 0,
    n_threads: int | None = None,
    launch: Any = None,
    only_stats: bool = False,
    **kwargs: Any,
) -> Result:
    """Run one backend ("cpu-avx2" forces an instruction set); everything comes back on the CPU.

    With `only_stats` it is swiglu_stats_only that runs, without masks; h stays a sentinel.

    `launch` is the interpreter's LaunchConfig, see `interpreted_with`.
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
    forced = functools.partial(op.swiglu_stats_cpu, isa=isa, n_threads=n_threads or 1)
    with (
        mock.patch.object(op, "swiglu_stats_cpu", forced),
        mock.patch.object(op, "ran_quickly", return_value=False),
        interpreted_with(gate, launch) if name == "triton" else contextlib.nullcontext(),
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
