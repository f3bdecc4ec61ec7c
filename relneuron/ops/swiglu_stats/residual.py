"""The residual addition behind down_proj, with the statistics and masks of `swiglu_stats`.

It is the same kernel with an addition in place of the gated product, so that the output of
down_proj is counted and switched off in the pass that a decoder layer makes anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from relneuron.ops.swiglu_stats.checks import Names
from relneuron.ops.swiglu_stats.groups import DOWN, GroupStats
from relneuron.ops.swiglu_stats.op import run_checked
from relneuron.ops.swiglu_stats.reference import RESIDUAL

_NAMES = Names("residual_stats", "x", "residual", (DOWN,), ("gate",))


def residual_stats(
    x: Tensor,
    residual: Tensor,
    *,
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
    """y = residual + x where a neuron stays and residual where it is off; x is counted per group.

    x             (T, D) float32|bfloat16|float16, the output of down_proj: the site "down"
    residual      (T, D) like x
    stats         a GroupStats of width D with sites=("down",), updated in place
    responses     {"down": (N, D) float32}

    The other arguments, the statistics and their exactness are those of `swiglu_stats`, with D for
    F. x is recorded before masking. The sum is taken in float32 and rounded once to the dtype, as
    torch does, so y is bit-identical in all backends.

    Returns y (T, D): `out` if given, which may share memory with no other argument.
    """
    y = run_checked(
        _NAMES,
        x,
        residual,
        activation=RESIDUAL,
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
    assert y is not None, "only without only_stats"
    return y
