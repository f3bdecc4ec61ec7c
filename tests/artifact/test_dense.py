"""Tensors as safetensors files: filled and read as memory maps, and written in pieces."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save

import relneuron.artifact.dense
from relneuron.artifact.dense import create_safetensors, safetensors_pieces
from relneuron.artifact.files import atomic_write


def test_memory_maps_are_a_safetensors_file(tmp_path: Path) -> None:
    path, shapes = tmp_path / "r.safetensors", {"gate.0": (3, 5), "down.0": (3, 2)}
    maps = create_safetensors(path, shapes)
    maps["gate.0"][1] = 7
    maps["down.0"][2] = np.arange(2)
    for array in maps.values():
        array.flush()
    again = create_safetensors(path, shapes)
    assert (again["gate.0"][1] == 7).all()
    loaded = load_file(path)
    assert loaded["down.0"].tolist() == [[0, 0], [0, 0], [0, 1]]
    assert (create_safetensors(path, {"gate.0": (4, 5)})["gate.0"] == 0).all()


@pytest.mark.parametrize("system", ["posix", "nt"])
def test_memory_maps_where_a_length_is_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(relneuron.artifact.dense, "_ZEROS", 1000)
    # pathlib's own os must stay, or it makes other paths.
    windows = SimpleNamespace(**{**vars(os), "name": system})
    monkeypatch.setattr(relneuron.artifact.dense, "os", windows)
    path, shapes = tmp_path / "r.safetensors", {"gate.0": (301, 5)}
    create_safetensors(path, shapes)["gate.0"][:] = 7
    assert (create_safetensors(path, shapes)["gate.0"] == 7).all()
    n_bytes = path.stat().st_size
    os.truncate(path, n_bytes - 301 * 4)  # what a kill left: the rest is zeros again
    again = create_safetensors(path, shapes)["gate.0"]
    assert path.stat().st_size == n_bytes and again.sum() == 7 * 301 * 4
    if system == "posix":
        assert path.stat().st_blocks * 512 >= n_bytes


@pytest.mark.parametrize("n", [0, 3, 200_000])
def test_the_pieces_of_tensors_are_what_safetensors_writes(tmp_path: Path, n: int) -> None:
    """Also of views, tables without a number, names that are no ASCII, and large ones."""
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(n, 4)).astype(np.float32)
    tensors = {
        "b": whole,
        "part": np.ascontiguousarray(whole[:, 1]),
        "a": np.arange(n, dtype=np.int64),
        "数": np.zeros((2, 0, 3), np.int32),
        "weight": np.ones((), np.float64),
    }
    about = {"key": json.dumps({"groups": ["日本語", 'a "b"']}, ensure_ascii=False)}
    written = save(tensors, about)
    views = tensors | {"part": whole[:, 1]}
    assert b"".join(safetensors_pieces(views, about)) == written
    atomic_write(tmp_path / "t.safetensors", safetensors_pieces(views, about))
    assert (tmp_path / "t.safetensors").read_bytes() == written
