"""The batches of a contrast: prompts of about one length, read by both models.

`contrast.py` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from relneuron.artifact.contrast import Contrast
from relneuron.artifact.counts import Counts
from relneuron.artifact.files import Json
from relneuron.methods.contrast.counter import PairCounter
from relneuron.methods.contrast.lines import Lines
from relneuron.methods.contrast.options import ContrastOptions
from relneuron.model.batches import cut
from relneuron.model.passes import Job, Restart, plan_pool


@dataclass
class Plan:
    """All prompts as one pool of batches; `state` says whether it was taken."""

    lines: Lines
    is_taken: bool = False
    waited_s: float = 0.0

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def groups(self) -> list[str]:
        return self.lines.groups

    @property
    def expected_tokens(self) -> int:
        return len(self.lines.group_of)

    def state(self) -> Json:
        return {"is_taken": self.is_taken}


@dataclass
class ContrastJob(Job[Plan, int]):
    """The batches of this process; an item is a prompt's place."""

    options: ContrastOptions
    counter: PairCounter
    lines: Lines = field(kw_only=True)
    n_tokens: int = 0  # that each model read, padding left out

    stage: ClassVar[str] = "contrast"
    unit: ClassVar[str] = "prompt"
    kind: ClassVar[type[Counts]] = Contrast

    def open(self, state: Json | None) -> Plan:
        return Plan(self.lines, **(state or {}))

    def plan(self, feed: Plan, number: int) -> list[tuple[list[int], int]]:
        if feed.is_taken:
            return []
        feed.is_taken = True
        lengths = [self.lines.length(row) for row in range(len(self.lines.group_of))]
        batches = plan_pool(lengths, self.lines.group_of, self.options.batch_tokens)
        return [(rows, len(rows)) for rows in batches]

    def length(self, item: int) -> int:
        return self.lines.length(item)

    def count_batch(self, items: list[int]) -> None:
        for part in cut(items, self.lines.length, self.budget.tokens):
            if not self.budget.attempt(part, self.lines.length, self._count):
                raise Restart

    def _count(self, part: Sequence[int]) -> bool:
        rows, groups, n_tokens = self.lines.read(part)
        self.counter.count(rows, groups)
        self.n_tokens += n_tokens
        return True
