"""The `count` stage: a corpus of any size through the model once, every neuron counted per group.

Counters and the position in every source are written together, so a run that is killed goes on with
the same bits; under `torchrun` several processes share the batches and add their counters.
"""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relneuron.artifact.counts import APART, NAME, Counts
from relneuron.artifact.files import Json, RelneuronError, refuse_overwrite
from relneuron.artifact.journal import progress_bar
from relneuron.artifact.manifest import Manifest, locked, same_model, versions
from relneuron.methods.counts.batches import (
    Ranks,
    check_vocabulary,
    joined,
    make_batch,
    plan_pool,
    pool_windows,
)
from relneuron.methods.counts.counter import (
    CHECKPOINT,
    Checkpoint,
    Counter,
    Position,
    Saver,
    Speed,
    check_boundaries,
    read_checkpoint,
    write_checkpoint,
)
from relneuron.model.batches import Budget, cut
from relneuron.model.identity import tokenizer_digest
from relneuron.model.load import describe_model, fallbacks
from relneuron.model.mlps.find import find_mlps
from relneuron.texts.feed import Feed
from relneuron.texts.options import (
    CountOptions,
    check_unchanged,
    choose_packing,
    corpus_command,
)
from relneuron.texts.sources import Source, describe_sources
from relneuron.texts.windows import Packing, Window


@dataclass(frozen=True)
class Counted:
    """A finished count, and how the time of this run went (seconds)."""

    counts: Counts
    tokens: int  # that ran through the model, padding left out
    seconds: float
    share_of_bare: float | None  # of the bare forward's speed
    waiting: float  # for tokens
    saving: float  # checkpoints


class _Restart(Exception):
    """Memory ran out in the middle of a forward, some of whose layers have counted."""


@dataclass
class _Job:
    """The batches of this process."""

    sources: Sequence[Source]
    tokenizer: Any
    options: CountOptions
    packing: Packing
    vocabulary: int
    counter: Counter
    speed: Speed
    ranks: Ranks
    budget: Budget
    saver: Saver
    quiet: bool
    waiting: float = 0.0  # seconds, for tokens

    def run(self, start: Checkpoint | None) -> Feed:
        """Count everything from a checkpoint on; returns the corpus, read to its end."""
        self.counter.clear()
        # Each share is counted from zero; the first adds to what was counted before.
        if start is not None and self.ranks.share == 0:
            self.counter.restore(start.counts)
        position = start.position if start else Position(None, 0, 0)
        feed = Feed(
            self.sources,
            self.tokenizer,
            self.packing,
            vocabulary=self.vocabulary,
            state=position.feed,
            n_workers=self.options.workers,
        )
        is_quiet = self.quiet or self.ranks.rank > 0
        bar = progress_bar(None, "count", "token", is_quiet, scale=True, done=position.n_tokens)
        try:
            with bar, feed, self.counter:
                self._count_pools(feed, position, bar)
        finally:
            self.waiting += feed.waited_s
        return feed

    def _count_pools(self, feed: Feed, position: Position, bar: Any) -> None:
        skip, number, n_tokens = position.done, position.number, position.n_tokens
        while True:
            begin = feed.state()
            pool = feed.take(pool_windows(self.packing.window, self.options.batch_tokens))
            if not pool:
                return
            self.counter.grow(len(feed.groups))
            lengths = [len(window.ids) for window in pool]
            groups = [window.group for window in pool]
            batches = plan_pool(lengths, groups, self.options.batch_tokens)
            for place, members in enumerate(batches[skip:], skip):
                if self._is_mine(number + place):
                    self._count_batch([pool[i] for i in members])
                n_tokens += sum(lengths[i] for i in members)
                self._show(bar, feed, n_tokens)
                self.saver.look(
                    number + place,
                    lambda: self.counter.result(feed.groups),
                    Position(begin, place + 1, number, n_tokens),
                )
            skip, number = 0, number + len(batches)

    def _is_mine(self, number: int) -> bool:
        shard, of = self.options.shard
        return number % of == shard - 1 and number // of % self.ranks.shares == self.ranks.share

    def _count_batch(self, windows: Sequence[Window]) -> None:
        for part in cut(windows, _length, self.budget.tokens):
            if not self.budget.attempt(part, _length, self._count_forward):
                raise _Restart

    def _count_forward(self, windows: Sequence[Window]) -> bool:
        batch = make_batch(
            windows,
            not_counted=self.tokenizer.bos_token_id if self.options.exclude_bos else None,
            by_document=self.options.boundaries == "position",
        )
        check_vocabulary(batch, self.vocabulary)
        self.speed.count(batch)
        return True

    def _show(self, bar: Any, feed: Feed, n_tokens: int) -> None:
        if bar.disable:
            return
        bar.total = feed.expected_tokens
        if self.speed.share is not None:
            bar.set_postfix_str(f"{self.speed.share:.2f} of the bare forward", refresh=False)
        bar.update(n_tokens - bar.n)


def _length(window: Window) -> int:
    return len(window.ids)


def count_inputs(
    model: Json, tokenizer: Any, sources: Sequence[Source], packing: Packing, options: CountOptions
) -> Json:
    """What the stage depends on, for the manifest."""
    chosen = ("window", "mode", "bos", "max_tokens")  # in the packing
    asked = {name: value for name, value in options.recorded().items() if name not in chosen}
    return {
        "model": same_model(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "sources": describe_sources(sources),
        "packing": asdict(packing),
        **asked,
        "shard": "{}/{}".format(*options.shard),
    }


def count(
    name: str,
    model: Any,
    tokenizer: Any,
    sources: Sequence[Source],
    folder: Path,
    options: CountOptions | None = None,
    *,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> Counted | None:
    """Count every neuron's activations in each group and write counts.safetensors to `folder`.

    A neuron's count in a group is the number of the group's tokens with value > threshold at the
    site (LAPE, arXiv 2402.16438: site `act`, threshold 0). Padding is never counted.
    `count.checkpoint` is replaced every `checkpoint_seconds` or `checkpoint_batches`, and on
    Ctrl-C; the same call goes on from it and ends with the same bits, with `force` only if it is of
    the same inputs. A count that is finished already is left as it is: the result is then None.

    `tokenizer` may be None if all sources hold token ids. Under `torchrun` each process runs its
    share of the batches and the first one writes: counts are those of one process; sums are
    rounded in another order. Processes that hold the model in parts run all batches, and each
    counts its own neurons; what goes into the stream is rounded in another order there, so that
    a value next to the threshold may pass it where it does not in one process.
    """
    options = options or CountOptions()
    mlps = find_mlps(model)
    packing = choose_packing(
        model,
        tokenizer,
        sources,
        options,
        exclude_bos=options.exclude_bos,
        max_tokens=options.max_tokens,
    )
    described = describe_model(name, model, mlps, backend)
    inputs = count_inputs(described, tokenizer, sources, packing, options)
    counter = Counter(
        model,
        mlps,
        sites=options.sites,
        threshold=options.threshold,
        moments=options.moments,
        backend=backend,
    )
    if options.boundaries == "position":
        check_boundaries(counter)
    with joined(model) as ranks, _held(folder, ranks), _interruptible() as stopped:
        if Manifest(folder).is_done("count", inputs, apart=APART, force=force):
            if ranks.rank == 0:
                _drop_checkpoint(folder, inputs)
            return None
        refused = _begin(folder, inputs, force=force) if ranks.rank == 0 else None
        # Nobody reads the checkpoint before it was looked at, and all end if it cannot be used.
        if ranks.largest(int(refused is not None)):
            raise refused or RelneuronError("the first process refused", "see what it says")
        job = _Job(
            sources=sources,
            tokenizer=tokenizer,
            options=options,
            packing=packing,
            vocabulary=model.get_input_embeddings().num_embeddings,
            counter=counter,
            speed=Speed(counter),
            ranks=ranks,
            budget=Budget(
                options.batch_tokens,
                options.oom if ranks.size == 1 else "error",
                what="a batch of {n} x {longest} tokens",
                otherwise=", or a GPU of its own",
                alone="use a shorter --window",
            ),
            saver=Saver(folder, inputs, ranks, options, stopped),
            quiet=quiet,
        )
        feed = _run_in_memory(job, folder, inputs)
        counts = ranks.add(counter.result(feed.groups))
        tokens = ranks.total(job.speed.tokens)
        if ranks.rank == 0:
            check_unchanged(sources, inputs)
            made_by = corpus_command("count", [name], sources, folder, packing, described, options)
            _finish(folder, inputs, described, options, packing, feed, counts, job.budget, made_by)
    return Counted(
        counts=counts,
        tokens=tokens,
        seconds=job.speed.seconds,
        share_of_bare=job.speed.share,
        waiting=job.waiting,
        saving=job.saver.seconds,
    )


def _begin(folder: Path, inputs: Json, *, force: bool) -> RelneuronError | None:
    """Why nothing may be written, if so; a folder with a checkpoint is a count that goes on."""
    try:
        if read_checkpoint(folder, inputs) is None:
            refuse_overwrite(folder / NAME, force)
    except RelneuronError as error:
        if not force:
            return error
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return None


def _drop_checkpoint(folder: Path, inputs: Json) -> None:
    """Delete what a count that was killed behind its manifest left; another count's stays."""
    with suppress(RelneuronError):
        if read_checkpoint(folder, inputs) is not None:
            (folder / CHECKPOINT).unlink()


def _run_in_memory(job: _Job, folder: Path, inputs: Json) -> Feed:
    """The whole count; from the last checkpoint again each time that the memory is too small."""
    while True:
        with suppress(_Restart):
            return job.run(read_checkpoint(folder, inputs))


def _finish(
    folder: Path,
    inputs: Json,
    described: Json,
    options: CountOptions,
    packing: Packing,
    feed: Feed,
    counts: Counts,
    budget: Budget,
    made_by: list[list[str]],
) -> None:
    """Write the counters and the manifest; the checkpoint goes last."""
    is_whole = options.shard[1] == 1
    if is_whole and not counts.tokens.any():
        raise RelneuronError(
            f"the corpus has no window of tokens (--window {packing.window}, --max-tokens "
            f"{packing.max_tokens or 'all'})",
            "give more text, a shorter window, or more tokens",
        )
    for name, tokens in zip(counts.groups, counts.tokens, strict=True):
        if is_whole and not tokens:
            warnings.warn(f"group {name!r} has no token that was counted", stacklevel=2)
    for site, bad in ((s, counts.arrays.get(f"n_nonfinite.{s}")) for s in counts.sites):
        if bad is not None and bad.any():
            warnings.warn(
                f"{int(bad.sum())} values at site {site} are not finite: they are in no moment",
                stacklevel=2,
            )
    path = folder / NAME
    if not (folder / CHECKPOINT).exists():
        # Without it counts that have no manifest yet would be another's, not to be overwritten.
        write_checkpoint(folder, inputs, Checkpoint(counts.take([]), Position(None, 0, 0)))
    counts.write(path)
    manifest = Manifest(folder)
    manifest.describe(
        versions=versions(),
        model=described,
        dtype=described["dtype"],
        sites=list(options.sites),
        threshold=options.threshold,
        groups=counts.groups,
        tokens={
            "counted": dict(zip(counts.groups, counts.tokens.tolist(), strict=True)),
            "packing": packing.mode,
            "window": packing.window,
            "bos": packing.bos,
            "bos_counted": not options.exclude_bos,
            "boundaries": options.boundaries,
            **feed.notes,
        },
        batch_plan={
            "batch_tokens": options.batch_tokens,
            "order": "sources in turn, longest window first among the next ones, then by group",
            **({"plan_changed": f"{budget.tokens} tokens a forward"} if budget.notices else {}),
        },
        fallbacks=fallbacks(described),
    )
    manifest.finish("count", inputs, [path], reads=[], apart=APART, commands=made_by)
    (folder / CHECKPOINT).unlink(missing_ok=True)


def _held(folder: Path, ranks: Ranks) -> Any:
    """The folder's lock, for the one process that writes."""
    return locked(folder) if ranks.rank == 0 else nullcontext()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C only asks to stop, behind the batch and its checkpoint; the second stops."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
