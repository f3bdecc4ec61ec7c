"""Files of token ids, mapped and not read where their format allows that.

read.py reads them; nothing here imports torch, except for a .pt.
"""

from __future__ import annotations

import pickle
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.reading import check_zip
from relneuron.texts.sources import File, Source

Array = np.ndarray[Any, Any]


def open_ids(source: Source, file: File, vocabulary: int | None) -> Array:
    """The ids of a file, mapped and not read where its format allows that."""
    try:
        if file.kind == "bin":
            ids = _open_bin(source, file, vocabulary)
        elif file.kind == "npy":
            ids = np.load(file.path, mmap_mode="r", allow_pickle=False)
        else:
            ids = _open_pt(file.path)
        if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
            raise ValueError("no 1-D or 2-D array of integers")
    except RelneuronError:
        raise
    except Exception as error:  # a damaged file fails in many ways
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError) or "allow_pickle" in line:
            line = "it is no plain array, and nothing in it was run"
        raise RelneuronError(
            f"{file.path} is no file of token ids ({line})",
            "give a 1-D or 2-D array of integers",
        ) from error
    return ids


def _open_bin(source: Source, file: File, vocabulary: int | None) -> Array:
    if source.ids_dtype is None and vocabulary is None:
        raise RelneuronError(f"the dtype of {file.path} is unknown", "name it with --ids-dtype", 2)
    dtype = np.dtype(source.ids_dtype or ("uint16" if (vocabulary or 0) <= 1 << 16 else "uint32"))
    size = Path(file.path).stat().st_size
    if size % dtype.itemsize:
        raise RelneuronError(
            f"{file.path} has {size} bytes, no multiple of {dtype.itemsize} ({dtype})",
            "name the dtype of its ids with --ids-dtype",
        )
    ids = np.memmap(file.path, dtype, "r") if size else np.zeros(0, dtype)
    head = ids[: 1 << 16]
    if source.ids_dtype is None and len(head) > 15 and head[::2].any() and not head[1::2].any():
        cause = f"in {file.path} every second id is 0: its ids seem to be wider than {dtype}"
        raise RelneuronError(cause, f"name their dtype with --ids-dtype (uint32? or {dtype})")
    return ids


def _open_pt(path: str) -> Array:
    torch = import_module("torch")
    check_zip(Path(path))
    with warnings.catch_warnings(action="ignore"):  # of the way that a pickle was written
        try:
            ids = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the old format cannot be mapped
            ids = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError("no tensor of int32 or int64")
    return np.asarray(ids.detach().numpy())
