"""What works on this machine, and what each command can do with a model, with the reasons.

`relneuron doctor [MODEL]` prints what these functions return.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from relneuron import ops
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.installed import EXTRAS, USES, how_installed, install_command, missing
from relneuron.artifact.manifest import versions
from relneuron.artifact.neurons import Shape
from relneuron.artifact.stage import Printed, load
from relneuron.cli.main import stages
from relneuron.methods import methods
from relneuron.model.ask import cache_of
from relneuron.model.instrument import instrument
from relneuron.model.layers import decoder_layers, device_of, first_line, input_device
from relneuron.model.mlps.candidates import Run
from relneuron.model.mlps.find import inspect_layers
from relneuron.model.mlps.modules import inspect_modules
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.mlps.verdict import Verdict
from relneuron.model.pictures import Processor, load_processor, picture_run, reads_pictures
from relneuron.model.plan import Place, Plan


def machine_report() -> list[tuple[str, str]]:
    """(name, finding) rows: versions, devices, backends, extras, commands, with what is missing."""
    rows = [(name, value) for name, value in versions().items()]
    rows.append(("installed", how_installed()))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows += [("CPU threads", str(torch.get_num_threads())), ("GPU", gpu)]
    for backend, status in ops.available_backends().items():
        verdict = "works" if status.works else "does not work"
        rows.append((f"backend {backend}", f"{verdict}: {status.detail}"))
    for extra in dict.fromkeys(EXTRAS.values()):
        absent = missing(*(package for package, name in EXTRAS.items() if name == extra))
        verdict = f"without {', '.join(absent)}: {install_command(extra)}" if absent else "there"
        rows.append((f"extra {extra}", verdict))
    return [*rows, *_command_rows()]


def _command_rows() -> Iterator[tuple[str, str]]:
    """Which commands have the packages that they need, which ones the others lack, and for what."""
    lacking: dict[tuple[str, ...], list[str]] = {}
    for stage in stages():
        lacking.setdefault(tuple(missing(*stage.needs)), []).append(stage.name)
    ready = lacking.pop((), [])
    yield "commands", f"{', '.join(ready)}: all they need is there" if lacking else "all can run"
    for absent, names in lacking.items():
        yield f"without {', '.join(absent)}", f"no {', '.join(names)}"
    for package in missing(*USES):
        yield f"without {package}", f"no {USES[package]}"


def model_report(model: Any, run: Run | None = None) -> tuple[list[tuple[str, str]], bool]:
    """Rows on a model: its layers, like ones in one row, and what each command can do with it.

    With `run`, a forward with a picture, also on its other modules. And whether every command
    takes it, but those of methods that say so in rows of their own.
    """
    verdicts = inspect_layers(model, run)
    rows = list(_layer_rows(model, verdicts))
    mlps = [mlp for verdict in verdicts for mlp in verdict.mlps]
    n_good = sum(bool(verdict.mlps) for verdict in verdicts)
    rows.append(("summary", f"supported: {n_good} of {len(verdicts)} layers"))
    why = None if mlps else "no layer has a supported MLP"
    if not all(verdict.mlps or verdict.passed for verdict in verdicts):
        why = "not every layer is supported"
    fault = why or _fault(model, mlps)
    if why is None:
        rows.append(("neurons", _neurons(mlps)))
    rows += [
        (commands, f"no: {reason}" if reason else "works")
        for commands, reason in (
            ("count", why or _uncounted(model)),
            ("nll", why),
            ("record, ablate, generate, run", fault),
        )
    ]
    if run is not None:
        rows += _module_rows(model, verdicts, run)
    rows += [load(method.supports)(model) for method in methods() if method.supports]
    return rows, fault is None


def _layer_rows(model: Any, verdicts: Sequence[Verdict]) -> Iterator[tuple[str, str]]:
    """A row for each run of layers of which the same is said."""
    path, layers = decoder_layers(model)
    said = []
    for verdict, layer in zip(verdicts, layers, strict=True):
        word = "passed over" if verdict.passed else "not supported"
        word = "supported" if verdict.mlps else word
        n_bytes = sum(weight.numel() * weight.element_size() for weight in layer.parameters())
        text = f"{word}: {verdict.reason}".replace(f"{path}.{verdict.layer}.", f"{path}.{{}}.")
        said.append(f"{text} ({_size(n_bytes)}, {device_of(layer)})")
    begin = 0
    for text, run in groupby(said):
        end = begin + len(list(run)) - 1
        yield f"layer {begin}" if begin == end else f"layers {begin}-{end}", text
        begin = end + 1


def processor_of(
    name: str, model: Any, revision: str | None
) -> tuple[Run | None, list[tuple[str, str]]]:
    """A forward with a picture, of a model that reads some and whose folder has its processor."""
    if not reads_pictures(model):
        return None, []
    try:
        processor = Processor(load_processor(name, revision=revision))
        run = picture_run(model, processor)
        with torch.no_grad():
            run()
    except RelneuronError as error:
        return None, [("pictures", f"no: {error.cause}")]
    except Exception as error:
        return None, [("pictures", f"no: a forward with a picture fails: {first_line(error)}")]
    said = f"a text gets {processor.marker!r}" if processor.marker else "the processor puts them in"
    return run, [("pictures", f"read by {type(processor.processor).__name__}: {said}")]


def _module_rows(model: Any, language: Sequence[Verdict], run: Run) -> Iterator[tuple[str, str]]:
    """A row for each module that `count --module` takes: its layers, widths and sites."""
    for name, verdicts in {"language": language, **inspect_modules(model, run)}.items():
        mlps = [mlp for verdict in verdicts for mlp in verdict.mlps]
        why = next((v.reason for v in verdicts if not v.mlps and not v.passed), None)
        if why or not mlps:
            yield f"module {name}", f"no: {why or 'no layer has a supported MLP'}"
            continue
        sizes = ((key, sorted({getattr(m, name) for m in mlps})) for key, name in _SIZES.items())
        said = ", ".join(f"{key}={' and '.join(map(str, found))}" for key, found in sizes)
        gated = "gate, up, act, product" if all(m.is_gated for m in mlps) else "gate, act"
        layers = f"{len(verdicts)} layer{'s' * (len(verdicts) > 1)}"
        yield f"module {name}", f"works: {layers}, {said}, sites {gated}, down"


_SIZES = {"F": "width", "D": "hidden"}


def _size(n_bytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} GB"


def _neurons(mlps: Sequence[Part]) -> str:
    """How many neurons each site has."""
    try:
        order = Shape.of(model_shape(mlps))
    except RelneuronError as error:
        return f"not told: {error.cause}"
    counts = {site: len(order.site_places(site)) for site in order.widths}
    return f"{order.total:,} ({', '.join(f'{n:,} {site}' for site, n in counts.items())})"


def _uncounted(model: Any) -> str | None:
    """Why a forward of two tokens cannot be counted, or None."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=input_device(model))
    try:
        with torch.no_grad(), instrument(model, 1) as probe:
            probe.batch(torch.ones_like(ids))
            model(ids)
    except RelneuronError as error:
        return f"{error.cause}: {error.fix}"
    except Exception as error:
        return f"a forward of two tokens cannot be counted: {first_line(error)}"
    return None


def _fault(model: Any, mlps: Sequence[Part]) -> str | None:
    """Why the stages that ask prompts refuse a model whose layers are all supported, or None."""
    try:
        model_shape(mlps)
        with torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.int64, device=input_device(model))
            cache_of(model(ids, use_cache=True))
    except RelneuronError as error:
        return error.cause
    except Exception as error:
        return f"a forward of two tokens fails: {first_line(error)}"
    return None


def plan_report(plan: Plan, parts: int | None) -> tuple[Printed, list[str], bool]:
    """The table of a plan, what is to be said of it, and whether all weights lie in memory."""
    columns = ["process" if parts else "device", "layers", "besides", "weights", "memory"]
    columns += ["left", "cache a token", "counters", "masks"]
    rows = [_place_row(place, plan) for place in plan.places]
    n_layers, total = len(plan.widths), sum(place.weights for place in plan.places)
    said = [
        f"{plan.n_parameters:,} parameters, {str(plan.dtype).removeprefix('torch.')}, "
        f"{_size(total)} of weights{' in all processes' if parts else ''}, {n_layers} layers",
        f"neurons of the MLPs, as the config says: {_ranges(plan.widths)}; without weights it is "
        "not proved what an MLP is, and if it is supported: relneuron doctor MODEL",
        "cache: keys and values of a token (count keeps none); counters: of a group at a site, 4.5 "
        "times as many with --moments; masks: of a condition; activations come to it",
    ]
    if parts:
        said.append("count takes a model in parts; one with experts, and other commands, do not")
    if plan.no_cache:
        said.append(f"cache: not told, {plan.no_cache}")
    kept = [place for place in plan.places if place.device in ("cpu", "disk") and place.weights]
    if kept and len(plan.places) > len(kept):
        said.append("weights on the cpu or the disk are brought to a GPU for every forward")
    fits = True
    for place in plan.places:
        where = f"{columns[0]} {place.device}"
        if place.missing:
            fits = False
            said.append(f"{where}: {_size(place.missing)} of weights more than its memory")
        elif place.device == "disk" and place.weights:
            fits = False
            said.append(f"no device has memory for {_size(place.weights)}: they lie on the disk")
    return Printed(columns, rows), said, fits


def _place_row(place: Place, plan: Plan) -> list[str]:
    layers = place.layers
    is_one_run = bool(layers) and layers == list(range(layers[0], layers[-1] + 1))
    runs = f"{layers[0]}-{layers[-1]}" if is_one_run else ", ".join(map(str, layers))
    others = [other.rpartition(".")[2] for other in place.others[:4]]
    others += ["..."] if len(place.others) > 4 else []
    known = place.memory is not None
    return [
        str(place.device),
        runs or "none",
        ", ".join(others) or "none",
        _size(place.weights),
        _size(place.memory or 0) if known else "",
        _size(max(0, (place.memory or 0) - place.weights)) if known else "",
        "" if plan.no_cache else _size(place.cache),
        _size(place.counters),
        _size(place.masks),
    ]


def _ranges(widths: Sequence[int]) -> str:
    """The widths of runs of layers."""
    texts, begin = [], 0
    for width, run in groupby(widths):
        end = begin + len(list(run)) - 1
        where = f"layer {begin}" if begin == end else f"layers {begin}-{end}"
        texts.append(f"{width or 'none'} ({where})")
        begin = end + 1
    return ", ".join(texts)
