"""Calls of a few tokens on a CPU: the quick way runs what is plainly right, and counts directly.

What it must leave alone has its messages in test_tensors.py and test_arguments.py, through
the same public function.
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from relneuron.ops import GroupStats, available_backends, swiglu_stats, swiglu_stats_only
from relneuron.ops.backends import cpu_module

op: Any = importlib.import_module("relneuron.ops.swiglu_stats.op")
STATUS = available_backends()["cpu"]
pytestmark = pytest.mark.skipif(not STATUS.works, reason=STATUS.detail)
ISAS = cpu_module().isa_levels() if STATUS.works else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def ids(n: int, size: int, low: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(n + size)
    return torch.randint(low, size, (n,), generator=generator, dtype=torch.int32)


def options(T: int, F: int) -> dict[str, dict[str, Any]]:
    """Calls by what they ask for; each time with statistics and responses of its own."""
    stats = GroupStats(groups=3, width=F, sites=("act", "product"), moments=True)
    rows = {"gate": torch.zeros(2, F), "product": torch.zeros(2, 2 * F)[:, :F]}
    keep = torch.randint(-(2**31), 2**31, (2, (F + 31) // 32)).int()
    return {
        "h": {},
        "one group": {"stats": GroupStats(groups=1, width=F)},
        "groups": {"stats": GroupStats(groups=12, width=F), "group_ids": ids(T, 12, -1)},
        "moments": {"stats": stats, "group_ids": ids(T, 3)},
        "responses": {"responses": rows, "prompt_ids": ids(T, 2, -1)},
        "keep": {"keep": keep},
        "conditions": {"keep": keep, "condition_ids": ids(T, 2)},
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", options(1, 1))
@pytest.mark.parametrize("packed", [False, True])
def test_a_plain_call_is_quick(name: str, dtype: torch.dtype, packed: bool) -> None:
    T, F = 5, 100
    both = drawn(T, 2 * F, dtype=dtype)
    gate, up = (both[:, :F], both[:, F:]) if packed else (both[:, :F].clone(), both[:, F:].clone())
    ours, theirs = options(T, F)[name], options(T, F)[name]
    if "keep" in ours:
        theirs["keep"] = ours["keep"]
    slow = mock.patch.object(op, "_swiglu_stats_op", side_effect=AssertionError("the slow way"))
    with slow:
        h = swiglu_stats(gate, up, **ours)
    with mock.patch.object(op, "ran_quickly", return_value=False):
        assert torch.equal(h, swiglu_stats(gate, up, **theirs))
    assert h.is_contiguous()
    if "stats" in ours:
        for key, value in ours["stats"].tensors("").items():
            assert torch.equal(value, theirs["stats"].tensors("")[key]), key
    for site, sums in ours.get("responses", {}).items():
        assert torch.equal(sums, theirs["responses"][site])
    recorded = {k: v for k, v in ours.items() if k not in ("keep", "condition_ids")}
    with slow:
        swiglu_stats_only(gate, up, **recorded)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_a_group_are_counted_directly(dtype: torch.dtype, isa: str) -> None:
    """Rows counted without slots, beside those that are not; columns that fill no block."""
    shapes = itertools.product((1, 2, 3, 8, 40), (1, 12), (1, 31, 33, 64, 333), (-0.5, 0.0, 0.25))
    for T, G, F, threshold in shapes:
        gate, up = drawn(T, F, dtype=dtype), drawn(F, T, dtype=dtype).T.contiguous()
        for sites in (("act",), ("gate", "up", "act", "product")):
            found = []
            for backend in ("reference", "cpu"):
                stats = GroupStats(groups=G, width=F, sites=sites, threshold=threshold)
                kernel = op.swiglu_stats_cpu
                with (
                    mock.patch.object(op, "ran_quickly", return_value=False),
                    mock.patch.object(op, "swiglu_stats_cpu", lambda c, k=kernel: k(c, isa, 2)),
                ):
                    call = {"group_ids": ids(T, G, -1), "backend": backend}
                    swiglu_stats_only(gate, up, stats=stats, **call)
                found.append(stats)
            assert torch.equal(found[0].tokens, found[1].tokens)
            for site in sites:
                assert torch.equal(found[0].count[site], found[1].count[site]), (T, G, F, site)


def test_those_who_look_on_see_the_op() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    gate = drawn(2, 40)
    with Seen():
        swiglu_stats(gate, gate.clone())
    assert "relneuron.swiglu_stats.default" in names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        swiglu_stats(gate, gate.clone())
    assert any(event.name == "relneuron::swiglu_stats" for event in profile.events())


def test_a_lazy_copy_is_written_alone() -> None:
    """A copy that shares memory until one of the two is written to is no alias."""
    gate, first = drawn(2, 40), torch.zeros(2, 40)
    out = torch._lazy_clone(first)
    h = swiglu_stats(gate, gate, out=out)
    assert torch.equal(first, torch.zeros(2, 40)) and torch.equal(out, h)
    assert torch.equal(h, swiglu_stats(gate, gate))
