"""SwiGLU with per-group activation statistics and per-token neuron masks: public op and spec.

The patched MLPs of a model call it, and so can any other code. Here are the public function and the
choice of a backend; the files `swiglu_stats_*.py` beside it and `csrc/swiglu_stats*` are the rest.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from relneuron.ops.swiglu_stats_groups import SITES, GroupStats
from relneuron.ops.swiglu_stats_reference import ACTIVATIONS, Call, swiglu_stats_reference

BACKENDS = ("auto", "reference", "cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def swiglu_stats(
    gate: Tensor,
    up: Tensor,
    *,
    activation: str = "silu",
    stats: GroupStats | None = None,
    group_ids: Tensor | None = None,
    responses: Mapping[str, Tensor] | None = None,
    prompt_ids: Tensor | None = None,
    keep: Tensor | None = None,
    condition_ids: Tensor | None = None,
    out: Tensor | None = None,
    ids_checked: bool = False,
    backend: str = "auto",
) -> Tensor:
    """h = activation(gate) * up, while the values are counted per group and neurons are masked.

    Arguments
        gate, up       (T, F) float32|bfloat16|float16, same dtype and device; last stride 1, any
                       row stride (a half of a packed tensor, rows that overlap, an expanded row)
        activation     silu | gelu (erf) | gelu_tanh | relu
        stats          a GroupStats of width F on the same device, updated in place
        group_ids      (T,) int32 in [-1, G): the group of each token, -1 = not counted in anything
                       of `stats`. May be left out when G = 1: all tokens are then in group 0
        responses      {site: (N, F) float32}; the value of token t is added to row prompt_ids[t]
        prompt_ids     (T,) int32 in [-1, N), -1 = none
        keep           (C, ceil(F/32)) int32: bit f % 32 of word f // 32 set = neuron f stays
        condition_ids  (T,) int32 in [0, C): the row of `keep` for each token; row 0 if left out
        out            (T, F) tensor for h; may not share memory with gate or up
        ids_checked    True: the caller promises that all ids are in range (saves one look at them)
        backend        auto | reference | cpu | triton; a backend that cannot run here raises

    Values. The sites of token t and neuron f are, each rounded to the dtype of gate,
        gate, up, act = activation(gate), product = act * up
    and they are recorded before masking. All arithmetic is IEEE float32 with one rounding per
    operation; the activation behind the sites act and product is one fixed sequence of operations
    that every backend executes, with an error of a few float32 ulp (swiglu_stats_reference.py). h
    of the reference is torch's own activation times up, bit for bit; h of the other backends is
    the site product, which in bfloat16 and float16 differs from torch's h in the last bit of rare
    elements. Where `keep` drops a neuron its h is exactly +0, whatever the value was (NaN too).

    Statistics. See GroupStats. A response is a float32 sum in the order of the tokens; non-finite
    values go into it. T = 0 and F = 0 are allowed.

    Exactness. count, tokens, max and n_nonfinite are bit-identical between backends, splits of the
    tokens, thread counts and runs. sum and sum_sq are float64 sums in the order of the tokens, in
    which cpu adds up to 16 tokens at a time, and triton up to 256, in float32 first. Responses are
    float32 sums in the order of the tokens (triton: in another fixed order). So for the same split
    they are bit-identical between runs, and on a CPU between thread counts and instruction sets;
    only the reference on a GPU leaves the order to torch. Subnormal values count also when torch
    flushes them to zero elsewhere (`torch.set_flush_denormal`).

    Returns h (T, F) in the dtype of gate: `out` if given. There is no gradient: with grad mode on,
    inputs that require it are refused.
    """
    if not (isinstance(gate, Tensor) and isinstance(up, Tensor)):
        raise TypeError(
            "swiglu_stats: gate and up must be tensors, "
            f"got {type(gate).__name__} and {type(up).__name__}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"swiglu_stats: activation must be one of {ACTIVATIONS}, got {activation!r}"
        )
    if backend not in BACKENDS:
        raise ValueError(f"swiglu_stats: backend must be one of {BACKENDS}, got {backend!r}")
    if gate.ndim != 2 or gate.dtype not in DTYPES:
        raise _error("gate", "(T, F) float32|bfloat16|float16", gate)
    n_tokens, width = gate.shape
    _check_matrix("up", up, "(T, F)", (n_tokens, width), gate.dtype, gate, writable=False)
    _check_matrix("gate", gate, "(T, F)", (n_tokens, width), gate.dtype, gate, writable=False)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        raise RuntimeError(
            "swiglu_stats: gate and up must not require grad, the op has no gradient; call it "
            "under torch.no_grad() or pass gate.detach() and up.detach()"
        )
    if out is None:
        out = torch.empty((n_tokens, width), dtype=gate.dtype, device=gate.device)
    else:
        _check_matrix("out", out, "(T, F)", (n_tokens, width), gate.dtype, gate, writable=True)
        for name, tensor in (("gate", gate), ("up", up)):
            if _share_memory(out, tensor):
                raise ValueError(
                    f"swiglu_stats: out must not share memory with {name}; pass a separate tensor"
                )

    if stats is None:
        if group_ids is not None:
            raise ValueError("swiglu_stats: group_ids must come with stats, got stats=None")
    else:
        if stats.width != width or stats.device != gate.device:
            raise ValueError(
                f"swiglu_stats: stats must have width F={width} (from gate) on {gate.device}, "
                f"got width {stats.width} on {stats.device}"
            )
        if group_ids is not None:
            _check_ids_layout("group_ids", group_ids, gate)
        elif stats.groups > 1:
            raise ValueError(
                f"swiglu_stats: group_ids must be (T,) int32 with T={n_tokens} (from gate) when "
                f"stats has G={stats.groups} groups, got None"
            )

    response_sites = tuple(responses) if responses else ()
    response_tensors = [responses[site] for site in response_sites] if responses else []
    if not set(response_sites) <= set(SITES):
        raise ValueError(
            f"swiglu_stats: responses must have keys among {SITES}, got {response_sites}"
        )
    if (prompt_ids is None) != (not response_tensors):
        raise ValueError(
            "swiglu_stats: responses and prompt_ids must come together, "
            f"got {len(response_tensors)} responses and prompt_ids="
            f"{'None' if prompt_ids is None else _describe(prompt_ids)}"
        )
    if prompt_ids is not None:
        _check_ids_layout("prompt_ids", prompt_ids, gate)
        n_prompts = response_tensors[0].shape[0] if response_tensors[0].ndim else 0
        for site, tensor in zip(response_sites, response_tensors, strict=True):
            name = f"responses[{site!r}]"
            shape = (n_prompts, width)
            _check_matrix(name, tensor, "(N, F)", shape, torch.float32, gate, writable=True)

    if keep is not None:
        n_words = (width + 31) // 32
        if (
            keep.ndim != 2
            or keep.dtype != torch.int32
            or keep.shape[0] < 1
            or keep.shape[1] != n_words
        ):
            expected = f"(C, ceil(F/32)) int32 with C >= 1 and ceil(F/32)={n_words} (from gate)"
            raise _error("keep", expected, keep)
        if not keep.is_contiguous():
            raise _error("keep", "contiguous, call keep.contiguous()", keep, strides=True)
        _check_device("keep", keep, gate)
    if condition_ids is not None:
        if keep is None:
            raise ValueError("swiglu_stats: condition_ids must come with keep, got keep=None")
        _check_ids_layout("condition_ids", condition_ids, gate)

    _swiglu_stats_op(
        gate,
        up,
        out,
        activation,
        ",".join(stats.sites) if stats is not None else "",
        stats._threshold_bits if stats is not None else 0,
        stats._count if stats is not None else None,
        stats.tokens if stats is not None else None,
        stats._sum if stats is not None else None,
        stats._sum_sq if stats is not None else None,
        stats._max if stats is not None else None,
        stats._n_nonfinite if stats is not None else None,
        group_ids,
        ",".join(response_sites),
        response_tensors,
        prompt_ids,
        keep,
        condition_ids,
        ids_checked,
        backend,
    )
    return out


def _describe(tensor: Tensor, strides: bool = False) -> str:
    text = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    return f"{text} with strides {tuple(tensor.stride())}" if strides else text


def _error(name: str, expected: str, got: Tensor, strides: bool = False) -> ValueError:
    return ValueError(f"swiglu_stats: {name} must be {expected}, got {_describe(got, strides)}")


def _check_device(name: str, tensor: Tensor, gate: Tensor) -> None:
    if tensor.device != gate.device:
        raise ValueError(
            f"swiglu_stats: {name} must be on {gate.device} (from gate), got {tensor.device}"
        )


def _check_matrix(
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
            f"{letters} {str(dtype).removeprefix('torch.')} with "
            f"{first}={rows}, {second}={columns} (from {'gate' if first == 'T' else 'its peers'})"
        )
        raise _error(name, expected, tensor)
    _check_device(name, tensor, gate)
    if columns > 1 and rows > 0 and tensor.stride(1) != 1:
        raise _error(
            name, f"{letters} with last stride 1, call .contiguous()", tensor, strides=True
        )
    if writable and rows > 1 and tensor.stride(0) < columns:
        raise _error(name, f"{letters} with rows that do not overlap", tensor, strides=True)


def _check_ids_layout(name: str, ids: Tensor, gate: Tensor) -> None:
    n_tokens = gate.shape[0]
    if ids.shape != (n_tokens,) or ids.dtype != torch.int32:
        raise _error(name, f"(T,) int32 with T={n_tokens} (from gate)", ids)
    _check_device(name, ids, gate)
    if n_tokens > 1 and ids.stride(0) != 1:
        raise _error(name, "(T,) with stride 1, call .contiguous()", ids, strides=True)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges of two matrices intersect (strided gaps count as theirs)."""
    if a.numel() == 0 or b.numel() == 0 or torch.compiler.is_compiling():
        return False  # the compiler tracks aliases itself, and a fake tensor has no address
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False

    def last(x: Tensor) -> int:
        rows, columns = x.shape
        return int(x.storage_offset() + (rows - 1) * x.stride(0) + (columns - 1) * x.stride(1))

    return a.storage_offset() <= last(b) and b.storage_offset() <= last(a)


# --------------------------------------------------------------------------------------------------
# The op that torch sees: torch's dispatcher picks the backend by device


@torch.library.custom_op(
    "relneuron::swiglu_stats",
    mutates_args=("out", "count", "tokens", "sum", "sum_sq", "max", "n_nonfinite", "responses"),
)
def _swiglu_stats_op(
    gate: Tensor,
    up: Tensor,
    out: Tensor,
    activation: str,
    sites: str,
    threshold_bits: int,
    count: Tensor | None,
    tokens: Tensor | None,
    sum: Tensor | None,
    sum_sq: Tensor | None,
    max: Tensor | None,
    n_nonfinite: Tensor | None,
    group_ids: Tensor | None,
    response_sites: str,
    responses: Sequence[Tensor],
    prompt_ids: Tensor | None,
    keep: Tensor | None,
    condition_ids: Tensor | None,
    ids_checked: bool,
    backend: str,
) -> None:
    call = Call(
        gate=gate,
        up=up,
        out=out,
        activation=activation,
        sites=tuple(sites.split(",")) if sites else (),
        threshold_bits=threshold_bits,
        count=count,
        tokens=tokens,
        sum=sum,
        sum_sq=sum_sq,
        max=max,
        n_nonfinite=n_nonfinite,
        group_ids=group_ids,
        responses=dict(zip(response_sites.split(","), responses, strict=True)) if responses else {},
        prompt_ids=prompt_ids,
        keep=keep,
        condition_ids=condition_ids,
    )
    chosen = _choose_backend(backend, gate.device.type)
    if not ids_checked:
        _check_ids_range(call)
    if chosen == "cpu":
        _swiglu_stats_cpu(call)
    elif chosen == "triton":
        _triton_module().swiglu_stats_triton(call)
    else:
        swiglu_stats_reference(call)


@_swiglu_stats_op.register_fake
def _(*args: object) -> None:
    return None


def _check_ids_range(call: Call) -> None:
    """Refuse ids out of range before anything is written (on a GPU this waits for the device)."""
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
                f"swiglu_stats: {name} must be in [{low}, {high}) ({origin.format(high)}), "
                f"got {int(ids[position])} at token {position}"
            )


# --------------------------------------------------------------------------------------------------
# Backends


class BackendStatus(NamedTuple):
    """Whether a backend can run here, with one line that says how, or why not."""

    works: bool
    detail: str


def available_backends() -> dict[str, BackendStatus]:
    """What works in this process: {"reference" | "cpu" | "triton": BackendStatus}."""
    statuses = {"reference": BackendStatus(True, "plain torch, any device")}
    try:
        levels = _cpu_module().isa_levels()
        statuses["cpu"] = BackendStatus(True, f"C++ kernels, using {levels[-1]} of {levels}")
    except ImportError as error:
        statuses["cpu"] = BackendStatus(False, str(error))
    try:
        module = _triton_module()
    except ImportError as error:
        statuses["triton"] = BackendStatus(False, str(error))
        return statuses
    if module.IS_INTERPRETED:
        statuses["triton"] = BackendStatus(True, "interpreted (TRITON_INTERPRET=1): for tests only")
    elif torch.cuda.is_available():
        statuses["triton"] = BackendStatus(True, f"kernels for {torch.cuda.get_device_name()}")
    else:
        statuses["triton"] = BackendStatus(False, "no GPU that torch can use")
    return statuses


@functools.cache
def _import_or_error(name: str) -> ModuleType | ImportError:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return error


def _cpu_module() -> ModuleType:
    module = _import_or_error("relneuron._cpu")
    if isinstance(module, ImportError):
        raise ImportError(
            f"the C++ extension relneuron._cpu is not usable ({module}); "
            "to have it, install relneuron with a C++ compiler"
        )
    return module


def _triton_module() -> ModuleType:
    module = _import_or_error("relneuron.ops.swiglu_stats_triton")
    if isinstance(module, ImportError):
        raise ImportError(f"triton is not usable: {module}")
    return module


def _choose_backend(backend: str, device_type: str) -> str:
    """The backend to run; a forced one that cannot run raises with the reason."""
    if backend == "auto":
        preferred = {"cpu": "cpu", "cuda": "triton"}.get(device_type)
        if preferred is None:
            _notice(f"there is no kernel for {device_type} tensors")
            return "reference"
        try:
            _cpu_module() if preferred == "cpu" else _triton_module()
        except ImportError as error:
            _notice(str(error))
            return "reference"
        return preferred
    if backend == "cpu":
        if device_type != "cpu":
            raise ValueError(
                f"swiglu_stats: backend='cpu' must have tensors on cpu, got {device_type}"
            )
        _raise_if_missing(backend, _cpu_module)
    elif backend == "triton":
        module = _raise_if_missing(backend, _triton_module)
        if device_type != "cuda" and not module.IS_INTERPRETED:
            raise ValueError(
                "swiglu_stats: backend='triton' must have tensors on cuda, got "
                f"{device_type}; on cpu only the interpreter runs it (TRITON_INTERPRET=1)"
            )
    return backend


def _raise_if_missing(backend: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except ImportError as error:
        raise RuntimeError(f"swiglu_stats: backend={backend!r} cannot run here: {error}") from error


@functools.cache
def _notice(reason: str) -> None:
    """Say once per process that the slow backend is in use."""
    warnings.warn(
        f"relneuron: swiglu_stats uses plain torch (backend='reference'), because {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def _swiglu_stats_cpu(call: Call, isa: str = "", n_threads: int = 0) -> None:
    """The C++ kernel; `isa` forces an instruction set and `n_threads` a thread count (tests)."""

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    _cpu_module().swiglu_stats(
        out=call.out.data_ptr(),
        gate=call.gate.data_ptr(),
        up=call.up.data_ptr(),
        stride_ht=call.out.stride(0),
        stride_gt=call.gate.stride(0),
        stride_ut=call.up.stride(0),
        T=call.gate.shape[0],
        F=call.gate.shape[1],
        dtype=DTYPES.index(call.gate.dtype),
        activation=ACTIVATIONS.index(call.activation),
        sites=[SITES.index(site) for site in call.sites],
        G=0 if call.tokens is None else call.tokens.shape[0],
        threshold_bits=call.threshold_bits,
        count=address(call.count),
        tokens=address(call.tokens),
        sum=address(call.sum),
        sum_sq=address(call.sum_sq),
        max=address(call.max),
        n_nonfinite=address(call.n_nonfinite),
        group_ids=address(call.group_ids),
        response_sites=[SITES.index(site) for site in call.responses],
        responses=[tensor.data_ptr() for tensor in call.responses.values()],
        strides_rn=[tensor.stride(0) for tensor in call.responses.values()],
        prompt_ids=address(call.prompt_ids),
        keep=address(call.keep),
        condition_ids=address(call.condition_ids),
        isa=isa,
        n_threads=n_threads or torch.get_num_threads(),
    )
