"""What the arguments of `peaks`, `merge_peaks` and `histogram` must be.

Values are read by `check_range` alone, which waits for a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from relneuron.ops.peaks.best import MOST_KEPT, BestPeaks
from relneuron.ops.peaks.edges import BINS, EXPONENTS, FIRST_BITS
from relneuron.ops.swiglu_stats.checks import (
    Names,
    check_device,
    check_given,
    check_ids_layout,
    check_inputs,
    describe,
    share_memory,
)
from relneuron.ops.swiglu_stats.groups import SITES
from relneuron.ops.swiglu_stats.reference import ACTIVATIONS
from relneuron.ops.tensors import check_tensors


def check_site(
    op: str,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    site: str,
    others: Mapping[str, Tensor | None] | None = None,
) -> Names:
    """gate and up are matrices that have the site; `others` are plain tensors."""
    sites = SITES if up is not None else ("gate", "act")
    names = Names(op, "gate", None if up is None else "up", sites, sites)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if site not in sites:
        missing = " (there is no up)" if up is None else ""
        raise ValueError(f"{op}: site must be one of {sites}{missing}, got {site!r}")
    check_given(names, gate, up, None, None, others or {})
    check_inputs(names, gate, up, None)
    return names


def check_ids(names: Names, name: str, ids: Tensor | None, gate: Tensor, n: int, of: str) -> None:
    """A row's segment or group; left out where there is one alone."""
    if ids is not None:
        check_ids_layout(names, name, ids, gate)
    elif n != 1:
        raise ValueError(
            f"{names.op}: {name} must be (T,) int32 with T={gate.shape[0]} (from gate) when {of}, "
            "got None"
        )


def check_plain(
    op: str,
    name: str,
    tensor: Tensor,
    letters: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    like: Tensor,
    origin: str,
) -> None:
    """Shape, dtype and device; contiguous."""
    if tensor.shape != shape or tensor.dtype != dtype:
        known = zip(letters.strip("(),").split(", "), shape, strict=True)
        sizes = ", ".join(f"{letter}={size}" for letter, size in known)
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{op}: {name} must be {letters} {kind} with {sizes} ({origin}), got {describe(tensor)}"
        )
    check_device(Names(op, origin.removeprefix("from "), None, (), ()), name, tensor, like)
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous, call .contiguous(), got "
            f"{describe(tensor, strides=True)}"
        )


def check_best(op: str, best: object, values: Tensor) -> BestPeaks:
    """The lists that peaks are put into."""
    if not isinstance(best, BestPeaks):
        raise TypeError(f"{op}: best must be a BestPeaks, got {type(best).__name__}")
    parts = {f"best.{name}": part for name, part in vars(best).items()}
    check_tensors(op, parts)
    shape = tuple(best.value.shape)
    if len(shape) != 3 or not shape[0] or not 1 <= shape[2] <= MOST_KEPT:
        raise ValueError(
            f"{op}: best.value must be (G, F, K) float32 with G >= 1 and K in [1, {MOST_KEPT}], "
            f"got {describe(best.value)}"
        )
    shape = (shape[0], values.shape[1], shape[2])
    for part, dtype in (
        ("value", torch.float32),
        ("number", torch.int64),
        ("position", torch.int32),
    ):
        tensor = parts[f"best.{part}"]
        origin = "from best.value, F from values"
        check_plain(op, f"best.{part}", tensor, "(G, F, K)", shape, dtype, values, origin)
    return best


def check_bins(counts: Tensor, width: int) -> None:
    """counts are (G, F, B)."""
    if counts.ndim != 3 or not counts.shape[0] or not 1 <= counts.shape[2] <= BINS[1]:
        raise ValueError(
            f"histogram: counts must be (G, F, B) int64 with F={width} (from gate), G >= 1 and B "
            f"in [1, {BINS[1]}], got {describe(counts)}"
        )


def check_apart(op: str, written: Mapping[str, Tensor], read: Mapping[str, Tensor | None]) -> None:
    """Refuse a tensor that is written and shares memory with another argument, by addresses."""
    given = {name: tensor for name, tensor in read.items() if tensor is not None}
    pairs = [*itertools.combinations(written.items(), 2)]
    pairs += itertools.product(written.items(), given.items())
    for (name, tensor), (other, another) in pairs:
        if share_memory(tensor, another):
            raise ValueError(
                f"{op}: {name} must not share memory with {other}; pass a separate tensor"
            )


def check_range(op: str, name: str, tensor: Tensor | None, low: int, high: int, why: str) -> None:
    """Refuse integers outside of [low, high); on a GPU this waits for the device."""
    if tensor is None or tensor.numel() == 0:
        return
    smallest, largest = (int(value) for value in torch.aminmax(tensor))
    if smallest < low or largest >= high:
        place = int(((tensor < low) | (tensor >= high)).to(torch.int8).argmax())
        raise ValueError(
            f"{op}: {name} must be in [{low}, {high}) ({why}), got {int(tensor[place])} at {place}"
        )


def check_edges(exponent: Tensor, first: Tensor) -> None:
    """Steps and first bins of which float32 arithmetic is exact."""
    low, high = EXPONENTS
    check_range("histogram", "exponent", exponent, low, high + 1, "2^-exponent is a float32")
    most = 2**FIRST_BITS
    check_range("histogram", "first", first, 1 - most, most, "first is a float32")
