"""What a patch does in the experts of a layer: counts, switches off and sets their neurons.

`model/patch.py` puts `ExpertsForward` in the place of their module's forward. The helpers below
make its states and read them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from relneuron.artifact.files import RelneuronError
from relneuron.model.layers import has_hooks
from relneuron.model.mlps.experts import Experts, Rows
from relneuron.model.patch import StatisticsDone, _Patched
from relneuron.model.states import (
    LayerState,
    Tokens,
    flat_ids,
    hidden,
    is_recomputing,
    replace_act,
    statistics_only,
)
from relneuron.ops.tensors import is_plain

if TYPE_CHECKING:
    from relneuron.model.patch import Patch


class ExpertsForward(_Patched):
    """The patched forward of one layer's experts.

    Each pair of a token and an expert that it goes to is a row; all rows are counted and masked by
    one call of the op, whose groups are the pairs of expert and group (expert * G + group), and so
    with conditions and prompts.
    """

    def __init__(self, patch: Patch, layer: int, experts: Experts, before: object) -> None:
        super().__init__(patch, layer, experts.module, before)
        self.experts = experts
        self._uncalled = experts.uncalled()

    def __call__(self, *given: Tensor, **named: Tensor) -> Tensor:
        self.check_thread()
        self.is_used = True
        for name, module in self._uncalled:
            if has_hooks(module):
                raise RelneuronError(
                    f"{self.experts.path}.{name} has a hook, and is not called inside the context",
                    "remove the hook, or put it on the experts or their activation",
                )
        if named:
            own = inspect.signature(type(self.experts.module).forward)
            given = own.bind(self.experts.module, *given, **named).args[1:]
        return self._run(*given)

    def _run(self, x: Tensor, *routing: Tensor) -> Tensor:
        experts = self.experts
        inputs, rows = experts.begin(x, *routing)
        gate, up = experts.project(inputs, rows.bounds)
        shape = x.shape
        if experts.call == "dense":
            shape = torch.Size((len(x) // experts.n_experts, experts.hidden))
        flat = torch.Size((1, *inputs.shape))
        states = [patch.states[self.layer] for patch in self.patches]
        acting = []
        for state, patch in zip(states, self.patches, strict=True):
            tokens = _row_tokens(experts, rows, state, patch.tokens.on(x.device), shape)
            acting.append((state, tokens, patch.backend))
        for state, tokens, _ in acting:
            gate = _replaced(gate, "gate", state, tokens, flat)
            up = _replaced(up, "up", state, tokens, flat)
        act, sites = self._sites(gate, up, states)
        h: Tensor | None = None
        is_done = self.is_last and all(patch.is_done() for patch in self.patches)
        for state, tokens, backend in acting:
            if is_done:
                statistics_only(experts, sites, state, tokens, flat, backend)
            else:
                out = hidden(experts, sites, act, state, tokens, flat, backend)
                # Every patch of the chain computes the same h with its own neurons at zero.
                h = out if h is None else torch.where(out == 0, out, h)
            _record_routing(rows, state, tokens)
        for patch in self.patches:
            _record_seen(patch.states[self.layer], patch.tokens.on(x.device), shape)
        if is_done:
            raise StatisticsDone
        h = cast(Tensor, h)
        for state, tokens, _ in acting:
            if "act" in (state.replace or {}):
                h = replace_act(h, experts.factor(up), state, tokens, flat)
        return self._with_down(experts.end(h, rows, x, *routing), shape)

    def _sites(
        self, gate: Tensor, up: Tensor, states: Sequence[LayerState]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """act (R, F), or None where the kernels compute it; and the values that are at hand."""
        experts = self.experts
        counted = {site for state in states if state.stats for site in state.stats.sites}
        is_read = any(state.responses for state in states) or not counted <= {"act", "product"}
        if experts.interleaved and (is_read or experts.activation is not None):
            gate, up = gate.contiguous(), up.contiguous()  # as the op reads them
        sites = {"gate": gate, "up": up}
        if experts.activation is None:
            sites["product"] = experts.own_h(gate, up)
            if counted & {"act", "product"}:
                sites["act"] = experts.act(gate)
            return sites["product"], sites
        own = experts.activation_module()
        if isinstance(own, torch.nn.Module) and has_hooks(own):
            act = experts.act(gate)
            return act, sites | {"act": act, "product": act * up}
        has_grad = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
        is_own = any(p.own_activation for p in self.patches) or has_grad
        is_own = is_own or not (is_plain(gate) and is_plain(up))
        return (experts.act(gate) if is_own else None), sites

    def _with_down(self, y: Tensor, shape: torch.Size) -> Tensor:
        """The module's output with the statistics of down taken and its neurons switched off."""
        if not any(_has_down(patch.states[self.layer]) for patch in self.patches):
            return y
        if self.experts.call != "dense":
            return self._written(y)
        # Outputs of each expert, which the model sums: all of the sum becomes the first one's.
        total = y.view(self.experts.n_experts, *shape).sum(0)
        new = self._written(total)
        return y if new is total else pad(new, (0, 0, 0, len(y) - len(new)))


def _has_down(state: LayerState) -> bool:
    has_values = any("down" in (table or {}) for table in (state.responses, state.replace))
    return has_values or state.stats_down is not None or state.keep_down is not None


def _replaced(
    values: Tensor, site: str, state: LayerState, tokens: Tokens, flat: torch.Size
) -> Tensor:
    new = (state.replace or {}).get(site)
    if new is None:
        return values
    return new.apply(values.unsqueeze(0), tokens.rows(flat)).squeeze(0)


def _row_tokens(
    experts: Experts, rows: Rows, state: LayerState, tokens: Tokens, shape: torch.Size
) -> Tokens:
    """What the rows are: (1, R) ids of group, prompt and condition, those of each expert apart."""

    def of_rows(ids: Tensor | None, n: int) -> Tensor | None:
        if ids is None or not n:
            return None
        own = ids.int()[rows.token]
        apart = rows.expert.int() * n + own
        return torch.where(own < 0, own, apart).unsqueeze(0)

    def n_of(tables: Sequence[Tensor]) -> int:
        return len(tables[0]) // experts.n_experts if tables else 0

    # Those of down are of tokens, not of rows.
    chosen = [new.chosen for site, new in (state.replace or {}).items() if site != "down"]
    sums = [values for site, values in (state.responses or {}).items() if site != "down"]
    n_groups = n_of([] if state.stats is None else [state.stats.tokens])
    groups = flat_ids(tokens.group_ids, shape, "group_ids") if n_groups else None
    if groups is None and n_groups == 1:
        groups = rows.token.new_zeros(shape[:-1]).reshape(-1)
    conditions = tokens.rows(shape)
    if conditions is None:
        conditions = rows.token.new_zeros(shape[:-1])
    segments = tokens.segments
    if segments is not None:
        ids = cast(
            Tensor, of_rows(flat_ids(segments.ids, shape, "segments"), len(segments.numbers))
        )
        segments = replace(segments, ids=ids, token=rows.token)
    return Tokens(
        group_ids=of_rows(groups, n_groups),
        prompt_ids=of_rows(flat_ids(tokens.prompt_ids, shape, "prompt_ids"), n_of(sums)),
        conditions=of_rows(
            conditions.expand(shape[:-1]).reshape(-1),
            n_of(chosen if state.keep is None else [*chosen, state.keep]),
        ),
        counted=tokens.counted,
        segments=segments,
    )


def _record_routing(rows: Rows, state: LayerState, tokens: Tokens) -> None:
    """Add the router's weights of the rows to those of their experts and groups, in order."""
    if state.routing is None or rows.weight is None or is_recomputing():
        return
    groups = cast(Tensor, tokens.group_ids).squeeze(0)
    counted = (groups >= 0).nonzero().squeeze(1)
    place, weights = groups[counted].long(), rows.weight.detach()[counted].double()
    if state.routing.is_cuda:
        state.routing.index_put_((place,), weights, accumulate=True)  # sorted; index_add_ is not
    else:
        state.routing.index_add_(0, place, weights)


def _record_seen(state: LayerState, tokens: Tokens, shape: torch.Size) -> None:
    """Count the tokens that came, whichever experts they go to."""
    if state.seen is None or is_recomputing():
        return
    if tokens.group_ids is None:
        state.seen += shape[:-1].numel()
        return
    groups = cast(Tensor, flat_ids(tokens.group_ids, shape, "group_ids")).long()
    n_groups = len(state.seen)
    state.seen += torch.bincount(groups.clamp(min=-1) + 1, minlength=n_groups + 1)[1:]
