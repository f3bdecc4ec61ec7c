"""A run of a stage that dies at one of its steps, in this process, as by a kill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from relneuron.artifact.journal import Journal


class Killed(BaseException):
    """As a kill: nothing catches it, and nothing is saved on the way out."""


class Points:
    """Counts some steps of a run, and dies before the `last` one."""

    def __init__(self, last: int, steps: Sequence[tuple[Any, str]]) -> None:
        self.last, self.steps, self.n = last, steps, 0

    def __enter__(self) -> Points:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(Journal, "SAVE_EVERY_S", 0.0)
        for owner, name in self.steps:
            self._count(owner, name)
        return self

    def _count(self, owner: Any, name: str) -> None:
        true = getattr(owner, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            self.n += 1
            if self.n == self.last:
                raise Killed
            return true(*args, **kwargs)

        self.patch.setattr(owner, name, step)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
