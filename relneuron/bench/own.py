"""`relneuron bench --with module:function`: a user's own implementation of an op takes part.

bench/suite.py, bench/ranking.py and bench/gain.py add it as a contestant beside the peers. Before
it is timed it is held to the op's contract (`testing.check_backend`), to what the task asks of it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.options import refuse_stray
from relneuron.bench.case import Case
from relneuron.testing import ContractError, check_backend

# The ops whose contestants may be a user's own.
TASKS = ("swiglu_stats", "average_precision", "logprob_gain")
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
    if op == "swiglu_stats":
        if "out" in inspect.signature(function).parameters:
            claims["features"].append("out")
        claims |= {"activations": ["silu"], "sites": ["act"]}
    try:
        check_backend(function, op, device=device, max_elements=MAX_ELEMENTS, **claims)
    except ContractError as error:
        name, reason = next(iter(error.failures.items()))
        cause = reason.split("\n")[1].strip()
        more = len(error.failures) - 1
        return f"{name}: {cause}{f' (and {more} more checks)' if more else ''}"
    return None


def load_own(text: str | None, op: str | None) -> Own | None:
    """The function that `module:function` names; the module may be a file of this folder."""
    if text is None:
        return None
    if op is None:
        refuse_stray("--with", "with an OP")
    if op not in TASKS:
        raise RelneuronError(
            f"the bench of {op} takes no --with {text}", f"use {', '.join(TASKS)}", 2
        )
    module_name, _, path = text.partition(":")
    if not module_name or not path:
        raise RelneuronError(
            f"--with {text!r} is not module:function", "name both, such as --with mine:my_op", 2
        )
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for name in path.split("."):
            found = getattr(found, name)
    except Exception as error:  # what a module of the user's raises is not ours
        raise RelneuronError(
            f"--with {text}: {type(error).__name__}: {error}",
            "name a module that Python finds from this folder, and a function in it",
            2,
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(found) or not _is_known(found):
        raise RelneuronError(
            f"--with {text} is a {type(found).__name__}, no function of Python's",
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
