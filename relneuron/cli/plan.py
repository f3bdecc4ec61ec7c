"""`relneuron plan STAGE ...`, and `--dry-run` of each command that runs a model: how long, how big.

A stage says in `Stage.plan` by which function it is planned; here its plan becomes a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.options import Argument, Only, Options, option
from relneuron.artifact.planned import Planned
from relneuron.artifact.stage import Printed

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
    """
    from relneuron.cli.main import make_app, stages

    known = [one.name for one in stages() if one.plan]
    if stage not in known:
        raise RelneuronError(f"nothing to plan of {stage!r}", f"plan one of {', '.join(known)}", 2)
    given = [stage, *(words or ())]
    given += [] if DRY_RUN in given else [DRY_RUN]
    make_app(stage)(given, standalone_mode=False, prog_name="relneuron")
    return
    yield


# --- as text -----------------------------------------------------------------------------------

_UNITS = ("", "K", "M", "G", "T", "P", "E")


def report(plans: Sequence[Planned], options: DryOptions) -> Iterator[str | Printed]:
    """The table of some stages, a row each and a total, and what is to be said of them."""
    speed = _speed(plans, options)
    rows = [_row(one, speed) for one in plans]
    if len(plans) > 1:
        rows.append(_total(plans, speed))
    columns = ["stage", "batches", "tokens", "FLOP", "memory", "device", "disk", "time"]
    keep = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    yield Printed([columns[i] for i in keep], [[row[i] for i in keep] for row in rows])
    first = next(one for one in plans if one.layers)
    sites = ", ".join(f"{n:,} {site}" for site, n in first.neurons.items())
    yield f"neurons: {sum(first.neurons.values()):,} in {first.layers} layers ({sites})"
    yield from map(_counted, plans)
    most = max(plans, key=lambda one: one.memory + one.on_device)
    where = "memory" if most.device == "cpu" else f"memory and {most.device}"
    yield f"{where} of {most.stage}: {_parts({**most.host, **most.tensors})}"
    for one in plans:
        if one.files:
            told = {name: size for name, size in one.files.items() if size is not None}
            more = ", ".join(name for name, size in one.files.items() if size is None)
            parts = [_parts(told)] * bool(told) + [f"{more} (not told)"] * bool(more)
            yield f"disk, {one.stage}: {', '.join(parts)}"
    yield from dict.fromkeys(note for one in plans for note in one.notes)
    yield (
        f"time: of the forwards alone, at {_short(speed.flops_per_s, 'FLOP/s')} and "
        f"{_short(speed.bytes_per_s, 'B/s')} from memory; Python and disks come to it"
    )


def _counted(one: Planned) -> str:
    """How many of what a stage reads, and in which batches of tokens."""
    parts = [", ".join(f"{n:,} {name}" for name, n in one.reads.items())]
    if one.batches:
        parts.append(f"{one.batches:,} batches of {one.tokens:,} tokens, {one.padded:,} padded")
    if one.steps:
        parts.append(f"{one.steps:,} tokens one by one")
    if one.more:
        parts.append(f"at most {one.more:,} more")
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


def _row(one: Planned, speed: Any) -> list[str]:
    has_work = bool(one.forwards)
    seconds = one.seconds(speed.flops_per_s, speed.bytes_per_s)
    return [
        one.stage,
        f"{one.batches:,}" if has_work else "",
        _short(one.tokens + one.steps) if has_work else "",
        _short(one.flops) if has_work else "",
        _short(one.memory, "B") if one.memory else "",
        _short(one.on_device, "B") if one.on_device else "",
        _short(one.disk, "B") if one.disk else "",
        _time(seconds) if has_work else "",
    ]


def _total(plans: Sequence[Planned], speed: Any) -> list[str]:
    steps = sum(one.steps for one in plans)
    seconds = sum(one.seconds(speed.flops_per_s, speed.bytes_per_s) for one in plans)
    device = max(one.on_device for one in plans)
    return [
        "in all",
        f"{sum(one.batches for one in plans):,}",
        _short(sum(one.tokens for one in plans) + steps),
        _short(sum(one.flops for one in plans)),
        _short(max(one.memory for one in plans), "B"),
        _short(device, "B") if device else "",
        _short(sum(one.disk for one in plans), "B"),
        _time(seconds),
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
