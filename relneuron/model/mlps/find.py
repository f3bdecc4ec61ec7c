"""The MLPs of a model, gated or not: found by structure, confirmed by numbers.

The stages and `relneuron doctor` call it; `model/patch.py` acts on the MLPs that it finds. What may
be one in a layer `candidates.py` sees, and `proof.py` proves.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.layers import (
    TRAINING,
    Unfound,
    check_unwrapped,
    compute_dtype,
    decoder_layers,
    device_of,
    features,
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
from relneuron.model.mlps.find_experts import NO_EXPERTS, find_experts
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import Part
from relneuron.model.shards import agree, n_parts, own_inputs, together

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Verdict:
    """The MLPs of a layer, experts first, and why it has none that is supported.

    A layer without any MLP, attention or a state space alone, is `passed` over.
    """

    layer: int
    mlps: tuple[Part, ...]
    reason: str
    passed: bool = False


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
    if len(now) != len(modules) or not verdicts or dtype not in _DTYPES:
        return None
    for (module, forward), (was, own) in zip(now, modules, strict=True):
        if module is not was or forward is not own:
            return None
    for verdict in verdicts:
        for mlp in verdict.mlps:
            if not (isinstance(mlp, MLP) and mlp.is_whole and _is_whole(mlp, dtype)):
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
            run = partial(module, _rows_for(module, dtype))
            seen = candidates.watch({number: (f"{path}.{name}", module)}, run)
            found = proof.prove(seen, run, {number: module})[number]
            if found:
                return found
    return []


def _rows_for(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Random inputs (1, N, D) of a module, of the width of its first linear map."""
    first = next(iter(linear_maps(module).values()))
    shape = (1, candidates.N_TOKENS, features(first)[0])
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1), device="cpu")
    return rows.to(device_of(first), dtype)


# --- verdicts --------------------------------------------------------------------------------


def verdict_of(
    number: int,
    path: str,
    layer: nn.Module,
    chosen: Sequence[Candidate],
    dtype: torch.dtype,
    failed: str,
) -> Verdict:
    """What there is to say of a layer, of which `chosen` was proved; `failed`: why it never ran."""
    parts: list[Part] = []
    experts: dict[str, str] = {}  # what is said of each
    for is_shared in (False, True):
        one, said = find_experts(number, path, layer, shared=is_shared)
        if one is None and said != NO_EXPERTS:
            return Verdict(number, (), said)
        if one is not None:
            parts.append(one)
            experts[one.path] = said
    dtypes = {p.dtype for one in parts for p in one.module.parameters() if p.is_floating_point()}
    dtypes |= {dtype} if chosen else set()
    wrong = dtypes - {*_DTYPES}
    if wrong:
        name = str(wrong.pop()).removeprefix("torch.")
        why = f"{name} weights, the kernels take float32, bfloat16 and float16"
        return Verdict(number, (), why)
    lost = [one.down.path for one in chosen if not one.writes and "expert" in one.down.path]
    if experts and lost:
        return Verdict(number, (), f"{_unwritten(lost[0])} beside its experts")
    try:
        found = [_mlp(number, path, layer, one, dtype) for one in chosen if one.writes]
    except Unfound as error:
        return Verdict(number, (), str(error))
    parts += sorted(found, key=lambda mlp: mlp.path)
    if parts:
        offsets = accumulate((part.n_neurons for part in parts), initial=0)
        mlps = tuple(replace(part, offset=o) for part, o in zip(parts, offsets, strict=False))
        words = [_words(mlp) if isinstance(mlp, MLP) else experts[mlp.path] for mlp in mlps]
        return Verdict(number, mlps, "; ".join(words))
    if failed:
        return Verdict(number, (), f"a forward of tokens fails ({failed}), and so no MLP is found")
    if chosen:
        return Verdict(number, (), _unwritten(chosen[0].down.path))
    odd = _odd_mlp(layer, dtype)
    if odd is not None:
        why = f"{path}.{odd} is not down(activation(gate(x)) * up(x))"
        return Verdict(number, (), f"{why}, and calls no module for its activation")
    maps = ", ".join(linear_maps(layer)) or "none"
    return Verdict(number, (), f"no MLP (linear maps: {maps})", passed=True)


def _unwritten(path: str) -> str:
    return f"what {path} gives is not added to the layer's output, but goes through more of it"


def _mlp(number: int, path: str, layer: nn.Module, one: Candidate, dtype: torch.dtype) -> MLP:
    """The MLP of a candidate that holds, with the smallest module that has all of its maps."""
    maps = [part for part in (one.gate, one.up, one.down) if part is not None]
    paths = [part.path.removeprefix(f"{path}.").split(".") for part in maps]
    steps = zip(*paths, strict=False)
    shared = [step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps)]
    first, whole = own_inputs(one.down.module, one.gate.width)
    mlp = MLP(
        layer=number,
        path=".".join((path, *shared)),
        module=layer.get_submodule(".".join(shared)),
        width=one.gate.width,
        hidden=one.down.width,
        gate=one.gate,
        up=one.up,
        down_map=one.down,
        product=one.product,
        activation=one.activation,
        act=one.act,
        first=first,
        whole=whole if whole > one.gate.width else 0,
    )
    is_whole = bool(shared) and one.activation is not None and _is_whole(mlp, dtype)
    return replace(mlp, is_whole=is_whole)


def _is_whole(mlp: MLP, dtype: torch.dtype) -> bool:
    """Whether a module gives what the formula gives on random rows, in three sizes."""
    with suppress(Exception), torch.no_grad():
        for size in proof.SIZES:
            x = size * _rows_for(mlp.module, dtype)
            ours, theirs = mlp.formula(x), mlp.module(x)
            if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
                return False
            if size > 1 and not bool(theirs.isfinite().all()):
                break  # past what float16 holds
            off = (ours - theirs).abs().max() / theirs.abs().max()
            if not float(off) <= 2 * torch.finfo(theirs.dtype).eps:
                return False
        return True
    return False


def _odd_mlp(layer: nn.Module, dtype: torch.dtype) -> str | None:
    """The name of a module of linear maps that treats each token alone: an MLP of another form."""
    for name, module in layer.named_modules():
        if not name or len(linear_maps(module)) < 2:
            continue
        with suppress(Exception), torch.no_grad():
            x = _rows_for(module, dtype)
            other = x.clone()
            other[:, 0] = -x[:, 0]
            ours, theirs = module(x), module(other)
            if isinstance(ours, Tensor) and torch.equal(ours[:, 1:], theirs[:, 1:]):
                return str(name)
    return None


def _words(mlp: MLP) -> str:
    kind = "" if mlp.is_gated else ", ungated"
    own = "" if mlp.is_whole else ", by its own forward"
    text = "" if mlp.runs else ", not run by text alone"
    name = mlp.activation or type(mlp.act).__name__
    parts = ", a part in each process" if mlp.whole else ""
    return f"{mlp.path}: {name}, F={mlp.n_neurons}, D={mlp.hidden}{parts}{kind}{own}{text}"


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


def supported(verdicts: Sequence[Verdict], module: str = "") -> list[Part]:
    """The parts of all layers, or an error with the reasons of those that are not supported."""
    reasons: dict[str, list[int]] = {}
    for verdict in verdicts:
        if not verdict.mlps and not verdict.passed:
            reasons.setdefault(verdict.reason, []).append(verdict.layer)
    mlps = [mlp for verdict in verdicts for mlp in verdict.mlps]
    if reasons or not mlps:
        n_good = sum(bool(verdict.mlps) for verdict in verdicts)
        for verdict in verdicts if not mlps else ():
            if verdict.passed:
                reasons.setdefault(verdict.reason, []).append(verdict.layer)
        why = "; ".join(f"layers {_ranges(layers)}: {why}" for why, layers in reasons.items())
        raise RelneuronError(
            f"{module and f'{module}: '}{n_good} of {len(verdicts)} layers have a supported MLP; "
            f"{why}",
            "`relneuron doctor MODEL` lists every layer",
        )
    return mlps


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


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


find_gated_mlps = find_mlps  # as it was called while only gated ones were found
