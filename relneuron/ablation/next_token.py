"""How probable the next token is, with a neuron off and with none: each row of a batch its own.

The cards of `study/cards.py` show it of each neuron's strongest examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.journal import Journal
from relneuron.artifact.neurons import Neuron
from relneuron.model.batches import Budget, cut, pad, shared
from relneuron.model.layers import input_device
from relneuron.model.mlps.shape import Part
from relneuron.model.patch import Patch
from relneuron.model.states import Tokens, mask_states
from relneuron.model.stream.trace import last_logits


class Asked(NamedTuple):
    """The tokens of a text, the one that follows, and the neurons that are off."""

    ids: tuple[int, ...]
    target: int
    off: tuple[Neuron, ...] = ()


def next_probabilities(
    model: Any,
    mlps: Sequence[Part],
    asked: Sequence[Asked],
    budget: Budget,
    *,
    backend: str = "auto",
    journal: Journal | None = None,
    part: str = "",
) -> list[float]:
    """p(target | ids) of each row, with its neurons at zero at every token; rows share batches.

    The softmax is taken in float64. What is asked several times is computed once. With a `journal`
    its processes share the batches, which it calls by `part`.
    """
    rows = sorted(dict.fromkeys(asked), key=lambda one: (len(one.ids), one))

    def ask(batch: list[Asked]) -> list[float]:
        return budget.run(batch, _length, lambda part: _ask(model, mlps, part, backend))

    found: dict[Asked, float] = {}
    batches = cut(rows, _length, budget.planned)
    for batch, said in zip(batches, shared(journal, f"next {part}", batches, ask), strict=True):
        found |= dict(zip(batch, said, strict=True))
    return [found[one] for one in asked]


def _length(one: Asked) -> int:
    return len(one.ids)


@torch.no_grad()
def _ask(model: Any, mlps: Sequence[Part], batch: Sequence[Asked], backend: str) -> list[float]:
    conditions = list(dict.fromkeys(one.off for one in batch))
    states = mask_states(conditions, mlps)
    device = input_device(model)
    tokens, mask = pad([one.ids for one in batch], device)
    place = {off: number for number, off in enumerate(conditions)}
    rows = torch.tensor([place[one.off] for one in batch], dtype=torch.int32, device=device)
    # The model's own activation, so that without a neuron off its numbers are its own.
    with Patch(mlps, states, backend=backend, own_activation=True) as patch:
        patch.tokens = Tokens(conditions=rows, n_needed=1)
        logits = last_logits(model, tokens, mask).double()
    targets = torch.tensor([one.target for one in batch], device=logits.device)
    probs: list[float] = logits.softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
    if not all(prob == prob for prob in probs):
        raise RelneuronError(
            "the model's logits are not finite with neurons switched off", "use --dtype float32"
        )
    return probs
