"""SwiGLU with per-group activation statistics and per-token neuron masks: public op and spec.

The patched MLPs of a model call it, and so can any other code. Here is the public function; the
files beside it and `csrc/swiglu_stats*` are the rest.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from relneuron.ops.backends import check_backend_name, choose_backend, triton_module
from relneuron.ops.swiglu_stats.checks import (
    Names,
    check_given,
    check_ids_range,
    check_inputs,
    check_masks,
    check_memory,
    check_out,
    check_statistics,
)
from relneuron.ops.swiglu_stats.cpu_launch import is_eager, ran_quickly, swiglu_stats_cpu
from relneuron.ops.swiglu_stats.gradient import needs_gradient, with_gradient
from relneuron.ops.swiglu_stats.groups import SITES, GroupStats
from relneuron.ops.swiglu_stats.reference import ACTIVATIONS, Call, swiglu_stats_reference
from relneuron.ops.swiglu_stats.repeat import Known, known, likeness, remember

NAMES = Names("swiglu_stats", "gate", "up", SITES, SITES, has_gradient=True)
NAMES_ONLY = NAMES._replace(op="swiglu_stats_only", has_gradient=False)
# Without up there is no product.
UNGATED = NAMES._replace(up=None, sites=("gate", "act"), codes=("gate", "act"))
UNGATED_ONLY = UNGATED._replace(op=NAMES_ONLY.op, has_gradient=False)

# Two threads that add to the same counters would lose some of each other's tokens.
_ADDING = threading.Lock()
if hasattr(os, "register_at_fork"):
    # A process that is forked meanwhile has no thread that would release it.
    os.register_at_fork(after_in_child=_ADDING._at_fork_reinit)  # type: ignore[attr-defined]
_ALONE = nullcontext()


def swiglu_stats(
    gate: Tensor,
    up: Tensor | None,
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

    Without up (None), as in an MLP that is not gated, h = activation(gate).

    Arguments
        gate, up       (T, F) float32|bfloat16|float16, same dtype and device; last stride 1, any
                       row stride (a half of a packed tensor, rows that overlap, an expanded row)
        activation     silu | gelu (erf) | gelu_tanh | relu | relu2 (the square of relu) |
                       quick_gelu (x sigmoid(1.702 x)) | tanh
        stats          a GroupStats of width F on the same device, updated in place
        group_ids      (T,) int32 in [-1, G): the group of each token, -1 = not counted in anything
                       of `stats`. May be left out when G = 1: all tokens are then in group 0
        responses      {site: (N, F) float32}; the value of token t is added to row prompt_ids[t]
        prompt_ids     (T,) int32 in [-1, N), -1 = none
        keep           (C, ceil(F/32)) int32: bit f % 32 of word f // 32 set = neuron f stays
        condition_ids  (T,) int32 in [0, C): the row of `keep` for each token; row 0 if left out
        out            (T, F) tensor for h; like all that is written (stats, responses) it may share
                       memory with no other argument
        ids_checked    True: the caller promises that all ids are in range (saves one look at them)
        backend        auto | reference | cpu | triton; a backend that cannot run here raises; auto
                       is the reference where no kernel can run, and warns once why

    Values. The sites of token t and neuron f are, each rounded to the dtype of gate,
        gate, up, act = activation(gate), product = act * up
    (without up: gate and act) and they are recorded before masking. All arithmetic is IEEE float32
    with one rounding per operation; the activation behind the sites act and product is one fixed
    sequence of operations with an error of a few float32 ulp (ops/swiglu_stats/reference.py), the
    same in every backend. h of the reference is torch's own activation (of quick_gelu, its formula
    in the dtype) times up, bit for bit; h of the other backends is the site product (without up:
    act), which in bfloat16 and float16 differs from torch's h in the last bit of rare elements (of
    quick_gelu, which torch rounds three times, of more). There triton takes a shorter way to act in
    h, sums and responses, unless product is a site: in rare elements it is the neighbouring number,
    also within 1 ulp of torch's. Where `keep` drops a neuron its h is exactly +0, whatever the
    value was (NaN too).

    Statistics. See GroupStats. A response is a float32 sum; non-finite values go into it. T = 0 and
    F = 0 are allowed.

    Exactness. count, tokens, max and n_nonfinite are bit-identical between backends, splits of the
    tokens, thread counts and runs. sum and sum_sq are float64 sums in the order of the tokens, in
    which cpu adds up to 64 tokens at a time, and triton up to 256, in float32 first (a square below
    2^-149 is then 0). Responses are float32 sums in the order of the tokens (triton: in another
    fixed order). So for the same split they are bit-identical between runs, and on a CPU between
    thread counts and instruction sets; only the reference on a GPU leaves the order to torch.
    Subnormal values count also when torch flushes them to zero (`torch.set_flush_denormal`).

    Gradient. That of h, ops/swiglu_stats/gradient.py: d_gate = dh up activation'(gate), d_up = dh
    activation(gate), exactly +0 where `keep` drops a neuron. gate and up may require grad (then
    without `out`), nothing else may; statistics and responses have none. Not inside torch.func or
    vmap, and no tangents. Gradient checkpointing runs a forward twice, which counts twice here
    (`relneuron.instrument` counts once).

    Returns h (T, F) in the dtype of gate: `out` if given. Threads may share `stats` and
    `responses`: calls that add to some take turns.
    """
    _check_activation("swiglu_stats", activation)
    h = run_checked(
        UNGATED if up is None else NAMES,
        gate,
        up,
        activation=activation,
        stats=stats,
        group_ids=group_ids,
        responses=responses,
        prompt_ids=prompt_ids,
        keep=keep,
        condition_ids=condition_ids,
        out=out,
        ids_checked=ids_checked,
        backend=backend,
    )
    assert h is not None, "only without only_stats"
    return h


def swiglu_stats_only(
    gate: Tensor,
    up: Tensor | None,
    *,
    activation: str = "silu",
    stats: GroupStats | None = None,
    group_ids: Tensor | None = None,
    responses: Mapping[str, Tensor] | None = None,
    prompt_ids: Tensor | None = None,
    ids_checked: bool = False,
    backend: str = "auto",
) -> None:
    """The statistics of `swiglu_stats`, without h: for who has h already, or needs none.

    Arguments, statistics and exactness are those of `swiglu_stats`; there is no gradient, and what
    requires grad is refused. cpu reads only what the sites are made of (up for the sites up and
    product) and writes no (T, F) tensor.
    """
    _check_activation("swiglu_stats_only", activation)
    run_checked(
        UNGATED_ONLY if up is None else NAMES_ONLY,
        gate,
        up,
        activation=activation,
        stats=stats,
        group_ids=group_ids,
        responses=responses,
        prompt_ids=prompt_ids,
        keep=None,
        condition_ids=None,
        out=None,
        ids_checked=ids_checked,
        backend=backend,
        only_stats=True,
    )


def _check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")


def run_checked(
    names: Names,
    gate: Tensor,
    up: Tensor | None,
    *,
    activation: str,
    stats: GroupStats | None,
    group_ids: Tensor | None,
    responses: Mapping[str, Tensor] | None,
    prompt_ids: Tensor | None,
    keep: Tensor | None,
    condition_ids: Tensor | None,
    out: Tensor | None,
    ids_checked: bool,
    backend: str,
    only_stats: bool = False,
) -> Tensor | None:
    """Check the arguments and run the op that torch sees; its kin enter here, too.

    Returns h, or None with `only_stats`.
    """
    check_backend_name(names.op, backend)
    given = (stats, group_ids, responses, prompt_ids, keep, condition_ids, ids_checked)
    if backend in ("auto", "cpu") and type(gate) is Tensor and gate.is_cpu and is_eager():
        h = out
        if h is None and not only_stats and gate.layout is torch.strided:
            h = torch.empty_like(gate, memory_format=torch.contiguous_format)
        if (h is None) == only_stats:
            with _ADDING if stats is not None or responses else _ALONE:
                if ran_quickly(names, activation, gate, up, h, *given):
                    return h
    key = None
    if type(gate) is Tensor and (backend == "triton" or gate.is_cuda) and is_eager():
        tensors = (gate, up, out, group_ids, prompt_ids, keep, condition_ids)
        key = likeness(names.op, activation, tensors, stats, responses)
        found = known(key)
        if found is not None:
            if out is None and not only_stats:
                out = torch.empty_like(gate, memory_format=torch.contiguous_format)
            count, tokens, sum, sum_sq, max, n_nonfinite = (
                (None,) * 6 if stats is None else stats._tensors()
            )
            call = Call(
                gate,
                up,
                out,
                activation,
                found.sites,
                0 if stats is None else stats._threshold_bits,
                count,
                tokens,
                sum,
                sum_sq,
                max,
                n_nonfinite,
                group_ids,
                dict(zip(found.response_sites, responses.values(), strict=True))
                if responses
                else {},
                prompt_ids,
                keep,
                condition_ids,
                found,
            )
            _run(call, ids_checked, backend)
            return out
    others = {
        "out": out,
        "group_ids": group_ids,
        "prompt_ids": prompt_ids,
        "keep": keep,
        "condition_ids": condition_ids,
    }
    counters = check_given(names, gate, up, stats, responses, others)
    check_inputs(names, gate, up, out)
    check_statistics(names, gate, stats, group_ids, responses, prompt_ids)
    check_masks(names, gate, keep, condition_ids)
    site_of = dict(zip(names.sites, names.codes, strict=True))
    sites = () if stats is None else tuple([site_of[site] for site in stats.sites])
    response_sites = tuple([site_of[site] for site in responses or ()])
    has_gradient = needs_gradient(gate, up)

    def launch(h: Tensor | None) -> None:
        # Autograd takes its grad mode away, and the quick way is open.
        if has_gradient and gate.is_cpu and backend in ("auto", "cpu") and is_eager():
            with _ADDING if stats is not None or responses else _ALONE:
                if ran_quickly(names, activation, gate, up, h, *given):
                    return
        _swiglu_stats_op(
            gate,
            up,
            h,
            activation,
            ",".join(sites),
            stats._threshold_bits if stats is not None else 0,
            counters.get("count"),
            counters.get("tokens"),
            counters.get("sum"),
            counters.get("sum_sq"),
            counters.get("max"),
            counters.get("n_nonfinite"),
            group_ids,
            ",".join(response_sites),
            list(responses.values()) if responses else [],
            prompt_ids,
            keep,
            condition_ids,
            ids_checked,
            backend,
        )

    if has_gradient:
        check_out(names, gate, out)
        of_h = (gate, up, activation, keep, condition_ids, ids_checked, backend)
        return with_gradient(launch, bool(sites or response_sites), *of_h)
    if out is None and not only_stats:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    launch(out)
    if key is not None:
        remember(key, Known(sites, response_sites))
    return out


# --------------------------------------------------------------------------------------------------
# The op that torch sees: torch's dispatcher picks the backend by device


def _swiglu_stats_impl(
    gate: Tensor,
    up: Tensor | None,
    out: Tensor | None,
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
    _run(call, ids_checked, backend)


def _run(call: Call, ids_checked: bool, backend: str) -> None:
    """Look at what the checks have not seen, addresses and values, and run the call."""
    chosen = choose_backend("swiglu_stats", backend, call.gate.device, call.gate.dtype)
    check_memory(call)
    if not ids_checked:
        check_ids_range(call)
    with _ADDING if call.tokens is not None or call.responses else _ALONE:
        if chosen == "cpu":
            swiglu_stats_cpu(call)
        elif chosen == "triton":
            triton_module("swiglu_stats").swiglu_stats_triton(call)
        else:
            swiglu_stats_reference(call)


# Not torch.library.custom_op: its autograd, of which there is none here, takes more time than a
# small call does (150 of 190 microseconds with this many arguments).
_MUTATED = ("out", "count", "tokens", "sum", "sum_sq", "max", "n_nonfinite", "responses")
torch.library.define(
    "relneuron::swiglu_stats",
    torch.library.infer_schema(_swiglu_stats_impl, mutates_args=_MUTATED),
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("relneuron::swiglu_stats", "CompositeExplicitAutograd", _swiglu_stats_impl)
torch.library.register_fake("relneuron::swiglu_stats", lambda *args: None)
_swiglu_stats_op = torch.ops.relneuron.swiglu_stats.default
