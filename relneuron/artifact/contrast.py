"""contrast.safetensors: how far two models' neurons are apart on the same tokens.

`contrast` writes it, `merge` adds several; `identify`, the report and the patching of stored means
read it. It is counts at three sites: a file like counts.safetensors, added and read like one.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np

from relneuron.artifact.counts import DTYPES, Array, Counts

NAME = "contrast.safetensors"
A, B, DIFFERENCE = "a", "b", "difference"
SITES = (A, B, DIFFERENCE)
RMS = "rms"
# Stages of other kinds of study, in whose folder no contrast is begun.
APART = ("prompts", "record", "attribute", "count")
MADE_BY = "contrast MODEL_A MODEL_B PROMPTS -o DIR"


class Contrast(Counts):
    """Statistics of each neuron of two models A and B per group of the tokens that both read.

    groups, tokens, arrays as of `Counts`, with moments, at the sites `a` and `b`, the neuron in
    each model, and `difference`, a - b. Every neuron is taken at the product (what down reads).
    The file has `rms` (L, F) float32 beside them, which follows from them. `contrast.take([name])`
    is the contrast of one group alone.
    """

    SITES: ClassVar[tuple[str, ...]] = SITES
    KEY: ClassVar[str] = "relneuron.contrast"
    WHAT: ClassVar[str] = "file of a contrast"
    MADE_BY: ClassVar[str] = MADE_BY

    def rms(self) -> Array:
        """S = sqrt(sum (a - b)^2 / T) over the T tokens of all groups, (L, F) float64.

        The change score of arXiv 2406.14144: tokens are pooled, each with the same weight. Squares
        are of the differences; where some were not finite, of those that were. NaN for no token.
        """
        n, _, total_sq = self._moments(DIFFERENCE)
        with np.errstate(invalid="ignore"):
            found: Array = np.sqrt(total_sq / n)
        return found

    def tensors(self) -> dict[str, Array]:
        return {**super().tensors(), RMS: self.rms().astype(np.float32)}

    @classmethod
    def of_tensors(cls, groups: list[str], tensors: dict[str, Array]) -> Self:
        """The reverse of `tensors`; raises ValueError for an `rms` of other sums."""
        rms = tensors.pop(RMS, None)
        found = super().of_tensors(groups, tensors)
        missing = {f"{kind}.{site}" for kind in DTYPES for site in SITES} - found.arrays.keys()
        if missing:
            raise ValueError(f"it has no {min(missing)}")
        # Sums of another machine may differ in their last bits.
        if rms is not None and not np.allclose(rms, found.rms(), rtol=1e-6, equal_nan=True):
            raise ValueError(f"its {RMS} is not that of its sums")
        return found

    @classmethod
    def _form(cls, name: str, n_groups: int) -> tuple[tuple[int | None, ...], Any]:
        return ((None, None), np.float32) if name == RMS else super()._form(name, n_groups)
