"""The commands that ask about the machine: `doctor`, and `bench` of the kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from relneuron.artifact.files import RelneuronError, check_folder
from relneuron.artifact.installed import need
from relneuron.artifact.options import (
    DEVICE_MAPS,
    DTYPES,
    Argument,
    LoadOptions,
    Named,
    Only,
    Options,
    like,
    option,
    refuse_stray,
)
from relneuron.artifact.stage import Printed

_DRY = Only("with --dry-run", lambda o: o.dry_run)


@dataclass(frozen=True)
class DoctorOptions(Options):
    """What is asked of a model, and of which devices."""

    PANEL = "The model"

    revision: str | None = option(None, "Revision of a model on the hub.")
    dry_run: bool = option(
        False,
        "Read only the config: what would lie where, in how many bytes, and what does not fit.",
    )
    device_map: str | None = option(
        None, "As of count; default: all on one device.", only=_DRY, offers=DEVICE_MAPS
    )
    tensor_parallel_size: int | None = option(
        None, "Processes that would hold the model in parts.", least=2, most=1024, only=_DRY
    )
    dtype: str | None = option(
        None,
        "Type of the weights; default: float32 on a CPU alone, else the model's own.",
        choices=DTYPES,
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
    """What works on this machine, and for this model, and why not.

    Examples:
      relneuron doctor  # this machine, and what is missing on it
      relneuron doctor Qwen/Qwen3-0.6B
      # does it fit, before it is loaded
      relneuron doctor Qwen/Qwen3-0.6B --dry-run --device-map auto \\
          --memory 0=24GiB,1=24GiB,cpu=64GiB
    """
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

    PANEL = "What is timed"

    quick: bool = option(
        False,
        "Only tiny sizes: whether it runs at all.",
        only=Only("without --full", lambda o: not o.full),
    )
    full: bool = option(False, "Every size, dtype and layout.")
    dtype: Sequence[str] = option((), "Only cases of these dtypes.", offers=DTYPES)
    tokens: Sequence[int] = option((), "Only these numbers of tokens, such as 2048,8192.", least=1)
    threads: int = option(0, "Number of CPU threads; 0: as torch chooses.", least=0)
    device: str | None = like(LoadOptions, "device")
    no_compile: bool = option(False, "Leave out torch.compile, which needs a C++ compiler.")


OPS = (
    *("swiglu_stats", "average_precision", "logprob_gain", "pair_stats"),
    *("peaks", "merge_peaks", "histogram"),
)


def bench(
    options: BenchOptions,
    op: Annotated[str | None, Argument("[OP]", f"{', '.join(OPS)}; default: all.", OPS)] = None,
    output: Annotated[
        Path | None, Named("Folder for the csv and the roofline.", ("-o", "--output"))
    ] = None,
    own: Annotated[
        str | None,
        Named("Your own OP, held to its contract and then timed.", ("--with",), "MODULE:FUNCTION"),
    ] = None,
) -> Iterator[str | Printed]:
    """The kernels against their peers on this machine, in the same rounds.

    Examples:
      relneuron bench --quick
      relneuron bench swiglu_stats --dtype bfloat16 --tokens 2048,8192 -o rows
      relneuron bench swiglu_stats --with mymodule:my_kernel
    """
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
