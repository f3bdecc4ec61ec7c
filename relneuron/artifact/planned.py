"""What a stage would take, before it starts: plain data, which `relneuron plan` prints.

Each stage's planner makes one; `Stage.plan` names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Planned:
    """The work and the bytes of a stage that starts from nothing.

    reads      how many of what it reads and asks, by name: prompts, sentences, windows, answers
    batches    with `tokens` of the rows that it plans, and `padded`, what these become in batches
    steps      forwards of one more token each that it makes for certain, as tokens
    more       tokens that may come to them at most, where the model's answers decide
    forwards   (how many, operations of one, bytes of weights that it reads), batches alike in one
    more_forwards   likewise, what may come to them at most, as far as it is told
    tensors    bytes where the model computes, by what they are: weights, activations, ...
    host       bytes besides in the memory of the process
    files      bytes on the disk by file; None where a plan cannot tell them
    neurons    how many each site has in all layers
    layers     how many there are
    device     where the model computes, "cpu" or another one; `dtype`, in which numbers
    notes      what has to be said of the numbers, such as what is a bound
    """

    stage: str
    reads: Mapping[str, int]
    batches: int = 0
    tokens: int = 0
    padded: int = 0
    steps: int = 0
    more: int = 0
    forwards: Sequence[tuple[int, int, int]] = ()
    more_forwards: Sequence[tuple[int, int, int]] = ()
    tensors: Mapping[str, int] = field(default_factory=dict)
    host: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, int | None] = field(default_factory=dict)
    neurons: Mapping[str, int] = field(default_factory=dict)
    layers: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    notes: Sequence[str] = ()

    @property
    def flops(self) -> int:
        """Floating point operations of all forwards that are certain."""
        return sum(n * each for n, each, _ in self.forwards)

    @property
    def more_flops(self) -> int:
        """Those that may come to them at most, as far as they are told."""
        return sum(n * each for n, each, _ in self.more_forwards)

    @property
    def disk(self) -> int:
        """Bytes of the files that are told."""
        return sum(size for size in self.files.values() if size is not None)

    @property
    def memory(self) -> int:
        """Bytes in the memory of the process at most: with the tensors where it computes itself."""
        on_host = sum(self.tensors.values()) if self.device == "cpu" else 0
        return on_host + sum(self.host.values())

    @property
    def on_device(self) -> int:
        """Bytes on a device of its own."""
        return 0 if self.device == "cpu" else sum(self.tensors.values())

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Of the forwards: each as long as its operations take, or as its weights to be read."""
        return _seconds(self.forwards, flops_per_s, bytes_per_s)

    def more_seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Likewise of those that may come to them."""
        return _seconds(self.more_forwards, flops_per_s, bytes_per_s)


def _seconds(
    forwards: Sequence[tuple[int, int, int]], flops_per_s: float, bytes_per_s: float
) -> float:
    return sum(n * max(flops / flops_per_s, read / bytes_per_s) for n, flops, read in forwards)
