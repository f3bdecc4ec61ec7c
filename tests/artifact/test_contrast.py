"""contrast.safetensors: E3 of the paper's specification, written, read, added, and damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from relneuron.artifact.contrast import DIFFERENCE, NAME, RMS, SITES, Contrast
from relneuron.artifact.counts import Counts
from relneuron.artifact.files import RelneuronError
from tests.kit.contrasted import M1, M2, contrast_of
from tests.kit.counted import assert_equal

GROUPS = {"x": (M1[:3], M2[:3]), "y": (M1[3:], M2[3:])}


def test_e3() -> None:
    """S, and the unbiased standard deviation of M1, to the printed digits."""
    found = contrast_of({"all": (M1, M2)})
    s = [[0.21213203, 0.50497525, 0.2], [1.00249688, 0, 0.2]]
    std = [[0.08164966, 0.16329932, 0.14142136], [0.16329932, 0.1, 0.21602469]]
    np.testing.assert_allclose(found.rms(), s, atol=1e-8, rtol=1e-7)
    np.testing.assert_allclose(found.std("a"), std, atol=1e-7)
    np.testing.assert_allclose(found.mean("b"), M2.mean(0), atol=1e-7)
    np.testing.assert_allclose(found.std("b"), M2.std(0, ddof=1), atol=1e-7)


def test_groups_are_pooled_by_token() -> None:
    """Not the mean of the groups' own: 3 tokens and 1 together are as all 4 at once."""
    found, whole = contrast_of(GROUPS), contrast_of({"all": (M1, M2)})
    np.testing.assert_allclose(found.rms(), whole.rms(), rtol=1e-12)
    np.testing.assert_allclose(found.std("a"), whole.std("a"), rtol=1e-9)
    one = found.take(["y"])
    assert isinstance(one, Contrast)
    np.testing.assert_allclose(one.rms(), np.abs(M1[3] - M2[3]), rtol=1e-7)
    assert np.isnan(one.std("a")).all()  # of one token
    assert np.isnan(found.take(["z"]).rms()).all()  # of none


def test_a_small_difference_of_large_values() -> None:
    """Mean 10, difference 1e-3: the root of squared differences, never of moments."""
    rng = np.random.default_rng(0)
    b = (10 + rng.normal(size=(5000, 1, 4))).astype(np.float32)
    a = (b + 1e-3 * rng.normal(size=b.shape)).astype(np.float32)
    true = np.sqrt(np.square(a.astype(np.float64) - b).mean(0))
    np.testing.assert_allclose(contrast_of({"all": (a, b)}).rms(), true, rtol=1e-6)


def test_values_that_are_not_finite_are_in_no_moment() -> None:
    a = M1.copy()
    a[0, 0, 0], a[1, 0, 0] = np.nan, np.inf
    found = contrast_of({"all": (a, M2)})
    np.testing.assert_allclose(found.mean("a")[0, 0], M1[2:, 0, 0].mean(), rtol=1e-6)
    rms = np.sqrt(np.square(M1[2:, 0, 0] - M2[2:, 0, 0]).mean())
    np.testing.assert_allclose(found.rms()[0, 0], rms, rtol=1e-6)


def test_written_read_and_added(tmp_path: Path) -> None:
    path, found = tmp_path / NAME, contrast_of(GROUPS)
    found.write(path)
    assert isinstance(again := Contrast.read(path), Contrast)
    assert_equal(again, found)
    first = path.read_bytes()
    again.write(path)
    assert path.read_bytes() == first
    rms = load_file(path)[RMS]
    assert rms.dtype == np.float32
    np.testing.assert_array_equal(rms, found.rms().astype(np.float32))
    parts = [contrast_of({name: pair}) for name, pair in GROUPS.items()]
    assert_equal(parts[0] + parts[1], found)
    twice = found + found
    np.testing.assert_allclose(twice.rms(), found.rms(), rtol=1e-12)
    assert twice.tokens.tolist() == [6, 2]


def test_a_contrast_and_counts_are_not_one_another(tmp_path: Path) -> None:
    path = tmp_path / NAME
    contrast_of(GROUPS).write(path)
    with pytest.raises(RelneuronError, match="is no file of counts"):
        Counts.read(path)
    Counts(["x"], np.ones(1, np.int64), {"count.act": np.ones((1, 1, 1), np.int64)}).write(path)
    with pytest.raises(RelneuronError, match="is no file of a contrast") as error:
        Contrast.read(path)
    assert "relneuron contrast MODEL_A MODEL_B" in error.value.fix


def _half(name: str) -> Any:
    return lambda tensors: tensors[name] / 2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (RMS, _half(RMS)),
        (RMS, lambda tensors: tensors[RMS].astype(np.float64)),
        (RMS, lambda tensors: tensors[RMS][:1]),
        (f"sum_sq.{DIFFERENCE}", _half(f"sum_sq.{DIFFERENCE}")),
        *((f"sum.{site}", None) for site in SITES),
        ("tokens", lambda tensors: tensors["tokens"][:1]),
        ("count.act", lambda tensors: tensors["count.a"]),
        ("n_nonfinite.a", lambda tensors: tensors["n_nonfinite.a"] - 1),
        ("max.b", lambda tensors: tensors["max.b"][:, :1]),
    ],
)
def test_a_file_that_does_not_fit_together(tmp_path: Path, name: str, change: Any) -> None:
    path = tmp_path / NAME
    contrast_of(GROUPS).write(path)
    tensors = load_file(path)
    value = change(tensors) if change else None
    tensors = {k: v for k, v in (tensors | {name: value}).items() if v is not None}
    save_file(tensors, path, {Contrast.KEY: '{"groups": ["x", "y"]}'})
    with pytest.raises(RelneuronError, match="is no file of a contrast"):
        Contrast.read(path)
