"""`torch.set_default_device` decides about tensors that a user makes, and about nothing of ours."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from relneuron import ops
from relneuron.ops.swiglu_stats.cpu_launch import is_eager
from tests.conftest import ROOT
from tests.kit.interpreter import IS_INTERPRETED, quiet

STATUS = ops.available_backends()
BACKENDS = [name for name, status in STATUS.items() if status.works]
# Rooms whose tensors are those of a process of its own.
OWN_PROCESSES = ("testing", "bench", "demo")


def calls(backend: str) -> dict[str, Callable[[], Any]]:
    """Of every op, made from tensors that are there already."""
    on = "cuda" if backend == "triton" and not IS_INTERPRETED else "cpu"
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(on)

    gate, up = normal(5, 16), normal(5, 16)
    ids = torch.tensor([0, 1, -1, 0, 1], dtype=torch.int32, device=on)
    keep = torch.tensor([[3]], dtype=torch.int32, device=on)
    stats = [ops.GroupStats(groups=2, width=16, moments=True, device=on) for _ in range(2)]
    down = ops.GroupStats(groups=2, width=16, sites=("down",), device=on)
    sums = {"up": torch.zeros(2, 16, device=on)}
    labels = torch.tensor([[1, 0, 1, 0, -1]], dtype=torch.int8)
    x, values, unembed, c = normal(2, 8), normal(4, 8), normal(20, 8), normal(2, 4)
    gain = (x, values, c, unembed, torch.ones(2, device=on), torch.tensor([1, 2], device=on))

    def counted() -> Any:
        own = stats[0]
        own.tokens.zero_(), own._count.zero_(), sums["up"].zero_()
        recorded = {"group_ids": ids, "responses": sums, "prompt_ids": ids}
        h = ops.swiglu_stats(gate, up, stats=own, keep=keep, backend=backend, **recorded)
        ops.swiglu_stats_only(gate, up, stats=own, group_ids=ids, backend=backend)
        return h, own.count["act"].clone(), own.tokens.clone(), sums["up"].clone()

    def residual() -> Any:
        return ops.residual_stats(gate, up, stats=down, group_ids=ids, backend=backend)

    def compared() -> Any:
        own = ops.GroupStats(
            groups=2, width=16, sites=ops.PAIR_SITES, moments=True, device=gate.device
        )
        ops.pair_stats(gate, up, stats=own, group_ids=ids, backend=backend)
        return own._tensors()

    def vectors() -> Any:
        return ops.logprob_gain_vectors(x, values.reshape(2, 2, 8), *gain[3:], backend=backend)

    return {
        "swiglu_stats": counted,
        "residual_stats": residual,
        "pair_stats": compared,
        "merged": lambda: (stats[0] + stats[1]).to("cpu").count["act"],
        "average_precision": lambda: ops.average_precision(up, labels, backend=backend),
        "no columns": lambda: ops.average_precision(up[:, :0], labels, backend=backend),
        "exact": lambda: ops.logprob_gain(*gain, backend=backend),
        "certified": lambda: ops.logprob_gain(*gain, mode="certified", backend=backend),
        "tilted": lambda: ops.logprob_gain(*gain, scale_after=c.abs() + 1, backend=backend),
        "top": lambda: ops.logprob_gain(*gain, mode="top", top=3, backend=backend),
        "vectors": vectors,
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.device == b.device and torch.equal(a, b)
    return all(same(x, y) for x, y in zip(a, b, strict=True))


@quiet
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", calls("reference"))
def test_an_op_gives_the_same_under_any_default_device(backend: str, name: str) -> None:
    call = calls(backend)[name]
    expected = call()
    with torch.device("meta"):
        found = call()
    assert same(found, expected)


def test_the_quick_way_is_open_under_a_default_device() -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        pass

    assert is_eager()
    with torch.device("cpu"):
        assert is_eager()
        with Mode():
            assert not is_eager()
    with Mode():
        assert not is_eager()


MAKERS = {
    *("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"),
    *("as_tensor", "asarray", "empty_strided", "randperm", "scalar_tensor", "tensor", "zeros"),
}
# Tensors for torch.distributed, whose backend decides where they may be.
EXCEPT = {"relneuron/model/ranks.py"}


def makers_without_device(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            is_maker = isinstance(owner, ast.Name) and owner.id == "torch"
            names = {keyword.arg for keyword in node.keywords}
            if is_maker and node.func.attr in MAKERS and not names & {"device", None}:
                found.append(f"{path}:{node.lineno}: torch.{node.func.attr}")
    return found


def test_every_tensor_that_is_made_says_where() -> None:
    folder = ROOT / "relneuron"
    paths = [p for p in folder.rglob("*.py") if p.parent.name not in OWN_PROCESSES]
    paths = [p for p in paths if p.relative_to(ROOT).as_posix() not in EXCEPT]
    assert len(paths) > 80
    assert not [line for path in paths for line in makers_without_device(path)]
    assert len(makers_without_device(ROOT / "relneuron/testing/oracle.py")) > 5
