"""`relneuron plan STAGE ...`, and `--dry-run` of each command that runs a model: how long, how big.

A stage says in `Stage.plan` by which function it is planned; here its plan becomes a table, or an
object (--json, and `relneuron.plan` of cli/python.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from relneuron.artifact.files import Json, RelneuronError
from relneuron.artifact.options import Argument, Only, Options, option
from relneuron.artifact.planned import Planned
from relneuron.artifact.stage import Printed, Stage

DRY_RUN = "--dry-run"
_ONLY = Only(f"with {DRY_RUN}", lambda o: o.dry_run)


@dataclass(frozen=True)
class DryOptions(Options):
    """Whether a command is planned and not run, and how fast the machine is that it is for."""

    PANEL = "What it would take"

    dry_run: bool = option(
        False,
        "Run nothing and write nothing: print the tokens, operations, bytes and time that it would "
        "take.",
        records=False,
    )
    tflops: float | None = option(
        None,
        "10^12 operations a second, of the machine that it is for; default: measured here.",
        above=0,
        records=False,
        only=_ONLY,
    )
    gbps: float | None = option(
        None,
        "10^9 bytes a second that it reads from memory; default: measured here.",
        above=0,
        records=False,
        only=_ONLY,
    )
    json: bool = option(
        False,
        "Print the plan as one JSON object, and nothing else.",
        records=False,
        only=_ONLY,
    )


def plan(
    stage: Annotated[str, Argument("STAGE", "The command: run, record, count, ...")],
    words: Annotated[list[str] | None, Argument("WORDS...", "Its own words.")] = None,
) -> Iterator[str | Printed]:
    """What a command would take, before it starts: tokens, operations, bytes and time.

    It takes the words of the command itself, and is the same as that command with --dry-run: from
    the model's config and the prompts alone. No weight is loaded, nothing is written.

    Examples:
      relneuron plan run Qwen/Qwen3-0.6B --facts facts -o study
      relneuron plan count Qwen/Qwen3-0.6B en=en.txt zh=zh.txt -o counts
      # on a GPU of 200 TFLOP/s that reads 2 TB/s
      relneuron plan attribute Qwen/Qwen3-0.6B facts -o gains --tflops 200 \\
          --gbps 2000
      # for other programs
      relneuron plan record Qwen/Qwen3-0.6B prompts.jsonl -o study --json
    """
    from relneuron.cli.main import make_app

    given = [planned_stage(stage).name, *(words or ())]
    given += [] if DRY_RUN in given else [DRY_RUN]
    make_app(stage)(given, standalone_mode=False, prog_name="relneuron")
    return
    yield


def planned_stage(name: str) -> Stage:
    """The stage of a command; RelneuronError for one that has no plan."""
    from relneuron.cli.main import stages

    known = {stage.name: stage for stage in stages() if stage.plan}
    if name not in known:
        raise RelneuronError(f"nothing to plan of {name!r}", f"plan one of {', '.join(known)}", 2)
    return known[name]


# --- as JSON -----------------------------------------------------------------------------------


def as_object(plans: Sequence[Planned], speed: Any) -> Json:
    """The plan of some stages as an object; `relneuron.plan` says what its keys are."""
    first = next(one for one in plans if one.layers)
    return {
        "layers": first.layers,
        "neurons": dict(first.neurons),
        "flops_per_s": speed.flops_per_s,
        "bytes_per_s": speed.bytes_per_s,
        "stages": [_stage(one, speed) for one in plans],
        "total": _total(plans, speed),
        "notes": _notes(plans),
    }


def _total(plans: Sequence[Planned], speed: Any) -> Json:
    """Of all stages: the sum of each number, of memory the most."""
    found = [_counts(one, speed) for one in plans]
    most = ("memory_bytes", "device_bytes")
    return {name: (max if name in most else sum)(n[name] for n in found) for name in found[0]}


def _counts(one: Planned, speed: Any) -> Json:
    return {
        "batches": one.batches,
        "tokens": one.tokens,
        "padded_tokens": one.padded,
        "steps": one.steps,
        "more_tokens": one.more,
        "flops": one.flops,
        "more_flops": one.more_flops,
        "memory_bytes": one.memory,
        "device_bytes": one.on_device,
        "disk_bytes": one.disk,
        "seconds": one.seconds(speed.flops_per_s, speed.bytes_per_s),
        "more_seconds": one.more_seconds(speed.flops_per_s, speed.bytes_per_s),
    }


def _stage(one: Planned, speed: Any) -> Json:
    return {
        "stage": one.stage,
        "device": one.device,
        "dtype": one.dtype,
        "reads": dict(one.reads),
        **_counts(one, speed),
        "tensors_bytes": dict(one.tensors),
        "host_bytes": dict(one.host),
        "files_bytes": dict(one.files),
    }


def _notes(plans: Sequence[Planned]) -> list[str]:
    """What is to be said of the numbers, each sentence once."""
    return list(dict.fromkeys(note for one in plans for note in one.notes))


# --- as text -----------------------------------------------------------------------------------

_UNITS = ("", "K", "M", "G", "T", "P", "E")


def report(plans: Sequence[Planned], options: DryOptions) -> Iterator[str | Printed]:
    """The table of some stages, a row each and a total, and what is to be said of them; or JSON."""
    speed = _speed(plans, options)
    if options.json:
        yield json.dumps(as_object(plans, speed), indent=2)
        return
    rows = [_row(one.stage, _counts(one, speed), bool(one.forwards)) for one in plans]
    if len(plans) > 1:
        rows.append(_row("in all", _total(plans, speed)))
    columns = ["stage", "batches", "tokens", "FLOP", "memory", "device", "disk", "time"]
    keep = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    yield Printed([columns[i] for i in keep], [[row[i] for i in keep] for row in rows])
    first = next(one for one in plans if one.layers)
    sites = ", ".join(f"{n:,} {site}" for site, n in first.neurons.items())
    yield f"neurons: {sum(first.neurons.values()):,} in {first.layers} layers ({sites})"
    yield from (_counted(one, speed) for one in plans)
    most = max(plans, key=lambda one: one.memory + one.on_device)
    where = "memory" if most.device == "cpu" else f"memory and {most.device}"
    yield f"{where} of {most.stage}: {_parts({**most.host, **most.tensors})}"
    for one in plans:
        if one.files:
            told = {name: size for name, size in one.files.items() if size is not None}
            more = ", ".join(name for name, size in one.files.items() if size is None)
            parts = [_parts(told)] * bool(told) + [f"{more} (not told)"] * bool(more)
            yield f"disk, {one.stage}: {', '.join(parts)}"
    yield from _notes(plans)
    yield (
        f"time: of the forwards alone, at {_short(speed.flops_per_s, 'FLOP/s')} and "
        f"{_short(speed.bytes_per_s, 'B/s')} from memory; Python and disks come to it"
    )


def _counted(one: Planned, speed: Any) -> str:
    """How many of what a stage reads, and in which batches of tokens."""
    parts = [", ".join(f"{n:,} {name}" for name, n in one.reads.items())]
    if one.batches:
        parts.append(f"{one.batches:,} batches of {one.tokens:,} tokens, {one.padded:,} padded")
    if one.steps:
        parts.append(f"{one.steps:,} tokens one by one")
    if one.more:
        parts.append(f"at most {one.more:,} more")
    if one.more_forwards:
        seconds = one.more_seconds(speed.flops_per_s, speed.bytes_per_s)
        parts[-1] += f", {_short(one.more_flops, 'FLOP')} and {_time(seconds)} of them"
    return f"{one.stage}: {'; '.join(parts)}"


def _speed(plans: Sequence[Planned], options: DryOptions) -> Any:
    from relneuron.model.speed import Speed, measured

    if options.tflops and options.gbps:
        return Speed(options.tflops * 1e12, options.gbps * 1e9)
    found = measured(plans[0].device, plans[0].dtype or "float32")
    return Speed(
        options.tflops * 1e12 if options.tflops else found.flops_per_s,
        options.gbps * 1e9 if options.gbps else found.bytes_per_s,
    )


def _row(name: str, n: Json, has_work: bool = True) -> list[str]:
    work = (
        f"{n['batches']:,}",
        _short(n["tokens"] + n["steps"]),
        _short(n["flops"]),
    )
    sizes = (n["memory_bytes"], n["device_bytes"], n["disk_bytes"])
    return [
        name,
        *(work if has_work else [""] * len(work)),
        *(_short(size, "B") if size else "" for size in sizes),
        _time(n["seconds"]) if has_work else "",
    ]


def _short(value: float, unit: str = "") -> str:
    """A number with three digits, and what stands for its thousands."""
    n = 0
    while value >= 999.5 and n < len(_UNITS) - 1:
        value, n = value / 1000, n + 1
    return f"{value:.3g} {_UNITS[n]}{unit}".strip()


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_short(n, 'B')}" for name, n in parts.items())


def _time(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"
