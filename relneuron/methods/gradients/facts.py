"""Knowledge neurons: a fact's neurons from the attributions of its prompts (arXiv 2104.08696).

`rank.py` calls it. A neuron is its flat place l * F + i, sets of them are ascending (K,) int64.
What the paper says is marked [P], its published code (EleutherAI/knowledge-neurons) [C], and what
neither says [O].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]
Array = np.ndarray[Any, Any]

KINDS = ("adaptive", "absolute", "percentile")
FIRST, STEP, AIM = Fraction(7, 10), Fraction(1, 20), (2, 5)  # the step rule of the paper


def coarse(attributions: Array, kind: str, threshold: float) -> Places:
    """The neurons of one prompt whose attribution (N,) is above tau: its coarse set, section 3.3.

    tau is `threshold` itself ("absolute"), `threshold` times the largest attribution of all layers
    ("adaptive" [P]: 0.2, [C]: 0.3), or that percentile of the attributions ("percentile" [C],
    linear between two). Strict; computed in float64. Without a positive attribution "adaptive" has
    no neuron.
    """
    values = np.asarray(attributions, np.float64).reshape(-1)
    if kind == "percentile":
        tau = float(np.percentile(values, threshold)) if values.size else np.inf
    else:
        tau = threshold * float(values.max(initial=0.0)) if kind == "adaptive" else threshold
    return np.flatnonzero(values > tau)


def counted(sets: Iterable[Places]) -> Counter[int]:
    """In how many sets each neuron is."""
    return Counter(place for one in sets for place in one.tolist())


def refined(sets: Sequence[Places], share: float | Fraction) -> Places:
    """The neurons in more than `share` of a fact's coarse sets, section 3.3 step 3.

    The count must be above share * n; that product is exact in decimals, so that 2 of 4 are not
    above 0.5, nor 29 of 100 above 0.29.
    """
    bar = _exact(share) * len(sets)
    return np.array(sorted(p for p, n in counted(sets).items() if n > bar), np.int64)


def without(chosen: Places, negatives: Iterable[Places]) -> Places:
    """`chosen` but for the neurons that are in the coarse set of a negative prompt.

    The published code means to do this and compares lists with neurons, which removes nothing.
    """
    return np.setdiff1d(chosen, np.concatenate([np.empty(0, np.int64), *negatives]))


class Stepped(NamedTuple):
    """What the step rule ended with: the share, the mean size of the sets, whether it is in aim."""

    share: Fraction
    mean_size: float
    in_aim: bool


def stepped(facts: Sequence[Sequence[Places]], aim: tuple[float, float] = AIM) -> Stepped:
    """The share whose refined sets have a mean size within `aim`: 2 to 5 neurons a fact [P].

    From 0.7 on it goes by 0.05: down where the sets are too small, up where they are too large. A
    step that would come back has nothing to find between the two: the nearer of them is taken, the
    larger share where they are as near [O]. It stays from 0 to 0.95: no neuron is in more than all.
    """
    low, high = aim
    found: dict[Fraction, float] = {}
    share = FIRST
    while share not in found and 0 <= share < 1:
        sizes = [len(refined(sets, share)) for sets in facts]
        found[share] = sum(sizes) / max(len(sizes), 1)
        if low <= found[share] <= high:
            return Stepped(share, found[share], True)
        share += -STEP if found[share] < low else STEP
    best = min(found, key=lambda s: (max(low - found[s], found[s] - high), -s))
    return Stepped(best, found[best], False)


def _exact(share: float | Fraction) -> Fraction:
    """A share as it is written in decimals."""
    return share if isinstance(share, Fraction) else Fraction(repr(float(share)))
