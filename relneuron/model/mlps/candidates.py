"""Which linear maps of a layer may be an MLP: seen in a forward.

`find.py` looks here first, and `proof.py` proves what is found. No name of a module is looked at:
in a forward of a few tokens the inputs and outputs of all modules of a layer are kept, and maps
that fit together as `down(activation(gate) * up)`, or as `down(activation(gate))`, are candidates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from relneuron.model.layers import Projection
from relneuron.ops.swiglu_stats.reference import TORCH_ACTIVATIONS

ACTIVATIONS = TORCH_ACTIVATIONS
N_TOKENS = 6  # of each forward
# Maps of the right width that a `down` is tried with, those called last before it.
_NEAREST = 4

Run = Callable[[], object]


@dataclass(frozen=True)
class Seen:
    """A module that was called in a forward, with its first input and its output (N, .)."""

    path: str
    module: nn.Module
    input: Tensor
    output: Tensor
    is_linear: bool


@dataclass(frozen=True)
class Candidate:
    """Maps that may be an MLP, and where its numbers can be seen.

    product     what reads h: `down`, or a norm before it
    act         the module of the activation; None where the forward calls a function
    activation  the known activation that fits, by name
    width       of what gate reads
    writes      whether `down` writes into the stream, once that was looked at
    """

    gate: Projection
    up: Projection | None
    product: Projection
    down: Projection
    width: int
    act: nn.Module | None = None
    activation: str | None = None
    writes: bool = False

    @property
    def maps(self) -> set[nn.Module]:
        ups = {self.up.module} if self.up else set()
        return {self.gate.module, self.down.module, *ups}


def is_linear_map(module: nn.Module) -> bool:
    """nn.Linear, Conv1D, what quantises or wraps one: by its weight or by its sizes."""
    if isinstance(module, nn.Embedding | nn.Bilinear):
        return False
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    weight = module._parameters.get("weight")
    return all(type(size) is int for size in sizes) or (weight is not None and weight.dim() == 2)


def linear_maps(root: nn.Module) -> dict[str, nn.Module]:
    """The linear maps in a module by their path, the outermost of those inside of each other."""
    found: dict[str, nn.Module] = {}
    if is_linear_map(root):
        return {"": root}
    for name, child in root.named_children():
        for path, module in linear_maps(child).items():
            found[f"{name}.{path}" if path else name] = module
    return found


# --- seen in a forward -----------------------------------------------------------------------


class Hooks:
    """Hooks for one forward; a forward of another thread meanwhile passes them unchanged.

    `running` is the layer that runs, of those that are called as modules: others may share a
    module, as an activation.
    """

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        self._handles: list[Any] = []
        self._thread = threading.get_ident()
        self.running: int | None = None
        for number, layer in layers.items():
            self.before(layer, partial(self._enter, number))
            self.after(layer, partial(self._enter, None))

    def _enter(self, number: int | None, *_: Any) -> None:
        self.running = number

    def _own(self, hook: Callable[..., Any], *call: Any) -> Any:
        return hook(*call) if threading.get_ident() == self._thread else None

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        own = partial(self._own, hook)
        self._handles.append(module.register_forward_pre_hook(own, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        own = partial(self._own, hook)
        self._handles.append(module.register_forward_hook(own, with_kwargs=True))

    def run(self, run: Run) -> None:
        try:
            with torch.no_grad():
                run()
        finally:
            for handle in self._handles:
                handle.remove()


def flat(x: Any) -> Tensor | None:
    is_tensor = isinstance(x, Tensor) and x.dim() > 1 and x.is_floating_point()
    return x.detach().reshape(-1, x.shape[-1]) if is_tensor else None


def first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def watch(layers: Mapping[int, tuple[str, nn.Module]], run: Run) -> dict[int, list[Seen]]:
    """What every layer called while `run` ran, in the order of the ends of their first calls."""
    seen: dict[int, list[Seen]] = {number: [] for number in layers}
    hooks = Hooks({number: layer for number, (_, layer) in layers.items()})

    def note(number: int, path: str, is_linear: bool, module: nn.Module, *call: Any) -> None:
        if hooks.running not in (None, number):
            return
        (args, kwargs, output), to = call, seen[number]
        given, made = flat(first(args, kwargs)), flat(output)
        is_first = all(module is not one.module for one in to)
        if is_first and given is not None and made is not None:
            to.append(Seen(path, module, given, made, is_linear))

    for number, (path, layer) in layers.items():
        maps = linear_maps(layer)
        inside = {id(part) for module in maps.values() for part in module.modules()}
        holders = {id(m) for m in layer.modules() if any(n in maps.values() for n in m.modules())}
        for name, module in layer.named_modules():
            is_linear = any(module is one for one in maps.values())
            if is_linear or not (id(module) in inside or id(module) in holders):
                hooks.after(module, partial(note, number, f"{path}.{name}", is_linear))
    hooks.run(run)
    return seen


def candidates(seen: Sequence[Seen]) -> Iterator[Candidate]:
    """Maps whose widths and numbers fit together, those first that fit a formula.

    At least nine in ten of the numbers that another one reads must be act * up, or act, of an
    activation that was called, but for a factor of each neuron.
    """
    maps = [one for one in seen if one.is_linear]
    others = [one for one in seen if not one.is_linear]
    outputs = {one.module: one.output for one in maps}
    acts = [one for one in others if _is_activation(one)]
    loose = []
    for place in reversed(range(len(maps))):
        down = maps[place]
        for candidate, h in _before(down, maps[:place], others):
            if not h.any():
                continue  # which anything fits
            gate = candidate.gate.of(outputs[candidate.gate.module])
            up = candidate.up.of(outputs[candidate.up.module]) if candidate.up else None
            fitting = None
            if candidate.product.module is down.module:
                fitting = _fit(candidate, gate, up, h, others)
            if fitting is not None:
                yield fitting
            elif any(_share(one.output, up, h) >= 0.9 for one in acts):
                loose.append(candidate)
    yield from loose


def _is_activation(one: Seen) -> bool:
    """Whether a module changed numbers, each alone."""
    is_like = one.input.shape == one.output.shape and not torch.equal(one.input, one.output)
    return is_like and is_elementwise(one.module, one.input)


def _share(act: Tensor, up: Tensor | None, h: Tensor) -> float:
    """The share of h that is act * up, or act, times a number for each neuron."""
    if act.shape != h.shape:
        return 0.0
    product = (act if up is None else act * up).double()
    factor = (h.double() / product).nanmedian(0).values.nan_to_num(1.0)
    off = (factor * product - h.double()).abs()
    return float((off <= 16 * torch.finfo(h.dtype).eps * h.double().abs()).double().mean())


def _before(
    down: Seen, maps: Sequence[Seen], others: Sequence[Seen]
) -> Iterator[tuple[Candidate, Tensor]]:
    """Each way in which maps that were called before give the inputs h of `down`; and h (N, F)."""
    width = down.input.shape[1]
    out = Projection("down", down.path, down.module, 0, down.output.shape[1])
    # A norm between h and down reads h in its place.
    reads = [
        one
        for one in others
        if one.output.shape == down.input.shape
        and one.input.shape == down.input.shape
        and torch.equal(one.output, down.input)
        and not torch.equal(one.input, one.output)
    ]
    near = [one for one in reversed(maps) if len(one.output) == len(down.input)]
    for reader in (*reads, down):
        read = Projection("product", reader.path, reader.module, 0, width, of_input=True)
        for gate, up, n_read in _ways(near, width):
            yield Candidate(gate, up, read, out, n_read), reader.input


def _ways(near: Sequence[Seen], width: int) -> Iterator[tuple[Projection, Projection | None, int]]:
    """Gate, up and how many numbers gate reads: of one map that gives both, of two, or no up."""
    single = [one for one in near if one.output.shape[1] == width][:_NEAREST]
    double = [one for one in near if one.output.shape[1] == 2 * width][:_NEAREST]

    def part(site: str, one: Seen, start: int = 0, step: int = 1) -> Projection:
        return Projection(site, one.path, one.module, start, width, step=step)

    for one in double:
        for starts, step in (((0, width), 1), ((0, 1), 2)):
            for gate, up in permutations(starts):
                ups = part("up", one, up, step)
                yield part("gate", one, gate, step), ups, one.input.shape[1]
    for one, other in permutations(single, 2):
        yield part("gate", one), part("up", other), one.input.shape[1]
    for one in single:
        yield part("gate", one), None, one.input.shape[1]


def _fit(
    candidate: Candidate, gate: Tensor, up: Tensor | None, h: Tensor, others: Sequence[Seen]
) -> Candidate | None:
    """A candidate whose numbers fit activation(gate) * up, with its activation; else None."""
    for one in others:
        if one.input.shape == gate.shape == one.output.shape and torch.equal(one.input, gate):
            name = known_activation(one.module, gate.device)
            if name and is_close(one.output if up is None else one.output * up, h):
                return replace(candidate, act=one.module, activation=name)
    for name, function in ACTIVATIONS.items():
        # The first token tells most of them apart.
        for n in (1, len(h)):
            act = function(gate[:n])
            if not is_close(act if up is None else act * up[:n], h[:n]):
                break
        else:
            return replace(candidate, activation=name)
    return None


def known_activation(module: Callable[[Tensor], Any], device: torch.device) -> str | None:
    """The name of an activation, found by comparing values in float32."""
    x = torch.linspace(-6, 6, 97, device=device)
    try:
        value = module(x)
    except Exception:
        return None
    if not isinstance(value, Tensor) or value.shape != x.shape:
        return None
    for name, function in ACTIVATIONS.items():
        if torch.allclose(value.float(), function(x), rtol=0, atol=1e-6):
            return name
    return None


def is_close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether all numbers are the same but for their last bits; a zero is only like a zero."""
    return ours.shape == theirs.shape and bool(close(ours, theirs).all())


def close(ours: Tensor, theirs: Tensor) -> Tensor:
    both = ~(ours.isfinite() | theirs.isfinite())  # past the range of a dtype of 16 bits
    off = (ours.double() - theirs.double()).abs()
    eps = torch.finfo(theirs.dtype).eps
    return both | (off <= 4 * eps * theirs.double().abs())


def is_elementwise(module: nn.Module, x: Tensor) -> bool:
    """Whether a module treats each number alone, as an activation does and a norm does not."""
    other = x.clone()
    other[:, ::2] += 1
    try:
        with torch.no_grad():
            return torch.equal(module(x)[:, 1::2], module(other)[:, 1::2])
    except Exception:  # one that takes more than a tensor
        return False
