"""Whether maps that fit together are an MLP: proved by numbers put in their place.

`find.py` asks with the candidates of `candidates.py`. In a forward other numbers take the place of
what gate and up give, and what comes to `down` decides: by the formula, or at least neuron by
neuron. Others take the place of what `down` gives, to see that it writes into the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from relneuron.model.layers import Projection
from relneuron.model.mlps.candidates import (
    ACTIVATIONS,
    N_TOKENS,
    Candidate,
    Hooks,
    Run,
    Seen,
    candidates,
    first,
    flat,
    is_close,
    is_elementwise,
)

# Of the numbers that are put in: a clamp acts on large ones only.
SIZES = (1.0, 10.0, 100.0)


@dataclass
class Got:
    """What came of numbers put in: h, and inputs and outputs of the modules that may be `act`."""

    h: Tensor | None = None
    others: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)


def put(
    chosen: Mapping[int, Candidate],
    numbers: Numbers,
    others: Mapping[int, Sequence[nn.Module]],
    layers: Mapping[int, nn.Module],
    run: Run,
) -> dict[int, Got]:
    """What comes of other outputs of gate and up: those of `numbers`, (N, width) each.

    All layers at once; what their MLPs write becomes zero, so that no layer changes another one.
    """
    got = {number: Got() for number in chosen}
    hooks = Hooks(layers)

    def give(parts: Sequence[Projection], _module: Any, _args: Any, _: Any, output: Tensor) -> Any:
        new = output.reshape(-1, output.shape[-1]).clone()
        for part in parts:
            part.of(new).copy_(numbers(len(new), part.width)[part.site == "up"])
        return new.reshape(output.shape)

    def take(number: int, _module: Any, args: Any, kwargs: Any) -> None:
        if hooks.running in (None, number) and got[number].h is None:
            got[number].h = flat(first(args, kwargs))

    def look(number: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, made = flat(first(args, kwargs)), flat(output)
        is_own = hooks.running in (None, number) and got[number].h is None
        if is_own and given is not None and made is not None:
            got[number].others.setdefault(module, (given, made))

    def silence(_module: Any, _args: Any, _: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    for number, candidate in chosen.items():
        parts = [candidate.gate, *([candidate.up] if candidate.up else [])]
        for module in dict.fromkeys(part.module for part in parts):
            own = [part for part in parts if part.module is module]
            hooks.after(module, partial(give, own))
        hooks.before(candidate.product.module, partial(take, number))
        for module in others.get(number, ()):
            hooks.after(module, partial(look, number))
        hooks.after(candidate.down.module, silence)
    hooks.run(run)
    return got


def writes(chosen: Mapping[int, Candidate], layers: Mapping[int, nn.Module], run: Run) -> set[int]:
    """The layers whose `down` writes into the stream, and not into a norm or a router inside.

    Other outputs y of `down`, large ones, move the layer's output by something that is odd in y,
    through norms and factors, too: the mean of the outputs at y and at -y is the same for any y.
    And those of the first token, the only one that changes between two y, move no other token. The
    layers behind see what they saw before.
    """
    runs: list[dict[int, list[Any]]] = []  # each layer's outputs, if it is called again, too

    def put_in(kind: int, _module: Any, _args: Any, _: Any, output: Tensor) -> Any:
        width = output.shape[-1]
        y, z = _random(2, output.numel() // width, width) * 1e3
        z = torch.where(torch.arange(len(y), device="cpu")[:, None] == 0, z, y)
        rows = (y, -y, z, -z)[kind]
        return (rows - rows.mean(1, keepdim=True)).to(output).reshape(output.shape)

    def keep(number: int, _module: Any, _args: Any, _: Any, output: Any) -> Any:
        own = runs[-1][number]
        own.append(output)
        return runs[0][number][len(own) - 1]

    for kind in range(4):
        runs.append({number: [] for number in chosen})
        hooks = Hooks({})
        for number, candidate in chosen.items():
            hooks.after(candidate.down.module, partial(put_in, kind))
            hooks.after(layers[number], partial(keep, number))
        hooks.run(run)
    firsts = {number: [run[number][0] for run in runs if run[number]] for number in chosen}
    return {n for n, one in chosen.items() if _are_written(firsts[n], one)}


def stream(output: Any) -> Any:
    """The hidden states among what a layer returns: the first tensor."""
    while isinstance(output, tuple | list | dict) and output:
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


def _are_written(outputs: Sequence[Any], candidate: Candidate) -> bool:
    """Whether a layer's outputs are those of y, -y, and of other ones of the first token, z, -z."""
    found, width = list(map(stream, outputs)), candidate.down.width
    if not found:
        return True  # nobody calls the layer as a module: it cannot be told
    if not all(isinstance(x, Tensor) for x in found):
        return False
    # As wide as the stream, or as one of several streams side by side that gate reads, too.
    is_one = candidate.width == width and found[0].shape[-1] % width == 0
    if found[0].shape[-1] != width and not is_one:
        return False
    y, minus_y, z, minus_z = (x.detach().double().flatten(0, -2) for x in found)
    even, other = (y + minus_y) / 2, (z + minus_z) / 2
    near = 0.5 * (y - minus_y).abs().mean() / 2
    is_local = len(y) > N_TOKENS or (z - y)[1:].abs().mean() <= near
    # Of several streams, or of tokens in another order, it is not known which row is the first.
    is_odd = (even - other).abs().mean(1).max() <= near
    return bool(is_local and is_odd)


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
    both = numbers(len(got.h), candidate.gate.width)
    gate, up = (values.to(got.h.device) for values in both)
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
            if not torch.equal(other_given, other_made) and is_elementwise(module, other_given):
                return module
    return None


# --- the candidates that hold ----------------------------------------------------------------


def prove(
    seen: Mapping[int, list[Seen]], run: Run, layers: Mapping[int, nn.Module]
) -> dict[int, list[Candidate]]:
    """The candidates of each layer that hold."""
    fitting: dict[int, list[Candidate]] = {}
    loose: dict[int, list[Candidate]] = {}
    for number, calls in seen.items():
        every = list(candidates(calls))
        fitting[number] = [one for one in every if one.activation]
        loose[number] = [one for one in every if not one.activation]
    others = {
        number: list(dict.fromkeys(one.module for one in calls if not one.is_linear))
        for number, calls in seen.items()
    }
    held: dict[int, list[Candidate]] = {number: [] for number in seen}

    def hold(found: Mapping[int, Candidate]) -> None:
        written = writes(found, layers, run) if found else set()
        for number, one in found.items():
            held[number].append(replace(one, writes=number in written))

    for chosen in _rounds(fitting, held, many=True):
        numbers, found = _numbers(of_all_sizes, seen), {}
        for number, got in put(chosen, numbers, others, layers, run).items():
            if keeps_the_formula(chosen[number], got, numbers):
                found[number] = chosen[number]
            else:
                loose[number].insert(0, replace(chosen[number], act=None, activation=None))
        hold(found)
    for chosen in _rounds(loose, held, many=False):
        gates = put(chosen, _numbers(one_gate, seen), others, layers, run)
        ups = put(chosen, _numbers(one_up, seen), others, layers, run)
        acts = {n: keeps_the_place(one, gates[n], ups[n]) for n, one in chosen.items()}
        hold({n: replace(one, act=acts[n]) for n, one in chosen.items() if acts[n] is not None})
    return held


def _numbers(
    make: Callable[[int, int], tuple[Tensor, Tensor]], seen: Mapping[int, list[Seen]]
) -> Numbers:
    like = next(one.output for calls in seen.values() for one in calls if one.is_linear)
    return Numbers(make, like)


def _rounds(
    lists: Mapping[int, list[Candidate]], held: Mapping[int, list[Candidate]], *, many: bool
) -> Iterable[dict[int, Candidate]]:
    """One candidate of every layer at a time, without those whose maps are in one that holds.

    Without `many` a layer is done with its first one.
    """
    waiting = {number: list(some) for number, some in lists.items()}
    while True:
        chosen = {}
        for number, some in waiting.items():
            taken = {module for one in held[number] for module in one.maps}
            if any(one.writes for one in held[number]) and not many:
                continue
            while some:
                one = some.pop(0)
                if not one.maps & taken:
                    chosen[number] = one
                    break
        if not chosen:
            return
        yield chosen
