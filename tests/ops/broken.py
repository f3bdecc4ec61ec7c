"""Runs the ops where Triton cannot launch, in one of SETTINGS; test_fallbacks.py runs this file.

No GPU is needed: CPU tensors stand for a GPU's, and what Triton fails at is what it does before a
launch, for real: finding a driver, building its stub in C, writing its cache, compiling. Prints
what the ops gave and said as JSON.
"""

# mypy: ignore-errors

from __future__ import annotations

import json
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import build, driver

from bench.host import Driver
from relneuron import ops
from relneuron.cli.doctor import machine_report
from relneuron.model import load
from relneuron.ops import backends
from relneuron.ops.swiglu_stats.reference import Call, swiglu_stats_reference

# Setting -> the compute capability of the GPU that torch sees, and what of Triton's is real.
SETTINGS = {
    "no C compiler": (9, 0),
    "no such C compiler": (9, 0),
    "no cache folder": (9, 0),
    "no driver": (9, 0),
    "an old GPU": (3, 5),
    "bfloat16 on sm_75": (7, 5),
    "none": (9, 0),
}


class BuildingDriver(Driver):
    """Builds a module in C when it is made, as the driver for NVIDIA's GPUs does."""

    def __init__(self) -> None:
        super().__init__()
        build.compile_module_from_src("#include <Python.h>\nint unused;\n", "stub")


def launch(*given: object) -> None:
    """What the main kernel computes of a call without moments, by the reference."""
    h, count, tokens, _, _, _, gate, up, group_ids, keep, condition_ids, *_ = given[9:]
    keep = None if keep is None else keep.view(torch.int32)
    nothing = {"sum": None, "sum_sq": None, "max": None, "n_nonfinite": None, "prompt_ids": None}
    counters = {"count": count, "tokens": tokens, "group_ids": group_ids, **nothing}
    masks = {"keep": keep, "condition_ids": condition_ids}
    sites = () if count is None else ("act",)
    call = Call(gate, up, h, "silu", sites, 0, responses={}, **counters, **masks)
    swiglu_stats_reference(call)


def set_up(setting: str) -> None:
    capability = SETTINGS[setting]
    if "compiler" in setting:
        backend = triton.backends.backends["nvidia"]
        triton.backends.backends["nvidia"] = type(backend)(backend.compiler, BuildingDriver)
    elif setting != "no driver":
        active = Driver(10 * capability[0] + capability[1])
        driver.set_active(active)

        def init_handles(self) -> None:
            self.function, self._run = 1, launch

        CompiledKernel._init_handles = init_handles
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_name = lambda *_: "a GPU"
    torch.cuda.get_device_capability = lambda *_: capability
    backends._current_gpu = lambda: torch.device("cpu")
    backends.MADE_FOR["cpu"] = "triton"
    sys.modules["relneuron.ops.swiglu_stats.op"].ran_quickly = lambda *_: False


def results(dtype: torch.dtype, backend: str, is_broken: bool) -> list[torch.Tensor]:
    """Of the ops, twice; where launches work, of those that have a stand-in for the kernel."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gate, up = normal(5, 32).to(dtype), normal(5, 32).to(dtype)
    stats = ops.GroupStats(groups=2, width=32)
    given = {"group_ids": torch.tensor([0, 1, -1, 0, 1], dtype=torch.int32), "backend": backend}
    found = []
    for _ in range(2):
        found.append(ops.swiglu_stats(gate, up, stats=stats, **given))
    found += [stats._count, stats.tokens]
    if not is_broken:
        return found
    down = ops.GroupStats(groups=2, width=32, sites=("down",))
    found += [ops.residual_stats(gate, up, stats=down, **given), down._count]
    both = ops.GroupStats(groups=2, width=32, sites=ops.PAIR_SITES)
    ops.pair_stats(gate, up, stats=both, **given)
    found.append(both._count)
    labels = torch.tensor([[1, 0, 0, 1, -1]], dtype=torch.int8)
    for _ in range(2):
        found.append(ops.average_precision(up, labels, backend=backend))
    if dtype == torch.float32:
        x, values, unembed = normal(2, 8), normal(4, 8), normal(20, 8)
        targets = torch.tensor([1, 2])
        given = (x, values, normal(2, 4), unembed, torch.ones(2), targets)
        found += [ops.logprob_gain(*given, backend=backend) for _ in range(2)]
    return found


def forward() -> dict[str, object]:
    """Of a model in bfloat16 with neurons off, and how the manifest of a stage describes it."""
    from relneuron.model.instrument import ablate
    from relneuron.model.mlps.find import find_mlps
    from tests.conftest import tiny_model

    model = tiny_model("llama", torch.bfloat16)
    ids, neurons = torch.tensor([[3, 4, 5, 6]]), [(0, "gate", 1), (1, "up", 2), (2, "down", 3)]
    logits = []
    for backend in ("auto", "reference"):
        with torch.no_grad(), ablate(model, neurons, backend=backend):
            logits.append(model(ids).logits)
    described = load.describe_model("tiny", model, find_mlps(model), "auto")
    return {
        "same": torch.equal(*logits),
        "backend": described["backend"],
        "fallbacks": load.fallbacks(described),
    }


def main(setting: str) -> None:
    set_up(setting)
    seen = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        is_broken = setting != "none" and ("sm_75" not in setting or dtype == torch.bfloat16)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            own = results(dtype, "auto", is_broken)
        reference = results(dtype, "reference", is_broken)
        raised = []
        x = torch.ones(2, 8, dtype=dtype)
        try:
            ops.swiglu_stats(x, x, backend="triton")
        except RuntimeError as error:
            raised = [str(error)]
        # As a model is described in the manifest.
        described = {"device": "cpu", "dtype": name}
        described["backend"] = load._resolve_backend("auto", "cpu", dtype)
        seen[name] = {
            "same": all(torch.equal(a, b) for a, b in zip(own, reference, strict=True)),
            "warnings": [str(w.message) for w in caught if w.category is RuntimeWarning],
            "raised": raised,
            "backend": described["backend"],
            "fallbacks": load.fallbacks(described),
        }
    doctor = dict(machine_report())["backend triton"]
    model = forward() if "sm_75" in setting else None
    print(json.dumps({"doctor": doctor, "model": model, **seen}))


if __name__ == "__main__":
    main(sys.argv[1])
