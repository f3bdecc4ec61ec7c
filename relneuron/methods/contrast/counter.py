"""The statistics of two models on the same tokens, added up batch by batch.

`job.py` runs it over the prompts, the bench file times it beside the bare forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron import ops
from relneuron.artifact.contrast import Contrast
from relneuron.artifact.counts import DTYPES
from relneuron.model.counting import TOKENS, fill, tables
from relneuron.model.layers import device_of
from relneuron.model.mlps.shape import model_shape
from relneuron.model.pair import Held, Pair, Rows, read_both
from relneuron.model.states import LayerState


class PairCounter:
    """Of each MLP and group: count above 0, sums, squares and maxima of A, B and A - B."""

    def __init__(self, pair: Pair, n_groups: int, backend: str = "auto") -> None:
        self.pair, self.n_groups, self.backend = pair, n_groups, backend
        self.mlps = pair.mlps[1]  # where B's run is where both are compared
        self.shape = model_shape(self.mlps)
        self.states: list[LayerState] = []
        self.held = Held()
        self.clear()

    def __enter__(self) -> PairCounter:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def clear(self) -> None:
        """Begin again."""
        self.states = [LayerState(stats=self._new(mlp)) for mlp in self.mlps]

    def _new(self, mlp: Any) -> ops.GroupStats:
        return ops.GroupStats(
            groups=self.n_groups,
            width=mlp.width,
            sites=ops.PAIR_SITES,
            moments=True,
            device=device_of(mlp.product.module),
        )

    def grow(self, n_groups: int) -> None:
        """All groups of the prompts are known from the beginning."""
        assert n_groups == self.n_groups, "the groups are those of all prompts"

    def count(self, rows: Rows, group_ids: Tensor) -> None:
        """Both models read the rows; their tokens count in their groups (B, T), -1 in none."""
        flat = group_ids.reshape(-1)

        def add(number: int, a: Tensor, b: Tensor) -> None:
            stats = self.states[number].stats
            assert stats is not None, "each MLP has statistics"
            ops.pair_stats(
                *(h.reshape(-1, h.shape[-1]) for h in (a, b)),
                stats=stats,
                group_ids=flat.to(b.device),
                ids_checked=True,
                backend=self.backend,
            )

        read_both(self.pair, rows, add, self.held)

    def result(self, groups: Sequence[str]) -> Contrast:
        """What was counted so far, on the host."""
        n, n_layers, width = self.n_groups, self.shape["layers"], self.shape["width"]
        found: dict[str, np.ndarray[Any, Any]] = {}
        for mlp, state in zip(self.mlps, self.states, strict=True):
            for name, table in tables(mlp, state).items():
                values = table.cpu().numpy()
                if name == TOKENS:
                    found[name] = values.copy()
                    continue
                kind = name.partition(".")[0]
                if name not in found:
                    empty = -np.inf if kind == "max" else 0
                    found[name] = np.full((n, n_layers, width), empty, DTYPES[kind])
                found[name][:, mlp.layer, mlp.inside] = values
        return Contrast.of_tensors(list(groups), found)

    def restore(self, found: Contrast) -> None:
        """Go on from what was counted before."""
        saved = {**found.arrays, TOKENS: found.tokens}
        for mlp, state in zip(self.mlps, self.states, strict=True):
            given = {
                name: torch.from_numpy(
                    (array if name == TOKENS else array[:, mlp.layer, mlp.inside]).copy()
                )
                for name, array in saved.items()
            }
            fill(mlp, state, given)
