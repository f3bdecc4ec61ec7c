"""Which sentences the model knows, and what it would say itself.

The `attribute` stage and its scorer call it; what sentences are asked for says `model/targets.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from relneuron.model.batches import Budget
from relneuron.model.stream.parts import ResidualModel
from relneuron.model.stream.trace import trace

N_MOST_PROBABLE = 10  # a kept sentence's answer is among so many (arXiv 2312.12141, section 4)


def type_tokens(targets: Sequence[int], types: Sequence[str]) -> dict[str, Tensor]:
    """Each type's target tokens, (K,) int64, each once and ascending."""
    found: dict[str, set[int]] = {}
    for target, kind in zip(targets, types, strict=True):
        found.setdefault(kind, set()).add(target)
    return {kind: torch.tensor(sorted(tokens), device="cpu") for kind, tokens in found.items()}


def keep(
    logits: Tensor,
    targets: Tensor,
    types: Sequence[str],
    type_tokens: Mapping[str, Tensor],
    rights: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Which sentences the model knows (arXiv 2312.12141, section 4): (E,) bool.

    `logits` (E, V) at the last position, `targets` (E,) int64. A sentence is kept if at most nine
    tokens have a larger logit than its target, and its target a larger one than every other token
    of `type_tokens[type]` but its `rights`, the first tokens of its other right answers. Where
    the type has no other token the first condition alone decides. A target whose logit is not
    finite is not kept.
    """
    own = logits.gather(1, targets[:, None])
    kept = ((logits > own).sum(1) < N_MOST_PROBABLE) & own[:, 0].isfinite()
    for kind in dict.fromkeys(types):
        rows = torch.tensor([i for i, name in enumerate(types) if name == kind], device="cpu")
        rows, tokens = rows.to(logits.device), type_tokens[kind].to(logits.device)
        is_own = tokens == targets[rows, None]
        for i, row in enumerate(rows.tolist() if rights else ()):
            is_own[i] |= torch.isin(tokens, tokens.new_tensor(rights[row]))
        above = (own[rows] > logits[rows[:, None], tokens]) | is_own
        kept[rows] &= above.all(1)
    return kept


def predictions(
    residual: ResidualModel,
    ids: Sequence[list[int]],
    batches: Sequence[Sequence[int]],
    budget: Budget,
) -> list[int]:
    """The model's most probable next token of each sentence, in the batches that are scored."""
    found = [0] * len(ids)

    def ask(rows: list[int]) -> list[int]:
        best: list[int] = trace(residual, [ids[row] for row in rows]).logits.argmax(1).tolist()
        return best

    for rows in batches:
        for row, token in zip(rows, budget.run(rows, lambda row: len(ids[row]), ask), strict=True):
            found[row] = token
    return found
