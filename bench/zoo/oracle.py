"""MLPs read from values alone, and counted and switched off by plain hooks.

`check.py` holds relneuron to this. Nothing here knows relneuron, nor names of modules: in one
forward the inputs and outputs of every linear map are kept. A map whose input h (T, F) is, number
by number, a smooth function of one output g times another u, h = phi(g) * u, is the `down` of a
gated MLP; where h = phi(g) of one output, with phi no multiple, of an MLP without a gate.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.zoo.experts import Experts, read_experts

# Of phi, of numbers whose standard deviation is 1: how steep it may be, and how far values may be
# off, as a part of the largest.
STEEPEST, ROUNDING = 16.0, 1e-4
LEAST_VALUES = 400  # from which a function is told
SENT = "sent"  # the tokens that each expert gets, beside what is counted at the sites

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
    product: str  # path of what reads h: down, or a norm before it
    width: int
    hidden: int

    @property
    def paths(self) -> set[str]:
        return {self.product, *(part.path for part in (self.gate, self.up, self.down) if part)}


@dataclass
class Call:
    """What one call of a linear map reads and gives, as rows."""

    path: str
    x: Tensor  # (T, in)
    y: Tensor  # (T, out)
    is_map: bool


@dataclass
class Reading:
    """The MLPs of a model by layer, and what cannot be told."""

    mlps: list[MLP] = field(default_factory=list)
    experts: list[Experts] = field(default_factory=list)
    unclear: dict[str, str] = field(default_factory=dict)  # path of a module -> why


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
    """Every call of a linear map, and of a module without others in it, in a forward, in order."""
    calls: list[Call] = []
    maps = linear_maps(model)
    leaves = {p: m for p, m in model.named_modules() if p not in maps and not any(m.children())}

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and all(isinstance(t, Tensor) and t.dim() for t in (inputs[0], output)):
                x, y = (t.detach().reshape(-1, t.shape[-1]).clone() for t in (inputs[0], output))
                calls.append(Call(path, x, y, path in maps))

        return hook

    handles = [m.register_forward_hook(keep(path)) for path, m in (maps | leaves).items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


# --- reading ---------------------------------------------------------------------------------


def is_function(x: Tensor, y: Tensor, by_row: bool = False) -> bool:
    """Whether y follows from x: numbers that are neighbours in x are so in y, all of them.

    `by_row`: in each row (T, F) apart, as where a token's largest numbers decide what is cut off.
    """
    x, y = x.double(), y.double()
    if not by_row:
        x, y = x.flatten(), y.flatten()
    if x.numel() < LEAST_VALUES or not bool(x.isfinite().all() and y.isfinite().all()):
        return False
    if not bool((y.std(-1) > 1e-3 * y.abs().mean(-1)).all()):
        return False  # the same for all x
    x, y = x / x.std(), y / y.std()
    order = x.argsort(-1)
    dx, dy = x.gather(-1, order).diff(), y.gather(-1, order).diff().abs()
    return bool((dy <= STEEPEST * dx + ROUNDING * y.abs().max()).all())


def is_gated(g: Tensor, u: Tensor, h: Tensor) -> bool:
    """Whether h = phi(g) * u, by h / u where u is not small; or phi of each token's own."""
    large = u.abs() > 0.05 * u.square().mean().sqrt()
    return is_function(g[large], (h / u)[large]) or is_function(g, h / u, by_row=True)


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
    held, handles = _watch_experts(model)
    try:
        calls = watch(model, run)
    finally:
        for handle in handles:
            handle.remove()
    by_layer: dict[tuple[str, int], list[Call]] = {}
    for call in calls:
        layer = layer_of(call.path)
        if layer is not None:
            prefix = call.path[: call.path.index(f".{layer}")]
            by_layer.setdefault((prefix, layer), []).append(call)
    for (_, layer), here in by_layer.items():
        names = [call.path for call in here]
        firsts = [call for i, call in enumerate(here) if call.path not in names[:i]]
        for call in firsts:
            mlps = list(_read_down(layer, call, firsts)) if call.is_map else []
            if len(mlps) == 1:
                found.mlps.append(mlps[0])
            elif mlps:
                found.unclear[call.path] = f"the input of {call.path} is read in {len(mlps)} ways"
    for path, module in model.named_modules():
        layer = layer_of(path)
        if layer is None or path not in held:
            continue
        with torch.no_grad():
            experts = read_experts(layer, path, module, *held[path])
        if experts is None:
            found.unclear[path] = f"the experts {path} are not read"
        else:
            found.experts.append(experts)
    return found


def _watch_experts(model: nn.Module) -> tuple[dict[str, Any], list[Any]]:
    """Arguments and output of the first call of each module with weights of several experts."""
    held: dict[str, Any] = {}
    handles = []

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            given = bound(module, inputs, named)
            if path not in held and isinstance(output, Tensor):
                held[path] = (tuple(t.detach().clone() for t in given), output.detach().clone())

        return hook

    for path, module in model.named_modules():
        down = module._parameters.get("down_proj")
        flat = hasattr(getattr(module, "mlp", None), "w1")
        if isinstance(down, Tensor) and down.dim() == 3 or flat:
            handles.append(module.register_forward_hook(keep(path), with_kwargs=True))
    return held, handles


def bound(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call in order."""
    if not named:
        return inputs
    return inspect.signature(type(module).forward).bind(module, *inputs, **named).args[1:]


def _read_down(layer: int, call: Call, calls: Sequence[Call]) -> Iterator[MLP]:
    """The MLPs that a linear map may be the `down` of."""
    before = calls[: calls.index(call)]
    # What a norm in front of the map reads may be h, too.
    readers = [one for one in before if not one.is_map and torch.equal(one.y, call.x)]
    down = Columns(call.path, 0, call.y.shape[1])
    for reader in (call, *readers):
        h = reader.x
        if h.shape != call.x.shape:
            continue
        maps = [one for one in before if one.is_map and len(one.x) == len(h)]
        sources = [part for one in maps for part in parts(one, h.shape[1])]
        found = []
        for where, g in sources:
            for other, u in sources:
                if where != other and is_gated(g, u, h):
                    found.append((where, other))
            if is_ungated(g, h):
                found.append((where, None))
        for gate, up in found:
            yield MLP(layer, gate, up, down, reader.path, h.shape[1], call.y.shape[1])
        if found:
            return


# --- counting --------------------------------------------------------------------------------


def site_values(mlp: MLP, call: Mapping[str, Call]) -> dict[str, Tensor]:
    """(T, F) values at each site; act is above 0 where h and up have the same sign."""
    values = {"gate": call[mlp.gate.path].y[:, mlp.gate.of]}
    h = call[mlp.product].x
    if mlp.up is None:
        return values | {"act": h}
    up = call[mlp.up.path].y[:, mlp.up.of]
    return values | {"up": up, "product": h, "act": h.sign() * up.sign()}


def count(
    model: nn.Module,
    parts: Sequence[MLP | Experts],
    run: Callable[[], object],
    groups: Tensor,
    n_groups: int,
) -> list[dict[str, Tensor]]:
    """Per part and site, (G, F) int64: tokens of each group (T,) whose value is above 0; -1: none.

    Of experts (G, E * F): the tokens that an expert gets, which are SENT (G, E), too. What is
    called several times in a forward counts each time.
    """
    member = (groups[None] == torch.arange(n_groups)[:, None]).long()  # (G, T)
    counted: list[dict[str, Tensor]] = [{} for _ in parts]

    def add(number: int, site: str, inside: slice, of: Tensor, values: Tensor) -> None:
        n = parts[number].width
        table = counted[number].setdefault(site, torch.zeros(n_groups, n, dtype=torch.int64))
        table[:, inside] += of @ (values > 0).long()

    def hook(number: int, experts: Experts) -> Callable[..., None]:
        def seen(expert: int, tokens: Tensor, first: Tensor, h: Tensor) -> None:
            n = experts.expert_width
            inside = slice(expert * n, (expert + 1) * n)
            for site, values in experts.site_values(first, h).items():
                add(number, site, inside, member[:, tokens], values)
            sent = counted[number].setdefault(
                SENT, torch.zeros(n_groups, experts.n_experts, dtype=torch.int64)
            )
            sent[:, expert] += member[:, tokens].sum(1)

        def look(module: nn.Module, inputs: Any, named: Any, output: Tensor) -> None:
            experts.recompute(bound(module, inputs, named), {}, seen)

        return look

    handles = [
        part.module.register_forward_hook(hook(number, part), with_kwargs=True)
        for number, part in enumerate(parts)
        if isinstance(part, Experts)
    ]
    calls: dict[str, list[Call]] = {}
    try:
        for one in watch(model, run):
            calls.setdefault(one.path, []).append(one)
    finally:
        for handle in handles:
            handle.remove()
    for number, part in enumerate(parts):
        for turn in range(len(calls[part.down.path])) if isinstance(part, MLP) else ():
            here = {path: calls[path][turn] for path in part.paths}
            for site, values in site_values(part, here).items():
                if len(values) != len(groups):
                    raise ValueError(f"{part.down.path} reads {len(values)} of {len(groups)} rows")
                add(number, site, slice(None), member, values)
    return counted


# --- switching off ---------------------------------------------------------------------------


@contextmanager
def switched_off(
    model: nn.Module, parts: Sequence[MLP | Experts], neurons: Iterable[tuple[int, str, int]]
) -> Iterator[None]:
    """Outputs at zero: `neurons` are (number of the part, gate | up | down, index)."""
    modules = dict(model.named_modules())
    off: dict[str, set[int]] = {}
    routed: dict[int, dict[str, list[int]]] = {}
    for number, site, index in neurons:
        part = parts[number]
        if isinstance(part, Experts):
            routed.setdefault(number, {}).setdefault(site, []).append(index)
        else:
            where: Columns = getattr(part, site)
            off.setdefault(where.path, set()).add(range(where.start, where.stop, where.step)[index])

    def zeroing(columns: list[int]) -> Callable[..., Tensor]:
        def hook(_: nn.Module, inputs: object, output: Tensor) -> Tensor:
            new = output.clone()
            new[..., columns] = 0
            return new

        return hook

    def recomputing(path: str, experts: Experts, sites: Mapping[str, list[int]]) -> Any:
        zeroed = {site: torch.tensor(indices) for site, indices in sites.items()}

        def hook(module: nn.Module, inputs: Any, named: Any, output: Tensor) -> Tensor:
            given = bound(module, inputs, named)
            return experts.of(module).recompute(given, zeroed).view(output.shape)

        return modules[path].register_forward_hook(hook, with_kwargs=True)

    handles = [
        modules[path].register_forward_hook(zeroing(sorted(columns)))
        for path, columns in off.items()
    ]
    for number, sites in routed.items():
        experts = parts[number]
        handles.append(recomputing(experts.path, experts, sites))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
