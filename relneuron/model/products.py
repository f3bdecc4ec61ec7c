"""What listed neurons give at the last token of each prompt: their products, of one pass.

The probe of `methods/contrast/` reads them. A product is what a layer's down map reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relneuron.artifact.dense import rows_digest
from relneuron.artifact.journal import Journal
from relneuron.model.batches import Budget, pad, plan_batches
from relneuron.model.mlps.mlp import MLP
from relneuron.model.pair import read_one
from relneuron.model.patch import StatisticsDone
from relneuron.model.questions import Questions

Array = np.ndarray[Any, Any]


def last_products(
    model: Any,
    mlps: Sequence[MLP],
    questions: Questions,
    neurons: Sequence[tuple[int, int]],
    budget: Budget,
    advance: Callable[[int], object] = lambda _: None,
    *,
    journal: Journal | None = None,
    found: Array | None = None,
) -> Array:
    """(N, K) float32: of N prompts the products of K neurons (layer, index) at the last token.

    `mlps` are those that text runs (`pair.running`). Only the listed columns leave the device, and
    a forward ends behind the last layer that has one. With a `journal` its processes share the
    batches, and `found` is the file that all of them write rows of.
    """
    columns: dict[int, tuple[list[int], list[int]]] = {}
    for k, (layer, index) in enumerate(neurons):
        number = next(
            n
            for n, mlp in enumerate(mlps)
            if mlp.layer == layer and mlp.inside.start <= index < mlp.inside.stop
        )
        here, inside = columns.setdefault(number, ([], []))
        here.append(k)
        inside.append(index - mlps[number].inside.start)
    last = max(columns)
    if found is None:
        found = np.zeros((len(questions.ids), len(neurons)), np.float32)

    def read(rows: list[int]) -> list[Array]:
        ids, mask = pad([questions.ids[row] for row in rows], torch.device("cpu"))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        values = np.zeros((len(rows), len(neurons)), np.float32)

        def see(number: int, h: Tensor) -> None:
            if number in columns:
                here, inside = columns[number]
                chosen = h[:, -1, torch.tensor(inside, device=h.device)]
                values[:, here] = chosen.float().cpu().numpy()
            if number == last:
                raise StatisticsDone

        read_one(model, mlps[: last + 1], (ids, mask, positions), see)
        return list(values)

    for number, batch in enumerate(plan_batches(questions, budget.planned)):
        if journal is None or journal.takes(str(number)):
            said = budget.run(batch, questions.length, read)
            found[batch] = np.stack(said)
            if journal is not None:
                journal.add(str(number), {"rows": batch, "digest": rows_digest([found], batch)})
        advance(len(batch))
    if journal is not None:
        journal.together()
    return found
