"""The MLPs of a model, gated or not: found by structure, confirmed by numbers.

The stages and `relneuron doctor` call it; `model/patch.py` acts on the MLPs that it finds. What may
be one in a layer `candidates.py` sees, `proof.py` proves, and `verdict.py` tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.layers import (
    TRAINING,
    Unfound,
    check_unwrapped,
    compute_dtype,
    decoder_layers,
    find_projections,
    first_line,
    is_training,
    settle,
    text_run,
    uncallable,
    without_hooks,
)
from relneuron.model.mlps import candidates, proof
from relneuron.model.mlps.candidates import Candidate, Run, linear_maps
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import Part
from relneuron.model.mlps.verdict import DTYPES, Verdict, is_whole, rows_for, supported, verdict_of
from relneuron.model.shards import agree, n_parts, together


def inspect_layers(model: Any, with_picture: Run | None = None) -> list[Verdict]:
    """A verdict for every decoder layer, by structure and by a numeric self-check.

    The decoder layers are the `ModuleList` as long as `config.num_hidden_layers`. In each, an MLP
    is a linear map `down` whose input is activation(gate) * up, or activation(gate), of the outputs
    of other linear maps, whatever their names: separate, packed side by side in either order, or
    interleaved. It must be so for other numbers, too, of three sizes, that are put in the place of
    gate's and up's outputs. Where it is not, because something is scaled, cut off, normalised or
    made sparse on the way, each gate and each up must reach just one input of `down`, and the
    activation must be a module of its own.

    Of a model that several processes hold in parts all must call it: each looks at its own part.
    """
    check_unwrapped(model)
    path, layers = _decoder_layers(model)
    settle(model)
    dtype, failed = compute_dtype(model), ""
    run = together(model, text_run(model, candidates.N_TOKENS))
    verdicts: dict[int, Verdict] = {}
    left: dict[int, tuple[str, nn.Module]] = {}
    with without_hooks(model):
        for number, layer in enumerate(layers):
            verdict = _known(number, layer)
            if verdict is not None:
                verdicts[number] = verdict
            else:
                left[number] = (f"{path}.{number}", layer)
        known = _still_right(model, dtype) if len(left) == len(layers) else None
        known = None if with_picture is not None else known
        if known is not None:
            return known
        try:
            seen = candidates.watch(left, run) if left else {}
        except Exception as error:
            seen, failed = {}, first_line(error)
        here = {number: calls for number, calls in seen.items() if calls}
        found = proof.prove(here, run, {number: layer for number, (_, layer) in left.items()})
        if with_picture is not None and len(here) < len(left):
            rest = {number: place for number, place in left.items() if number not in here}
            seen = candidates.watch(rest, with_picture)
            there = {number: calls for number, calls in seen.items() if calls}
            layers_there = {number: layer for number, (_, layer) in rest.items()}
            found |= proof.prove(there, with_picture, layers_there)
            here, failed = here | there, ""
        # What is done with it are forwards of parts of the model, which all must run, too.
        agree(model, [(one.down.path, one.writes) for some in found.values() for one in some])
        for number, (where, layer) in left.items():
            runs = number in here or bool(failed)
            chosen = found[number] if number in here else _alone(number, where, layer, dtype)
            verdict = verdict_of(number, where, layer, chosen, dtype, failed)
            parts = (replace(mlp, n_layers=len(layers), runs=runs) for mlp in verdict.mlps)
            verdicts[number] = replace(verdict, mlps=tuple(parts))
    result = [verdicts[number] for number in range(len(layers))]
    agree(model, [(one.layer, one.reason, one.passed) for one in result])
    if with_picture is None:
        _FOUND[model] = (_modules(model), result)
    return result


# What was found in a model, and the modules that it was found with.
_FOUND: WeakKeyDictionary[Any, tuple[list[Any], list[Verdict]]] = WeakKeyDictionary()


def _modules(model: Any) -> list[Any]:
    """A model's modules but itself, and the forwards that instances of them have."""
    return [(m, m.__dict__.get("forward")) for m in model.modules() if m is not model]


def _still_right(model: Any, dtype: torch.dtype) -> list[Verdict] | None:
    """What was found before, where its modules are all there and each MLP gives its formula."""
    modules, verdicts = _FOUND.get(model, ([], []))
    now = _modules(model)
    if len(now) != len(modules) or not verdicts or dtype not in DTYPES:
        return None
    for (module, forward), (was, own) in zip(now, modules, strict=True):
        if module is not was or forward is not own:
            return None
    for verdict in verdicts:
        for mlp in verdict.mlps:
            if not (isinstance(mlp, MLP) and mlp.is_whole and is_whole(mlp, dtype)):
                return None
    return verdicts if all(verdict.mlps for verdict in verdicts) else None


def _decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    try:
        return decoder_layers(model)
    except Unfound as error:
        raise RelneuronError(
            f"{type(model).__name__} has {error}",
            "relneuron needs a decoder-only model with config.num_hidden_layers layers",
        ) from None


def _known(number: int, layer: nn.Module) -> Verdict | None:
    """The verdict of a layer that need not be looked at, or cannot be."""
    patched = [m.__dict__.get("forward") for m in layer.modules()]
    parts = [getattr(p, name, None) for p in patched for name in ("mlp", "experts")]
    found = {part.offset: part for part in parts if isinstance(part, MLP | Experts)}
    if found:
        mlps = tuple(found[offset] for offset in sorted(found))
        return Verdict(number, mlps, "patched already, checked before that")
    compiled = [name for name, m in layer.named_modules() if hasattr(m, "_orig_mod")]
    if compiled:
        why = f"{compiled[0]} is compiled by itself: compile the whole model, or no part of it"
        return Verdict(number, (), why)
    if is_training(layer):
        return Verdict(number, (), f"in {TRAINING}")
    missing = uncallable(layer)
    return Verdict(number, (), f"its weights are {missing}") if missing else None


def _alone(number: int, path: str, layer: nn.Module, dtype: torch.dtype) -> list[Candidate]:
    """The MLPs of a layer that no forward of text calls: its modules are called one by one."""
    for name, module in reversed(list(layer.named_modules())):
        if len(linear_maps(module)) < 2 or not name:
            continue
        with suppress(Exception):  # a module may need other inputs: attention does
            run = partial(module, rows_for(module, dtype))
            seen = candidates.watch({number: (f"{path}.{name}", module)}, run)
            found = proof.prove(seen, run, {number: module})[number]
            if found:
                return found
    return []


def find_mlps(
    model: Any,
    *,
    attention: bool = False,
    modules: Sequence[str] = ("language",),
    run: Run | None = None,
) -> list[Part]:
    """The MLPs of every layer, or an error with the reasons of the layers that are not supported.

    In the order of the layers; one without any MLP is passed over. A layer may have several: routed
    experts (`experts.py`) come before the others, and the neurons of each begin
    behind those before it, at its `offset`. With `attention` the first of each layer comes with the
    projections of its attention.

    `modules`: of a model that reads pictures also those of its "vision" tower, its "projector" and
    its "qformer", or "all" that it has (`artifact/modules.py`); then `run` is a forward with a
    picture (`model.pictures.picture_run`). Their layers are numbered through.
    """
    if not modules:
        raise RelneuronError("no module is asked for", "ask for language", 2)
    if tuple(modules) == ("language",):
        mlps = supported(inspect_layers(model, run))
        return _with_attention(model, mlps) if attention else mlps
    if attention:
        raise RelneuronError(
            "the attention of a vision tower, a projector or a Q-Former is not read",
            "leave out --attention, or the modules",
            2,
        )
    if run is None:
        raise RelneuronError(
            f"the modules {', '.join(modules)} need a forward with a picture",
            "give a model whose folder has its processor (processor.save_pretrained)",
        )
    from relneuron.model.mlps.modules import find_in_modules  # made of this file

    return find_in_modules(model, modules, run)


def _with_attention(model: Any, mlps: list[Part]) -> list[Part]:
    """The parts, the first of each layer with the projections of its attention."""
    if n_parts(model) > 1:
        raise RelneuronError(
            "the attention's neurons of a model that is held in parts cannot be looked at",
            "load it without tensor parallelism",
        )
    path, layers = _decoder_layers(model)
    firsts = {mlp.layer: mlp for mlp in reversed(mlps)}
    return [
        replace(mlp, projections=find_projections(f"{path}.{mlp.layer}", layers[mlp.layer]))
        if mlp is firsts[mlp.layer]
        else mlp
        for mlp in mlps
    ]


find_gated_mlps = find_mlps  # as it was called while only gated ones were found
