"""The commands of no single method: those that make a whole study, and those that ask a method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from relneuron.ablation.commands import accuracy_table
from relneuron.artifact.files import RelneuronError, refuse_output
from relneuron.artifact.options import (
    AnyOf,
    Argument,
    LoadOptions,
    Model,
    Named,
    Options,
    Output,
    Study,
    options_of,
    refuse_stray,
)
from relneuron.artifact.planned import Planned
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
    """The whole study on the bundled demo model, on a CPU; or of it and a second one.

    Examples:
      relneuron demo  # a minute; open relneuron-demo/report.html
      relneuron demo --analyses all -o every-figure  # every figure of the paper
      relneuron demo --analyses contrast -o two-models
    """
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
    from relneuron.model.ranks import joined
    from relneuron.study.contrast import Plan, contrast_study
    from relneuron.study.run import open_study

    how = LoadOptions(device="cpu", dtype="float32")
    with joined() as ranks:
        second = None
        if ranks.rank == 0:
            open_study(output, force)
            second = tuned.make_tuned(output, force=force)
        second = ranks.told(second)
        (a, tokenizer), (b, other) = (load_model(str(one), how) for one in (CHECKPOINT, second))
        pair = pair_of(a, b, tokenizer, other, names=(DEMO, f"{DEMO}, {tuned.RELATION} retaught"))
        made_by = command("demo", "-o", STUDY, analyses=CONTRAST)
        plan = Plan(*tuned.prompts(), cost=f"{tuned.__name__}:cost", made_by=made_by)
        report = contrast_study(pair, plan, output, force=force, quiet=quiet, say=say)
    yield f"report: {report}"


def run(
    model: Annotated[str, Argument("MODEL", "Model folder or hub name.")],
    facts: Annotated[Path, Named("Folder of LRE-format fact files.")],
    output: Output,
    options: RunOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str | Printed]:
    """The whole study on your model; goes on where it stopped.

    It finds the neurons whose responses tell a relation's prompts from those of the others,
    switches them off, and measures what the model no longer answers: of the relation, and of all
    the others. The defaults are those of the paper (arXiv 2502.17355).

    \b
    What happens, in order, and what each step writes to -o:
      prompts    facts become prompts; --eva facts of a relation are kept to ask
                 prompts.jsonl, sentences.jsonl
      record     the model answers each prompt once, every neuron is recorded;
                 only what it answers right counts
                 validated.csv, responses.safetensors (the largest file; none
                 with --drop-responses)
      identify   every neuron is ranked, the best of each relation are chosen
                 neurons.json, scores.safetensors, significance.csv, labels.csv
      look       the texts where the best of them are strongest, what is lost
                 without each, and what it writes (--cards)
                 look.html, cards.jsonl, sets.csv
      ablate     the kept prompts again: with nothing off, with each relation's
                 neurons off, with random ones off, and what --analyses adds
                 effects.csv, accuracy.csv, conditions.csv
      report     one page that opens offline, and its tables
                 report.html, analyses/*.csv

    What is wrong with the input is said before anything is written. Killed at any point, the same
    command goes on; with other options it refuses the folder, and --force makes it again.
    manifest.json says what each file was made from.

    How long: as long as the model takes for its answers. record asks every prompt once, ablate the
    kept ones 1 + relations + --random-seeds times (23 times of 12 relations), and each analysis
    more often. The bundled model takes a minute on two CPU cores; one of billions of parameters
    wants a GPU.

    What to try first: relneuron demo, to see what comes out; relneuron doctor MODEL, whether every
    layer is supported; then two or three relations with --eva 10 --random-seeds 2.

    Examples:
      # small: does the model know the facts, and is anything lost?
      relneuron run Qwen/Qwen3-0.6B --facts facts -o small --eva 10 \\
          --random-seeds 2
      # the paper's settings, with all of its analyses
      relneuron run Qwen/Qwen3-0.6B --facts facts -o study --analyses all
      # all neurons below a false discovery rate, scaled in place of zeroed
      relneuron run Qwen/Qwen3-0.6B --facts facts -o scaled --fdr 0.05 \\
          --mode scale --factor 0.5
    """
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
    if (page := report.parent / "look.html").exists():
        yield f"neurons: {page}"
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
    """LRE-format facts -> det, eva and eva2 prompts; sentences for concepts -> one prompt each.

    Examples:
      relneuron prompts facts -o study/prompts.jsonl
      relneuron prompts facts -o chat/prompts.jsonl --eva 20 \\
          --chat-template Qwen/Qwen3-0.6B
      # multiple choice
      relneuron prompts facts -o asked/prompts.jsonl --choices 3
    """
    from relneuron.model.load import load_tokenizer
    from relneuron.texts.prompts import write_prompts

    chat = load_tokenizer(chat_template) if chat_template else None
    made = write_prompts(facts, output, options, chat=chat, force=force)
    yield f"{len(made)} prompts -> {output}"


_METHOD = "The method"  # heading of --method in the help


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
        str,
        Named(
            ", ".join(f"{one.name} is {one.title}" for one in attributions().values()) + ".",
            panel=_METHOD,
            offers=tuple(attributions()),
        ),
    ] = "gain",
    options: Annotated[
        dict[str, Any], AnyOf({name: a.options for name, a in attributions().items()})
    ],
    load_options: LoadOptions,
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str | Printed]:
    """How much each neuron, head and layer does for the answers, by one of several methods.

    Goes on where it stopped.

    Examples:
      relneuron attribute Qwen/Qwen3-0.6B facts -o gains
      relneuron attribute Qwen/Qwen3-0.6B study/prompts.jsonl -o study \\
          --method ig --splits eva,eva2 --steps 20
      relneuron attribute Qwen/Qwen3-0.6B facts -o relevance --method relevance
    """
    known = attributions()
    asked = _asked(method, known, options)
    check_only(asked, given())
    run = load(known[method].run)
    yield from run(
        model, prompts, output, asked, load_options, method=method, force=force, quiet=quiet
    )
    yield f"-> {output}"


def plan_attribute(
    model: str,
    prompts: Path,
    output: Path,
    *,
    method: str,
    options: dict[str, Any],
    load_options: LoadOptions,
    force: bool,
    quiet: bool,
) -> Iterator[Planned]:
    """The plan of `attribute`: that of the method which is asked for."""
    known = attributions()
    asked = _asked(method, known, options)
    check_only(asked, given())
    plan = load(known[method].plan)
    yield from plan(
        model, prompts, output, asked, load_options, method=method, force=force, quiet=quiet
    )


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
    method: Annotated[str, Named(_methods_help(), panel=_METHOD, offers=tuple(rankings()))] = "ap",
    options: Annotated[dict[str, Any], AnyOf({name: r.options for name, r in rankings().items()})],
    force: bool = False,
    quiet: bool = False,
) -> Iterator[str]:
    """Rank the neurons of a recorded, attributed or counted directory; needs no model.

    Examples:
      relneuron identify study -o study/neurons.json --fdr 0.05
      relneuron identify counts -o counts/neurons.json --method lape
      relneuron identify gains -o gains/neurons.json --method logprob_gain \\
          --top 300
    """
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
    """All artifacts of a study -> one HTML file that opens offline, or figures for a paper.

    Examples:
      relneuron report study -o study/report.html
      relneuron report study --figures figures --format pdf,png --width 3.3in
    """
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
