"""The gated MLPs of a model: found by structure, confirmed by numbers.

The stages and `relneuron doctor` call it; `model/patch.py` acts on the gated MLPs that it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relneuron.artifact.files import RelneuronError
from relneuron.model.layers import (
    TRAINING,
    Projection,
    Unfound,
    check_unwrapped,
    compute_dtype,
    decoder_layers,
    device_of,
    features,
    find_projections,
    first_line,
    is_float,
    is_training,
    settle,
    uncallable,
    without_hooks,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
# Of the self-check's row: a clamp acts on large numbers only.
_SIZES = (1.0, 10.0, 100.0)
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True)
class GatedMLP:
    """One layer's `down(activation(gate(x)) * up(x))`: its module and how to compute the parts."""

    layer: int
    path: str
    module: nn.Module
    activation: str
    width: int  # F
    hidden: int  # D
    packed: bool  # gate_up_proj gives gate and up side by side
    projections: tuple[Projection, ...] = ()  # of the layer's attention, where they were asked for

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """gate and up (T, F) of x (..., D); halves of one tensor where the weights are packed."""
        if self.packed:
            both = cast(Tensor, cast(Any, self.module).gate_up_proj(x)).reshape(-1, 2 * self.width)
            return both[:, : self.width], both[:, self.width :]
        module = cast(Any, self.module)
        return (
            module.gate_proj(x).reshape(-1, self.width),
            module.up_proj(x).reshape(-1, self.width),
        )

    def own_activation(self) -> Callable[[Tensor], Tensor]:
        """The module's own activation, as its own forward calls it."""
        names = (name for name in _ACTIVATION_NAMES if callable(getattr(self.module, name, None)))
        return cast(Callable[[Tensor], Tensor], getattr(self.module, next(names)))

    def uncalled(self) -> list[tuple[str, nn.Module]]:
        """The modules inside that neither the projections nor the activation are made of."""
        own = cast(Any, self.module)
        names = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
        roots = [self.own_activation(), *(getattr(own, name, None) for name in names)]
        called = {id(m) for root in roots if isinstance(root, nn.Module) for m in root.modules()}
        return [
            (name, m) for name, m in own.named_modules() if m is not own and id(m) not in called
        ]

    def down(self, h: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.module).down_proj(h))

    def formula(self, x: Tensor) -> Tensor:
        """The MLP's output by the formula, in torch: what the self-check compares with."""
        gate, up = self.project(x)
        h = ACTIVATIONS[self.activation](gate) * up
        return self.down(h.reshape(*x.shape[:-1], self.width))


@dataclass(frozen=True)
class Verdict:
    """Whether a layer's MLP is supported, and why not."""

    layer: int
    mlp: GatedMLP | None
    reason: str


def inspect_layers(model: Any) -> list[Verdict]:
    """A verdict for every decoder layer, by structure and by a numeric self-check.

    The decoder layers are the `ModuleList` as long as `config.num_hidden_layers`. In each, a
    gated MLP is a module with `gate_proj`, `up_proj` and `down_proj`, or `gate_up_proj` and
    `down_proj`, and an activation; on a random row, in three sizes, it must give what the formula
    gives.
    """
    check_unwrapped(model)
    path, layers = _decoder_layers(model)
    settle(model)
    dtype = compute_dtype(model)
    return [_inspect_layer(i, f"{path}.{i}", layer, dtype) for i, layer in enumerate(layers)]


def _decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    try:
        return decoder_layers(model)
    except Unfound as error:
        raise RelneuronError(
            f"{type(model).__name__} has {error}",
            "relneuron needs a decoder-only model with config.num_hidden_layers layers",
        ) from None


def _inspect_layer(number: int, path: str, layer: nn.Module, dtype: torch.dtype) -> Verdict:
    names = {name: module for name, module in layer.named_modules()}
    found = [
        name
        for name, module in names.items()
        if hasattr(module, "down_proj")
        and (hasattr(module, "gate_up_proj") or hasattr(module, "gate_proj"))
    ]
    compiled = [name for name in found if f"{name}._orig_mod" in found]
    if compiled:
        why = f"{compiled[0]} is compiled by itself: compile the whole model, or no part of it"
        return Verdict(number, None, why)
    if len(found) != 1:
        if any("expert" in name for name in names):
            return Verdict(number, None, "mixture of experts, not one gated MLP")
        if found:
            return Verdict(number, None, f"{len(found)} gated MLPs ({', '.join(found)}), not one")
        maps = [
            name
            for name, m in names.items()
            if getattr(m, "weight", torch.ones(1, device="cpu")).dim() == 2
        ]
        return Verdict(number, None, f"no gated MLP (linear maps: {', '.join(maps) or 'none'})")
    module = names[found[0]]
    patched = getattr(module.__dict__.get("forward"), "mlp", None)
    if isinstance(patched, GatedMLP):
        return Verdict(number, patched, "patched already, checked before that")
    try:
        with without_hooks(module):
            return _inspect_mlp(number, f"{path}.{found[0]}", module, dtype)
    except Exception as error:
        return Verdict(number, None, f"its MLP cannot be run alone: {first_line(error)}")


def _inspect_mlp(number: int, path: str, module: nn.Module, dtype: torch.dtype) -> Verdict:
    packed = hasattr(module, "gate_up_proj")
    needed = ("gate_up_proj", "down_proj") if packed else ("gate_proj", "up_proj", "down_proj")
    parts = [getattr(module, name, None) for name in needed]
    if any(
        isinstance(part, nn.Parameter) and part.dim() == 3 or isinstance(part, nn.ModuleList)
        for part in parts
    ):
        return Verdict(number, None, "mixture of experts, not one gated MLP")
    linears = [part for part in parts if isinstance(part, nn.Module)]
    weights = [getattr(part, "weight", None) for part in linears]
    try:
        hidden = [features(part)[1] for part in linears][len(needed) - 1]
    except (IndexError, Unfound):
        return Verdict(number, None, f"{', '.join(needed)} are not all linear maps")
    why = uncallable(module)
    if why is not None:
        return Verdict(number, None, f"its weights are {why}")
    # A quantised weight takes what the model computes in.
    dtypes = [w.dtype for w in weights if isinstance(w, Tensor) and is_float(w)] or [dtype]
    if torch.float64 in dtypes:
        return Verdict(
            number, None, "float64 weights, the kernels take float32, bfloat16 and float16"
        )
    if is_training(module):
        return Verdict(number, None, f"in {TRAINING}")
    # Shapes are read from outputs, so wrapped linear maps (LoRA, say) need no special case.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        row = torch.randn(1, 1, hidden, generator=generator, device="cpu")
        x = row.to(device_of(module), dtypes[0])
        width = int(cast(Any, linears[0])(x).shape[-1]) // (2 if packed else 1)
        activation = _activation(module, x)
        if activation is None:
            return Verdict(number, None, f"its activation is none of {', '.join(ACTIVATIONS)}")
        mlp = GatedMLP(number, path, module, activation, width, hidden, packed)
        for size in _SIZES:
            ours, theirs = mlp.formula(size * x), module(size * x)
            if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
                return Verdict(number, None, "its MLP does not return one tensor like its input")
            if size > 1 and not bool(theirs.isfinite().all()):
                break  # past what float16 holds
            tolerance = 16 * torch.finfo(x.dtype).eps * float(theirs.abs().max())
            if not bool((ours - theirs).abs().max() <= tolerance):
                return Verdict(number, None, "its MLP is not down(activation(gate(x)) * up(x))")
    return Verdict(number, mlp, f"{path}: {activation}, F={width}, D={hidden}")


def _activation(module: nn.Module, like: Tensor) -> str | None:
    """The name of a module's activation, found by comparing values."""
    x = torch.linspace(-6, 6, 97, device=like.device)
    for name in _ACTIVATION_NAMES:
        function = getattr(module, name, None)
        if not callable(function):
            continue
        value = function(x)
        for known, formula in ACTIVATIONS.items():
            if isinstance(value, Tensor) and torch.allclose(value, formula(x), rtol=0, atol=1e-6):
                return known
    return None


def find_gated_mlps(model: Any, *, attention: bool = False) -> list[GatedMLP]:
    """The gated MLP of every layer, or an error with the reasons of the layers without one.

    With `attention` each comes with the projections of its layer's attention.
    """
    verdicts = inspect_layers(model)
    reasons: dict[str, list[int]] = {}
    for verdict in verdicts:
        if verdict.mlp is None:
            reasons.setdefault(verdict.reason, []).append(verdict.layer)
    if reasons:
        n_good = sum(verdict.mlp is not None for verdict in verdicts)
        why = "; ".join(f"layers {_ranges(layers)}: {why}" for why, layers in reasons.items())
        raise RelneuronError(
            f"{n_good} of {len(verdicts)} layers have a supported gated MLP; {why}",
            "give a dense model with gated MLPs; `relneuron doctor MODEL` lists every layer",
        )
    mlps = [verdict.mlp for verdict in verdicts if verdict.mlp is not None]
    if attention:
        path, layers = _decoder_layers(model)
        mlps = [
            replace(mlp, projections=find_projections(f"{path}.{mlp.layer}", layers[mlp.layer]))
            for mlp in mlps
        ]
    check_same_shape(mlps)
    return mlps


def check_same_shape(mlps: Sequence[GatedMLP]) -> None:
    """Raise RelneuronError unless every layer has as many neurons of each site as the others."""
    shapes = {
        (mlp.width, mlp.hidden, mlp.activation, *(part.width for part in mlp.projections))
        for mlp in mlps
    }
    if len(shapes) > 1:
        raise RelneuronError(
            f"the layers differ in width, hidden size, activation or attention: {sorted(shapes)}",
            "relneuron needs the same shape in every layer",
        )


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def model_shape(mlps: Sequence[GatedMLP]) -> dict[str, int]:
    """layers, width (F) and hidden (D); q, k, v and o where they were asked for."""
    shape = {"layers": len(mlps), "width": mlps[0].width, "hidden": mlps[0].hidden}
    return shape | {part.site: part.width for part in mlps[0].projections}
