"""`record` and `identify` in one go, each unless it is done: responses that nobody keeps.

`run` has it for the concepts, `record --identify` for any prompts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from relneuron.artifact.files import Json, refuse_output, refuse_overwrite
from relneuron.artifact.journal import is_unfinished, parts_of
from relneuron.artifact.manifest import Manifest, checked
from relneuron.artifact.neurons import NeuronFile
from relneuron.artifact.prompts import read_prompts
from relneuron.artifact.stage import STUDY, command, loading, placed
from relneuron.methods.responses.options import AtOnceOptions, RankOptions, RecordOptions
from relneuron.methods.responses.places import Store
from relneuron.methods.responses.rank import check_installed, identify, identify_inputs
from relneuron.methods.responses.record import record, record_inputs
from relneuron.model.load import describe_model
from relneuron.model.mlps.find import find_mlps
from relneuron.model.ranks import Ranks, sharing

RESPONSES, JOURNAL = "responses.safetensors", "record.journal"


def are_done(
    folder: Path,
    described: Json,
    tokenizer: Any,
    prompts: Path,
    recording: RecordOptions,
    ranking: RankOptions,
    *,
    force: bool = False,
) -> tuple[bool, bool]:
    """Whether a folder's prompts are recorded, and its neurons identified, with these options."""
    manifest = Manifest(folder)
    inputs = record_inputs(described, tokenizer, prompts, recording)
    recorded = manifest.is_done("record", inputs, force=force)
    identified = recorded and manifest.is_done(
        "identify", identify_inputs(folder, ranking), force=force
    )
    return recorded, identified


def drop_journal(folder: Path) -> None:
    """Remove what `record` noted of responses that are needed no more."""
    for path in (*parts_of(folder / JOURNAL), folder / JOURNAL):
        path.unlink(missing_ok=True)


def record_and_identify(
    name: str,
    model: Any,
    tokenizer: Any,
    described: Json,
    prompts: Path,
    folder: Path,
    recording: RecordOptions,
    ranking: RankOptions,
    store: Store | None,
    *,
    ranks: Ranks | None = None,
    backend: str = "auto",
    force: bool = False,
    over: bool = True,
    quiet: bool = False,
) -> NeuronFile:
    """Go on with both stages in `folder`, which the caller holds; returns its neurons.

    `described` is the model, as `load.describe_model` says; `store` is where responses are until
    the neurons are ranked, which are then gone; without one responses.safetensors stays. `ranks`
    are processes that share the recording, and wait to hear of it (`Ranks.serve`). Files of others
    are written over, or with `over` false only with `force`.
    """
    neurons, responses = folder / "neurons.json", folder / RESPONSES
    asked = folder, described, tokenizer, prompts, recording, ranking
    recorded, identified = are_done(*asked, force=force)
    if not over:
        answers = folder / "validated.csv"
        if not recorded:
            refuse_overwrite(answers, force or is_unfinished(answers, "record"))
        if not identified:
            refuse_output(neurons, "identify", force)
    if not recorded or not (identified or responses.exists()):
        (ranks or Ranks()).call(
            record,
            name,
            model,
            tokenizer,
            prompts,
            folder,
            recording,
            store=store,
            backend=backend,
            force=True,
            quiet=quiet,
        )
        identified = False
    if not identified:
        kept = None if store is None else store.kept
        identify(folder, neurons, ranking, responses=kept, force=True, quiet=quiet)
    if store is not None:
        store.kept = None
        Manifest(folder).drop(RESPONSES)
    drop_journal(folder)
    return NeuronFile.read(neurons)


def identify_at_once(
    name: str,
    model: Any,
    tokenizer: Any,
    prompts: Path,
    folder: Path,
    recording: RecordOptions,
    at_once: AtOnceOptions,
    *,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> NeuronFile:
    """`record --identify`: both stages of any prompts, as `record` takes them.

    A run that was killed goes on; one that is done is not done again.
    """
    mlps = find_mlps(model, attention=recording.attention)
    described = describe_model(name, model, mlps, backend)
    everything = read_prompts(checked(prompts))
    check_installed(at_once.noise)
    store, ranking = Store(at_once.responses), at_once.part(RankOptions)
    asks = recording.validate and any(prompt.object for prompt in everything)
    recording = replace(recording, validate=asks)
    with sharing(model, folder, rows=True) as ranks:
        if ranks.rank:
            ranks.serve(model, tokenizer)
            return NeuronFile.read(folder / "neurons.json")
        found = record_and_identify(
            name,
            model,
            tokenizer,
            described,
            prompts,
            folder,
            recording,
            ranking,
            store,
            ranks=ranks,
            backend=backend,
            force=force,
            over=False,
            quiet=quiet,
        )
        words = (name, placed(prompts, folder), "-o", STUDY, *recording.words(), *at_once.words())
        _name_command(folder, command("record", *words, **loading(described)))
        ranks.dismiss()
    return found


def _name_command(folder: Path, made_by: list[list[str]]) -> None:
    """Have `record` name the command that did both, and `identify` none of its own."""
    manifest = Manifest(folder)
    stages = manifest.data["stages"]
    if stages["record"].get("commands") != made_by:
        stages["record"]["commands"] = stages["identify"]["commands"] = made_by
        manifest.save()
