"""The command line: parses, calls one stage, prints (cli/options.py, cli/show.py).

`relneuron --help` lists the commands; exit codes: 0 done, 1 error, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from relneuron.ablation.conditions import parse_analyses
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.installed import need
from relneuron.artifact.reading import MAX_RECORD_MIB
from relneuron.cli import options as take
from relneuron.cli.attribute import attribute
from relneuron.cli.bench import bench
from relneuron.cli.checks import METHODS, Command
from relneuron.cli.corpus import count, generate, merge, nll
from relneuron.cli.errors import end
from relneuron.cli.identify import export, identify, import_files
from relneuron.cli.settings import DEMO, Options
from relneuron.cli.show import print_accuracy, print_rows, print_study, say

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find the neurons of a language model that carry a relation, switch them off, measure.",
)
_DEFAULT = Options
_SPLITS = ",".join(_DEFAULT.splits)


@app.command(cls=Command)
def demo(
    output: take.Output = Path("relneuron-demo"),
    top: take.Top = None,
    fdr: take.Fdr = None,
    permutations: take.Permutations = _DEFAULT.permutations,
    bootstrap: take.Bootstrap = _DEFAULT.bootstrap,
    noise: take.Noise = _DEFAULT.noise,
    random_seeds: take.RandomSeeds = _DEFAULT.random_seeds,
    analyses: take.Analyses = "gain",
    sizes: take.Sizes = "",
    force: take.Force = False,
    quiet: take.Quiet = False,
    debug: take.Debug = False,
) -> None:
    """The whole study on the bundled demo model, on a CPU."""
    from relneuron.cli.run import run_study
    from relneuron.demo import CHECKPOINT, FACTS, TOP

    options = Options(
        top=TOP if top is None and fdr is None else top,
        fdr=fdr,
        permutations=permutations,
        bootstrap=bootstrap,
        noise=noise,
        random_seeds=random_seeds,
        analyses=parse_analyses(analyses),
        sizes=take.size_list(sizes),
        device="cpu",
        dtype="float32",
    )
    report = run_study(
        str(CHECKPOINT),
        FACTS,
        output,
        options,
        name=DEMO,
        force=force,
        quiet=quiet,
        say=say,
    )
    print_study(report)


@app.command(cls=Command)
def run(
    model: take.Model,
    facts: Annotated[Path, typer.Option(help="Folder of LRE-format fact files.")],
    output: take.Output,
    eva: take.Eva = _DEFAULT.eva,
    seed: take.Seed = _DEFAULT.seed,
    suffix: take.Suffix = None,
    chat_template: take.ChatTemplate = False,
    method: take.Method = _DEFAULT.method,
    top: take.Top = _DEFAULT.top,
    ends: take.Ends = _DEFAULT.ends,
    fdr: take.Fdr = _DEFAULT.fdr,
    negatives: take.Negatives = _DEFAULT.negatives,
    permutations: take.Permutations = _DEFAULT.permutations,
    bootstrap: take.Bootstrap = _DEFAULT.bootstrap,
    noise: take.Noise = _DEFAULT.noise,
    splits: take.Splits = _SPLITS,
    random_seeds: take.RandomSeeds = _DEFAULT.random_seeds,
    analyses: take.Analyses = "main",
    sizes: take.Sizes = "",
    mode: take.Mode = _DEFAULT.mode,
    factor: take.Factor = None,
    mean_of: take.MeanOf = _DEFAULT.mean_of,
    positions: take.Positions = _DEFAULT.positions,
    generate: take.Generate = None,
    oom: take.Oom = _DEFAULT.oom,
    pooling: take.Pooling = _DEFAULT.pooling,
    exclude_bos: take.ExcludeBos = False,
    attention: take.Attention = False,
    accept_object_prefix: take.AcceptPrefix = False,
    batch_tokens: take.BatchTokens = _DEFAULT.batch_tokens,
    dtype: take.Dtype = None,
    device: take.Device = None,
    revision: take.Revision = None,
    backend: take.Backend = "auto",
    drop_responses: take.DropResponses = False,
    force: take.Force = False,
    quiet: take.Quiet = False,
    max_record_mib: take.MaxRecord = MAX_RECORD_MIB,
    debug: take.Debug = False,
) -> None:
    """The whole study on your model; goes on where it stopped."""
    if method in METHODS and method != _DEFAULT.method:
        raise RelneuronError(
            f"run ranks by {_DEFAULT.method}, not by {method}",
            f"leave out --method; {method} is one of relneuron identify",
            2,
        )
    from relneuron.cli.run import run_study

    options = Options(
        eva=eva,
        seed=seed,
        suffix=suffix,
        chat_template=chat_template,
        method=method,
        top=top,
        ends=ends,
        fdr=fdr,
        negatives=negatives,
        permutations=permutations,
        bootstrap=bootstrap,
        noise=noise,
        splits=take.split_list(splits),
        random_seeds=random_seeds,
        analyses=parse_analyses(analyses),
        sizes=take.size_list(sizes),
        mode=mode,
        factor=factor,
        mean_of=mean_of,
        positions=positions,
        generate=generate,
        oom=oom,
        pooling=pooling,
        exclude_bos=exclude_bos,
        attention=attention,
        accept_object_prefix=accept_object_prefix,
        batch_tokens=batch_tokens,
        dtype=dtype,
        device=device,
        revision=revision,
        backend=backend,
        drop_responses=drop_responses,
    )
    print_study(run_study(model, facts, output, options, force=force, quiet=quiet, say=say))


@app.command(cls=Command)
def prompts(
    facts: Annotated[
        Path,
        typer.Argument(
            metavar="FACTS",
            help="Folder of LRE-format fact files, or one; or of selfcond's concept files, or a "
            "list of concepts.",
        ),
    ],
    output: take.Output,
    eva: take.Eva = _DEFAULT.eva,
    seed: take.Seed = _DEFAULT.seed,
    suffix: take.Suffix = None,
    chat_template: take.ChatTemplateOf = None,
    force: take.Force = False,
    max_record_mib: take.MaxRecord = MAX_RECORD_MIB,
    debug: take.Debug = False,
) -> None:
    """LRE-format facts -> det, eva and eva2 prompts; sentences for concepts -> one prompt each."""
    from relneuron.model.load import load_tokenizer
    from relneuron.texts.prompts import write_prompts

    chat = load_tokenizer(chat_template) if chat_template else None
    made = write_prompts(facts, output, n_eva=eva, seed=seed, suffix=suffix, chat=chat, force=force)
    say(f"{len(made)} prompts -> {output}")


@app.command(cls=Command)
def record(
    model: take.Model,
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS", help="A prompts.jsonl; or concept files, as `prompts` takes them."
        ),
    ],
    output: take.Output,
    pooling: take.Pooling = _DEFAULT.pooling,
    exclude_bos: take.ExcludeBos = False,
    attention: take.Attention = False,
    accept_object_prefix: take.AcceptPrefix = False,
    batch_tokens: take.BatchTokens = _DEFAULT.batch_tokens,
    oom: take.Oom = _DEFAULT.oom,
    dtype: take.Dtype = None,
    device: take.Device = None,
    revision: take.Revision = None,
    backend: take.Backend = "auto",
    force: take.Force = False,
    quiet: take.Quiet = False,
    max_record_mib: take.MaxRecord = MAX_RECORD_MIB,
    debug: take.Debug = False,
) -> None:
    """One instrumented pass: validated.csv and responses.safetensors."""
    from relneuron.artifact.files import require
    from relneuron.methods.responses.record import record as record_stage
    from relneuron.texts.prompts import concepts_beside

    prompts = concepts_beside(prompts, output, force=force)
    require(prompts, "prompts FACTS_DIR -o prompts.jsonl")
    loaded, tokenizer = _load(model, dtype, device, revision)
    accuracy = record_stage(
        model,
        loaded,
        tokenizer,
        prompts,
        output,
        batch_tokens=batch_tokens,
        pooling=pooling,
        exclude_bos=exclude_bos,
        attention=attention,
        accept_object_prefix=accept_object_prefix,
        oom=oom,
        backend=backend,
        force=force,
        quiet=quiet,
    )
    said = "sentences read, nothing asked"
    if accuracy is not None:
        said = f"{accuracy:.1%} of the prompts answered correctly"
    say(f"{said} -> {output}")


@app.command(cls=Command)
def ablate(
    model: take.Model,
    neurons: Annotated[Path, typer.Argument(metavar="NEURONS", help="A neurons.json.")],
    prompts: take.Prompts,
    output: take.Output,
    splits: take.Splits = _SPLITS,
    random_seeds: take.RandomSeeds = _DEFAULT.random_seeds,
    analyses: take.Analyses = "main",
    sizes: take.Sizes = "",
    mode: take.Mode = _DEFAULT.mode,
    factor: take.Factor = None,
    mean_of: take.MeanOf = _DEFAULT.mean_of,
    positions: take.Positions = _DEFAULT.positions,
    generate: take.Generate = None,
    oom: take.Oom = _DEFAULT.oom,
    any_set: take.AnySet = False,
    accept_object_prefix: take.AcceptPrefix = False,
    batch_tokens: take.BatchTokens = _DEFAULT.batch_tokens,
    dtype: take.Dtype = None,
    device: take.Device = None,
    revision: take.Revision = None,
    backend: take.Backend = "auto",
    force: take.Force = False,
    quiet: take.Quiet = False,
    max_record_mib: take.MaxRecord = MAX_RECORD_MIB,
    debug: take.Debug = False,
) -> None:
    """Switch each relation's neurons off and ask again: effects (.csv, .parquet), accuracy.csv."""
    from relneuron.ablation.ablate import ablate_prompts, check_format, refuse_outputs
    from relneuron.artifact.files import require
    from relneuron.artifact.neurons import NeuronFile
    from relneuron.model.clock import Clock

    refuse_outputs(output, force)
    check_format(output)
    require(prompts, "prompts FACTS_DIR -o prompts.jsonl")
    NeuronFile.read(neurons)
    loaded, tokenizer = _load(model, dtype, device, revision)
    with Clock(loaded) as clock:
        ablate_prompts(
            model,
            loaded,
            tokenizer,
            neurons,
            prompts,
            output,
            splits=take.split_list(splits),
            random_seeds=random_seeds,
            analyses=parse_analyses(analyses),
            sizes=take.size_list(sizes),
            mode=mode,
            factor=factor,
            mean_of=mean_of,
            positions=positions,
            generate=generate,
            oom=oom,
            any_set=any_set,
            batch_tokens=batch_tokens,
            accept_object_prefix=accept_object_prefix,
            backend=backend,
            force=force,
            quiet=quiet,
        )
    print_accuracy(output.parent)
    say(f"ablate: {clock}")
    say(f"-> {output}")


@app.command(cls=Command)
def report(
    folder: take.Study, output: take.Output, force: take.Force = False, debug: take.Debug = False
) -> None:
    """All artifacts of a study -> one HTML file that opens offline."""
    from relneuron.cli.run import report_stage

    say(f"report: {report_stage(folder, output, force=force)}")


@app.command(cls=Command)
def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Model to check.")] = None,
    revision: take.Revision = None,
    debug: take.Debug = False,
) -> None:
    """What works on this machine, and for this model, and why not."""
    from relneuron.cli.doctor import machine_report, model_report
    from relneuron.model.load import load_model, load_tokenizer
    from relneuron.texts.tokens import policy_text

    print_rows(machine_report())
    if model is None:
        return
    need("a model", "transformers")
    rows, supported = model_report(load_model(model, revision=revision))
    try:
        tokenizer = load_tokenizer(model, revision=revision)
        rows.append(("tokenizer", f"works: {policy_text(tokenizer)}"))
    except RelneuronError as error:
        rows.append(("tokenizer", f"no: {error.cause}"))
        supported = False
    print_rows(rows)
    if not supported:
        raise typer.Exit(1)


for command in (identify, attribute, count, merge, nll, generate, export, bench):
    app.command(cls=Command)(command)
app.command("import", cls=Command)(import_files)


def _load(
    model: str, dtype: str | None, device: str | None, revision: str | None
) -> tuple[Any, Any]:
    from relneuron.model.load import load_model, load_tokenizer

    loaded = load_model(model, revision=revision, dtype=dtype, device=device)
    return loaded, load_tokenizer(model, revision=revision)


def main() -> None:
    """Run the command line and turn every error into one line of cause and one of fix."""
    # Read by transformers when, and if, a command imports it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer's own catch of an interrupt
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:
        end(error)
    sys.exit(code)
