"""Records with pictures as batches of `count`: what their processor makes of each, a forward each.

`count.py` asks here what a corpus of pictures is counted with. MMNeuron (arXiv 2406.11193) does the
same: one example a forward, every token that ran through a module counts in the example's group.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.options import options_of
from relneuron.methods.counts.batches import Pictured, check_tokens
from relneuron.methods.counts.job import CorpusJob
from relneuron.model.checkpoint import Checkpoint
from relneuron.model.layers import first_line
from relneuron.model.mlps.modules import BELONG
from relneuron.model.pictures import Processor, load_processor, reads_pictures
from relneuron.texts.options import CountOptions
from relneuron.texts.picture_feed import PictureFeed, describe_pictures, have_pictures
from relneuron.texts.pictures import COLUMN, Record
from relneuron.texts.sources import Source, describe_sources

AHEAD = 8  # records that are made ready together: Qwen2-VL's pixels of one may take 80 MB
# Options of windows of text, which records with pictures are not cut into.
_OF_WINDOWS: tuple[str, ...] = ("window", "mode", "bos", "exclude_bos", "boundaries")
_OF_WINDOWS += ("max_tokens", "batch_tokens", "examples", "histogram")


def with_pictures(
    sources: Sequence[Source], name: str, model: Any, revision: str | None = None
) -> tuple[list[Source], Processor | None]:
    """The sources with the field of their pictures, and the model's processor; None for text.

    They hold pictures if that field was named, or if their records have the field `image` and the
    model reads pictures.
    """
    asked = next((s.image_column for s in sources if s.image_column is not None), None)
    if not reads_pictures(model):
        if asked is not None:
            raise RelneuronError(
                f"--image-column {asked}: {type(model).__name__} reads no pictures",
                "give a model that does, or leave it out",
                2,
            )
        return list(sources), None
    column = asked or COLUMN
    if not have_pictures(sources, column):
        if asked is not None:
            raise RelneuronError(
                f"{sources[0].name} has no field {column!r}", "correct --image-column", 2
            )
        return list(sources), None
    found = [replace(source, image_column=column) for source in sources]
    return found, Processor(load_processor(name, revision=revision))


def check_options(options: CountOptions, processor: Processor | None) -> None:
    """Refuse what makes no sense with pictures, or without."""
    known = options_of(CountOptions)
    if processor is None:
        for name in ("module", "max_records"):
            value = getattr(options, name)
            if value not in (None, ("language",)):
                raise RelneuronError(
                    f"{known[name][1].flag} is of records with pictures: text alone runs the "
                    "language model only",
                    f"leave out {known[name][1].flag}, or give records with pictures and a model "
                    "that reads them",
                    2,
                )
        return
    for name in (*_OF_WINDOWS, "workers"):
        said, says, _ = known[name]
        if getattr(options, name) != said.default:
            other = "; --max-records limits the records" if name == "max_tokens" else ""
            raise RelneuronError(
                f"{says.flag} is of windows of text: a record with pictures is a forward of its "
                "own",
                f"leave out {says.flag}{other}",
                2,
            )


def picture_inputs(
    model: Json, processor: Processor, sources: Sequence[Source], options: CountOptions
) -> Json:
    """What the stage depends on where it reads pictures; they are all read for it."""
    asked = {k: v for k, v in options.recorded().items() if k not in _OF_WINDOWS}
    return {
        "model": model,
        "tokenizer": None,  # in the processor's digest
        "processor": processor.digest(),
        "sources": describe_sources(sources),
        "pictures": describe_pictures(sources, options.max_records),
        **asked,
        "shard": "{}/{}".format(*options.shard),
    }


@dataclass(frozen=True)
class _Ready:
    """A record and, if it is of this process, what the processor will have made of it."""

    record: Record
    group: int
    inputs: Future[Any] | None


@dataclass
class PictureJob(CorpusJob[PictureFeed, _Ready]):
    """Records, one a forward; a thread reads and prepares those that follow."""

    processor: Processor | None = None
    vocabulary: int = 0
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    unit = "record"

    def run(self, start: Checkpoint | None) -> PictureFeed:
        try:
            return super().run(start)
        finally:
            self._thread.shutdown(cancel_futures=True)

    def open(self, state: Json | None) -> PictureFeed:
        return PictureFeed(self.sources, most=self.options.max_records, state=state)

    def plan(self, feed: PictureFeed, number: int) -> list[tuple[list[_Ready], int]]:
        found = []
        for place, record in enumerate(feed.take(AHEAD), number):
            made = self._thread.submit(self._made, record) if self.is_mine(place) else None
            found.append(([_Ready(record, feed.place(record.group), made)], 1))
        return found

    def length(self, item: _Ready) -> int:
        return 0  # its processor says it when it is run

    def _made(self, record: Record) -> Any:
        assert self.processor is not None
        return self.processor.inputs(record.open(), record.text, record.where)

    def count_batch(self, items: list[_Ready]) -> None:
        (one,) = items
        assert one.inputs is not None
        begin = time.perf_counter()
        inputs = one.inputs.result()
        self.waiting += time.perf_counter() - begin
        check_tokens(int(inputs["input_ids"].max()), self.vocabulary)
        try:
            self.budget.attempt([Pictured(inputs, one.group)], _tokens, self._count_forward)
        except RelneuronError:
            raise
        except Exception as error:  # each model has errors of its own
            raise RelneuronError(
                f"{one.record.where}: the model does not take it ({first_line(error)})", BELONG
            ) from error

    def _count_forward(self, batch: list[Pictured]) -> bool:
        self.speed.count(batch[0])
        return True


def _tokens(batch: Pictured) -> int:
    return batch.n_tokens
