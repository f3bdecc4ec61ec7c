"""MLPs read from values alone, and counted and switched off by plain hooks.

`check.py` holds relneuron to this. Nothing here knows relneuron, nor names of modules: in one
forward the inputs and outputs of every linear map are kept. A map whose input h (T, F) is, number
by number, a smooth function of one output g times another u, h = phi(g) * u, is the `down` of a
gated MLP; where h = phi(g) of one output, with phi no multiple, of an MLP without a gate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Of phi: how steep it may be, and how far values may be off, as a part of the largest.
STEEPEST, ROUNDING = 16.0, 1e-4
LEAST_VALUES = 400  # from which a function is told
SITES = ("gate", "act", "up", "product", "down")

Neuron = tuple[int, str, int]


@dataclass(frozen=True)
class Columns:
    """Columns of a linear map's output: an MLP's gate, say, where gate and up are packed."""

    path: str
    start: int
    stop: int
    step: int = 1

    @property
    def of(self) -> slice:
        return slice(self.start, self.stop, self.step)

    def __str__(self) -> str:
        return f"{self.path}[{self.start}:{self.stop}:{self.step}]"


@dataclass(frozen=True)
class MLP:
    """down(phi(gate) * up), or down(phi(gate)) without an up; F = width, D = hidden."""

    layer: int
    gate: Columns
    up: Columns | None
    down: Columns
    width: int
    hidden: int

    @property
    def paths(self) -> set[str]:
        return {part.path for part in (self.gate, self.up, self.down) if part}


@dataclass
class Call:
    """What one call of a linear map reads and gives, as rows."""

    path: str
    x: Tensor  # (T, in)
    y: Tensor  # (T, out)


@dataclass
class Reading:
    """The MLPs of a model by layer, and what cannot be told."""

    mlps: list[MLP] = field(default_factory=list)
    experts: dict[int, str] = field(default_factory=dict)  # layer -> path of a module of experts
    unclear: dict[int, str] = field(default_factory=dict)


def layer_of(path: str) -> int | None:
    """The first number in a module's path: its layer."""
    found = re.search(r"\.(\d+)(?=\.|$)", path)
    return int(found[1]) if found else None


def linear_maps(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a matrix of their own, without tables of embeddings, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(weight := module._parameters.get("weight"), Tensor)
        and weight.dim() == 2
        and not isinstance(module, nn.Embedding)
    }


def watch(model: nn.Module, run: Callable[[], object]) -> list[Call]:
    """Every call of a linear map in a forward, in order."""
    calls: list[Call] = []

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                x, y = (t.detach().reshape(-1, t.shape[-1]).clone() for t in (inputs[0], output))
                calls.append(Call(path, x, y))

        return hook

    handles = [m.register_forward_hook(keep(path)) for path, m in linear_maps(model).items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


# --- reading ---------------------------------------------------------------------------------


def is_function(x: Tensor, y: Tensor) -> bool:
    """Whether y follows from x: numbers that are neighbours in x are so in y, all of them."""
    x, y = x.flatten().double(), y.flatten().double()
    if len(x) < LEAST_VALUES or not bool(x.isfinite().all() and y.isfinite().all()):
        return False
    order = x.argsort()
    dx, dy = x[order].diff(), y[order].diff().abs()
    return bool((dy <= STEEPEST * dx + ROUNDING * y.abs().max()).all()) and bool(y.std() > 0)


def is_gated(g: Tensor, u: Tensor, h: Tensor) -> bool:
    """Whether h = phi(g) * u, by h / u where u is not small."""
    large = u.abs() > 0.05 * u.square().mean().sqrt()
    return is_function(g[large], (h / u)[large])


def is_ungated(g: Tensor, h: Tensor) -> bool:
    """Whether h = phi(g), and phi is no multiple."""
    if not is_function(g, h):
        return False
    g, h = g.double(), h.double()
    factor = (g * h).sum() / g.square().sum()
    return bool((h - factor * g).abs().max() > 0.01 * h.abs().max())


def parts(call: Call, width: int) -> Iterator[tuple[Columns, Tensor]]:
    """The ways in which `width` columns of an output may be a gate or an up."""
    n = call.y.shape[1]
    if n == width:
        cuts = [slice(0, n, 1)]
    elif n == 2 * width:
        cuts = [slice(0, width, 1), slice(width, n, 1), slice(0, n, 2), slice(1, n, 2)]
    else:
        return
    for cut in cuts:
        yield Columns(call.path, cut.start, cut.stop, cut.step), call.y[:, cut]


def read(model: nn.Module, run: Callable[[], object]) -> Reading:
    """The MLPs of a model, from the values of one forward of it."""
    found = Reading()
    by_layer: dict[tuple[str, int], list[Call]] = {}
    for call in watch(model, run):
        layer = layer_of(call.path)
        if layer is not None:
            prefix = call.path[: call.path.index(f".{layer}")]
            by_layer.setdefault((prefix, layer), []).append(call)
    for (_, layer), calls in by_layer.items():
        names = [call.path for call in calls]
        firsts = [call for i, call in enumerate(calls) if call.path not in names[:i]]
        for call in firsts:
            mlps = list(_read_down(layer, call, firsts))
            if len(mlps) == 1:
                found.mlps.append(mlps[0])
            elif mlps:
                found.unclear[layer] = f"the input of {call.path} is read in {len(mlps)} ways"
    for path, module in model.named_modules():
        layer = layer_of(path)
        own = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        if layer is not None and len(own) > 1:
            found.experts[layer] = path
    return found


def _read_down(layer: int, call: Call, calls: Sequence[Call]) -> Iterator[MLP]:
    """The MLPs that a linear map may be the `down` of."""
    h = call.x
    before = calls[: calls.index(call)]
    sources = [part for one in before if len(one.x) == len(h) for part in parts(one, h.shape[1])]
    down = Columns(call.path, 0, call.y.shape[1])
    for where, g in sources:
        for other, u in sources:
            if where != other and is_gated(g, u, h):
                yield MLP(layer, where, other, down, *call.x.shape[1:], call.y.shape[1])
        if is_ungated(g, h):
            yield MLP(layer, where, None, down, *call.x.shape[1:], call.y.shape[1])


# --- counting --------------------------------------------------------------------------------


def site_values(mlp: MLP, call: Mapping[str, Call]) -> dict[str, Tensor]:
    """(T, F) values at each site but act; act is above 0 where h and up have the same sign."""
    values = {"gate": call[mlp.gate.path].y[:, mlp.gate.of], "product": call[mlp.down.path].x}
    values["down"] = call[mlp.down.path].y
    if mlp.up:
        values["up"] = call[mlp.up.path].y[:, mlp.up.of]
        values["act"] = values["product"].sign() * values["up"].sign()
    else:
        values["act"] = values["product"]
    return values


def count(
    model: nn.Module, mlps: Sequence[MLP], run: Callable[[], object], groups: Tensor, n_groups: int
) -> list[dict[str, Tensor]]:
    """Per MLP and site, (G, F) int64: tokens of each group (T,) whose value is above 0; -1: none.

    A map that is called several times in a forward counts each time.
    """
    calls: dict[str, list[Call]] = {}
    for one in watch(model, run):
        calls.setdefault(one.path, []).append(one)
    counted = []
    member = (groups[None] == torch.arange(n_groups)[:, None]).long()  # (G, T)
    for mlp in mlps:
        sums: dict[str, Tensor] = {}
        for number in range(len(calls[mlp.down.path])):
            here = {path: calls[path][number] for path in mlp.paths}
            for site, values in site_values(mlp, here).items():
                if len(values) != len(groups):
                    raise ValueError(f"{mlp.down.path} reads {len(values)} rows")
                sums[site] = sums.get(site, 0) + member @ (values > 0).long()
        counted.append(sums)
    return counted


# --- switching off ---------------------------------------------------------------------------


@contextmanager
def switched_off(model: nn.Module, mlps: Sequence[MLP], neurons: Iterable[tuple[int, str, int]]) -> Iterator[None]:
    """Outputs at zero: `neurons` are (number of the MLP, gate | up | down, index)."""
    off: dict[str, set[int]] = {}
    for number, site, index in neurons:
        part: Columns = getattr(mlps[number], site)
        off.setdefault(part.path, set()).add(range(part.start, part.stop, part.step)[index])
    modules = dict(model.named_modules())

    def zeroing(columns: list[int]) -> Callable[..., Tensor]:
        def hook(_: nn.Module, inputs: object, output: Tensor) -> Tensor:
            new = output.clone()
            new[..., columns] = 0
            return new

        return hook

    handles = [
        modules[path].register_forward_hook(zeroing(sorted(columns)))
        for path, columns in off.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
