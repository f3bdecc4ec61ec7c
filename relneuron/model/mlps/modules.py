"""The MLPs outside of the language model: of a vision tower, a projector and a Q-Former.

`find.py` asks for them. In a forward with a picture three kinds of places are told by what they do,
not by their names. A list of layers that each give a tensor of the shape of the one they read is a
stack: a Q-Former's if it cross-attends, that is if a layer was given a second tensor that one of
its linear maps reads, or one of other rows; else of the vision tower. What is outside of every
stack and has an MLP that changes what the language model gives is a projector. What may be an MLP
there `candidates.py` sees, and `proof.py` proves, as in a decoder layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.artifact.modules import MODULES, is_asked, layers_of
from relneuron.model.layers import compute_dtype, decoder_layers, first_line, without_hooks
from relneuron.model.mlps import candidates, proof
from relneuron.model.mlps.candidates import Candidate, Hooks, Run, Seen, linear_maps
from relneuron.model.mlps.find import inspect_layers
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import Part
from relneuron.model.mlps.verdict import Verdict, supported, verdict_of

BELONG = "give a processor that belongs to the model: see `relneuron doctor MODEL`"


class _Reached(Exception):
    """Ends a forward at the language model, which nothing here asks for."""


@dataclass(frozen=True)
class _Stack:
    """Layers one behind the other; of a Q-Former `crosses`."""

    path: str
    layers: nn.ModuleList
    crosses: bool


def find_in_modules(model: Any, modules: Sequence[str], run: Run) -> list[Part]:
    """The parts of the modules that are asked for, or an error; their layers numbered through."""
    found = {"language": inspect_layers(model, run)} | inspect_modules(model, run)
    for asked in modules:
        if not any(is_asked(name, asked) for name in found):
            raise RelneuronError(
                f"{type(model).__name__} has no module {asked}", f"it has {', '.join(found)}", 2
            )
    chosen = [name for name in MODULES if name in found and any(is_asked(name, m) for m in modules)]
    if chosen == ["language"]:
        return supported(found["language"])
    sizes = tuple((name, len(found[name])) for name in chosen)
    parts: list[Part] = []
    for name, layers in layers_of(sizes).items():
        about: dict[str, Any] = {"n_layers": sum(n for _, n in sizes), "modules": sizes}
        own = [replace(verdict, layer=i) for i, verdict in enumerate(found[name])]
        supported(own, name)
        parts += [
            replace(part, layer=layer, **about)
            for layer, verdict in zip(layers, own, strict=True)
            for part in verdict.mlps
        ]
    return parts


def inspect_modules(model: Any, run: Run) -> dict[str, list[Verdict]]:
    """The modules of a model besides "language", each with a verdict of its layers.

    `run` is a forward with a picture. A stack of the vision tower follows the one before it, and
    each MLP of a projector is a layer of its own. What a Q-Former's layer calls first is the MLP
    of its queries, the second one that of the text.
    """
    path, decoder = decoder_layers(model)
    short = _until(decoder, run)
    try:
        short()  # transformers may hook layers in their first forward, for good
    except Exception as error:  # each model has errors of its own
        raise RelneuronError(
            f"a forward with a picture fails ({first_line(error)})", BELONG
        ) from error
    with without_hooks(model):
        stacks = _stacks(model, path, short)
        found: dict[str, list[Verdict]] = {}
        for stack in stacks:
            verdicts, calls = _inspect(
                model, {i: (f"{stack.path}.{i}", m) for i, m in enumerate(stack.layers)}, short
            )
            if not any(verdict.mlps for verdict in verdicts) and all(v.passed for v in verdicts):
                continue
            for name, own in _named(stack, verdicts, calls):
                found.setdefault(name, []).extend(own)
        taken = {id(m) for m in (decoder, *(stack.layers for stack in stacks))}
        places = list(_rest(model, taken))
        verdicts, calls = _inspect(model, dict(enumerate(places)), short)
        for verdict in verdicts:
            if calls[verdict.layer]:
                parts = (m for m in verdict.mlps if isinstance(m, MLP))
                found.setdefault("projector", []).extend(
                    replace(verdict, mlps=(replace(part, offset=0),))
                    for part in parts
                    if _changes(part, decoder, run)
                )
    return {name: verdicts for name, verdicts in found.items() if verdicts}


def _until(decoder: nn.ModuleList, run: Run) -> Run:
    """A forward that ends where the language model's first layer begins."""

    def stop(*_: Any) -> None:
        raise _Reached

    def short() -> object:
        handle = decoder[0].register_forward_pre_hook(stop)
        try:
            with suppress(_Reached), torch.no_grad():
                run()
        finally:
            handle.remove()
        return None

    return short


def _inspect(
    model: Any, layers: Mapping[int, tuple[str, nn.Module]], run: Run
) -> tuple[list[Verdict], dict[int, list[Seen]]]:
    """A verdict of every layer, and what each of them called."""
    if not layers:
        return [], {}
    calls = candidates.watch(layers, run)
    here = {number: own for number, own in calls.items() if own}
    proved: dict[int, list[Candidate]] = {}
    if here:
        proved = proof.prove(here, run, {number: layer for number, (_, layer) in layers.items()})
    dtype = compute_dtype(model)
    verdicts = [
        verdict_of(number, where, layer, proved.get(number, []), dtype, "")
        for number, (where, layer) in layers.items()
    ]
    return verdicts, calls


# --- stacks ----------------------------------------------------------------------------------


def _stacks(model: Any, decoder: str, run: Run) -> list[_Stack]:
    """The lists of layers that run before the language model, the outermost ones, as they run."""
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not _is_around(path, decoder)
    }
    kept: dict[nn.Module, bool] = {}  # whether each layer that ran kept the shape
    crosses: dict[nn.Module, bool] = {}
    given: dict[nn.Module, list[Tensor]] = {}
    hooks = Hooks({})
    layers = {layer: path for path, module in lists.items() for layer in module}

    def begin(layer: nn.Module, args: Any, kwargs: Any) -> None:
        values = (*args, *kwargs.values())
        found = [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]
        others = [x.shape[1] for x in found if x.dim() == found[0].dim() == 3]
        given[layer], crosses[layer] = found, crosses.get(layer, False) or len({*others}) > 1

    def end(layer: nn.Module, _args: Any, _: Any, output: Any) -> None:
        made, read = proof.stream(output), given.get(layer, [])
        is_same = bool(read) and isinstance(made, Tensor) and made.shape == read[0].shape
        kept[layer] = kept.get(layer, True) and is_same

    def look(layer: nn.Module) -> Any:
        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            x = candidates.first(args, kwargs)
            if isinstance(x, Tensor) and any(x is other for other in given.get(layer, [])[1:]):
                crosses[layer] = True

        return note

    for layer in layers:
        hooks.before(layer, begin)
        hooks.after(layer, end)
        for linear in linear_maps(layer).values():
            hooks.before(linear, look(layer))
    hooks.run(run)
    found: dict[str, _Stack] = {}
    for path, module in lists.items():
        is_inside = any(path.startswith(f"{other}.") for other in found)
        if (
            not is_inside
            and any(m in kept for m in module)
            and all(kept.get(m, True) for m in module)
        ):
            found[path] = _Stack(path, module, any(crosses.get(m, False) for m in module))
    order = [layers[layer] for layer in kept]
    return sorted(found.values(), key=lambda stack: order.index(stack.path))


def _is_around(path: str, decoder: str) -> bool:
    """Whether a module is the list of decoder layers, in it, or has it inside."""
    return f"{path}.".startswith(f"{decoder}.") or f"{decoder}.".startswith(f"{path}.")


def _named(
    stack: _Stack, verdicts: Sequence[Verdict], calls: Mapping[int, Sequence[Seen]]
) -> Iterator[tuple[str, list[Verdict]]]:
    """The modules that a stack is, and their verdicts."""
    if not stack.crosses:
        yield "vision", list(verdicts)
        return
    ordered = []
    for verdict in verdicts:
        place = {one.module: i for i, one in enumerate(calls[verdict.layer])}
        mlps = [m for m in verdict.mlps if isinstance(m, MLP)]
        ordered.append(sorted(mlps, key=lambda m: place[m.gate.module]))
    most = max(map(len, ordered))
    if most > 2:
        why = f"{most} MLPs in a layer that reads pictures beside its own tokens"
        yield "qformer_query", [replace(v, mlps=(), reason=why) for v in verdicts]
        return
    for number, name in enumerate(("qformer_query", "qformer_text")[: max(1, most)]):
        yield (
            name,
            [
                replace(v, mlps=tuple(replace(m, offset=0) for m in own[number : number + 1]))
                for v, own in zip(verdicts, ordered, strict=True)
            ],
        )


# --- projectors ------------------------------------------------------------------------------


def _rest(model: nn.Module, taken: set[int], path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest modules with several linear maps that hold nothing of what is `taken`."""
    if id(model) in taken:
        return
    holds = any(id(module) in taken for module in model.modules())
    if not holds and not isinstance(model, nn.ModuleList):
        if len(linear_maps(model)) > 1:
            yield path, model
        return
    for name, child in model.named_children():
        yield from _rest(child, taken, f"{path}.{name}".removeprefix("."))


def _changes(part: MLP, decoder: nn.ModuleList, run: Run) -> bool:
    """Whether the language model's first layer, or at least its output, is another one without it.

    Without what a part writes, that is. Some projectors write into later layers only.
    """

    def silence(_module: Any, _args: Any, _: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    def keep(read: list[Tensor], _module: Any, args: Any, kwargs: Any) -> None:
        values = (*args, *kwargs.values())
        read += [x.clone() for x in values if isinstance(x, Tensor) and x.is_floating_point()]
        raise _Reached

    def seen(*, off: bool, begin: bool) -> list[Tensor]:
        read: list[Tensor] = []
        hooks = Hooks({})
        if begin:
            hooks.before(decoder[0], partial(keep, read))
        if off:
            hooks.after(part.down_map.module, silence)

        def all_of() -> None:
            made = proof.stream(run())
            read.extend([made] if isinstance(made, Tensor) else [])

        with suppress(_Reached):
            hooks.run(all_of)
        return read

    for begin in (True, False):
        with_it, without = seen(off=False, begin=begin), seen(off=True, begin=begin)
        if any(not torch.equal(a, b) for a, b in zip(with_it, without, strict=True)):
            return True
    return False
