"""Windows of text, and how well a model reads each of them.

The `nll` stage reads them under every mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from relneuron.artifact.files import RelneuronError
from relneuron.model.batches import is_out_of_memory
from relneuron.model.converse import Step
from relneuron.model.layers import input_device

LOGITS = 2**26  # of a slice of tokens, in float32: 256 MiB

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Texts:
    """Windows to be read, group by group: the group and the ids (n,) int32 of each; n > 1."""

    groups: list[str]
    ids: list[Array]


def read_texts(feed: Any, windows: int) -> Texts:
    """The first `windows` windows of each group; one of a single token has nothing to score."""
    found: dict[int, list[Array]] = {}
    while taken := feed.take(64):
        for window in taken:
            mine = found.setdefault(window.group, [])
            if len(window.ids) > 1 and len(mine) < windows:
                mine.append(window.ids)
    pairs = [(feed.groups[group], ids) for group in sorted(found) for ids in found[group]]
    if not pairs:
        raise RelneuronError("the texts have no window of tokens", "give more text, or --window 32")
    return Texts([group for group, _ in pairs], [ids for _, ids in pairs])


class Scorer:
    """Reads windows of text: the mean NLL of each, whatever its length."""

    def __init__(self, model: Any, ids: Sequence[Array]) -> None:
        self.model, self.ids = model, ids
        self.device = input_device(model)
        self.body = getattr(model, "base_model", model)
        self.head = model.get_output_embeddings()
        self._vocabulary = model.get_input_embeddings().num_embeddings
        largest = max(int(x.max()) for x in ids)
        if largest >= self._vocabulary:
            raise RelneuronError(
                f"the texts hold the token {largest}, the model has {self._vocabulary} tokens",
                "give a model and a tokenizer (or token ids) that belong together",
            )
        self.short = torch.tensor(ids[0][None, :8], dtype=torch.int64, device=self.device)
        self._in_slices = self._reads_in_slices()

    @property
    def notices(self) -> list[str]:
        """What a reader of the results must know of how they came about."""
        if self._in_slices:
            return []
        return ["logits of whole windows: the model does more than its lm_head, scale and softcap"]

    @torch.no_grad()
    def ask(self, rows: list[int], before_step: Callable[[Step], None]) -> list[float]:
        """The mean NLL in nats of tokens 2 to n of each window; its last token is not run."""
        try:
            if self._in_slices:
                return self._read(rows, torch.arange(len(rows), device="cpu"), before_step)
            longest = max(len(self.ids[row]) - 1 for row in rows)
            n = max(1, LOGITS // (longest * self._vocabulary))
            parts = [range(i, min(i + n, len(rows))) for i in range(0, len(rows), n)]
            return [
                nll
                for part in parts
                for nll in self._read(
                    [rows[i] for i in part], torch.tensor(part, device="cpu"), before_step
                )
            ]
        except (RuntimeError, MemoryError) as error:
            if len(rows) > 1 or not is_out_of_memory(error):
                raise
            n_tokens = len(self.ids[rows[0]])
            raise RelneuronError(
                f"out of memory with one window of {n_tokens} tokens", "use a shorter --window"
            ) from error

    def _read(
        self, rows: Sequence[int], places: Tensor, before_step: Callable[[Step], None]
    ) -> list[float]:
        """One forward; `places` are the rows among those that were asked."""
        lengths = torch.tensor([len(self.ids[row]) - 1 for row in rows], device="cpu")
        inside = torch.arange(int(lengths.max()), device="cpu") < lengths[:, None]
        ids, targets = torch.zeros(2, *inside.shape, dtype=torch.int64, device="cpu")
        for i, row in enumerate(rows):
            window = torch.tensor(self.ids[row], dtype=torch.int64, device="cpu")
            ids[i, : lengths[i]], targets[i, : lengths[i]] = window[:-1], window[1:]
        mask = inside.long().to(self.device)
        options = {} if bool(inside.all()) else {"attention_mask": mask}
        before_step(Step(places.to(self.device), mask, 0, mask.shape[1]))
        forward = self.body if self._in_slices else self.model
        out = forward(input_ids=ids.to(self.device), use_cache=False, **options)
        values = out[0] if self._in_slices else out.logits
        flat = values[mask.bool().to(values.device)] if options else values.flatten(0, 1)
        nll = self._token_nll(flat, targets[inside])
        return [float(part.mean()) for part in torch.split(nll, lengths.tolist())]

    def _token_nll(self, values: Tensor, targets: Tensor) -> Tensor:
        """(n,) float64 on the host, from hidden states (n, D) or logits (n, V)."""
        n = max(1, LOGITS // self._vocabulary)
        parts = []
        for one, wanted in zip(torch.split(values, n), torch.split(targets, n), strict=True):
            logits = self._logits(one) if self._in_slices else one
            wanted = wanted.to(logits.device)
            parts.append(F.cross_entropy(logits.float(), wanted, reduction="none").cpu())
        return torch.cat(parts).double()

    def _logits(self, hidden: Tensor) -> Tensor:
        """The logits (n, V) of final hidden states: lm_head, scale and softcap."""
        config = self.model.config.get_text_config()
        logits = self.head(hidden)
        logits = logits * (getattr(config, "logit_scale", None) or 1.0)
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cast(Tensor, logits if cap is None else cap * torch.tanh(logits / cap))

    @torch.no_grad()
    def _reads_in_slices(self) -> bool:
        """Whether the model's logits are `_logits` of its body's output, on a short text."""
        theirs = self.model(input_ids=self.short, use_cache=False).logits
        try:
            ours = self._logits(self.body(input_ids=self.short, use_cache=False)[0])
        except (AttributeError, TypeError, IndexError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return False
        tolerance = 16 * torch.finfo(theirs.dtype).eps * float(theirs.abs().max())
        ours, theirs = ours.to(theirs.device).float(), theirs.float()
        return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance)
