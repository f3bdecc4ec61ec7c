"""What a patch counts at a part of a layer, as tables with a row for each group of tokens.

The corpus pass and `instrument` make counting states, read them and fill them again; dense MLPs
and experts look the same here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from relneuron import ops
from relneuron.model.layers import device_of
from relneuron.model.mlps.experts import Experts
from relneuron.model.mlps.shape import Part
from relneuron.model.peaks import Looked
from relneuron.model.states import LayerState

STATISTICS = ("count", "sum", "sum_sq", "max", "n_nonfinite")
TOKENS, ROUTED, WEIGHT = "tokens", "tokens.expert", "weight.expert"


def counting_state(
    part: Part,
    groups: int,
    sites: Sequence[str],
    *,
    threshold: float = 0.0,
    moments: bool = False,
    looked: Looked | None = None,
) -> LayerState:
    """A state that counts a part's neurons, and what reaches them, in G groups of tokens.

    Of experts `stats` has E * G groups of F neurons, group g of expert e in the row e * G + g; they
    also count the G groups' tokens and, where the router says them, sum its weights.
    """
    device = device_of(part.module)

    def new(n_groups: int, width: int, own: tuple[str, ...]) -> ops.GroupStats | None:
        if not own:
            return None
        return ops.GroupStats(
            groups=n_groups,
            width=width,
            sites=own,
            threshold=threshold,
            moments=moments,
            device=device,
        )

    inner = tuple(site for site in sites if site != "down")
    n, width = part.n_experts * groups, part.width // part.n_experts
    state = LayerState(
        stats=new(n, width, inner),
        stats_down=new(groups, part.hidden, ("down",) if "down" in sites else ()),
        looked=looked,
    )
    if isinstance(part, Experts):
        state.seen = torch.zeros(groups, dtype=torch.int64, device=device)
        if part.call != "dense":
            state.routing = torch.zeros(n, dtype=torch.float64, device=device)
    return state


def tables(part: Part, state: LayerState) -> dict[str, Tensor]:
    """What a state has counted of G groups, by name.

    `tokens` (G,) int64 that came to the part, and `count.act` and its like (G, width), as
    `ops.GroupStats` has them. Of experts `tokens.expert` (G, E) int64, how many the router sent to
    each, and `weight.expert` float64, the sums of the weights that it gave them. And what was kept
    of values, as `Looked.tables` has it.
    """
    found = {} if state.looked is None else state.looked.tables()
    for stats in (state.stats_down, state.stats):
        if stats is None:
            continue
        if state.seen is None or stats is state.stats_down:
            found[TOKENS] = stats.tokens
        for name in STATISTICS:
            for site, values in getattr(stats, name).items():
                found[f"{name}.{site}"] = values if site == "down" else part.unfold(values)
    if state.seen is not None:
        found[TOKENS] = state.seen
        if state.stats is not None:
            found[ROUTED] = state.stats.tokens.view(part.n_experts, -1).T
        if state.routing is not None:
            found[WEIGHT] = state.routing.view(part.n_experts, -1).T
    return found


def fill(part: Part, state: LayerState, given: Mapping[str, Tensor]) -> None:
    """Write tables of the first groups into a state; the other groups stay."""
    for name, table in tables(part, state).items():
        table = table.clone()
        table[: len(given[name])] = given[name]
        if name == TOKENS:
            if state.seen is not None:
                state.seen.copy_(table)
            elif state.stats is not None:
                state.stats.tokens.copy_(table)
            if state.stats_down is not None:
                state.stats_down.tokens.copy_(table)
        elif state.looked is not None and name in state.looked.tables():
            state.looked.fill(name, table)
        elif name == ROUTED and state.stats is not None:
            state.stats.tokens.copy_(table.T.reshape(-1))
        elif name == WEIGHT and state.routing is not None:
            state.routing.copy_(table.T.reshape(-1))
        else:
            kind, _, site = name.partition(".")
            stats = state.stats_down if site == "down" else state.stats
            getattr(stats, kind)[site].copy_(table if site == "down" else part.fold(table))
