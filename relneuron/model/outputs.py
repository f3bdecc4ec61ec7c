"""What a patch records of the outputs of a linear map: down's, and those of the attention.

`model/patch.py` calls it behind the map; `states.py` records what the kernels see of an MLP.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from relneuron import ops
from relneuron.model.peaks import look
from relneuron.model.states import LayerState, Tokens, flat_ids, is_recomputing, rows_of


def record_down(y: Tensor, state: LayerState, tokens: Tokens, backend: str) -> None:
    look(None, {"down": rows_of(y)}, state.looked, tokens.segments, backend)
    if state.stats_down is not None and not is_recomputing():
        flat_y = y.detach().reshape(-1, y.shape[-1])
        ops.residual_stats(
            flat_y,
            torch.zeros_like(flat_y),
            stats=state.stats_down,
            group_ids=flat_ids(tokens.group_ids, y.shape, "group_ids"),
            ids_checked=True,
            backend=backend,
        )
    record_outputs(y, "down", state, tokens)


def record_outputs(y: Tensor, site: str, state: LayerState, tokens: Tokens) -> None:
    """Add the outputs of a linear map to the responses of their prompts."""
    ids = tokens.prompt_ids
    if is_recomputing() or state.responses is None or site not in state.responses or ids is None:
        return
    flat = cast(Tensor, flat_ids(ids, y.shape, "prompt_ids"))
    if tokens.pooled is None:
        places = (flat >= 0).nonzero().squeeze(1)  # waits for the device
        rows = flat[places].long()
    else:
        places, rows = tokens.pooled
    values = y.detach().reshape(-1, y.shape[-1])[places].float()
    state.responses[site].index_add_(0, rows, values)
