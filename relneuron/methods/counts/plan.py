"""What `count` would take: `count --dry-run`. The corpus is read to its end, as there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact import examples, histogram
from relneuron.artifact.counts import BESIDE, DTYPES, NAME, ROUTED, WEIGHT, Counts
from relneuron.artifact.dense import dense_bytes
from relneuron.artifact.files import RelneuronError, check_folder, refuse_overwrite
from relneuron.artifact.options import PartsOptions
from relneuron.artifact.planned import Planned
from relneuron.methods.counts.batches import pool_windows
from relneuron.methods.counts.counter import FIRST_TIMED, next_timed
from relneuron.methods.counts.examples import asked_of, check_twice
from relneuron.methods.counts.job import SAMPLE_TOKENS, plan_windows
from relneuron.methods.counts.pictured import check_options, with_pictures
from relneuron.model.batches import cut
from relneuron.model.dry import Dry, Work, dry_model
from relneuron.model.mlps.shape import refuse_sites
from relneuron.model.peaks import beside_bytes
from relneuron.texts.feed import Feed
from relneuron.texts.options import CountOptions, CountSourceOptions, choose_packing
from relneuron.texts.sources import parse_sources


def count(
    model: str,
    sources: Sequence[str],
    output: Path,
    options: CountOptions,
    reading: CountSourceOptions,
    load_options: PartsOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[Planned]:
    """The plan of the command `count`, with its parameters."""
    check_folder(output)
    found = parse_sources(sources, **vars(reading))
    dry = dry_model(model, load_options, needs_text=any(not s.is_ids for s in found))
    found, processor = with_pictures(found, model, dry.model, load_options.revision)
    if processor is not None:
        raise RelneuronError(
            "records with pictures are not planned: their processor makes their tokens",
            "count a few of them with --max-records, and look at its manifest",
        )
    check_options(options, None)
    asked = asked_of(options)
    check_twice(found, asked)
    packing = choose_packing(
        dry.model,
        dry.tokenizer,
        found,
        options,
        exclude_bos=options.exclude_bos,
        max_tokens=options.max_tokens,
    )
    refuse_sites(dry.shape, options.sites)
    if not (output / "count.checkpoint").exists():
        refuse_overwrite(output / NAME, force)
    work, shard, of = Work(dry), options.shard[0], options.shard[1]
    number, n_windows, due = 0, 0, FIRST_TIMED
    sample: list[int] = []  # whose values decide about the bins, before anything is counted
    n_sample = max(len(found), -(-SAMPLE_TOKENS // packing.window))
    n_down = 0 if "down" in options.sites else dry.last_down
    with Feed(
        found, dry.tokenizer, packing, vocabulary=dry.vocabulary, n_workers=options.workers
    ) as feed:
        while pool := feed.take(pool_windows(packing.window, options.batch_tokens)):
            if options.histogram is not None:
                sample += [len(w.ids) for w in pool[: n_sample - len(sample)]]
            for batch in plan_windows(pool, options.batch_tokens):
                number += 1
                if (number - 1) % of != shard - 1:
                    continue
                n_windows += len(batch)
                lengths = [len(window.ids) for window in batch]
                padded = len(lengths) * max(lengths)
                work.batch(lengths, logits=0, less=n_down * padded)
                if work.batches == due:  # once more without the patch, for its speed
                    work.forward(len(lengths), max(lengths), logits=0)
                    due = next_timed(due)
        groups = feed.groups
    for part in cut(sample, lambda length: length, options.batch_tokens):
        work.forward(len(part), max(part), logits=0, less=n_down * len(part) * max(part))
    counters, n_beside = _counters(dry, groups, options)
    n_counters = sum(np.dtype(t).itemsize * math.prod(shape) for shape, t in counters.values())
    about = {Counts.KEY: json.dumps({"groups": groups}, ensure_ascii=False)}
    files: dict[str, int | None] = {NAME: dense_bytes(counters, about)}
    if options.examples is not None:
        files[examples.NAME] = None
    if options.histogram is not None:
        files[histogram.NAME] = _histogram_bytes(dry, groups, options)
    yield dry.planned(
        "count",
        {"groups": len(groups), "windows": n_windows},
        **work.told,
        tensors={
            # A gated MLP keeps its activation, too: h is the model's own.
            "activations": work.peak(dry.model.base_model, cache=False, n_held=2 * dry.n_inner - 1),
            "counters": n_counters + n_beside,
        },
        host={"counts": n_counters + n_beside},
        files=files,
        notes=[
            "count: examples.safetensors has 12 bytes of each neuron, group and example, and the "
            "windows that they are in"
        ]
        if options.examples is not None
        else [],
    )


def _counters(
    dry: Dry, groups: Sequence[str], options: CountOptions
) -> tuple[dict[str, tuple[tuple[int, ...], Any]], int]:
    """Shape and type of each tensor of counts.safetensors; bytes of what is kept beside them."""
    order, n = dry.order, len(groups)
    found: dict[str, tuple[tuple[int, ...], Any]] = {"tokens": ((n,), np.int64)}
    if order.experts[0]:
        by_expert = (n, order.layers, max(order.experts[0]))
        found |= {name: (by_expert, BESIDE[name]) for name in (ROUTED, WEIGHT)}
    names = tuple(DTYPES) if options.moments else ("count",)
    n_neurons = 0
    for site in options.sites:
        width = order.widths["down" if site == "down" else "gate"]
        shape = (n, order.layers, width)
        found |= {f"{name}.{site}": (shape, DTYPES[name]) for name in names}
        own = "down" if site == "down" else "gate"
        n_neurons += sum(order.width(layer, own) for layer in range(order.layers))
    asked = asked_of(options)
    return found, n * beside_bytes(n_neurons, asked)


def _histogram_bytes(dry: Dry, groups: Sequence[str], options: CountOptions) -> int:
    order, bins = dry.order, options.histogram or 0
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
    for site in options.sites:
        each = (order.layers, order.widths["down" if site == "down" else "gate"])
        shapes[f"count.{site}"] = ((len(groups), *each, bins), np.int64)
        shapes |= {f"{name}.{site}": (each, np.int32) for name in ("exponent", "first", "last")}
    about = {histogram.ABOUT: json.dumps({"groups": groups}, ensure_ascii=False)}
    return dense_bytes(shapes, about)
