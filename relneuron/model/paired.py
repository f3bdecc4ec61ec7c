"""Two models that read the same tokens, each with its own cache of keys and values.

`ablation/exchange.py` has model A run with products of model B by it: in every forward B runs first
and keeps the products that A then gets (arXiv 2406.14144, dynamic activation patching).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relneuron.artifact.files import RelneuronError
from relneuron.model.ask import cache_of
from relneuron.model.layers import input_device
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.patch import Patch
from relneuron.model.states import LayerState, Tokens

Cache = dict[str, Any] | None  # by the name under which a forward takes it (`ask.cache_of`)


@dataclass(frozen=True)
class Caches:
    """The caches of both models; None where a model was not run."""

    a: Cache
    b: Cache

    @property
    def batch_select_indices(self) -> Callable[[Tensor], None]:
        """Keeps some rows of both, and is there if both can."""
        states = [state for cache in (self.a, self.b) for state in (cache or {}).values()]
        own = [state.batch_select_indices for state in states]

        def select(rows: Tensor) -> None:
            for state_select in own:
                state_select(rows)

        return select


@dataclass(frozen=True)
class Both:
    """What a forward of two models gives: of each row the logits of the model that answers it."""

    logits: Tensor
    past_key_values: Caches

    def __contains__(self, name: str) -> bool:
        return name in vars(self)


class Paired:
    """Stands where a model does: model A, beside which model B runs where its values are needed.

    Both run all rows of a batch, so that two models that are the same compute the same bits. Until
    `begin` says what the rows are, only A runs. Everything else that is asked of it A answers.
    """

    def __init__(self, a: Any, b: Any, parts_b: Sequence[Part], backend: str = "auto") -> None:
        self._a, self._b, self._parts, self._backend = a, b, parts_b, backend
        self._patch: Patch | None = None
        self._from_b: Tensor | None = None
        self._needs_b = False
        self._takes = {id(m): inspect.signature(m.forward).parameters for m in (a, b)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._a, name)

    @contextmanager
    def keeping(self, states: Sequence[LayerState]) -> Iterator[None]:
        """Within it B keeps products as the states of its parts say."""
        with Patch(self._parts, states, backend=self._backend) as patch:
            self._patch = patch
            try:
                yield
            finally:
                self._patch, self._from_b, self._needs_b = None, None, False

    def begin(self, from_b: Tensor, is_patched: Tensor, n_needed: int | None) -> None:
        """Say of the rows of the next forward (b,) which B answers and which get values of B."""
        assert self._patch is not None, "the rows are said within keeping()"
        self._from_b, self._needs_b = from_b, bool((from_b | is_patched).any())
        self._patch.tokens = Tokens(n_needed=n_needed)

    def forward(
        self,
        *,
        past_key_values: Caches | None = None,
        logits_to_keep: int = 0,
        **given: Any,
    ) -> Both:
        """B's forward, if a row needs it, then A's, if it answers any; each with its own cache."""
        from_b, before = self._from_b, past_key_values or Caches(None, None)
        only_b = from_b is not None and bool(from_b.all())
        b: Any = self._run(self._b, given, before.b, logits_to_keep) if self._needs_b else None
        a: Any = None if only_b else self._run(self._a, given, before.a, logits_to_keep)
        ran = (None if out is None or not given["use_cache"] else cache_of(out) for out in (a, b))
        caches = Caches(*ran)
        if a is None or b is None:
            return Both((a or b).logits, caches)
        logits, other = a.logits, b.logits.to(a.logits.device, a.logits.dtype)
        if from_b is not None and bool(from_b.any()):
            logits = torch.where(from_b.to(logits.device)[:, None, None], other, logits)
        return Both(logits, caches)

    __call__ = forward

    def _run(self, model: Any, given: dict[str, Any], cache: Cache, n_logits: int) -> Any:
        device = input_device(model)
        sent = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
        if "logits_to_keep" in self._takes[id(model)]:
            return model(**sent, **(cache or {}), logits_to_keep=n_logits)
        out = model(**sent, **(cache or {}))
        out.logits = out.logits[:, -n_logits:]
        return out


def check_pair(a: Any, b: Any, parts_a: Sequence[Part], parts_b: Sequence[Part]) -> None:
    """Refuse two models whose neurons or tokens do not fit together, with the difference."""
    pairs = ((a, parts_a), (b, parts_b))
    ours, theirs = (
        model_shape(parts) | {"tokens": model.get_input_embeddings().num_embeddings}
        for model, parts in pairs
    )
    if ours != theirs:
        keys = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        said = ", ".join(f"{key} {ours.get(key)} and {theirs.get(key)}" for key in keys)
        raise RelneuronError(
            f"the two models do not fit together: {said}",
            "give a model of the same shape and vocabulary, such as one that was tuned from it",
        )
