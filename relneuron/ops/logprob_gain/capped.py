"""Sums over the vocabulary of a head whose logits are capped softly, as Gemma 2 caps them.

ops/logprob_gain/engine.py calls it for every backend, as the kernels' sums are of logits that are
linear in the state. Plain torch: a tile of (neurons, tokens) at a time, float32.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from relneuron.ops.logprob_gain.base import UNIT, Base, Pairs, target_logits, uncapped

_TILE = 1 << 20  # numbers of a tile of inner products, or of pairs
_TOKENS = 1 << 12  # of a tile


def _moves(at: Tensor, shrunk: Tensor, change: Tensor) -> Tensor:
    """cap * tanh(y + d) - cap * tanh(y) of y = `at`, d = `change`, with `shrunk` = cap / cosh(y).

    cap sinh(d) / (cosh(y) cosh(y + d)): of a small d no difference of two large numbers.
    """
    return torch.sinh(change) * shrunk / torch.cosh(at + change)


def capped_move(base: Base, change: Tensor, tilt: Tensor | None, sentence: Tensor) -> Tensor:
    """How much the targets' logits move (n,) float64: `change` (n,) is t b of the targets."""
    cap = cast(float, base.head.cap)
    if tilt is not None:
        change = change + tilt.double() * target_logits(base.head, base.x)[sentence, 0]
    at = base.at_target[sentence, 0] / cap
    return _moves(at, cap / torch.cosh(at), change / cap)


def capped_rounding(base: Base, moves: Tensor, sentence: Tensor) -> Tensor:
    """What float32 may change in a sum of moves, beyond what it changes in their b.

    The argument of cosh is off by half an ulp of its parts, sinh, cosh and exp by a few of theirs.
    """
    cap = cast(float, base.head.cap)
    return UNIT * moves * (12 + 4 * base.at_span[sentence] + 2 * moves / cap)


def capped_sums(base: Base, pairs: Pairs, t: Tensor, tilt: Tensor | None) -> tuple[Tensor, Tensor]:
    """log of the sum over tokens of p exp(move) (n,) float64, and the largest |b| (U,).

    The moves are those of the capped logits, b = unembed @ v as ever. NaN where float32 fails.
    """
    head, cap = base.head, cast(float, base.head.cap)
    kind = base.t.dtype
    # Only full products are within the bounds on rounding.
    full = torch.get_float32_matmul_precision() == "highest" or not t.is_cuda
    sums = torch.zeros(len(t), dtype=torch.float64, device=t.device)
    largest = torch.zeros(len(pairs.rows), dtype=kind, device=t.device)
    ends = pairs.row_start.tolist()
    n_tokens = len(head.unembed)
    size = min(n_tokens, _TOKENS)
    p, z = base.p(), base.z
    for tokens in (slice(start, start + size) for start in range(0, n_tokens, size)):
        unembed = head.unembed[tokens].to(kind if full else torch.float64)
        wide = base.x.double() * head.scale[:, None] @ head.unembed[tokens].double().T
        wide = uncapped(head, wide, tokens) / cap
        at, shrunk, weight = wide.to(kind), (cap / torch.cosh(wide)).to(kind), p[:, tokens]
        n_rows = max(1, _TILE // size)
        for first in range(0, len(pairs.rows), n_rows):
            rows = slice(first, min(len(pairs.rows), first + n_rows))
            b = (base.values[pairs.rows[rows]].to(unembed.dtype) @ unembed.T).to(kind)
            largest[rows] = torch.maximum(largest[rows], b.abs().amax(1))
            counts = pairs.row_start[first : rows.stop + 1].diff()
            own = torch.repeat_interleave(counts)
            for begin in range(ends[first], ends[rows.stop], n_rows):
                some = slice(begin, min(ends[rows.stop], begin + n_rows))
                sentence = pairs.sentence[some].long()
                change = t[some, None] * b[own[some.start - ends[first] : some.stop - ends[first]]]
                if tilt is not None:
                    change += tilt[some, None] * cast(Tensor, z)[:, tokens][sentence]
                moves = _moves(at[sentence], shrunk[sentence], change / cap)
                sums[some] += (weight[sentence] * torch.expm1(moves)).sum(1, dtype=torch.float64)
    # Near -1 the logarithm would enlarge what is off in the sum.
    return torch.where(sums > -0.5, torch.log1p(sums), torch.nan), largest
