"""The verdict on one layer: what is made of the MLPs that were proved in it, or why it has none.

`find.py` asks for each decoder layer, `modules.py` for those of a vision tower and its like.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.layers import (
    Unfound,
    device_of,
    features,
)
from relneuron.model.mlps import candidates, proof
from relneuron.model.mlps.candidates import Candidate, linear_maps
from relneuron.model.mlps.find_experts import NO_EXPERTS, find_experts
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import Part
from relneuron.model.shards import own_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Verdict:
    """The MLPs of a layer, experts first, and why it has none that is supported.

    A layer without any MLP, attention or a state space alone, is `passed` over.
    """

    layer: int
    mlps: tuple[Part, ...]
    reason: str
    passed: bool = False


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
    wrong = dtypes - {*DTYPES}
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
    fits = bool(shared) and one.activation is not None and is_whole(mlp, dtype)
    return replace(mlp, is_whole=fits)


def is_whole(mlp: MLP, dtype: torch.dtype) -> bool:
    """Whether a module gives what the formula gives on random rows, in three sizes."""
    with suppress(Exception), torch.no_grad():
        for size in proof.SIZES:
            x = size * rows_for(mlp.module, dtype)
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
            x = rows_for(module, dtype)
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


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def rows_for(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Random inputs (1, N, D) of a module, of the width of its first linear map."""
    first = next(iter(linear_maps(module).values()))
    shape = (1, candidates.N_TOKENS, features(first)[0])
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1), device="cpu")
    return rows.to(device_of(first), dtype)
