"""The command `probe`: what neurons of the prompt's last token tell of the answer (2406.14144).

A logistic regression (classify.py) on the products of the first neurons of a set learns the labels
of prompts, such as whether the model's own answer costs more than 0; it is cross-validated, beside
probes of random neurons, and can be applied to other prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relneuron.ablation.conditions import other_places
from relneuron.artifact.dense import create_safetensors, rows_digest
from relneuron.artifact.files import (
    Json,
    RelneuronError,
    atomic_write,
    csv_bytes,
    refuse_output,
    sha256,
    writing,
)
from relneuron.artifact.journal import Journal, is_unfinished, progress_bar
from relneuron.artifact.manifest import Manifest, checked, same_model, versions
from relneuron.artifact.neurons import NeuronFile, Shape
from relneuron.artifact.parts import ROWS
from relneuron.artifact.prompts import Prompt, read_questions
from relneuron.artifact.reading import read_csv
from relneuron.artifact.stage import command, loading, placed
from relneuron.methods.contrast.classify import (
    NAME,
    PREDICTIONS,
    Labels,
    Probe,
    Scored,
    check_labels,
    cross_validated,
    fit,
    score,
    summed_up,
)
from relneuron.methods.contrast.options import ProbeOptions
from relneuron.model.batches import Budget
from relneuron.model.identity import other_weights, tokenizer_digest
from relneuron.model.load import describe_model
from relneuron.model.mlps.shape import model_shape
from relneuron.model.pair import running
from relneuron.model.products import Array, last_products
from relneuron.model.questions import Questions, encode
from relneuron.model.ranks import sharing
from relneuron.texts.prompts import chat_wrap
from relneuron.texts.tokens import listed

# The files of a probe that is fitted, and of one that is applied.
FITTED = (NAME, "probe.csv", "probe_predictions.csv")
APPLIED = ("applied.csv", "applied_predictions.csv")

TOP = "top"  # the chosen neurons, beside random ones

Neurons = list[tuple[int, int]]  # (layer, index) of products


class Asked(NamedTuple):
    """The model, and the prompts as it reads them."""

    model: Any
    mlps: Any
    questions: Questions
    labels: Labels | None


def probe(
    name: str,
    model: Any,
    tokenizer: Any,
    prompts_path: Path,
    folder: Path,
    options: ProbeOptions,
    *,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> list[Scored]:
    """Fit a probe, or apply one; returns the rows of probe.csv, or of applied.csv.

    Fitted, `folder` gets probe.safetensors, of all prompts, probe.csv, by cross-validation, and
    probe_predictions.csv; applied, applied_predictions.csv and, with labels, applied.csv. A journal
    of finished batches, whose rows are in a file beside it, lets a killed run go on; both are
    removed at the end.
    """
    stage = "probe" if options.apply is None else "probe_apply"
    files = [folder / file for file in (FITTED if options.apply is None else APPLIED)]
    is_unfinished(files[-1], stage)  # removes the journal of a run that was killed behind its end
    for path in files:
        refuse_output(path, stage, force)
    mlps = running(model)
    prompts = read_questions(checked(prompts_path), options.template)
    labels = None if options.labels is None else read_labels(options, prompts)
    if options.chat_template:
        wrap = chat_wrap(tokenizer)
        prompts = [replace(prompt, prompt=wrap(prompt.prompt)) for prompt in prompts]
    questions = encode(tokenizer, model, prompts, answers=False, n_tokens=0)
    described = describe_model(name, model, mlps, backend)
    Manifest(folder).check_model(described)
    asked = Asked(model, mlps, questions, labels)
    read = options.neurons if options.apply is None else options.apply
    assert read is not None, "ProbeOptions has one of the two"
    inputs = {
        "model": same_model(described),
        "tokenizer": tokenizer_digest(tokenizer),
        "prompts": sha256(prompts_path),
        "probe" if options.apply else "neurons": sha256(read),
        "labels": sha256(_table(options)[0]) if options.labels else None,
        **{k: v for k, v in options.recorded().items() if k not in ("neurons", "apply", "labels")},
        "column": _table(options)[1] if options.labels else None,
    }
    prepare = _to_fit if options.apply is None else _to_apply
    neurons, tell = prepare(asked, described, inputs, options)
    with sharing(model, folder, rows=True) as ranks:
        path = folder / f"{stage}.journal"
        beside = folder / ROWS[path.name]
        with ranks.in_turn():
            journal = Journal(path, inputs, ranks=ranks, shard=options.shard)
            if journal.is_first and not journal.done:
                beside.unlink(missing_ok=True)
            shape = (len(questions.ids), len(neurons))
            found = create_safetensors(beside, {"products": shape})["products"]
            journal.before_commit = found.flush
            journal.check(lambda rows: rows_digest([found], rows), beside.name)
        values, notices = _values(asked, neurons, found, journal, options, quiet)
        rows: list[Scored] = []
        if ranks.rank == 0:
            rows, made, more = tell(values)
            notices += more
            for notice in notices:
                warnings.warn(notice, stacklevel=2)
            with writing(stage, folder, files):
                for file, data in made.items():
                    atomic_write(folder / file, data)
                for path in files:
                    if path.name not in made:
                        path.unlink(missing_ok=True)
                manifest = Manifest(folder)
                if "model" not in manifest.data:
                    manifest.describe(versions=versions(), model=described)
                manifest.finish(
                    stage,
                    inputs,
                    [folder / file for file in made],
                    reads=[prompts_path, read, *([_table(options)[0]] if options.labels else [])],
                    notices=notices,
                    commands=_command(name, described, prompts_path, folder, options),
                )
            beside.unlink()
            journal.remove()
        told: list[Scored] = ranks.told(rows)
    return told


# What is told of the values: the rows of the table, the files, what a reader must know.
Made = tuple[list[Scored], dict[str, bytes], list[str]]
Tell = Callable[[Array], Made]


def _to_fit(
    asked: Asked, described: Json, inputs: Json, options: ProbeOptions
) -> tuple[Neurons, Tell]:
    """The neurons to read, and what becomes of their values."""
    path, labels, shape = options.neurons, asked.labels, model_shape(asked.mlps)
    assert path is not None and labels is not None, "ProbeOptions has both"
    file = NeuronFile.read(checked(path))
    file.check_model(shape)
    check_labels(labels, options.folds)
    sets = _with_random(chosen(file, path, options), shape, options.random_seeds)
    notices = other_weights(f"{path}: neurons", file.model, described)
    k = len(sets[TOP])
    if k < options.top:
        notices.append(f"{path} has {k} such neurons, not {options.top}: all of them are read")

    def tell(values: Array) -> Made:
        of_set = dict(zip(sets, np.split(values, len(sets), axis=1), strict=True))
        rows, files, more = _fitted(of_set, asked, labels, inputs, options, sets[TOP])
        return rows, files, notices + more

    return [one for some in sets.values() for one in some], tell


def _fitted(
    of_set: dict[str, Array],
    asked: Asked,
    labels: Labels,
    inputs: Json,
    options: ProbeOptions,
    top: Neurons,
) -> Made:
    """The probe of all prompts, and how each set does by cross-validation."""
    rows, told, n_short = [], {}, 0
    for name, own in of_set.items():
        told[name] = cross_validated(own, labels, options.folds, options.seed)
        rows.append(score(name, told[name].probabilities, labels, len(top)))
        n_short += told[name].n_short
    rows += [summed_up(rows[1:])] if rows[1:] else []
    coefficients, intercept, has_converged = fit(of_set[TOP], labels)
    n_short += not has_converged
    notices = []
    if n_short:
        n_fits = len(of_set) * options.folds + 1
        notices = [f"{n_short} of {n_fits} fits ended before they converged (100 steps)"]
    about = {**inputs, "reads": "product, last token of the prompt", "scaling": "none"}
    made = Probe(np.array(top, np.int64), coefficients, intercept, about)
    prompts = asked.questions.prompts
    predictions = _predictions(prompts, labels, told[TOP].folds, told[TOP].probabilities)
    files = zip(FITTED, (made.to_bytes(), _table_of(rows), predictions), strict=True)
    return rows, dict(files), notices


def _with_random(top: Neurons, shape: Json, seeds: int) -> dict[str, Neurons]:
    """The chosen neurons, and as many others of each layer for each seed."""
    order = Shape.of(shape)
    places = np.sort(order.places((layer, "gate", index) for layer, index in top))
    sets = {TOP: top}
    for seed in range(seeds):
        drawn = order.neurons(other_places(places, shape, seed, "probe", products=True))
        sets[f"random.{seed}"] = [(layer, index) for layer, _, index in drawn]
    return sets


def _to_apply(
    asked: Asked, described: Json, inputs: Json, options: ProbeOptions
) -> tuple[Neurons, Tell]:
    """The neurons to read, and what becomes of their values."""
    assert options.apply is not None, "else it is fitted"
    made, shape = Probe.read(checked(options.apply)), Shape.of(model_shape(asked.mlps))
    for layer, index in made.neurons.tolist():
        if not (0 <= layer < shape.layers and 0 <= index < shape.width(layer, "gate")):
            raise RelneuronError(
                f"{options.apply} reads neuron {index} of layer {layer}, which the model has not",
                "give the model that the probe was made with",
            )
    neurons = [(layer, index) for layer, index in made.neurons.tolist()]
    notices = other_weights(f"{options.apply}: the probe", made.about.get("model", {}), described)
    for name in ("template", "chat_template"):
        if made.about.get(name) != inputs[name]:
            notices.append(
                f"{options.apply} was made of prompts with another --{name.replace('_', '-')}: "
                f"{made.about.get(name)}"
            )

    def tell(values: Array) -> Made:
        found = made.probabilities(values)
        files = {APPLIED[1]: _predictions(asked.questions.prompts, asked.labels, None, found)}
        if asked.labels is None:
            return [], files, notices
        rows = [score("applied", found, asked.labels, len(neurons))]
        return rows, {APPLIED[0]: _table_of(rows), **files}, notices

    return neurons, tell


def _values(
    asked: Asked,
    neurons: Neurons,
    found: Array,
    journal: Journal,
    options: ProbeOptions,
    quiet: bool,
) -> tuple[Array, list[str]]:
    """(N, K) products of the last token, and what a reader must know of them.

    `found` is the file that keeps them, of which the journal notes the rows.
    """
    budget = Budget(options.batch_tokens, options.oom, journal)
    questions = asked.questions
    with progress_bar(len(questions.ids), "probe", "prompt", quiet) as bar, journal:
        of_file = last_products(
            *(asked.model, asked.mlps, questions, neurons, budget, bar.update),
            journal=journal,
            found=found,
        )
    values = np.array(of_file)  # which outlives it
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~np.isfinite(values).all(1)).tolist()
        raise RelneuronError(
            f"{listed([questions.prompts[row].id for row in rows])}: values that are not finite",
            "use --dtype float32",
        )
    return values, list(budget.notices)


def chosen(file: NeuronFile, path: Path, options: ProbeOptions) -> Neurons:
    """The first products of a set, best first; gate and up of one number are the same one."""
    name = options.of_set
    if name is None and len(file.sets) == 1:
        name = next(iter(file.sets))
    if name is None or name not in file.sets:
        what = "several sets" if name is None else f"no set {name!r}"
        raise RelneuronError(f"{path} has {what}", f"use --set: {', '.join(file.sets)}", 2)
    others = sorted({site for _, site, *_ in file.sets[name]} - {"gate", "up"})
    if others or not file.sets[name]:
        what = f"neurons of {', '.join(others)}" if others else "no neuron"
        raise RelneuronError(
            f"{path}: {name} has {what}: a probe reads products, what down reads",
            "give a set of neurons of gate and up, such as identify --method contrast finds",
        )
    rows = dict.fromkeys((layer, index) for layer, _, index, _ in file.sets[name])
    return list(rows)[: options.top]


def read_labels(options: ProbeOptions, prompts: Sequence[Prompt]) -> Labels:
    """(N,) 1 where a prompt's number is above `options.above`, else 0."""
    path, column = _table(options)
    found: dict[str, float] = {}
    for row in read_csv(checked(path), ("id", column)):
        if row.get("mask", options.mask) != options.mask:
            continue
        if row["id"] in found:
            raise RelneuronError(
                f"{path}, line {row.line}: a second number for {row['id']}",
                "give each prompt one row, or one of --mask",
            )
        found[row["id"]] = row.finite(column)
    missing = [p.id for p in prompts if p.id not in found]
    if missing:
        raise RelneuronError(
            f"{path} has no {column} for {listed(missing)}",
            "give each prompt a row, or another --mask",
        )
    return np.array([found[p.id] > options.above for p in prompts], np.int64)


def _table(options: ProbeOptions) -> tuple[Path, str]:
    path, _, column = (options.labels or "").rpartition(":")
    return Path(path), column


def _predictions(prompts: Sequence[Prompt], labels: Labels | None, folds: Any, found: Any) -> bytes:
    rows = [
        (
            prompt.id,
            "" if labels is None else int(labels[k]),
            "" if folds is None else int(folds[k]),
            int(found[k] > 0.5),
            float(found[k]),
        )
        for k, prompt in enumerate(prompts)
    ]
    return csv_bytes(PREDICTIONS, rows)


def _table_of(rows: Sequence[Scored]) -> bytes:
    return csv_bytes(Scored._fields, [["" if x is None else x for x in row] for row in rows])


def _command(
    name: str, described: Json, prompts: Path, folder: Path, options: ProbeOptions
) -> list[list[str]]:
    """The command that makes the stage again."""
    path, column = _table(options)
    there = replace(
        options,
        neurons=options.neurons and Path(placed(options.neurons, folder)),
        apply=options.apply and Path(placed(options.apply, folder)),
        labels=options.labels and f"{placed(path, folder)}:{column}",
    )
    given = (name, placed(prompts, folder), "-o", placed(folder, folder), *there.words())
    return command("probe", *given, **loading(described))
