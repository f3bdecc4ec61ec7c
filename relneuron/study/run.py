"""The whole study: prompts, record, identify, ablate, report, each skipped if it is done already.

`relneuron run` and `relneuron demo` call it; it is the only place that knows the stages' order.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from relneuron.ablation.ablate import ablate_prompts
from relneuron.ablation.conditions import check_names
from relneuron.ablation.how import ablate_inputs
from relneuron.ablation.options import AblateOptions
from relneuron.artifact.files import RelneuronError, atomic_write, sha256, writing
from relneuron.artifact.manifest import Manifest, checked, locked
from relneuron.artifact.neurons import NeuronFile, default_top
from relneuron.artifact.prompts import Prompt, prompts_bytes, read_prompts
from relneuron.artifact.reading import read_csv
from relneuron.artifact.stage import IN_WHOLE, STUDY, command, placed
from relneuron.methods.gains.attribute import attribute
from relneuron.methods.gains.options import AttributeOptions
from relneuron.methods.gains.rank import (
    are_dropped,
    drop_gains,
    identify_gains,
    identify_gains_inputs,
)
from relneuron.methods.gains.study import BEST
from relneuron.methods.responses.concepts import concept_study, concept_subjects
from relneuron.methods.responses.options import RankOptions, RecordOptions
from relneuron.methods.responses.preview import first_answers, warn_of_unknown
from relneuron.methods.responses.rank import (
    check_installed,
    identify,
    identify_inputs,
)
from relneuron.methods.responses.record import record, record_inputs
from relneuron.model.ask import Asker
from relneuron.model.identity import held
from relneuron.model.instrument import Clock
from relneuron.model.load import describe_model, load_model, load_tokenizer
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.questions import encode
from relneuron.model.stream.read import read_residual_model
from relneuron.report.page import files_read, write_report
from relneuron.study.pages import PAGES, titles
from relneuron.study.settings import DEMO, DemoOptions, RunOptions
from relneuron.texts.facts import Relation, read_relations, split_facts
from relneuron.texts.options import PromptsOptions
from relneuron.texts.prompts import (
    chat_wrap,
    make_prompts,
    prompts_inputs,
    refuse_concepts,
    write_prompts,
)
from relneuron.texts.tokens import check_bos


def open_study(folder: Path, force: bool) -> Manifest:
    """The manifest of a study that is there or begins; a folder with other things is refused."""
    if folder.exists() and not folder.is_dir():
        raise RelneuronError(f"{folder} is a file", "give a folder for the study", 2)
    others = [p for p in folder.iterdir() if not p.name.startswith(".")] if folder.exists() else []
    if others and not (folder / "manifest.json").exists() and not force:
        raise RelneuronError(
            f"{folder} is not empty and holds no study", "choose another folder or add --force", 2
        )
    return Manifest(folder)


def check_asked(
    options: RunOptions,
    facts: Path,
    relations: Sequence[Relation],
    prompts: Sequence[Prompt],
    shape: dict[str, int],
) -> None:
    """Raise for what `ablate` would refuse only after the stages before it."""
    asked = [prompt for prompt in prompts if prompt.split in options.splits]
    if not asked:
        raise RelneuronError(
            f"{facts} makes no prompt of the splits {', '.join(options.splits)}",
            "name others with --splits, or give the fact files more templates",
            2,
        )
    concepts = concept_subjects(relations, n_eva=options.eva, seed=options.seed)
    check_names(
        [relation.name for relation in relations],
        list(concepts) if len(concepts) > 1 else [],
        asked,
        shape,
        top=options.top or default_top(shape),
        analyses=options.analyses,
        sizes=options.sizes,
        random_seeds=options.random_seeds,
    )


def run_study(
    model_path: str,
    facts: Path,
    folder: Path,
    options: RunOptions,
    *,
    name: str | None = None,
    force: bool = False,
    quiet: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> Path:
    """Make, or go on with, the study in `folder`; returns the report's path.

    `name` stands for the model in the manifest (default: `model_path`); `say` is told how long it
    took. Everything that can be refused is checked before anything is written.
    """
    o, name = options, name or model_path
    if not facts.exists():
        raise RelneuronError(f"{facts} does not exist", "give a folder of fact files", 2)
    refuse_concepts(facts)
    check_installed(o.noise)
    open_study(folder, force)
    relations = read_relations(facts, suffix=o.suffix)
    if len(relations) < 2:
        raise RelneuronError(
            f"{facts} has one relation, and nothing to tell its neurons from",
            "give a folder with the fact files of at least two relations",
            2,
        )
    for relation in relations:
        split_facts(relation, o.eva, o.seed)
    model = load_model(
        model_path, revision=o.revision, dtype=o.dtype, device=o.device, device_map=o.device_map
    )
    mlps = find_mlps(model, attention=o.attention)
    tokenizer = load_tokenizer(model_path, revision=o.revision)
    chat = tokenizer if o.chat_template else None
    wrap = chat_wrap(chat) if chat else str
    wanted = [p for r in relations for p in make_prompts(r, n_eva=o.eva, seed=o.seed, wrap=wrap)]
    questions = encode(tokenizer, model, wanted)
    if o.exclude_bos:
        check_bos(tokenizer, questions.ids)
    check_asked(o, facts, relations, wanted, model_shape(mlps))
    described = describe_model(name, model, mlps, o.backend)

    prompts, neurons = folder / "prompts.jsonl", folder / "neurons.json"
    with held(model, described["digest"]), Clock(model) as clock, locked(folder):
        manifest = open_study(folder, force)
        if not manifest.path.exists():
            manifest.save()
        asking = o.part(PromptsOptions)
        if not manifest.is_done("prompts", prompts_inputs(facts, asking, chat), force=force):
            write_prompts(facts, prompts, asking, chat=chat, force=True)

        recording, ranking = o.part(RecordOptions), o.part(RankOptions)
        manifest = Manifest(folder)
        recorded = manifest.is_done(
            "record",
            record_inputs(described, tokenizer, prompts, recording),
            force=force,
        )
        identified = recorded and manifest.is_done(
            "identify", identify_inputs(folder, ranking), force=force
        )
        responses = folder / "responses.safetensors"
        if not recorded or not (identified or responses.exists()):
            for line in first_answers(Asker(model, tokenizer), questions, o.batch_tokens):
                say(line)
            record(
                name,
                model,
                tokenizer,
                prompts,
                folder,
                recording,
                backend=o.backend,
                force=True,
                quiet=quiet,
            )
            identified = False
        warn_of_unknown(folder)
        if not identified:
            identify(folder, neurons, ranking, force=True, quiet=quiet)
        if o.drop_responses:
            Manifest(folder).drop(responses.name)

        asked = o.part(AblateOptions)
        # What is refused is refused before the concepts' study, whose neurons it then reads.
        before = Manifest(folder).data["stages"].get("ablate", {}).get("inputs", {})
        inputs = ablate_inputs(described, tokenizer, neurons, prompts, asked)
        inputs["beside"] = before.get("beside", {})
        Manifest(folder).is_done("ablate", inputs, force=force)

        top = max(map(len, NeuronFile.read(checked(neurons)).sets.values()), default=0)
        if "concepts" in o.analyses and top:
            concept_study(
                name,
                model,
                tokenizer,
                relations,
                folder / "concepts",
                n_eva=o.eva,
                seed=o.seed,
                top=top,
                options=recording,
                drop_responses=o.drop_responses,
                backend=o.backend,
                force=force,
                quiet=quiet,
            )
        if "gain" in o.analyses and top:
            gain_study(
                name,
                model,
                tokenizer,
                folder,
                batch_tokens=o.batch_tokens,
                oom=o.oom,
                drop=o.drop_responses,
                backend=o.backend,
                force=force,
                quiet=quiet,
            )
        inputs = ablate_inputs(described, tokenizer, neurons, prompts, asked)
        if not Manifest(folder).is_done("ablate", inputs, force=force):
            ablate_prompts(
                name,
                model,
                tokenizer,
                neurons,
                prompts,
                folder / "effects.csv",
                **vars(asked),
                backend=o.backend,
                force=True,
                quiet=quiet,
            )
        _record_whole(folder, _whole(name, model_path, facts, folder, o))
        for journal in ("record.journal", "ablate.journal"):
            (folder / journal).unlink(missing_ok=True)
        report = report_stage(folder, folder / "report.html", force=force, resume=True)
    say(f"study: {clock}")
    return report


def _whole(
    name: str, model_path: str, facts: Path, folder: Path, options: RunOptions
) -> list[list[str]]:
    """The command of a study that its stages' own commands do not make; [] if they do.

    The demo's model has no name that they take, and only `run` makes sets beside, or drops.
    """
    if name == DEMO:
        return command("demo", "-o", STUDY, *options.part(DemoOptions).words())
    beside = Manifest(folder).data["stages"]["ablate"]["inputs"]["beside"]
    if options.drop_responses or any(path.endswith("/neurons.json") for path in beside):
        where = ("--facts", placed(facts, folder))
        return command("run", model_path, "-o", STUDY, *where, *options.words())
    return []


def _record_whole(folder: Path, whole: list[list[str]]) -> None:
    """Have the stages of a whole study name the one command that makes them."""
    manifest = Manifest(folder)
    entries = [manifest.data["stages"][stage] for stage in IN_WHOLE]
    if whole and any(entry.get("commands") != whole for entry in entries):
        for entry in entries:
            entry["commands"] = whole
        manifest.data["stages"].pop("report", None)  # which printed others
        manifest.save()


def gain_study(
    name: str,
    model: Any,
    tokenizer: Any,
    study: Path,
    *,
    batch_tokens: int = 4096,
    oom: str = "split",
    drop: bool = False,
    backend: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> NeuronFile | None:
    """Make, or go on with, `study`/attribution: as many neurons by gain as each set has by AP.

    The gains are those of the det prompts that are answered right, which the sets were found with;
    with `drop` gains.safetensors goes once the neurons are chosen. Returns the neurons, or None,
    with a warning, if the model cannot be attributed.
    """
    try:
        read_residual_model(model)
    except RelneuronError as error:
        warnings.warn(f"gain left out: {error.cause}", stacklevel=2)
        return None
    validated = read_csv(checked(study / "validated.csv"), ("id", "correct"))
    right = {row["id"] for row in validated if row.flag("correct")}
    everything = read_prompts(checked(study / "prompts.jsonl"))
    data = prompts_bytes([p for p in everything if p.split == "det" and p.id in right])
    sets = NeuronFile.read(checked(study / "neurons.json")).sets
    chosen: dict[str, Any] = {"kept_only": False}
    chosen["top"] = {relation: len(neurons) for relation, neurons in sets.items()}
    options = AttributeOptions(
        kinds=("ffn_neuron",), top=BEST, compare=False, batch_tokens=batch_tokens, oom=oom
    )
    folder = study / "attribution"
    prompts, neurons = folder / "prompts.jsonl", folder / "neurons.json"
    with locked(folder):
        inputs = {"right": hashlib.sha256(data).hexdigest()}
        if not Manifest(folder).is_done("prompts", inputs, force=force):
            with writing("prompts", folder, [prompts]):
                atomic_write(prompts, data)
                Manifest(folder).finish("prompts", inputs, [prompts], reads=[])
        if are_dropped(folder):
            inputs = identify_gains_inputs(folder, **chosen)
            if not Manifest(folder).is_done("identify", inputs, force=force):
                Manifest(folder).forget("attribute")
        # What no manifest knows is left of a run that was killed.
        again = force or "attribute" not in Manifest(folder).data["stages"]
        attribute(
            name,
            model,
            tokenizer,
            prompts,
            folder,
            options,
            backend=backend,
            force=again,
            quiet=quiet,
        )
        inputs = identify_gains_inputs(folder, **chosen)
        if not Manifest(folder).is_done("identify", inputs, force=force):
            identify_gains(folder, neurons, **chosen, force=True, quiet=quiet)
        if drop:
            drop_gains(folder)
    return NeuronFile.read(neurons)


def report_stage(folder: Path, output: Path, *, force: bool, resume: bool = False) -> Path:
    """Write the report unless it is there, made from the same files."""
    manifest = Manifest(folder)
    names = [name for name in files_read(PAGES) if (folder / name).exists()]
    inputs = {name: sha256(folder / name) for name in names if name != "manifest.json"}
    before = manifest.data["stages"].get("report", {}).get("inputs", {})
    has_more = before.items() < inputs.items()  # files of stages that ran since
    if resume and not has_more and manifest.is_done("report", inputs, force=force):
        return output

    def finish(tables: list[Path]) -> None:
        if output.parent == folder:
            made, reads = [output, *sorted(tables)], [folder / name for name in inputs]
            Manifest(folder).finish("report", inputs, made, reads=reads)

    return write_report(folder, output, PAGES, titles(), force=force or resume, finish=finish)
