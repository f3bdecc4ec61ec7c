"""The pass of `record` over the prompts: it fills a place with their responses, batch by batch.

What is stored of a batch is in the journal behind it; where a GPU computes, the next batch is under
way by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from relneuron.artifact.journal import Journal
from relneuron.methods.responses.places import Place
from relneuron.methods.responses.sums import Scratch, Sums, zeros
from relneuron.model.ask import Asker
from relneuron.model.batches import Budget, pad
from relneuron.model.converse import Step
from relneuron.model.layers import device_of
from relneuron.model.mlps.shape import Part
from relneuron.model.patch import Patch
from relneuron.model.questions import Questions
from relneuron.model.ranks import Ranks
from relneuron.model.states import Tokens


def pooled_tokens(mask: Tensor, *, pooling: str, exclude_bos: bool) -> Tensor:
    """Which tokens (B, T) of a left- or right-padded batch enter a prompt's response, as bool.

    `mean` takes all effective tokens, BOS among them (arXiv 2502.17355, section 3.2, with the
    reading of methods A6); `exclude_bos` leaves out the first; `last` takes the last one only.
    """
    rank = mask.cumsum(1)
    chosen = mask.bool()
    if pooling == "last":
        return chosen & (rank == rank[:, -1:])
    if exclude_bos:
        chosen = chosen & (rank > 1)
    return chosen


class Filling:
    """A place that is filled while the model goes on: a batch is stored beside the next one.

    Where all computes on the CPU there is nothing to go on beside, and it is stored at once.
    """

    def __init__(self, place: Place, mlps: Sequence[Part], sites: Sequence[str]) -> None:
        self.place, self._mlps, self._sites = place, mlps, sites
        is_away = any(device_of(mlp.module).type != "cpu" for mlp in mlps)
        self._beside = ThreadPoolExecutor(1) if is_away and place.on_host else None
        # A batch that is stored beside the next one has memory of its own.
        self._zeros = zeros if self._beside is not None else Scratch().zeros
        self._coming: list[Callable[[], object]] = []
        self._waiting: list[tuple[Callable[[], object], list[Callable[[], object]]]] = []

    def sums(self, n_rows: int) -> Sums:
        # Beside the next batch rows are taken in another order.
        room = self.place.room(n_rows) if self._beside is None else {}
        return Sums(self._mlps, self._sites, n_rows, self._zeros, room)

    def store(self, sums: Sums, rows: Sequence[int]) -> None:
        """Store what a forward has summed up."""
        arrived = sums.sections(on_host=self.place.on_host)

        def put() -> None:
            self.place.store(arrived(), rows)

        if self._beside is None:
            put()
        else:
            self._coming.append(self._beside.submit(put).result)

    def then(self, note: Callable[[], object]) -> None:
        """Call `note` when all is stored of the batch before it, at the latest behind the next."""
        self._waiting.append((note, self._coming))
        self._coming = []
        self.settle(1 if self._beside is not None else 0)

    def settle(self, left: int = 0) -> None:
        """Wait for all batches but the last `left`."""
        while len(self._waiting) > left:
            note, coming = self._waiting.pop(0)
            for wait in coming:
                wait()
            note()

    def __enter__(self) -> Filling:
        return self

    def __exit__(self, *_: object) -> None:
        if self._beside is not None:
            self._beside.shutdown(cancel_futures=True)


def _pooled(ids: Sequence[Sequence[int]], device: torch.device, pooling: dict[str, Any]) -> Tokens:
    """Which tokens of a batch of prompts enter whose response.

    Made on the host, where the prompts are known, so that nothing waits for the device.
    """
    _, mask = pad(ids, torch.device("cpu"))
    chosen = pooled_tokens(mask, **pooling)
    rows = torch.arange(len(ids), device="cpu")[:, None]
    owners = torch.where(chosen, rows, -1)
    places = chosen.reshape(-1).nonzero().squeeze(1)
    made = owners.int(), places, owners.reshape(-1)[places]
    prompt_ids, *pooled = (x.to(device, non_blocking=True) for x in made)
    return Tokens(prompt_ids=prompt_ids, pooled=(pooled[0], pooled[1]))


def ask_all(
    asker: Asker,
    questions: Questions,
    filling: Filling,
    journal: Journal,
    patch: Patch,
    *,
    batches: Sequence[Sequence[int]],
    budget: Budget,
    pooling: dict[str, Any],
    validate: bool,
    ranks: Ranks,
    bar: Any,
) -> None:
    """Ask (or only read) every batch that the journal lacks; det batches leave responses, too.

    Of a batch that was asked before, whose responses are no longer there, they are read again, in
    the same forwards: what enters a prompt's response is computed before anything is answered.
    """
    # Only what is said is kept: no log-probability of what follows a space is asked for.
    asked = Questions(questions.prompts, questions.ids, questions.answers)
    place, parts = filling.place, list[int]()

    def forward(rows: list[int], reads: bool) -> list[str]:
        ids = [questions.ids[row] for row in rows]

        def pool_the_prompt(step: Step) -> None:
            is_first = step.n_answer == 0
            patch.tokens = _pooled(ids, asker.device, pooling) if is_first else Tokens()

        sums = filling.sums(len(rows)) if place.wants(rows) else None
        try:
            if sums is not None:
                for state, own in zip(patch.states, sums.of, strict=True):
                    state.responses = own
            if reads:
                asker.read(questions, rows, pool_the_prompt)
                said = [""] * len(rows)
            else:
                said = asker.ask(asked, rows, pool_the_prompt).predictions
        finally:
            for state in patch.states:
                state.responses = None
        if sums is not None:
            filling.store(sums, rows)
        parts.append(len(rows))
        return said

    def note(number: int, rows: Sequence[int], said: list[str], sizes: list[int]) -> None:
        # How memory had it cut, so that it can be read again in the same forwards.
        cuts = {"parts": sizes} if len(sizes) > 1 else {}
        value = {"predictions": said, **place.noted(rows), **cuts}
        if journal.done.get(str(number)) != value:
            journal.add(str(number), value)

    known = {n: journal.done[str(n)] for n in range(len(batches)) if str(n) in journal.done}
    again = [n for n, value in known.items() if place.lacks(batches[n], value)]
    # Not in the smaller batches of a budget that was cut later.
    as_before = Budget(budget.planned, budget.oom)
    for number in again[ranks.share :: ranks.shares]:
        rows, before = batches[number], known[number]
        sizes: list[int] = []
        for size in before.get("parts", [len(rows)]):
            part = rows[sum(sizes) :][:size]
            as_before.run(part, questions.length, partial(forward, reads=True))
            sizes.append(size)
        filling.then(partial(note, number, rows, before["predictions"], sizes))
    for number, rows in enumerate(batches):
        if journal.takes(str(number)):
            parts.clear()
            said = budget.run(rows, questions.length, partial(forward, reads=not validate))
            filling.then(partial(note, number, rows, said, [*parts]))
        bar.update(len(rows))
    filling.settle()
    journal.together()
