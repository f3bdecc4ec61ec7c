"""`relneuron bench --with module:function`: a user's own implementation of an op takes part.

It is a contestant beside the peers of the op. Before it is timed it is held to the op's contract
(`testing.check_backend`), to what the task asks of it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.options import refuse_stray
from relneuron.artifact.stage import load_own
from relneuron.bench.case import Case
from relneuron.testing import OPS, ContractError, check_backend

# A call of the contract with more elements than this is left out: the bench has large calls itself.
MAX_ELEMENTS = 20_000


@dataclass(frozen=True)
class Own:
    """The function, called as the op is, and how the table names it."""

    name: str
    function: Callable[..., Any]

    def missing(self, *arguments: str) -> str:
        """Why it has no part in a task: the arguments that it does not take."""
        known = self._parameters()
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
            return ""
        lacking = [name for name in arguments if name not in known]
        return f"it takes no {', '.join(lacking)}" if lacking else ""

    @property
    def takes_out(self) -> bool:
        """Whether it says that h can be written where the caller wants it."""
        return "out" in self._parameters()

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    def verify(self, case: Case, device: str, *features: str) -> None:
        """AssertionError in one line unless it holds the op's contract, of what a case needs."""
        reason = _broken(self.function, case.op, case.dtype, device, features)
        assert reason is None, reason


@functools.cache
def _broken(
    function: Callable[..., Any], op: str, dtype: str, device: str, features: tuple[str, ...]
) -> str | None:
    claims: dict[str, Any] = {"dtypes": [getattr(torch, dtype)], "features": list(features)}
    if op == "swiglu_stats" and "out" in inspect.signature(function).parameters:
        claims["features"].append("out")
    if OPS[op].activations:
        claims |= {"activations": ["silu"], "sites": ["act"]}
    try:
        check_backend(function, op, device=device, max_elements=MAX_ELEMENTS, **claims)
    except ContractError as error:
        name, reason = next(iter(error.failures.items()))
        cause = reason.split("\n")[1].strip()
        more = len(error.failures) - 1
        return f"{name}: {cause}{f' (and {more} more checks)' if more else ''}"
    return None


def find_own(text: str | None, op: str | None) -> Own | None:
    """The function that `module:function` names; the module may be a file of this folder."""
    if text is None:
        return None
    if op is None:
        refuse_stray("--with", "with an OP")
    found = load_own("--with", text, "the arguments of the op")
    if not _is_known(found):
        raise RelneuronError(
            f"--with {text}: Python does not know its arguments",
            "name a function that is written in Python, or wrap it in one",
            2,
        )
    return Own(text, found)


def _is_known(function: Callable[..., Any]) -> bool:
    """Whether Python knows its arguments; of some C functions it does not."""
    try:
        inspect.signature(function)
    except ValueError:
        return False
    return True
