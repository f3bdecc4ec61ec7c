"""Calls that are like one before: what was found right of shapes and types is right again.

`op.py` asks here before the checks, for calls of the GPU backend, where the checks take longer than
all else that the host does. Values, addresses and what an attribute of a GroupStats may have become
are looked at in every call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relneuron.ops.swiglu_stats.groups import GroupStats
from relneuron.ops.tensors import PLAIN, dispatch_keys

# A study has batches of a few hundred lengths; a caller with ever new ones begins again here.
_N_KEPT = 4096


@dataclass(slots=True)
class Known:
    """What follows from the likeness of a call."""

    sites: tuple[str, ...]  # as the kernels call them
    response_sites: tuple[str, ...]
    # For the launcher of the backend, which keeps what it has planned, and for whom.
    kept: Any = None


_KNOWN: dict[tuple[object, ...], Known] = {}


def likeness(
    op: str,
    activation: str,
    tensors: tuple[Tensor | None, ...],
    stats: GroupStats | None,
    responses: Mapping[str, Tensor] | None,
) -> tuple[object, ...] | None:
    """All that the checks look at but values and addresses; None if it is left to them.

    Those of a call are functions of it, so one that was right makes all like it right.
    """
    key: list[object] = [op, activation]
    if stats is not None:
        if type(stats) is not GroupStats:
            return None
        if not stats._has_own_fields():
            return None
        key += stats._made, stats._threshold_bits
        tensors = (*tensors, *stats._tensors())
    if responses:
        key += responses
        tensors = (*tensors, *responses.values())
    has_gradients = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            key.append(None)
            continue
        is_plain = type(tensor) is Tensor and dispatch_keys(tensor).raw_repr() in PLAIN
        if not is_plain or (has_gradients and tensor.requires_grad):
            return None
        key += tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return tuple(key)


def known(key: tuple[object, ...] | None) -> Known | None:
    """What was remembered of a likeness."""
    return _KNOWN.get(key) if key is not None else None


def remember(key: tuple[object, ...], found: Known) -> None:
    """The checks have found nothing wrong with a call of this likeness."""
    if len(_KNOWN) >= _N_KEPT:
        _KNOWN.clear()
    _KNOWN[key] = found
