"""The batches of one process, counted from a checkpoint on: windows of text, or records.

`count.py` runs it; `pictured.py` makes its batches of records with pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from relneuron.artifact.files import Json
from relneuron.artifact.journal import progress_bar
from relneuron.methods.counts.batches import (
    Ranks,
    check_vocabulary,
    make_batch,
    plan_pool,
    pool_windows,
)
from relneuron.methods.counts.counter import (
    Checkpoint,
    Counter,
    Position,
    Saver,
    Speed,
    read_checkpoint,
)
from relneuron.model.batches import Budget, cut
from relneuron.texts.feed import Feed
from relneuron.texts.options import CountOptions
from relneuron.texts.sources import Source
from relneuron.texts.windows import Packing, Window

AnyFeed = TypeVar("AnyFeed", bound=Any)  # what a job reads: `Feed` or `PictureFeed`
Item = TypeVar("Item")  # a window or a record


class Restart(Exception):
    """Memory ran out in the middle of a forward, some of whose layers have counted."""


@dataclass
class Job(Generic[AnyFeed, Item]):
    """The batches of this process; `unit` is what they are counted in."""

    sources: Sequence[Source]
    options: CountOptions
    counter: Counter
    speed: Speed
    ranks: Ranks
    budget: Budget
    saver: Saver
    quiet: bool
    waiting: float = 0.0  # seconds, for what is counted

    unit = "token"

    def open(self, state: Json | None) -> AnyFeed:
        """What is read, from a state on."""
        raise NotImplementedError

    def plan(self, feed: AnyFeed, number: int) -> list[tuple[list[Item], int]]:
        """The next batches of all processes, from a number on, and how many units each has."""
        raise NotImplementedError

    def count_batch(self, items: list[Item]) -> None:
        raise NotImplementedError

    def run(self, start: Checkpoint | None) -> AnyFeed:
        """Count everything from a checkpoint on; returns what was read, to its end."""
        self.counter.clear()
        # Each share is counted from zero; the first adds to what was counted before.
        if start is not None and self.ranks.share == 0:
            self.counter.restore(start.counts)
        position = start.position if start else Position(None, 0, 0)
        feed = self.open(position.feed)
        is_quiet = self.quiet or self.ranks.rank > 0
        bar = progress_bar(None, "count", self.unit, is_quiet, scale=True, done=position.n_tokens)
        try:
            with bar, feed, self.counter:
                self._count_pools(feed, position, bar)
        finally:
            self.waiting += feed.waited_s
        return feed

    def run_in_memory(self, folder: Path, inputs: Json) -> AnyFeed:
        """The whole count; from the last checkpoint again each time the memory is too small."""
        while True:
            with suppress(Restart):
                return self.run(read_checkpoint(folder, inputs))

    def _count_pools(self, feed: AnyFeed, position: Position, bar: Any) -> None:
        skip, number, n_tokens = position.done, position.number, position.n_tokens
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
                self._show(bar, feed, n_tokens)
                self.saver.look(
                    number + place,
                    lambda: self.counter.result(feed.groups),
                    Position(begin, place + 1, number, n_tokens),
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
        if self.speed.share is not None:
            bar.set_postfix_str(f"{self.speed.share:.2f} of the bare forward", refresh=False)
        bar.update(n_tokens - bar.n)


@dataclass
class TextJob(Job[Feed, Window]):
    """Windows of text: some of about one length in a batch."""

    tokenizer: Any = None
    packing: Packing | None = None
    vocabulary: int = 0

    def open(self, state: Json | None) -> Feed:
        assert self.packing is not None
        return Feed(
            self.sources,
            self.tokenizer,
            self.packing,
            vocabulary=self.vocabulary,
            state=state,
            n_workers=self.options.workers,
        )

    def plan(self, feed: Feed, number: int) -> list[tuple[list[Window], int]]:
        pool = feed.take(pool_windows(feed.packing.window, self.options.batch_tokens))
        lengths = [len(window.ids) for window in pool]
        groups = [window.group for window in pool]
        batches = plan_pool(lengths, groups, self.options.batch_tokens)
        return [([pool[i] for i in own], sum(lengths[i] for i in own)) for own in batches]

    def count_batch(self, items: list[Window]) -> None:
        for part in cut(items, _length, self.budget.tokens):
            if not self.budget.attempt(part, _length, self._count_forward):
                raise Restart

    def _count_forward(self, windows: Sequence[Window]) -> bool:
        batch = make_batch(
            windows,
            not_counted=self.tokenizer.bos_token_id if self.options.exclude_bos else None,
            by_document=self.options.boundaries == "position",
        )
        check_vocabulary(batch, self.vocabulary)
        self.speed.count(batch)
        return True


def _length(window: Window) -> int:
    return len(window.ids)
