"""The commands of no single method: those that make a whole study, and those that ask a method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from relneuron.ablation.commands import accuracy_table
from relneuron.artifact.files import RelneuronError, check_folder, refuse_output
from relneuron.artifact.installed import need
from relneuron.artifact.options import (
    AnyOf,
    Argument,
    LoadOptions,
    Model,
    Named,
    Only,
    Options,
    Output,
    Study,
    option,
    options_of,
    refuse_stray,
)
from relneuron.artifact.stage import STUDY, Attribution, Printed, Ranking, command, load
from relneuron.cli.flags import check_only, given, taken
from relneuron.methods import attributions, rankings
from relneuron.report.save import FigureOptions
from relneuron.study.settings import CONTRAST, DEMO, DemoOptions, RunOptions
from relneuron.texts.options import PromptsOptions


def demo(
    options: DemoOptions,
    output: Output = Path("relneuron-demo"),
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str | Printed]:
    """The whole study on the bundled demo model, on a CPU; or of it and a second one."""
    from relneuron.demo import CHECKPOINT, FACTS, TOP

    if CONTRAST in options.analyses:
        yield from _two_models(output, force, quiet)
        return
    asked = RunOptions(device="cpu", dtype="float32", **vars(options))
    if asked.top is None and asked.fdr is None:
        asked = replace(asked, top=TOP)
    yield from _study(str(CHECKPOINT), FACTS, output, asked, DEMO, force, quiet)


def _two_models(output: Path, force: bool, quiet: bool) -> Iterator[str]:
    """The demo's model, and the same one taught other answers to one relation."""
    from relneuron.cli.show import say
    from relneuron.demo import CHECKPOINT, tuned
    from relneuron.model.load import load as load_model
    from relneuron.model.pair import pair_of
    from relneuron.study.contrast import Plan, contrast_study
    from relneuron.study.run import open_study

    open_study(output, force)
    how = LoadOptions(device="cpu", dtype="float32")
    second = tuned.make_tuned(output, force=force)
    (a, tokenizer), (b, other) = (load_model(str(one), how) for one in (CHECKPOINT, second))
    pair = pair_of(a, b, tokenizer, other, names=(DEMO, f"{DEMO}, {tuned.RELATION} retaught"))
    made_by = command("demo", "-o", STUDY, analyses=CONTRAST)
    plan = Plan(*tuned.prompts(), cost=f"{tuned.__name__}:cost", made_by=made_by)
    yield f"report: {contrast_study(pair, plan, output, force=force, quiet=quiet, say=say)}"


def run(
    model: Annotated[str, Argument("MODEL", "Model folder or hub name.")],
    facts: Annotated[Path, Named("Folder of LRE-format fact files.")],
    output: Output,
    options: RunOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str | Printed]:
    """The whole study on your model; goes on where it stopped."""
    yield from _study(model, facts, output, options, None, force, quiet)


def _study(
    model: str,
    facts: Path,
    output: Path,
    options: RunOptions,
    name: str | None,
    force: bool,
    quiet: bool,
) -> Iterator[str | Printed]:
    from relneuron.cli.show import say
    from relneuron.study.run import run_study

    report = run_study(model, facts, output, options, name=name, force=force, quiet=quiet, say=say)
    yield accuracy_table(report.parent)
    yield f"report: {report}"


def prompts(
    facts: Annotated[
        Path,
        Argument(
            "FACTS",
            "Folder of LRE-format fact files, or one; or of selfcond's concept files, or a list of "
            "concepts.",
        ),
    ],
    output: Output,
    options: PromptsOptions,
    chat_template: Annotated[
        str | None,
        Named(
            "Wrap every prompt in the chat template of this model (folder or hub name).",
            metavar="MODEL",
        ),
    ] = None,
    force: bool = False,
) -> Iterator[str]:
    """LRE-format facts -> det, eva and eva2 prompts; sentences for concepts -> one prompt each."""
    from relneuron.model.load import load_tokenizer
    from relneuron.texts.prompts import write_prompts

    chat = load_tokenizer(chat_template) if chat_template else None
    made = write_prompts(facts, output, options, chat=chat, force=force)
    yield f"{len(made)} prompts -> {output}"


def _asked(
    method: str, known: Mapping[str, Ranking] | Mapping[str, Attribution], options: dict[str, Any]
) -> Options:
    """The options of one of several methods; those of the others alone are refused."""
    if method not in known:
        raise RelneuronError(f"unknown method {method!r}", f"use {', '.join(known)}", 2)
    own = options_of(known[method].options)
    for name in [n for n in given() if n in options and n not in own]:
        takers = [one.name for one in known.values() if name in options_of(one.options)]
        raise RelneuronError(
            f"--method {method} takes no --{name.replace('_', '-')}",
            f"leave it out, or use --method {' or '.join(takers)}, which "
            f"{'take' if takers[1:] else 'takes'} it",
            2,
        )
    return taken(known[method].options, options)


def attribute(
    model: Model,
    prompts: Annotated[
        Path,
        Argument(
            "PROMPTS",
            "A prompts.jsonl; a .csv, .tsv or .jsonl with the columns prompt, answer, type; or "
            "LRE-format facts.",
        ),
    ],
    output: Output,
    *,
    method: Annotated[
        str, Named(", ".join(f"{one.name} is {one.title}" for one in attributions().values()))
    ] = "gain",
    options: Annotated[dict[str, Any], AnyOf(tuple(a.options for a in attributions().values()))],
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str | Printed]:
    """How much each neuron, head and layer does for the answers, by one of several methods.

    Goes on where it stopped.
    """
    known = attributions()
    asked = _asked(method, known, options)
    check_only(asked, given())
    run = load(known[method].run)
    yield from run(
        model, prompts, output, asked, load_options, method=method, force=force, quiet=quiet
    )
    yield f"-> {output}"


def _methods_help() -> str:
    """What `identify --method` takes, by what it ranks."""
    by: dict[str, list[str]] = {}
    for ranking in rankings().values():
        by.setdefault(ranking.of, []).append(f"{ranking.name} is {ranking.title}")
    return " ".join(f"Of {of}, {', '.join(names)}." for of, names in by.items())


def identify(
    folder: Study,
    output: Output,
    *,
    method: Annotated[str, Named(_methods_help())] = "ap",
    options: Annotated[dict[str, Any], AnyOf(tuple(r.options for r in rankings().values()))],
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str]:
    """Rank the neurons of a recorded, attributed or counted directory; needs no model."""
    known = rankings()
    asked = _asked(method, known, options)
    ranking = known[method]
    if not (folder / ranking.reads).exists():
        for other in known.values():
            if (folder / other.reads).exists():
                raise RelneuronError(
                    f"{folder} holds {other.of}, no {ranking.of.removeprefix('an ')}",
                    f"add --method {other.name}",
                    2,
                )
    check_only(asked, given())
    yield from load(ranking.run)(folder, output, asked, method=method, force=force, quiet=quiet)
    yield f"-> {output}"


def report(
    folder: Study,
    options: FigureOptions,
    output: Annotated[Path | None, Named("Where to write the page.", ("-o", "--output"))] = None,
    figures: Annotated[
        Path | None,
        Named(
            "A folder for the figures of the page, each a file of its own, with its numbers as csv "
            "and a caption; and the references of the study's methods as BibTeX."
        ),
    ] = None,
    force: bool = False,
) -> Iterator[str]:
    """All artifacts of a study -> one HTML file that opens offline, or figures for a paper."""
    from relneuron.study.figures import figures as write_figures
    from relneuron.study.run import report_stage

    if output is None and figures is None:
        raise RelneuronError("report writes nothing", "give -o FILE, --figures FOLDER, or both", 2)
    if output is not None and figures is not None:
        refuse_output(output, "report", force)  # before figures are written
    if figures is not None:
        made = write_figures(folder, figures, options, force=force)
        yield f"figures: {len(made)} files in {figures}"
    elif stray := [name for name in given() if name in options_of(FigureOptions)]:
        refuse_stray(f"--{stray[0]}", "with --figures FOLDER")
    if output is not None:
        yield f"report: {report_stage(folder, output, force=force)}"


_DRY = Only("with --dry-run", lambda o: o.dry_run)


@dataclass(frozen=True)
class DoctorOptions(Options):
    """What is asked of a model, and of which devices."""

    revision: str | None = option(None, "Revision of a model on the hub.")
    dry_run: bool = option(
        False,
        "Read only the config: what would lie where, in how many bytes, and what does not fit.",
    )
    device_map: str | None = option(
        None,
        "As of count: auto, balanced, sequential or a file; default: all on one device.",
        only=_DRY,
    )
    tensor_parallel_size: int | None = option(
        None, "Processes that would hold the model in parts.", least=2, most=1024, only=_DRY
    )
    dtype: str | None = option(
        None,
        "float32, bfloat16 or float16; default: float32 on a CPU alone, else the model's own.",
        choices=("float32", "bfloat16", "float16"),
        only=_DRY,
    )
    memory: Sequence[str] = option(
        (),
        "Memory for weights on devices, such as 0=80GiB,1=80GiB,cpu=200GiB; default: what is free "
        "on this machine.",
        only=_DRY,
    )


def doctor(
    options: DoctorOptions,
    model: Annotated[str | None, Argument("[MODEL]", "Model to check.")] = None,
) -> Iterator[str | Printed]:
    """What works on this machine, and for this model, and why not."""
    from relneuron.cli.doctor import machine_report, model_report, processor_of
    from relneuron.cli.show import rows_of
    from relneuron.model.load import load_model, load_tokenizer
    from relneuron.texts.tokens import policy_text

    revision = options.revision
    for flag, is_asked in (("--revision", revision is not None), ("--dry-run", options.dry_run)):
        if model is None and is_asked:
            refuse_stray(flag, "with a MODEL")
    if model is not None and options.dry_run:
        yield from _dry_run(model, options)
        return
    yield from rows_of(machine_report())
    if model is None:
        return
    need("a model", "transformers")
    loaded = load_model(model, revision=revision)
    run, about = processor_of(model, loaded, revision)
    rows, supported = model_report(loaded, run)
    rows += about
    try:
        tokenizer = load_tokenizer(model, revision=revision)
        rows.append(("tokenizer", f"works: {policy_text(tokenizer)}"))
    except RelneuronError as error:
        rows.append(("tokenizer", f"no: {error.cause}"))
        supported = False
    yield from rows_of(rows)
    if not supported:
        raise SystemExit(1)


def _dry_run(model: str, options: DoctorOptions) -> Iterator[str | Printed]:
    from relneuron.cli.doctor import plan_report
    from relneuron.model.load import asked_map
    from relneuron.model.plan import memory_here, plan, read_memory

    need("a model", "transformers")
    n_parts = options.tensor_parallel_size
    if n_parts is not None and options.device_map is not None:
        raise RelneuronError(
            "--device-map and --tensor-parallel-size both say where the model goes",
            "leave out one of them",
            2,
        )
    where = asked_map(options.device_map) if options.device_map is not None else None
    memory = read_memory(options.memory) or memory_here()
    own = "auto" if n_parts is not None or {*memory} - {"cpu", "disk"} else "float32"
    found = plan(
        model,
        memory=memory,
        revision=options.revision,
        dtype=options.dtype or own,
        device_map=where,
        n_parts=n_parts,
    )
    table, said, fits = plan_report(found, n_parts)
    yield table
    yield from said
    if not fits:
        raise SystemExit(1)


@dataclass(frozen=True)
class BenchOptions(Options):
    """Which cases are timed, and how."""

    quick: bool = option(
        False,
        "Only tiny sizes: whether it runs at all.",
        only=Only("without --full", lambda o: not o.full),
    )
    full: bool = option(False, "Every size, dtype and layout.")
    dtype: Sequence[str] = option(
        (), "Only these dtypes: float32, bfloat16, float16, or several of them."
    )
    tokens: Sequence[int] = option((), "Only these numbers of tokens, such as 2048,8192.", least=1)
    threads: int = option(0, "Number of CPU threads; 0: as torch chooses.", least=0)
    device: str | None = option(None, "cpu or cuda; default: the GPU if there is one.")
    no_compile: bool = option(False, "Leave out torch.compile, which needs a C++ compiler.")


def bench(
    options: BenchOptions,
    op: Annotated[
        str | None, Argument("[OP]", "swiglu_stats, average_precision, logprob_gain or pair_stats.")
    ] = None,
    output: Annotated[
        Path | None, Named("Folder for the csv and the roofline.", ("-o", "--output"))
    ] = None,
    own: Annotated[
        str | None,
        Named("Your own OP, held to its contract and then timed.", ("--with",), "MODULE:FUNCTION"),
    ] = None,
) -> Iterator[str | Printed]:
    """The kernels against their peers on this machine, in the same rounds."""
    for flag in ("dtype", "tokens"):
        if getattr(options, flag) and op not in (None, "swiglu_stats"):
            refuse_stray(f"--{flag}", "with the op swiglu_stats")
    import torch

    from relneuron.artifact.manifest import locked
    from relneuron.bench.own import find_own
    from relneuron.bench.timing import EFFORTS, Row, append_rows, choose_cases, run_case, summary
    from relneuron.cli.show import bench_lines
    from relneuron.model.load import choose_device

    suite = "quick" if options.quick else "full" if options.full else "usual"
    cases = choose_cases(suite, op, options.dtype, options.tokens)
    device = choose_device(options.device)
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise RelneuronError(f"bench cannot time the device {device!r}", "use --device cpu", 2)
    mine = find_own(own, op)
    if options.threads:
        torch.set_num_threads(options.threads)
    if output is not None:
        need("relneuron bench -o", "matplotlib", "filelock", otherwise=", or leave out -o")
        from relneuron.bench.plot import roofline

        check_folder(output)
    rows: list[Row] = []
    with locked(output) if output is not None else nullcontext():
        for case in cases:
            compiled, effort = not options.no_compile, EFFORTS[suite]
            found = run_case(case, device=device, compiled=compiled, effort=effort, own=mine)
            yield from bench_lines(str(case), found)
            for what, who, value in summary(found):
                yield f"  {what}: {value:.2f} x our time ({who})"
            rows += found
            if output is not None:
                path = append_rows(output, found)
        if output is None:
            yield "to keep the rows: add -o DIR"
            return
        drawn = roofline(rows, path.with_suffix(".png"))
    yield f"-> {path}{', the roofline ' + path.with_suffix('.png').name if drawn else ''}"
