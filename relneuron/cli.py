"""The command line: parses, calls one stage, prints. The only file that prints.

`relneuron --help` lists the commands; exit codes: 0 done, 1 error, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from relneuron.artifact import RelneuronError, read_csv
from relneuron.facts import SUFFIX
from relneuron.study import Options, report_stage, run_study

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find the neurons of a language model that carry a relation, switch them off, measure.",
)
_state = {"debug": False}
_DEFAULT = Options()
_SPLITS = ",".join(_DEFAULT.splits)


def _debug(value: bool) -> None:
    _state["debug"] = _state["debug"] or value


# Every option is written once, here.
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub name.")]
Prompts = Annotated[Path, typer.Argument(metavar="PROMPTS", help="A prompts.jsonl.")]
Study = Annotated[Path, typer.Argument(metavar="DIR", help="A study directory.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Where to write.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_debug, help="Traceback on errors.")]
Eva = Annotated[int, typer.Option(min=1, help="Facts per relation kept for evaluation.")]
Seed = Annotated[int, typer.Option(help="Seed of the split and of the negatives.")]
Suffix = Annotated[str, typer.Option(help="Follows every template of the files' own language.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16; default: float32 on a CPU, else the model's."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda; default: the GPU if there is one.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
Backend = Annotated[str, typer.Option(help="Kernels: auto, reference, cpu, triton.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Padded tokens per batch.")]
Pooling = Annotated[str, typer.Option(help="A prompt's response: mean over tokens, or last.")]
ExcludeBos = Annotated[
    bool, typer.Option("--exclude-bos", help="Leave the first token out of the mean.")
]
AcceptPrefix = Annotated[
    bool,
    typer.Option(
        "--accept-object-prefix",
        help="Also correct: a prediction that begins with the object ('Japan.' for 'Japan').",
    ),
]
Method = Annotated[str, typer.Option(help="How neurons are ranked: ap (average precision).")]
Top = Annotated[
    int | None,
    typer.Option(help="Neurons per relation; default: 3000, at most a tenth of the model's."),
]
Negatives = Annotated[int, typer.Option(min=1, help="Negative prompts per positive one.")]
Splits = Annotated[str, typer.Option(help="What to ask when neurons are off: eva,eva2,det.")]
RandomSeeds = Annotated[int, typer.Option(min=0, help="Random neuron sets to compare with.")]
DropResponses = Annotated[
    bool, typer.Option("--drop-responses", help="Delete responses.safetensors after identify.")
]


@app.command()
def demo(
    output: Output = Path("relneuron-demo"),
    top: Top = None,
    random_seeds: RandomSeeds = _DEFAULT.random_seeds,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The whole study on the bundled demo model, on a CPU."""
    from relneuron.demo import CHECKPOINT, FACTS, TOP

    options = Options(top=top or TOP, random_seeds=random_seeds, device="cpu", dtype="float32")
    report = run_study(
        str(CHECKPOINT), FACTS, output, options, name="relneuron demo", force=force, quiet=quiet
    )
    _print_study(report)


@app.command()
def run(
    model: Model,
    facts: Annotated[Path, typer.Option(help="Folder of LRE-format fact files.")],
    output: Output,
    eva: Eva = _DEFAULT.eva,
    seed: Seed = _DEFAULT.seed,
    suffix: Suffix = SUFFIX,
    method: Method = _DEFAULT.method,
    top: Top = _DEFAULT.top,
    negatives: Negatives = _DEFAULT.negatives,
    splits: Splits = _SPLITS,
    random_seeds: RandomSeeds = _DEFAULT.random_seeds,
    pooling: Pooling = _DEFAULT.pooling,
    exclude_bos: ExcludeBos = False,
    accept_object_prefix: AcceptPrefix = False,
    batch_tokens: BatchTokens = _DEFAULT.batch_tokens,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    backend: Backend = "auto",
    drop_responses: DropResponses = False,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The whole study on your model; goes on where it stopped."""
    options = Options(
        eva=eva,
        seed=seed,
        suffix=suffix,
        method=method,
        top=top,
        negatives=negatives,
        splits=_split_list(splits),
        random_seeds=random_seeds,
        pooling=pooling,
        exclude_bos=exclude_bos,
        accept_object_prefix=accept_object_prefix,
        batch_tokens=batch_tokens,
        dtype=dtype,
        device=device,
        revision=revision,
        backend=backend,
        drop_responses=drop_responses,
    )
    _print_study(run_study(model, facts, output, options, force=force, quiet=quiet))


@app.command()
def prompts(
    facts: Annotated[Path, typer.Argument(help="Folder of LRE-format fact files, or one file.")],
    output: Output,
    eva: Eva = _DEFAULT.eva,
    seed: Seed = _DEFAULT.seed,
    suffix: Suffix = SUFFIX,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """LRE-format facts -> det, eva and eva2 prompts."""
    from relneuron.prompts import write_prompts

    made = write_prompts(facts, output, n_eva=eva, seed=seed, suffix=suffix, force=force)
    _say(f"{len(made)} prompts -> {output}")


@app.command()
def record(
    model: Model,
    prompts: Prompts,
    output: Output,
    pooling: Pooling = _DEFAULT.pooling,
    exclude_bos: ExcludeBos = False,
    accept_object_prefix: AcceptPrefix = False,
    batch_tokens: BatchTokens = _DEFAULT.batch_tokens,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    backend: Backend = "auto",
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """One instrumented pass: validated.csv and responses.safetensors."""
    from relneuron.artifact import require
    from relneuron.record import record as record_stage

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
        accept_object_prefix=accept_object_prefix,
        backend=backend,
        force=force,
        quiet=quiet,
    )
    _say(f"{accuracy:.1%} of the prompts answered correctly -> {output}")


@app.command()
def identify(
    folder: Study,
    output: Output,
    method: Method = _DEFAULT.method,
    top: Top = None,
    negatives: Negatives = _DEFAULT.negatives,
    seed: Seed = _DEFAULT.seed,
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rank the neurons of a recorded directory; needs no model."""
    from relneuron.identify import identify as identify_stage

    chosen = identify_stage(
        folder,
        output,
        method=method,
        top=top,
        negatives=negatives,
        seed=seed,
        force=force,
        quiet=quiet,
    )
    for relation, found in chosen.selection.items():
        if "reason" in found:
            _say(f"{relation}: no neurons, {found['reason']}")
            continue
        _say(
            f"{relation}: {len(chosen.sets[relation])} neurons, AP >= {found['score_at_cut']:.4f}, "
            f"{found['ties_chosen']} of {found['ties_at_cut']} tied at the cut chosen, "
            f"{found['perfect']} with AP = 1"
        )
    _say(f"-> {output}")


@app.command()
def ablate(
    model: Model,
    neurons: Annotated[Path, typer.Argument(metavar="NEURONS", help="A neurons.json.")],
    prompts: Prompts,
    output: Output,
    splits: Splits = _SPLITS,
    random_seeds: RandomSeeds = _DEFAULT.random_seeds,
    accept_object_prefix: AcceptPrefix = False,
    batch_tokens: BatchTokens = _DEFAULT.batch_tokens,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    backend: Backend = "auto",
    force: Force = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Switch each relation's neurons off and ask again: effects (.csv, .parquet), accuracy.csv."""
    from relneuron.ablate import ablate_prompts, check_format
    from relneuron.artifact import NeuronFile, refuse_overwrite, require

    refuse_overwrite(output, force)
    check_format(output)
    require(prompts, "prompts FACTS_DIR -o prompts.jsonl")
    NeuronFile.read(neurons)
    loaded, tokenizer = _load(model, dtype, device, revision)
    ablate_prompts(
        model,
        loaded,
        tokenizer,
        neurons,
        prompts,
        output,
        splits=_split_list(splits),
        random_seeds=random_seeds,
        batch_tokens=batch_tokens,
        accept_object_prefix=accept_object_prefix,
        backend=backend,
        force=force,
        quiet=quiet,
    )
    _print_accuracy(output.parent)
    _say(f"-> {output}")


@app.command()
def report(folder: Study, output: Output, force: Force = False, debug: Debug = False) -> None:
    """All artifacts of a study -> one HTML file that opens offline."""
    _say(f"report: {report_stage(folder, output, force=force)}")


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Model to check.")] = None,
    revision: Revision = None,
    debug: Debug = False,
) -> None:
    """What works on this machine, and for this model, and why not."""
    from relneuron.doctor import machine_report, model_report
    from relneuron.model import load_model, load_tokenizer

    _print_rows(machine_report())
    if model is None:
        return
    rows, supported = model_report(load_model(model, revision=revision))
    try:
        load_tokenizer(model, revision=revision)
        rows.append(("tokenizer", "works"))
    except RelneuronError as error:
        rows.append(("tokenizer", f"no: {error.cause}"))
        supported = False
    _print_rows(rows)
    if not supported:
        raise typer.Exit(1)


@app.command()
def bench(
    op: Annotated[
        str | None, typer.Argument(metavar="[OP]", help="swiglu_stats, average_precision.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: does it run at all.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every size, dtype and layout.")] = False,
    dtype: Annotated[str, typer.Option(help="float32,bfloat16,float16 in place of all.")] = "",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, such as 2048,8192.")] = "",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: as torch chooses.")] = 0,
    device: Device = None,
    no_compile: Annotated[
        bool, typer.Option("--no-compile", help="Without torch.compile (needs a C++ compiler).")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the csv and the roofline.")
    ] = None,
    debug: Debug = False,
) -> None:
    """The kernels against their peers on this machine, in the same rounds."""
    import torch

    from relneuron.bench import EFFORTS, Row, append_rows, choose_cases, run_case, summary

    suite = "quick" if quick else "full" if full else "usual"
    sizes = [part.strip() for part in tokens.split(",") if part.strip()]
    if not all(part.isdigit() for part in sizes):
        raise RelneuronError(f"unknown number in {tokens!r}", "use numbers such as 2048,8192", 2)
    dtypes = [part.strip() for part in dtype.split(",") if part.strip()]
    cases = choose_cases(suite, op, dtypes, [int(part) for part in sizes])
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or device == "cuda" and not torch.cuda.is_available():
        raise RelneuronError(f"no device {device!r} here", "use --device cpu", 2)
    if threads:
        torch.set_num_threads(threads)
    if output is not None:
        from relneuron.bench_plot import roofline

        if output.is_file():
            raise RelneuronError(f"{output} is a file", "give a folder with -o", 2)
    rows: list[Row] = []
    for case in cases:
        found = run_case(case, device=device, compiled=not no_compile, effort=EFFORTS[suite])
        _print_bench(str(case), found)
        for what, who, value in summary(found):
            _say(f"  {what}: {value:.2f} x our time ({who})")
        rows += found
        if output is not None:
            path = append_rows(output, found)
    if output is None:
        _say("to keep the rows and draw the roofline: add -o DIR")
        return
    roofline(rows, path.with_suffix(".png"))
    _say(f"-> {path}, {path.with_suffix('.png').name}")


# --- printing --------------------------------------------------------------------------------


def _say(text: str) -> None:
    """Print plain text: no markup, no control characters from data."""
    clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    Console(highlight=False, soft_wrap=True).print(clean, markup=False)


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, finding in rows:
        _say(f"{name:<{width}}  {finding}")


def _print_accuracy(folder: Path) -> None:
    """Accuracy on eva, per relation: before, with its own neurons off, others' off, random off."""
    found: dict[tuple[str, str], float] = {}
    for row in read_csv(folder / "accuracy.csv", ("condition", "relation", "split", "accuracy")):
        if row["split"] == "eva":
            found[row["condition"], row["relation"]] = float(row["accuracy"])
    relations = [relation for condition, relation in found if condition == "clean"]
    table = Table("relation", "clean", "own off", "others off", "random off")
    for relation in relations:
        own = found.get((relation, relation))
        others = [found[c, relation] for c in relations if c != relation and (c, relation) in found]
        chance = [v for (c, r), v in found.items() if r == relation and c.startswith("random.")]
        cells = [
            found["clean", relation],
            own,
            sum(others) / len(others) if others else None,
            sum(chance) / len(chance) if chance else None,
        ]
        table.add_row(relation, *("" if cell is None else f"{cell:.1%}" for cell in cells))
    Console().print(table)


def _print_bench(title: str, rows: Sequence[Any]) -> None:
    """The rows of one case; a contestant that is wrong or not here has a reason and no times."""
    names = ("task", "who", "ms", "min ms", "x ours", "GB/s", "/triad", "/copy")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in rows:
        if row.median_ms is None:
            _say(f"{row.variant}, {row.contestant}: {row.note}")
            continue
        shares = ["" if s is None else f"{s:.0%}" for s in (row.share_triad, row.share_copy)]
        times = [f"{row.median_ms:.3g}", f"{row.min_ms:.3g}", f"{row.ratio:.3g}"]
        table.add_row(row.variant, row.contestant, *times, f"{row.GB_s:.3g}", *shares)
    Console().print(table)


def _print_study(report: Path) -> None:
    _print_accuracy(report.parent)
    _say(f"report: {report}")


# --- errors ----------------------------------------------------------------------------------


def _split_list(text: str) -> tuple[str, ...]:
    splits = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [part for part in splits if part not in ("det", "eva", "eva2")]
    if unknown or not splits:
        raise RelneuronError(f"unknown split in {text!r}", "use det, eva, eva2", 2)
    return splits


def _load(
    model: str, dtype: str | None, device: str | None, revision: str | None
) -> tuple[Any, Any]:
    from relneuron.model import load_model, load_tokenizer

    loaded = load_model(model, revision=revision, dtype=dtype, device=device)
    return loaded, load_tokenizer(model, revision=revision)


def _fail(cause: str, fix: str, code: int) -> NoReturn:
    if _state["debug"]:
        traceback.print_exc()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"error: {' '.join(cause.split())}", markup=False)
    console.print(f"fix:   {' '.join(fix.split())}", markup=False)
    sys.exit(code)


_DISK = {
    errno.ENOSPC: "free space on the disk, or write elsewhere",
    errno.EDQUOT: "free space in your quota, or write elsewhere",
    errno.EFBIG: "raise the file size limit (ulimit -f), or write elsewhere",
    errno.EROFS: "write to a folder that is not read-only",
    errno.EACCES: "write to a folder you have the right to write to",
}


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
    except RelneuronError as error:
        _fail(error.cause, error.fix, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", f"go on with: relneuron {shlex.join(sys.argv[1:])}", 130)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        fix = _DISK.get(error.errno or 0, "run again with --debug to see where")
        _fail(f"{error.strerror or error}{where}", f"{fix}; then run the same command again", 1)
    except ImportError as error:
        _fail(str(error), "pip install 'relneuron[all]'", 1)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of typer's
            error.show()
            sys.exit(error.exit_code)
        _fail(f"{type(error).__name__}: {error}", "run again with --debug to see where", 1)
    sys.exit(code)


if __name__ == "__main__":
    main()
