"""Which linear maps of a layer are an MLP: seen in a forward, proved by numbers put in their place.

`mlps.py` asks and makes verdicts of the answers. No name of a module is looked at. In a forward of
a few tokens the inputs and outputs of all modules of a layer are kept; whichever maps fit together
as `down(activation(gate) * up)` are candidates. Then other numbers take the place of what gate and
up give, and what comes to `down` decides: by the formula, or at least neuron by neuron.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from relneuron.model.layers import Projection
from relneuron.ops.swiglu_stats.reference import TORCH_ACTIVATIONS

ACTIVATIONS = TORCH_ACTIVATIONS
N_TOKENS = 6  # of each forward
# Of the numbers that are put in: a clamp acts on large ones only.
SIZES = (1.0, 10.0, 100.0)
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
    """

    gate: Projection
    up: Projection | None
    product: Projection
    down: Projection
    act: nn.Module | None = None
    activation: str | None = None

    @property
    def maps(self) -> set[nn.Module]:
        ups = {self.up.module} if self.up else set()
        return {self.gate.module, self.down.module, *ups}


@dataclass
class Got:
    """What came of numbers put in: h, and inputs and outputs of the modules that may be `act`."""

    h: Tensor | None = None
    others: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)


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


class _Hooks:
    """Hooks for one forward; a forward of another thread meanwhile passes them unchanged."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._thread = threading.get_ident()

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


def _flat(x: Any) -> Tensor | None:
    is_tensor = isinstance(x, Tensor) and x.dim() > 1 and x.is_floating_point()
    return x.detach().reshape(-1, x.shape[-1]) if is_tensor else None


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def watch(layers: Mapping[int, tuple[str, nn.Module]], run: Run) -> dict[int, list[Seen]]:
    """What every layer called while `run` ran, in the order of the ends of the calls."""
    seen: dict[int, list[Seen]] = {number: [] for number in layers}
    hooks = _Hooks()

    def note(to: list[Seen], path: str, is_linear: bool, module: nn.Module, *call: Any) -> None:
        args, kwargs, output = call
        given, made = _flat(_first(args, kwargs)), _flat(output)
        if given is not None and made is not None:
            to.append(Seen(path, module, given, made, is_linear))

    for number, (path, layer) in layers.items():
        maps = linear_maps(layer)
        inside = {id(part) for module in maps.values() for part in module.modules()}
        holders = {id(m) for m in layer.modules() if any(n in maps.values() for n in m.modules())}
        for name, module in layer.named_modules():
            is_linear = any(module is one for one in maps.values())
            if is_linear or not (id(module) in inside or id(module) in holders):
                hooks.after(module, partial(note, seen[number], f"{path}.{name}", is_linear))
    hooks.run(run)
    return seen


def candidates(seen: Sequence[Seen]) -> Iterator[Candidate]:
    """Maps whose widths and numbers fit together, those first that fit a formula.

    At least nine in ten of the numbers that another one reads must be act * up, or act, of an
    activation that was called.
    """
    maps = [one for one in seen if one.is_linear]
    others = [one for one in seen if not one.is_linear]
    outputs = {one.module: one.output for one in maps}
    acts = [one for one in others if _is_activation(one)]
    loose = []
    for place in reversed(range(len(maps))):
        down = maps[place]
        for candidate, h in _before(down, maps[:place], others):
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
    """The share of h that is act * up, or act."""
    if act.shape != h.shape:
        return 0.0
    return float(_close(act if up is None else act * up, h).double().mean())


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
    rows = len(down.input)
    near = [one for one in reversed(maps) if len(one.output) == rows]
    single = [one for one in near if one.output.shape[1] == width][:_NEAREST]
    double = [one for one in near if one.output.shape[1] == 2 * width][:_NEAREST]

    def part(site: str, one: Seen, start: int = 0, step: int = 1) -> Projection:
        return Projection(site, one.path, one.module, start, width, step=step)

    for reader in (*reads, down):
        read = Projection("product", reader.path, reader.module, 0, width, of_input=True)
        for one in double:
            for starts, step in (((0, width), 1), ((0, 1), 2)):
                for gate, up in permutations(starts):
                    ups = part("up", one, up, step)
                    yield Candidate(part("gate", one, gate, step), ups, read, out), reader.input
        for one, other in permutations(single, 2):
            yield Candidate(part("gate", one), part("up", other), read, out), reader.input
        for one in single:
            yield Candidate(part("gate", one), None, read, out), reader.input


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
        if is_close(function(gate) if up is None else function(gate) * up, h):
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
    return ours.shape == theirs.shape and bool(_close(ours, theirs).all())


def _close(ours: Tensor, theirs: Tensor) -> Tensor:
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


# --- proved by numbers put in ----------------------------------------------------------------


def put(
    chosen: Mapping[int, Candidate],
    numbers: Numbers,
    others: Mapping[int, Sequence[nn.Module]],
    run: Run,
) -> dict[int, Got]:
    """What comes of other outputs of gate and up: those of `numbers`, (N, width) each.

    All layers at once; what their MLPs write becomes zero, so that no layer changes another one.
    """
    got = {number: Got() for number in chosen}
    hooks = _Hooks()

    def give(parts: Sequence[Projection], _module: Any, _args: Any, _: Any, output: Tensor) -> Any:
        new = output.reshape(-1, output.shape[-1]).clone()
        for part in parts:
            part.of(new).copy_(numbers(len(new), part.width)[part.site == "up"])
        return new.reshape(output.shape)

    def take(to: Got, _module: Any, args: Any, kwargs: Any) -> None:
        to.h = _flat(_first(args, kwargs)) if to.h is None else to.h

    def look(to: Got, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, made = _flat(_first(args, kwargs)), _flat(output)
        if given is not None and made is not None and to.h is None:
            to.others.setdefault(module, (given, made))

    def silence(_module: Any, _args: Any, _: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    for number, candidate in chosen.items():
        parts = [candidate.gate, *([candidate.up] if candidate.up else [])]
        for module in dict.fromkeys(part.module for part in parts):
            own = [part for part in parts if part.module is module]
            hooks.after(module, partial(give, own))
        hooks.before(candidate.product.module, partial(take, got[number]))
        for module in others.get(number, ()):
            hooks.after(module, partial(look, got[number]))
        hooks.after(candidate.down.module, silence)
    hooks.run(run)
    return got


def writes(chosen: Mapping[int, Candidate], layers: Mapping[int, nn.Module], run: Run) -> set[int]:
    """The layers whose `down` writes into the stream, and not into a norm or a router inside.

    Other outputs y of `down`, large ones, move the layer's output by something that is odd in y,
    through norms and factors, too: the mean of the outputs at y and at -y is the same for any y.
    And those of one token move no other token. The layers behind see what they saw before.
    """
    runs: list[dict[int, list[Any]]] = []  # each layer's outputs, if it is called again, too

    def put_in(kind: int, _module: Any, _args: Any, _: Any, output: Tensor) -> Any:
        width = output.shape[-1]
        y, z = _random(2, output.numel() // width, width) * 1e3
        first = torch.arange(len(y), device="cpu")[:, None] == 0
        rows = (y, -y, z, -z, torch.where(first, z, y))[kind]
        return (rows - rows.mean(1, keepdim=True)).to(output).reshape(output.shape)

    def keep(number: int, _module: Any, _args: Any, _: Any, output: Any) -> Any:
        own = runs[-1][number]
        own.append(output)
        return runs[0][number][len(own) - 1]

    for kind in range(5):
        runs.append({number: [] for number in chosen})
        hooks = _Hooks()
        for number, candidate in chosen.items():
            hooks.after(candidate.down.module, partial(put_in, kind))
            hooks.after(layers[number], partial(keep, number))
        hooks.run(run)
    firsts = {number: [run[number][0] for run in runs if run[number]] for number in chosen}
    return {n for n, one in chosen.items() if _are_written(firsts[n], one.down.width)}


def _are_written(outputs: Sequence[Any], width: int) -> bool:
    """Whether a layer's outputs are those of y, -y, z, -z and y but for its first token's z."""
    found = [output[0] if isinstance(output, tuple) else output for output in outputs]
    if not all(isinstance(x, Tensor) and x.shape[-1] == width for x in found):
        return False
    y, minus_y, z, minus_z, mixed = (x.detach().double().flatten(0, -2) for x in found)
    odd, even, other = (y - minus_y) / 2, (y + minus_y) / 2, (z + minus_z) / 2
    near = 0.05 * odd.abs().mean()
    is_local = len(y) > N_TOKENS or (mixed - y)[1:].abs().mean() <= near
    return bool(is_local and (even - other).abs().mean() <= near)


class Numbers:
    """What is put in the place of gate and up (N, width), the same for every layer of a width."""

    def __init__(self, make: Callable[[int, int], tuple[Tensor, Tensor]], like: Tensor) -> None:
        self._make, self._like = make, like
        self._made: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, n_tokens: int, width: int) -> tuple[Tensor, Tensor]:
        if (n_tokens, width) not in self._made:
            gate, up = self._make(n_tokens, width)
            self._made[n_tokens, width] = gate.to(self._like), up.to(self._like)
        return self._made[n_tokens, width]


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, device="cpu")


def of_all_sizes(n_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Normal numbers, the tokens in turn of each size."""
    gate, up = _random(2, n_tokens, width)
    sizes = torch.tensor(SIZES, device="cpu").repeat(n_tokens)[:n_tokens, None]
    return gate * sizes, up * sizes


def _one(n_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """The place of one neuron for each token, spread over all of them."""
    tokens = torch.arange(n_tokens, device="cpu")
    return tokens, tokens * (width - 1) // max(1, n_tokens - 1)


def one_gate(n_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Each token has one gate that is not zero, another one than the others; all of up are 1."""
    gate = torch.zeros(n_tokens, width, device="cpu")
    gate[_one(n_tokens, width)] = 4.0
    return gate, torch.ones(n_tokens, width, device="cpu")


def one_up(n_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Likewise one of up; its gate is the largest of its token."""
    one, _ = one_gate(n_tokens, width)
    return torch.where(one > 0, 10.0, _random(n_tokens, width)), one


def only_there(values: Tensor) -> bool:
    """Whether nothing but the one neuron of each token is different from zero.

    Or from next to nothing: an activation need not be 0 at 0.
    """
    sizes = values.abs().double().cpu()
    there = torch.zeros(values.shape, dtype=torch.bool, device="cpu")
    there[_one(*there.shape)] = True
    return bool(sizes[there].min() > 1e5 * sizes[~there].max())


def keeps_the_formula(candidate: Candidate, got: Got, numbers: Numbers) -> bool:
    """Whether h is activation(gate) * up of the numbers that were put in, of every size."""
    if got.h is None or candidate.activation is None:
        return False
    gate, up = numbers(len(got.h), candidate.gate.width)
    given, act = gate, ACTIVATIONS[candidate.activation](gate)
    if candidate.act is not None:
        given, act = got.others.get(candidate.act, (got.h, act))
    if not torch.equal(given, gate):
        return False
    return is_close(act if candidate.up is None else act * up, got.h)


def keeps_the_place(candidate: Candidate, gates: Got, ups: Got) -> nn.Module | None:
    """The activation's module of a candidate each of whose gates and ups reaches one product.

    `gates` came of `one_gate`, `ups` of `one_up`. The activation is the first module that kept a
    token's one gate apart, and did not pass all numbers as they were.
    """
    if gates.h is None or ups.h is None or not only_there(gates.h):
        return None
    if candidate.up is not None and not only_there(ups.h):
        return None
    for module, (given, made) in gates.others.items():
        if made.shape == given.shape == gates.h.shape and only_there(made):
            other_given, other_made = ups.others.get(module, (given, given))
            if torch.equal(other_given, other_made) or not is_elementwise(module, other_given):
                continue
            # Without up nothing else may come in between.
            if candidate.up is not None or is_close(other_made, ups.h):
                return module
    return None
