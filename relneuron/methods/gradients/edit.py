"""The `edit` stage: what neurons write is erased, or moved from one answer to another.

editing.py calls it. Reads a model, sets of neurons and prompts; writes a folder with the edited
model, as Hugging Face writes one, and edit.csv with what the edit did.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relneuron.artifact.files import (
    RelneuronError,
    atomic_write,
    csv_bytes,
    real_path,
    sha256,
    unfinished,
    writing,
)
from relneuron.artifact.gradients import EDIT, EDIT_COLUMNS
from relneuron.artifact.journal import progress_bar
from relneuron.artifact.manifest import Manifest, checked, locked, same_model, versions
from relneuron.artifact.neurons import NeuronFile, check_neurons
from relneuron.artifact.prompts import Prompt, read_prompts, rows_about
from relneuron.artifact.stage import command, loading, placed
from relneuron.methods.gradients.before_after import (
    Asked,
    ask_all,
    measures,
    questions_of,
    texts_of,
)
from relneuron.methods.gradients.options import EditOptions
from relneuron.model.ask import Asker
from relneuron.model.batches import Budget
from relneuron.model.identity import other_weights, tokenizer_digest
from relneuron.model.layers import first_line
from relneuron.model.load import describe_model, fallbacks, quantisation
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.values import token_vector, value_vector

_WORK = ".edit.tmp"  # a folder that the model is saved to before its files take their places

Array = np.ndarray[Any, Any]


def check_output(model: str, output: Path, force: bool) -> None:
    """Refuse the model's own folder, and one with files that no killed `edit` left there."""
    if Path(model).is_dir() and real_path(model) == real_path(output):
        raise RelneuronError(
            f"{output} is the model's own folder, which stays as it is", "give another -o", 2
        )
    ours = {name for name, stage in unfinished(output).items() if stage == "edit"}
    ours |= {"manifest.json"} if ours else set()
    there = sorted(p.name for p in output.iterdir()) if output.is_dir() else []
    for name in there:
        if not (force or name in ours or name.startswith(".")):
            raise RelneuronError(
                f"{output / name} exists", "choose an empty folder, or add --force", 2
            )


def edit_model(
    name: str,
    model: Any,
    tokenizer: Any,
    neurons_path: Path,
    prompts_path: Path,
    output: Path,
    options: EditOptions | None = None,
    *,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> int:
    """Edit the value vectors of some sets in memory, and write the model to `output`; how many.

    v <- 0, or with `to` v <- v - old_factor * E(old) + new_factor * E(new): E the embedding of an
    answer's first token (arXiv 2104.08696, section 5.1). The old answer is that of the prompts that
    a set is about; a set of a whole relation has several, of which none is taken for the old one.

    edit.csv compares before and after (before_after.py):

    reliability     the first prompt of each edited fact: share that gives the new answer, or after
                    an erasure no longer gives the right one
    generalization  the same of the fact's other prompts
    locality        prompts that no edited set is about: share whose answer is that of before
    prob_old, prob_new, prob_others   mean probability of the answers
    perplexity      of sentences.jsonl beside the prompts, or of other prompts with their answers

    Intervals: bootstrap over facts; where all draws agree, Wilson's of as many facts.
    """
    options = options or EditOptions()
    check_output(name, output, force)
    _check_model(model)
    neurons = NeuronFile.read(checked(neurons_path))
    prompts = read_prompts(checked(prompts_path))
    mlps = find_mlps(model)
    shape = model_shape(mlps)
    neurons.check_model(shape)
    described = describe_model(name, model, mlps, backend)
    notices = other_weights(f"{neurons_path}: neurons", neurons.model, described)
    about = rows_about(prompts)
    sets = _sets(neurons, neurons_path, about, options)
    asked = questions_of(tokenizer, model, prompts, sets, about, options)
    moves = _moves(model, mlps, sets, prompts, about, asked, options)
    sentences = prompts_path.parent / "sentences.jsonl"
    texts = texts_of(tokenizer, model, sentences, prompts, asked.others)
    notices += asked.questions.notices
    for notice in notices:
        warnings.warn(notice, stacklevel=2)
    inputs = {
        "model": same_model(described),
        "tokenizer": tokenizer_digest(tokenizer),
        "neurons": sha256(neurons_path),
        "prompts": sha256(prompts_path),
        "sentences": sha256(sentences) if sentences.exists() else None,
        **options.recorded(),
    }
    asker = Asker(model, tokenizer)
    budget = Budget(options.batch_tokens, options.oom)
    total = 2 * (len(prompts) + len(asked.rows) * (asked.new is not None) + len(texts.prompts))
    with locked(output), progress_bar(total, "edit", "answer", quiet) as bar:
        before = ask_all(asker, asked, texts, budget, options, bar)
        with torch.no_grad():
            for vector, move in moves:
                vector.copy_(torch.zeros_like(vector) if move is None else vector + move)
        after = ask_all(asker, asked, texts, budget, options, bar)
        work = output / _WORK
        with suppress(FileNotFoundError):
            shutil.rmtree(work)
        _save(model, tokenizer, work)
        found = sorted(path.name for path in work.iterdir())
        files = [output / file for file in (*found, EDIT)]
        with writing("edit", output, files):
            for file in found:
                (work / file).replace(output / file)
            work.rmdir()
            atomic_write(output / EDIT, csv_bytes(EDIT_COLUMNS, measures(asked, before, after)))
            manifest = Manifest(output)
            edited = describe_model(str(output.name), model, mlps, backend)
            manifest.describe(
                versions=versions(),
                model=edited,
                fallbacks=fallbacks(edited) + notices + budget.notices,
            )
            manifest.finish(
                "edit",
                inputs,
                files,
                reads=[],
                edited_model=described,
                value_vectors=len(moves),
                perplexity_of="sentences.jsonl" if sentences.exists() else "the other prompts",
                commands=command(
                    "edit",
                    *(name, *(placed(p, output) for p in (neurons_path, prompts_path))),
                    *("-o", placed(output, output), *options.words()),
                    **loading(described),
                ),
            )
    return len(moves)


# --- what is edited ----------------------------------------------------------------------------


def _check_model(model: Any) -> None:
    if quantised := quantisation(model.config):
        raise RelneuronError(
            f"the model is quantised ({quantised['method']}): its vectors cannot be changed",
            "edit the model as it was before, and quantise what comes out",
        )
    if getattr(model, "peft_config", None):
        raise RelneuronError(
            "the model holds an adapter, which would be written in place of it",
            "merge it first (peft: model.merge_and_unload())",
        )


def _sets(
    neurons: NeuronFile, path: Path, about: Mapping[str, Sequence[int]], options: EditOptions
) -> dict[str, list[Any]]:
    """The sets that are edited, each of something that prompts ask."""
    names = list(neurons.sets) if options.sets is None else list(options.sets)
    for name in names:
        if name not in neurons.sets:
            known = ", ".join(list(neurons.sets)[:5])
            raise RelneuronError(f"{path} has no set {name!r}", f"its sets are {known}", 2)
        if name not in about:
            raise RelneuronError(
                f"{path} has a set for {name}, which no prompt is about",
                "give the prompts that the neurons were found with, or other --sets",
            )
    sets: dict[str, list[Any]] = {name: list(neurons.sets[name]) for name in names}
    if not any(sets.values()):
        raise RelneuronError(f"{path}: the sets have no neuron to edit", "choose others")
    if any(site == "down" for rows in sets.values() for _, site, *_ in rows):
        raise RelneuronError(
            f"{path}: neurons at the site down have no vector of their own",
            "edit neurons at gate or up",
        )
    return sets


def _moves(
    model: Any,
    mlps: Sequence[Part],
    sets: Mapping[str, Sequence[Any]],
    prompts: Sequence[Prompt],
    about: Mapping[str, Sequence[int]],
    asked: Asked,
    options: EditOptions,
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Each value vector and what is added to it, of a neuron in several sets the sum; None: erased.

    What cannot be edited is said here, before any work.
    """
    found: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor | None]] = {}
    for name, rows in sets.items():
        move = None
        if options.to is not None:
            move = _move(model, name, about[name], prompts, asked, options)
        for layer, _, index in check_neurons(rows, model_shape(mlps)):
            if (layer, index) not in found:
                found[layer, index] = value_vector(mlps, layer, index), move
            elif move is not None:
                vector, known = found[layer, index]
                found[layer, index] = vector, move if known is None else known + move
    return list(found.values())


def _move(
    model: Any,
    name: str,
    rows: Sequence[int],
    prompts: Sequence[Prompt],
    asked: Asked,
    options: EditOptions,
) -> torch.Tensor:
    """-old_factor * E(old) + new_factor * E(new) for what a set is about."""
    old = {asked.questions.answers[row] for row in rows}
    if len(old) > 1:
        several = ", ".join(sorted({prompts[row].object for row in rows})[:3])
        raise RelneuronError(
            f"{name} has several answers ({several}), of which none is the old one",
            "edit sets of facts: identify with --sets fact",
        )
    assert asked.new is not None
    new = asked.new.answers[asked.rows.index(rows[0])]
    vectors = [token_vector(model, token, options.embedding) for token in (*old, new)]
    return options.new_factor * vectors[1] - options.old_factor * vectors[0]


# --- what is written ----------------------------------------------------------------------------


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (ValueError, TypeError, RuntimeError) as error:  # a configuration that cannot be written
        raise RelneuronError(
            f"the edited model could not be saved: {first_line(error)}",
            "mend its configuration, or load it in another dtype",
        ) from error
