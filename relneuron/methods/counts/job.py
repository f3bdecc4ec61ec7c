"""The batches of one process, counted from a checkpoint on: windows of text, or records.

`count.py` runs it; `pictured.py` makes its batches of records with pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from relneuron.artifact.files import Json
from relneuron.methods.counts.batches import Batch, check_vocabulary, make_batch, pool_windows
from relneuron.methods.counts.counter import Speed
from relneuron.model.batches import cut
from relneuron.model.checkpoint import Checkpoint
from relneuron.model.passes import AnyFeed, Item, Job, Restart, plan_pool
from relneuron.texts.feed import Feed
from relneuron.texts.options import CountOptions
from relneuron.texts.sources import Source
from relneuron.texts.windows import Packing, Window

SAMPLE_TOKENS = 8192  # whose values decide about the bins of histograms


def plan_windows(pool: Sequence[Window], batch_tokens: int) -> list[list[Window]]:
    """The batches of windows that are planned together."""
    groups = [window.group for window in pool]
    batches = plan_pool([len(window.ids) for window in pool], groups, batch_tokens)
    return [[pool[i] for i in own] for own in batches]


@dataclass
class CorpusJob(Job[AnyFeed, Item]):
    """A pass over sources, whose speed is looked at."""

    options: CountOptions
    sources: Sequence[Source] = ()
    speed: Speed = field(kw_only=True)

    def note(self) -> str:
        share = self.speed.share
        return "" if share is None else f"{share:.2f} of the bare forward"


@dataclass
class TextJob(CorpusJob[Feed, Window]):
    """Windows of text: some of about one length in a batch."""

    tokenizer: Any = None
    packing: Packing | None = None
    vocabulary: int = 0

    def begin(self, start: Checkpoint | None) -> None:
        """The bins of histograms: those of the checkpoint, or by a sample of the corpus."""
        if self.options.histogram is None:
            return
        if start is not None and start.counts.groups:
            # Of all groups the same.
            self.counter.set_edges({name: a[0] for name, a in start.counts.arrays.items()})
            return
        with self.open(None) as feed:
            # Of each source one, at least.
            n = max(len(self.sources), -(-SAMPLE_TOKENS // feed.packing.window))
            windows = feed.take(n)
        found = self.counter.sample(lambda: self.budget.run(windows, _length, self._sample_forward))
        self.counter.set_edges({name: self.ranks.first(edge) for name, edge in found.items()})

    def _sample_forward(self, windows: Sequence[Window]) -> list[None]:
        batch = self._batch(windows)
        # What stands first in a window is often far from all else.
        batch.group_ids[:, 0] = -1
        self.counter.look_at(batch)
        return []

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
        batches = plan_windows(pool, self.options.batch_tokens)
        return [(own, sum(map(_length, own))) for own in batches]

    def length(self, item: Window) -> int:
        return _length(item)

    def count_batch(self, items: list[Window]) -> None:
        for part in cut(items, _length, self.budget.tokens):
            if not self.budget.attempt(part, _length, self._count_forward):
                raise Restart

    def _count_forward(self, windows: Sequence[Window]) -> bool:
        self.speed.count(self._batch(windows))
        return True

    def _batch(self, windows: Sequence[Window]) -> Batch:
        batch = make_batch(
            windows,
            not_counted=self.tokenizer.bos_token_id if self.options.exclude_bos else None,
            by_document=self.options.boundaries == "position",
        )
        check_vocabulary(batch, self.vocabulary)
        return batch


def _length(window: Window) -> int:
    return len(window.ids)
