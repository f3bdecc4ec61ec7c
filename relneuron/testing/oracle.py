"""What `swiglu_stats` must compute, written from its spec in float64 and int64, plus test data.

The checks of `check_backend` compare a backend with it. It shares no code with the backends but
the fixed sequence of operations that defines the values of the sites act and product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from relneuron.ops import GroupStats
from relneuron.ops.swiglu_stats.reference import TORCH_ACTIVATIONS, site_values
from relneuron.testing.accuracy import assert_accurate, assert_same_bits

# --- test data -------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 2.0) -> Tensor:
    """Random values; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).mul(scale).to(dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """Random int32 in [low, high)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int64).int()


def all_patterns(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(1, 65536): every number of a 16-bit type once, in random order."""
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(seed))
    return (order - 32768).to(torch.int16).view(dtype).view(1, 65536)


def subnormals(dtype: torch.dtype) -> list[float]:
    """The smallest and the largest subnormal number of a type."""
    info = torch.finfo(dtype)
    return [info.smallest_normal * info.eps, info.smallest_normal * (1 - info.eps)]


# --- h ---------------------------------------------------------------------------------------


def eager_activation(gate: Tensor, activation: str) -> Tensor:
    """torch's own activation, in the dtype of gate."""
    return TORCH_ACTIVATIONS[activation](gate)


def exact_activation(gate: Tensor, activation: str) -> Tensor:
    """In float64, by formulas that keep their digits in the negative tail."""
    wide = gate.double()
    if activation == "gelu":
        tail: Tensor = torch.special.erfc(wide * -math.sqrt(0.5))
        return wide * tail * 0.5
    if activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        return wide / (1 + torch.exp(-2 * inner))
    if activation in ("silu", "quick_gelu"):
        return wide / (1 + torch.exp(wide * (-1.702 if activation == "quick_gelu" else -1.0)))
    return TORCH_ACTIVATIONS[activation](wide)


def ulps_apart(a: Tensor, b: Tensor) -> Tensor:
    """Distance in representable numbers of two tensors of one float dtype, 0 for two NaN."""

    def order(x: Tensor) -> Tensor:
        bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).long()
        return torch.where(bits < 0, -(bits + 2 ** (8 * x.element_size() - 1)), bits)

    return torch.where(a.isnan() & b.isnan(), 0, (order(a) - order(b)).abs())


def keep_mask(keep: Tensor, condition_ids: Tensor | None, n_tokens: int, width: int) -> Tensor:
    """(T, F) bool, bit by bit: neuron f stays when bit f % 32 of word f // 32 is set."""
    rows = [
        [bool((words[f // 32] & 0xFFFFFFFF) >> (f % 32) & 1) for f in range(width)]
        for words in keep.tolist()
    ]
    mask = torch.tensor(rows, dtype=torch.bool).reshape(len(rows), width)
    conditions = [0] * n_tokens if condition_ids is None else condition_ids.tolist()
    return mask[torch.tensor(conditions, dtype=torch.int64)]


def assert_h(
    h: Tensor, gate: Tensor, up: Tensor | None, activation: str, mask: Tensor | None = None
) -> None:
    """h by the accuracy rule where `mask` keeps it, and exactly +0 elsewhere."""
    truth, eager = exact_activation(gate, activation), eager_activation(gate, activation)
    if up is not None:
        truth, eager = truth * up.double(), eager * up
    if mask is not None:
        assert h.shape == mask.shape, f"h is {tuple(h.shape)} instead of {tuple(mask.shape)}"
        expected = torch.where(mask, h, torch.zeros_like(gate))
        assert_same_bits(h, expected, "h (a dropped neuron must be +0)")
        truth, eager = truth.where(mask, 0.0), eager.where(mask, 0.0)
    assert_accurate(h, truth, eager)


# --- statistics ------------------------------------------------------------------------------


def assert_stats(
    after: GroupStats,
    before: GroupStats,
    gate: Tensor,
    up: Tensor | None,
    group_ids: Tensor | None,
    activation: str,
) -> None:
    """`after` is `before` plus the statistics of one call of swiglu_stats."""
    values = site_values(gate, up, activation, before.sites)
    assert_recorded(after, before, values, group_ids, str(gate.dtype).removeprefix("torch."))


def assert_recorded(
    after: GroupStats,
    before: GroupStats,
    values: dict[str, Tensor],
    group_ids: Tensor | None,
    dtype: str = "as float32",
) -> None:
    """`after` is `before` plus the statistics of float32 `values`, one group at a time."""
    n_tokens, width = next(iter(values.values())).shape
    ids = torch.zeros(n_tokens, dtype=torch.int32) if group_ids is None else group_ids
    rows = [(ids == group).nonzero().squeeze(1) for group in range(before.groups)]
    sizes = torch.tensor([len(r) for r in rows], dtype=torch.int64)
    assert_same_bits(after.tokens, before.tokens + sizes, "tokens")
    for site in before.sites:
        value = values[site].double()
        about = f"[{site}] ({dtype}, threshold {before.threshold})"
        active = value > before.threshold
        added = torch.stack([active[r].sum(0) for r in rows])
        assert_same_bits(after.count[site], before.count[site] + added, f"count{about}")
        if not before.moments:
            continue
        finite = value.isfinite()
        added = torch.stack([(~finite)[r].sum(0) for r in rows])
        assert_same_bits(
            after.n_nonfinite[site], before.n_nonfinite[site] + added, f"n_nonfinite{about}"
        )
        low = torch.full((1, width), -math.inf, dtype=torch.float64)
        # Adding 0 turns -0 into +0.
        candidates = torch.where(finite, value + 0.0, -math.inf)
        largest = torch.stack([torch.cat([low, candidates[r]]).amax(0) for r in rows])
        largest = torch.maximum(largest, before.max[site].double())
        assert_same_bits(after.max[site], largest.float(), f"max{about}")
        terms = torch.where(finite, value, 0.0)
        _assert_sum(after.sum[site], before.sum[site], terms, rows, f"sum{about}")
        _assert_sum(after.sum_sq[site], before.sum_sq[site], terms**2, rows, f"sum_sq{about}")


def _assert_sum(out: Tensor, start: Tensor, terms: Tensor, rows: list[Tensor], what: str) -> None:
    """A float64 sum whose partial sums over up to 256 tokens may be float32, in any fixed order.

    The error of n float32 additions grows like sqrt(n) times the sum of the absolute terms. What
    was there before the call is float64 and stays so, and no sum of finite values may overflow.
    """
    truth = start + torch.stack([terms[r].sum(0) for r in rows])
    n_terms = torch.tensor([[max(len(r), 1)] for r in rows])
    scale = torch.stack([terms[r].abs().sum(0) for r in rows]) * n_terms.clamp(max=256).sqrt()
    # The rule takes the rounding of `out`, which is float64; the one of float32 is this much more.
    coarser = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
    # And float32 has nothing below 2^-149, which each square may lose.
    scale = scale + n_terms * (2.0**-149 / torch.finfo(torch.float32).eps)
    try:
        assert_accurate(out, truth, truth, scale * coarser + start.abs() + truth.abs())
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def assert_responses(
    after: dict[str, Tensor],
    before: dict[str, Tensor],
    gate: Tensor,
    up: Tensor | None,
    prompt_ids: Tensor,
    activation: str,
) -> None:
    """`after` is `before` plus the value of every token in the row of its prompt."""
    values = site_values(gate, up, activation, before)
    for site, start in before.items():
        n_prompts = start.shape[0]
        rows = [(prompt_ids == n).nonzero().squeeze(1) for n in range(n_prompts)]
        terms = [torch.cat([start[n : n + 1], values[site][rows[n]]]) for n in range(n_prompts)]
        truth = torch.stack([t.double().sum(0) for t in terms])
        eager = torch.stack([t.sum(0) for t in terms])
        # A float32 sum in any fixed order: its error grows like sqrt(n) times the absolute terms.
        scale = torch.stack([t.double().abs().sum(0) * math.sqrt(len(t)) for t in terms])
        try:
            assert_accurate(after[site], truth, eager, scale)
        except AssertionError as error:
            raise AssertionError(f"responses[{site}] (prompt, neuron): {error}") from None
