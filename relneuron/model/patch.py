"""The patch: takes statistics in a model's gated MLPs, switches neurons off, and comes off exactly.

The stages and the two context managers of the package (model/instrument.py) are made of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from relneuron import ops
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import ATTENTION, check_neurons, site_widths
from relneuron.model.gated import GatedMLP, model_shape
from relneuron.model.layers import Projection, has_hooks
from relneuron.ops.tensors import is_plain

_ABSENT = object()
_PATCHING = threading.Lock()


@dataclass
class LayerState:
    """What a patch does in one layer; every field is optional."""

    stats: ops.GroupStats | None = None
    stats_down: ops.GroupStats | None = None  # of width D, sites=("down",)
    # gate, up (N, F), down (N, D), q, k, v, o (N, their widths): sums over tokens.
    responses: dict[str, Tensor] | None = None
    keep: Tensor | None = None  # (C, ceil(F/32)) int32: products that stay
    keep_down: Tensor | None = None  # (C, D) bool: down_proj outputs that stay
    # By site (gate, up, act, down, q, k, v, o): outputs that become another value.
    replace: dict[str, Replacement] | None = None


@dataclass
class Replacement:
    """Outputs of one site that become `factor` times themselves, or `shift`, per condition."""

    chosen: Tensor  # (C, F or D) bool
    factor: float = 0.0
    shift: Tensor | None = None  # (C, F or D) float32

    def apply(self, x: Tensor, conditions: Tensor | None) -> Tensor:
        """x (..., F or D) with the chosen outputs replaced; conditions (...) or none for row 0."""
        rows = x.new_zeros((), dtype=torch.long) if conditions is None else conditions.long()
        new = x * self.factor if self.factor else x.new_zeros(())
        if self.shift is not None:
            new = self.shift[rows].to(x.dtype)
        return torch.where(self.chosen[rows], new, x)


class StatisticsDone(Exception):
    """Ends a forward of which only the statistics were asked for."""


@dataclass
class Tokens:
    """What the next forward's tokens are; ids (B, T) int32, -1 = nowhere.

    `conditions` (B,) or (B, T) int32 are the rows of the masks. With `n_needed` the last layer's
    output is only needed at so many last columns; at the others its MLP is left out. `counted`, if
    not None, are the layers that have counted the tokens: each may do it once.
    """

    group_ids: Tensor | None = None
    prompt_ids: Tensor | None = None
    conditions: Tensor | None = None
    n_needed: int | None = None
    counted: set[int] | None = None


class Patch:
    """Replaces every gated MLP's `forward` on the instance, and puts back what was there.

    Likewise those of its layer's attention projections, where the MLP has them.

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
        mlps: Sequence[GatedMLP],
        states: Sequence[LayerState],
        *,
        backend: str = "auto",
        only_statistics: bool = False,
        own_activation: bool = False,
    ) -> None:
        self.mlps, self.states, self.backend = mlps, list(states), backend
        self.only_statistics, self.own_activation = only_statistics, own_activation
        self.tokens = Tokens()
        self.thread = 0  # that entered
        self._saved: list[tuple[nn.Module, object, object]] = []

    def __enter__(self) -> Patch:
        if self._saved:
            raise RelneuronError("this patch is active already", "make a second one to nest")
        if len({id(mlp.module) for mlp in self.mlps}) < len(self.mlps):
            raise RelneuronError(
                "layers of the model share one MLP, whose neurons would be counted in each of them",
                "give a model with an MLP of its own in every layer",
            )
        with _PATCHING:
            found = [mlp.module.__dict__.get("forward", _ABSENT) for mlp in self.mlps]
            for before in found:
                if isinstance(before, _Forward):
                    before.check_thread()
            self.thread = threading.get_ident()
            for layer, (mlp, before) in enumerate(zip(self.mlps, found, strict=True)):
                outer = before if isinstance(before, _Forward) else None
                forward = _Forward(self, mlp, layer, outer)
                self._saved.append((mlp.module, before, forward))
                mlp.module.__dict__["forward"] = forward
                self._patch_projections(mlp, layer)
        return self

    def _patch_projections(self, mlp: GatedMLP, layer: int) -> None:
        parts: dict[nn.Module, list[Projection]] = {}
        for part in mlp.projections:
            parts.setdefault(part.module, []).append(part)
        for module, own in parts.items():
            before = module.__dict__.get("forward", _ABSENT)
            linear = _Linear(self, own, layer, before)
            self._saved.append((module, before, linear))
            module.__dict__["forward"] = linear

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        in_order = True
        for module, before, ours in self._saved:
            current = module.__dict__.get("forward")
            in_order &= current is ours
            # Not ours and not on top of ours: an outer patch has taken this one off already, and
            # to put back what stood before it would bring a dead patch to life.
            if not (isinstance(current, _Patched) and self in current.patches):
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

    def is_done(self) -> bool:
        """Whether nothing is wanted behind the products of the last layer."""
        return self.only_statistics and self.states[-1].stats_down is None

    def conditions(self, shape: torch.Size) -> Tensor | None:
        """The conditions of the tokens of an MLP's input (B, T, D), as (B, T) or (B, 1)."""
        rows = self.tokens.conditions
        if rows is None or rows.dim() == 2:
            return None if rows is None else rows[:, -shape[1] :]
        return rows.unsqueeze(1)

    def replaced(self, layer: int, site: str, x: Tensor, shape: torch.Size) -> Tensor:
        """The outputs of a site, flat or (B, T, .), with the chosen ones replaced."""
        replace = (self.states[layer].replace or {}).get(site)
        if replace is None:
            return x
        rows = self.conditions(shape)
        return replace.apply(x.reshape(*shape[:-1], -1), rows).reshape(x.shape)


class _Patched:
    """A patched forward. A plain callable, so nothing of it is copied or saved."""

    def __init__(self, patch: Patch, layer: int, outer: _Patched | None) -> None:
        self.layer = layer
        self.patches: list[Patch] = [patch, *(outer.patches if outer else [])]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RelneuronError("a patched model cannot be copied", "copy it outside the context")

    def __reduce__(self) -> Any:
        raise RelneuronError("a patched model cannot be pickled", "save it outside the context")

    def check_thread(self) -> None:
        if torch.compiler.is_compiling():
            return
        if threading.get_ident() != self.patches[0].thread and not _is_recomputing():
            raise RelneuronError(
                "the model is inside instrument() or ablate() of another thread",
                "enter in the thread that runs the model, or give each thread a model of its own",
            )


class _Linear(_Patched):
    """The patched forward of an attention's linear map: its own, then what the patches do."""

    def __init__(
        self, patch: Patch, parts: Sequence[Projection], layer: int, before: object
    ) -> None:
        outer = before if isinstance(before, _Linear) else None
        super().__init__(patch, layer, outer)
        self.parts = parts
        module = parts[0].module
        own = before if callable(before) else partial(type(module).forward, module)
        self.plain: Callable[[Tensor], Tensor] = outer.plain if outer else own

    def __call__(self, x: Tensor) -> Tensor:
        self.check_thread()
        y = self.plain(x)
        for part in self.parts:
            inside = slice(part.start, part.start + part.width)
            for patch in self.patches:
                _record_outputs(y[..., inside], part.site, patch.states[self.layer], patch)
            for patch in self.patches:
                if part.site in (patch.states[self.layer].replace or {}):
                    new = patch.replaced(self.layer, part.site, y[..., inside], y.shape)
                    y = torch.cat([y[..., : part.start], new, y[..., inside.stop :]], dim=-1)
        return y


class _Forward(_Patched):
    """The patched forward of one MLP."""

    def __init__(self, patch: Patch, mlp: GatedMLP, layer: int, outer: _Forward | None) -> None:
        super().__init__(patch, layer, outer)
        self.mlp = mlp
        self._uncalled = mlp.uncalled()

    def __call__(self, x: Tensor) -> Tensor:
        self.check_thread()
        for name, module in self._uncalled:
            if has_hooks(module):
                raise RelneuronError(
                    f"{self.mlp.path}.{name} has a hook, and is not called inside the context",
                    "remove the hook, or put it on the MLP, its projections or its activation",
                )
        needed = [patch.tokens.n_needed for patch in self.patches]
        if self.layer == len(self.patches[0].mlps) - 1 and None not in needed:
            # Behind the last layer's MLP no token looks at another one.
            y = x.new_zeros(x.shape)
            n = max(cast(list[int], needed))
            y[:, -n:] = self._mlp(x[:, -n:])
            return y
        return self._mlp(x)

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = self.mlp.project(x)
        for patch in self.patches:
            gate = patch.replaced(self.layer, "gate", gate, x.shape)
            up = patch.replaced(self.layer, "up", up, x.shape)
        is_last = self.layer == len(self.patches[0].mlps) - 1
        act, is_hooked = self._act(gate, up, x.shape)
        sites = {"gate": gate, "up": up}
        if is_hooked and act is not None:
            sites |= {"act": act, "product": act * up}
        if is_last and all(patch.is_done() for patch in self.patches):
            for patch in self.patches:
                _statistics_only(self.mlp, sites, patch.states[self.layer], patch, x.shape)
            raise StatisticsDone
        h: Tensor | None = None
        for patch in self.patches:
            out = _hidden(self.mlp, sites, act, patch.states[self.layer], patch, x.shape)
            # Every patch of the chain computes the same h with its own neurons at zero.
            h = out if h is None else torch.where(out == 0, out, h)
        h = cast(Tensor, h)
        for patch in self.patches:
            h = _replace_act(h, up, patch.states[self.layer], patch, x.shape)
        y = self.mlp.down(h.reshape(*x.shape[:-1], self.mlp.width))
        for patch in self.patches:
            _record_down(y, patch.states[self.layer], patch)
        for patch in self.patches:
            keep = patch.states[self.layer].keep_down
            if keep is not None:
                rows = patch.conditions(x.shape)
                y = torch.where(keep[0] if rows is None else keep[rows.long()], y, y.new_zeros(()))
            y = patch.replaced(self.layer, "down", y, x.shape)
        return y

    def _act(self, gate: Tensor, up: Tensor, shape: torch.Size) -> tuple[Tensor | None, bool]:
        """The model's own activation (T, F), called once, or None where the kernels' is taken.

        And whether hooks have seen it, in the shape that they know, and may have changed it.
        """
        own = self.mlp.own_activation()
        if isinstance(own, nn.Module) and has_hooks(own):
            return own(gate.reshape(*shape[:-1], -1)).reshape(gate.shape), True
        has_grad = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
        is_own = any(p.own_activation for p in self.patches) or has_grad
        is_own = is_own or not (is_plain(gate) and is_plain(up))
        return (own(gate) if is_own else None), False


def _is_recomputing() -> bool:
    """Whether autograd runs a forward again, as gradient checkpointing does: it has counted."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _flat(ids: Tensor | None, shape: torch.Size, what: str) -> Tensor | None:
    if ids is None:
        return None
    if ids.shape != shape[:-1]:
        raise ValueError(
            f"{what} must be {tuple(shape[:-1])} (from the model's input), got {tuple(ids.shape)}: "
            "call probe.batch before each forward; generate makes many, so generate outside of "
            "instrument and count the text in one forward"
        )
    return ids.reshape(-1)


def _recording(
    mlp: GatedMLP, state: LayerState, patch: Patch, shape: torch.Size
) -> dict[str, Any] | None:
    """What the op records of a forward, as its arguments; `None` for nothing."""
    if _is_recomputing():
        return None
    counted = patch.tokens.counted if state.stats is not None else None
    if counted is not None and mlp.layer in counted:
        raise RelneuronError(
            "the tokens of the last probe.batch() were counted already",
            "call it before each forward; generate() makes many: count its text by one forward",
        )
    prompt_ids = _flat(patch.tokens.prompt_ids, shape, "prompt_ids")
    sums = None
    if state.responses is not None and prompt_ids is not None:
        others = ("down", *ATTENTION)
        sums = {site: values for site, values in state.responses.items() if site not in others}
    has_stats = state.stats is not None
    if not (has_stats or sums):
        return None
    group_ids = _flat(patch.tokens.group_ids, shape, "group_ids") if has_stats else None
    if counted is not None:
        counted.add(mlp.layer)
    return {
        "stats": state.stats,
        "group_ids": group_ids,
        "responses": sums or None,
        "prompt_ids": prompt_ids if sums else None,
    }


def _op(mlp: GatedMLP, patch: Patch) -> dict[str, Any]:
    # Ids are made or checked where they enter the patch.
    return {"activation": mlp.activation, "ids_checked": True, "backend": patch.backend}


def _statistics_only(
    mlp: GatedMLP, sites: dict[str, Tensor], state: LayerState, patch: Patch, shape: torch.Size
) -> None:
    """Record a forward; where hooks may have changed act, `sites` has it and the product, too."""
    recording = _recording(mlp, state, patch, shape)
    if recording is None:
        return
    sites = {site: values.detach() for site, values in sites.items()}
    if state.stats is not None and "act" in sites:
        _record_values(state.stats, sites, recording["group_ids"], patch.backend)
        recording |= {"stats": None, "group_ids": None}
    if recording["stats"] is not None or recording["responses"]:
        ops.swiglu_stats_only(sites["gate"], sites["up"], **recording, **_op(mlp, patch))


def _record_values(
    stats: ops.GroupStats, sites: dict[str, Tensor], group_ids: Tensor | None, backend: str
) -> None:
    """Add the values at hand to `stats`, each site as the first input of an op of its own."""
    for site in stats.sites:
        part = ops.GroupStats(
            groups=stats.groups,
            width=stats.width,
            sites=("gate",),
            threshold=stats.threshold,
            moments=stats.moments,
            device=stats.device,
        )
        values, is_first = sites[site], site == stats.sites[0]
        ops.swiglu_stats_only(
            values, values, stats=part, group_ids=group_ids, ids_checked=True, backend=backend
        )
        for name in ("count", "sum", "sum_sq", "n_nonfinite"):
            for values in getattr(part, name).values():
                getattr(stats, name)[site].add_(values)
        for values in part.max.values():
            torch.maximum(stats.max[site], values, out=stats.max[site])
        if is_first:
            stats.tokens += part.tokens


def _hidden(
    mlp: GatedMLP,
    sites: dict[str, Tensor],
    act: Tensor | None,
    state: LayerState,
    patch: Patch,
    shape: torch.Size,
) -> Tensor:
    """h (T, F) with this patch's statistics taken and its neurons switched off."""
    gate, up = sites["gate"], sites["up"]
    conditions = patch.conditions(shape) if state.keep is not None else None
    if conditions is not None:
        conditions = conditions.expand(shape[:-1]).reshape(-1).contiguous()
    if act is None:
        recording = _recording(mlp, state, patch, shape) or {}
        mask: dict[str, Any] = {"keep": state.keep, "condition_ids": conditions}
        return ops.swiglu_stats(gate, up, **recording, **mask, **_op(mlp, patch))
    # torch computes h; the op only takes the statistics.
    _statistics_only(mlp, sites, state, patch, shape)
    h = sites["product"] if "product" in sites else act * up
    if state.keep is None:
        return h
    on = unpack_keep(state.keep, gate.shape[1])
    rows = on[0] if conditions is None else on[conditions.long()]
    return torch.where(rows, h, h.new_zeros(()))


def _replace_act(
    h: Tensor, up: Tensor, state: LayerState, patch: Patch, shape: torch.Size
) -> Tensor:
    """h (T, F) where the chosen activations have another value: that value times up."""
    replace = (state.replace or {}).get("act")
    if replace is None:
        return h
    rows = patch.conditions(shape)
    if rows is not None:
        rows = rows.expand(shape[:-1]).reshape(-1)
    if replace.shift is None:
        return replace.apply(h, rows)  # an activation times a factor is h times that factor
    places = h.new_zeros((), dtype=torch.long) if rows is None else rows.long()
    return torch.where(replace.chosen[places], replace.shift[places].to(up.dtype) * up, h)


def _record_down(y: Tensor, state: LayerState, patch: Patch) -> None:
    if state.stats_down is not None and not _is_recomputing():
        flat_y = y.detach().reshape(-1, y.shape[-1])
        ops.residual_stats(
            flat_y,
            torch.zeros_like(flat_y),
            stats=state.stats_down,
            group_ids=_flat(patch.tokens.group_ids, y.shape, "group_ids"),
            ids_checked=True,
            backend=patch.backend,
        )
    _record_outputs(y, "down", state, patch)


def _record_outputs(y: Tensor, site: str, state: LayerState, patch: Patch) -> None:
    """Add the outputs of a linear map to the responses of their prompts."""
    ids = patch.tokens.prompt_ids
    if _is_recomputing() or state.responses is None or site not in state.responses or ids is None:
        return
    flat = cast(Tensor, _flat(ids, y.shape, "prompt_ids"))
    rows = (flat >= 0).nonzero().squeeze(1)
    values = y.detach().reshape(-1, y.shape[-1])[rows].float()
    state.responses[site].index_add_(0, flat[rows].long(), values)


# --- masks -----------------------------------------------------------------------------------


def pack_keep(keep: np.ndarray[Any, Any]) -> Tensor:
    """(C, F) bool -> (C, ceil(F/32)) int32, bit f % 32 of word f // 32 set = neuron f stays."""
    padded = np.pad(keep, ((0, 0), (0, -keep.shape[1] % 32)), constant_values=True)
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view("<i4").copy())


def unpack_keep(keep: Tensor, width: int) -> Tensor:
    """(C, ceil(F/32)) int32 -> (C, F) bool."""
    bits = torch.arange(32, device=keep.device, dtype=torch.int32)
    return ((keep.unsqueeze(-1) >> bits) & 1).bool().reshape(keep.shape[0], -1)[:, :width]


def mask_states(
    conditions: Sequence[Iterable[Sequence[Any]]], mlps: Sequence[GatedMLP]
) -> list[LayerState]:
    """Per layer, the masks that switch off the neurons of each condition.

    Zeroing the output k of gate_proj or of up_proj both make product k zero, so a condition is
    two masks a layer: over the F products and over the D outputs of down_proj. Outputs of the
    attention's projections become zero one by one.
    """
    shape = model_shape(mlps)
    attention: dict[tuple[int, str], np.ndarray[Any, Any]] = {}
    products = np.ones((shape["layers"], len(conditions), shape["width"]), bool)
    downs = np.ones((shape["layers"], len(conditions), shape["hidden"]), bool)
    for number, neurons in enumerate(conditions):
        for layer, site, index in check_neurons(neurons, shape):
            if site in ATTENTION:
                empty = np.zeros((len(conditions), shape[site]), bool)
                attention.setdefault((layer, site), empty)[number, index] = True
                continue
            (downs if site == "down" else products)[layer, number, index] = False
    states = []
    for layer, mlp in enumerate(mlps):
        device = next(mlp.module.parameters()).device
        state = LayerState()
        if not products[layer].all():
            state.keep = pack_keep(products[layer]).to(device)
        if not downs[layer].all():
            state.keep_down = torch.from_numpy(downs[layer]).to(device)
        off = {site: rows for (where, site), rows in attention.items() if where == layer}
        if off:
            state.replace = {
                site: Replacement(torch.from_numpy(rows).to(device)) for site, rows in off.items()
            }
        states.append(state)
    return states


def check_canary(model: Any, mlps: Sequence[GatedMLP], input_ids: Tensor, backend: str) -> None:
    """Raise unless switching off all MLPs changes the logits: guards against a dead patch.

    Likewise all attentions, where their projections are patched.
    """
    shape, parts = model_shape(mlps), {"gate": "MLP"}
    if mlps[0].projections:
        parts |= {"o": "attention"}
    with torch.no_grad():
        clean = model(input_ids).logits
        for site, what in parts.items():
            width = site_widths(shape)[site]
            everything = [(mlp.layer, site, index) for mlp in mlps for index in range(width)]
            with Patch(mlps, mask_states([everything], mlps), backend=backend):
                dark = model(input_ids).logits
            if torch.equal(clean, dark):
                raise RelneuronError(
                    f"switching off every {what} did not change the logits: the patch is not "
                    "effective",
                    "give the model uncompiled, with its own forward methods",
                )
