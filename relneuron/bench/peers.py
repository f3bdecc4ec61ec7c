"""The peers of `relneuron bench`: SwiGLU with counting as it is done without relneuron.

bench/suite.py makes contestants of them, bench/timing.py checks and times them. Each is a plain
function under its formula, written as well as we can: `out` is given to everybody, `tuned` peers
keep every buffer between calls, counters are made beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as nnf

# gate, up, out are (T, F); count is (F,) or (G, F) int64 and is added to. up is None for an MLP
# that is not gated: its h is the activation, a tensor that a model makes anew.


def hidden(act: Tensor, up: Tensor | None, out: Tensor) -> Tensor | None:
    """act * up into out, or act itself."""
    if up is None:
        return act
    torch.mul(act, up, out=out)
    return None


def swiglu(gate: Tensor, up: Tensor | None, out: Tensor) -> Tensor | None:
    """h = silu(gate) * up, nothing counted: what a model does without us."""
    return hidden(nnf.silu(gate), up, out)


def lape(gate: Tensor, up: Tensor | None, out: Tensor, count: Tensor) -> Tensor | None:
    """The counting of the LAPE authors (activation.py): of all tokens, without relations."""
    act = nnf.silu(gate)
    count += (act.float() > 0).sum(0)
    return hidden(act, up, out)


def total(gate: Tensor, up: Tensor | None, out: Tensor, count: Tensor) -> Tensor | None:
    """`lape` without its copy to float32."""
    act = nnf.silu(gate)
    count += (act > 0).sum(0)
    return hidden(act, up, out)


def segments(
    gate: Tensor,
    up: Tensor | None,
    out: Tensor,
    count: Tensor,
    bounds: Sequence[tuple[int, int]],
) -> Tensor | None:
    """Per relation by slicing: the rows of a relation lie together, at `bounds`."""
    act = nnf.silu(gate)
    hits = act > 0
    count += torch.stack([hits[start:end].sum(0) for start, end in bounds])
    return hidden(act, up, out)


def one_hot(
    gate: Tensor, up: Tensor | None, out: Tensor, count: Tensor, weights: Tensor
) -> Tensor | None:
    """Per relation by a matrix product: weights (G, T) @ hits (T, F), exact below 2^24 tokens."""
    act = nnf.silu(gate)
    count += product(weights, (act > 0).to(weights.dtype)).long()
    return hidden(act, up, out)


def index_add(
    gate: Tensor, up: Tensor | None, out: Tensor, count: Tensor, ids: Tensor
) -> Tensor | None:
    """Per relation by scattering every row of hits to its relation, in int64."""
    act = nnf.silu(gate)
    count.index_add_(0, ids, (act > 0).long())
    return hidden(act, up, out)


def index_add_float(
    gate: Tensor, up: Tensor | None, out: Tensor, count: Tensor, ids: Tensor
) -> Tensor | None:
    """`index_add` in float32, exact below 2^24 tokens."""
    act = nnf.silu(gate)
    table = torch.zeros(count.shape, device=count.device)
    count += table.index_add_(0, ids, (act > 0).float()).long()
    return hidden(act, up, out)


def product(weights: Tensor, hits: Tensor) -> Tensor:
    if hits.dtype == torch.float32:
        return torch.mm(weights, hits)
    return torch.mm(weights, hits, out_dtype=torch.float32)


class Tuned:
    """The same in eager torch with every buffer kept and hits that are float32 at once.

    On a CPU torch compares into float32 and sums float32 several times faster than bool.
    """

    def __init__(self, like: Tensor, groups: int, weights: Tensor) -> None:
        self.act = torch.empty_like(like)
        self.hits = torch.empty(like.shape, device=like.device)
        self.hits_as_weights = self.hits.to(weights.dtype)
        self.row = torch.empty(like.shape[1], device=like.device)
        self.table = torch.empty(groups, like.shape[1], device=like.device)

    def swiglu(self, gate: Tensor, up: Tensor | None, out: Tensor) -> Tensor:
        """Writes h; returns act."""
        if up is None:
            return torch.ops.aten.silu.out(gate, out=out)  # type: ignore[no-any-return]
        torch.ops.aten.silu.out(gate, out=self.act)
        torch.mul(self.act, up, out=out)
        return self.act

    def total(self, gate: Tensor, up: Tensor | None, out: Tensor, count: Tensor) -> None:
        torch.gt(self.swiglu(gate, up, out), 0, out=self.hits)
        count += torch.sum(self.hits, 0, out=self.row).long()

    def segments(
        self,
        gate: Tensor,
        up: Tensor | None,
        out: Tensor,
        count: Tensor,
        bounds: Sequence[tuple[int, int]],
    ) -> None:
        torch.gt(self.swiglu(gate, up, out), 0, out=self.hits)
        for group, (start, end) in enumerate(bounds):
            torch.sum(self.hits[start:end], 0, out=self.table[group])
        count += self.table.long()

    def one_hot(
        self, gate: Tensor, up: Tensor | None, out: Tensor, count: Tensor, weights: Tensor
    ) -> None:
        torch.gt(self.swiglu(gate, up, out), 0, out=self.hits_as_weights)
        count += product(weights, self.hits_as_weights).long()

    def index_add(
        self, gate: Tensor, up: Tensor | None, out: Tensor, count: Tensor, ids: Tensor
    ) -> None:
        torch.gt(self.swiglu(gate, up, out), 0, out=self.hits)
        count += self.table.zero_().index_add_(0, ids, self.hits).long()

    def responses(
        self, gate: Tensor, up: Tensor, out: Tensor, sums: dict[str, Tensor], mask: Tensor
    ) -> None:
        """Sums over the tokens of each prompt by a padded batch: mask (N, length, 1), then sum."""
        self.swiglu(gate, up, out)
        n, length, _ = mask.shape
        for site, value in (("gate", gate), ("up", up), ("product", out)):
            masked = self.act[: n * length].view(n, length, -1)
            torch.mul(value[: n * length].view(n, length, -1), mask, out=masked)
            sums[site] += torch.sum(masked, 1, dtype=torch.float32)


def responses_on_host(
    gate: Tensor, up: Tensor, out: Tensor, sums: dict[str, Tensor], mask: Tensor
) -> None:
    """As the code of arXiv 2502.17355: every token's values go to the host, pooled there."""
    swiglu(gate, up, out)
    n, length, _ = mask.shape
    for site, value in (("gate", gate), ("up", up), ("product", out)):
        host = value[: n * length].float().cpu().view(n, length, -1)
        sums[site] += host.sum(1).to(out.device)


def liger(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Liger's SwiGLU forward; it makes its own output, which costs nothing on a GPU."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return cast(Tensor, LigerSiLUMulFunction.apply(gate, up))
