"""What a patch does in one layer: its statistics, the neurons that it switches off or sets.

`model/patch.py` calls it at the forwards that it has replaced; nothing here changes a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from relneuron import ops
from relneuron.artifact.files import RelneuronError
from relneuron.artifact.neurons import ATTENTION, check_neurons
from relneuron.model.gated import GatedMLP, model_shape


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

    def rows(self, shape: torch.Size) -> Tensor | None:
        """The conditions of the tokens of an input (B, T, D), as (B, T) or (B, 1).

        Of a flat one (B * T, D), as OPT's MLP reads it, (B * T,).
        """
        rows = self.conditions
        if rows is None:
            return None
        if len(shape) == 2 and len(rows) and shape[0] % len(rows) == 0:
            n_tokens = shape[0] // len(rows)
            whole = rows if rows.dim() == 2 else rows.unsqueeze(1).expand(-1, n_tokens)
            return whole[:, -n_tokens:].flatten()
        if len(rows) != shape[0]:
            raise ValueError(
                f"a batch of {len(rows)} rows (from the masks) is expected, got an input of shape "
                f"{tuple(shape)}"
            )
        return rows[:, -shape[1] :] if rows.dim() == 2 else rows.unsqueeze(1)


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


# --- statistics, and the values of neurons ---------------------------------------------------


def is_recomputing() -> bool:
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
    mlp: GatedMLP, state: LayerState, tokens: Tokens, shape: torch.Size
) -> dict[str, Any] | None:
    """What the op records of a forward, as its arguments; `None` for nothing."""
    if is_recomputing():
        return None
    counted = tokens.counted if state.stats is not None else None
    if counted is not None and mlp.layer in counted:
        raise RelneuronError(
            "the tokens of the last probe.batch() were counted already",
            "call it before each forward; generate() makes many: count its text by one forward",
        )
    prompt_ids = _flat(tokens.prompt_ids, shape, "prompt_ids")
    sums = None
    if state.responses is not None and prompt_ids is not None:
        others = ("down", *ATTENTION)
        sums = {site: values for site, values in state.responses.items() if site not in others}
    has_stats = state.stats is not None
    if not (has_stats or sums):
        return None
    group_ids = _flat(tokens.group_ids, shape, "group_ids") if has_stats else None
    if counted is not None:
        counted.add(mlp.layer)
    return {
        "stats": state.stats,
        "group_ids": group_ids,
        "responses": sums or None,
        "prompt_ids": prompt_ids if sums else None,
    }


def _op(mlp: GatedMLP, backend: str) -> dict[str, Any]:
    # Ids are made or checked where they enter the patch.
    return {"activation": mlp.activation, "ids_checked": True, "backend": backend}


def statistics_only(
    mlp: GatedMLP,
    sites: dict[str, Tensor],
    state: LayerState,
    tokens: Tokens,
    shape: torch.Size,
    backend: str,
) -> None:
    """Record a forward; where hooks may have changed act, `sites` has it and the product, too."""
    recording = _recording(mlp, state, tokens, shape)
    if recording is None:
        return
    sites = {site: values.detach() for site, values in sites.items()}
    if state.stats is not None and "act" in sites:
        _record_values(state.stats, sites, recording["group_ids"], backend)
        recording |= {"stats": None, "group_ids": None}
    if recording["stats"] is not None or recording["responses"]:
        ops.swiglu_stats_only(sites["gate"], sites["up"], **recording, **_op(mlp, backend))


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


def hidden(
    mlp: GatedMLP,
    sites: dict[str, Tensor],
    act: Tensor | None,
    state: LayerState,
    tokens: Tokens,
    shape: torch.Size,
    backend: str,
) -> Tensor:
    """h (T, F) with this patch's statistics taken and its neurons switched off."""
    gate, up = sites["gate"], sites["up"]
    conditions = tokens.rows(shape) if state.keep is not None else None
    if conditions is not None:
        conditions = conditions.expand(shape[:-1]).reshape(-1).contiguous()
    if act is None:
        recording = _recording(mlp, state, tokens, shape) or {}
        mask: dict[str, Any] = {"keep": state.keep, "condition_ids": conditions}
        return ops.swiglu_stats(gate, up, **recording, **mask, **_op(mlp, backend))
    # torch computes h; the op only takes the statistics.
    statistics_only(mlp, sites, state, tokens, shape, backend)
    h = sites["product"] if "product" in sites else act * up
    if state.keep is None:
        return h
    on = unpack_keep(state.keep, gate.shape[1])
    rows = on[0] if conditions is None else on[conditions.long()]
    return torch.where(rows, h, h.new_zeros(()))


def replace_act(
    h: Tensor, up: Tensor, state: LayerState, tokens: Tokens, shape: torch.Size
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
    return torch.where(replace.chosen[places], replace.shift[places].to(up.dtype) * up, h)


def record_down(y: Tensor, state: LayerState, tokens: Tokens, backend: str) -> None:
    if state.stats_down is not None and not is_recomputing():
        flat_y = y.detach().reshape(-1, y.shape[-1])
        ops.residual_stats(
            flat_y,
            torch.zeros_like(flat_y),
            stats=state.stats_down,
            group_ids=_flat(tokens.group_ids, y.shape, "group_ids"),
            ids_checked=True,
            backend=backend,
        )
    record_outputs(y, "down", state, tokens)


def record_outputs(y: Tensor, site: str, state: LayerState, tokens: Tokens) -> None:
    """Add the outputs of a linear map to the responses of their prompts."""
    ids = tokens.prompt_ids
    if is_recomputing() or state.responses is None or site not in state.responses or ids is None:
        return
    flat = cast(Tensor, _flat(ids, y.shape, "prompt_ids"))
    rows = (flat >= 0).nonzero().squeeze(1)
    values = y.detach().reshape(-1, y.shape[-1])[rows].float()
    state.responses[site].index_add_(0, flat[rows].long(), values)
