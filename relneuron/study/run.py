"""The whole study: prompts, record, identify, ablate, report, each skipped if it is done already.

`relneuron run` and `relneuron demo` call it; it is the only place that knows the stages' order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from relneuron.ablation.ablate import ablate_prompts
from relneuron.ablation.conditions import check_names
from relneuron.ablation.how import ablate_inputs
from relneuron.ablation.options import AblateOptions
from relneuron.artifact.files import RelneuronError, sha256
from relneuron.artifact.manifest import Manifest, checked
from relneuron.artifact.neurons import NeuronFile, default_top
from relneuron.artifact.prompts import Prompt
from relneuron.artifact.stage import IN_WHOLE, STUDY, command, placed
from relneuron.methods.responses.at_once import JOURNAL, RESPONSES, are_done, drop_journal
from relneuron.methods.responses.concepts import concept_study, concept_subjects
from relneuron.methods.responses.options import RankOptions, RecordOptions
from relneuron.methods.responses.places import Store
from relneuron.methods.responses.preview import first_answers, warn_of_unknown
from relneuron.methods.responses.rank import check_installed, identify
from relneuron.methods.responses.record import record
from relneuron.methods.responses.room import check_room
from relneuron.model.ask import Asker
from relneuron.model.identity import held
from relneuron.model.instrument import Clock
from relneuron.model.load import describe_model, load_model, load_tokenizer
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.questions import encode
from relneuron.model.ranks import sharing
from relneuron.report.page import files_read, write_report
from relneuron.study.facts import Facts
from relneuron.study.gain import gain_study
from relneuron.study.look import is_shown, look, show
from relneuron.study.pages import PAGES, titles
from relneuron.study.settings import DEMO, DemoOptions, LookOptions, RunOptions
from relneuron.texts.facts import Relation, split_facts
from relneuron.texts.options import PromptsOptions
from relneuron.texts.prompts import (
    chat_wrap,
    make_prompts,
    prompts_inputs,
    write_prompts,
)
from relneuron.texts.tokens import check_bos

REPORT = "report.html"


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
    facts: str,
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


def relations_of(facts: Facts, folder: Path, options: RunOptions, force: bool) -> list[Relation]:
    """The relations of a study; what is wrong with them, or with its folder, raises."""
    o = options
    check_installed(o.noise)
    open_study(folder, force)
    facts.check(folder, force)
    relations = facts.relations(o.suffix)
    if len(relations) < 2:
        raise RelneuronError(
            f"{facts.where} has one relation, and nothing to tell its neurons from",
            "give a folder with the fact files of at least two relations",
            2,
        )
    for relation in relations:
        split_facts(relation, o.eva, o.seed)
    return relations


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
    """Make, or go on with, the study in `folder` of a model by its name; returns the report's path.

    `name` stands for the model in the manifest (default: `model_path`); `say` is told how long it
    took. Everything that can be refused is checked before anything is written.
    """
    o = options

    def load() -> tuple[Any, Any]:
        model = load_model(
            model_path, revision=o.revision, dtype=o.dtype, device=o.device, device_map=o.device_map
        )
        return model, load_tokenizer(model_path, revision=o.revision)

    called = name or model_path
    return make_study(
        called,
        load,
        Facts.of(facts),
        folder,
        options,
        whole=lambda: _whole(called, model_path, facts, folder, options),
        force=force,
        quiet=quiet,
        say=say,
    )


def make_study(
    name: str,
    load: Callable[[], tuple[Any, Any]],
    facts: Facts,
    folder: Path,
    options: RunOptions,
    *,
    whole: Callable[[], list[list[str]]] | None = None,
    force: bool = False,
    quiet: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> Path:
    """Make, or go on with, the study in `folder`; returns the report's path.

    `name` stands for the model in the manifest, `load` returns it and its tokenizer; `whole` is
    asked for the one command that makes the study. Without it the model was in memory, and no
    command of a stage that asked it makes its files again.
    """
    o = options
    relations = relations_of(facts, folder, o, force)
    model, tokenizer = load()
    mlps = find_mlps(model, attention=o.attention)
    chat = tokenizer if o.chat_template else None
    wrap = chat_wrap(chat) if chat else str
    wanted = [p for r in relations for p in make_prompts(r, n_eva=o.eva, seed=o.seed, wrap=wrap)]
    questions = encode(tokenizer, model, wanted)
    if o.exclude_bos:
        check_bos(tokenizer, questions.ids)
    check_asked(o, facts.where, relations, wanted, model_shape(mlps))
    described = describe_model(name, model, mlps, o.backend)

    store = Store(o.responses) if o.drop_responses else None
    if store:
        check_room(store, mlps, questions)
    prompts, neurons = folder / "prompts.jsonl", folder / "neurons.json"
    with (
        held(model, described["digest"]),
        Clock(model) as clock,
        sharing(model, folder, rows=True) as ranks,
    ):
        if ranks.rank:
            ranks.serve(model, tokenizer)
            return folder / REPORT
        manifest = open_study(folder, force)
        if not manifest.path.exists():
            manifest.save()
        asking, placed_facts = o.part(PromptsOptions), facts.place(folder)
        inputs = prompts_inputs(placed_facts, asking, chat)
        if not manifest.is_done("prompts", inputs, force=force):
            write_prompts(placed_facts, prompts, asking, chat=chat, force=True)

        recording, ranking = o.part(RecordOptions), o.part(RankOptions)
        recorded, identified = are_done(
            folder, described, tokenizer, prompts, recording, ranking, force=force
        )
        responses = folder / RESPONSES
        # A run that kept responses in memory was killed before it had shown what it ranked.
        is_lost = o.drop_responses and o.cards and (folder / JOURNAL).exists()
        is_lost = is_lost and "look" not in Manifest(folder).data["stages"]
        if not recorded or not (responses.exists() or (identified and not is_lost)):
            for line in first_answers(Asker(model, tokenizer), questions, o.batch_tokens):
                say(line)
            ranks.call(
                record,
                name,
                model,
                tokenizer,
                prompts,
                folder,
                recording,
                store=store,
                backend=o.backend,
                force=True,
                quiet=quiet,
            )
            identified = False
        kept = store.kept if store else None
        warn_of_unknown(folder)
        if not identified:
            identify(folder, neurons, ranking, responses=kept, force=True, quiet=quiet)
        # Without responses there is nothing to look at that was not seen before they went.
        is_there = kept is not None or responses.exists()
        if o.cards and is_there and any(NeuronFile.read(neurons).sets.values()):
            look(
                name,
                model,
                tokenizer,
                folder,
                None,
                LookOptions(cards=o.cards, batch_tokens=o.batch_tokens, oom=o.oom),
                responses=kept,
                ranks=ranks,
                backend=o.backend,
                force=force,
                resume=True,
                quiet=quiet,
            )
        if store:
            store.kept = kept = None
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
                store=store,
                ranks=ranks,
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
                ranks=ranks,
                backend=o.backend,
                force=force,
                quiet=quiet,
            )
        inputs = ablate_inputs(described, tokenizer, neurons, prompts, asked)
        if not Manifest(folder).is_done("ablate", inputs, force=force):
            ranks.call(
                ablate_prompts,
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
        if whole is not None:
            record_whole(folder, whole(), IN_WHOLE)
        else:
            for place in (folder, *(folder / name for name in _WITHIN)):
                _name_commands(place, [], _OF_A_MODEL)
        # Its page says by which commands it was made, as they are known now.
        if "look" in Manifest(folder).data["stages"] and not is_shown(folder, folder / "look.html"):
            show(folder, folder / "look.html")
        drop_journal(folder)
        (folder / "ablate.journal").unlink(missing_ok=True)
        report = report_stage(folder, folder / REPORT, force=force, resume=True)
        ranks.dismiss()
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


def record_whole(folder: Path, whole: list[list[str]], stages: Sequence[str]) -> None:
    """Have the stages of a whole study name the one command that makes them, if there is one."""
    if whole:
        _name_commands(folder, whole, stages)


_WITHIN = ("concepts", "attribution")  # studies within a study
_OF_A_MODEL = ("record", "look", "attribute", "ablate")  # stages whose command names one


def _name_commands(folder: Path, commands: list[list[str]], stages: Sequence[str]) -> None:
    """Have those of the stages that are done say which commands make them; none: from Python."""
    if not (folder / "manifest.json").exists():
        return
    manifest = Manifest(folder)
    known = manifest.data["stages"]
    entries = [known[stage] for stage in stages if stage in known]
    if any(entry.get("commands") != commands for entry in entries):
        for entry in entries:
            entry["commands"] = commands
        # Which printed others; what is known of its files would stand in the next one.
        for name in known.pop("report", {}).get("files", ()):
            manifest.data["files"].pop(name, None)
        manifest.save()


def report_stage(folder: Path, output: Path, *, force: bool = False, resume: bool = False) -> Path:
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
