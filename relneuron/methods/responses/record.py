"""The `record` stage: one instrumented pass over the prompts.

It asks every prompt (validated.csv) and pools each det prompt's responses (responses.safetensors).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from relneuron.artifact.files import (
    Json,
    atomic_write,
    csv_bytes,
    refuse_overwrite,
    sha256,
)
from relneuron.artifact.journal import Journal, is_unfinished, n_started, progress_bar
from relneuron.artifact.manifest import Manifest, same_model, versions
from relneuron.artifact.neurons import Shape
from relneuron.artifact.stage import STUDY, command, loading, placed
from relneuron.methods.responses.asked import read_asked
from relneuron.methods.responses.fill import Filling, ask_all
from relneuron.methods.responses.options import DEVICE, DISK, MEMORY, RecordOptions
from relneuron.methods.responses.places import Kept, OnDisk, Prompts, Store
from relneuron.methods.responses.room import agreed, choose, devices_of
from relneuron.model.ask import Asker
from relneuron.model.batches import Budget, batch_sizes
from relneuron.model.canary import check_canary
from relneuron.model.identity import tokenizer_digest
from relneuron.model.load import describe_model, fallbacks
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.patch import Patch
from relneuron.model.questions import is_correct
from relneuron.model.ranks import sharing
from relneuron.model.states import LayerState
from relneuron.texts.tokens import policy_text


def record_inputs(model: Json, tokenizer: Any, prompts: Path, options: RecordOptions) -> Json:
    """What the stage depends on, for the manifest."""
    return {
        "model": same_model(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "prompts": sha256(prompts),
        "validate": options.validate,
        **options.recorded(),
    }


def _modules(mlp: Part) -> Json:
    """Each site's module, with {} for the layer, and at which of its outputs the neurons begin."""
    if isinstance(mlp, Experts):
        parts = {site: (mlp.path, 0) for site in ("gate", "up", "down")}
    else:
        maps = [part for part in (mlp.gate, mlp.up, mlp.down_map) if part is not None]
        parts = {part.site: (part.path, part.start) for part in maps}
    parts |= {part.site: (part.path, part.start) for part in mlp.projections}
    return {
        site: [path.replace(f".{mlp.layer}.", ".{}.", 1), start]
        for site, (path, start) in parts.items()
    }


def record(
    name: str,
    model: Any,
    tokenizer: Any,
    prompts_path: Path,
    folder: Path,
    options: RecordOptions | None = None,
    *,
    backend: str = "auto",
    store: Store | None = None,
    force: bool = False,
    quiet: bool = False,
) -> float | None:
    """Ask every prompt and write validated.csv and responses.safetensors; returns clean accuracy.

    A det prompt's response of a neuron is the mean over its pooled tokens of the neuron's raw
    output: gate_proj's (before the activation), up_proj's, down_proj's; float32. The tensors
    `gate.<layer>`, `up.<layer>` (N, F) and `down.<layer>` (N, D) have one row per det prompt, in
    the order of prompts.jsonl; the file's metadata names them, their file's digest, the pooling and
    the model's digest. Memory holds one batch of responses at a time: rows go to a memory map, and
    a journal of finished batches, with the digests of their rows, lets a killed run go on with the
    same bits; rows that are not as they were noted are asked for again. With `attention` also the
    outputs of the attention's projections, as `q.<layer>` to `o.<layer>`.

    Without `validate`, or where no prompt has an object (sentences for concepts), nothing is asked:
    one forward a prompt, no prediction, every prompt counts as correct, None in place of accuracy.

    With a `store` responses are kept where it asks for, and if that is not the disk it has them
    behind the call (of several processes that of the first one), and no file is written. Then the
    journal stays, too: whoever needs them no more removes it. A run that was killed reads again
    what it had in memory, and asks nothing again.
    """
    options = options or RecordOptions()
    pooling, exclude_bos = options.pooling, options.exclude_bos
    output = folder / "validated.csv"
    refuse_overwrite(output, force or is_unfinished(output, "record"))
    asked = read_asked(prompts_path, model, tokenizer, options)
    prompts, options, questions = asked.prompts, asked.options, asked.questions
    batches, det, n_pooled = asked.batches, asked.det, asked.n_pooled
    validate = options.validate
    mlps = find_mlps(model, attention=options.attention)
    shape = model_shape(mlps)
    if options.attention:
        check_canary(model, mlps, Asker(model, tokenizer).pad(questions.ids[:1])[0], backend)
    described = describe_model(name, model, mlps, backend)
    inputs = record_inputs(described, tokenizer, prompts_path, options)
    for notice in questions.notices:
        warnings.warn(notice, stacklevel=2)
    about = asked.about(inputs["prompts"], described["digest"])
    recorded, devices = Prompts(Shape.of(shape), det, n_pooled, about), devices_of(mlps)
    if store is not None:
        store.kept = None
        choose(store.asked, recorded, devices, n_started())  # raises before anything is written
    copy, path = folder / "prompts.jsonl", folder / "responses.safetensors"
    with sharing(model, folder, rows=True) as ranks:
        kind = DISK if store is None else agreed(store.asked, recorded, devices, ranks)
        with ranks.in_turn():
            if not ranks.rank:
                _copy(prompts_path, copy, force)
            journal = Journal(folder / "record.journal", inputs, ranks=ranks, shard=options.shard)
            if journal.is_first and (kind != DISK or not journal.done):
                path.unlink(missing_ok=True)
            place = _place(kind, recorded, path, devices)
            journal.before_commit = place.flush
            if isinstance(place, OnDisk):
                journal.check(place.digest, path.name)
        budget = Budget(options.batch_tokens, options.oom, journal)
        patch = Patch(mlps, [LayerState() for _ in mlps], backend=backend)
        bar = progress_bar(len(prompts), "record", "prompt", quiet)
        with bar, journal, patch, Filling(place, mlps, [*recorded.order.widths]) as filling:
            ask_all(
                Asker(model, tokenizer),
                questions,
                filling,
                journal,
                patch,
                batches=batches,
                budget=budget,
                pooling={"pooling": pooling, "exclude_bos": exclude_bos},
                validate=validate,
                ranks=ranks,
                bar=bar,
            )
        if isinstance(place, Kept) and store is not None:
            place.gather(ranks)
            store.kept = place
        predictions = [""] * len(prompts)
        for number, rows in enumerate(batches):
            said = journal.done[str(number)]["predictions"]
            for row, prediction in zip(rows, said, strict=True):
                predictions[row] = prediction
        right = partial(is_correct, accept_object_prefix=options.accept_object_prefix)
        correct = [
            not validate or any(right(prediction, name) for name in prompt.objects)
            for prompt, prediction in zip(prompts, predictions, strict=True)
        ]
        accuracy = sum(correct) / len(correct) if validate else None
        if ranks.rank:
            return accuracy
        table = zip((prompt.id for prompt in prompts), predictions, map(int, correct), strict=True)
        atomic_write(output, csv_bytes(("id", "prediction", "correct"), table))
        manifest = Manifest(folder)
        manifest.describe(
            versions=versions(),
            model=described,
            dtype=described["dtype"],
            sites=list(recorded.order.widths),
            modules=_modules(mlps[0]),
            threshold=None,  # responses are means, nothing is counted
            tokens={
                "pooling": pooling,
                "first_token": "excluded" if exclude_bos else "included",
                "special": policy_text(tokenizer),
                "first_prompt_ids": questions.ids[0][:8],
                "padding": "left, masked; position ids are explicit",
                "pooled": sum(n_pooled),
            },
            batch_plan={
                "batch_tokens": options.batch_tokens,
                **batch_sizes(batches, questions.length),
                "order": "by split and language, then by length",
            },
            memory=_memory(kind, recorded.n_bytes, len(det), max(map(len, batches))),
            fallbacks=fallbacks(described) + questions.notices + budget.notices,
        )
        made_by = command(
            "record",
            *(name, placed(prompts_path, folder), "-o", STUDY, *options.words()),
            **loading(described),
        )
        # No command leaves out the validation of prompts that have objects.
        is_asked = validate or not any(prompt.object for prompt in prompts)
        made = [output, path, copy] if kind == DISK else [output, copy]
        made_by = made_by if is_asked else []
        manifest.finish("record", inputs, made, reads=[copy], commands=made_by)
        if kind == DISK:
            journal.remove()
    return accuracy


def _copy(source: Path, copy: Path, force: bool) -> None:
    """The prompts that are recorded, in the folder of their study."""
    data = source.read_bytes()
    if not (copy.exists() and copy.read_bytes() == data):
        refuse_overwrite(copy, force)
        atomic_write(copy, data)


def _place(
    kind: str, prompts: Prompts, path: Path, devices: Mapping[int, torch.device]
) -> OnDisk | Kept:
    if kind == DISK:
        return OnDisk(prompts, path)
    on_host = torch.device("cpu")
    return Kept(prompts, (lambda layer: on_host) if kind == MEMORY else devices.__getitem__)


def _memory(kind: str, n_bytes: int, n_rows: int, n_at_once: int) -> Json:
    """What the stage keeps where, in bytes, for the manifest; the same on every machine."""
    of_batch = n_bytes // n_rows * n_at_once
    said = {
        DISK: "streamed by block of prompts: one batch in memory, the rest on disk",
        MEMORY: "kept in memory until they are ranked, never written",
        DEVICE: "kept where their layers compute until they are ranked, never written",
    }
    found: Json = {
        "responses": said[kind],
        "responses_on_disk_bytes": n_bytes if kind == DISK else 0,
        "responses_in_memory_bytes": of_batch + (n_bytes if kind == MEMORY else 0),
    }
    return found | ({"responses_on_device_bytes": n_bytes} if kind == DEVICE else {})
