"""How fast this machine multiplies matrices and reads memory, measured in a second.

`relneuron plan` turns operations and bytes into time by it, unless it is told (--tflops, --gbps).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

_SIZE = {"cpu": 768, "cuda": 8192}  # of a square matrix that keeps the device busy
_READ = {"cpu": 2**25, "cuda": 2**28}  # float32 values, beyond the caches
_SECONDS = 0.3  # for each of the two


@dataclass(frozen=True)
class Speed:
    """Floating point operations and bytes a second."""

    flops_per_s: float
    bytes_per_s: float


def measured(device: str, dtype: str) -> Speed:
    """The speed of a device here, at a type of numbers and with the threads that torch uses."""
    return _measured(device, getattr(torch, dtype), torch.get_num_threads())


@cache
def _measured(device: str, dtype: torch.dtype, n_threads: int) -> Speed:
    n = _SIZE.get(device, 768)
    a, b = (torch.full((n, n), 0.5, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    flops = 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), device)
    data = torch.zeros(_READ.get(device, 2**25), device=device)
    read = 4 * data.numel() / _best(lambda: data.sum(), device)
    return Speed(flops, read)


def _best(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest call, of as many as there is time for; the first one is not timed."""
    best, until = float("inf"), time.perf_counter() + _SECONDS
    work()
    while best == float("inf") or time.perf_counter() < until:
        _wait(device)
        begin = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
