"""Which gates are hits at the site act, for the kernels that do not compute its exact value.

`triton_launch.py` gives their limits to the kernels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from relneuron.ops.swiglu_stats import reference


@functools.cache
def _limits_of(
    activation: str, dtype: torch.dtype, threshold_bits: int
) -> tuple[int, int | None] | None:
    """The gates of a 16-bit dtype with act > threshold are gate > high, or -inf < gate < low.

    act falls, then rises with gate. All 65,536 gates are tried, also for what `_moments_kernel`
    uses: that the largest act of any set of finite gates is at its largest or its smallest.
    """
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cpu").to(torch.int16)
    with reference.ieee_arithmetic():
        gate = bits.view(dtype).float()
        gate = gate[~gate.isnan()].sort().values
        act = reference._activation(gate, activation).to(dtype).float()
        threshold = torch.tensor(threshold_bits, dtype=torch.int32, device="cpu")
        is_hit = act > threshold.view(torch.float32)
        misses = gate[~is_hit]
        if len(misses) == 0:
            return None
        high = misses.max()
        is_left = is_hit & (gate < high)
        low = misses[misses > -torch.inf].min() if bool(is_left.any()) else None
        predicted = gate > high
        if low is not None:
            predicted |= (gate < low) & (gate > -torch.inf)
        inside = act[gate.isfinite()]
        turn = int(inside.argmin())
        is_valley = bool((inside[: turn + 1].diff() <= 0).all() & (inside[turn:].diff() >= 0).all())
    if not is_valley or not torch.equal(predicted, is_hit):
        return None

    def float_bits(x: Tensor) -> int:
        return int(x.view(torch.int32))

    return float_bits(high), None if low is None else float_bits(low)
