"""What the arguments of `swiglu_stats` and its kin must be: every mistake has its message.

Only `check_ids_range` reads values and waits for a GPU; all else looks at shapes, strides and
addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from relneuron.ops.swiglu_stats.groups import GroupStats
from relneuron.ops.swiglu_stats.reference import DIFFERENCE, RESIDUAL, Call
from relneuron.ops.tensors import check_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What an op and its inputs are called, where a Call's activation tells that it is another one.
_OTHERS = {RESIDUAL: ("residual_stats", "x", "residual"), DIFFERENCE: ("pair_stats", "a", "b")}


class Names(NamedTuple):
    """How an op calls its two inputs and its sites, and which site of the kernels each one is."""

    op: str
    gate: str
    up: str | None  # None: the call is without it
    sites: tuple[str, ...]
    codes: tuple[str, ...]
    has_gradient: bool = False  # its result, to the inputs


def check_given(
    names: Names,
    gate: Tensor,
    up: Tensor | None,
    stats: GroupStats | None,
    responses: Mapping[str, Tensor] | None,
    others: Mapping[str, Tensor | None],
) -> dict[str, Tensor]:
    """All arguments are plain tensors, and no gradient is lost; returns those of `stats`."""
    inputs = {names.gate: gate}
    if names.up is None:
        if not isinstance(gate, Tensor):
            raise TypeError(f"{names.op}: {names.gate} must be a tensor, got {type(gate).__name__}")
    elif isinstance(gate, Tensor) and isinstance(up, Tensor):
        inputs[names.up] = up
    else:
        raise TypeError(
            f"{names.op}: {names.gate} and {names.up} must be tensors, "
            f"got {type(gate).__name__} and {type(up).__name__}"
        )
    if gate.is_meta:
        raise ValueError(f"{names.op}: {names.gate} must have data, got a tensor on meta")
    for site, tensor in responses.items() if responses else ():
        others = {**others, f"responses[{site!r}]": tensor}
    check_tensors(names.op, inputs, others, inputs if names.has_gradient else ())
    if stats is None:
        return {}
    if not isinstance(stats, GroupStats):
        raise TypeError(f"{names.op}: stats must be a GroupStats, got {type(stats).__name__}")
    return stats.tensors(names.op)


def check_inputs(names: Names, gate: Tensor, up: Tensor | None, out: Tensor | None) -> None:
    """gate and up are two (T, F) matrices; out is a third that may be written."""
    if gate.ndim != 2 or gate.dtype not in DTYPES:
        raise _error(names, names.gate, "(T, F) float32|bfloat16|float16", gate)
    shape = (gate.shape[0], gate.shape[1])
    for name, tensor in ((names.up, up), (names.gate, gate)):
        if name is not None and tensor is not None:
            _check_matrix(names, name, tensor, "(T, F)", shape, gate.dtype, gate, writable=False)
    if out is not None:
        _check_matrix(names, "out", out, "(T, F)", shape, gate.dtype, gate, writable=True)


def check_out(names: Names, gate: Tensor, out: Tensor | None) -> None:
    """A result with a gradient is a tensor of its own, as torch's are."""
    if out is not None:
        wants = names.gate if gate.requires_grad else names.up
        raise ValueError(
            f"{names.op}: out must be left out where {wants} requires grad, got "
            f"{describe(out)}; or call it under torch.no_grad()"
        )


def check_statistics(
    names: Names,
    gate: Tensor,
    stats: GroupStats | None,
    group_ids: Tensor | None,
    responses: Mapping[str, Tensor] | None,
    prompt_ids: Tensor | None,
) -> None:
    """stats and responses fit the inputs, and come with the ids they need."""
    n_tokens, width = gate.shape
    if stats is None:
        if group_ids is not None:
            raise ValueError(f"{names.op}: group_ids must come with stats, got stats=None")
    else:
        if stats.width != width or stats.device != gate.device:
            raise ValueError(
                f"{names.op}: stats must have width F={width} (from {names.gate}) on "
                f"{gate.device}, got width {stats.width} on {stats.device}"
            )
        if not set(stats.sites) <= set(names.sites):
            raise ValueError(
                f"{names.op}: stats must have sites among {_sites(names)}, got {stats.sites}"
            )
        if group_ids is not None:
            check_ids_layout(names, "group_ids", group_ids, gate)
        elif stats.groups > 1:
            raise ValueError(
                f"{names.op}: group_ids must be (T,) int32 with T={n_tokens} (from {names.gate}) "
                f"when stats has G={stats.groups} groups, got None"
            )

    tensors = dict(responses) if responses else {}
    if not set(tensors) <= set(names.sites):
        raise ValueError(
            f"{names.op}: responses must have keys among {_sites(names)}, got {tuple(tensors)}"
        )
    if (prompt_ids is None) != (not tensors):
        raise ValueError(
            f"{names.op}: responses and prompt_ids must come together, "
            f"got {len(tensors)} responses and prompt_ids="
            f"{'None' if prompt_ids is None else describe(prompt_ids)}"
        )
    if prompt_ids is None:
        return
    check_ids_layout(names, "prompt_ids", prompt_ids, gate)
    first = next(iter(tensors.values()))
    shape = (first.shape[0] if first.ndim else 0, width)
    for site, tensor in tensors.items():
        name = f"responses[{site!r}]"
        _check_matrix(names, name, tensor, "(N, F)", shape, torch.float32, gate, writable=True)


def check_masks(
    names: Names, gate: Tensor, keep: Tensor | None, condition_ids: Tensor | None
) -> None:
    """keep has a bit per neuron, and condition_ids come with it."""
    if keep is not None:
        n_words = (gate.shape[1] + 31) // 32
        if (
            keep.ndim != 2
            or keep.dtype != torch.int32
            or keep.shape[0] < 1
            or keep.shape[1] != n_words
        ):
            expected = (
                f"(C, ceil(F/32)) int32 with C >= 1 and ceil(F/32)={n_words} (from {names.gate})"
            )
            raise _error(names, "keep", expected, keep)
        if not keep.is_contiguous():
            raise _error(names, "keep", "contiguous, call keep.contiguous()", keep, strides=True)
        check_device(names, "keep", keep, gate)
    if condition_ids is not None:
        if keep is None:
            raise ValueError(f"{names.op}: condition_ids must come with keep, got keep=None")
        check_ids_layout(names, "condition_ids", condition_ids, gate)


def _sites(names: Names) -> str:
    return f"{names.sites}{' (there is no up)' if names.up is None else ''}"


def describe(tensor: Tensor, strides: bool = False) -> str:
    text = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    return f"{text} with strides {tuple(tensor.stride())}" if strides else text


def _error(
    names: Names, name: str, expected: str, got: Tensor, strides: bool = False
) -> ValueError:
    return ValueError(f"{names.op}: {name} must be {expected}, got {describe(got, strides)}")


def check_device(names: Names, name: str, tensor: Tensor, gate: Tensor) -> None:
    if tensor.device != gate.device:
        raise ValueError(
            f"{names.op}: {name} must be on {gate.device} (from {names.gate}), got {tensor.device}"
        )


def _check_matrix(
    names: Names,
    name: str,
    tensor: Tensor,
    letters: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    gate: Tensor,
    writable: bool,
) -> None:
    """Shape, dtype, device, and strides: last 1, and no two rows in one place if it is written."""
    rows, columns = shape
    if tensor.shape != shape or tensor.dtype != dtype:
        first, second = letters.strip("()").split(", ")
        expected = (
            f"{letters} {str(dtype).removeprefix('torch.')} with {first}={rows}, "
            f"{second}={columns} (from {names.gate if first == 'T' else 'its peers'})"
        )
        raise _error(names, name, expected, tensor)
    check_device(names, name, tensor, gate)
    if columns > 1 and rows > 0 and tensor.stride(1) != 1:
        expected = f"{letters} with last stride 1, call .contiguous()"
        raise _error(names, name, expected, tensor, strides=True)
    if writable and rows > 1 and tensor.stride(0) < columns:
        expected = f"{letters} with rows that do not overlap"
        raise _error(names, name, expected, tensor, strides=True)


def check_ids_layout(names: Names, name: str, ids: Tensor, gate: Tensor) -> None:
    n_tokens = gate.shape[0]
    if ids.shape != (n_tokens,) or ids.dtype != torch.int32:
        raise _error(names, name, f"(T,) int32 with T={n_tokens} (from {names.gate})", ids)
    check_device(names, name, ids, gate)
    if n_tokens > 1 and ids.stride(0) != 1:
        expected = "(T,) with stride 1, call .contiguous()"
        raise _error(names, name, expected, ids, strides=True)


# --------------------------------------------------------------------------------------------------
# Memory: looked at where the op runs, as only there compiled code has addresses


def check_memory(call: Call) -> None:
    """Refuse a tensor that is written and shares memory with another argument of the call.

    By addresses, as two views of a numpy array are two storages to torch. What lies between the
    rows of a matrix is not its memory.
    """
    moments = (call.sum, call.sum_sq, call.max, call.n_nonfinite)
    written = (call.out, call.count, call.tokens, *moments, *call.responses.values())
    read = (call.gate, call.up, call.group_ids, call.prompt_ids, call.keep, call.condition_ids)
    spans = []
    for tensors, is_written in ((written, True), (read, False)):
        for tensor in tensors:
            if tensor is not None:
                start = tensor.data_ptr()
                n_bytes = tensor.nbytes if tensor.is_contiguous() else _reach(tensor)
                spans.append((start, start + n_bytes, is_written))
    spans.sort()
    end = end_written = 0
    for start, stop, is_written in spans:
        if start < (end if is_written else end_written):
            _check_pairs(call, written, read)
            return
        if stop > end:
            end = stop
        if is_written and stop > end_written:
            end_written = stop


def _reach(tensor: Tensor) -> int:
    """The bytes from the first one of a tensor to its last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _check_pairs(
    call: Call, written: Sequence[Tensor | None], read: Sequence[Tensor | None]
) -> None:
    """`check_memory` with names, of arguments whose ranges intersect."""
    own = "swiglu_stats_only" if call.out is None else "swiglu_stats"
    op, gate, up = _OTHERS.get(call.activation, (own, "gate", "up"))
    fields = ("count", "tokens", "sum", "sum_sq", "max", "n_nonfinite")
    labels = ["out", *(f"stats.{name}" for name in fields)]
    labels += [f"responses[{site!r}]" for site in call.responses]
    labels += [gate, up, "group_ids", "prompt_ids", "keep", "condition_ids"]
    named = list(zip(labels, (*written, *read), strict=True))
    for place, (name, tensor) in enumerate(named[: len(written)]):
        for other, another in named[place + 1 :]:
            if tensor is not None and another is not None and share_memory(tensor, another):
                raise ValueError(
                    f"{op}: {name} must not share memory with {other}; pass a separate tensor"
                )


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether an element of one may lie in the other; if not by rows of one stride, by ranges."""
    start, other_start = a.data_ptr(), b.data_ptr()
    if start + _reach(a) <= other_start or other_start + _reach(b) <= start:
        return False
    if not (a.numel() and b.numel()):
        return False
    if not (a.dim() == b.dim() == 2) or min(len(a), len(b)) < 2 or a.stride(0) != b.stride(0):
        return True
    step = a.stride(0) * a.element_size()
    widths = [x.shape[1] * x.element_size() for x in (a, b)]
    # Rows of both come again every `step` bytes: do they lie beside each other within it?
    offset = (other_start - start) % step if step else 0
    return max(widths) > step or not (widths[0] <= offset and offset + widths[1] <= step)


# --------------------------------------------------------------------------------------------------
# Ids: the only values that are read


def check_ids_range(call: Call) -> None:
    """Refuse ids out of range before anything is written (on a GPU this waits for the device)."""
    op, *_ = _OTHERS.get(call.activation, ("swiglu_stats",))
    first_response = next(iter(call.responses.values()), None)
    for name, ids, low, size, origin in (
        ("group_ids", call.group_ids, -1, call.tokens, "G={} from stats"),
        ("prompt_ids", call.prompt_ids, -1, first_response, "N={} from responses"),
        ("condition_ids", call.condition_ids, 0, call.keep, "C={} from keep"),
    ):
        if ids is None or ids.numel() == 0 or size is None:
            continue
        high = size.shape[0]
        smallest, largest = (int(value) for value in torch.aminmax(ids))
        if smallest < low or largest >= high:
            position = int(((ids < low) | (ids >= high)).to(torch.int8).argmax())
            raise ValueError(
                f"{op}: {name} must be in [{low}, {high}) ({origin.format(high)}), "
                f"got {int(ids[position])} at token {position}"
            )
