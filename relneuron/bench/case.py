"""What a case of `relneuron bench` is, and who takes part in one.

bench/suite.py and the files of the other ops make them, bench/timing.py checks and times them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One row of a suite. In average_precision T, F, G are the prompts, columns and relations, in
    logprob_gain the tokens of the vocabulary, neurons and sentences; G of peaks are the windows,
    T of merge_peaks those that are merged."""

    op: str = "swiglu_stats"
    dtype: str = "float32"
    T: int = 2048
    F: int = 11008
    G: int = 12
    layout: str = "sorted"  # how groups lie in the rows, sorted or mixed

    def __str__(self) -> str:
        letters = {"average_precision": "NMR", "logprob_gain": "VKE"}.get(self.op, "TFG")
        sizes = zip(letters, (self.T, self.F, self.G), strict=True)
        shape = " ".join(f"{letter}={size}" for letter, size in sizes)
        return f"{self.op} {self.dtype} {shape} {self.layout}"


@dataclass
class Contestant:
    """Somebody who does a task: how to run it once, and how to know that it is right."""

    name: str
    variant: str  # the task: contestants of one variant give the same result
    run: Callable[[int], object]  # on the input set of that number
    check: Callable[[], None]  # raises AssertionError with what is wrong
    n_bytes: int  # the least that the task moves between memory and processor
    moved_bytes: int  # what the peer's formula moves; of compiled code the least of its task
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    missing: str = ""  # why it cannot run here
    note: str = ""  # what a reader of its times has to know
    is_base: bool = False  # its variant's ratios refer to it, not to the case's first contestant


def near(got: Tensor, want: Tensor, allowed: Tensor, what: str) -> None:
    """AssertionError unless every element is within what is allowed of it; NaN never is."""
    n_wrong = int((~((got - want).abs() <= allowed)).sum())
    assert not n_wrong, f"{n_wrong} of {got.numel()} differ: {what}"
