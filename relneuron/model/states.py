"""What a patch does in one layer: its statistics, the neurons that it switches off or sets.

`model/patch.py` calls it at the forwards that it has replaced; nothing here changes a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from relneuron import ops
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import ATTENTION, Shape, check_neurons
from relneuron.model.layers import device_of
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.shape import Part, model_shape
from relneuron.model.peaks import Looked, Segments, look

Array = np.ndarray[Any, Any]


@dataclass
class LayerState:
    """What a patch does at one MLP; every field is optional."""

    stats: ops.GroupStats | None = None
    stats_down: ops.GroupStats | None = None  # of width D, sites=("down",)
    # gate, up (N, F), down (N, D), q, k, v, o (N, their widths): sums over tokens.
    responses: dict[str, Tensor] | None = None
    keep: Tensor | None = None  # (C, ceil(F/32)) int32: products that stay
    keep_down: Tensor | None = None  # (C, D) bool: down_proj outputs that stay
    # By site (gate, up, act, down, q, k, v, o): outputs that become another value.
    replace: dict[str, Replacement] | None = None
    # Of experts: (G,) int64, tokens that came; (E * G,) float64, sums of the router's weights.
    seen: Tensor | None = None
    routing: Tensor | None = None
    looked: Looked | None = None  # of the windows of a corpus


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


@dataclass
class Tokens:
    """What the next forward's tokens are; ids (B, T) int32, -1 = nowhere, or () int32, one for all.

    One for all is what a vision tower needs: its tokens are patches of a picture, not of text.
    `conditions` (B,) or (B, T) int32 are the rows of the masks. Where the rows are `stacked`, an
    input of any other shape, such as the patches of all pictures, is of the B rows one behind the
    other, each with as much of it. With `n_needed` the last layer's output is only needed at so
    many last columns; at the others its MLP is left out. `counted`, if not None, are the MLPs that
    have counted the tokens: each may do it once. `segments` are the windows of a corpus. `pooled`:
    where the prompt ids are not -1, and the ids there, both int64, if that is known beforehand.
    """

    group_ids: Tensor | None = None
    prompt_ids: Tensor | None = None
    conditions: Tensor | None = None
    n_needed: int | None = None
    counted: set[tuple[int, int]] | None = None
    stacked: bool = False
    segments: Segments | None = None
    pooled: tuple[Tensor, Tensor] | None = None
    _elsewhere: dict[torch.device, Tokens] = field(default_factory=dict, repr=False, compare=False)

    def on(self, device: torch.device) -> Tokens:
        """The same tokens where a layer computes; the ids are sent there once."""
        every = (self.group_ids, self.prompt_ids, self.conditions)
        if all(ids is None or ids.device == device for ids in every):
            return self
        if device not in self._elsewhere:
            groups, prompts, rows = (None if ids is None else ids.to(device) for ids in every)
            segments = None if self.segments is None else self.segments.on(device)
            pooled = None
            if self.pooled is not None:
                pooled = self.pooled[0].to(device), self.pooled[1].to(device)
            about = (self.n_needed, self.counted, self.stacked, segments, pooled)
            self._elsewhere[device] = Tokens(groups, prompts, rows, *about)
        return self._elsewhere[device]

    def rows(self, shape: torch.Size) -> Tensor | None:
        """The conditions of the tokens of an input: of (B, T, D) as (B, T) or (B, 1).

        Of (B * T, D), as experts get it, as (B * T,).
        """
        rows = self.conditions
        if rows is None:
            return None
        if rows.dim() == 0:
            return rows.expand(shape[:-1])
        if len(shape) == 2 and len(rows) and shape[0] % len(rows) == 0:
            whole = torch.Size((len(rows), shape[0] // len(rows), shape[1]))
            return cast(Tensor, self.rows(whole)).expand(whole[:2]).reshape(-1)
        n_positions = shape[:-1].numel()
        if self.stacked and rows.dim() == 1 and n_positions % len(rows) == 0:
            return rows.repeat_interleave(n_positions // len(rows)).reshape(shape[:-1])
        if len(rows) != shape[0]:
            raise ValueError(
                f"a batch of {len(rows)} rows (from the masks) is expected, got an input of shape "
                f"{tuple(shape)}"
            )
        return rows[:, -shape[1] :] if rows.dim() == 2 else rows.unsqueeze(1)


def rows_of(y: Tensor) -> Tensor:
    """y (..., F) as (T, F)."""
    return y.reshape(-1, y.shape[-1])


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
    conditions: Sequence[Iterable[Sequence[Any]]], mlps: Sequence[Part]
) -> list[LayerState]:
    """Per MLP, the masks that switch off the neurons of each condition."""
    shape = model_shape(mlps)
    widths = Shape.of(shape).widths
    off: dict[tuple[int, str], Array] = {}
    for number, neurons in enumerate(conditions):
        for layer, site, index in check_neurons(neurons, shape):
            empty = np.zeros((len(conditions), widths[site]), bool)
            off.setdefault((layer, site), empty)[number, index] = True
    return [
        off_state(mlp, {site: rows for (layer, site), rows in off.items() if layer == mlp.layer})
        for mlp in mlps
    ]


def off_state(mlp: Part, off: Mapping[str, Array]) -> LayerState:
    """What switches neurons of an MLP off: `off` has (C, .) bool of the layer by site.

    Where h is activation(gate) * up, zeroing the output k of gate or of up both make product k
    zero, so a condition is two masks: over the F products and over the D outputs of down. Where h
    is made in another way, outputs become zero themselves, as the attention's projections' do.
    """
    device = device_of(mlp.module)
    state, rest = LayerState(), dict(off)
    if isinstance(mlp, Experts) or mlp.activation is not None:
        # An up of zero makes the product zero, unless something is added to it first.
        is_plain = not isinstance(mlp, Experts) or mlp.neutral == 1
        both = ("gate", "up") if is_plain else ("gate",)
        products = [rest.pop(site)[:, mlp.inside] for site in both if site in rest]
        if products and np.logical_or.reduce(products).any():
            on = ~np.logical_or.reduce(products)
            state.keep = pack_keep(mlp.fold(on)).to(device)
    down = rest.pop("down", None)
    if down is not None and down.any():
        state.keep_down = torch.from_numpy(~down[:, : mlp.hidden]).to(device)
    state.replace = replacements(mlp, rest) or None
    return state


def replacements(
    mlp: Part,
    chosen: Mapping[str, Array],
    factor: float = 0.0,
    shifts: Mapping[str, Array] | None = None,
) -> dict[str, Replacement]:
    """What becomes of an MLP's chosen neurons, by site: `factor` times themselves, or `shifts`.

    Both are (C, .) arrays of the whole layer by site, of the MLP's own and of the attention's.
    """
    device = device_of(mlp.module)
    here = {"gate", "up", "act", "down", *(part.site for part in mlp.projections)}

    def own(site: str, rows: Array) -> Array:
        if site in ("gate", "up", "act"):
            return np.ascontiguousarray(mlp.fold(rows[:, mlp.inside]))
        return np.ascontiguousarray(rows[:, : mlp.hidden] if site == "down" else rows)

    found = {}
    for site, rows in chosen.items():
        if site in here and (mask := own(site, rows)).any():
            shift = None
            if shifts is not None:
                shift = torch.from_numpy(own(site, shifts[site])).to(device)
            found[site] = Replacement(torch.from_numpy(mask).to(device), factor, shift)
    return found


# --- statistics, and the values of neurons ---------------------------------------------------


def is_recomputing() -> bool:
    """Whether autograd runs a forward again, as gradient checkpointing does: it has counted."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def flat_ids(ids: Tensor | None, shape: torch.Size, what: str) -> Tensor | None:
    if ids is None:
        return None
    if ids.dim() == 0:
        return ids.repeat(shape[:-1].numel())
    if ids.shape != shape[:-1] and (len(shape) > 2 or ids.numel() != shape[0]):
        raise ValueError(
            f"{what} must be {tuple(shape[:-1])} (from the model's input), got {tuple(ids.shape)}: "
            "call probe.batch before each forward; generate makes many, so generate outside of "
            "instrument and count the text in one forward"
        )
    return ids.reshape(-1)


def _recording(
    mlp: Part, state: LayerState, tokens: Tokens, shape: torch.Size
) -> dict[str, Any] | None:
    """What the op records of a forward, as its arguments; `None` for nothing."""
    if is_recomputing():
        return None
    counted = tokens.counted if state.stats is not None else None
    place = (mlp.layer, mlp.offset)
    if counted is not None and place in counted:
        raise RelneuronError(
            "the tokens of the last probe.batch() were counted already",
            "call it before each forward; generate() makes many: count its text by one forward; a "
            "model that runs a layer several times in a forward cannot be counted",
        )
    prompt_ids = flat_ids(tokens.prompt_ids, shape, "prompt_ids")
    sums = None
    if state.responses is not None and prompt_ids is not None:
        others = ("down", *ATTENTION)
        sums = {site: values for site, values in state.responses.items() if site not in others}
    has_stats = state.stats is not None
    if not (has_stats or sums):
        return None
    group_ids = flat_ids(tokens.group_ids, shape, "group_ids") if has_stats else None
    if counted is not None:
        counted.add(place)
    return {
        "stats": state.stats,
        "group_ids": group_ids,
        "responses": sums or None,
        "prompt_ids": prompt_ids if sums else None,
    }


def _op(mlp: Part, backend: str) -> dict[str, Any]:
    # Ids are made or checked where they enter the patch.
    # Without one, h is not the op's: it only takes what needs no activation.
    return {"activation": mlp.activation or "silu", "ids_checked": True, "backend": backend}


def statistics_only(
    mlp: Part,
    sites: dict[str, Tensor],
    state: LayerState,
    tokens: Tokens,
    shape: torch.Size,
    backend: str,
) -> None:
    """Record a forward. Where act is not that of the formula, `sites` has it and the product."""
    look(mlp, sites, state.looked, tokens.segments, backend)
    recording = _recording(mlp, state, tokens, shape)
    if recording is None:
        return
    sites = {site: values.detach() for site, values in sites.items()}
    if not {"act", "product"}.isdisjoint(sites):
        stats = recording["stats"]
        for site in stats.sites if stats is not None else ():
            _count_values(stats, site, sites[site], recording["group_ids"], backend)
        recording |= {"stats": None, "group_ids": None}
    sums = recording["responses"] or {}
    if mlp.activation is None:
        for site, own in sums.items():
            values = sites[site].contiguous()
            about = {"responses": {"gate": own}, "prompt_ids": recording["prompt_ids"]}
            ops.swiglu_stats_only(values, values, **about, ids_checked=True, backend=backend)
    elif recording["stats"] is not None or sums:
        ops.swiglu_stats_only(sites["gate"], sites.get("up"), **recording, **_op(mlp, backend))


def _count_values(
    stats: ops.GroupStats, site: str, values: Tensor, group_ids: Tensor | None, backend: str
) -> None:
    """Add values (T, F) at hand to one site of `stats`, as the first input of an op of its own."""
    part = ops.GroupStats(
        groups=stats.groups,
        width=stats.width,
        sites=("gate",),
        threshold=stats.threshold,
        moments=stats.moments,
        device=stats.device,
    )
    values = values.contiguous()
    ops.swiglu_stats_only(
        values, values, stats=part, group_ids=group_ids, ids_checked=True, backend=backend
    )
    for name in ("count", "sum", "sum_sq", "n_nonfinite"):
        for added in getattr(part, name).values():
            getattr(stats, name)[site].add_(added)
    for largest in part.max.values():
        torch.maximum(stats.max[site], largest, out=stats.max[site])
    if site == stats.sites[0]:
        stats.tokens += part.tokens


def hidden(
    mlp: Part,
    sites: dict[str, Tensor],
    act: Tensor | None,
    state: LayerState,
    tokens: Tokens,
    shape: torch.Size,
    backend: str,
) -> Tensor:
    """h (T, F) with this patch's statistics taken and its neurons switched off."""
    gate, up = sites["gate"], sites.get("up")
    conditions = tokens.rows(shape) if state.keep is not None else None
    if conditions is not None:
        conditions = conditions.expand(shape[:-1]).reshape(-1).contiguous()
    if act is None:
        look(mlp, sites, state.looked, tokens.segments, backend)
        recording = _recording(mlp, state, tokens, shape) or {}
        mask: dict[str, Any] = {"keep": state.keep, "condition_ids": conditions}
        return ops.swiglu_stats(gate, up, **recording, **mask, **_op(mlp, backend))
    # torch computes h; the op only takes the statistics.
    statistics_only(mlp, sites, state, tokens, shape, backend)
    if up is None:
        return masked(act, state, tokens, shape)
    return masked(sites["product"] if "product" in sites else act * up, state, tokens, shape)


def masked(h: Tensor, state: LayerState, tokens: Tokens, shape: torch.Size) -> Tensor:
    """h (T, F) with what the state does not keep at zero."""
    if state.keep is None:
        return h
    on, conditions = unpack_keep(state.keep, h.shape[1]), tokens.rows(shape)
    if conditions is None:
        return torch.where(on[0], h, h.new_zeros(()))
    rows = on[conditions.expand(shape[:-1]).reshape(-1).long()]
    return torch.where(rows, h, h.new_zeros(()))


def replace_act(
    h: Tensor, up: Tensor | None, state: LayerState, tokens: Tokens, shape: torch.Size
) -> Tensor:
    """h (T, F) where the chosen activations have another value: that value times up."""
    replace = (state.replace or {}).get("act")
    if replace is None:
        return h
    rows = tokens.rows(shape)
    if rows is not None:
        rows = rows.expand(shape[:-1]).reshape(-1)
    if replace.shift is None:
        return replace.apply(h, rows)  # an activation times a factor is h times that factor
    places = h.new_zeros((), dtype=torch.long) if rows is None else rows.long()
    new = replace.shift[places].to(h.dtype)
    return torch.where(replace.chosen[places], new if up is None else new * up, h)
