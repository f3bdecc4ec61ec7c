"""The stage `attribute --method ig|relevance`: a gradient's score of every neuron and sentence.

It writes ig.safetensors and completeness.csv, or relevance.safetensors, beside a copy of the
prompts. `commands.py` calls it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    csv_pieces,
    refuse_overwrite,
)
from relneuron.artifact.gradients import (
    COMPLETENESS,
    COMPLETENESS_COLUMNS,
    FILES,
    IG,
    RELEVANCE,
    GradientFile,
)
from relneuron.artifact.journal import Journal, progress_bar
from relneuron.artifact.manifest import (
    Manifest,
    json_digest,
    same_model,
    versions,
)
from relneuron.artifact.prompts import (
    Prompt,
    check_copy,
    check_recorded,
    write_copy,
)
from relneuron.artifact.stage import STUDY, command, loading, placed
from relneuron.methods.gradients.asking import ALONE, Asking, asked_lengths, end_of_text
from relneuron.methods.gradients.options import GradientOptions, IgOptions
from relneuron.model.batches import SENTENCES, Budget, batch_sizes, cut
from relneuron.model.gradients.sites import read_sites
from relneuron.model.gradients.wide import in_float64
from relneuron.model.identity import tokenizer_digest
from relneuron.model.load import describe_model
from relneuron.model.ranks import sharing
from relneuron.model.targets import read_asked
from relneuron.texts.tokens import policy_text, target_notices

Array = np.ndarray[Any, Any]


def _journal_path(folder: Path, method: str) -> Path:
    return folder / f"attribute_{method}.journal"


def refuse_outputs(folder: Path, method: str, force: bool) -> None:
    """Raise if a file that the stage writes exists, unless `force` or a killed run left it."""
    is_done = f"attribute_{method}" in Manifest(folder).data["stages"]
    force = force or (_journal_path(folder, method).exists() and not is_done)
    for file in (FILES[method], *([COMPLETENESS] if method == IG else [])):
        refuse_overwrite(folder / file, force)


def attribute(
    name: str,
    model: Any,
    tokenizer: Any,
    prompts_path: Path,
    folder: Path,
    options: GradientOptions,
    *,
    force: bool = False,
    quiet: bool = False,
) -> None:
    """Score every neuron for the answers of `prompts_path`'s sentences and write it to `folder`.

    `IgOptions`: integrated gradients of the answer's probability along each layer's neurons at the
    last token (`model.gradients.reference`); several tokens of an answer are asked for one by one,
    and their scores and probabilities summed or averaged. `RelevanceOptions`: gradient x
    activation, summed over the tokens (`model.gradients.relevance`).

    What the sentences are read from: `knowledge.read_knowledge`. A journal of finished batches,
    with the digests of their scores, lets a killed run go on and end with the same bits. The folder
    may be that of a recorded study, or of another attribution, of this model and these prompts.
    """
    method = IG if isinstance(options, IgOptions) else RELEVANCE
    stage, written = f"attribute_{method}", FILES[method]
    sites = read_sites(model, options.site)
    asked = read_asked(prompts_path, folder, model, tokenizer, options)
    prompts, targets, copy = asked.prompts, asked.targets, asked.copy
    lengths = asked_lengths(model, prompts, targets, options)
    described = describe_model(name, model, [mlp for mlp in sites.mlps if mlp is not None], "auto")
    inputs = {
        "model": same_model(described),
        "tokenizer": tokenizer_digest(tokenizer),
        "prompts": hashlib.sha256(copy).hexdigest(),
        "tokens": json_digest([targets.ids, targets.tokens or targets.targets]),
        **options.recorded(),
    }
    path = _journal_path(folder, method)
    if Manifest(folder).is_done(stage, inputs, apart=("count", "contrast"), force=force):
        path.unlink(missing_ok=True)
        return
    refuse_outputs(folder, method, force)
    check_recorded(folder, prompts_path, copy, described)
    check_copy(folder / "prompts.jsonl", prompts_path, copy, force)
    replaced = end_of_text(tokenizer) if getattr(options, "baseline", "") == "replaced" else None
    wide = in_float64(model) if options.precision == "float64" else nullcontext()
    shape = {"layers": described["layers"], "width": described["width"]}
    with sharing(model, folder, rows=True) as ranks, wide:
        with ranks.in_turn():
            if ranks.rank == 0:
                write_copy(folder / "prompts.jsonl", prompts_path, copy)
            journal = Journal(path, inputs, ranks=ranks, shard=options.shard)
            budget = Budget(options.batch_tokens, options.oom, journal, what=SENTENCES, alone=ALONE)
            asking = Asking(sites, prompts, targets, options, budget, replaced)
            if journal.is_first and not journal.done:
                (folder / written).unlink(missing_ok=True)
            about = {
                "prompts": inputs["prompts"],
                "ids": [prompt.id for prompt in prompts],
                "relations": [prompt.relation for prompt in prompts],
                "targets": asking.goals,
                "model": described["digest"],
                "position": "last" if method == IG else "all",
                "probability": asking.precision(described["dtype"]),
                **options.recorded(),
            }
            scores = GradientFile(folder / written, method, shape, about)
            journal.before_commit = scores.flush
            by_length = sorted(range(len(prompts)), key=lambda row: lengths[row])
            columns = [asking.columns(row, lengths[row]) for row in range(len(prompts))]
            cuts = cut(by_length, columns.__getitem__, options.batch_tokens)
            batches = {f"{stage} {number}": rows for number, rows in enumerate(cuts)}
            journal.check(scores.digest, written)
        found = _score(asking, batches, columns, scores, journal, budget, quiet)
        if ranks.rank:
            return
        # Until the journal is gone, what is written here counts as unfinished.
        names = [written, "prompts.jsonl"]
        if method == IG:
            atomic_write(folder / COMPLETENESS, _completeness(prompts, found))
            names.append(COMPLETENESS)
        firsts = [goal[0] for goal in asking.goals]
        notices = [*targets.notices, *target_notices(tokenizer, prompts, firsts)]
        notices += asking.notices(described["dtype"]) + budget.notices
        for notice in notices:
            warnings.warn(notice, stacklevel=2)
        manifest = Manifest(folder)
        run_on = {"versions": versions(), "dtype": described["dtype"], "fallbacks": notices}
        if not manifest.data["stages"].keys() & {"record", "attribute"}:
            manifest.describe(model=described, **run_on)
        manifest.finish(
            stage,
            inputs,
            [folder / file for file in names],
            reads=[folder / "prompts.jsonl"],
            apart=("count", "contrast"),
            sentences=len(prompts),
            how=asking.how(described["dtype"]),
            tokens={"special": policy_text(tokenizer), "several": targets.n_several},
            batch_plan={
                "batch_tokens": options.batch_tokens,
                **batch_sizes(batches.values(), lengths.__getitem__),
            },
            **run_on,
            commands=command(
                "attribute",
                *(name, placed(prompts_path, folder), "-o", STUDY, "--method", method),
                *options.words(),
                **{**loading(described), "backend": None},
            ),
        )
        journal.remove()


def _score(
    asking: Asking,
    batches: Mapping[str, list[int]],
    columns: Sequence[int],
    scores: GradientFile,
    journal: Journal,
    budget: Budget,
    quiet: bool,
) -> list[Json]:
    """Ask every batch that the journal lacks; what it keeps of each sentence, in their order.

    Numbers are arrays, of 8 bytes each.
    """
    with progress_bar(len(columns), "attribute", "sentence", quiet) as bar, journal:
        for key, rows in batches.items():
            if journal.takes(key):
                said = budget.run(rows, columns.__getitem__, asking.ask)
                _check_finite(asking, rows, said)
                names = said[0].keys()
                scores.store(rows, {n: np.stack([one[n] for one in said]) for n in names})
                kept = [_kept(one) for one in said]
                noted = {"rows": rows, "digest": scores.digest(rows)}
                journal.add(key, {"found": kept, **noted})
            bar.update(len(rows))
        journal.together()
    found: list[Json] = [{}] * len(columns)
    for key, rows in batches.items():
        for row, one in zip(rows, journal.done[key]["found"], strict=True):
            found[row] = one and {name: np.array(value, np.float64) for name, value in one.items()}
    return found


def _check_finite(asking: Asking, rows: Sequence[int], said: Sequence[dict[str, Any]]) -> None:
    for row, one in zip(rows, said, strict=True):
        if not np.isfinite(next(iter(one.values()))).all():
            raise RelneuronError(
                f"prompt {asking.prompts[row].id}: its gradients are not finite",
                "use --dtype float32 or --precision float64, or remove the prompt",
            )


def _kept(one: dict[str, Any]) -> Json:
    """The numbers of completeness.csv for one sentence, before they are rounded to float32."""
    if IG not in one:
        return {}
    at_baseline: Array = one["probability_at_baseline"]
    change = [None if p != p else p for p in at_baseline.tolist()]
    return {"p": float(one["probability"]), "at": change, "sums": one[IG].sum(-1).tolist()}


def _completeness(prompts: Sequence[Prompt], found: Sequence[Json]) -> Iterator[bytes]:
    """A row a sentence and layer: P, P at the layer's baseline, their difference, the sum of IG."""
    shown: Callable[[float], str] = "{:.9g}".format
    rows = (
        (
            *(prompt.id, prompt.relation, layer),
            *map(shown, (p, at, p - at, total, total - (p - at))),
        )
        for prompt, one in zip(prompts, found, strict=True)
        for p in [float(one["p"])]
        for layer, (at, total) in enumerate(
            zip(one["at"].tolist(), one["sums"].tolist(), strict=True)
        )
        if at == at
    )
    return csv_pieces(COMPLETENESS_COLUMNS, rows)
