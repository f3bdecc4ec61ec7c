"""What works on this machine, and for a model which layers are supported, each with its reason.

`relneuron doctor [MODEL]` prints what these functions return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from relneuron import ops
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.installed import EXTRAS, install_command, missing
from relneuron.artifact.manifest import versions
from relneuron.artifact.stage import load
from relneuron.methods import methods
from relneuron.model.ask import cache_of
from relneuron.model.layers import first_line, input_device
from relneuron.model.mlps.find import inspect_layers
from relneuron.model.mlps.shape import Part, model_shape


def machine_report() -> list[tuple[str, str]]:
    """(name, finding) rows: versions, devices, backends and extras, with what is missing."""
    rows = [(name, value) for name, value in versions().items()]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows += [("CPU threads", str(torch.get_num_threads())), ("GPU", gpu)]
    for backend, status in ops.available_backends().items():
        verdict = "works" if status.works else "does not work"
        rows.append((f"backend {backend}", f"{verdict}: {status.detail}"))
    for extra in dict.fromkeys(EXTRAS.values()):
        absent = missing(*(package for package, name in EXTRAS.items() if name == extra))
        verdict = f"without {', '.join(absent)}: {install_command(extra)}" if absent else "there"
        rows.append((f"extra {extra}", verdict))
    return rows


def model_report(model: Any) -> tuple[list[tuple[str, str]], bool]:
    """Rows of a model's layers and of what methods say; whether stages take the model."""
    verdicts = inspect_layers(model)
    words = {True: "supported", False: "not supported"}
    rows = [
        (f"layer {v.layer}", f"{'passed over' if v.passed else words[bool(v.mlps)]}: {v.reason}")
        for v in verdicts
    ]
    mlps, fault = [mlp for v in verdicts for mlp in v.mlps], None
    n_good = sum(bool(v.mlps) for v in verdicts)
    rows.append(("summary", f"supported: {n_good} of {len(verdicts)} layers"))
    is_whole = bool(mlps) and all(v.mlps or v.passed for v in verdicts)
    if is_whole:
        fault = _fault(model, mlps)
        rows += [("model", f"not supported: {fault}")] if fault else []
    rows += [load(method.supports)(model) for method in methods() if method.supports]
    return rows, is_whole and fault is None


def _fault(model: Any, mlps: Sequence[Part]) -> str | None:
    """Why stages refuse a model all of whose layers are supported, or None."""
    try:
        model_shape(mlps)
    except RelneuronError as error:
        return error.cause
    device = input_device(model)
    try:
        with torch.no_grad():
            out = model(torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=True)
        cache_of(out)
    except Exception as error:
        return f"a forward of two tokens fails: {first_line(error)}"
    return None
