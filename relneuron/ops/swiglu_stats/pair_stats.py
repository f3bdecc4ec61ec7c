"""Two tensors of the same tokens and their difference, with the statistics of `swiglu_stats`.

It is the same kernel with a subtraction in place of the activation and nothing to write, so that
what two models give for the same tokens is compared in one reading of both.
"""

from __future__ import annotations

from torch import Tensor

from relneuron.ops.swiglu_stats.checks import Names
from relneuron.ops.swiglu_stats.groups import PAIR_SITES, GroupStats
from relneuron.ops.swiglu_stats.op import run_checked
from relneuron.ops.swiglu_stats.reference import DIFFERENCE

_NAMES = Names("pair_stats", "a", "b", PAIR_SITES, ("gate", "up", "act"))


def pair_stats(
    a: Tensor,
    b: Tensor,
    *,
    stats: GroupStats,
    group_ids: Tensor | None = None,
    ids_checked: bool = False,
    backend: str = "auto",
) -> None:
    """Count a, b and a - b per group of tokens, in place; nothing of their shape is made.

    a, b          (T, F) float32|bfloat16|float16, same dtype and device; last stride 1, any row
                  stride; they may be one tensor, or share memory
    stats         a GroupStats of width F with sites among a, b and difference, updated in place
    group_ids     (T,) int32 in [-1, G), -1 = not counted; may be left out when G = 1
    ids_checked   True: the caller promises that all ids are in range
    backend       auto | reference | cpu | triton, as in `swiglu_stats`

    The difference is a - b in float32, rounded once and never to the dtype of a and b, so where a
    and b are within a factor of two it is exact. Its squares are summed as they are, not made of
    the moments of a and b, which lose it where it is small: the root mean square of the changes of
    neuron f over the tokens J of group g (Chen et al., arXiv 2406.14144, the change score)

        S[g, f] = sqrt(sum over J of (a - b)^2 / |J|)
                = sqrt(stats.sum_sq["difference"][g, f] / stats.tokens[g])

    if all differences are finite: see n_nonfinite. infinity - infinity is NaN; a difference of
    finite numbers that is beyond float32 is infinite.

    Statistics and their exactness are those of `swiglu_stats`. T = 0 and F = 0 are allowed; what
    does not fit is a ValueError, another type than GroupStats a TypeError.
    """
    if not isinstance(stats, GroupStats):
        raise TypeError(f"pair_stats: stats must be a GroupStats, got {type(stats).__name__}")
    run_checked(
        _NAMES,
        a,
        b,
        activation=DIFFERENCE,
        stats=stats,
        group_ids=group_ids,
        responses=None,
        prompt_ids=None,
        keep=None,
        condition_ids=None,
        out=None,
        ids_checked=ids_checked,
        backend=backend,
        only_stats=True,
    )
