"""The routed experts of a decoder layer: found by structure, confirmed by numbers.

What finds the parts of a model calls `find_experts`; `experts.py` says what it gives.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from relneuron.model.layers import (
    TRAINING,
    first_line,
    is_training,
    unreadable,
    without_hooks,
)
from relneuron.model.mlps.candidates import ACTIVATIONS
from relneuron.model.mlps.experts import Experts, Maps
from relneuron.model.mlps.proof import SIZES

NO_EXPERTS = "no experts"  # of a layer that has nothing of the kind


def find_experts(
    number: int, path: str, layer: nn.Module, *, shared: bool = False
) -> tuple[Experts | None, str]:
    """The routed experts of the decoder layer `number`, whose path is `path`, or why not.

    They are a module with three-dimensional parameters down_proj and gate_up_proj, or up_proj
    alone; one with flat w1, v1 and w2 (DBRX); or one with input_linear and output_linear (JetMoE).
    On random rows in three sizes, sent to random experts, it must give what the description gives.
    With `shared` those that every token goes to, where they are such a module, too (Inkling);
    mostly they are a gated MLP, which this does not look for.
    """
    names = dict(layer.named_modules())
    all_found = {name: parts for name, m in names.items() if (parts := expert_parts(m)) is not None}
    found = {name: parts for name, parts in all_found.items() if (parts[0] == "shared") == shared}
    if len(found) != 1:
        if found:
            return None, f"{len(found)} sets of experts ({', '.join(found)}), not one"
        if shared:
            return None, NO_EXPERTS
        lists = [n for n, m in names.items() if "expert" in n and isinstance(m, nn.ModuleList)]
        if lists:
            return None, f"its experts are a list of modules ({lists[0]}), not parameters of one"
        others = [name for name in names if "expert" in name.rpartition(".")[2]]
        return None, f"its experts ({others[0]}) have other weights" if others else NO_EXPERTS
    name, parts = next(iter(found.items()))
    module = names[name]
    patched = getattr(module.__dict__.get("forward"), "experts", None)
    if isinstance(patched, Experts):
        return patched, "patched already, checked before that"
    try:
        with without_hooks(module), torch.no_grad():
            described = _describe(number, f"{path}.{name}", module, parts)
            if isinstance(described, str):
                return None, described
            experts = _proved(described)
    except Exception as error:
        return None, f"its experts cannot be run alone: {first_line(error)}"
    if experts is None:
        return None, "its experts are not down(h) of an h = act(gate(x)) * b(up(x))"
    shape = f"E={experts.n_experts}, F={experts.expert_width}, D={experts.hidden}"
    return experts, f"{experts.path}: {experts.activation or 'its own gating'}, {shape}"


def expert_parts(module: nn.Module) -> tuple[str, tuple[str, ...], str] | None:
    """How a module of experts is called, and the names of its parameters; None for another one."""

    def has(names: tuple[str, ...], n_dims: int) -> bool:
        weights = [_get(module, name) for name in names]
        return all(isinstance(w, nn.Parameter) and w.dim() == n_dims for w in weights)

    packed, apart = ("gate_up_proj",), ("gate_proj", "up_proj")
    for inputs in (packed, apart, ("up_proj",)):
        if has((*inputs, "down_proj"), 3):
            n_given = len(inspect.signature(type(module).forward).parameters) - 1
            call = {1: "dense", 2: "shared", 3: "routed"}.get(n_given)
            return None if call is None else (call, inputs, "down_proj")
    if has(("mlp.w1", "mlp.v1", "mlp.w2"), 2):
        return "routed", ("mlp.w1", "mlp.v1"), "mlp.w2"
    if has(("input_linear.weight", "output_linear.weight"), 3) and _get(module, "activation"):
        return "router", ("input_linear.weight",), "output_linear.weight"
    return None


def _get(module: nn.Module, name: str) -> Any:
    try:
        return attrgetter(name)(module)
    except AttributeError:
        return None


def _describe(
    number: int, path: str, module: nn.Module, parts: tuple[str, tuple[str, ...], str]
) -> Experts | str:
    call, inputs, output = parts
    weights = [cast(Tensor, _get(module, name)) for name in (*inputs, output)]
    why = next(filter(None, map(unreadable, weights)), None)
    if why is not None:
        return f"its experts' weights are {why}"
    if is_training(module):
        return f"in {TRAINING}"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over devices"
    first, last = weights[0], weights[-1]
    gated = inputs != ("up_proj",)
    if last.dim() == 2:
        n_experts = int(cast(Any, module).num_experts)
        width, hidden, turned = len(last) // n_experts, last.shape[1], (False, True)
    else:
        n_experts, n_in, n_out = last.shape
        twice = 2 if gated and len(inputs) == 1 else 1
        is_turned = first.shape[1:] == (n_out, twice * n_in)
        if is_turned and first.shape[1:] == (twice * n_out, n_in):
            is_turned = bool(getattr(module, "is_transposed", False))
        width, hidden = (n_in, n_out) if is_turned else (n_out, n_in)
        turned = (is_turned, is_turned)
    maps = [
        Maps(name, f"{name}_bias" if _get(module, f"{name}_bias") is not None else None, is_turned)
        for names, is_turned in ((inputs, turned[0]), ((output,), turned[1]))
        for name in names
    ]
    experts = Experts(
        number,
        path,
        module,
        None,
        n_experts,
        width,
        hidden,
        call,
        tuple(maps[:-1]),
        maps[-1],
        gated,
    )
    if experts.activation_module() is None and _get(module, "_apply_gate") is None:
        return "its experts have no activation of a known name"
    return _with_formula(experts, last.device)


def _with_formula(experts: Experts, device: torch.device) -> Experts | str:
    """With the activation and how gate and up lie, found by comparing values."""
    generator = torch.Generator().manual_seed(0)
    shape = (97, experts.expert_width)
    up = 6 * torch.rand(shape, generator=generator, device="cpu").to(device) - 3
    up = up if experts.gated else torch.ones_like(up)
    gate = torch.linspace(-6, 6, 97, device=device).unsqueeze(1).repeat(1, shape[1])
    first = torch.arange(experts.expert_width, device=device) == 0
    for is_interleaved in (False, True):
        way = replace(experts, interleaved=is_interleaved)
        same = torch.isclose(way.own_h(gate + first, up + first), way.own_h(gate, up), rtol=1e-4)
        if not bool(same[:, 1:].all()):
            continue  # what is gate and up of one neuron is not so of the module
        for name, formula in ACTIVATIONS.items():
            for size in SIZES:
                a, b = size * gate, size * up if experts.gated else up
                near = 4e-6 * size
                if not torch.allclose(way.own_h(a, b), formula(a) * b, rtol=1e-5, atol=near):
                    break
            else:
                return replace(way, activation=name)
            has_rest = experts.gated and bool(way.own_h(gate, 0 * up).any())
        way = replace(way, neutral=0.0 if has_rest else 1.0)
        product = way.act(gate) * way.factor(up)
        if torch.allclose(way.own_h(gate, up), product, rtol=1e-4, atol=1e-5):
            return way
    return "its experts' h is no product of an activation of gate and a factor of up"


def _proved(experts: Experts) -> Experts | None:
    """The description, with the dtype of its eager sum, if it gives what the module gives."""
    weight = experts.output.weights(experts.module, experts.n_experts)
    ways = [experts]
    if (
        weight.dtype.itemsize == 2
        and experts.call == "routed"
        and experts.implementation() == "eager"
    ):
        ways.append(replace(experts, sums_in=torch.float32))
    errors = torch.zeros(len(ways), device="cpu")
    for size in SIZES:
        given = _random_arguments(experts, weight, size)
        theirs = cast(Tensor, experts.module(*given))
        if size > 1 and not bool(theirs.isfinite().all()):
            break  # past what float16 holds
        # Behind a clamp the output is small, and what rounds are large numbers before it.
        few = 16 * torch.finfo(weight.dtype).eps
        moved = experts.formula((1 + few) * given[0], *given[1:]) - experts.formula(*given)
        tolerance = few * float(theirs.abs().max()) + float(moved.abs().max())
        for number, way in enumerate(ways):
            ours = way.formula(*given)
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                return None
            error = (ours.float() - theirs.float()).abs()
            if not bool(error.max() <= tolerance):
                return None
            errors[number] += error.sum().cpu() / size**3
    return ways[int(errors.argmin())]


def _random_arguments(experts: Experts, weight: Tensor, size: float) -> list[Tensor]:
    """Of a forward of seven tokens, of which each goes to at most four of the experts."""
    generator = torch.Generator().manual_seed(0)
    n_tokens, n_numbers = 7, experts.n_numbers()
    k = min(4, n_numbers)
    x = size * torch.randn(n_tokens, experts.hidden, generator=generator, device="cpu")
    order = torch.rand(n_tokens, n_numbers, generator=generator, device="cpu").argsort(1)
    shares = torch.rand(n_tokens, k, generator=generator, device="cpu") + 0.5
    if experts.call == "router":
        return [x.unsqueeze(0).to(weight)]
    if experts.call == "dense":
        table = torch.zeros(n_tokens, n_numbers, device="cpu").scatter(1, order[:, :k], shares)
        return [(table.T.unsqueeze(2) * x).reshape(-1, experts.hidden).to(weight)]
    if experts.call == "shared":
        shares = torch.rand(n_tokens, n_numbers, generator=generator, device="cpu") + 0.5
        return [x.to(weight), shares.to(weight)]
    if experts.module.get_parameter(experts.output.weight).dim() == 2:
        x = x.unsqueeze(0)  # DBRX gives back a batch
    return [x.to(weight), order[:, :k].to(weight.device), shares.to(weight)]
