"""Tensors of numpy as safetensors files: written at once, or filled and read as memory maps.

Stages whose results are larger than memory, and those that write many arrays, call it.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from relneuron.artifact.files import Json, hashing_threads


def safetensors_pieces(
    tensors: Mapping[str, np.ndarray[Any, Any]], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, as `safetensors.numpy.save` gives them, without a copy."""
    # That one puts the largest types first, so that all lie at multiples of their size.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: Json = {"__metadata__": dict(metadata)}
    offset = 0
    for name in names:
        array = tensors[name]
        begin, offset = offset, offset + array.nbytes
        header[name] = {
            "dtype": f"{array.dtype.kind.upper()}{8 * array.itemsize}",
            "shape": list(array.shape),
            "data_offsets": [begin, offset],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data


def create_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Make a float32 safetensors file of zeros and return its tensors as writable memory maps.

    The space is reserved at once, so that a full disk is an error here and not a crash later.
    An existing file with the same header is opened as it is; what it lacks at its end is zeros.
    """
    head, places, offset = _zeros_head(shapes, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    existing = b""
    if path.exists():
        with path.open("rb") as file:
            existing = file.read(len(head))
    if existing != head or path.stat().st_size != len(head) + offset:
        with path.open("r+b" if existing == head else "wb") as file:
            try:
                _reserve(file, len(head) + offset)
                file.seek(0)
                file.write(head)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    result = {}
    for name, shape in shapes.items():
        result[name] = np.memmap(path, np.float32, "r+", len(head) + places[name], shape)
    return result


def _zeros_head(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int], int]:
    """What a file of `create_safetensors` begins with, where each tensor is, and their bytes."""
    header: Json = {"__metadata__": dict(metadata)} if metadata else {}
    places, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        places[name], offset = offset, offset + size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text, places, offset


def zeros_bytes(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None) -> int:
    """The size of a file of `create_safetensors`."""
    head, _, n_bytes = _zeros_head(shapes, metadata)
    return len(head) + n_bytes


def dense_bytes(
    shapes: Mapping[str, tuple[tuple[int, ...], Any]], metadata: Mapping[str, str]
) -> int:
    """The size of a file of `safetensors_pieces`, of tensors of these shapes and types."""
    tensors = {
        name: np.broadcast_to(np.zeros((), dtype), shape) for name, (shape, dtype) in shapes.items()
    }
    head = next(safetensors_pieces(tensors, metadata))
    return len(head) + sum(array.nbytes for array in tensors.values())


def map_safetensors(path: Path, *, writable: bool = False) -> dict[str, Any]:
    """The float32 tensors of a file that `create_safetensors` made, as memory maps.

    Raises ValueError for one that is not as it was made: cut, or with another header.
    """
    with path.open("rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size - 8
        n_head = int.from_bytes(file.read(8), "little")
        if n_head > n_bytes:
            raise ValueError("it is cut in its header")
        try:
            header = json.loads(file.read(n_head))
            header.pop("__metadata__", None)
            spans = {
                name: (about["shape"], *about["data_offsets"]) for name, about in header.items()
            }
            for shape, begin, end in spans.values():
                sizes = [n for n in (*shape, begin, end) if isinstance(n, int) and n >= 0]
                if len(sizes) < len(shape) + 2 or math.prod(shape) * 4 != end - begin:
                    raise ValueError("a tensor is not of its shape")
                if end > n_bytes - n_head:
                    raise ValueError("it is cut")
        except (AttributeError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError("its header is none") from error
    return {
        name: np.memmap(
            path,
            np.float32,
            "r+" if writable else "r",
            8 + n_head + begin,
            tuple(shape),
        )
        for name, (shape, begin, _) in spans.items()
    }


def _reserve(file: IO[bytes], n_bytes: int) -> None:
    """Give a file its length and the space for it; what is new in it is zeros."""
    old = file.seek(0, os.SEEK_END)
    file.truncate(n_bytes)  # on Windows this reserves it
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
    elif os.name == "posix":  # macOS leaves a hole until something is written
        file.seek(old)
        for begin in range(old, n_bytes, _ZEROS):
            file.write(bytes(min(_ZEROS, n_bytes - begin)))


_ZEROS = 1 << 20  # bytes that are written at a time


def release(maps: Iterable[Any]) -> None:
    """Have what was read of memory maps, or written to them, be no memory of this process any more.

    It stays in the system's cache of the file, and is written from there as before.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        for array in maps:
            if array.size:
                array._mmap.madvise(mmap.MADV_DONTNEED)


def rows_digest(arrays: Sequence[np.ndarray[Any, Any]], rows: Sequence[int]) -> str:
    """The SHA-256 of some rows of all arrays, which are hashed side by side."""
    places = list(rows)
    with hashing_threads() as pool:
        parts = pool.map(lambda array: hashlib.sha256(array[places]).digest(), arrays)
        return hashlib.sha256(b"".join(parts)).hexdigest()
