"""The `attribute` stage: what raises each sentence's answer, neuron by neuron (arXiv 2312.12141).

It writes the scores (attributions.csv or .parquet, gains.safetensors), the sentences (targets.csv),
the tokens that the best neurons promote (promoted.csv), and what becomes of the answers when the
neurons that eight methods choose are zeroed (interventions.csv, comparison.csv).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from relneuron.ablation.rows import intervene
from relneuron.artifact.effects import fact_numbers
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    csv_bytes,
    csv_pieces,
    refuse_overwrite,
)
from relneuron.artifact.gains import (
    COMPARISON,
    COMPARISON_COLUMNS,
    GAINS,
    INTERVENTIONS,
    INTERVENTIONS_COLUMNS,
    PROMOTED,
    PROMOTED_COLUMNS,
    TABLES,
    TARGETS,
    GainFile,
    Target,
    number,
    table_pieces,
    targets_bytes,
)
from relneuron.artifact.journal import Journal, progress_bar
from relneuron.artifact.manifest import Manifest, json_digest, versions
from relneuron.artifact.prompts import (
    Prompt,
    check_copy,
    check_recorded,
    write_copy,
)
from relneuron.artifact.stage import STUDY, command, loading, placed
from relneuron.methods.gains.comparison import Sizes, plan, rows_of
from relneuron.methods.gains.drops import measures, summarise
from relneuron.methods.gains.found import Found, Sets
from relneuron.methods.gains.options import AttributeOptions, attribute_inputs, check_heads
from relneuron.methods.gains.promoted import promoted_rows
from relneuron.methods.gains.rank import best_by_relation
from relneuron.methods.gains.scorer import Scorer, Sentences
from relneuron.methods.gains.targets import predictions
from relneuron.model.batches import SENTENCES, Budget, batch_sizes, plan_batches
from relneuron.model.load import describe_model, fallbacks
from relneuron.model.questions import Questions
from relneuron.model.ranks import sharing
from relneuron.model.stream.parts import ResidualModel
from relneuron.model.stream.read import read_residual_model
from relneuron.model.targets import read_asked
from relneuron.texts.knowledge import TargetPrompt
from relneuron.texts.tokens import policy_text, target_notices, token_text

JOURNAL = "attribute.journal"
WRITTEN = (TARGETS, *TABLES, GAINS, PROMOTED, INTERVENTIONS, COMPARISON)


def refuse_outputs(folder: Path, force: bool) -> None:
    """Raise if a file that the stage writes exists, unless `force` or a killed run left it."""
    if folder.is_file():
        raise RelneuronError(f"{folder} is a file", "give a folder", 2)
    is_done = "attribute" in Manifest(folder).data["stages"]
    force = force or ((folder / JOURNAL).exists() and not is_done)
    for name in WRITTEN:
        refuse_overwrite(folder / name, force)


def attribute(
    name: str,
    model: Any,
    tokenizer: Any,
    prompts_path: Path,
    folder: Path,
    options: AttributeOptions | None = None,
    *,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> None:
    """Score what raises the answers of `prompts_path`'s sentences and write it to `folder`.

    A value score is log p(w | x + v) - log p(w | x) in nats: w the first token of the answer (the
    one that is given for the sentence, or with `options.target` "prediction" the model's own), v
    what a layer, head, position or neuron writes at the last token, x the residual stream before
    it (methods B3). A query score is a neuron's or layer's share in activating the best value
    neurons (B4). `options.compare` zeroes, in the sentences whose answer the model knows, the
    neurons that eight methods choose, and asks again (B5, B6).

    What the sentences are read from: `knowledge.read_knowledge`. Memory holds one batch of scores
    at a time; the rows of the table stand in a journal of finished batches, with the digests of
    their gains, which lets a killed run go on, and end with the same bits. An attribution that is
    finished already is left as it is. The folder may be that of a recorded study of this model and
    these prompts, whose files and description stay as they are.
    """
    options = options or AttributeOptions()
    options.check_installed()
    is_predicted = options.target == "prediction"
    residual = read_residual_model(model)
    check_heads(type(model).__name__, residual.no_heads, options)
    asked = read_asked(prompts_path, folder, model, tokenizer, options)
    prompts, targets, copy = asked.prompts, asked.targets, asked.copy
    described = describe_model(name, model, residual.shape, backend)
    inputs = attribute_inputs(
        described,
        tokenizer,
        hashlib.sha256(copy).hexdigest(),
        json_digest([targets.ids, targets.targets]),
        options,
    )
    if Manifest(folder).is_done("attribute", inputs, apart=("count", "contrast"), force=force):
        (folder / JOURNAL).unlink(missing_ok=True)
        return
    refuse_outputs(folder, force)
    check_recorded(folder, prompts_path, copy, described)
    check_copy(folder / "prompts.jsonl", prompts_path, copy, force)
    sizes = Sizes.of(residual, options.intervene)
    batches = plan_batches(Questions(prompts, targets.ids, targets.targets), options.batch_tokens)
    if is_predicted:
        own = Budget(options.batch_tokens, options.oom, what=SENTENCES)
        chosen = predictions(residual, targets.ids, batches, own)
        targets = replace(targets, targets=chosen, rights=[[token] for token in chosen])
    sentences = Sentences(prompts, targets)
    notices = targets.notices + target_notices(tokenizer, prompts, targets.targets)
    about = {
        "prompts": inputs["prompts"],
        "ids": [prompt.id for prompt in prompts],
        "model": described["digest"],
    }
    with sharing(model, folder, rows=True) as ranks:
        gains = None
        with ranks.in_turn():
            if ranks.rank == 0:
                write_copy(folder / "prompts.jsonl", prompts_path, copy)
            journal = Journal(folder / JOURNAL, inputs, ranks=ranks, shard=options.shard)
            if journal.is_first and not journal.done:
                (folder / GAINS).unlink(missing_ok=True)
            if "ffn_neuron" in options.kinds:
                gains = GainFile(folder / GAINS, residual.shape, about)
                journal.before_commit = gains.flush
                journal.check(gains.digest, GAINS)
        scorer = Scorer(residual, sentences, options, sizes, backend)
        budget = Budget(options.batch_tokens, options.oom, journal, what=SENTENCES)
        found = _score_all(scorer, batches, gains, journal, budget, quiet)
        known = found.known()
        made = [
            Target(
                prompt.id,
                prompt.relation,
                token_text(tokenizer, target),
                target,
                n_answer,
                len(ids),
                **{key: one[key] for key in ("rank", "prob", "logprob", "kept")},
                answer=answer if len(prompt.objects) > 1 else "",
            )
            for prompt, answer, target, n_answer, ids, one in zip(
                *(prompts, targets.answers, targets.targets, targets.n_answer_tokens),
                *(targets.ids, known),
                strict=True,
            )
        ]
        written: dict[str, bytes | Iterable[bytes]] = {}
        kept = [row for row, target in enumerate(made) if target.kept]
        if options.compare and kept:
            written |= _compare(
                residual, sentences, found, kept, sizes, options, journal, budget, quiet
            )
        elif options.compare:
            notices.append("nothing compared: the model knows the answer of no sentence")
        if options.keep == "known" and not kept:
            notices.append("nothing scored: the model knows the answer of no sentence")
        for notice in notices:
            warnings.warn(notice, stacklevel=2)
        notices += budget.notices
        if ranks.rank:
            return
        promoted = promoted_rows(residual, tokenizer, prompts, found.best())
        written = {
            TARGETS: targets_bytes(made),
            options.table: table_pieces(options.table, found.texts()),
            PROMOTED: csv_bytes(PROMOTED_COLUMNS, promoted),
            **written,
        }
        # Until the journal is gone, what is written here counts as unfinished.
        for file, data in written.items():
            atomic_write(folder / file, data)
        for file in {*WRITTEN} - {*written, GAINS}:
            (folder / file).unlink(missing_ok=True)
        best = {}
        if gains is not None:
            best = best_by_relation(gains, residual.shape, made, options.keep)
        manifest = Manifest(folder)
        run_on = {
            "versions": versions(),
            "dtype": described["dtype"],
            "fallbacks": fallbacks(described) + notices,
        }
        if "record" not in manifest.data["stages"]:  # else the folder is described as recorded
            manifest.describe(model=described, **run_on)
        names = (*written, *([GAINS] if gains else []), "prompts.jsonl")
        files = [folder / file for file in names]
        manifest.finish(
            "attribute",
            inputs,
            files,
            reads=[folder / "prompts.jsonl"],
            apart=("count", "contrast"),
            sentences=len(prompts),
            kept=len(kept),
            **_said(residual, options, sizes if kept else None),
            tokens={
                "target": _asked_for(prompts, options.target),
                "special": policy_text(tokenizer),
                "answers_of_several_tokens": targets.n_several,
                "first_prompt_ids": targets.ids[0][:8],
                "padding": "left, masked; position ids are explicit",
            },
            seeds={"interventions": list(range(options.random_seeds))},
            batch_plan={
                "batch_tokens": options.batch_tokens,
                **batch_sizes(batches, lambda row: len(targets.ids[row])),
                "order": "by split and language, then by length",
            },
            memory={"scores": "of one batch of sentences; the rows of all on disk"},
            **run_on,
            best=best,
            commands=command(
                "attribute",
                *(name, placed(prompts_path, folder), "-o", STUDY, *options.words()),
                **loading(described),
            ),
        )
        journal.remove()


def _asked_for(prompts: Sequence[Prompt], target: str) -> str:
    if target == "prediction":
        return "the model's most probable token"
    n_given = sum(isinstance(prompt, TargetPrompt) for prompt in prompts)
    return "the answer's first token" + (f"; given for {n_given} sentences" if n_given else "")


# --- scores ----------------------------------------------------------------------------------


def _score_all(
    scorer: Scorer,
    batches: Sequence[list[int]],
    gains: GainFile | None,
    journal: Journal,
    budget: Budget,
    quiet: bool,
) -> Found:
    """Score every batch that the journal lacks; what is found of each sentence."""
    ids = scorer.sentences.targets.ids
    by_key = {f"attribute {batch}": rows for batch, rows in enumerate(batches)}
    found = Found(journal, by_key)

    def score(key: str, rows: list[int]) -> list[Json]:
        known, block = scorer.score(rows, partial(found.keep, key))
        if gains is not None and block is not None:
            gains.store(rows, block)
        return known

    with progress_bar(sum(map(len, batches)), "attribute", "sentence", quiet) as bar, journal:
        for key, rows in by_key.items():
            if journal.takes(key):
                known = budget.run(rows, lambda row: len(ids[row]), partial(score, key))
                digest = None if gains is None else gains.digest(rows)
                journal.add(key, {"found": known, "rows": rows, "digest": digest})
            bar.update(len(rows))
        journal.together()
    return found


def _said(residual: ResidualModel, options: AttributeOptions, sizes: Sizes | None) -> Json:
    """How the numbers came about, for the manifest."""
    exact = options.mode == "exact"
    gains = "exact" if exact else f"certified: within {options.tolerance} nats"
    query: Json = {"of": options.query_of, "units": options.query_units}
    if options.query_of == "ffn":
        query["key"] = options.key
    if residual.centred:
        query["keys"] = "centred" if options.center_keys else "not centred"
    return {
        "ffn_gains": gains,
        "final_norm": {
            "kind": "LayerNorm" if residual.centred else "RMSNorm",
            "scale": "own, of each vector" if options.own_norm else "frozen",
            "eps": residual.eps,
            "bias": options.norm_bias,
        },
        **({"soft_cap": residual.cap} if residual.cap is not None else {}),
        **({"heads": f"not told apart: {residual.no_heads}"} if residual.no_heads else {}),
        "query": query,
        "attention": "eager, where it is traced",
        **({"zeroed": asdict(sizes)} if options.compare and sizes else {}),
    }


# --- the comparison --------------------------------------------------------------------------


def _compare(
    residual: ResidualModel,
    sentences: Sentences,
    found: Found,
    kept: Sequence[int],
    sizes: Sizes,
    options: AttributeOptions,
    journal: Journal,
    budget: Budget,
    quiet: bool,
) -> dict[str, Iterable[bytes]]:
    """interventions.csv and comparison.csv: the known sentences with their neurons zeroed."""
    prompts = [sentences.prompts[row] for row in kept]
    ids, types = [p.id for p in prompts], [p.relation for p in prompts]
    heads = found.heads(kept).reshape(len(kept), len(residual.layers), residual.n_heads)
    sets = Sets(found, kept)
    conditions = plan(residual, ids, types, sets, heads, sizes, n_seeds=options.random_seeds)
    total = len(conditions) * len(kept)
    with progress_bar(total, "compare", "answer", quiet) as bar, journal:
        answered = intervene(
            residual,
            [sentences.targets.ids[row] for row in kept],
            [sentences.targets.targets[row] for row in kept],
            [condition.offs for condition in conditions],
            batch_tokens=options.batch_tokens,
            budget=budget,
            journal=journal,
            advance=bar.update,
        )
    names = [condition.name for condition in conditions]
    asked = (
        (r.condition, r.id, r.relation, r.rank, number(r.prob), number(r.logprob))
        for r in rows_of(names, ids, types, answered)
    )
    facts = fact_numbers(ids, {p.id: p for p in prompts})
    found_means = summarise(names, np.array(types), facts, measures(answered))
    means = ([number(v) if isinstance(v, float) else v for v in row] for row in found_means)
    return {
        INTERVENTIONS: csv_pieces(INTERVENTIONS_COLUMNS, asked),
        COMPARISON: csv_pieces(COMPARISON_COLUMNS, means),
    }
