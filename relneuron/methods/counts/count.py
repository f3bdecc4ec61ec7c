"""The `count` stage: a corpus of any size through the model once, every neuron counted per group.

Counters and the position in every source are written together, so a run that is killed goes on with
the same bits; under `torchrun` several processes share the batches and add their counters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from relneuron.artifact.counts import APART, NAME, Counts, tokens_of_modules
from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.manifest import Manifest, same_model, versions
from relneuron.methods.counts.counter import Counter, Speed, check_boundaries
from relneuron.methods.counts.examples import (
    Kept,
    asked_of,
    check_twice,
    made,
    needed,
    separate,
)
from relneuron.methods.counts.job import CorpusJob, TextJob
from relneuron.methods.counts.pictured import PictureJob, check_options, picture_inputs
from relneuron.model.batches import Budget
from relneuron.model.checkpoint import (
    Checkpoint,
    Position,
    Saver,
    drop_checkpoint,
    interruptible,
    refusal,
    write_checkpoint,
)
from relneuron.model.identity import tokenizer_digest
from relneuron.model.load import describe_model, fallbacks
from relneuron.model.meeting import OthersEnd
from relneuron.model.mlps.find import find_mlps
from relneuron.model.peaks import Asked
from relneuron.model.pictures import Processor, picture_run
from relneuron.model.ranks import held, joined
from relneuron.texts.feed import Feed
from relneuron.texts.options import (
    CountOptions,
    check_unchanged,
    choose_packing,
    corpus_command,
)
from relneuron.texts.picture_feed import PictureFeed
from relneuron.texts.sources import Source, describe_sources
from relneuron.texts.windows import Packing

CHECKPOINT = "count.checkpoint"


@dataclass(frozen=True)
class Counted:
    """A finished count, and how the time of this run went (seconds)."""

    counts: Counts
    model: Json  # as the manifest describes it
    tokens: int  # that ran through the model, padding left out
    seconds: float
    share_of_bare: float | None  # of the bare forward's speed
    waiting: float  # for tokens
    saving: float  # checkpoints
    kept: Kept = field(default_factory=Kept)


def count_inputs(
    model: Json, tokenizer: Any, sources: Sequence[Source], packing: Packing, options: CountOptions
) -> Json:
    """What the stage depends on, for the manifest."""
    chosen: tuple[str, ...] = ("window", "mode", "bos", "max_tokens")  # in the packing
    # What is of pictures is in no count of text.
    chosen += ("module", "max_records")
    asked = {name: value for name, value in options.recorded().items() if name not in chosen}
    return {
        "model": same_model(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "sources": describe_sources(sources),
        "packing": packing.recorded(),
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
    processor: Processor | None = None,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
    say: Callable[[str], object] = lambda _: None,
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

    With `examples` each neuron's strongest tokens are kept, too (artifact/examples.py), with
    `histogram` how its values are spread (artifact/histogram.py); `say` gets a line of how many
    bytes that takes, before anything is counted. They have the same bits for any number of
    processes, shards and restarts. The texts are read once more for the examples' tokens, at the
    end, and their begin for the bins.

    Sources with an `image_column` need the model's `processor`; `options.module` then says whose
    neurons are counted, and every token that ran through a module (patches of the pictures,
    queries, text and image tokens) counts there in its record's group, as in arXiv 2406.11193.
    """
    options = options or CountOptions()
    if (processor is not None) != any(s.image_column is not None for s in sources):
        raise RelneuronError(
            "pictures need a processor, and a processor pictures",
            "give sources with an image_column and model.pictures.Processor, or neither",
        )
    check_options(options, processor)
    check_twice(sources, asked_of(options))
    packing: Packing | None = None
    if processor is None:
        mlps = find_mlps(model)
        packing = choose_packing(
            model,
            tokenizer,
            sources,
            options,
            exclude_bos=options.exclude_bos,
            max_tokens=options.max_tokens,
        )
    else:
        modules = options.module or ("language",)
        mlps = find_mlps(model, modules=modules, run=picture_run(model, processor))
    described = describe_model(name, model, mlps, backend)
    inputs = (
        count_inputs(described, tokenizer, sources, packing, options)
        if packing is not None
        else picture_inputs(same_model(described), cast(Processor, processor), sources, options)
    )
    counter = Counter(
        model,
        mlps,
        sites=options.sites,
        threshold=options.threshold,
        moments=options.moments,
        asked=asked_of(options),
        backend=backend,
    )
    if options.boundaries == "position":
        check_boundaries(counter)
    files = Kept()
    with joined(model) as ranks, held(folder, ranks), interruptible() as stopped:
        if Manifest(folder).is_done("count", inputs, apart=APART, force=force):
            if ranks.rank == 0:
                drop_checkpoint(folder / CHECKPOINT, inputs)
            return None
        refused = None
        if ranks.rank == 0:
            refused = refusal(folder / CHECKPOINT, folder / NAME, inputs, force=force)
        # Nobody reads the checkpoint before it was looked at, and all end if it cannot be used.
        if ranks.largest(int(refused is not None)):
            raise refused or OthersEnd()
        if asked_of(options) != Asked() and ranks.rank == 0:
            say(needed(mlps, sources, options))
        job = _job(
            processor,
            tokenizer,
            packing,
            vocabulary=model.get_input_embeddings().num_embeddings,
            sources=sources,
            options=options,
            counter=counter,
            speed=Speed(counter),
            ranks=ranks,
            saver=Saver(folder / CHECKPOINT, inputs, ranks, options, stopped),
            quiet=quiet,
        )
        feed = job.run_in_memory()
        counts, kept = separate(ranks.add(counter.result(feed.groups)))
        tokens = ranks.total(job.speed.tokens)
        if ranks.rank == 0:
            is_text = isinstance(job, TextJob)
            texts, n_windows = (job.open(None), feed.n_windows) if is_text else (None, ())
            files = made(feed.groups, kept, texts, n_windows, quiet)
            check_unchanged(sources, inputs)
            made_by = corpus_command("count", [name], sources, folder, packing, described, options)
            _finish(
                folder,
                inputs,
                described,
                options,
                packing,
                feed,
                counts,
                files,
                job,
                made_by,
            )
    return Counted(
        counts=counts,
        model=described,
        tokens=tokens,
        seconds=job.speed.seconds,
        share_of_bare=job.speed.share,
        waiting=job.waiting,
        saving=job.saver.seconds,
        kept=files,
    )


def _job(
    processor: Processor | None,
    tokenizer: Any,
    packing: Packing | None,
    *,
    vocabulary: int,
    **common: Any,
) -> CorpusJob[Any, Any]:
    options, ranks = common["options"], common["ranks"]
    if processor is not None:
        budget = Budget(
            options.batch_tokens,
            "error",
            what="a record of {longest} tokens and its pictures",
            alone="give smaller pictures, a smaller --dtype, or a device with more memory",
        )
        return PictureJob(budget=budget, processor=processor, vocabulary=vocabulary, **common)
    budget = Budget(
        options.batch_tokens,
        options.oom if ranks.size == 1 else "error",
        what="a batch of {n} x {longest} tokens",
        otherwise=", or a GPU of its own",
        alone="use a shorter --window",
    )
    return TextJob(
        budget=budget, tokenizer=tokenizer, packing=packing, vocabulary=vocabulary, **common
    )


def _finish(
    folder: Path,
    inputs: Json,
    described: Json,
    options: CountOptions,
    packing: Packing | None,
    feed: Feed | PictureFeed,
    counts: Counts,
    kept: Kept,
    job: CorpusJob[Any, Any],
    made_by: list[list[str]],
) -> None:
    """Write the counters and the manifest; the checkpoint goes last."""
    is_whole, budget = options.shard[1] == 1, job.budget
    if is_whole and packing is None and not counts.tokens.any():
        raise RelneuronError("the corpus has no record", "give records with pictures")
    if is_whole and packing is not None and not counts.tokens.any():
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
        nothing = Checkpoint(counts.take([]), Position(None, 0, 0))
        write_checkpoint(folder / CHECKPOINT, inputs, nothing)
    counts.write(path)
    paths = [path, *kept.write(folder)]
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
            **_tokens_of_modules(described, counts),
            **(_cut(packing, options) if packing is not None else {}),
            **feed.notes,
        },
        batch_plan={
            "batch_tokens": options.batch_tokens,
            **job.sizes,
            "order": "sources in turn, longest window first among the next ones, then by group",
            **({"plan_changed": f"{budget.tokens} tokens a forward"} if budget.notices else {}),
        }
        if packing is not None
        else {"order": "one source behind the other, one record a forward"},
        fallbacks=fallbacks(described),
    )
    manifest.finish("count", inputs, paths, reads=[], apart=APART, commands=made_by)
    (folder / CHECKPOINT).unlink(missing_ok=True)


def _cut(packing: Packing, options: CountOptions) -> Json:
    """What the manifest says of the windows of a text corpus."""
    return {
        "packing": packing.mode,
        "window": packing.window,
        "bos": packing.bos,
        "bos_counted": not options.exclude_bos,
        "boundaries": options.boundaries,
    }


def _tokens_of_modules(described: Json, counts: Counts) -> Json:
    """Of a model of several modules, how many tokens of each group each of them ran."""
    if "modules" not in described:
        return {}
    return {"modules": {n: dict(t) for n, t in tokens_of_modules(described, counts).items()}}
