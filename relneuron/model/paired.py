"""Model A with products of model B, which reads the same tokens with a cache of its own.

In every forward B runs first and leaves the products of the chosen neurons; then A runs with them
in the place of its own (arXiv 2406.14144, dynamic activation patching). Where B is an adapter of A
both are rows of one forward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.model.ask import cache_of
from relneuron.model.batches import takes_keep
from relneuron.model.exchange import Exchanged
from relneuron.model.layers import input_device
from relneuron.model.pair import Pair, Taps

Cache = dict[str, Any]  # by the name under which a forward takes it (`ask.cache_of`)
A, B, BOTH = "a", "b", "both"  # which models a batch is run with


@dataclass(frozen=True)
class Caches:
    """What a batch's models have read, and which they are; `twice`: one has the rows of both."""

    which: str
    parts: tuple[Cache, ...]
    n_rows: int
    twice: bool

    @property
    def batch_select_indices(self) -> Callable[[Tensor], None]:
        """Keeps some rows of every cache, and is there if all can."""
        own = [state.batch_select_indices for cache in self.parts for state in cache.values()]
        return partial(_select, own, self.n_rows if self.twice else 0)


def _select(own: list[Callable[[Tensor], None]], n_before: int, rows: Tensor) -> None:
    for select in own:
        select(torch.cat([rows, rows + n_before]) if n_before else rows)


@dataclass(frozen=True)
class Both:
    """What a forward gives: of each row the logits of the model that answers it."""

    logits: Tensor
    past_key_values: Caches | None

    def __contains__(self, name: str) -> bool:
        return name in vars(self)


class Paired(Exchanged):
    """A pair of models as one.

    Both run all rows of a batch in which any row needs both, so that two models that are the same
    compute the same bits.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair.a, pair.mlps[0])
        self._pair = pair
        self._kept: dict[int, Tensor] = {}
        self._keeps = {id(model): takes_keep(model) for model in (pair.a, pair.b)}

    def forward(
        self, *, past_key_values: Caches | None = None, logits_to_keep: int = 0, **given: Any
    ) -> Both:
        """The forward of each model that a row needs; the cache is of both."""
        before = past_key_values
        which = before.which if before else self._which()
        twice = which == BOTH and self._pair.adapter is not None
        run = {A: self._run_a, B: self._run_b, BOTH: self._run_twice if twice else self._run_both}
        parts = before.parts if before else ({}, {})
        outs = run[which](given, parts, logits_to_keep)
        caches = None
        if given["use_cache"]:
            own = tuple(cache_of(out) for out in outs)
            caches = Caches(which, own, len(given["input_ids"]), twice)
        logits = outs[0].logits
        if which == BOTH:
            a, b = logits.chunk(2) if twice else (logits, outs[1].logits)
            assert self.rows is not None, "both models run only for rows that are said"
            from_b = self.rows.is_donor.to(a.device)[:, None, None]
            logits = torch.where(from_b, b.to(a.device, a.dtype), a)
        return Both(logits, caches)

    __call__ = forward

    def _which(self) -> str:
        """Which models the rows of a batch need."""
        if self.rows is None or not bool((self.rows.is_donor | self.rows.is_chosen).any()):
            return A
        return B if bool(self.rows.is_donor.all()) else BOTH

    def _run_a(self, given: Any, parts: Any, n_logits: int) -> list[Any]:
        return [self._run(self._pair.a, given, parts[0], n_logits)]

    def _run_b(self, given: Any, parts: Any, n_logits: int) -> list[Any]:
        adapter = self._pair.adapter
        with adapter.rows(True) if adapter else nullcontext():
            return [self._run(self._pair.b, given, parts[0], n_logits)]

    def _run_both(self, given: Any, parts: Any, n_logits: int) -> list[Any]:
        """Two models, one after the other."""
        with Taps(self._pair.mlps[1], self._keep):
            other = self._run(self._pair.b, given, parts[1], n_logits)
        with Taps(self.mlps, self.see):
            own = self._run(self._pair.a, given, parts[0], n_logits)
        return [own, other]

    def _run_twice(self, given: Any, parts: Any, n_logits: int) -> list[Any]:
        """One forward of A's rows and the adapter's."""
        twice = {k: torch.cat([v, v]) if isinstance(v, Tensor) else v for k, v in given.items()}
        n_rows = len(given["input_ids"])
        is_b = torch.arange(2 * n_rows, device="cpu") >= n_rows
        assert self._pair.adapter is not None, "an adapter's rows are said by it"
        with self._pair.adapter.rows(is_b), Taps(self.mlps, self._see_both):
            return [self._run(self._pair.a, twice, parts[0], n_logits)]

    def _run(self, model: Any, given: dict[str, Any], cache: Cache, n_logits: int) -> Any:
        device = input_device(model)
        sent = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
        if self._keeps[id(model)]:
            return model(**sent, **cache, logits_to_keep=n_logits)
        out = model(**sent, **cache)
        out.logits = out.logits[:, -n_logits:]
        return out

    def _keep(self, number: int, h: Tensor) -> None:
        if number in self.puts:
            self._kept[number] = h[..., self.puts[number].index.to(h.device)]

    def _see_both(self, number: int, h: Tensor) -> Tensor | None:
        if number not in self.puts:
            return None
        a, b = h.chunk(2)
        self._keep(number, b)
        new = self.see(number, a)
        assert new is not None, "there is something to put"
        return torch.cat([new, b])

    def values(self, number: int, own: Tensor) -> Tensor:
        if number not in self._kept:
            raise RelneuronError(
                f"the other model did not call the down map of layer {self.mlps[number].layer}",
                "give the model uncompiled, with its own forward methods",
            )
        return self._kept.pop(number)
