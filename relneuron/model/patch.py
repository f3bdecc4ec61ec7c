"""The patch: takes statistics in a model's layers, switches neurons off, and comes off exactly.

The stages and the two context managers of the package (model/instrument.py) are made of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from relneuron.artifact.files import RelneuronError
from relneuron.model.layers import CHANGING, Parts, Projection, has_hooks
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.mlp import MLP
from relneuron.model.mlps.shape import Part
from relneuron.model.outputs import record_down, record_outputs
from relneuron.model.states import (
    LayerState,
    Tokens,
    hidden,
    is_recomputing,
    masked,
    replace_act,
    rows_of,
    statistics_only,
)
from relneuron.ops.tensors import is_plain

_ABSENT = object()


class StatisticsDone(Exception):
    """Ends a forward of which only the statistics were asked for."""


class Patch:
    """Replaces `forward` of modules in every layer on the instance, and puts back what was there.

    They are those of an MLP that is whole, or of the maps and the activation of one whose forward
    stays as it is, and of the attention's projections that come with it; of a `Parts` the linear
    maps whose inputs or outputs are neurons.

    A context manager. Class-level overrides and hooks are ignored by a model that was compiled
    before; an instance's own `forward` is not. Inside another patch both act: statistics of
    both, neurons of both switched off. Leaving in another order than last-in first-out raises.
    A patched model belongs to the thread that entered: a forward or patch of another one raises.

    With `only_statistics` a forward ends with StatisticsDone as soon as the last layer's are taken:
    its down_proj, the final norm and the lm_head are not computed. With `own_activation` h comes
    from the model's own activation, bit for bit, and the kernels only take the statistics.
    """

    def __init__(
        self,
        layers: Sequence[Part | Parts],
        states: Sequence[LayerState],
        *,
        backend: str = "auto",
        only_statistics: bool = False,
        own_activation: bool = False,
    ) -> None:
        self.layers, self.states, self.backend = layers, list(states), backend
        self.only_statistics, self.own_activation = only_statistics, own_activation
        self.tokens = Tokens()
        self.thread = 0  # that entered
        # Of each MLP whose forward stays as it is: what its maps gave in the forward that runs.
        self.values: list[dict[str, Tensor]] = [{} for _ in layers]
        self._saved: list[tuple[nn.Module, object, _Patched]] = []
        # Of two parts of the last layer either may come first, so that none of them is the last.
        numbers = [getattr(layer, "layer", None) for layer in layers[-2:]]
        self.has_two_last = len(numbers) == 2 and None is not numbers[0] == numbers[1]
        if len(self.states) != len(layers):
            raise ValueError(
                f"Patch: {len(layers)} states (from the layers) are expected, got {len(states)}"
            )
        for layer, state in zip(layers, self.states, strict=True):
            for part in layer.projections:
                new = (state.replace or {}).get(part.site)
                if new is not None and new.chosen.shape[1:] != (part.width,):
                    raise ValueError(
                        f"Patch: what is replaced at {part.site} must be (C, {part.width}) (from "
                        f"the model), got {tuple(new.chosen.shape)}"
                    )

    def __enter__(self) -> Patch:
        if self._saved:
            raise RelneuronError("this patch is active already", "make a second one to nest")
        found = [
            own for number, layer in enumerate(self.layers) for own in self._own(number, layer)
        ]
        if len({id(module) for module, _ in found}) < len(found):
            raise RelneuronError(
                "layers of the model share one MLP, whose neurons would be counted in each of them",
                "give a model with an MLP of its own in every layer",
            )
        with CHANGING:
            for module, _ in found:
                before = module.__dict__.get("forward")
                if isinstance(before, _Patched):
                    before.check_thread()
            self.thread = threading.get_ident()
            for module, forward in found:
                self._put_on(module, forward)
            for number, layer in enumerate(self.layers):
                for module, own in _by_module(layer.projections).items():
                    self._put_on(module, partial(_Linear, self, number, own))
        return self

    def _own(
        self, number: int, layer: Part | Parts
    ) -> Iterator[tuple[nn.Module, Callable[[object], _Patched]]]:
        """The modules of a layer's MLP that get another forward, and what makes it."""
        if isinstance(layer, Experts):
            from relneuron.model.patch_experts import ExpertsForward  # made of this file

            yield layer.module, partial(ExpertsForward, self, number, layer)
        elif not isinstance(layer, MLP):
            yield layer.module, partial(_Patched, self, number, layer.module)
        elif layer.is_whole:
            yield layer.module, partial(_Forward, self, number, layer)
        else:
            for module, own in _by_module(layer.sites).items():
                yield module, partial(_Inside, self, number, layer, own)

    def _put_on(self, module: nn.Module, forward: Callable[[object], _Patched]) -> None:
        before = module.__dict__.get("forward", _ABSENT)
        patched = forward(before)
        self._saved.append((module, before, patched))
        module.__dict__["forward"] = patched

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        in_order = True
        for module, before, ours in reversed(self._saved):
            current = module.__dict__.get("forward")
            in_order &= current is ours
            # Not ours and not on top of ours: an outer patch has taken this one off already, and
            # to put back what stood before it would bring a dead patch to life.
            if not (isinstance(current, _Patched) and self in current.below):
                continue
            if before is _ABSENT:
                module.__dict__.pop("forward")
            else:
                module.__dict__["forward"] = before
        self._saved.clear()
        if not in_order and error is None:
            raise RelneuronError(
                "patches were taken off in another order than last-in first-out",
                "leave the inner context first; no neuron of this patch is off any more",
            )

    def check_used(self) -> None:
        """Raise unless the model has called every patched module: guards against a dead patch."""
        if not all(forward.is_used for _, _, forward in self._saved):
            raise RelneuronError(
                "the model does not call the layers that neurons were switched off in",
                "give the model uncompiled, with its own forward methods",
            )

    def is_done(self) -> bool:
        """Whether nothing is wanted behind the products of the last layer."""
        return self.only_statistics and self.states[-1].stats_down is None

    def replaced(self, layer: int, site: str, x: Tensor, shape: torch.Size) -> Tensor:
        """The outputs of a site, flat or (B, T, .), with the chosen ones replaced."""
        replace = (self.states[layer].replace or {}).get(site)
        if replace is None:
            return x
        rows = self.tokens.on(x.device).rows(shape)
        return replace.apply(x.reshape(*shape[:-1], -1), rows).reshape(x.shape)


def _by_module(parts: Sequence[Projection]) -> dict[nn.Module, list[Projection]]:
    found: dict[nn.Module, list[Projection]] = {}
    for part in parts:
        found.setdefault(part.module, []).append(part)
    return found


class _Patched:
    """A patched forward. A plain callable, so nothing of it is copied or saved.

    `patches` are those that act in it, the outer ones of the same kind behind the own one; `plain`
    is the forward that was there before all of them.
    """

    def __init__(self, patch: Patch, layer: int, module: nn.Module, before: object) -> None:
        outer = before if isinstance(before, _Patched) and type(before) is type(self) else None
        self.layer, self.is_used = layer, False
        self.patches: list[Patch] = [patch, *(outer.patches if outer else [])]
        # Below are also those of another kind, which act in `plain`.
        self.below: list[Patch] = [patch, *(before.below if isinstance(before, _Patched) else [])]
        own = before if callable(before) else partial(type(module).forward, module)
        self.plain: Callable[[Tensor], Tensor] = outer.plain if outer else own
        self.is_last = layer == len(patch.layers) - 1 and not patch.has_two_last

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RelneuronError("a patched model cannot be copied", "copy it outside the context")

    def __reduce__(self) -> Any:
        raise RelneuronError("a patched model cannot be pickled", "save it outside the context")

    def check_thread(self) -> None:
        if torch.compiler.is_compiling():
            return
        if threading.get_ident() != self.patches[0].thread and not is_recomputing():
            raise RelneuronError(
                "the model is inside instrument() or ablate() of another thread",
                "enter in the thread that runs the model, or give each thread a model of its own",
            )

    def __call__(self, x: Tensor) -> Tensor:
        self.check_thread()
        self.is_used = True
        needed = [patch.tokens.n_needed for patch in self.patches]
        if not self.is_last or None in needed or x.dim() < 3:
            return self.compute(x)
        # What the last layer writes is looked at by no other token.
        n = max(cast(list[int], needed))
        if x.shape[1] <= n:
            return self.compute(x)
        last = self.compute(x[:, -n:])
        y = last.new_zeros(*x.shape[:-1], last.shape[-1])
        y[:, -n:] = last
        return y

    def compute(self, x: Tensor) -> Tensor:
        return self.plain(x)

    def _written(self, y: Tensor) -> Tensor:
        """y (..., D) of a down map, recorded, with what is off at zero and the rest replaced."""
        for patch in self.patches:
            tokens = patch.tokens.on(y.device)
            record_down(y, patch.states[self.layer], tokens, patch.backend)
        for patch in self.patches:
            keep = patch.states[self.layer].keep_down
            if keep is not None:
                rows = patch.tokens.on(y.device).rows(y.shape)
                y = torch.where(keep[0] if rows is None else keep[rows.long()], y, y.new_zeros(()))
            y = patch.replaced(self.layer, "down", y, y.shape)
        return y

    def _replaced(self, y: Tensor, part: Projection) -> Tensor:
        """y, inputs or outputs of a map, with the chosen ones of a site replaced."""
        for patch in self.patches:
            if part.site in (patch.states[self.layer].replace or {}):
                new = patch.replaced(self.layer, part.site, part.of(y), y.shape)
                if new.shape == y.shape:
                    y = new
                else:
                    y = y.clone()
                    part.of(y).copy_(new)
        return y


class _Linear(_Patched):
    """The patched forward of a linear map: its own, with what the patches do before and behind."""

    def __init__(
        self, patch: Patch, layer: int, parts: Sequence[Projection], before: object
    ) -> None:
        super().__init__(patch, layer, parts[0].module, before)
        self.inputs = [part for part in parts if part.of_input]
        self.outputs = [part for part in parts if not part.of_input]
        self.is_last &= not self.outputs  # keys and values are looked at by every token

    def compute(self, x: Tensor) -> Tensor:
        return self._changed(self.plain(self._changed(x, self.inputs)), self.outputs)

    def _changed(self, y: Tensor, parts: Sequence[Projection]) -> Tensor:
        for part in parts:
            for patch in self.patches:
                tokens = patch.tokens.on(y.device)
                record_outputs(part.of(y), part.site, patch.states[self.layer], tokens)
            y = self._replaced(y, part)
        return y


class _Forward(_Patched):
    """The patched forward of one MLP that is whole: the kernels in place of its activation."""

    def __init__(self, patch: Patch, layer: int, mlp: MLP, before: object) -> None:
        super().__init__(patch, layer, mlp.module, before)
        self.mlp = mlp
        self._uncalled = mlp.uncalled()

    def compute(self, x: Tensor) -> Tensor:
        for name, module in self._uncalled:
            if has_hooks(module):
                raise RelneuronError(
                    f"{self.mlp.path}.{name} has a hook, and is not called inside the context",
                    "remove the hook, or put it on the MLP, its projections or its activation",
                )
        gate, up = self.mlp.project(x)
        for patch in self.patches:
            gate = patch.replaced(self.layer, "gate", gate, x.shape)
            if up is not None:
                up = patch.replaced(self.layer, "up", up, x.shape)
        act, is_hooked = self._act(gate, up, x.shape)
        sites = {"gate": gate} | ({} if up is None else {"up": up})
        if is_hooked and act is not None:
            sites |= {"act": act} | ({} if up is None else {"product": act * up})
        acting = [(p.states[self.layer], p.tokens.on(gate.device), p.backend) for p in self.patches]
        if self.is_last and all(patch.is_done() for patch in self.patches):
            for state, tokens, backend in acting:
                statistics_only(self.mlp, sites, state, tokens, x.shape, backend)
            raise StatisticsDone
        h: Tensor | None = None
        for state, tokens, backend in acting:
            out = hidden(self.mlp, sites, act, state, tokens, x.shape, backend)
            # Every patch of the chain computes the same h with its own neurons at zero.
            h = out if h is None else torch.where(out == 0, out, h)
        h = cast(Tensor, h)
        for state, tokens, _ in acting:
            h = replace_act(h, up, state, tokens, x.shape)
        return self._written(self.mlp.down(h.reshape(*x.shape[:-1], self.mlp.width)))

    def _act(
        self, gate: Tensor, up: Tensor | None, shape: torch.Size
    ) -> tuple[Tensor | None, bool]:
        """The model's own activation (T, F), called once, or None where the kernels' is taken.

        And whether hooks have seen it, in the shape that they know, and may have changed it.
        """
        own = self.mlp.own_activation()
        if isinstance(own, nn.Module) and has_hooks(own):
            return own(gate.reshape(*shape[:-1], -1)).reshape(gate.shape), True
        both = [gate] if up is None else [gate, up]
        has_grad = torch.is_grad_enabled() and any(x.requires_grad for x in both)
        is_own = any(p.own_activation for p in self.patches) or has_grad
        is_own = is_own or not all(map(is_plain, both))
        return (own(gate) if is_own else None), False


class _Inside(_Patched):
    """The patched forward of one map of an MLP whose own forward stays as it is.

    Gate, up and the activation leave their numbers in the patch; what reads h takes statistics of
    them and switches neurons off; down is as that of any other MLP.
    """

    def __init__(
        self, patch: Patch, layer: int, mlp: MLP, parts: Sequence[Projection], before: object
    ) -> None:
        super().__init__(patch, layer, parts[0].module, before)
        self.mlp, self.ends, self.is_last = mlp, self.is_last, False
        self.sites = {part.site: part for part in parts}

    def compute(self, x: Tensor) -> Tensor:
        if "product" in self.sites:
            x = self._product(x)
        y = self.plain(x)
        for site, part in self.sites.items():
            if site == "down":
                y = self._written(y)
            elif site != "product":
                y = self._replaced(y, part)
                self.patches[0].values[self.layer][site] = rows_of(part.of(y))
        return y

    def _product(self, x: Tensor) -> Tensor:
        values = self.patches[0].values[self.layer]
        self.patches[0].values[self.layer] = {}
        sites, h = values | {"product": rows_of(x)}, rows_of(x)
        if self.mlp.activation is not None:
            sites = {site: values[site] for site in ("gate", "up") if site in values}
        for patch in self.patches:
            state, tokens = patch.states[self.layer], patch.tokens.on(x.device)
            statistics_only(self.mlp, sites, state, tokens, x.shape, patch.backend)
        if self.ends and all(patch.is_done() for patch in self.patches):
            raise StatisticsDone
        for patch in self.patches:
            state, tokens = patch.states[self.layer], patch.tokens.on(x.device)
            h = masked(h, state, tokens, x.shape)
            if "act" not in values:
                h = replace_act(h, values.get("up"), state, tokens, x.shape)
        return h.reshape(x.shape)
