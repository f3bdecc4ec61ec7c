"""The CPU backend of `swiglu_stats`: the launcher of its C++ kernels.

A call of one token takes a fifth of the time that checks in Python and torch's dispatcher take, so
there is a quick way to the kernel for calls that are plainly right.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from relneuron.ops.backends import cpu_module
from relneuron.ops.swiglu_stats.checks import DTYPES, Names
from relneuron.ops.swiglu_stats.groups import SITES, GroupStats
from relneuron.ops.swiglu_stats.reference import CODES, Call


def address(tensor: Tensor | None) -> int:
    """Of the values in memory; 0 of what is not given."""
    return 0 if tensor is None else tensor.data_ptr()


def swiglu_stats_cpu(call: Call, isa: str = "", n_threads: int = 0) -> None:
    """The C++ kernel; `isa` forces an instruction set and `n_threads` a thread count (tests)."""
    cpu_module().swiglu_stats(
        out=address(call.out),
        gate=call.gate.data_ptr(),
        up=address(call.up),
        stride_ht=0 if call.out is None else call.out.stride(0),
        stride_gt=call.gate.stride(0),
        stride_ut=0 if call.up is None else call.up.stride(0),
        T=call.gate.shape[0],
        F=call.gate.shape[1],
        dtype=DTYPES.index(call.gate.dtype),
        activation=CODES.index(call.activation),
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


def is_eager() -> bool:
    """Whether nothing of torch's wants to see the op: no compiler, mode, transform or profiler."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or (torch._C._is_torch_function_mode_enabled() and not _is_default_device_all())
        or torch._C._functorch.peek_interpreter_stack()
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def _is_default_device_all() -> bool:
    """Whether the only mode is `torch.set_default_device`: nothing here asks for that device."""
    n_modes = torch._C._len_torch_function_stack()
    return n_modes == 1 and type(torch._C._get_function_stack_at(0)) is DeviceContext


@functools.cache
def _codes(names: Names, sites: tuple[str, ...]) -> tuple[int, ...] | None:
    """The numbers of an op's sites in the kernels, or None if one is not the op's."""
    numbers = {s: SITES.index(code) for s, code in zip(names.sites, names.codes, strict=True)}
    return tuple(numbers[s] for s in sites) if set(sites) <= set(numbers) else None


# groups, width, threshold_bits, count, tokens, sum, sum_sq, max and n_nonfinite of no statistics.
_NO_COUNTERS: tuple[Any, ...] = (0, 0, 0, None, None, None, None, None, None)


def ran_quickly(
    names: Names,
    activation: str,
    gate: Tensor,
    up: Tensor | None,
    h: Tensor | None,
    stats: GroupStats | None,
    group_ids: Tensor | None,
    responses: Mapping[str, Tensor] | None,
    prompt_ids: Tensor | None,
    keep: Tensor | None,
    condition_ids: Tensor | None,
    ids_checked: bool,
) -> bool:
    """Run the call on the CPU kernel if it is plainly right; False if it is left to the checks."""
    try:
        quick = cpu_module().swiglu_stats_quick
        sites: tuple[int, ...] | None = ()
        counters = _NO_COUNTERS
        if stats is not None:
            stats.check_fields(names.op)
            sites = _codes(names, stats.sites)
            counters = (
                *(stats.groups, stats.width, stats._threshold_bits, stats._count, stats.tokens),
                *(stats._sum, stats._sum_sq, stats._max, stats._n_nonfinite),
            )
        response_sites = _codes(names, tuple(responses)) if responses else ()
    except (ImportError, AttributeError, TypeError):  # no extension; no GroupStats, or no names
        return False
    if sites is None or response_sites is None:
        return False
    return bool(
        quick(
            gate,
            up,
            h,
            CODES.index(activation),
            sites,
            *counters,
            group_ids,
            response_sites,
            tuple(responses.values()) if responses else (),
            prompt_ids,
            keep,
            condition_ids,
            ids_checked,
            torch.is_grad_enabled(),
            torch.get_num_threads(),
        )
    )
