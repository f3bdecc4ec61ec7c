"""Pickles of torch that others wrote: read without running anything in them, and written.

The methods' readers of other authors' files use it.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.reading import check_zip, reading

MAX_BYTES = 1 << 30  # of a file
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float64, torch.float32)


def load_torch(path: Path, fix: str) -> Any:
    """What a torch file holds: tensors and plain containers, on the CPU; anything else raises."""
    if not path.is_file():
        raise RelneuronError(f"{path} does not exist", fix, 2)
    if path.stat().st_size > MAX_BYTES:
        raise RelneuronError(f"{path} has more than {MAX_BYTES:,} bytes", fix)
    # What torch thinks of the file's make is no concern of the user.
    with warnings.catch_warnings(action="ignore"), reading(path, "torch file of tensors", fix):
        check_zip(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def dense(
    where: str,
    found: object,
    n_dims: int,
    fix: str,
    kinds: tuple[torch.dtype, ...] = INTEGERS,
    what: str = "integers",
) -> Tensor:
    """`found` if it is an ordinary tensor of such numbers and so many dimensions, and all there.

    A tensor with a stride of 0 could be a thousand times as large as the file that it came in.
    """
    if type(found) is not Tensor:
        raise RelneuronError(f"{where} is a {type(found).__name__}, no tensor", fix)
    if found.layout != torch.strided or found.device.type != "cpu":
        raise RelneuronError(f"{where} is no ordinary tensor", fix)
    if found.dtype not in kinds or found.dim() != n_dims:
        dtype = str(found.dtype).removeprefix("torch.")
        raise RelneuronError(
            f"{where} is a {dtype} tensor of shape {tuple(found.shape)}, not {n_dims}-D {what}",
            fix,
        )
    if not found.is_contiguous():
        raise RelneuronError(f"{where} is a strided view of other data", fix)
    return found


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
