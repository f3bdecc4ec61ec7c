"""A pass: batches that several processes share, each counted once, from a checkpoint on.

`count` makes one over a corpus and `contrast` one over prompts. The plan depends on what is read
alone, so that every number of processes, and a run that goes on after a kill, has the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from relneuron.artifact.counts import Counts
from relneuron.artifact.files import Json
from relneuron.artifact.journal import progress_bar
from relneuron.model.batches import Budget, batch_sizes, cut
from relneuron.model.checkpoint import Checkpoint, Position, Saver, read_checkpoint
from relneuron.model.ranks import Ranks

AnyFeed = TypeVar("AnyFeed", bound=Any)  # what is read: `Feed`, `PictureFeed`, ...
Item = TypeVar("Item")  # a window, a record, a prompt


class Sharded(Protocol):
    """Options that say which part of the batches is run, (i, n): every n-th from the i-th."""

    @property
    def shard(self) -> tuple[int, int]: ...


class Restart(Exception):
    """Memory ran out in the middle of a forward, some of whose layers have counted."""


def plan_pool(lengths: Sequence[int], groups: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Places of rows in batches of at most `batch_tokens` with padding, or of one row.

    Longest first, so that rows of about the same length share a batch and one that does not fit
    the memory shows at once; rows of the same length stay in their order. Within a batch they
    stand by group: the kernels add up rows of the same group in registers.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches = cut(order, lambda place: lengths[place], batch_tokens)
    return [sorted(batch, key=lambda place: (groups[place], place)) for batch in batches]


@dataclass
class Job(Generic[AnyFeed, Item]):
    """The batches of this process; `stage` is what it is for, `unit` what they are counted in.

    `counter` is a context manager with the methods clear, grow, restore and result of
    methods/counts/counter.Counter; `options` say the shard.
    """

    options: Sharded
    counter: Any
    ranks: Ranks
    budget: Budget
    saver: Saver
    quiet: bool
    waiting: float = 0.0  # seconds, for what is counted
    sizes: dict[str, int] = field(default_factory=dict)  # of the shard's batches: `batch_sizes`

    stage: ClassVar[str] = "count"
    unit: ClassVar[str] = "token"
    kind: ClassVar[type[Counts]] = Counts

    def open(self, state: Json | None) -> AnyFeed:
        """What is read, from a state on."""
        raise NotImplementedError

    def plan(self, feed: AnyFeed, number: int) -> list[tuple[list[Item], int]]:
        """The next batches of all processes, from a number on, and how many units each has."""
        raise NotImplementedError

    def count_batch(self, items: list[Item]) -> None:
        raise NotImplementedError

    def begin(self, start: Checkpoint | None) -> None:
        """What must be known before anything is counted."""

    def length(self, item: Item) -> int:
        """How many tokens an item has in a forward, at most."""
        raise NotImplementedError

    def note(self) -> str:
        """What the progress bar says at its end."""
        return ""

    def run(self, start: Checkpoint | None) -> AnyFeed:
        """Count everything from a checkpoint on; returns what was read, to its end."""
        self.begin(start)
        self.counter.clear()
        # Each share is counted from zero; the first adds to what was counted before.
        if start is not None and self.ranks.share == 0:
            self.counter.restore(start.counts)
        position = start.position if start else Position(None, 0, 0)
        feed = self.open(position.feed)
        bar = progress_bar(
            None, self.stage, self.unit, self.quiet, scale=True, done=position.n_tokens
        )
        try:
            with bar, feed, self.counter:
                self._count_pools(feed, position, bar)
        finally:
            self.waiting += feed.waited_s
        return feed

    def run_in_memory(self) -> AnyFeed:
        """The whole pass; from the last checkpoint again each time the memory is too small."""
        while True:
            with suppress(Restart):
                return self.run(read_checkpoint(self.saver.path, self.saver.inputs, self.kind))

    def _count_pools(self, feed: AnyFeed, position: Position, bar: Any) -> None:
        skip, number, n_tokens = position.done, position.number, position.n_tokens
        self.sizes = batch_sizes([], self.length) | position.own
        shard, of = self.options.shard
        while True:
            begin = feed.state()
            batches = self.plan(feed, number)
            if not batches:
                return
            self.counter.grow(len(feed.groups))
            for place, (members, n) in enumerate(batches[skip:], skip):
                if self.is_mine(number + place):
                    self.count_batch(members)
                n_tokens += n
                if (number + place) % of == shard - 1:
                    more = batch_sizes([members], self.length)
                    self.sizes = {name: n + more[name] for name, n in self.sizes.items()}
                self._show(bar, feed, n_tokens)
                self.saver.look(
                    number + place,
                    lambda: self.counter.result(feed.groups),
                    Position(begin, place + 1, number, n_tokens, self.sizes),
                )
            skip, number = 0, number + len(batches)

    def is_mine(self, number: int) -> bool:
        """Whether this process counts the batch of a number."""
        shard, of = self.options.shard
        return number % of == shard - 1 and number // of % self.ranks.shares == self.ranks.share

    def _show(self, bar: Any, feed: AnyFeed, n_tokens: int) -> None:
        if bar.disable:
            return
        bar.total = feed.expected_tokens
        if note := self.note():
            bar.set_postfix_str(note, refresh=False)
        bar.update(n_tokens - bar.n)
