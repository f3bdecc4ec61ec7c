"""Which machine, which versions and which commit a measurement is of."""

from __future__ import annotations

import datetime
import platform
import re
from pathlib import Path
from typing import Any

import torch

from relneuron.artifact.installed import commit
from relneuron.artifact.manifest import versions


def where(device: str) -> dict[str, Any]:
    """The columns of a row that say where and with what it was measured."""
    found = versions()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "machine": machine(device),
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "python": found["python"],
        "torch": torch.__version__,
        "triton": found.get("triton", "-"),
        "relneuron": found.get("relneuron", "-"),
        "commit": commit(),
    }


def processor(device: str) -> str:
    """The name of the GPU or CPU."""
    if device != "cpu":
        return torch.cuda.get_device_name(torch.device(device))
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(device: str) -> str:
    """The processor's name as a file name."""
    plain = re.sub(r"\((r|tm)\)", "", processor(device).lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
