"""The `nll` stage: how well the model reads each group's text without each set of neurons.

It writes one row per mask and group of text (nll.csv) and per window (nll_windows.csv): the matrix
of arXiv 2402.16438, for all masks side by side.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relneuron.ablation.conditions import Ablation, Places, empty_sets, read_sets
from relneuron.ablation.evaluate import Evaluator, How, same_ablation
from relneuron.ablation.options import CLEAN, NllOptions
from relneuron.ablation.said import PackedRows, Row
from relneuron.ablation.windows import Scorer, Texts, read_texts
from relneuron.artifact.effects import Condition
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    csv_pieces,
    refuse_overwrite,
    sha256,
)
from relneuron.artifact.journal import Journal, is_unfinished, progress_bar
from relneuron.artifact.manifest import Manifest, checked, same_model, versions
from relneuron.artifact.neurons import ATTENTION, NeuronFile, Shape
from relneuron.artifact.stage import placed
from relneuron.model.canary import check_canary
from relneuron.model.identity import other_weights, tokenizer_digest
from relneuron.model.load import describe_model, fallbacks
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.ranks import sharing
from relneuron.texts.feed import Feed
from relneuron.texts.options import (
    check_unchanged,
    choose_packing,
    corpus_command,
)
from relneuron.texts.sources import Source, describe_sources
from relneuron.texts.windows import Packing

COLUMNS = ("mask", "group", "n_windows", "n_tokens", "nll", "nll_se", "perplexity")
WINDOWS = ("mask", "group", "window", "n_tokens", "nll")

Array = np.ndarray[Any, Any]


class Cell(NamedTuple):
    """One row of nll.csv: the text of a group read under a mask.

    nll         mean over the windows of each window's mean NLL, nats per token
    nll_se      sample standard deviation over the windows / sqrt(n_windows); None for one window
    perplexity  exp(nll)
    """

    mask: str
    group: str
    n_windows: int
    n_tokens: int  # that were scored: all of a window but its first
    nll: float
    nll_se: float | None
    perplexity: float


# --- masks -----------------------------------------------------------------------------------


def plan_masks(
    sets: Mapping[str, Places], shape: Mapping[str, int], random_sets: int
) -> list[Ablation]:
    """The clean model, every set, and random sets: `random.<seed>`.

    A random set is drawn from all neurons of the sites that occur in the sets, as many as the
    largest set has.
    """
    none = np.empty(0, np.int64)
    chosen = np.concatenate([none, *sets.values()])
    sites = [Shape.of(shape).site_places(site) for site in Shape.of(shape).widths]
    known = np.sort(np.concatenate([none, *(s for s in sites if np.isin(chosen, s).any())]))
    size = max(map(len, sets.values()), default=0)
    plan = [(CLEAN, CLEAN, none), *(("set", name, places) for name, places in sets.items())]
    for seed in range(random_sets):
        drawn = random.Random(f"relneuron.random.{seed}").sample(range(len(known)), size)
        plan.append(("random", f"random.{seed}", known[drawn]))
    names = [name for _, name, _ in plan]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RelneuronError(f"two masks are named {twice[0]}", "rename the set in neurons.json")
    return [
        Ablation(Condition(name, kind, n_neurons=len(places)), np.sort(places), ())
        for kind, name, places in plan
    ]


# --- the stage -------------------------------------------------------------------------------


def nll_inputs(
    model: Json,
    tokenizer: Any,
    neurons: Path,
    sources: Sequence[Source],
    packing: Packing,
    options: NllOptions,
) -> Json:
    """What the stage depends on, for the manifest."""
    return {
        "model": same_model(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "neurons": sha256(neurons),
        "sources": describe_sources(sources),
        "packing": packing.recorded(),
        "windows": options.windows,
        "random_sets": options.random_sets,
        "batch_tokens": options.batch_tokens,
    }


def nll(
    name: str,
    model: Any,
    tokenizer: Any,
    neurons_path: Path,
    sources: Sequence[Source],
    folder: Path,
    options: NllOptions | None = None,
    *,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> list[Cell]:
    """Read each group's text under every mask; writes nll.csv and nll_windows.csv to `folder`.

    A mask switches off a set of neurons.json at all tokens; `clean` is none. Of each group the
    first `options.windows` windows of `options.window` tokens are read; with `options.join` of its
    documents as one text. The NLL of a window is the
    mean of -ln p of its tokens but the first, in nats.

    `nll.journal` lets a killed run go on with the same bits. Out of memory halves the batches from
    there on (`oom` "split") or ends the stage ("error").
    """
    options = options or NllOptions()
    windows, random_sets = options.windows, options.random_sets
    output = folder / "nll.csv"
    refuse_overwrite(output, force or is_unfinished(output, "nll"))
    neurons = NeuronFile.read(checked(neurons_path))
    mlps = find_mlps(model, attention=ATTENTION[0] in neurons.model)
    shape = model_shape(mlps)
    neurons.check_model(shape)
    sets, doubles = read_sets(neurons, shape)
    notices = empty_sets(sets)
    cut = choose_packing(model, tokenizer, sources, options)
    cut = replace(cut, max_tokens=windows * cut.window, join=options.join)
    plan = plan_masks(sets, shape, random_sets)
    described = describe_model(name, model, mlps, backend)
    Manifest(folder).check_model(described)
    inputs = nll_inputs(
        described,
        tokenizer,
        neurons_path,
        sources,
        cut,
        options,
    )
    n_ids = model.get_input_embeddings().num_embeddings
    with Feed(sources, tokenizer, cut, vocabulary=n_ids, n_workers=options.workers) as feed:
        texts = read_texts(feed, windows)
        missing = [group for group in feed.groups if group not in texts.groups]
        notes = feed.notes
    check_unchanged(sources, inputs)
    notices += other_weights(f"{neurons_path}: neurons", neurons.model, described)
    notices += [f"{name}: {n} neurons stood there twice" for name, n in doubles.items()]
    scorer = Scorer(model, texts.ids)
    notices += [f"{name}: no window of {cut.window} tokens" for name in missing] + scorer.notices
    for notice in notices:
        warnings.warn(notice, stacklevel=2)
    check_canary(model, mlps, scorer.short, backend)
    with sharing(model, folder) as ranks:
        with ranks.in_turn():
            journal = Journal(folder / "nll.journal", inputs, ranks=ranks, shard=options.shard)
        evaluator = Evaluator(
            scorer, mlps, plan, journal, How(), options.batch_tokens, backend, options.oom
        )
        first = same_ablation(plan, How())
        rows = PackedRows(
            Row(mask, i) for mask in dict.fromkeys(first) for i in range(len(texts.ids))
        )
        lengths = [len(ids) - 1 for ids in texts.ids]
        bar = progress_bar(len(rows), "nll", "window", quiet)
        with bar, journal:
            found = evaluator.run("windows", rows, lengths, scorer.ask, bar.update)
        values = np.empty((len(first), len(texts.ids)))
        for mask, line in zip(first, values, strict=True):
            line[:] = [found[Row(mask, i)] for i in range(len(texts.ids))]
        masks = [ablation.condition.name for ablation in plan]
        bad = int((~np.isfinite(values)).sum())
        if bad:
            notices.append(f"{bad} windows have a NLL that is not finite: try another --dtype")
            warnings.warn(notices[-1], stacklevel=2)
        cells = summarise(masks, texts, values)
        if ranks.rank:
            return cells
        written = {
            output: csv_pieces(COLUMNS, cells),
            folder / "nll_windows.csv": csv_pieces(WINDOWS, window_rows(masks, texts, values)),
        }
        for file, data in written.items():
            atomic_write(file, data)
        manifest = Manifest(folder)
        if "count" not in manifest.data["stages"]:  # else the model is the one that was counted
            manifest.describe(versions=versions(), model=described)
        manifest.describe(fallbacks=fallbacks(described) + notices + evaluator.notices)
        manifest.finish(
            "nll",
            inputs,
            list(written),
            reads=[neurons_path],
            masks=len(masks),
            windows={group: texts.groups.count(group) for group in dict.fromkeys(texts.groups)},
            scored_tokens=sum(lengths),
            batch_plan={"batch_tokens": options.batch_tokens, **evaluator.sizes},
            random_set_size=max(map(len, sets.values()), default=0) if random_sets else None,
            texts=notes,
            commands=corpus_command(
                "nll",
                [name, placed(neurons_path, folder)],
                sources,
                folder,
                cut,
                described,
                options,
            ),
        )
        journal.remove()
    return cells


def summarise(masks: Sequence[str], texts: Texts, values: Array) -> list[Cell]:
    """The cells of the matrix, by mask and group, from values (masks, windows) in nats."""
    windows: dict[str, list[int]] = {}
    for i, group in enumerate(texts.groups):
        windows.setdefault(group, []).append(i)
    n_tokens = {name: sum(len(texts.ids[i]) - 1 for i in some) for name, some in windows.items()}
    cells = []
    for mask, row in zip(masks, values, strict=True):
        for group, inside in windows.items():
            some = row[inside]
            mean = float(some.mean())
            error = float(some.std(ddof=1) / math.sqrt(some.size)) if some.size > 1 else None
            cells.append(
                Cell(
                    mask,
                    group,
                    some.size,
                    n_tokens[group],
                    mean,
                    error,
                    math.exp(mean) if not mean > 709 else math.inf,
                )
            )
    return cells


def window_rows(masks: Sequence[str], texts: Texts, values: Array) -> Iterator[tuple[Any, ...]]:
    """The rows of nll_windows.csv."""
    first: dict[str, int] = {}
    about = [
        (group, i - first.setdefault(group, i), len(ids) - 1)
        for i, (group, ids) in enumerate(zip(texts.groups, texts.ids, strict=True))
    ]
    for mask, row in zip(masks, values, strict=True):
        for one, value in zip(about, row.tolist(), strict=True):
            yield mask, *one, value
