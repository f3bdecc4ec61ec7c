"""Evaluates neurons for `logprob_gain`: pairs of a neuron and a sentence, exactly or by moments.

ops/logprob_gain/op.py and ops/logprob_gain/search.py call it. `Engine` is what a backend can do;
the sums over the vocabulary are the backend's kernels, all else here is plain torch.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from relneuron.ops.backends import cpu_module, triton_module
from relneuron.ops.logprob_gain.base import UNIT, Base, Pairs, exact_gains, make_pairs
from relneuron.ops.logprob_gain.capped import capped_move, capped_rounding, capped_sums

# The Triton kernels' sums hold while logits move by at most this; what moves further is settled in
# float64.
_LARGEST_MOVE = 60.0
_PAIRS = 1 << 19  # pairs at a time: bounds the memory to about 50 MB
# On a CPU the moments of a neuron cost as much as its exact sums for so many coefficients per
# sentence, and what they leave open costs its inner products twice.
_WORTHWHILE_POSITIONS = 2
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Engine:
    """One backend: reference, cpu or triton."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def gains(self, base: Base, place: Tensor) -> tuple[Tensor, Tensor]:
        """Gains at flat places in the coefficients (E, P, K), and bounds on their rounding errors.

        Both (n,) float64, in the order of `place`.
        """
        if self.backend == "reference":
            gains = exact_gains(base, place)
            return gains, torch.zeros_like(gains)
        gains = torch.empty(len(place), dtype=torch.float64, device=place.device)
        errors = torch.empty_like(gains)
        for start in range(0, len(place), _PAIRS):
            chosen = slice(start, start + _PAIRS)
            gains[chosen], errors[chosen] = self._gains(base, place[chosen])
        return gains, errors

    def _gains(self, base: Base, place: Tensor) -> tuple[Tensor, Tensor]:
        pairs = make_pairs(place, tuple(base.shape))
        t = base.t.reshape(-1)[pairs.place]
        tilt = None if base.tilt is None else base.tilt.reshape(-1)[pairs.place]
        log_sums, largest = self._log_sums(base, pairs, t, tilt)
        neuron = pairs.place % base.shape[2]
        sentence = pairs.sentence.long()
        moved = t.double() * base.target_dot[sentence, neuron]
        if base.head.cap is not None:
            moved = capped_move(base, moved, tilt, sentence)
        gains = moved - log_sums
        reach = t.abs() * base.value_norm[neuron] * base.head.norm
        moves = t.abs() * largest.repeat_interleave(pairs.row_start.diff())
        if tilt is not None:
            tilted = tilt.abs() * base.z_span[sentence]
            reach, moves = reach + tilted, moves + tilted
        # A cap is taken off and put on by plain torch, whose products may be one long chain.
        products = self.backend if base.head.cap is None else "triton"
        rounding = base.sum_rounding(reach, moves, sentence, products)
        if base.head.cap is not None:
            rounding = rounding + capped_rounding(base, moves, sentence)
        errors = rounding.double() + UNIT * gains.abs()
        lost = ~gains.isfinite()
        if bool(lost.any()):
            if bool(largest.isinf().any()):
                _warn_of_products()
            gains[lost] = exact_gains(base, pairs.place[lost])
            errors[lost] = 0.0
        back = torch.empty_like(pairs.order)
        back[pairs.order] = torch.arange(len(back), device=back.device)
        return gains[back], errors[back]

    def _log_sums(
        self, base: Base, pairs: Pairs, t: Tensor, tilt: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """log of the sum over tokens of p exp(t b + tilt z) (n,) float64, NaN where float32 fails,
        and the largest |b| of each neuron (U,)."""
        if base.head.cap is not None:
            return capped_sums(base, pairs, t, tilt)
        if self.backend == "cpu":
            return _cpu_sums(base, pairs, t, tilt)
        kernels = triton_module("logprob_gain")
        sums, largest = kernels.gain_sums(
            base.values[pairs.rows],
            base.head.unembed,
            base.p(),
            pairs.row_start,
            pairs.sentence,
            t,
            tilt,
            base.z,
        )
        counts = pairs.row_start.diff()
        move = t.abs() * largest.repeat_interleave(counts)
        if tilt is not None:
            move += tilt.abs() * base.z_span[pairs.sentence.long()]
        logs = torch.log1p(sums)
        return torch.where((move < _LARGEST_MOVE) & (sums > -0.9), logs, torch.nan), largest

    def all_gains(self, base: Base) -> Tensor:
        """All gains (E, P, K) in the base's own dtype."""
        gains = torch.empty(base.shape, dtype=base.t.dtype, device=base.t.device)
        flat, outer = gains.reshape(-1), base.shape[0] * base.shape[1]
        n_neurons = base.shape[2]
        starts = torch.arange(outer, device=gains.device) * n_neurons
        step = max(1, _PAIRS // max(1, outer))
        # By neuron, so that each block holds every pair of its neurons.
        for first in range(0, n_neurons, step):
            neurons = torch.arange(first, min(n_neurons, first + step), device=gains.device)
            place = (neurons[:, None] + starts).reshape(-1)
            flat[place] = self.gains(base, place)[0].to(gains.dtype)
        return gains

    def certified(self, base: Base, tolerance: float) -> Tensor:
        """All gains (E, P, K), each within `tolerance` of the exact one."""
        if self.backend == "reference":
            return self.all_gains(base)
        reach = base.reach()
        rounding = base.rounding(reach)
        # The variance of what moves by at most `reach` is at most reach^2, and half of it is what
        # the first-order gain can be too large by; its middle is taken. A cap bends both of the
        # target's logit and of the others' mean, by at most bend / 2 * reach^2 to either side.
        square = reach * reach
        gains = base.first_order() - square / 4
        beyond = square / 4 + base.head.bend * square
        is_open = (beyond + rounding > tolerance).reshape(-1)
        flat = gains.reshape(-1)
        if self._wants_moments(base, is_open):
            self._moments(base, reach, flat, is_open, tolerance)
        place = is_open.nonzero()[:, 0]
        exact, errors = self.gains(base, place)
        wrong = errors > tolerance
        exact[wrong] = exact_gains(base, place[wrong])
        flat[place] = exact.to(flat.dtype)
        return gains

    def _wants_moments(self, base: Base, is_open: Tensor) -> bool:
        if base.tilt is not None or base.head.cap is not None or not bool(is_open.any()):
            return False
        if self.backend == "triton":
            return True
        rows = is_open.reshape(-1, base.shape[2])
        n_rows = int(rows.any(0).sum())
        return int(rows.sum()) > _WORTHWHILE_POSITIONS * len(base.x) * n_rows

    def _moments(
        self,
        base: Base,
        reach: Tensor,
        gains: Tensor,
        is_open: Tensor,
        tolerance: float,
    ) -> None:
        """Settle open pairs by M_2 and M_3: writes their gains and closes them in `is_open`."""
        per_sentence, n_neurons = base.shape[1] * base.shape[2], base.shape[2]
        rows = is_open.reshape(-1, n_neurons).any(0).nonzero()[:, 0]
        if self.backend == "cpu":
            second, third, largest = _cpu_moments(base, rows)
        else:
            second, third, largest = triton_module("logprob_gain").moment_sums(
                base.values[rows], base.head.unembed, base.p()
            )
        step = max(1, _PAIRS // max(1, len(rows) * base.shape[1]))
        for start in range(0, len(base.x), step):
            some = slice(start, start + step)
            t = base.t[some][:, :, rows].double()  # (e, P, U)
            direction = base.direction_dot[some, None, rows].double()
            mean = base.target_dot[some, None, rows].double() - direction
            y = t * t * second.T[some, None]
            s = t * mean + y / 2 + t**3 * third.T[some, None] / 6
            x = t.abs() * largest.double()
            remainder = x * x * y * x.exp() / 24
            sentence = torch.arange(start, start + len(t), device=t.device)[:, None, None]
            rounding = base.sum_rounding(
                reach[some][:, :, rows].double(), x, sentence, self.backend
            )
            error = remainder / (1 + s - remainder) + rounding
            # t b_w - log(1 + S), without the cancellation of t b_w and t M_1.
            gain = t * direction + t * mean - torch.log1p(s)
            place = sentence * per_sentence + rows
            place = place + torch.arange(base.shape[1], device=t.device)[:, None] * n_neurons
            done = (error <= tolerance) & (1 + s > remainder) & is_open[place]
            gains[place[done]] = gain[done].to(gains.dtype)
            is_open[place[done]] = False


@functools.cache
def _warn_of_products() -> None:
    warnings.warn(
        "relneuron: logprob_gain is slow: it computes in float64 where this device's products of "
        "matrices are off by more than their bound",
        RuntimeWarning,
        stacklevel=2,
    )


# --------------------------------------------------------------------------------------------------
# The C++ kernel


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _call_cpu(base: Base, rows: Tensor, **given: Any) -> Tensor:
    """Run the kernel on some neurons; returns the largest |b| of each.

    `given` may force an instruction set, `isa`, and a thread count, `n_threads` (tests).
    """
    unembed = base.head.unembed
    if unembed.stride(1) != 1:
        unembed = unembed.contiguous()
    largest = torch.empty(len(rows), device="cpu")
    cpu_module().logprob_gain(
        values=base.values.data_ptr(),
        stride_vk=base.values.stride(0),
        stride_vd=base.values.stride(1),
        values_dtype=_DTYPES.index(base.values.dtype),
        rows=rows.data_ptr(),
        K=len(rows),
        D=unembed.shape[1],
        unembed=unembed.data_ptr(),
        stride_uv=unembed.stride(0),
        unembed_dtype=_DTYPES.index(unembed.dtype),
        V=unembed.shape[0],
        logp=base.logp.data_ptr(),
        E=len(base.x),
        largest=largest.data_ptr(),
        **({"isa": "", "n_threads": torch.get_num_threads()} | given),
    )
    return largest


def _cpu_sums(base: Base, pairs: Pairs, t: Tensor, tilt: Tensor | None) -> tuple[Tensor, Tensor]:
    """`Engine._log_sums` by the C++ kernel."""
    log_sums = torch.empty(len(t), dtype=torch.float64, device="cpu")
    largest = _call_cpu(
        base,
        pairs.rows,
        row_start=pairs.row_start.data_ptr(),
        sentence=pairs.sentence.data_ptr(),
        t=t.data_ptr(),
        tilt=_pointer(tilt),
        z=_pointer(base.z),
        log_sums=log_sums.data_ptr(),
    )
    return log_sums, largest


def _cpu_moments(base: Base, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E_p b^2 and E_p b^3 (U, E) float64 and the largest |b| (U,) of some neurons."""
    second = torch.empty(len(rows), len(base.x), dtype=torch.float64, device="cpu")
    third = torch.empty_like(second)
    largest = _call_cpu(base, rows, second=second.data_ptr(), third=third.data_ptr())
    return second, third, largest
